"""Runs a method on a pool, with its training data, and names the results."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lightning.fabric import Fabric
from torch import Tensor, nn

from fusion_bench.instantiate import accepts
from fusion_bench.method.contract import FusionMethod, ModelPool, Product, Split
from fusion_bench.method.plain import class_name
from fusion_bench.problems import ConfigError, FusionBenchError, Place, key_of, within
from fusion_bench.programs.pools import Nodes, PlacedModelPool, TaskPool
from fusion_bench.programs.spec import Places, Section, plain
from fusion_bench.progress import Step, step
from fusion_bench.report import Tuning, TuningTask
from fusion_bench.weights import Model, TensorWeights, Weights, in_memory
from fusion_bench.weights.stream import bytes_to_read

if TYPE_CHECKING:
    from fusion_bench.taskpool import LearningData

#: What the fused model is called; one of several has its own name after a slash.
MERGED = "merged"

#: Gives the function from images to logits that a model makes for a task.
Classifying = Callable[[nn.Module], Callable[[Tensor], Tensor]]

TuningData = Mapping[str, "LearningData"] | None


def seeded(method: Section, seed: int | None) -> Section:
    """Return a method's node with the program's seed, if it accepts one and sets none."""
    node = plain(method)
    if seed is None or not isinstance(node, Mapping):
        return method
    seeds = "seed" not in node and accepts(node.get("_target_"), "seed")
    within = {name: _seeded_inside(inner, seed) for name, inner in node.items()}
    return {**within, "seed": seed} if seeds else within


def _seeded_inside(value: object, seed: int) -> object:
    """Return a value of a method's node, with the seed for the methods in it."""
    if isinstance(value, list):
        return [_seeded_inside(inner, seed) for inner in value]
    return seeded(value, seed) if isinstance(value, Mapping) else value


def fuse(
    method: FusionMethod, modelpool: ModelPool, fabric: Fabric, data: TuningData
) -> dict[str, Product]:
    """Return the merged models by name; weights are computed when they are read."""
    fused = method.fuse(modelpool, fabric, data)
    if isinstance(fused, nn.Module | Weights | Model):
        return {MERGED: fused}
    return {f"{MERGED}/{name}": model for name, model in fused.items()}


def materialize(merged: Mapping[str, Product]) -> dict[str, Product]:
    """Return the same with all weights computed and in memory."""
    with counted(merged):
        return {name: in_memory_product(model) for name, model in merged.items()}


def in_memory_product(model: Product) -> Product:
    """Return a merged model whose weights are computed and in memory."""
    weights = weights_of(model)
    return model if weights is None else with_weights(model, TensorWeights(in_memory(weights)))


def weights_of(model: Product) -> Weights | None:
    """Return the weights that are computed when they are read; ``None`` of a module."""
    if isinstance(model, nn.Module):
        return None
    return model.weights if isinstance(model, Model) else model


def with_weights(model: Product, weights: Weights) -> Product:
    """Return a merged model with other weights in place of its own."""
    return replace(model, weights=weights) if isinstance(model, Model) else weights


def counted(merged: Mapping[str, Product]) -> AbstractContextManager[Step]:
    """Read all merged weights as one step, which counts the bytes of them together."""
    known = (weights_of(model) for model in merged.values())
    shown = [weights for weights in known if weights is not None and weights.show_progress]
    return step("", sum(sum(bytes_to_read(model).values()) for model in shown) or None, "B")


def tuning_data(
    method: FusionMethod,
    modelpool: PlacedModelPool,
    taskpool: TaskPool | None,
    fabric: Fabric,
    allow_test_split: bool,
    places: Places,
) -> TuningData:
    """Return the data that the method learns from; ``None`` if it needs no data.

    Raises:
        FusionBenchError: no such data, or the test split without leave.
    """
    if method.needs.split is None:
        return None
    if taskpool is None:
        raise without_taskpool(method, places)
    return LearnedSplit.of(method, places).data(modelpool, taskpool, fabric, allow_test_split)


