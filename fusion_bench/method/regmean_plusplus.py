r"""RegMean++: RegMean with layer inputs from the merged blocks before the layer.

Nguyen et al., RegMean++, https://arxiv.org/abs/2508.03121
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusion_bench.method.contract import Data, ModelPool, Split, TaskData
from fusion_bench.method.data import LearningAlgorithm, own_data, parameter_keys
from fusion_bench.method.regmean import NormalEquations, RegMeanAlgorithm, collected_grams
from fusion_bench.problems import FusionBenchError
from fusion_bench.progress import bar
from fusion_bench.weights import Weights

if TYPE_CHECKING:
    from lightning.fabric import Fabric


#: The arguments of a call.
Call = tuple[tuple[object, ...], dict[str, object]]


@dataclass(eq=False)
class RegMeanAlgorithmPlusPlus(LearningAlgorithm):
    """RegMean block by block, with the outputs of the merged blocks as inputs.

    Parameters before and after the blocks are averaged. It has the options of ``RegMeanAlgorithm``.
    """

    needs_own_data = True

    num_regmean_examples: int | None = 256
    exclude_param_names_regex: Sequence[str] = ()
    reduce_non_diagonal_ratio: float = 0.95
    batch_size: int = 32
    split: Split = "train"
    seed: int | None = None
    weight_transpose: bool = True
    num_workers: int | None = None

    def __post_init__(self) -> None:
        self._regmean = RegMeanAlgorithm(**vars(self))

    @torch.no_grad()
    def learn(self, pool: ModelPool, fabric: "Fabric", data: Data) -> Weights:
        """Merge block by block.

        Raises:
            FusionBenchError: a model without data, or without a list of blocks.
        """
        own = own_data(pool.model_names, data)
        normal = NormalEquations(self.reduce_non_diagonal_ratio)
        weights = self._regmean.solved(pool, normal)
        merged = fabric.to_device(pool.build_model(weights))  # all is averaged so far
        parameter_keys(merged, weights)
        prefix, blocks = blocks_of(merged)
        models = {name: fabric.to_device(pool.load_model(name)) for name in own}
        calls = {name: self._calls(merged, blocks[0], name, task) for name, task in own.items()}
        for index, block in enumerate(
            bar(blocks, "block by block", total=len(blocks), unit="blocks")
        ):
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

    def _calls(self, model: nn.Module, block: nn.Module, name: str, task: TaskData) -> list[Call]:
        """Return the inputs of ``block``, batch by batch."""
        calls: list[Call] = []

        def stop(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
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
    """Return a model's longest list of blocks, and the prefix of its keys.

    Raises:
        FusionBenchError: there is none.
    """
    lists = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise FusionBenchError(
            f"RegMean++ merges a model block by block; a {type(module).__name__} has no blocks."
        )
    name, blocks = max(lists, key=lambda entry: len(entry[1]))
    return f"{name}.", blocks


def _next_call(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Call:
    """Return what the next block is called with: the output in place of the input."""
    output = block(*args, **kwargs)
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
