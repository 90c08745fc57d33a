"""Base class of methods that learn from data."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from fusion_bench.method.base import aligned, refuse_disagreeing, run
from fusion_bench.method.contract import Data, ModelPool, Needs, Ran, Split, TaskData
from fusion_bench.method.plain import refuse_without_pretrained
from fusion_bench.problems import FusionBenchError, check_between
from fusion_bench.progress import Step, bar, step
from fusion_bench.tasks import canonical_name
from fusion_bench.threads import fixed_threads
from fusion_bench.weights import MergeTensor, Weights, merge

if TYPE_CHECKING:
    from lightning.fabric import Fabric

T = TypeVar("T")


def check_sampling(name: str, count: int | None, batch_size: int) -> None:
    """Refuse fewer than one sample, whose number is called ``name``, or less than one a batch.

    Raises:
        FusionBenchError: there is less.
    """
    if count is not None:
        check_between(name, count, 1, math.inf)
    check_between("batch_size", batch_size, 1, math.inf)


def check_descent(max_steps: int, batch_size: int, lr: float) -> None:
    """Refuse invalid options of a gradient descent.

    Raises:
        FusionBenchError: fewer than no steps, less than one sample a batch, a learning rate that
            is negative or beyond all measure.
    """
    check_between("max_steps", max_steps, 0, math.inf)
    check_between("batch_size", batch_size, 1, math.inf)
    check_between("lr", lr, 0, 1e6)


def drawn_batches(
    task: TaskData, count: int | None, batch_size: int, seed: int, title: str
) -> tuple[int, Iterator[tuple[Tensor, Tensor]]]:
    """Draw ``count`` samples of a task (``None``: all); return the number and the batches.

    ``title`` says what is being done.
    """
    samples = task.sample(count, seed)
    steps = -(-len(samples) // batch_size)
    return len(samples), bar(task.batches(samples, batch_size), title, total=steps, unit="batches")


def descent(
    data: Data, module: nn.Module, max_steps: int, batch_size: int, seed: int, title: str
) -> Iterator[tuple[Step, Iterator[tuple[Tensor, Tensor]]]]:
    """Yield the step of the work and each task's outputs and labels, step by step.

    The outputs of a task's batch are computed when they are taken. So the module may be changed at
    the beginning of a step, and a task's gradients taken before the next task.
    """
    batches = {name: task.endless(batch_size, seed) for name, task in data.items()}
    classify = {name: task.classify(module) for name, task in data.items()}
    with step(title, max_steps, "steps") as work:
        for _ in range(max_steps):
            drawn = ((name, *next(batches[name])) for name in data)
            answers = ((classify[name](images), name, labels) for name, images, labels in drawn)
            yield work, ((of_classes(logits, name), labels) for logits, name, labels in answers)
            work.advance()


def of_classes(logits: Tensor, task: str) -> Tensor:
    """Return a task's logits.

    Raises:
        FusionBenchError: they are of a single value, which has no distribution to learn from.
    """
    if logits.shape[-1] < 2:
        raise FusionBenchError(
            f"'{task}' predicts a number, and the method learns from the probabilities of classes.",
            "Leave the task out, or choose a method that learns otherwise, such as RegMean or a "
            "greedy soup.",
        )
    return logits


class LearningAlgorithm:
    """A method that learns from the datasets' images before it merges.

    Subclasses implement ``learn`` and have a ``split``; their classes say whether they need the
    pretrained model, a dataset for each model, and labels.
    """

    needs_pretrained = False
    needs_own_data = False
    uses_labels = False
    split: Split

    @property
    def needs(self) -> Needs:
        """What the method asks for."""
        return Needs(
            base=self.needs_pretrained,
            split=self.split,
            own_data=self.needs_own_data,
            labels=self.uses_labels,
        )

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse models that cannot be merged.

        Raises:
            FusionBenchError: a missing pretrained model, or weights that differ in keys, shapes or
                dtypes.
        """
        refuse_without_pretrained(self, pool)
        aligned(pool)

    def learn(self, pool: ModelPool, fabric: "Fabric", data: Data) -> Weights:
        """Learn from ``data`` and return the merge function.

        Raises:
            FusionBenchError: a model without data, or as the method says.
        """
        raise NotImplementedError(f"{type(self).__name__} must define learn.")

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Weights:
        """Learn, the same on a processor of any number of cores, and return the merged weights.

        Raises:
            FusionBenchError: no data, or as ``check_pool`` and ``learn``.
        """
        refuse_without_pretrained(self, pool)
        if fabric is None or data is None:
            raise FusionBenchError(
                f"{type(self).__name__} learns from data.", "Give run() a fabric and data."
            )
        first = [pool.weights(name) for name in pool.model_names[:1]]
        elements = sum(weights.spec(key).numel for weights in first for key in weights)
        with fixed_threads(elements, fabric.device):
            return self.learn(pool, fabric, data)

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Ran:
        """Learn and merge a pool's models, or those of a dict, which become a state dict."""
        return run(self, modelpool, fabric, data)


def own_data(names: Sequence[str], data: Mapping[str, T]) -> dict[str, T]:
    """Return the data of each model's own task; for methods with ``needs_own_data``.

    Raises:
        FusionBenchError: a model without.
    """
    known = {canonical_name(name): task for name, task in data.items()}
    for name in names:
        if canonical_name(name) not in known:
            raise FusionBenchError(
                f"There is no data for the model '{name}'. Add a dataset with this name; there "
                f"are datasets for: {', '.join(data) or 'none'}."
            )
    return {name: known[canonical_name(name)] for name in names}


def parameter_keys(module: nn.Module, weights: Weights) -> list[str]:
    """Return the keys of a module's parameters, which must be the weights' own.

    Raises:
        FusionBenchError: the module calls them otherwise than the files do.
    """
    keys = [name for name, _ in module.named_parameters()]
    if unknown := [key for key in keys if key not in weights]:
        raise FusionBenchError(
            f"The module has a parameter '{unknown[0]}' that is missing in its weights: this "
            f"method cannot learn with a {type(module).__name__}."
        )
    return keys


def wide(tensor: Tensor) -> Tensor:
    """Return it in float32, or in float64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def merged(
    pool: ModelPool,
    models: Mapping[str, Weights],
    merge_tensor: MergeTensor,
    *,
    weighted_sum: bool = True,
) -> Weights:
    """Return the models merged by ``merge_tensor``, under the pool's policy.

    Args:
        pool: where the models are from.
        models: by name.
        merge_tensor: the method.
        weighted_sum: it sums at each element apart, with weights that are the same all over.

    Raises:
        FusionBenchError: models that differ in keys, shapes or dtypes.
    """
    refuse_disagreeing(pool)
    return merge(
        models,
        merge_tensor,
        pool.weights("_pretrained_") if pool.has_pretrained else None,
        elementwise=weighted_sum,
        shows_nonfinite=weighted_sum,
        policy=pool.policy,
        vocabulary=pool.vocabulary,
    )


def check_patterns(name: str, patterns: Iterable[str]) -> None:
    """Refuse invalid regular expressions; ``name`` is the key of the patterns.

    Raises:
        FusionBenchError: one that is none.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise FusionBenchError(
                (f"'{pattern}' is not a valid pattern: {error}."), place=(name,)
            ) from error


def excluded(key: str, patterns: Iterable[str]) -> bool:
    """Return whether a regular expression matches a part of a parameter's name."""
    return any(re.search(pattern, key) for pattern in patterns)
