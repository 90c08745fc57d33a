"""The tokenizer of models: found when it is asked for, and known by its content."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fusion_bench.pretrained import from_pretrained
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import Repository, locate
from fusion_bench.sealed import remembered
from fusion_bench.sources import load, plain_source, reading, unbuilt
from fusion_bench.storage import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fusion_bench.plan import Plan


class TokenizerSource:
    """Where a tokenizer comes from.

    Args:
        find: returns the folder with its files, a config node, or the tokenizer; ``None`` where
            there is none. It may raise a ``FusionBenchError`` that names its own place.
        check: raises one where files that are here do not fit the models.
        unbuilt: returns where the zoo has to be built before it can be looked for, if that is so.
    """

    def __init__(
        self,
        find: Callable[[], object],
        check: Callable[[], None] = lambda: None,
        unbuilt: Callable[[], Path | None] = lambda: None,
    ):
        self._find = find
        self._check = check
        self._unbuilt = unbuilt

    @classmethod
    def named(cls, given: object) -> "TokenizerSource":
        """Return that of a name, a config node or a tokenizer."""
        given = plain_source(given)
        if isinstance(given, str):
            return cls(lambda: locate(given), unbuilt=lambda: unbuilt(given))
        return cls(lambda: given)

    @property
    def unbuilt(self) -> Path | None:
        """Where the zoo has to be built before more is known; ``None`` where it is not needed."""
        return self._unbuilt()

    @cached_property
    def _found(self) -> object:
        return self._find()

    @property
    def exists(self) -> bool:
        """Whether there is one, as far as files tell."""
        found = self._found
        return bool(tokenizer_files(found)) if isinstance(found, Repository) else found is not None

    def plan(self, plan: "Plan") -> None:
        """Note files that are not here, and check those that are.

        Raises:
            FusionBenchError: they do not fit the models.
        """
        self._check()
        if isinstance(found := self._found, Repository):
            plan.download(found, *tokenizer_files(found))

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, which nobody may change.

        Raises:
            FusionBenchError: there is none, or it cannot be read.
        """
        found = self._found
        if not self.exists:
            raise FusionBenchError("there is no tokenizer.", "Name one.")
        if not isinstance(found, Repository):
            return cast("PreTrainedTokenizerBase", load("processor", found, "tokenizer"))
        from transformers import AutoTokenizer

        with reading("processor", found.name):
            place = found.fetch(*_read_files(found))
            made = from_pretrained(AutoTokenizer, place, model=False)
        return cast("PreTrainedTokenizerBase", made)

    @cached_property
    def identity(self) -> str:
        """The hash of all that decides which tokens a text becomes, and back.

        The tokenizer is not read again if one of the same files was read before.

        Raises:
            FusionBenchError: as ``tokenizer``.
        """
        found = self._found
        known = "tokenizer" in vars(self)
        if known or not self.exists or not isinstance(found, Repository) or found.code:
            return identity(self.tokenizer)
        with reading("processor", found.name):
            place = found.fetch(*_read_files(found))
            files = {name: file_sha256(place / name) for name in _read_files(found)}
        libraries = [version(name) for name in ("transformers", "tokenizers")]
        about = ["tokenizer", libraries, files]
        return remembered("facts", about, lambda: identity(self.tokenizer))


def tokenizer_files(repository: Repository) -> list[str]:
    """Return the files of a folder that a tokenizer is made of."""
    from fusion_bench.companions import PROCESSORS, TEMPLATES

    own = [name for name in PROCESSORS if name in repository.files and "preproc" not in name]
    if not any("config" not in name and "template" not in name for name in own):
        return []
    if TEMPLATES in repository.folders:
        own += sorted(repository.inside(TEMPLATES))
    return own


def _read_files(repository: Repository) -> list[str]:
    """Return the files that a tokenizer is read from."""
    return sorted({*tokenizer_files(repository), *({"config.json"} & repository.files)})


def identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the hash of a tokenizer's content; names and paths are no part of it."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    own: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:  # it also says how texts were cut and filled up at the last call
        own = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    parts = [
        type(tokenizer).__name__,
        own,
        tokenizer.special_tokens_map,
        str(tokenizer.chat_template),
        tokenizer.model_max_length,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
