"""The rows of a dataset that holds texts."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fusion_bench.addresses import Folders
from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool.datasets import (
    DatasetPlace,
    columns_sha256,
    load_split,
    refuse_unusable,
)

if TYPE_CHECKING:
    from datasets import Dataset, Features


class Texts:
    """The rows of one split, read as plain values.

    Args:
        dataset: the split.
        place: of the dataset, for messages.

    Raises:
        FusionBenchError: no sample.
    """

    def __init__(self, dataset: "Dataset", place: DatasetPlace):
        self.dataset = dataset.with_format(None)
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
            dataset = load_split(node)
        refuse_unusable(dataset, place, Folders.of(node))
        return cls(dataset, place)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.dataset)

    @property
    def features(self) -> "Features":
        """The columns' types."""
        return self.dataset.features

    @cached_property
    def fingerprint(self) -> str:
        """The hash of all that the rows hold."""
        return columns_sha256(self.dataset, list(self.features))

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
