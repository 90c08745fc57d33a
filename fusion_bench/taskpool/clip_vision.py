"""Evaluating CLIP vision encoders by zero-shot image classification."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor, nn

from fusion_bench.plan import Plan, zoo_step
from fusion_bench.pretrained import from_pretrained
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import Repository, locate
from fusion_bench.sources import load, plain_source, reading, unbuilt
from fusion_bench.storage import file_sha256
from fusion_bench.taskpool.base import Classify, ImageTaskPool, differing_sizes
from fusion_bench.taskpool.heads import HeadStore
from fusion_bench.weights import TensorWeights, sha256, weight_files
from fusion_bench.zero_shot import ZeroShotHead, text_head

#: Where a repository lacks the tokenizer's files, transformers makes one of special tokens alone.
_SMALLEST_VOCABULARY = 10
_IMAGE_PROCESSOR = "preprocessor_config.json"
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


class CLIPVisionModelTaskPool(ImageTaskPool):
    """Image-classification tasks; the classes' names, put into words, are the classifier.

    Args:
        test_datasets: task name to dataset node. The names of canonical tasks bring their class
            names and prompts; any other dataset is classified by its own label names.
        clip_model: gives text tower, projections and temperature: Hub repository, local
            directory, ``zoo:`` name, config node or module. By default ``base_model``.
        processor: likewise, gives tokenizer and image processor. By default ``clip_model``.
        base_model: the repository to use where the two above are not given.
        data_processor: another processor for the images.
        dataloader_kwargs: as in ``ImageTaskPool``; so are the next arguments.
        tasks: task name to what differs from the known data: ``class_names``, ``templates``,
            ``image_column``, ``label_column``.
        max_samples: evaluate no more than so many samples of each task, the same ones in every run.
        per_class: report each class's accuracy too.
        save_predictions: leave each model's answers as parquet files beside the report.
        cache: keep prepared images, text heads and results on disk and use what is there.
        cache_size: what prepared images may take on disk.
        compile: compile the models with ``torch.compile``.
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
        max_samples: int | None = None,
        per_class: bool = False,
        save_predictions: bool = False,
        cache: bool = True,
        cache_size: int | str = "50GB",
        compile: bool = False,
    ):
        super().__init__(
            test_datasets,
            dataloader_kwargs,
            tasks,
            max_samples,
            per_class,
            save_predictions,
            cache,
            cache_size,
            compile,
        )
        if clip_model is None and base_model is None:
            raise FusionBenchError(
                "missing; it gives the text tower, for example "
                "'clip_model: openai/clip-vit-base-patch32'.",
                place=("clip_model",),
            )
        self._clip_source = plain_source(base_model if clip_model is None else clip_model)
        self._processor_source = self._clip_source if processor is None else plain_source(processor)
        self._image_processor_source = plain_source(data_processor)
        self._head_store = HeadStore() if cache else None
        self._heads: dict[str, ZeroShotHead] = {}
        self._repositories: dict[str, Repository] = {}
        self._scratch: Path | None = None

    def find_models(self, plan: Plan, scratch: Path | None) -> None:
        """Find the CLIP model, the tokenizer and the image processor."""
        self._scratch = scratch
        with plan.collect("clip_model"):
            if self._is_here_or_on_hub(self._clip_source, plan):
                files = weight_files(self._clip_repository)
                plan.download(self._clip_repository, "config.json", *files)
                _ = self._clip_config  # refuses what is no CLIP model
        with plan.collect("processor"):
            if self._is_here_or_on_hub(self._processor_source, plan):
                processor = self._located(self._processor_source)
                plan.download(processor, *_tokenizer_files(processor))
        source, key = self._image_processor_source, "data_processor"
        if source is None:
            source, key = self._processor_source, "processor"
        with plan.collect(key):
            if self._is_here_or_on_hub(source, plan):
                plan.download(self._with_image_processor(source), _IMAGE_PROCESSOR)

    def _is_here_or_on_hub(self, source: Any, plan: Plan) -> bool:
        """Tell whether a source is a directory or a repository, not the zoo that is yet to be."""
        if not isinstance(source, str):
            return False
        if place := unbuilt(source):
            plan.add(zoo_step(place))
        return place is None

    def image_processor(self, task: str) -> Any:
        """Return the one image processor of all tasks."""
        return self._image_processor

    def head_identity(self, task: str) -> str:
        """Return what the text head is made from: text weights, tokenizer, prompts."""
        _ = self._clip_config  # refuses what is no CLIP model
        texts = json.dumps([self._data[task].class_names, self._tasks[task].templates])
        content = [self._clip_identity, self._tokenizer_identity, texts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def classifier(self, task: str, model: nn.Module, name: str, fabric: Fabric) -> Classify:
        """Return encoder and text head in one."""
        self._check_architecture(model, name)
        head = fabric.to_device(self._head(task, fabric))

        def classify(images: Tensor) -> Tensor:
            logits: Tensor = head(model(images).pooler_output)
            return logits

        return classify

    def _head(self, task: str, fabric: Fabric) -> ZeroShotHead:
        """Return a task's head, from the cache if it was ever made."""
        identity = self.head_identity(task)
        if task not in self._heads:
            head = self._head_store.load(identity) if self._head_store else None
            if head is None:
                head = self._made_head(task, fabric)
                if self._head_store is not None and fabric.global_rank == 0:
                    self._head_store.save(identity, head)
            self._heads[task] = head
        return self._heads[task]

    def _made_head(self, task: str, fabric: Fabric) -> ZeroShotHead:
        clip = fabric.to_device(self._clip)
        classes = text_head(
            clip, self._tokenizer, self._data[task].class_names, self._tasks[task].templates
        )
        return ZeroShotHead.of(clip, classes)

    def _check_architecture(self, model: nn.Module, name: str) -> None:
        """Refuse an encoder of another size: head and image size are those of ``clip_model``."""
        expected = self._clip_config.vision_config
        for field, own, found in differing_sizes(expected, getattr(model, "config", None)):
            raise FusionBenchError(
                f"taskpool.clip_model: its vision encoder has {field} {own}, '{name}' has "
                f"{found}. Name the model that the encoders were fine-tuned from."
            )

    def _located(self, source: str) -> Repository:
        """Return where a source lies; looked for once, for clip_model and processor are alike."""
        if source not in self._repositories:
            self._repositories[source] = locate(source, self._scratch)
        return self._repositories[source]

    @property
    def _clip_repository(self) -> Repository:
        return self._located(self._clip_source)

    @cached_property
    def _clip_identity(self) -> str:
        """What tells the weights of ``clip_model`` from any other, without loading them."""
        if not isinstance(self._clip_source, str):
            return sha256(TensorWeights(self._clip.state_dict()))
        names = ["config.json", *weight_files(self._clip_repository)]
        place = self._clip_repository.fetch(*names)
        return json.dumps([file_sha256(place / name) for name in names])

    @cached_property
    def _clip_config(self) -> Any:
        if not isinstance(self._clip_source, str):
            return self._clip.config
        from transformers import AutoConfig, CLIPConfig

        with reading("model", self._clip_source):
            config = from_pretrained(AutoConfig, self._clip_repository.fetch("config.json"))
        if not isinstance(config, CLIPConfig):
            raise FusionBenchError(
                f"taskpool.clip_model: '{self._clip_source}' is not a full CLIP model but a "
                f"'{config.model_type}'. Name the model that the encoders were fine-tuned from."
            )
        return config

    @cached_property
    def _clip(self) -> Any:
        source = self._clip_source
        if not isinstance(source, str):
            return load("model", source, "taskpool.clip_model").eval()
        from transformers import CLIPModel

        with reading("model", source):
            names = ["config.json", *weight_files(self._clip_repository)]
            model, info = from_pretrained(
                CLIPModel,
                self._clip_repository.fetch(*names),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        if wrong := sorted(info["missing_keys"]) + [key for key, *_ in info["mismatched_keys"]]:
            raise FusionBenchError(
                f"taskpool.clip_model: '{source}' is not a full CLIP model; it lacks '{wrong[0]}'. "
                "Name the model that the encoders were fine-tuned from."
            )
        return model.eval()

    @cached_property
    def _processor(self) -> Any:
        """The processor that a node or an object gives; a name stands for its parts."""
        return load("processor", self._processor_source, "taskpool.processor")

    @cached_property
    def _tokenizer_place(self) -> Path:
        """The directory with the tokenizer's files."""
        repository = self._located(self._processor_source)
        return repository.fetch(*_tokenizer_files(repository))

    @cached_property
    def _tokenizer_identity(self) -> str:
        if not isinstance(self._processor_source, str):
            return str(self._processor.tokenizer.backend_tokenizer.to_str())
        files = [self._tokenizer_place / name for name in _TOKENIZER_FILES]
        return json.dumps([file_sha256(file) for file in files if file.exists()])

    @cached_property
    def _tokenizer(self) -> Any:
        source = self._processor_source
        if not isinstance(source, str):
            return self._processor.tokenizer
        from transformers import CLIPTokenizer

        with reading("processor", source):
            tokenizer = from_pretrained(CLIPTokenizer, self._tokenizer_place, model=False)
            tokenizer(["a photo", "of text"], padding=True, truncation=True)  # bad files fail here
        if len(tokenizer) < _SMALLEST_VOCABULARY:
            raise FusionBenchError(f"taskpool.processor: '{source}' comes without a tokenizer.")
        return tokenizer

    @cached_property
    def _image_processor(self) -> Any:
        source = self._image_processor_source
        if source is None:
            source = self._processor_source
            if not isinstance(source, str):
                return self._processor.image_processor
        if not isinstance(source, str):
            processor = load("processor", source, "taskpool.data_processor")
            return getattr(processor, "image_processor", processor)
        from transformers import CLIPImageProcessorPil

        repository = self._with_image_processor(source)
        with reading("processor", source):
            place = repository.fetch(_IMAGE_PROCESSOR)
            return from_pretrained(CLIPImageProcessorPil, place, model=False)

    def _with_image_processor(self, source: str) -> Repository:
        repository = self._located(source)
        if _IMAGE_PROCESSOR not in repository.files:
            raise FusionBenchError(
                f"Cannot read the processor '{source}': it comes without an image processor."
            )
        return repository


def _tokenizer_files(repository: Repository) -> list[str]:
    return [name for name in _TOKENIZER_FILES if name in repository.files]
