"""What a language model is asked, in tokens."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """How likely is a continuation after a context, both not empty?

    An encoder reads the context, where there is one.
    """

    context: Tokens
    continuation: Tokens

    def key(self) -> bytes:
        """Return a hash of the request."""
        return self._key

    @cached_property  # several models are asked the same
    def _key(self) -> bytes:
        return _hash("likelihood", self.context, self.continuation)


@dataclass(frozen=True)
class Generation:
    """What follows a context?

    Attributes:
        context: not empty.
        stop: texts before which the answer ends.
        max_new_tokens: where it ends at the latest.
        options: arguments of transformers' ``GenerationConfig``; without any it is greedy.
        seed: of what is drawn, for a text that is sampled several times.
    """

    context: Tokens
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    options: Mapping[str, float | int | bool] = field(default_factory=dict, hash=False)
    seed: int = 0

    @property
    def settings(self) -> str:
        """All but the context; requests with the same may be answered at once."""
        own = [self.stop, self.max_new_tokens, dict(self.options), self.seed]
        return json.dumps(own, sort_keys=True)

    def key(self) -> bytes:
        """Return a hash of the request."""
        return _hash(f"generation {self.settings}", self.context)


def _hash(kind: str, *parts: Tokens) -> bytes:
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for part in parts:
        digest.update(struct.pack(f"<q{len(part)}q", len(part), *part))
    return digest.digest()
