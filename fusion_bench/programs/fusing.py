"""Lets a method fuse a pool: with the data that it learns from, and under common names."""

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

from lightning.fabric import Fabric
from omegaconf import OmegaConf
from torch import Tensor, nn

from fusion_bench.instantiate import accepts
from fusion_bench.problems import FusionBenchError
from fusion_bench.report import Tuning, TuningTask
from fusion_bench.weights import TensorWeights, Weights, in_memory

if TYPE_CHECKING:
    from fusion_bench.taskpool import TuningImages

#: What the fused model is called; one of several has its own name after a slash.
MERGED = "merged"

TuningData = Mapping[str, "TuningImages"] | None


def seeded(method: Any, seed: int | None) -> Any:
    """Return a method's node with the program's seed, where it takes one and names none."""
    node = OmegaConf.to_container(method, resolve=True) if OmegaConf.is_config(method) else method
    if seed is None or not isinstance(node, Mapping) or "seed" in node:
        return method
    return {**node, "seed": seed} if accepts(node.get("_target_"), "seed") else method


def fuse(
    method: Any, modelpool: Any, fabric: Fabric, data: TuningData
) -> dict[str, nn.Module | Weights]:
    """Return what the method makes, by name; merged weights are computed when they are read."""
    offered = {"fabric": fabric, "data": data}
    wanted = {k: v for k, v in offered.items() if k in signature(method.run).parameters}
    return _named(method.run(modelpool, **wanted), MERGED)


def materialize(merged: Mapping[str, nn.Module | Weights]) -> dict[str, nn.Module | Weights]:
    """Return the same with all weights computed and in memory."""
    return {
        name: TensorWeights(in_memory(model)) if isinstance(model, Weights) else model
        for name, model in merged.items()
    }


def _named(result: Any, name: str) -> dict[str, nn.Module | Weights]:
    """Return by name what a method returned: weights, a module, or a family of either."""
    if isinstance(result, nn.Module | Weights):
        return {name: result}
    if all(isinstance(value, Tensor) for value in result.values()):
        return {name: TensorWeights(result)}
    parts = [_named(part, f"{name}/{own}") for own, part in result.items()]
    return {key: model for part in parts for key, model in part.items()}


def tuning_data(
    method: Any, modelpool: Any, taskpool: Any, fabric: Fabric, allow_test_split: bool
) -> TuningData:
    """Return what the method learns from; ``None`` where it learns from no data.

    Raises:
        FusionBenchError: no such data, or the test split without leave.
    """
    if not getattr(method, "needs_data", False):
        return None
    refuse_without_taskpool(method, taskpool)
    return split_data(
        method.split, modelpool, taskpool, fabric, allow_test_split, learner(method), "method.split"
    )


def refuse_without_taskpool(method: Any, taskpool: Any) -> None:
    """Refuse to let a method learn where nothing says what models are to answer.

    Raises:
        FusionBenchError: there is no task pool.
    """
    if taskpool is None:
        raise FusionBenchError(
            f"{type(method).__name__} learns from data; give the task pool that its "
            "classifiers are from."
        )


def learner(method: Any) -> str:
    """Return how messages call a method that learns."""
    return f"{type(method).__name__} learns from"


def split_data(
    split: str,
    modelpool: Any,
    taskpool: Any,
    fabric: Fabric,
    allow_test_split: bool,
    user: str,
    key: str,
) -> "dict[str, TuningImages]":
    """Return a split of the pools' datasets, with the tasks that they belong to.

    Args:
        split: train, validation or test.
        modelpool: names the datasets; those of the test split may be the task pool's.
        taskpool: knows the tasks.
        fabric: gives the device.
        allow_test_split: whether it may be what models are evaluated on.
        user: who uses the split, and how; for messages.
        key: where the split is chosen; likewise.

    Raises:
        FusionBenchError: no such data, or the test split without leave.
    """
    datasets, where = named_datasets(split, modelpool, taskpool, user, key)
    data: dict[str, TuningImages] = taskpool.tuning(datasets, fabric, where)
    for name, images in data.items():
        if not allow_test_split and images.is_test(taskpool.data(images.task)):
            raise refuse_test_split(f"{where}.{name}", key)
    return data


def refuse_test_split(where: str, key: str) -> FusionBenchError:
    """Return what to say where models would learn from what they are evaluated on."""
    return FusionBenchError(
        f"{where}: the models are evaluated on this very split. Choose another "
        f"({key}=train or validation), or give allow_test_split=true; the report "
        "will say so."
    )


def named_datasets(
    split: str, modelpool: Any, taskpool: Any, user: str, key: str
) -> tuple[Mapping[str, Any], str]:
    """Return the dataset nodes of a split, and their place in the config.

    Raises:
        FusionBenchError: there are none.
    """
    name = {"validation": "val_datasets"}.get(split, f"{split}_datasets")
    where = f"modelpool.{name}"
    datasets = getattr(modelpool, name, None)
    if split == "test" and not datasets:
        datasets, where = taskpool.test_datasets, "taskpool.test_datasets"
    if not datasets:
        raise FusionBenchError(
            f"{where}: missing; {user} the {split} split. "
            f"Name a dataset for each model there, or choose another {key}."
        )
    return datasets, where


def describe_tuning(method: Any, taskpool: Any, data: TuningData) -> Tuning | None:
    """Return what the report says of the data that the method learned from."""
    if data is None:
        return None
    return Tuning(
        split=method.split,
        labels=method.uses_labels,
        test_split=uses_test_split(data, taskpool),
        tasks=describe_data(data),
    )


def uses_test_split(data: "Mapping[str, TuningImages]", taskpool: Any) -> bool:
    """Tell whether some of the data is what models are evaluated on."""
    return any(images.is_test(taskpool.data(images.task)) for images in data.values())


def describe_data(data: "Mapping[str, TuningImages]") -> dict[str, TuningTask]:
    """Return what the report says of each dataset that was used."""
    return {
        name: TuningTask(num_samples=len(images), fingerprint=images.data.fingerprint)
        for name, images in data.items()
    }
