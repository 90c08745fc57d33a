r"""RegMean: $W^\top = (\sum_t \tilde G_t)^{-1} \sum_t \tilde G_t W_t^\top$ for each linear layer.

$G_t = X_t^\top X_t / n$ is the Gram matrix of what enters the layer in model $t$ on its own task,
and $\tilde G_t$ has its off-diagonal elements reduced. It is the matrix whose outputs are nearest
to those of all models. Jin et al., Dataless knowledge fusion, https://arxiv.org/abs/2212.09849
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_bench.errors import check_between, check_choice
from fusion_bench.method.data import Data, Split, TaskData, TrainablePool, excluded, own_data
from fusion_bench.progress import bar
from fusion_bench.weights import Weights, merge

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class RegMeanAlgorithm:
    """The average of all models, but for linear layers, which are solved for.

    Args:
        num_regmean_examples: samples of each task, drawn at random; ``null`` takes all.
        exclude_param_names_regex: parameters whose names match one of these stay the pretrained
            model's, or are averaged where there is none.
        reduce_non_diagonal_ratio: factor of the Gram matrices' off-diagonal elements, from 0 to 1.
        batch_size: samples in a batch.
        split: what part of the datasets is used; labels are not looked at.
        seed: draws with another seed are others.
    """

    needs_data = True
    uses_labels = False

    def __init__(
        self,
        num_regmean_examples: int | None = 256,
        exclude_param_names_regex: Sequence[str] = (),
        reduce_non_diagonal_ratio: float = 0.95,
        batch_size: int = 32,
        split: Split = "train",
        seed: int | None = None,
    ):
        check_choice("method.split", split, Split)
        check_between("method.reduce_non_diagonal_ratio", reduce_non_diagonal_ratio, 0, 1)
        self.num_regmean_examples = num_regmean_examples
        self.exclude_param_names_regex = list(exclude_param_names_regex)
        self.reduce_non_diagonal_ratio = reduce_non_diagonal_ratio
        self.batch_size = batch_size
        self.split = split
        self.seed = seed or 0

    def run(self, modelpool: TrainablePool, fabric: "Fabric", data: Data) -> Weights:
        """Collect the Gram matrices, model by model, and merge.

        Raises:
            FusionBenchError: a model without data.
        """
        normal = NormalEquations(self.reduce_non_diagonal_ratio)
        for name, task in own_data(modelpool.model_names, data).items():
            module = fabric.to_device(modelpool.load_model(name))
            classify = task.classify(module)
            with collected_grams(module) as grams, torch.inference_mode():
                for images in self.batches(name, task):
                    classify(images)
            normal.add(module, grams)

        return solved(modelpool, normal, self.exclude_param_names_regex)

    def batches(self, name: str, task: TaskData) -> Iterator[Tensor]:
        """Yield the images whose way through a model is followed."""
        samples = task.sample(self.num_regmean_examples, self.seed)
        steps = -(-len(samples) // self.batch_size)
        batches = task.batches(samples, self.batch_size)
        for images, _ in bar(batches, f"layer inputs of {name}", total=steps):
            yield images


def solved(pool: TrainablePool, normal: "NormalEquations", exclude: Sequence[str]) -> Weights:
    """Return the average of the pool's models, with the linear layers that ``normal`` solves."""

    def merge_tensor(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        if base is not None and excluded(key, exclude):
            return base.clone()
        if key in normal:
            return normal.solution(key).to(tensors[0])
        return sum(tensors[1:], tensors[0].clone()) / len(tensors)

    return merge(
        {name: pool.weights(name) for name in pool.model_names},
        merge_tensor,
        pool.weights("_pretrained_") if pool.has_pretrained else None,
        policy=pool.policy,
        show_progress=True,
    )


class NormalEquations:
    """What linear layers' merged weights solve, summed up model by model, in float64.

    Args:
        ratio: factor of the Gram matrices' off-diagonal elements.
    """

    def __init__(self, ratio: float):
        self._ratio = ratio
        self._left: dict[str, Tensor] = {}
        self._right: dict[str, Tensor] = {}
        self._shared: dict[str, str] = {}  # of layers that are fed one tensor, the first

    def __contains__(self, key: str) -> bool:
        return key in self._right

    def add(self, module: nn.Module, grams: "Mapping[str, Gram]", prefix: str = "") -> None:
        """Add a model's weights, and the Gram matrices of what entered them."""
        own = dict(module.named_parameters())
        reduced: dict[str, Tensor] = {}
        for key, gram in grams.items():
            if gram.first not in reduced:
                reduced[gram.first] = self._reduced(gram.mean())
                _add(self._left, prefix + gram.first, reduced[gram.first])
            self._shared[prefix + key] = prefix + gram.first
            right = reduced[gram.first] @ own[key].detach().double().T
            _add(self._right, prefix + key, right)

    def solution(self, key: str) -> Tensor:
        """Return a layer's merged weight, outputs first, in float64."""
        factor = torch.linalg.cholesky(self._left[self._shared[key]])
        return torch.cholesky_solve(self._right[key], factor).T

    def _reduced(self, gram: Tensor) -> Tensor:
        diagonal = gram.diagonal()
        # Where next to nothing entered, the models' weights count alike; and no matrix is singular.
        floor = 1e-9 * float(diagonal.mean()) or 1.0
        return (gram * self._ratio).diagonal_scatter(diagonal + floor)


def _add(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    sums[key] = value.clone() if key not in sums else sums[key].add_(value)


class Gram:
    r"""The mean of $x x^\top$ over all rows that enter a layer, in float64.

    Attributes:
        first: the weight of the layer that was seen first, of those that share it.
    """

    def __init__(self, first: str):
        self.first = first
        self._total = torch.zeros((), dtype=torch.float64)
        self._rows = 0

    def add(self, inputs: Tensor) -> None:
        """Add rows: all dimensions but the last are rows."""
        rows = inputs.detach().flatten(0, -2).float()
        self._total = (rows.T @ rows).double() + self._total.to(rows.device)
        self._rows += len(rows)

    def mean(self) -> Tensor:
        """Return the matrix."""
        return self._total / self._rows


@contextmanager
def collected_grams(module: nn.Module) -> Iterator[Mapping[str, Gram]]:
    """Collect, while the context lasts, what enters each linear layer, by the weight's name.

    Layers that are fed one tensor, such as those of query, key and value, share a matrix.
    """
    grams: dict[str, Gram] = {}
    last: list[Any] = [None, ""]  # the last tensor seen, and the first layer that saw it

    def hook(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] is last[0]:
                grams[key] = grams[last[1]]
                return
            last[:] = inputs[0], key
            grams.setdefault(key, Gram(key)).add(inputs[0])

        return look

    layers = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    handles = [
        layer.register_forward_pre_hook(hook(f"{name}.weight" if name else "weight"))
        for name, layer in layers
    ]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()
