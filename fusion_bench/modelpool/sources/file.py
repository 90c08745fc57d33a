"""A file of weights is a model; what else belongs to it is beside it, if it is anywhere."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from fusion_bench.modelpool.sources.folder import Folder
from fusion_bench.modelpool.sources.source import Named
from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import Repository
from fusion_bench.weights import Weights, open_checkpoint


@dataclass(frozen=True, eq=False)
class File(Folder):
    """Weights in a file of their own, with whatever a folder has beside them."""

    @classmethod
    def take(cls, named: Named) -> Optional["File"]:
        """Take the path of a file."""
        with suppress(RuntimeError):  # the home directory of nobody known
            if isinstance(named.node, str) and Path(named.node).expanduser().is_file():
                return cls(named, named.node)
        return None

    @property
    def at(self) -> Repository:
        """The folder that it is in, under its own name."""
        folder = Path(self.name).expanduser().absolute().parent
        return replace(self.named.pool.locate(str(folder)), name=self.name)

    @property
    def home(self) -> None:
        """A file has neighbours, and not a folder."""

    def plan(self, plan: Plan) -> bool:
        """There is nothing to find.

        Raises:
            FusionBenchError: a file that holds no weights.
        """
        if Path(self.name).suffix in (".yaml", ".yml", ".json", ".md", ".txt"):
            raise FusionBenchError(
                f"'{self.name}' is not a file of weights.", "Name a model's folder, or its weights."
            )
        self.named.refuse_base()
        return True

    def _weights(self) -> Weights:
        return open_checkpoint(Path(self.name).expanduser())


def whole(named: Named) -> Folder | None:
    """Return the whole model that a name stands for; None for what is no name."""
    return File.take(named) or Folder.take(named)
