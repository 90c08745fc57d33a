"""CLIP vision encoders that were fine-tuned from one pretrained model."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from fusion_bench.errors import FusionBenchError, did_you_mean
from fusion_bench.sources import load, reading, resolve
from fusion_bench.storage import whole_directory
from fusion_bench.weights import ModuleWeights, Weights, is_special

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

#: Every reader understands files with this prefix; a live module's keys are without it.
_FILE_PREFIX = "vision_model."


class CLIPVisionModelPool:
    """Named vision encoders: ``_pretrained_``, the common base, and the models to fuse.

    Args:
        models: name to Hub repository, local directory, ``zoo:`` name, config node or module. A
            full CLIP model stands for its vision encoder. Names with a leading or trailing
            underscore are special and take no part in the fusion.
        processor: the image processor that is saved beside a merged model; by default that of the
            pretrained model.
        train_datasets: name to dataset node, for methods that learn from training data.
        val_datasets: likewise, for methods that tune on validation data.
        test_datasets: likewise, for methods that adapt to unlabelled test data.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        processor: Any = None,
        train_datasets: Mapping[str, Any] | None = None,
        val_datasets: Mapping[str, Any] | None = None,
        test_datasets: Mapping[str, Any] | None = None,
    ):
        self._models = dict(models)
        self._processor = processor
        self.train_datasets = dict(train_datasets or {})
        self.val_datasets = dict(val_datasets or {})
        self.test_datasets = dict(test_datasets or {})
        self.model_names = [name for name in self._models if not is_special(name)]
        self.has_pretrained = "_pretrained_" in self._models
        if not self.model_names:
            raise FusionBenchError(
                "modelpool.models: the pool is empty. Name at least one model besides special "
                "ones such as '_pretrained_', for example 'sun397: path/to/model'."
            )

    def load_model(self, name: str) -> "CLIPVisionModel":
        """Load a model afresh, in eval mode, on the CPU.

        Raises:
            FusionBenchError: an unknown name, a source that cannot be read, a checkpoint that
                lacks some of the vision encoder's weights or has them in other shapes.
        """
        if name not in self._models:
            raise FusionBenchError(
                f"Model '{name}' is not in the pool. " + did_you_mean(name, self._models)
            )
        source = self._models[name]
        if isinstance(source, str):
            model = _read_vision_model(f"modelpool.models.{name}", source)
        else:
            model = load("model", source, f"modelpool.models.{name}")
        if not isinstance(model, nn.Module):
            raise FusionBenchError(
                f"modelpool.models.{name}: expected a repository, a directory or a module, "
                f"got {type(model).__name__}."
            )
        vision = getattr(model, "vision_model", model)  # a full CLIP model holds one
        return vision.eval()

    def weights(self, name: str) -> Weights:
        """Return a model's weights, with the keys of a live ``CLIPVisionModel``."""
        return ModuleWeights(self.load_model(name))

    def build_model(self, state_dict: Mapping[str, Tensor]) -> "CLIPVisionModel":
        """Return a module of the pool's architecture with these weights."""
        model = self.load_model(self._reference)
        model.load_state_dict(state_dict, assign=True)
        return model

    def save_model(self, model: "CLIPVisionModel", path: str | Path) -> None:
        """Write a model as a Hugging Face directory, with the pool's image processor.

        The directory appears whole or not at all.
        """
        weights = ModuleWeights(model)
        with whole_directory(Path(path)) as directory:
            model.config.architectures = ["CLIPVisionModel"]
            model.config.save_pretrained(directory)
            save_file(
                {
                    _FILE_PREFIX + key: tensor.contiguous().cpu()
                    for key, tensor in weights.items()
                    if weights.tied_to(key) == key
                },
                directory / "model.safetensors",
                metadata={"format": "pt"},
            )
            if (processor := self._image_processor()) is not None:
                processor.save_pretrained(directory)

    @property
    def _reference(self) -> str:
        return "_pretrained_" if self.has_pretrained else self.model_names[0]

    def _image_processor(self) -> Any:
        source = self._processor or self._models[self._reference]
        if self._processor is None and isinstance(source, Mapping):
            source = source.get("pretrained_model_name_or_path")
        if source is None or isinstance(source, nn.Module):
            return None
        if not isinstance(source, str):
            processor = load("processor", self._processor, "modelpool.processor")
            return getattr(processor, "image_processor", processor)
        from transformers import CLIPImageProcessorPil

        try:
            with reading("processor", source):
                return CLIPImageProcessorPil.from_pretrained(resolve(source))
        except FusionBenchError:  # a checkpoint without one; the weights are what was asked for
            return None


def _read_vision_model(key: str, source: str) -> "CLIPVisionModel":
    from transformers import CLIPVisionModel

    with reading("model", source):
        model, info = CLIPVisionModel.from_pretrained(
            resolve(source), output_loading_info=True, ignore_mismatched_sizes=True
        )
    problems = [f"lacks '{key}'" for key in sorted(info["missing_keys"])]
    problems += [
        f"'{key}' is {list(found)}, its config.json says {list(expected)}"
        for key, found, expected in info["mismatched_keys"]
    ]
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  …" if len(problems) > 20 else "")
        raise FusionBenchError(f"{key}: '{source}' is not a whole CLIP vision encoder.\n  {shown}")
    return model
