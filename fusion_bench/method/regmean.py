r"""RegMean: $W^\top = (\sum_t \tilde G_t)^{-1} \sum_t \tilde G_t W_t^\top$ for each linear layer.

$G_t = X_t^\top X_t / n$ is the Gram matrix of what enters the layer in model $t$ on its own task,
and $\tilde G_t$ has its off-diagonal elements reduced. It is the matrix whose outputs are nearest
to those of all models. Jin et al., Dataless knowledge fusion, https://arxiv.org/abs/2212.09849
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.method.contract import Data, ModelPool, Split, TaskData
from fusion_bench.method.data import (
    LearningAlgorithm,
    check_patterns,
    check_sampling,
    drawn_batches,
    excluded,
    merged,
    own_data,
    parameter_keys,
    wide,
)
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.problems import FusionBenchError, check_between, check_choice
from fusion_bench.threads import fixed_threads
from fusion_bench.weights import Weights

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class RegMeanAlgorithm(LearningAlgorithm):
    """The average of all models, with linear layers solved by regression.

    Args:
        num_regmean_examples: samples of each task, drawn at random; ``null`` takes all.
        exclude_param_names_regex: parameters whose names match are copied from the pretrained
            model, or averaged if there is none.
        reduce_non_diagonal_ratio: factor of the Gram matrices' off-diagonal elements, from 0 to 1.
        batch_size: samples in a batch.
        split: the split of the datasets to use; labels are not looked at.
        seed: the random seed.
        weight_transpose: weights are stored with the outputs first, as in ``nn.Linear``; only these
            layers are supported.
        num_workers: ignored; the task pool's setting is used.
    """

    needs_own_data = True

    @keeps_arguments
    def __init__(
        self,
        num_regmean_examples: int | None = 256,
        exclude_param_names_regex: Sequence[str] = (),
        reduce_non_diagonal_ratio: float = 0.95,
        batch_size: int = 32,
        split: Split = "train",
        seed: int | None = None,
        weight_transpose: bool = True,
        num_workers: int | None = None,
    ):
        check_choice("split", split, Split)
        check_between("reduce_non_diagonal_ratio", reduce_non_diagonal_ratio, 0, 1)
        check_sampling("num_regmean_examples", num_regmean_examples, batch_size)
        if not weight_transpose:
            raise FusionBenchError(
                "false is for layers that store weights with the inputs first; only nn.Linear is "
                "merged here. Remove the key.",
                place=("weight_transpose",),
            )
        self.num_regmean_examples = num_regmean_examples
        check_patterns("exclude_param_names_regex", exclude_param_names_regex)
        self.exclude_param_names_regex = list(exclude_param_names_regex)
        self.reduce_non_diagonal_ratio = reduce_non_diagonal_ratio
        self.batch_size = batch_size
        self.split = split
        self.seed = seed or 0

    @torch.no_grad()
    def learn(self, pool: ModelPool, fabric: "Fabric", data: Data) -> Weights:
        """Collect the Gram matrices, model by model, and merge.

        Raises:
            FusionBenchError: a model without data.
        """
        normal = NormalEquations(self.reduce_non_diagonal_ratio)
        for name, task in own_data(pool.model_names, data).items():
            module = fabric.to_device(pool.load_model(name))
            parameter_keys(module, pool.weights(name))
            classify = task.classify(module)
            with collected_grams(module) as grams:
                for images in self.batches(name, task):
                    classify(images)
            normal.add(module, grams)
        return self.solved(pool, normal)

    def batches(self, name: str, task: TaskData) -> Iterator[Tensor]:
        """Yield the images whose activations are recorded."""
        count, title = self.num_regmean_examples, f"layer inputs of {name}"
        for images, _ in drawn_batches(task, count, self.batch_size, self.seed, title)[1]:
            yield images

    def solved(self, pool: ModelPool, normal: "NormalEquations") -> Weights:
        """Return the models' average, with the linear layers solved by ``normal``."""

        def merge_tensor(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            kept = excluded(key, self.exclude_param_names_regex)
            if kept and base is not None:
                return base.clone()
            average = SimpleAverageAlgorithm().merge_tensor(key, tensors, base)
            return average if kept or key not in normal else normal.solution(key, average)

        models = {name: pool.weights(name) for name in pool.model_names}
        return merged(pool, models, merge_tensor, weighted_sum=False)


class NormalEquations:
    """The normal equations of the merged linear layers, accumulated model by model in float64.

    Args:
        ratio: factor of the Gram matrices' off-diagonal elements.
    """

    def __init__(self, ratio: float):
        self._ratio = ratio
        self._left: dict[str, Tensor] = {}
        self._right: dict[str, Tensor] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def add(self, module: nn.Module, grams: "Mapping[str, Gram]", prefix: str = "") -> None:
        """Add a model's weights and the Gram matrices of its layers' inputs."""
        own = dict(module.named_parameters())
        for key, gram in grams.items():
            mean = gram.mean()
            left = (mean * self._ratio).diagonal_scatter(mean.diagonal())
            right = left @ own[key].detach().to(left).T
            for sums, value in ((self._left, left), (self._right, right)):
                sums[prefix + key] = sums[prefix + key] + value if prefix + key in sums else value

    def solution(self, key: str, average: Tensor) -> Tensor:
        """Return a layer's merged weight, outputs first; the models' average for zero inputs.

        It is drawn to the average no more than makes the matrix regular.
        """
        left = self._left[key]
        diagonal = left.diagonal()
        with fixed_threads(left.numel(), left.device):
            for power in range(-9, 0):
                pull = 10.0**power * torch.where(diagonal == 0, 1, diagonal)
                factor, failed = torch.linalg.cholesky_ex(left.diagonal_scatter(diagonal + pull))
                if not failed:
                    break
            right = self._right[key] + pull[:, None] * average.to(left).T
            return torch.cholesky_solve(right, factor).T.to(average)


class Gram:
    r"""The mean of $x x^\top$ over all input rows of a layer, in float64."""

    def __init__(self) -> None:
        self._total = torch.zeros((), dtype=torch.float64)
        self._rows = 0

    def add(self, total: Tensor, rows: int) -> None:
        """Add the sum over so many rows."""
        self._total = total + self._total.to(total)
        self._rows += rows

    def mean(self) -> Tensor:
        """Return the matrix."""
        return self._total / max(self._rows, 1)


def gram_sum(inputs: Tensor) -> Tensor:
    r"""Return the sum of $x x^\top$ over all rows, which lie along the last dimension."""
    rows = wide(inputs.reshape(-1, inputs.shape[-1]))
    return (rows.T @ rows).double()


@contextmanager
def collected_grams(module: nn.Module) -> Iterator[Mapping[str, Gram]]:
    """Collect, while the context lasts, what enters each linear layer, by the weight's name.

    For layers that are fed one tensor, such as those of query, key and value, it is computed once.
    """
    grams: dict[str, Gram] = {}
    last: tuple[Tensor, int, Tensor] | None = None  # a tensor, its version, and its matrix

    def hook(key: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            nonlocal last
            inputs = args[0] if args else kwargs["input"]
            if last is None or inputs is not last[0] or inputs._version != last[1]:
                last = inputs, inputs._version, gram_sum(inputs)
            grams.setdefault(key, Gram()).add(last[2], inputs.numel() // inputs.shape[-1])

        return look

    own = dict(module.named_parameters())  # a tied weight is an embedding too
    handles = []
    for name, layer in module.named_modules():
        key = f"{name}.weight".removeprefix(".")
        if isinstance(layer, nn.Linear) and key in own:
            handles.append(layer.register_forward_pre_hook(hook(key), with_kwargs=True))
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()
