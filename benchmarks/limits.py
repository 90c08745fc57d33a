"""What methods that factorise matrices cannot do without: the decompositions in their formulas.

Each is timed alone, of one matrix of each shape, in as many threads at once as there are cores,
with one of LAPACK's in each: that is the fastest way to many of them. *SVDs* are thin ones of
LAPACK, in float32, the models' own type, and in float64, as exact as the methods are.
*Eigenproblems* are those in float64 of Gram matrices that are there already, for as many vectors as
the formula needs.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_bench.threads import threads_each
from fusion_bench.weights.lapack import eigenvectors

Shape = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """SVDs in a formula, for each matrix of rows x columns; N is the number of models.

    Attributes:
        models: whether there is one for each model, or one in all.
        fewer: of how many models there is none.
        share: the part of the singular vectors that is needed.
        wide: whether the task vectors lie side by side.
        polar: whether they are of the left vectors and of the right vectors, each taken together.
    """

    models: bool = False
    fewer: int = 0
    share: float = 1.0
    wide: bool = False
    polar: bool = False

    def shapes(self, shape: Shape, models: int) -> list[Shape]:
        """Return the shapes of what is factorised."""
        rows, columns = shape
        rank = min(shape)
        if self.polar:
            return [(rows, rank), (rank, columns)]
        factor = models if self.wide else 1
        return [(rows, columns * factor)] * (models - self.fewer if self.models else 1)


#: By method, with eight models.
FORMULAS: dict[str, list[Part]] = {
    "isotropic_merging/iso_c": [Part()],
    "task_singular_vector/TaskSingularVectorMerging": [
        Part(models=True, share=1 / 8),
        Part(polar=True),
    ],
    "isotropic_merging/iso_cts": [Part(), Part(models=True, share=0.2 / 8), Part(polar=True)],
    "opcm/opcm": [Part(models=True, fewer=1)],
    "knots/knots": [Part(wide=True)],
}


def alone_seconds(parts: Sequence[Part], shapes: Sequence[Shape], models: int) -> dict[str, float]:
    """Return CPU seconds of all SVDs of a formula, and of all eigenproblems."""
    counts = Counter(
        (own, part.share)
        for shape in shapes
        for part in parts
        for own in part.shapes(shape, models)
    )
    found = {"SVDs in float32": 0.0, "SVDs in float64": 0.0, "eigenproblems": 0.0}
    for (shape, share), count in counts.items():
        matrix = torch.randn(max(shape), min(shape))  # LAPACK prefers it tall
        wanted = max(1, int(share * min(shape)))
        gram = matrix.T.double() @ matrix.double()
        for name, own in (("SVDs in float32", matrix), ("SVDs in float64", matrix.double())):
            found[name] += count * each(lambda m=own: torch.linalg.svd(m, full_matrices=False))
        found["eigenproblems"] += count * each(lambda g=gram, w=wanted: eigenvectors(g.clone(), w))
    return found


def processed(work: Callable[[], object]) -> float:
    """Return the CPU seconds of something, in all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def each(work: Callable[[], tuple[Tensor, ...]]) -> float:
    """Return CPU seconds of what is done in all cores at once, each with a matrix of its own."""

    def timed(_: int) -> float:
        work()
        start = time.thread_time()
        work()
        return time.thread_time() - start

    cores = torch.get_num_threads()
    with threads_each(1), ThreadPoolExecutor(cores) as pool:
        return sum(pool.map(timed, range(cores))) / cores
