"""The rows of a dataset that holds texts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fusion_bench import __version__
from fusion_bench.addresses import Folders
from fusion_bench.problems import FusionBenchError
from fusion_bench.sealed import remembered
from fusion_bench.taskpool.datasets import (
    DatasetPlace,
    columns_sha256,
    load_split,
    refuse_unusable,
)
from fusion_bench.taskpool.embedded import embedded_split

if TYPE_CHECKING:
    from datasets import Dataset, Features


class Texts:
    """The rows of one split, read as plain values.

    Args:
        load: returns the split.
        place: of the dataset, for messages.
        known: the split's name and what it holds, where that is known without it.

    Raises:
        FusionBenchError: no sample.
    """

    def __init__(
        self,
        load: "Callable[[], Dataset]",
        place: DatasetPlace,
        known: tuple[str, Sequence[Mapping[str, Any]]] | None = None,
    ):
        self._load = load
        self._split: str | None = None
        self._rows: Sequence[Mapping[str, Any]] | None = None
        if known is not None:
            self._split, self._rows = known
        self.place = place
        if not len(self):
            raise place.refusal("it has no sample.", "Choose another split.")

    @classmethod
    def load(cls, node: Any, place: DatasetPlace) -> "Texts":
        """Load what a node names.

        Raises:
            FusionBenchError: a dataset that cannot be read, no single split, or no sample.
        """
        with place.located():
            known = embedded_split(node)
            if known is not None:
                return cls(lambda: load_split(node), place, known)
            dataset = load_split(node)
        refuse_unusable(dataset, place, Folders.of(node))
        return cls(lambda: dataset, place)

    @cached_property
    def dataset(self) -> "Dataset":
        """The split."""
        return self._load().with_format(None)

    @property
    def split(self) -> str:
        """The split's name; empty where the dataset has none."""
        return str(self.dataset.split or "") if self._split is None else self._split

    def __len__(self) -> int:
        return len(self.dataset if self._rows is None else self._rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.dataset if self._rows is None else self._rows)

    @property
    def columns(self) -> list[str]:
        """The columns' names."""
        return list(self.features if self._rows is None else self._rows[0])

    @property
    def features(self) -> "Features":
        """The columns' types."""
        return self.dataset.features

    @cached_property
    def fingerprint(self) -> str:
        """The hash of all that the rows hold.

        The split is not made for it where one with the same rows was made before.
        """

        def hashed() -> str:
            return columns_sha256(self.dataset, list(self.features))

        if self._rows is None:
            return hashed()
        libraries = [version(name) for name in ("datasets", "pyarrow")]
        return remembered("facts", ["texts", libraries, __version__, self._rows], hashed)

    def wrong(self, index: int, error: FusionBenchError) -> FusionBenchError:
        """Return what to raise where a sample cannot be used; ``error`` says why."""
        problem = error.problems[0]
        return self.place.refusal(f"sample {index}: {problem.reason}", problem.remedy)

    def shares(self, other: "Texts") -> float:
        """Return the share of samples that the other dataset has, too."""
        known = {_row(row) for row in other}
        return sum(_row(row) in known for row in self) / len(self)


def _row(row: Mapping[str, Any]) -> str:
    return repr(sorted(row.items()))
