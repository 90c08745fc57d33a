"""Judging CLIP vision encoders by zero-shot image classification."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor, nn

from fusion_bench.errors import FusionBenchError, did_you_mean
from fusion_bench.sources import load, reading, resolve
from fusion_bench.taskpool.evaluate import Score, judge, loader_arguments
from fusion_bench.taskpool.images import LabelledImages
from fusion_bench.taskpool.zero_shot import ZeroShotHead, text_head
from fusion_bench.tasks import Task, load_task

#: Where a repository lacks the tokenizer's files, transformers makes one of special tokens alone.
_SMALLEST_VOCABULARY = 10


class CLIPVisionModelTaskPool:
    """Image-classification tasks; the classes' names, put into words, are the classifier.

    Args:
        test_datasets: task name to dataset node. The names of canonical tasks bring their class
            names and prompts; any other dataset is classified by its own label names.
        clip_model: gives text tower, projections and temperature: Hub repository, local
            directory, ``zoo:`` name, config node or module. By default ``base_model``.
        processor: likewise, gives tokenizer and image processor. By default ``clip_model``.
        base_model: the repository to use where the two above are not given.
        data_processor: another processor for the images.
        dataloader_kwargs: arguments of ``torch.utils.data.DataLoader``; batch size and worker
            count suit the device where they are not given.
        tasks: task name to what differs from the known data: ``class_names``, ``templates``,
            ``image_column``, ``label_column``.
    """

    def __init__(
        self,
        test_datasets: Mapping[str, Any],
        clip_model: Any = None,
        processor: Any = None,
        base_model: str | None = None,
        data_processor: Any = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        tasks: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        if not test_datasets:
            raise FusionBenchError(
                "taskpool.test_datasets: there is no task. Name at least one dataset, for example "
                "'mnist: {_target_: datasets.load_dataset, path: ylecun/mnist, split: test}'."
            )
        if clip_model is None and base_model is None:
            raise FusionBenchError(
                "taskpool.clip_model: missing; it gives the text tower, for example "
                "'clip_model: openai/clip-vit-base-patch32'."
            )
        for name in tasks or {}:
            if name not in test_datasets:
                raise FusionBenchError(
                    f"taskpool.tasks.{name}: there is no such task. "
                    + did_you_mean(name, test_datasets)
                )
        self._datasets = dict(test_datasets)
        self._clip_source = base_model if clip_model is None else clip_model
        self._processor_source = self._clip_source if processor is None else processor
        self._image_processor_source = data_processor
        self._dataloader_kwargs = dict(dataloader_kwargs or {})
        self._tasks: dict[str, Task] = {
            name: Task.from_mapping(
                (tasks or {}).get(name, {}), where=f"taskpool.tasks.{name}", base=load_task(name)
            )
            for name in self._datasets
        }
        self.task_names: list[str] = list(self._datasets)
        self._clip: Any = None
        self._processor: Any = None
        self._data: dict[str, LabelledImages] = {}
        self._heads: dict[str, ZeroShotHead] = {}

    def prepare(self, fabric: Fabric) -> None:
        """Load datasets and text tower and make the text heads; done once, before any judging.

        Raises:
            FusionBenchError: a source that cannot be read, a dataset without images or labels.
        """
        if self._heads:
            return
        with fabric.rank_zero_first():  # so that only one process downloads
            self._clip = self._load_clip()
            self._processor = self._load_processor()
            self._data = {name: self._load_data(name) for name in self.task_names}
        fabric.to_device(self._clip)
        self._heads = {name: self._make_head(name) for name in self.task_names}

    def data(self, name: str) -> LabelledImages:
        """Return a task's images and labels, once ``prepare`` has run."""
        return self._data[name]

    def evaluate(
        self,
        model: nn.Module,
        fabric: Fabric,
        tasks: Sequence[str] | None = None,
        *,
        name: str = "model",
        fast_dev_run: bool = False,
    ) -> dict[str, Score]:
        """Judge a vision encoder on ``tasks``, by default all.

        Args:
            model: a ``CLIPVisionModel``; moved to Fabric's device.
            fabric: gives device, precision and processes; all of them must call this.
            tasks: names out of ``task_names``.
            name: what the progress bar calls the model.
            fast_dev_run: only the first batch of each task.
        """
        self.prepare(fabric)
        loader = loader_arguments(self._dataloader_kwargs, fabric)
        self._check_architecture(model, name)
        encoder = fabric.to_device(fabric.strategy.precision.convert_module(model)).eval()
        scores = {}
        for task in self.task_names if tasks is None else tasks:
            data = self._data[task]
            scores[task] = judge(
                fabric,
                encoder,
                self._heads[task],
                data,
                loader,
                f"judging {name} on {task}",
                min(len(data), loader["batch_size"]) if fast_dev_run else len(data),
            )
        return scores

    def _check_architecture(self, model: nn.Module, name: str) -> None:
        """Refuse an encoder of another size: head and image size are those of ``clip_model``."""
        expected = self._clip.config.vision_config
        for field in ("hidden_size", "patch_size", "image_size", "num_hidden_layers"):
            found = getattr(getattr(model, "config", None), field, None)
            if found is not None and found != getattr(expected, field):
                raise FusionBenchError(
                    f"taskpool.clip_model: its vision encoder has {field} "
                    f"{getattr(expected, field)}, '{name}' has {found}. Name the model that the "
                    "encoders were fine-tuned from."
                )

    def _make_head(self, name: str) -> ZeroShotHead:
        classes = text_head(
            self._clip,
            self._processor.tokenizer,
            self._data[name].class_names,
            self._tasks[name].templates,
        )
        return ZeroShotHead(self._clip.visual_projection, self._clip.logit_scale, classes)

    def _load_clip(self) -> Any:
        source = self._clip_source
        if not isinstance(source, str):
            return load("model", source, "taskpool.clip_model").eval()
        from transformers import CLIPModel

        with reading("model", source):
            model, info = CLIPModel.from_pretrained(
                resolve(source), output_loading_info=True, ignore_mismatched_sizes=True
            )
        if wrong := sorted(info["missing_keys"]) + [key for key, *_ in info["mismatched_keys"]]:
            raise FusionBenchError(
                f"taskpool.clip_model: '{source}' is not a full CLIP model; it lacks '{wrong[0]}'. "
                "Name the model that the encoders were fine-tuned from."
            )
        return model.eval()

    def _load_processor(self) -> Any:
        from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer

        source = self._processor_source
        if isinstance(source, str):
            with reading("processor", source):
                path = resolve(source)
                processor = CLIPProcessor(
                    CLIPImageProcessorPil.from_pretrained(path), CLIPTokenizer.from_pretrained(path)
                )
            if len(processor.tokenizer) < _SMALLEST_VOCABULARY:
                raise FusionBenchError(f"taskpool.processor: '{source}' comes without a tokenizer.")
        else:
            processor = load("processor", source, "taskpool.processor")
        other = self._image_processor_source
        if isinstance(other, str):
            with reading("processor", other):
                other = CLIPImageProcessorPil.from_pretrained(resolve(other))
        elif other is not None:
            other = load("processor", other, "taskpool.data_processor")
        if other is not None:
            processor.image_processor = getattr(other, "image_processor", other)
        return processor

    def _load_data(self, name: str) -> LabelledImages:
        dataset = load("dataset", self._datasets[name], f"taskpool.test_datasets.{name}")
        transform = partial(_preprocess, self._processor.image_processor)
        return LabelledImages(name, dataset, self._tasks[name], transform)


def _preprocess(image_processor: Any, image: Any) -> Tensor:
    pixels: Tensor = image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    return pixels[0]
