"""The ways of naming a model, one a file. The first that takes what the config says wins."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fusion_bench.modelpool.sources.adapter import Adapter, with_bases
from fusion_bench.modelpool.sources.file import File
from fusion_bench.modelpool.sources.folder import Folder
from fusion_bench.modelpool.sources.gguf import Gguf
from fusion_bench.modelpool.sources.merged import Merged
from fusion_bench.modelpool.sources.module import Module
from fusion_bench.modelpool.sources.node import Node
from fusion_bench.modelpool.sources.source import Named, Source
from fusion_bench.repository import Repository, locate
from fusion_bench.sources import unbuilt
from fusion_bench.weights import HubWeights, Weights, open_repository

#: Each is asked in turn; the last takes anything.
KINDS: tuple[Callable[[Named], Source | None], ...] = (
    Module.take,
    Gguf.take,
    File.take,
    Adapter.take,
    Folder.take,
    Merged.take,
    Node.take,
)


class Sources(Mapping[str, Source]):
    """A pool's models by name; each is looked at when it is first asked for.

    Args:
        models: name to what the config says of it.
        model_class: the class in transformers that modules are built by.

    Attributes:
        scratch: where small files go that are not here, in place of the caches.

    Raises:
        ConfigError: a mapping that names no model.
    """

    def __init__(self, models: Mapping[str, object], model_class: str):
        self._nodes, self._bases = with_bases(models)
        self.model_class = model_class
        self.scratch: Path | None = None
        self._known: dict[str, Source] = {}
        self._places: dict[str, Repository] = {}
        self._headers: dict[str, HubWeights] = {}

    def __getitem__(self, name: str) -> Source:
        if name not in self._known:
            base = self._bases.get(name)
            named = Named(self._nodes[name], ("models", name), self, name, base)
            taken = (source for take in KINDS if (source := take(named)) is not None)
            self._known[name] = next(taken)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, name: object) -> bool:
        return name in self._nodes

    def is_unbuilt(self, name: str) -> bool:
        """Tell whether a model is of the zoo, which is still to be built."""
        node = self._nodes.get(name)
        return isinstance(node, str) and unbuilt(node) is not None

    def locate(self, name: str) -> Repository:
        """Return where a name points to; looked for once, so that all its files are of one state.

        Raises:
            FusionBenchError: as ``fusion_bench.repository.locate``.
        """
        if name not in self._places:
            self._places[name] = locate(name, self.scratch)
        return self._places[name]

    def open(self, repository: Repository) -> Weights:
        """Return the weights in a repository; a header that was asked for on the Hub is kept.

        Raises:
            FusionBenchError: as ``open_repository``.
        """
        if repository.name not in self._headers:
            weights = open_repository(repository)
            if not isinstance(weights, HubWeights):
                return weights
            self._headers[repository.name] = weights
        return self._headers[repository.name]
