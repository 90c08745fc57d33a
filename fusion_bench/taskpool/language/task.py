"""What all tasks that ask language models have in common."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.plan import Plan, zoo_step
from fusion_bench.problems import FusionBenchError, Place, check_between, within
from fusion_bench.results import Example, Metric, SampleScores
from fusion_bench.taskpool.datasets import DatasetPlace, plan_dataset
from fusion_bench.taskpool.language.encoding import Encoder
from fusion_bench.taskpool.language.model import LanguageModel
from fusion_bench.taskpool.language.rows import Rows
from fusion_bench.taskpool.language.templates import Template
from fusion_bench.taskpool.language.texts import Texts
from fusion_bench.taskpool.language.tuning import TextData
from fusion_bench.taskpool.metrics import chosen_metrics
from fusion_bench.taskpool.task import Evaluation, LearningData, TaskDescription
from fusion_bench.tokenizer import TokenizerSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
Encoded = TypeVar("Encoded")


class LanguageTask(ABC, Generic[Item]):
    """Texts of a dataset, and what a language model makes of them.

    Args:
        dataset: the dataset's config node.
        templates: the key in the config to the template under it.
        tokenizer: a folder, a repository on the Hub, a ``zoo:`` name, a config node or a tokenizer;
            by default that of the models.
        owner: the model that was trained for the task; by default the one of the same name.
        max_length: the most tokens that a model is given at once; by default what it says.
        metrics: names of metrics, the main one first; by default all of the task's own.
        name: the task's; the task pool gives it.
    """

    kind: ClassVar[str]
    measured: ClassVar[Sequence[Metric]]
    #: What texts lose that are too long.
    loses: ClassVar[str] = "beginnings"

    def __init__(
        self,
        dataset: Any,
        templates: Mapping[str, Template],
        tokenizer: Any = None,
        owner: str | None = None,
        max_length: int | None = None,
        metrics: Sequence[str | Metric] | None = None,
        name: str = "",
    ):
        self.name = name
        self.settings: Place = ("tasks", name) if name else ()
        self.templates = dict(templates)
        self._node = dataset
        self._place = DatasetPlace((*self.settings, "dataset"))
        self._owner = owner
        if max_length is not None:
            check_between("max_length", max_length, 2, 10**9)
        self._max_length = max_length
        with within("metrics"):
            self.metrics = chosen_metrics(metrics, self.measured)
        self._given_tokenizer = tokenizer is not None
        self._tokenizer = TokenizerSource.named(tokenizer)
        self._texts: Texts | None = None
        self._items: list[Item] | None = None
        self._encoded: dict[tuple[bool, Item], Any] = {}
        self._rows = Rows()

    @property
    def owner(self) -> str | None:
        """The model that was trained for the task, if the config names it."""
        return self._owner

    @property
    def texts(self) -> Texts:
        """The rows, once ``prepare`` has run."""
        assert self._texts is not None
        return self._texts

    @property
    def items(self) -> list[Item]:
        """What models are asked, once ``prepare`` has run."""
        assert self._items is not None
        return self._items

    def encoder(self, seq2seq: bool = False) -> Encoder:
        """Return what encodes texts for a kind of model."""
        return Encoder(self.tokenizer, seq2seq)

    def encoded(
        self,
        encoder: Encoder,
        items: Sequence[Item],
        encode: Callable[[Sequence[Item]], Sequence[Encoded]],
    ) -> list[Encoded]:
        """Return what items become in tokens, which is the same for all models of a kind.

        Args:
            encoder: what encodes.
            items: all different, or not.
            encode: does so with several items.
        """
        known, kind = self._encoded, encoder.seq2seq
        new = [item for item in dict.fromkeys(items) if (kind, item) not in known]
        known |= {(kind, item): own for item, own in zip(new, encode(new), strict=True)}
        return [known[kind, item] for item in items]

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer.

        Raises:
            FusionBenchError: there is none, or it cannot be read.
        """
        with within(*self.settings, "tokenizer"):
            return self._tokenizer.tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def with_tokenizer(self, source: TokenizerSource) -> Self:
        """Return the task for models with this tokenizer, unless it has one of its own."""
        if self._given_tokenizer:
            return self
        task = copy(self)
        task._tokenizer = source
        task._items = None
        task._encoded = {}
        task._rows = Rows()
        return task

    def plan(self, plan: Plan, scratch: Path | None) -> None:
        """Look for the dataset, its columns and the tokenizer."""
        with plan.collect():
            self.plan_data(plan, self._node, self._place, scratch)
        with plan.collect(*self.settings, "tokenizer"):
            plan_tokenizer(plan, self._tokenizer, self._given_tokenizer)

    def plan_data(self, plan: Plan, node: Any, place: DatasetPlace, scratch: Path | None) -> None:
        """Likewise for another dataset of the task."""
        described = plan_dataset(plan, node, place, scratch)
        if described is not None and described.features is not None:
            self._check_columns(described.features)

    def prepare(self, fabric: Fabric) -> None:
        """Load the dataset and the tokenizer, and look at each sample.

        Raises:
            FusionBenchError: a source that cannot be read, or a sample that is not the task's.
        """
        with within(*self.settings, "tokenizer"):
            _ = self._tokenizer.identity  # which reads it, unless it was read before
        if self._texts is None:
            self._texts = self._load(self._node, self._place)
        self._items = self._made(self._texts)

    def describe(self) -> TaskDescription:
        """Return what the task measures."""
        options = json.dumps([self._written(), self.options], sort_keys=True, default=str)
        return TaskDescription(
            kind=self.kind,
            metrics=self.metrics,
            identity={
                "dataset": self.texts.fingerprint,
                "tokenizer": self._tokenizer.identity,
                "prompts": hashlib.sha256(options.encode()).hexdigest(),
            },
            owner=self.owner,
        )

    def key(self) -> Mapping[str, Any]:
        """Return what scores depend on besides model and samples."""
        return {
            "kind": [self.kind, self._written(), dict(self.options)],
            "texts": self.texts.fingerprint,
            "tokenizer": self._tokenizer.identity,
            "max_length": self._max_length,
        }

    def evaluate(
        self, model: nn.Module, samples: NDArray[np.int64], how: Evaluation
    ) -> SampleScores:
        """Return the model's scores on samples.

        Raises:
            FusionBenchError: a model that gives no logits of tokens, or values that are no numbers.
        """
        with within(*self.settings):
            asked = LanguageModel(model, self._tokenizer, how, self._max_length, self._rows)
            return self.scores(asked, [self.items[i] for i in samples], samples)

    def notes(self, model: str, scores: SampleScores) -> list[str]:
        """Return how many samples were cut or tied, and which metrics have no value."""
        notes = sample_notes(self.name, model, scores, self.loses)
        measured = [own for own in self.metrics if scores.has(own)]
        if lacking := [own.name for own in measured if np.isnan(scores.value(own))]:
            notes.append(
                f"'{model}' on '{self.name}': {' and '.join(lacking)} has no value, for the model "
                "gives the same number for all samples, or their labels are the same."
            )
        return notes

    def examples(self, samples: Sequence[int]) -> list[Example]:
        """Return samples as people read them."""
        return [self.example(self.items[number]) for number in samples]

    def data(self, name: str, node: Any, place: DatasetPlace, how: Evaluation) -> LearningData:
        """Return another dataset of the task, for methods to learn from.

        Raises:
            FusionBenchError: a dataset that cannot be read, or does not fit the task.
        """
        with how.fabric.rank_zero_first():
            texts = self._load(node, place)
        return TextData(self, texts, self._made(texts), how)

    def on(self, data: LearningData) -> Self:
        """Return the task, evaluated on what ``data`` has returned."""
        assert isinstance(data, TextData)
        task = copy(self)
        task._texts, task._items = data.texts, data.items
        return task

    @property
    def options(self) -> Mapping[str, Any]:
        """What figures depend on besides data, templates and model."""
        return {}

    @abstractmethod
    def item(self, row: Mapping[str, Any]) -> Item:
        """Return what a model is asked of a row.

        Raises:
            FusionBenchError: the row is not the task's.
        """

    @abstractmethod
    def example(self, item: Item) -> Example:
        """Return what people read of an item."""

    @abstractmethod
    def learned(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Return what methods learn from: tokens, filled up with -1, and labels; a row an item."""

    @abstractmethod
    def classifier(self, model: nn.Module, how: Evaluation) -> Callable[[Tensor], Tensor]:
        """Return the function from such tokens to logits that a model makes."""

    @abstractmethod
    def scores(
        self, model: LanguageModel, items: Sequence[Item], samples: NDArray[np.int64]
    ) -> SampleScores:
        """Ask a model.

        Args:
            model: the model.
            items: what it is asked.
            samples: their numbers.
        """

    def _load(self, node: Any, place: DatasetPlace) -> Texts:
        texts = Texts.load(node, place)
        self._check_columns(texts.columns)
        return texts

    def _check_columns(self, columns: Iterable[str]) -> None:
        columns = list(columns)
        for key, template in self.templates.items():
            with within(*self.settings, key):
                template.check(columns)

    def _made(self, texts: Texts) -> list[Item]:
        items = []
        for index, row in enumerate(texts):
            try:
                items.append(self.item(row))
            except FusionBenchError as error:
                raise texts.wrong(index, error) from error
        return items

    def _written(self) -> dict[str, str]:
        return {key: template.text for key, template in self.templates.items()}


def plan_tokenizer(plan: Plan, source: TokenizerSource, given: bool) -> None:
    """Note in a plan what a tokenizer takes.

    Args:
        plan: the plan.
        source: the tokenizer.
        given: whether the task pool's config names it; else it is that of the models.

    Raises:
        FusionBenchError: there is none, or it does not fit the models.
    """
    if place := source.unbuilt:
        plan.add(zoo_step(place))
        return
    if not source.exists:
        if given:
            raise FusionBenchError("there is no tokenizer.", "Name a folder that has one.")
        raise FusionBenchError(
            "the models have no tokenizer.", "Name one: '{here}tokenizer=path/to/one'."
        )
    source.plan(plan)


def sample_notes(
    task: str, model: str, scores: SampleScores, loses: str = "beginnings"
) -> list[str]:
    """Return how many samples were cut, and lost their beginnings or ends, and how many tied."""
    notes = []
    if cut := _count(scores, "truncated"):
        notes.append(
            f"Task '{task}': {cut} of {scores.num_samples} samples are longer than what the model "
            f"reads, and lost their {loses}."
        )
    if tied := _count(scores, "tied"):
        notes.append(
            f"'{model}' on '{task}': the best choices of {tied} of {scores.num_samples} samples "
            "are tied; the first of them is taken."
        )
    return notes


def marked(numbers: "set[int]", owners: Sequence[int], count: int) -> NDArray[np.int64]:
    """Return 1 for each of ``count`` samples that has one of some requests, else 0.

    Args:
        numbers: those of the requests.
        owners: the sample of each request, counted from 0.
        count: how many samples there are.
    """
    found = np.zeros(count, dtype=np.int64)
    found[[owners[number] for number in numbers]] = 1
    return found


def _count(scores: SampleScores, name: str) -> int:
    return int(scores.details[name].astype(np.int64).sum()) if name in scores.details else 0
