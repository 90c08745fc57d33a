r"""RegMean++: RegMean, where what enters a layer comes from the layers merged before it.

Nguyen et al., RegMean++, https://arxiv.org/abs/2508.03121
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_bench.errors import FusionBenchError
from fusion_bench.method.data import Data, Split, TaskData, TrainablePool, own_data
from fusion_bench.method.regmean import NormalEquations, RegMeanAlgorithm, collected_grams, solved
from fusion_bench.progress import bar
from fusion_bench.weights import Weights

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class RegMeanAlgorithmPlusPlus:
    """RegMean block by block: each block sees what the merged blocks before it give.

    What stands before the blocks and behind them is averaged.

    Args:
        num_regmean_examples: as in ``RegMeanAlgorithm``; so are all arguments.
        exclude_param_names_regex: parameters that stay the pretrained model's.
        reduce_non_diagonal_ratio: factor of the Gram matrices' off-diagonal elements.
        batch_size: samples in a batch.
        split: what part of the datasets is used.
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
        self._regmean = RegMeanAlgorithm(
            num_regmean_examples,
            exclude_param_names_regex,
            reduce_non_diagonal_ratio,
            batch_size,
            split,
            seed,
        )
        self.split = split

    @torch.inference_mode()
    def run(self, modelpool: TrainablePool, fabric: "Fabric", data: Data) -> Weights:
        """Merge block by block.

        Raises:
            FusionBenchError: a model without data, or without a list of blocks.
        """
        own = own_data(modelpool.model_names, data)
        normal = NormalEquations(self._regmean.reduce_non_diagonal_ratio)
        weights = solved(modelpool, normal, self._regmean.exclude_param_names_regex)
        merged = fabric.to_device(modelpool.build_model(weights))  # all is averaged so far
        models = {name: fabric.to_device(modelpool.load_model(name)) for name in own}
        prefix, blocks = blocks_of(merged)
        calls = {name: self._calls(merged, blocks[0], name, task) for name, task in own.items()}
        for index, block in enumerate(bar(blocks, "blocks", total=len(blocks), unit="block")):
            place = f"{prefix}{index}."
            for name, model in models.items():
                candidate = model.get_submodule(place[:-1])
                with collected_grams(candidate) as grams:
                    for args, kwargs in calls[name]:
                        candidate(*args, **kwargs)
                normal.add(candidate, grams, place)
            for key, parameter in block.named_parameters():
                parameter.copy_(weights[place + key])
            for name in models:
                calls[name] = [_next_call(block, *call) for call in calls[name]]
        return weights

    def _calls(self, model: nn.Module, block: nn.Module, name: str, task: TaskData) -> list[Any]:
        """Return what ``block`` is called with, batch by batch."""
        calls: list[Any] = []

        def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append((args, kwargs))
            raise _Reached

        classify = task.classify(model)
        handle = block.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for images in self._regmean.batches(name, task):
                try:
                    classify(images)
                except _Reached:
                    continue
        finally:
            handle.remove()
        return calls


class _Reached(Exception):  # noqa: N818
    """The block was reached; the rest of the model need not run."""


def blocks_of(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return a model's list of blocks, and what its keys begin with.

    Raises:
        FusionBenchError: there is none.
    """
    lists = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise FusionBenchError(
            f"RegMean++ goes through a model block by block; a {type(module).__name__} has none."
        )
    name, blocks = max(lists, key=lambda entry: len(entry[1]))
    return f"{name}.", blocks


def _next_call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what the next block is called with: the output in place of the input."""
    output = block(*args, **kwargs)
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
