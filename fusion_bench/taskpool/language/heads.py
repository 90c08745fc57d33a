"""Heads of classifiers: from what a model knows of a text to logits."""

from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric import Fabric
from torch import Tensor, nn

from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError
from fusion_bench.storage import read_json
from fusion_bench.taskpool.language.forward import wide
from fusion_bench.taskpool.language.passages import Batch, longest_text
from fusion_bench.taskpool.parts import Part
from fusion_bench.weights import TensorWeights, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEDY = "Name the model that was trained for the task, with its head."


class ClassificationHead:
    """A classifier's head, which stays outside of the merge.

    The head is all that a classifier has besides its base model; a BERT's pooler belongs to that.

    Args:
        head: a folder, a repository on the Hub or a ``zoo:`` name of a classifier of sequences,
            its config node, or the module. Places of problems are relative to the task.
    """

    def __init__(self, head: Any):
        self._part = Part(head, ("head",), {})

    def plan(self, plan: Plan, scratch: Path | None) -> None:
        """Find the classifier.

        Raises:
            FusionBenchError: it is not there, or a model that has no head, by its config.
        """
        with self._part.located():
            if self._part.name is None or (found := self._part.find(plan, scratch)) is None:
                return
            if "config.json" not in found.files:
                raise FusionBenchError(f"'{found.name}' has no config.json.", _REMEDY)
            named = read_json(found.fetch("config.json") / "config.json").get("architectures") or []
            if named and not any("ForSequenceClassification" in str(own) for own in named):
                raise FusionBenchError(
                    f"'{found.name}' is a {named[0]}, which has no head of a classifier.", _REMEDY
                )
            plan.download(found, *self._part.model_files)

    @cached_property
    def classifier(self) -> nn.Module:
        """The classifier without its base model.

        Raises:
            FusionBenchError: it cannot be read, or is no classifier.
        """
        module, _ = self._parts
        return module

    @property
    def num_labels(self) -> int:
        """How many values it gives; one of a regression."""
        classifier: Any = self.classifier
        return int(classifier.config.num_labels)

    @property
    def names(self) -> list[str]:
        """What its values are called."""
        classifier: Any = self.classifier
        called = classifier.config.id2label
        return [str(called[i]) for i in range(self.num_labels)]

    @cached_property
    def identity(self) -> str:
        """What identifies the head: its form and its weights."""
        return f"{self.classifier!r} {sha256(TensorWeights(self.classifier.state_dict()))}"

    def longest(self, tokenizer: "PreTrainedTokenizerBase") -> int:
        """Return how many tokens its base model reads."""
        return longest_text(self._parts[1], tokenizer)

    def on(self, model: nn.Module, name: str, fabric: Fabric) -> Callable[[Batch], Tensor]:
        """Return the function from texts to logits, at least float32, of shape (rows, labels).

        Args:
            model: a base model on Fabric's device, or a larger one that has it.
            name: what messages call it.
            fabric: gives device and precision.

        Raises:
            FusionBenchError: head and model do not fit each other.
        """
        backbone: Any = getattr(model, "base_model", model)
        with self._part.located():
            self._refuse_unfit(backbone, name)
        first = next(backbone.parameters())
        made: Any = deepcopy(self.classifier).to(first.device, first.dtype).requires_grad_(False)
        setattr(made, made.base_model_prefix, backbone)

        def classify(batch: Batch) -> Tensor:
            arguments = batch.arguments(made.config)
            with fabric.autocast():
                if not isinstance(getattr(made, "score", None), nn.Module):
                    logits: Tensor = made(**arguments).logits
                else:  # it would look for the last token by that of padding
                    states = backbone(**arguments, use_cache=False).last_hidden_state
                    logits = made.score(batch.last(states))
            return wide(logits)

        return classify

    @cached_property
    def _parts(self) -> tuple[nn.Module, nn.Module]:
        """The classifier, without its base model, and the base model, on no device."""
        from transformers import AutoModelForSequenceClassification

        found = self._part.model(AutoModelForSequenceClassification, "not a classifier", _REMEDY)
        found = deepcopy(found) if found is self._part.source else found
        prefix = getattr(found, "base_model_prefix", "")
        backbone = getattr(found, prefix, None) if prefix else None
        with self._part.located():
            if not isinstance(backbone, nn.Module) or not _outside(found, prefix):
                raise FusionBenchError(f"a {type(found).__name__} is no classifier.", _REMEDY)
            if found.config.problem_type == "multi_label_classification":
                raise FusionBenchError("several labels of one text are not supported.")
        setattr(found, prefix, nn.Identity())
        return found.eval(), backbone.to("meta")

    def _refuse_unfit(self, backbone: Any, name: str) -> None:
        own, other = self._parts[1], getattr(backbone, "config", None)
        expected: Any = own.config
        kinds = [getattr(config, "model_type", None) for config in (expected, other)]
        sizes = [getattr(config, "hidden_size", None) for config in (expected, other)]
        if kinds[0] != kinds[1]:
            raise FusionBenchError(
                f"it is of a model of type '{kinds[0]}', '{name}' is of type '{kinds[1]}'.",
                "Name a head for such a model.",
            )
        if sizes[0] != sizes[1]:
            raise FusionBenchError(
                f"it is for {sizes[0]} features, '{name}' has {sizes[1]}.",
                "Name a head for a model of this size.",
            )
        if _has_pooler(own) and not _has_pooler(backbone) and hasattr(backbone, "pooler"):
            raise FusionBenchError(
                f"it needs a pooler, and '{name}' has none.",
                "Merge models with their poolers: those of classifiers have one.",
            )


def _outside(module: nn.Module, prefix: str) -> list[str]:
    return [key for key in module.state_dict() if not key.startswith(f"{prefix}.")]


def _has_pooler(backbone: Any) -> bool:
    return getattr(backbone, "pooler", None) is not None