def without_taskpool(method: FusionMethod, places: Places) -> FusionBenchError:
    """Return the problem of a method that learns and has no task pool."""
    return FusionBenchError(
        f"{class_name(method)} learns from data.",
        "Set the task pool that provides its classifiers.",
        place=places.taskpool,
    )


@dataclass(frozen=True)
class LearnedSplit:
    """A split of the pools' datasets that is used for more than the evaluation.

    Attributes:
        split: train, validation or test.
        user: what uses it, for messages.
        place: where the split is chosen in the config.
        places: where the pools are.
    """

    split: Split
    user: str
    place: Place
    places: Places = field(default_factory=Places)

    @classmethod
    def of(cls, method: FusionMethod, places: Places) -> "LearnedSplit":
        """Return the split that a method learns from."""
        assert method.needs.split is not None
        user = f"{class_name(method)} learns from"
        place = (*places.method, *method.needs.split_place)
        return cls(method.needs.split, user, place, places)

    @property
    def key(self) -> str:
        """The key of the split, as text."""
        return key_of(self.place)

    def data(
        self,
        modelpool: PlacedModelPool,
        taskpool: TaskPool,
        fabric: Fabric,
        allow_test_split: bool,
    ) -> "dict[str, LearningData]":
        """Return the datasets, with the tasks that they belong to.

        Args:
            modelpool: names the datasets; those of the test split may be the task pool's.
            taskpool: knows the tasks.
            fabric: gives the device.
            allow_test_split: whether it may be what models are evaluated on.

        Raises:
            FusionBenchError: no such data, or the test split without leave.
        """
        datasets, place = self.named(modelpool, taskpool)
        with within(*self.places.taskpool, keyed_only=True):
            data = taskpool.tuning(datasets, fabric, place)
        for name, images in data.items():
            if not allow_test_split and images.is_test:
                raise self.refusal((*place, name))
        return {name: own.placed(*self.places.taskpool) for name, own in data.items()}

    def named(self, modelpool: PlacedModelPool, taskpool: TaskPool) -> tuple[Nodes, Place]:
        """Return the dataset nodes, and their place in the config.

        Raises:
            FusionBenchError: there are none.
        """
        group = {"validation": "val_datasets"}.get(self.split, f"{self.split}_datasets")
        nodes = {
            "train": modelpool.train_datasets,
            "validation": modelpool.val_datasets,
            "test": modelpool.test_datasets,
        }[self.split]
        if nodes:
            return nodes, (*modelpool.place, group)
        if self.split == "test" and taskpool.test_datasets:
            return taskpool.test_datasets, (*self.places.taskpool, group)
        raise FusionBenchError(
            f"missing; {self.user} the {self.split} split.",
            f"Name a dataset for each model there, or choose another {self.key}.",
            place=(*(self.places.taskpool if self.split == "test" else modelpool.place), group),
        )

    def refusal(self, place: Place) -> ConfigError:
        """Return the problem for a dataset that models are evaluated on."""
        return ConfigError(
            "the models are evaluated on the same split.",
            f"Choose another ({self.key}=train or validation), or set allow_test_split=true; the "
            "report will say so.",
            place=place,
        )


def describe_tuning(
    method: FusionMethod, taskpool: TaskPool | None, data: TuningData
) -> Tuning | None:
    """Return the report's description of the data that the method learned from."""
    needs = method.needs
    if data is None or taskpool is None or needs.split is None:
        return None
    return Tuning(
        split=needs.split,
        labels=needs.labels,
        test_split=uses_test_split(data),
        tasks=describe_data(data),
    )


def uses_test_split(data: "Mapping[str, LearningData]") -> bool:
    """Return whether models are evaluated on some of the data."""
    return any(images.is_test for images in data.values())


def describe_data(data: "Mapping[str, LearningData]") -> dict[str, TuningTask]:
    """Return the report's description of each used dataset."""
    return {
        name: TuningTask(num_samples=len(images), fingerprint=images.fingerprint)
        for name, images in data.items()
    }
