"""Classification of texts by a head on a merged model, and regression."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError, within
from fusion_bench.results import ACCURACY, LOSS, Example, Metric, SampleScores, with_ones
from fusion_bench.taskpool.datasets import DatasetPlace
from fusion_bench.taskpool.images.task import EnsembleClassifier
from fusion_bench.taskpool.language.heads import ClassificationHead
from fusion_bench.taskpool.language.measures import (
    CORRELATIONS,
    TWO_CLASSES,
    class_label,
    classes,
    fitting,
    number,
    numbers,
)
from fusion_bench.taskpool.language.model import LanguageModel
from fusion_bench.taskpool.language.passages import Batch, Passage, passages
from fusion_bench.taskpool.language.task import LanguageTask
from fusion_bench.taskpool.language.templates import Template
from fusion_bench.taskpool.language.texts import Texts
from fusion_bench.taskpool.language.tuning import apart, filled
from fusion_bench.taskpool.task import Evaluation, TaskDescription


@dataclass(frozen=True)
class Labelled:
    """A text with its label: a class's number, or any number of a regression."""

    text: str
    pair: str | None
    label: float


class SequenceClassificationTask(LanguageTask[Labelled]):
    """Texts, or pairs of texts, and their classes; a head on the model predicts them.

    A head with one value predicts a number; its metrics are correlations. Of two classes 1 is the
    positive one. A text that is longer than the model reads loses its end. Of a model that reads
    from left to right the head takes the last token of each text, whatever fills up a batch.

    Args:
        dataset: as in ``LanguageTask``; so are the arguments that are not listed here.
        head: the classifier whose head is put on each model: a folder, a repository on the Hub, a
            ``zoo:`` name, a config node or a module.
        text: a column's name, or a template.
        text_pair: likewise the second text, where there is one.
        label: the column that holds the class, as a number or as a name of the column's, or the
            number to predict.
    """

    kind = "sequence_classification"
    measured = (ACCURACY, *TWO_CLASSES, LOSS, *CORRELATIONS)
    loses = "ends"

    @keeps_arguments
    def __init__(
        self,
        dataset: Any,
        head: Any = None,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        tokenizer: Any = None,
        owner: str | None = None,
        max_length: int | None = None,
        metrics: Sequence[str | Metric] | None = None,
        name: str = "",
    ):
        with within("head"):
            if head is None:
                raise FusionBenchError(
                    "there is none, and classes need one.",
                    "Name the classifier that was trained for the task; its head is taken.",
                )
        named = {"text": text, "label": label} | ({"text_pair": text_pair} if text_pair else {})
        templates = {}
        for key, own in named.items():
            with within(key):
                templates[key] = Template(own)
        super().__init__(dataset, templates, tokenizer, owner, max_length, metrics, name)
        self._has_chosen = metrics is not None
        self.head = ClassificationHead(head)

    def plan(self, plan: Plan, scratch: Path | None) -> None:
        """Look for the head, too."""
        super().plan(plan, scratch)
        with plan.collect(*self.settings):
            self.head.plan(plan, scratch)

    def prepare(self, fabric: Fabric) -> None:
        """Load the head, too.

        Raises:
            FusionBenchError: as in ``LanguageTask``, or metrics of another kind of head.
        """
        with within(*self.settings):
            count = self.head.num_labels
        two = TWO_CLASSES if count == 2 else ()
        own = CORRELATIONS if count == 1 else (ACCURACY, *two, LOSS)
        kind = "numbers" if count == 1 else f"{count} classes"
        with within(*self.settings, "metrics"):
            self.metrics = fitting(self.metrics, own, kind, chosen=self._has_chosen)
        super().prepare(fabric)

    def describe(self) -> TaskDescription:
        """Return what the task measures."""
        own = super().describe()
        head = hashlib.sha256(self.head.identity.encode()).hexdigest()
        count = self.head.num_labels
        return replace(
            own, identity={**own.identity, "head": head}, num_classes=count if count > 1 else None
        )

    def key(self) -> Mapping[str, Any]:
        """Return what scores depend on besides model and samples."""
        return {**super().key(), "head": self.head.identity}

    def item(self, row: Mapping[str, Any]) -> Labelled:
        """Return a row's text and label.

        Raises:
            FusionBenchError: no text, or a label that the head does not know.
        """
        text = self.templates["text"].render(row)
        pair = self.templates["text_pair"].render(row) if "text_pair" in self.templates else None
        if not (text + (pair or "")).strip():
            raise FusionBenchError("the text is empty.", "Leave the sample out.")
        value, count = self.templates["label"].value(row), self.head.num_labels
        label = number(value) if count == 1 else class_label(value, self.head.names)
        return Labelled(text, pair, label)

    def example(self, item: Labelled) -> Example:
        """Return what people read."""
        prompt = item.text if item.pair is None else f"{item.text}\n{item.pair}"
        if self.head.num_labels == 1:
            return Example(prompt, f"{item.label:g}")
        names = tuple(self.head.names)
        return Example(prompt, names[int(item.label)], names)

    def learned(self, items: Sequence[Labelled]) -> tuple[Tensor, Tensor]:
        """Return the texts' tokens and their types, of shape (items, 2, width), and the labels."""
        with within(*self.settings):
            own = self._passages(items)
        inputs = torch.stack([filled([p.tokens for p in own]), filled([p.types for p in own])], 1)
        labels = torch.tensor([item.label for item in items])
        return inputs, labels if self.head.num_labels == 1 else labels.long()

    def classifier(self, model: nn.Module, how: Evaluation) -> Callable[[Tensor], Tensor]:
        """Return the function from such tokens to logits."""
        with within(*self.settings):
            classify = self._classify(model, how)

        def logits(inputs: Tensor) -> Tensor:
            def answer(rows: Tensor, ids: Tensor) -> Tensor:
                types = inputs[rows, 1, : ids.shape[1]]
                return classify(Batch(ids, types, torch.ones_like(ids)))

            return apart(inputs[:, 0], answer)

        return logits

    def scores(
        self, model: LanguageModel, items: Sequence[Labelled], samples: NDArray[np.int64]
    ) -> SampleScores:
        """Take the logits of each text."""
        own = self._passages(items)
        classify = self._classify(model.module, model.how)
        padding, device = model.encoder.padding, model.how.fabric.device
        count = self.head.num_labels
        logits = model.values(own, lambda part: classify(Batch.of(part, padding, device)), count)
        cut = np.array([int(passage.truncated) for passage in own])
        if count == 1:
            truth, found = np.array([item.label for item in items]), logits[:, 0]
            details = {"labels": truth, "predictions": found, "truncated": cut}
            return SampleScores(samples, numbers(truth, found), details)
        labels = np.array([int(item.label) for item in items])
        best = logits.argmax(axis=1)
        losses = (
            np.logaddexp.reduce(logits, axis=1)
            - np.take_along_axis(logits, labels[:, None], 1)[:, 0]
        )
        statistics = classes(labels, best) | {LOSS.name: with_ones(losses)}
        if count != 2:
            statistics = {name: statistics[name] for name in (ACCURACY.name, LOSS.name)}
        return SampleScores(
            samples, statistics, {"labels": labels, "predictions": best, "truncated": cut}
        )

    def _load(self, node: Any, place: DatasetPlace) -> Texts:
        texts = super()._load(node, place)
        column = texts.features.get(self.templates["label"].text)
        names = [str(name).casefold() for name in getattr(column, "names", None) or ()]
        own = [name.casefold() for name in self.head.names]
        if names and len(names) != len(own):
            raise place.refusal(
                f"it has {len(names)} classes, the head has {len(own)}.",
                "Name the head of this task.",
            )
        if names != own and sorted(names) == sorted(own):
            raise place.refusal(
                f"its classes are {', '.join(names)}, the head's are {', '.join(own)}: the same in "
                "another order.",
                "Give the task a 'label' that is a template of the class's name.",
            )
        return texts

    def _classify(self, model: nn.Module, how: Evaluation) -> Callable[[Batch], Tensor]:
        """Return the head on a model, or on the members of an ensemble of classifiers."""
        if not isinstance(model, EnsembleClassifier):
            return self.head.on(model, how.model, how.fabric)
        if self.head.num_labels == 1:
            raise FusionBenchError(
                "it has no classes, whose logits or probabilities an ensemble puts together.",
                "Let it put outputs together: method.of=outputs.",
            )
        members = [self.head.on(member, how.model, how.fabric) for member in model.members]
        return lambda batch: model.combine([member(batch) for member in members])

    def _passages(self, items: Sequence[Labelled]) -> list[Passage]:
        longest = self.head.longest(self.tokenizer)
        pairs = None
        if "text_pair" in self.templates:
            pairs = [item.pair or "" for item in items]
        return passages(
            self.tokenizer,
            [item.text for item in items],
            pairs,
            min(longest, self._max_length or longest),
        )
