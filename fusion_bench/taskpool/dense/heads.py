"""Heads on encoders: from an image to values of pixels."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor, nn

from fusion_bench.patch_head import CONFIG, FILES, PatchHead, read_sizes
from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError, Place
from fusion_bench.repository import Repository
from fusion_bench.sources import load
from fusion_bench.taskpool.images.preprocess import Preprocessor
from fusion_bench.taskpool.parts import Part
from fusion_bench.weights import TensorWeights, sha256

Predict = Callable[[Tensor], Tensor]


class DenseHead:
    """A task's head, and the image processor of its encoder; both stay outside of the merge.

    Args:
        head: a folder, a repository on the Hub or a ``zoo:`` name with the files of a
            ``PatchHead``, or a module, or its config node.
        processor: likewise the image processor; by default it is beside the head.
        channels: how many values of a pixel the task wants; ``None`` for any number.
        place: the task's.
    """

    def __init__(self, head: Any, processor: Any, channels: int | None, place: Place):
        repositories: dict[str, Repository] = {}
        self._place = place
        self._part = Part(head, (*place, "head"), repositories)
        self._processor = Part(processor, (*place, "processor"), repositories)
        self._wanted = channels

    def plan(self, plan: Plan, scratch: Path | None) -> None:
        """Find the head and the image processor; compare the head's size by its config."""
        with plan.collect(), self._part.located():
            if self._part.name is not None and (found := self._part.find(plan, scratch)):
                _refuse_without_head(found)
                plan.download(found, *FILES)
                self._check(read_sizes(found.fetch(CONFIG))["channels"])
        with plan.collect():
            self._refuse_without_processor()
            self._processor_part.plan_image_processor(plan, scratch)

    @cached_property
    def module(self) -> nn.Module:
        """The head.

        Raises:
            FusionBenchError: it cannot be read, or is of another task.
        """
        with self._part.located():
            if self._part.name is None:
                found = load("head", self._part.source)
                if not isinstance(found, nn.Module):
                    raise FusionBenchError(f"a {type(found).__name__} is not a module.")
                return found.eval()
            _refuse_without_head(self._part.repository)
            head = PatchHead.read(self._part.repository.fetch(*FILES))
            self._check(head.channels)
            return head

    @property
    def channels(self) -> int | None:
        """How many values of a pixel the head gives, as far as that is known."""
        return self.module.channels if isinstance(self.module, PatchHead) else None

    @cached_property
    def identity(self) -> str:
        """What identifies the head: its form and its weights."""
        return f"{self.module!r} {sha256(TensorWeights(self.module.state_dict()))}"

    @cached_property
    def preprocessor(self) -> Preprocessor:
        """What becomes of images; each is resized as a whole, for each pixel has a target."""
        from transformers import AutoImageProcessor

        self._refuse_without_processor()
        processor = self._processor_part.image_processor(AutoImageProcessor, backend="pil")
        if getattr(processor, "do_center_crop", False):
            settings = {"do_center_crop": False, "size": dict(processor.crop_size)}
            processor = type(processor).from_dict({**processor.to_dict(), **settings})
        return Preprocessor(processor)

    def on(self, model: nn.Module, name: str, fabric: Fabric) -> Predict:
        """Return the function from images to values of pixels, (n, channels, h, w).

        Raises:
            FusionBenchError: from the function, where head and model do not fit each other.
        """
        backbone: Any = getattr(model, "base_model", model)
        head = fabric.to_device(self.module)

        def predict(images: Tensor) -> Tensor:
            features = patch_features(backbone, images, name)
            width = head.hidden_size if isinstance(head, PatchHead) else features.shape[1]
            with self._part.located():
                if features.shape[1] != width:
                    reason = f"it is for {width} features, '{name}' has {features.shape[1]}."
                    raise FusionBenchError(reason, "Name a head for an encoder of this size.")
                found: Tensor = head(features.float())
                self._check(found.shape[1])
            return found

        return predict

    @property
    def _processor_part(self) -> Part:
        return self._part if self._processor.source is None else self._processor

    def _refuse_without_processor(self) -> None:
        if self._processor.source is None and self._part.name is None:
            raise FusionBenchError(
                "missing; a head that is a module has none.", place=(*self._place, "processor")
            )

    def _check(self, channels: int) -> None:
        if self._wanted is not None and channels != self._wanted:
            reason = f"it gives {channels} values a pixel, the task needs {self._wanted}."
            raise FusionBenchError(reason, "Name the head of this task.")


def patch_features(encoder: Any, images: Tensor, name: str) -> Tensor:
    """Return what an encoder knows of each patch, of shape (n, hidden, rows, columns).

    Args:
        encoder: of transformers: one with tokens, of which the last are the patches, row by row, or
            one whose last state is a map already.
        images: as it takes them.
        name: what messages call it.

    Raises:
        FusionBenchError: it gives no such thing.
    """
    output = encoder(pixel_values=images)
    state = getattr(output, "last_hidden_state", None)
    if isinstance(state, Tensor) and state.ndim == 4:
        return state
    patch = getattr(getattr(encoder, "config", None), "patch_size", None)
    if not isinstance(state, Tensor) or state.ndim != 3 or not isinstance(patch, int):
        raise FusionBenchError(
            f"'{name}', a {type(encoder).__name__}, gives no features of patches, which the heads "
            "of dense tasks need. Merge encoders of images, such as a CLIPVisionModel."
        )
    rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
    return state[:, -rows * columns :].movedim(1, -1).unflatten(2, (rows, columns))


def _refuse_without_head(repository: Repository) -> None:
    if lacking := [name for name in FILES if name not in repository.files]:
        raise FusionBenchError(
            f"'{repository.name}' has no head: it lacks '{lacking[0]}'.",
            "Write one there with fusion_bench.taskpool.PatchHead, or name another folder.",
        )
