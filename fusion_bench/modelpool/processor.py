"""The tokenizer or processor that a merged model gets in place of the reference's."""

from pathlib import Path
from typing import Any

from fusion_bench.modelpool.directory import copy_files, processor_files
from fusion_bench.modelpool.sources import Sources
from fusion_bench.modelpool.sources.file import whole
from fusion_bench.modelpool.sources.source import Named
from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError, within
from fusion_bench.repository import Repository
from fusion_bench.sources import load, plain_source, unbuilt


class Processor:
    """A tokenizer or a processor.

    Args:
        node: the name of a folder, or a config node; as for models.
        sources: the models beside it.
        key: the pool's key that names it.
    """

    def __init__(self, node: object, sources: Sources, key: str = "processor"):
        self._key = key
        self._node = plain_source(node)
        self._source = whole(Named(self._node, (key,), sources))

    @property
    def folder(self) -> Repository | None:
        """Where its files lie; None for one that is made.

        Raises:
            FusionBenchError: they are not there.
        """
        with within(self._key):
            return None if self._source is None else self._source.at

    @property
    def unbuilt(self) -> Path | None:
        """Where the zoo has to be built that has it, if that is so."""
        return None if self._source is None else unbuilt(self._source.name)

    def plan(self, plan: Plan) -> None:
        """Note files that are not here."""
        if self._source is not None and self.unbuilt is None:
            with plan.collect(self._key):
                plan.download(self._source.at, *processor_files(self._source.at))

    def made(self) -> Any:
        """Return what the node makes.

        Raises:
            FusionBenchError: it cannot be made.
        """
        with within(self._key):
            return load("processor", self._node, "processor")

    def write(self, directory: Path) -> None:
        """Write its files.

        Raises:
            FusionBenchError: there are none.
        """
        if (folder := self.folder) is None:
            self.made().save_pretrained(directory)
            return
        if not (names := processor_files(folder)):
            raise FusionBenchError(
                f"'{folder.name}' has neither a tokenizer nor a processor.",
                "Name another source, or none to take the pretrained model's.",
                place=(self._key,),
            )
        copy_files(folder, names, directory)
