"""CLIP vision encoders that were fine-tuned from one pretrained model."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from fusion_bench.modelpool.huggingface import HFModelPool
from fusion_bench.pretrained import from_pretrained
from fusion_bench.sources import load, reading
from fusion_bench.weights import MergePolicy, Renamed, Weights

#: Every reader understands files with this prefix; a live module's keys are without it.
_FILE_PREFIX = "vision_model."
#: Old files have it; it is a plain count, which modules make themselves.
_POSITION_IDS = "embeddings.position_ids"


class CLIPVisionModelPool(HFModelPool):
    """Named vision encoders: ``_pretrained_``, the common base, and the models to fuse.

    Args:
        models: as in ``HFModelPool``. A full CLIP model stands for its vision encoder.
        processor: the image processor that is saved beside a merged model; by default that of the
            pretrained model.
        policy: as in ``HFModelPool``.
        max_shard_size: as in ``HFModelPool``.
        train_datasets: as in ``HFModelPool``.
        val_datasets: as in ``HFModelPool``.
        test_datasets: as in ``HFModelPool``.
    """

    _part = "vision_config"

    def __init__(
        self,
        models: Mapping[str, Any],
        processor: Any = None,
        policy: Mapping[str, Any] | MergePolicy | None = None,
        max_shard_size: int | str = "5GB",
        train_datasets: Mapping[str, Any] | None = None,
        val_datasets: Mapping[str, Any] | None = None,
        test_datasets: Mapping[str, Any] | None = None,
    ):
        super().__init__(
            models,
            "CLIPVisionModel",
            processor,
            policy,
            max_shard_size,
            train_datasets,
            val_datasets,
            test_datasets,
        )

    def _canonical(self, weights: Weights) -> Weights:
        """Return weights with the keys of a live ``CLIPVisionModel``."""
        prefix = _FILE_PREFIX if any(key.startswith(_FILE_PREFIX) for key in weights) else ""
        keys = [key.removeprefix(prefix) for key in weights if key.startswith(prefix)]
        return Renamed(weights, {key: prefix + key for key in keys if key != _POSITION_IDS})

    def _for_file(self, weights: Weights) -> Weights:
        return Renamed(weights, {_FILE_PREFIX + key: key for key in weights})

    def _module(self, name: str) -> nn.Module:
        module = super()._module(name)
        return getattr(module, "vision_model", module)  # a full CLIP model holds one

    def _model_config(self, name: str | None = None) -> Any:
        name = name or self._reference
        if not isinstance(self._models[name], str):
            return super()._model_config(name)
        from transformers import CLIPVisionConfig

        repository = self._whole_model(name)
        with reading("model", repository.name):
            return from_pretrained(CLIPVisionConfig, repository.fetch("config.json"))

    def _write_companions(self, directory: Path) -> None:
        config = deepcopy(self._model_config())
        config.architectures = ["CLIPVisionModel"]
        if self.policy.dtype is not None:
            config.dtype = self.policy.dtype
        config.save_pretrained(directory)
        if (processor := self._image_processor()) is not None:
            processor.save_pretrained(directory)
        self._tell_what_is_left(("config.json", "preprocessor_config.json"))

    def _image_processor(self) -> Any:
        source = self._processor or self._models[self._reference]
        if isinstance(source, nn.Module) or (
            self._processor is None and isinstance(source, Mapping)
        ):
            return None
        if not isinstance(source, str):
            processor = load("processor", source, "modelpool.processor")
            return getattr(processor, "image_processor", processor)
        from transformers import CLIPImageProcessorPil

        repository = self._located(source)
        if "preprocessor_config.json" not in repository.files:
            return None  # a checkpoint without one; the weights are what was asked for
        with reading("processor", source):
            return from_pretrained(
                CLIPImageProcessorPil, repository.fetch("preprocessor_config.json"), model=False
            )
