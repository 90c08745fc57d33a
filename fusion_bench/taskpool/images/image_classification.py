"""Evaluating models by the classifiers that they were fine-tuned with."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import Repository
from fusion_bench.results import Metric
from fusion_bench.storage import read_json
from fusion_bench.taskpool.images.classes import class_indices, some
from fusion_bench.taskpool.images.preprocess import Preprocessor
from fusion_bench.taskpool.images.task import (
    Classify,
    ImageTask,
    cache_bytes,
    differing_sizes,
    image_tasks,
)
from fusion_bench.taskpool.parts import Part
from fusion_bench.taskpool.pool import TaskPool
from fusion_bench.weights import TensorWeights, sha256


class ImageClassificationTaskPool(TaskPool):
    """Image-classification tasks, each with the head of a fine-tuned classifier.

    A model's backbone takes the place of the classifier's own: so a merged backbone is evaluated
    with every task's head.

    Args:
        test_datasets: task name to dataset node.
        classifiers: task name to the model that gives its head and its image processor: any that
            ``AutoModelForImageClassification`` reads, from the Hub or a local directory, a config
            node or a module.
        processor: one image processor for all tasks, in place of the classifiers' own.
        dataloader_kwargs: as in ``TaskPool``; so are the next arguments.
        tasks: task name to what differs: ``class_names``, ``image_column``, ``label_column``.
        max_samples: evaluate no more than so many samples of each task, the same ones in every run.
        per_class: report each class's accuracy too.
        save_predictions: leave each model's answers as parquet files beside the report.
        cache: keep prepared images and results on disk and use what is there.
        cache_size: what prepared images may take on disk.
        compile: compile the models with ``torch.compile``.
        metrics: the most important one first; by default ``accuracy`` and ``loss``. A metric of
            your own is named by its package.

    Raises:
        FusionBenchError: a task without a classifier.
    """

    @keeps_arguments
    def __init__(
        self,
        test_datasets: Mapping[str, Any],
        classifiers: Mapping[str, Any],
        processor: Any = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        tasks: Mapping[str, Mapping[str, Any]] | None = None,
        max_samples: int | None = None,
        per_class: bool = False,
        save_predictions: bool = False,
        cache: bool = True,
        cache_size: int | str = "50GB",
        compile: bool = False,
        metrics: Sequence[str | Metric] | None = None,
    ):
        size = cache_bytes(cache_size) if cache else 0
        self._classifiers = OwnHeads(test_datasets, classifiers, processor)
        self._image_tasks = image_tasks(
            test_datasets, tasks, self._classifiers, per_class, size, metrics
        )
        super().__init__(
            self._image_tasks,
            dataloader_kwargs,
            max_samples,
            save_predictions,
            cache,
            compile,
        )
        self._test_datasets = dict(test_datasets)

    @property
    def test_datasets(self) -> Mapping[str, Any]:
        """The datasets' nodes."""
        return self._test_datasets

    def plan(self, scratch: Path | None = None) -> Plan:
        """Plan the tasks, and find the models that give their heads."""
        plan = super().plan(scratch)
        self._classifiers.plan(plan, scratch, self._image_tasks)
        return plan


