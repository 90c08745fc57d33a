"""What a model answered on a task, kept by content: nothing is evaluated twice."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fusion_bench.storage import cache_dir, locked, warn_not_kept
from fusion_bench.taskpool.sealed import read_sealed, write_sealed

log = logging.getLogger(__name__)

#: Goes up when the evaluation's figures may change, so that older results count no more.
EVALUATION_VERSION = 1


@dataclass(frozen=True, eq=False)
class Score:
    """How a model did on a task: an answer a sample, from which every figure follows.

    Attributes:
        samples: which of the dataset's samples were evaluated, in ascending order.
        labels: their classes.
        predictions: the model's.
        losses: the cross entropy of each, in nats, float32.
    """

    samples: NDArray[np.int64]
    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    losses: NDArray[np.float32]

    @property
    def num_samples(self) -> int:
        """How many samples were evaluated."""
        return len(self.samples)

    @property
    def num_correct(self) -> int:
        """How many answers were right."""
        return int((self.predictions == self.labels).sum())

    @property
    def loss_sum(self) -> float:
        """The sum of the losses, in float64."""
        return float(self.losses.sum(dtype=np.float64))

    def per_class(self, num_classes: int) -> list[float | None]:
        """Return each class's accuracy; ``None`` for one without samples."""
        right = np.bincount(self.labels[self.predictions == self.labels], minlength=num_classes)
        there = np.bincount(self.labels, minlength=num_classes)
        return [int(r) / int(n) if n else None for r, n in zip(right, there, strict=True)]

    def parquet(self) -> bytes:
        """Return a parquet file with a row a sample: sample, label, prediction, loss."""
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table(
            {
                "sample": self.samples,
                "label": self.labels,
                "prediction": self.predictions,
                "loss": self.losses,
            }
        )
        content = pyarrow.BufferOutputStream()
        parquet.write_table(table, content)
        return content.getvalue().to_pybytes()


class ResultStore:
    """Scores on disk, under the hash of all that they depend on."""

    def __init__(self) -> None:
        self._root = cache_dir() / "results"

    def load(self, key: Mapping[str, Any]) -> Score | None:
        """Return what is known under ``key``; a damaged file counts as nothing."""
        content = read_sealed(self._path(key))
        return None if content is None else Score(**load(content))

    def save(self, key: Mapping[str, Any], score: Score) -> None:
        """Keep a score; a disk that cannot take it is no reason to stop."""
        content = save({name: np.ascontiguousarray(v) for name, v in vars(score).items()})
        try:
            write_sealed(self._path(key), content)
        except OSError as error:
            warn_not_kept(error)

    @contextmanager
    def alone(self, key: Mapping[str, Any], timeout: float) -> Iterator[bool]:
        """Keep other processes from evaluating what this one is about to; yield whether it may.

        Where there is no lock to be had, on a disk that cannot be written to for one, or not in
        time, the same is evaluated twice: a waste, but no harm.

        Args:
            key: of the result.
            timeout: seconds to wait for another process that evaluates it, negative for as long as
                that lives. With 0 there is no waiting, and it yields false.
        """
        lock = locked(cache_dir() / "evaluating" / self._path(key).name[:3], timeout)
        with ExitStack() as held:
            try:
                held.enter_context(lock)
            except TimeoutError:
                if timeout == 0:
                    yield False
                    return
            except (OSError, NotImplementedError) as error:
                log.debug("Evaluating without a lock: %s", error)
            yield True

    def _path(self, key: Mapping[str, Any]) -> Path:
        canonical = json.dumps({"version": EVALUATION_VERSION, **key}, sort_keys=True)
        name = hashlib.sha256(canonical.encode()).hexdigest()
        return self._root / name[:2] / name
