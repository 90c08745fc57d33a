"""Evaluating CLIP vision encoders by zero-shot image classification."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.plan import Plan
from fusion_bench.pretrained import from_pretrained
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import Repository
from fusion_bench.results import Metric
from fusion_bench.sources import reading
from fusion_bench.storage import file_sha256
from fusion_bench.taskpool.images.heads import HeadStore
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
from fusion_bench.zero_shot import ZeroShotHead, text_head

#: Where a repository lacks the tokenizer's files, transformers makes one of special tokens alone.
_SMALLEST_VOCABULARY = 10
_REMEDY = "Name the model that the encoders were fine-tuned from."
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


class CLIPVisionModelTaskPool(TaskPool):
    """Image-classification tasks; the classes' names, put into words, are the classifier.

    Args:
        test_datasets: task name to dataset node. The names of canonical tasks bring their class
            names and prompts; any other dataset is classified by its own label names.
        clip_model: gives text tower, projections and temperature: Hub repository, local
            directory, ``zoo:`` name, config node or module. By default ``base_model``.
        processor: likewise, gives tokenizer and image processor. By default ``clip_model``.
        base_model: the repository to use where the two above are not given.
        data_processor: another processor for the images.
        dataloader_kwargs: as in ``TaskPool``; so are the next arguments.
        tasks: task name to what differs from the known data: ``class_names``, ``templates``,
            ``image_column``, ``label_column``.
        max_samples: evaluate no more than so many samples of each task, the same ones in every run.
        per_class: report each class's accuracy too.
        save_predictions: leave each model's answers as parquet files beside the report.
        cache: keep prepared images, text heads and results on disk and use what is there.
        cache_size: what prepared images may take on disk.
        compile: compile the models with ``torch.compile``.
        metrics: the most important one first; by default ``accuracy`` and ``loss``. A metric of
            your own is named by its package.
    """

    @keeps_arguments
    def __init__(
        self,
        test_datasets: Mapping[str, Any],
        clip_model: Any = None,
        processor: Any = None,
        base_model: str | None = None,
        data_processor: Any = None,
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
        self._classifiers = ZeroShotClassifiers(
            clip_model, processor, base_model, data_processor, cache
        )
        super().__init__(
            image_tasks(test_datasets, tasks, self._classifiers, per_class, size, metrics),
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
        self._classifiers.plan(plan, scratch)
        return plan


class ZeroShotClassifiers:
    """Text heads for the encoders of images, from one CLIP model.

    Args:
        clip_model: as in ``CLIPVisionModelTaskPool``; so are the next three arguments.
        processor: gives tokenizer and image processor.
        base_model: the repository to use where the two above are not given.
        data_processor: another processor for the images.
        cache: keep text heads on disk.

    Raises:
        FusionBenchError: no CLIP model.
    """

    def __init__(
        self,
        clip_model: Any,
        processor: Any,
        base_model: str | None,
        data_processor: Any,
        cache: bool,
    ):
        if clip_model is None and base_model is None:
            raise FusionBenchError(
                "missing; it gives the text tower, for example "
                "'clip_model: openai/clip-vit-base-patch32'.",
                place=("clip_model",),
            )
        repositories: dict[str, Repository] = {}
        clip_model = base_model if clip_model is None else clip_model
        processor = clip_model if processor is None else processor
        self._clip_part = Part(clip_model, ("clip_model",), repositories)
        self._processor_part = Part(processor, ("processor",), repositories)
        self._data_processor_part = Part(data_processor, ("data_processor",), repositories)
        self._head_store = HeadStore() if cache else None
        self._heads: dict[str, ZeroShotHead] = {}

    def plan(self, plan: Plan, scratch: Path | None) -> None:
        """Find the CLIP model, the tokenizer and the image processor."""
        with plan.collect():
            if self._clip_part.plan_model(plan, scratch) is not None:
                _ = self._clip_config  # refuses what is no CLIP model
        with plan.collect(), self._processor_part.located():
            if (repository := self._processor_part.find(plan, scratch)) is not None:
                plan.download(repository, *_tokenizer_files(repository))
        with plan.collect():
            self._image_processor_part.plan_image_processor(plan, scratch)

    def preprocessor(self, task: str) -> Preprocessor:
        """Return the one preprocessor of all tasks."""
        return self._preprocessor

    def head_identity(self, task: ImageTask) -> str:
        """Return what the text head is made from: text weights, tokenizer, prompts."""
        _ = self._clip_config  # refuses what is no CLIP model
        texts = json.dumps([task.images.class_names, task.settings.templates])
        content = [self._clip_identity, self._tokenizer_identity, texts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def classifier(self, task: ImageTask, model: nn.Module, name: str, fabric: Fabric) -> Classify:
        """Return encoder and text head in one."""
        self._check_architecture(model, name)
        head = fabric.to_device(self._head(task, fabric))

        def classify(images: Tensor) -> Tensor:
            logits: Tensor = head(model(images).pooler_output)
            return logits

        return classify

    def _head(self, task: ImageTask, fabric: Fabric) -> ZeroShotHead:
        """Return a task's head, from the cache if it was ever made."""
        identity = self.head_identity(task)
        if task.name not in self._heads:
            head = self._head_store.load(identity) if self._head_store else None
            if head is None:
                head = self._made_head(task, fabric)
                if self._head_store is not None and fabric.global_rank == 0:
                    self._head_store.save(identity, head)
            self._heads[task.name] = head
        return self._heads[task.name]

    def _made_head(self, task: ImageTask, fabric: Fabric) -> ZeroShotHead:
        clip = fabric.to_device(self._clip)
        classes = text_head(clip, self._tokenizer, task.images.class_names, task.settings.templates)
        return ZeroShotHead.of(clip, classes)

    def _check_architecture(self, model: nn.Module, name: str) -> None:
        """Refuse an encoder of another size: head and image size are those of ``clip_model``."""
        expected = self._clip_config.vision_config
        # A module may be of any class, and those of transformers alone have a config.
        for field, own, found in differing_sizes(expected, getattr(model, "config", None)):
            raise FusionBenchError(
                f"its vision encoder has {field} {own}, '{name}' has {found}.",
                _REMEDY,
                place=("clip_model",),
            )

    @cached_property
    def _clip_identity(self) -> str:
        """What identifies the weights of ``clip_model``, without loading them."""
        part = self._clip_part
        if part.name is None:
            return sha256(TensorWeights(self._clip.state_dict()))
        with part.located():
            place = part.repository.fetch(*part.model_files)
            return json.dumps([file_sha256(place / name) for name in part.model_files])

    @cached_property
    def _clip_config(self) -> Any:
        part = self._clip_part
        if part.name is None:
            return self._clip.config
        from transformers import AutoConfig, CLIPConfig

        with part.located():
            with reading("model", part.name):
                config = from_pretrained(AutoConfig, part.repository.fetch("config.json"))
            if not isinstance(config, CLIPConfig):
                raise FusionBenchError(
                    f"'{part.name}' is not a full CLIP model but a '{config.model_type}'.", _REMEDY
                )
        return config

    @cached_property
    def _clip(self) -> Any:
        from transformers import CLIPModel

        what = "not a full CLIP model"
        return self._clip_part.model(CLIPModel, what, _REMEDY, ignore_mismatched_sizes=True).eval()

    @cached_property
    def _processor(self) -> Any:
        """The whole processor, where a node or an object gives it."""
        return self._processor_part.processor()

    @cached_property
    def _tokenizer_directory(self) -> Path:
        repository = self._processor_part.repository
        return repository.fetch(*_tokenizer_files(repository))

    @cached_property
    def _tokenizer_identity(self) -> str:
        if self._processor_part.name is None:
            return str(self._processor.tokenizer.backend_tokenizer.to_str())
        with self._processor_part.located():
            files = [self._tokenizer_directory / name for name in _TOKENIZER_FILES]
            return json.dumps([file_sha256(file) for file in files if file.exists()])

    @cached_property
    def _tokenizer(self) -> Any:
        part = self._processor_part
        if part.name is None:
            return self._processor.tokenizer
        from transformers import CLIPTokenizer

        with part.located():
            with reading("processor", part.name):
                tokenizer = from_pretrained(CLIPTokenizer, self._tokenizer_directory, model=False)
                tokenizer(["a photo", "of text"], padding=True, truncation=True)  # bad files fail
            if len(tokenizer) < _SMALLEST_VOCABULARY:
                raise FusionBenchError(f"'{part.name}' has no tokenizer.")
        return tokenizer

    @property
    def _image_processor_part(self) -> Part:
        given = self._data_processor_part.source is not None
        return self._data_processor_part if given else self._processor_part

    @cached_property
    def _preprocessor(self) -> Preprocessor:
        return Preprocessor(self._image_processor)

    @cached_property
    def _image_processor(self) -> Any:
        part = self._image_processor_part
        if part is self._processor_part and part.name is None:
            return self._processor.image_processor
        from transformers import CLIPImageProcessorPil

        processor = part.image_processor(CLIPImageProcessorPil)
        # A node may make a processor of texts and images, which holds the one for images.
        return getattr(processor, "image_processor", processor)


def _tokenizer_files(repository: Repository) -> list[str]:
    return [name for name in _TOKENIZER_FILES if name in repository.files]
