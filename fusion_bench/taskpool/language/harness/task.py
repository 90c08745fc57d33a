"""A task of the harness, as a task of a pool."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError
from fusion_bench.results import Example, SampleScores
from fusion_bench.taskpool.datasets import DatasetPlace, plan_dataset
from fusion_bench.taskpool.language.harness.building import build, dataset_node, evaluated_split
from fusion_bench.taskpool.language.harness.folder import Definition
from fusion_bench.taskpool.language.harness.library import (
    SHOTS_SEED,
    as_ours,
    failure,
    require,
    version,
)
from fusion_bench.taskpool.language.harness.requests import (
    answers,
    chat_template,
    digest,
    example,
    refuse_unusable,
)
from fusion_bench.taskpool.language.harness.safety import check
from fusion_bench.taskpool.language.model import LanguageModel
from fusion_bench.taskpool.language.task import plan_tokenizer, sample_notes
from fusion_bench.taskpool.task import Evaluation, LearningData, TaskDescription
from fusion_bench.tokenizer import TokenizerSource

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from fusion_bench.results.metrics import Numbers
    from fusion_bench.results.scores import Array
    from fusion_bench.taskpool.language.harness.metrics import Measured

#: Of a document's hash so many hexadecimal digits are kept, as a number.
_DIGITS = 15
#: Keys of the whole pool, beside the tasks.
_OF_POOL = (("tokenizer",), ("cluster_by",))


@dataclass(frozen=True)
class Options:
    """How the harness is to ask, beside what the task's files say.

    Attributes:
        limit: evaluate the first documents alone: their number, or their share below 1.
        chat: put prompts into the tokenizer's chat template, or into the one of this name.
        system: the system's message.
        multiturn: make each example a turn of its own in the chat.
        max_length: the most tokens that a model is given; None takes what it says.
        cluster_by: a column; documents with the same value in it belong together.
    """

    limit: int | float | None = None
    chat: bool | str = False
    system: str | None = None
    multiturn: bool = False
    max_length: int | None = None
    cluster_by: str | None = None


class Built:
    """The harness's object of a task, made once for all tokenizers and models.

    Args:
        definition: the task.
    """

    def __init__(self, definition: Definition):
        self.definition = definition

    @cached_property
    def task(self) -> Any:
        """The object; its data are loaded.

        Raises:
            FusionBenchError: it cannot be made.
        """
        check(self.definition)
        return build(self.definition)


class HarnessTask:
    """A task of the harness.

    Its requests are made once, for all documents, so that a subset of these is asked with the same
    examples as all of them are.

    Args:
        name: the task's in the pool.
        definition: the task.
        options: how it is asked.
        tokenizer: one for this task, in place of that of the models.
        owner: the model that was trained for the task; by default the one of the same name.
        verbosity: from which level on the harness's messages are shown.
    """

    def __init__(
        self,
        name: str,
        definition: Definition,
        options: Options,
        tokenizer: TokenizerSource | None = None,
        owner: str | None = None,
        verbosity: int = logging.ERROR,
    ):
        self.name = name
        self._place = ("tasks", name)
        self._options = options
        self._built = Built(definition)
        self._given_tokenizer = tokenizer is not None
        self._tokenizer = tokenizer or TokenizerSource(lambda: None)
        self._owner = owner
        self._verbosity = verbosity
        self._requests: list[list[Instance]] | None = None
        self._measured: list[Measured] = []
        self._digest = ""

    @property
    def owner(self) -> str | None:
        """The model that was trained for the task, if the config names it."""
        return self._owner

    @property
    def requests(self) -> "list[list[Instance]]":
        """What models are asked of each document, once ``prepare`` has run."""
        assert self._requests is not None
        return self._requests

    def __len__(self) -> int:
        return len(self.requests)

    def with_tokenizer(self, source: TokenizerSource) -> Self:
        """Return the task for models with this tokenizer, unless it has one of its own."""
        if self._given_tokenizer:
            return self
        task = copy(self)
        task._tokenizer = source
        if self._options.chat:
            task._requests = None
        return task

    def plan(self, plan: Plan, scratch: Path | None) -> None:
        """Look at the task's files, for its dataset and for the tokenizer; no code is run."""
        definition = self._built.definition
        with plan.collect(*self._place):
            require()
            check(definition)
        with plan.collect(*self._place):
            node = dataset_node(definition)
            if node is not None:
                node["split"] = evaluated_split(definition)
                plan_dataset(plan, node, DatasetPlace(("dataset_path",)), scratch)
        with plan.collect("tokenizer"):
            plan_tokenizer(plan, self._tokenizer, self._given_tokenizer)

    def prepare(self, fabric: Fabric) -> None:
        """Load the data, and make the requests.

        Raises:
            FusionBenchError: a source that cannot be read, or a document that cannot be asked.
        """
        if self._requests is not None:
            return
        from fusion_bench.taskpool.language.harness.metrics import measured

        with self._located(), as_ours(self._verbosity):
            _ = self._tokenizer.tokenizer
            task = self._built.task
            self._requests = self._made(copy(task))
            self._measured = measured(task, self._requests[0])
            self._digest = digest(self._requests)

    def describe(self) -> TaskDescription:
        """Return what the task measures."""
        key = self.key()
        return TaskDescription(
            kind="lm_eval",
            metrics=[own.metric for own in self._measured],
            identity={
                "lm_eval": version(),
                "version": str(self._built.task.VERSION),
                "task": hashlib.sha256(json.dumps(key["task"]).encode()).hexdigest(),
                "requests": self._digest,
                "tokenizer": self._tokenizer.identity,
            },
            owner=self.owner,
        )

    def key(self) -> Mapping[str, Any]:
        """Return what scores depend on besides model and samples."""
        definition = self._built.definition
        return {
            "kind": ["lm_eval", version()],
            "task": [definition.name, definition.digest, str(self._built.task.VERSION)],
            "options": asdict(self._options),
            "requests": self._digest,
            "tokenizer": self._tokenizer.identity,
            "max_length": self._options.max_length,
        }

    def evaluate(
        self, model: nn.Module, samples: NDArray[np.int64], how: Evaluation
    ) -> SampleScores:
        """Return the model's scores on samples.

        Raises:
            FusionBenchError: a model that gives no logits of tokens, or values that are no numbers.
        """
        from fusion_bench.taskpool.language.harness.model import HarnessModel

        with self._located():
            asked = LanguageModel(model, self._tokenizer, how, self._options.max_length)
            harness = HarnessModel(asked)
            with as_ours(self._verbosity):
                task, records = self._answered(harness, samples)
            return self._scores(task, records, samples, harness.cut)

    def notes(self, model: str, scores: SampleScores) -> list[str]:
        """Return how many samples were cut, and for how many choices were tied."""
        return sample_notes(self.name, model, scores)

    def examples(self, samples: Sequence[int]) -> list[Example]:
        """Return documents as people read them."""
        return [example(self._built.task, self.requests[number]) for number in samples]

    def plan_data(self, plan: Plan, node: Any, place: DatasetPlace, scratch: Path | None) -> None:
        """Refuse to be learned from."""
        raise _no_learning(place)

    def data(self, name: str, node: Any, place: DatasetPlace, how: Evaluation) -> LearningData:
        """Refuse to be learned from.

        Raises:
            FusionBenchError: always.
        """
        raise _no_learning(place)

    def on(self, data: LearningData) -> Self:
        """Return the task itself, for which ``data`` returns nothing."""
        return self

    @contextmanager
    def _located(self) -> Iterator[None]:
        """Put the task's place before that of problems that do not belong to the whole pool."""
        try:
            yield
        except FusionBenchError as error:
            error.problems = tuple(
                own if own.place[:1] in _OF_POOL else own.inside(*self._place)
                for own in error.problems
            )
            raise

    def _made(self, task: Any) -> "list[list[Instance]]":
        """Return the requests of each document, in order.

        Raises:
            FusionBenchError: a document that cannot be asked.
        """
        options = self._options
        started: list[Any] = []
        context = task.fewshot_context

        def counted(doc: Any, *arguments: Any, **named: Any) -> Any:
            started.append(doc)
            return context(doc, *arguments, **named)

        task.fewshot_context = counted
        task.set_fewshot_seed(SHOTS_SEED)
        try:
            task.build_all_requests(
                limit=self._limit(task),
                system_instruction=options.system,
                apply_chat_template=bool(options.chat),
                fewshot_as_multiturn=options.multiturn,
                chat_template=chat_template(self._tokenizer.tokenizer, options.chat),
            )
        except FusionBenchError:
            raise
        except Exception as error:  # of a template, of the task's code, or of its data
            which = f"sample {len(started) - 1}" if started else "the task"
            raise failure(f"{which} cannot be asked", error) from error
        made: list[list[Instance]] = []
        for own in task.instances:
            if own.doc_id == len(made):
                made.append([])
            made[own.doc_id].append(own)
        refuse_unusable(task, made)
        return made

    def _limit(self, task: Any) -> int | None:
        limit = self._options.limit
        if limit is None:
            return None
        return math.ceil(len(task.eval_docs) * limit) if limit < 1 else int(limit)

    def _answered(self, model: Any, samples: NDArray[np.int64]) -> tuple[Any, list[dict[str, Any]]]:
        """Let the harness ask a model of some documents; return its task and its records."""
        from lm_eval.evaluator import evaluate

        chosen = samples.tolist()
        task = copy(self._built.task)
        # Its own choice of samples logs them under wrong numbers, so it is told what there is.
        task._instances = [
            replace(own, resps=[], filtered_resps={}) for i in chosen for own in self.requests[i]
        ]
        task.build_all_requests = lambda **options: None
        task.doc_iterator = lambda **options: iter([(i, self.requests[i][0].doc) for i in chosen])
        try:
            found = evaluate(
                model,
                {"tasks": {self.name: task}},
                bootstrap_iters=0,
                confirm_run_unsafe_code=True,  # ``check`` has asked
            )
        except FusionBenchError:
            raise
        except Exception as error:  # of the task's code, its metrics or filters
            raise failure("the answers cannot be scored", error) from error
        return task, found["samples"][self.name]

    def _scores(
        self,
        task: Any,
        records: list[dict[str, Any]],
        samples: NDArray[np.int64],
        cut: set[int],
    ) -> SampleScores:
        order = {sample: i for i, sample in enumerate(samples.tolist())}
        hashes = np.zeros(len(samples), dtype=np.int64)
        values: dict[tuple[str, str], dict[int, Any]] = {}
        for record in records:
            sample = record["doc_id"]
            hashes[order[sample]] = int(record["doc_hash"][:_DIGITS], 16)
            for name in record["metrics"]:
                values.setdefault((name, record["filter"]), {})[sample] = record[name]
        statistics: dict[str, Numbers] = {}
        details: dict[str, Array] = {"documents": hashes}
        for own in self._measured:
            found = values.get((own.name, own.filter), {})
            if own.terms is None:
                details[own.kept] = own.details(found, samples)
            else:
                statistics[own.metric.name] = own.statistics(found, samples)
        details |= answers(task, samples)
        details["truncated"] = np.isin(samples, list(cut)).astype(np.int64)
        return SampleScores(samples, statistics, details, self._clusters(samples))

    def _clusters(self, samples: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the numbers of what documents share, where some share it."""
        column = self._options.cluster_by
        shared: list[Any] = []
        for sample in samples.tolist():
            first = self.requests[sample][0]
            if column is not None and column not in first.doc:
                raise FusionBenchError(f"the documents have no '{column}'.", place=("cluster_by",))
            shared.append(first.args[0] if column is None else repr(first.doc[column]))
        numbers = {value: number for number, value in enumerate(dict.fromkeys(shared))}
        if len(numbers) == len(shared):
            return None
        return np.array([numbers[value] for value in shared], dtype=np.int64)


def _no_learning(place: DatasetPlace) -> FusionBenchError:
    return place.refusal(
        "methods cannot learn from tasks of lm-eval.",
        "Give the method a task pool with a MultipleChoiceTask or a GenerationTask.",
    )
