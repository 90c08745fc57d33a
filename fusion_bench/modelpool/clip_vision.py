"""CLIP vision encoders that were fine-tuned from one pretrained model."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.modelpool.agreement import PREPROCESSOR
from fusion_bench.modelpool.build import config_of
from fusion_bench.modelpool.directory import tell_what_is_left
from fusion_bench.modelpool.huggingface import HFModelPool
from fusion_bench.pretrained import from_pretrained
from fusion_bench.sources import reading
from fusion_bench.weights import MergePolicy, Model, Renamed, Weights

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
    _config_class = "CLIPVisionConfig"

    @keeps_arguments
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

    def load_model(self, name: str) -> nn.Module:
        """Load a model's vision encoder afresh, as in ``HFModelPool``."""
        module = super().load_model(name)
        encoder: nn.Module = getattr(module, "vision_model", module)  # a full CLIP model holds one
        return encoder

    def write_companions(self, model: Model | None, directory: Path) -> None:
        """Write the vision encoder's config and what prepares pictures."""
        config = deepcopy(self._modules.config_for(self._reference))
        if model is not None and model.config is not None:
            config = self._opened.part_of(config_of(model.config, self._config_class))
        assert config is not None
        config.architectures = ["CLIPVisionModel"]
        if self.policy.dtype is not None:
            config.dtype = self.policy.dtype
        config.save_pretrained(directory)
        if (processor := self._image_processor()) is not None:
            processor.save_pretrained(directory)
        if (home := self._opened.source(self._reference).home) is not None:
            tell_what_is_left(home, ("config.json", PREPROCESSOR))

    def _image_processor(self) -> Any:
        """Return what prepares pictures; None for a checkpoint without, as weights will do."""
        place = self._comparison.with_preprocessor(self._reference)
        if self._processor is not None and (place := self._processor.folder) is None:
            processor = self._processor.made()
            return getattr(processor, "image_processor", processor)
        if place is None or PREPROCESSOR not in place.files:
            return None
        from transformers import CLIPImageProcessorPil

        with reading("processor", place.name):
            return from_pretrained(CLIPImageProcessorPil, place.fetch(PREPROCESSOR), model=False)
