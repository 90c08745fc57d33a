"""A model: weights with their config, class and companion files."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from fusion_bench.repository import Repository
from fusion_bench.weights.config import Config, deciding
from fusion_bench.weights.digest import sha256
from fusion_bench.weights.mapping import Weights


@dataclass(frozen=True)
class Model:
    """Weights, and everything else that determines what the model computes.

    Attributes:
        weights: the entries.
        config: the content of ``config.json``, or None.
        kind: the class of transformers, or a module's printed form.
        companions: the folders with the tokenizer and the processors, the model's own first.
    """

    weights: Weights
    config: Config | None
    kind: str
    companions: tuple[Repository, ...] = ()

    @property
    def architecture(self) -> str:
        """The hash of what besides the weights determines the results: class and config."""
        parts = [self.kind, dict(self.config or {})]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def identity(self) -> str:
        """The hash of weights, class and config; computing it reads all weights.

        Equal identities mean equal results, so caches use it as a key. It contains no name or path.
        """
        parts = [sha256(self.weights), self.kind, deciding(self.config or {})]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