class OwnHeads:
    """The heads of fine-tuned classifiers.

    Args:
        names: the tasks'.
        classifiers: as in ``ImageClassificationTaskPool``; so is the next argument.
        processor: one image processor for all tasks, in place of the classifiers' own.

    Raises:
        FusionBenchError: a task without a classifier.
    """

    def __init__(self, names: Iterable[str], classifiers: Mapping[str, Any], processor: Any):
        for name in names:
            if name not in classifiers:
                raise FusionBenchError(
                    "missing.",
                    f"Name the model whose head classifies '{name}', for example "
                    f"'{name}: path/to/classifier'.",
                    place=("classifiers", name),
                )
        repositories: dict[str, Repository] = {}
        self._classifiers = {
            name: Part(classifiers[name], ("classifiers", name), repositories) for name in names
        }
        self._processor = Part(processor, ("processor",), repositories)
        self._preprocessors: dict[str, Preprocessor] = {}
        self._heads: dict[str, nn.Module] = {}
        self._orders: dict[str, list[int]] = {}
        self._identities: dict[str, str] = {}

    def plan(self, plan: Plan, scratch: Path | None, tasks: Mapping[str, ImageTask]) -> None:
        """Find each task's classifier and its image processor; compare classes by config.json."""
        for task, part in self._classifiers.items():
            columns = tasks[task].columns
            with plan.collect():
                if (repository := part.plan_model(plan, scratch)) is None:
                    continue
                if self._processor.source is None:
                    part.plan_image_processor(plan, scratch)
                with part.located():
                    labels = _labels(repository)
                    if columns is not None and columns.class_names and labels is not None:
                        _order(task, labels, columns.names)
        with plan.collect():
            self._processor.plan_image_processor(plan, scratch)

    def preprocessor(self, task: str) -> Preprocessor:
        """Return that of the common image processor, or of the one of the task's classifier."""
        made = Preprocessor(self._image_processor(task))
        return self._preprocessors.setdefault(made.identity, made)

    def _image_processor(self, task: str) -> Any:
        part = self._processor if self._processor.source is not None else self._classifiers[task]
        if part is not self._processor and part.name is None:
            raise FusionBenchError(
                f"missing; the classifier of '{task}' has none.", place=("processor",)
            )
        from transformers import AutoImageProcessor

        return part.image_processor(AutoImageProcessor, backend="pil")

    def head_identity(self, task: ImageTask) -> str:
        """Return the hash of the head's weights."""
        if task.name not in self._identities:
            head = self._head(task)
            prefix = f"{head.base_model_prefix}."
            own = {k: v for k, v in head.state_dict().items() if not k.startswith(prefix)}
            config = head.config.to_json_string()
            self._identities[task.name] = sha256(TensorWeights(own)) + config
            if (order := self._orders[task.name]) != sorted(order):
                self._identities[task.name] += str(order)
        return self._identities[task.name]

    def classifier(self, task: ImageTask, model: nn.Module, name: str, fabric: Fabric) -> Classify:
        """Return the task's head on top of the model's backbone."""
        head: Any = self._head(task)
        backbone: Any = getattr(model, "base_model", model)  # those of transformers have one
        own: Any = head.base_model
        if type(backbone) is not type(own):
            raise FusionBenchError(
                f"its backbone is a {type(own).__name__}, that of '{name}' a "
                f"{type(backbone).__name__}.",
                "Name a classifier of the same kind.",
                place=("classifiers", task.name),
            )
        for field, expected, found in differing_sizes(own.config, backbone.config):
            raise FusionBenchError(
                f"its backbone has {field} {expected}, that of '{name}' {found}.",
                "Name a classifier of the same size.",
                place=("classifiers", task.name),
            )
        head = deepcopy(head, {id(own): backbone})
        dtype = next(backbone.parameters()).dtype  # what learns may be of another than Fabric's
        head = fabric.to_device(head.to(dtype)).eval()
        order = self._orders[task.name]
        turned = order != sorted(order)

        def classify(images: Tensor) -> Tensor:
            logits: Tensor = head(pixel_values=images).logits
            return logits[:, order] if turned else logits

        return classify

    def _head(self, task: ImageTask) -> Any:
        """Return a task's classifier, without the weights of its backbone."""
        if task.name in self._heads:
            return self._heads[task.name]
        from transformers import AutoModelForImageClassification

        part = self._classifiers[task.name]
        head = part.model(AutoModelForImageClassification, "no image classifier")
        count, id2label = head.config.num_labels, head.config.id2label
        labels = [str(id2label[label]) for label in range(count)]
        with part.located():
            self._orders[task.name] = _order(task.name, labels, task.images.names)
        own = head.base_model
        self._heads[task.name] = deepcopy(head, {id(own): deepcopy(own).to("meta")})
        return self._heads[task.name]


def _order(task: str, labels: list[str], names: Sequence[Sequence[str]]) -> list[int]:
    """Return which of a head's outputs is each of the dataset's classes.

    Args:
        task: its name, for messages, whose places are relative to the classifier.
        labels: what the head calls its outputs.
        names: what the dataset's classes are called, each list in the order of its labels.
    """
    count = len(names[0])
    if len(labels) != count:
        raise FusionBenchError(f"it has {len(labels)} classes, the dataset has {count}.")
    if labels == [f"LABEL_{output}" for output in range(count)]:  # nobody named them
        return list(range(count))
    found = class_indices(labels, *names)
    if found is None:
        raise FusionBenchError(
            f"it calls its classes {some(labels)}, the dataset {some(names[-1])}: they cannot "
            "be matched.",
            "List the classifier's names in the order of the dataset's labels in the task pool's "
            f"'tasks.{task}.class_names'.",
        )
    return [output for _, output in sorted(zip(found, range(count), strict=True))]


def _labels(repository: Repository) -> list[str] | None:
    """Return the names that a classifier's config.json gives its classes, if it does."""
    file = repository.fetch("config.json") / "config.json"
    with suppress(ValueError, AttributeError, TypeError):
        named = read_json(file).get("id2label")
        return None if named is None else [named[key] for key in sorted(named, key=int)]
    return None
