"""A model: weights, and what else decides what is computed with them."""

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
    """Weights, and what else decides what is computed with them.

    Attributes:
        weights: its entries.
        config: as its ``config.json`` has it; None where it has none.
        kind: what is made of both: a class of transformers, or how a module prints itself.
        companions: the folders with its tokenizer and its processors, its own first.
    """

    weights: Weights
    config: Config | None
    kind: str
    companions: tuple[Repository, ...] = ()

    @cached_property
    def identity(self) -> str:
        """The key under which anything about the model may be kept; its weights are read for it.

        Models with the same compute the same. No name and no place is in it.
        """
        parts = [sha256(self.weights), self.kind, deciding(self.config or {})]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
