"""The tokenizer that goes with the models of a pool, where the pool is given no other."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from fusion_bench.modelpool.processor import Processor
from fusion_bench.modelpool.sources import Source
from fusion_bench.modelpool.tokens import Vocabulary
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import Repository
from fusion_bench.sources import unbuilt
from fusion_bench.tokenizer import TokenizerSource, tokenizer_files


class ReferenceTokenizer:
    """The processor's, or else the reference's.

    Args:
        reference: gives how the reference is named.
        processor: what a merged model gets in place of the reference's.
        vocabulary: gives how many tokens the models have, if that is known.
    """

    def __init__(
        self,
        reference: Callable[[], Source],
        processor: Processor | None,
        vocabulary: Callable[[], int | None],
    ):
        self._reference = reference
        self._processor = processor
        self._vocabulary = vocabulary

    @cached_property
    def source(self) -> TokenizerSource:
        """Where it comes from, for those who read it."""
        return TokenizerSource(self.found, self._check, self.unbuilt)

    def unbuilt(self) -> Path | None:
        """Return where the zoo is to be built that has it."""
        if self._processor is not None:
            return self._processor.unbuilt
        node = self._reference().named.node
        return unbuilt(node) if isinstance(node, str) else None

    def found(self) -> object:
        """Return its folder, or what the processor's node makes; ``None`` where there is none."""
        if self._processor is not None:
            return self._processor.folder or self._processor.made()
        folders = self._reference().companions
        return next((folder for folder in folders if tokenizer_files(folder)), None)

    def _check(self) -> None:
        """Refuse a tokenizer with tokens that the models do not know, if its files are here.

        Raises:
            FusionBenchError: it has some.
        """
        found, size = self.found(), self._vocabulary()
        own = Vocabulary.of(found) if isinstance(found, Repository) else None
        if own is None or size is None or not own.repository.has(*own.needed()):
            return
        if tokens := own.known():
            largest = max(tokens)
            if largest >= size:
                raise FusionBenchError(
                    f"the tokenizer of '{own.repository.name}' has a token {largest} "
                    f"({tokens[largest]!r}), and the models' vocabulary has {size}.",
                    "Name the tokenizer that belongs to the models.",
                )
