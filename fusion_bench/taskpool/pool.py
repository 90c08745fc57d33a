"""The task pool: any kinds of tasks, evaluated with a cache of results."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.instantiate import instantiate
from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError, Place, Problems, did_you_mean
from fusion_bench.progress import SAMPLES, step
from fusion_bench.results import Example, ResultStore, SampleScores
from fusion_bench.storage import check_file_name
from fusion_bench.taskpool.datasets import DatasetPlace
from fusion_bench.taskpool.loading import BatchLimit, Loading, check_loading
from fusion_bench.taskpool.task import Evaluation, LearningData, Task, TaskDescription
from fusion_bench.tasks import canonical_name
from fusion_bench.tokenizer import TokenizerSource

log = logging.getLogger(__name__)

#: Draws the samples of ``max_samples``; the same ones in every run.
_SUBSET_SEED = 0
#: Seconds to wait for another run, where several processes of this one wait.
_PATIENCE = 300
#: Stands for the samples in the key of a result that says itself which it has.
_PART = "part"


class TaskPool:
    """Tasks of any kinds.

    Args:
        tasks: a task's name to the task, or to its config node; what that makes is given ``name``.
        dataloader_kwargs: ``batch_size`` and ``num_workers``, which suit the device where they are
            not given.
        max_samples: evaluate no more than so many samples of each task, a random subset that is the
            same in every run.
        save_predictions: write each model's scores of single samples as parquet files beside the
            report.
        cache: keep results on disk and use what is there.
        compile: compile the models with ``torch.compile``.

    Raises:
        FusionBenchError: no task, a task that cannot be made, or a name that no file can have.
    """

    @keeps_arguments
    def __init__(
        self,
        tasks: Mapping[str, Any],
        dataloader_kwargs: Mapping[str, Any] | None = None,
        max_samples: int | None = None,
        save_predictions: bool = False,
        cache: bool = True,
        compile: bool = False,
    ):
        if not tasks:
            raise FusionBenchError("there is no task.", "Name at least one.", place=("tasks",))
        if max_samples is not None and (type(max_samples) is not int or max_samples < 1):
            raise FusionBenchError(f"'{max_samples}' is not 1 or more.", place=("max_samples",))
        check_loading(dataloader_kwargs or {})
        self.tasks: dict[str, Task] = {}
        problems = Problems()
        for name, task in tasks.items():
            with problems.collect("tasks", name):
                check_file_name(name)
                if isinstance(task, Mapping):  # nodes in it are for the task: it loads them late
                    task = instantiate({"_recursive_": False, **task}, name=name)
                self.tasks[name] = task
        problems.raise_all()
        self.save_predictions = save_predictions
        self._dataloader_kwargs = dict(dataloader_kwargs or {})
        self._max_samples = max_samples
        self._results = ResultStore() if cache else None
        self._compile = compile
        self._batch_limit = BatchLimit()
        self._is_prepared = False
        self._notes: list[str] = []
        self._for_tokenizers: dict[TokenizerSource, Self] = {}
        self._part: Mapping[str, NDArray[np.int64]] | None = None

    @property
    def task_names(self) -> list[str]:
        """The tasks' names."""
        return list(self.tasks)

    @property
    def keeps_results(self) -> bool:
        """Whether results are kept for the next run."""
        return self._results is not None

    @property
    def notes(self) -> list[str]:
        """What the report is to say of how models were evaluated."""
        notes = list(self._notes)
        if self._batch_limit.most is not None:
            most = self._batch_limit.most
            notes.append(f"Memory ran out: {most} samples were evaluated at a time.")
        return notes

    @property
    def test_datasets(self) -> Mapping[str, Any]:
        """The nodes of datasets that a method may learn from without labels."""
        return {}

    def owners(self) -> dict[str, str | None]:
        """Return the model that the config names as trained for each task."""
        return {name: task.owner for name, task in self.tasks.items()}

    def with_tokenizer(self, source: TokenizerSource) -> Self:
        """Return the pool for models with this tokenizer, the same one each time."""
        if source not in self._for_tokenizers:
            pool = copy(self)
            pool.tasks = {name: task.with_tokenizer(source) for name, task in self.tasks.items()}
            pool._is_prepared, pool._notes = False, []
            same = all(pool.tasks[name] is task for name, task in self.tasks.items())
            self._for_tokenizers[source] = self if same else pool
        return self._for_tokenizers[source]

    def plan(self, scratch: Path | None = None) -> Plan:
        """Compare what is known of the tasks' data; no data is read.

        Args:
            scratch: where small files go that are not here, for a run that leaves nothing.
        """
        plan = Plan()
        for task in self.tasks.values():
            with plan.collect():
                task.plan(plan, scratch)
        return plan

    def plan_tuning(
        self, datasets: Mapping[str, Any], place: Place, scratch: Path | None = None
    ) -> Plan:
        """Likewise for the datasets that ``tuning`` is given, once ``plan`` has run."""
        plan = Plan()
        for name, node in datasets.items():
            own = DatasetPlace((*place, name), whole=True)
            with plan.collect():
                self.tasks[self._task_of(name, node, own)].plan_data(plan, node, own, scratch)
        return plan

    def prepare(self, fabric: Fabric) -> None:
        """Load what the tasks are evaluated on; done once.

        Raises:
            FusionBenchError: a source that cannot be read, or data that are not the task's.
        """
        if self._is_prepared:
            return
        with fabric.rank_zero_first():  # so that only one process downloads
            problems = Problems()
            for task in self.tasks.values():
                with problems.collect():
                    task.prepare(fabric)
            problems.raise_all()
        self._is_prepared = True

    def describe(self, task: str) -> TaskDescription:
        """Return what a task measures, once ``prepare`` has run."""
        return self.tasks[task].describe()

    def num_samples(self, task: str, fabric: Fabric, *, fast_dev_run: bool = False) -> int:
        """Return the number of samples that ``evaluate`` takes, once ``prepare`` has run."""
        return len(self._samples(task, self._first(fabric, fast_dev_run)))

    def examples(self, task: str, samples: Sequence[int]) -> list[Example]:
        """Return samples as people read them; none of a task whose samples are no texts."""
        return self.tasks[task].examples(samples)

    def tuning(
        self, datasets: Mapping[str, Any], fabric: Fabric, place: Place
    ) -> dict[str, LearningData]:
        """Return what a method may learn from, by the datasets' names.

        Args:
            datasets: name of a task of this pool to dataset node.
            fabric: gives the device.
            place: the datasets' whole place in the config, which need not be in this pool.

        Raises:
            FusionBenchError: a name that is no task's, a dataset that cannot be read, or one that
                does not fit the task.
        """
        self.prepare(fabric)
        tuning = {}
        for name, node in datasets.items():
            own = DatasetPlace((*place, name), whole=True)
            task = self._task_of(name, node, own)
            how = self._evaluation(fabric, "merged", f"tuning on {task}")
            tuning[name] = self.tasks[task].data(task, node, own, how)
        return tuning

    def evaluating(self, data: Mapping[str, LearningData]) -> Self:
        """Return a pool that evaluates on what ``tuning`` gave, and is like this one otherwise."""
        pool = copy(self)
        found = {own.task: own for own in data.values()}
        pool.tasks = {n: task.on(found[n]) for n, task in self.tasks.items() if n in found}
        return pool

    def samples(
        self, task: str, fabric: Fabric, *, fast_dev_run: bool = False
    ) -> NDArray[np.int64]:
        """Return the samples that ``evaluate`` takes, in ascending order, after ``prepare``."""
        return self._samples(task, self._first(fabric, fast_dev_run))

    def part(self, samples: Mapping[str, NDArray[np.int64]]) -> Self:
        """Return a pool that evaluates only these samples, in ascending order, of these tasks.

        What it finds out of a model is kept sample by sample, apart from whole results, and what a
        whole result says is not evaluated again.
        """
        pool = copy(self)
        pool.tasks = {name: self.tasks[name] for name in samples}
        pool._part = dict(samples)
        return pool

    def evaluate(
        self,
        model: nn.Module | Callable[[], nn.Module],
        fabric: Fabric,
        tasks: Sequence[str] | None = None,
        *,
        name: str = "model",
        fast_dev_run: bool = False,
        weights_sha256: str | None = None,
        architecture: str = "",
    ) -> dict[str, SampleScores]:
        """Evaluate a model on ``tasks``, by default all.

        Args:
            model: a module, moved to Fabric's device, or what makes one when it is needed.
            fabric: gives device, precision and processes; all of them must call this.
            tasks: names out of ``task_names``.
            name: what progress and messages call the model.
            fast_dev_run: only the first batch of each task.
            weights_sha256: the hash of the model's weights. With it, results that are known are
                taken from the cache, and new ones are kept.
            architecture: what else the model's answers depend on, beside the weights.
        """
        self.prepare(fabric)
        first = self._first(fabric, fast_dev_run)
        module: nn.Module | None = None
        known: list[str] = []
        scores: dict[str, SampleScores] = {}
        wanted = self.task_names if tasks is None else tasks
        # Tasks that another run is evaluating just now are left for later.
        patience = -1 if fabric.world_size == 1 else _PATIENCE
        total = sum(self.num_samples(t, fabric, fast_dev_run=fast_dev_run) for t in wanted)
        with step("", total, SAMPLES) as work:
            for timeout, task in product((0, patience), wanted):
                if task in scores:
                    continue
                samples = self._samples(task, first)
                key = self._key(task, samples, fabric, weights_sha256)
                if key is not None:
                    key["architecture"] = architecture
                found = self._known(task, key, fabric)
                missing = _missing(samples, found)
                with self._alone(key if missing.size else None, fabric, timeout) as mine:
                    if not mine:
                        continue
                    if missing.size:  # another run may have just kept them
                        found = self._known(task, key, fabric)
                        missing = _missing(samples, found)
                    work.skip(len(samples) - len(missing))
                    if not missing.size:
                        known.append(task)
                    else:
                        if module is None:
                            module = self._on_device(model, fabric)
                        how = self._evaluation(fabric, name, f"evaluating {name} on {task}")
                        how = replace(how, computation=self._computation(key))
                        with step(f"{name} on {task}", len(missing), SAMPLES, by_inner=True):
                            new = self.tasks[task].evaluate(module, missing, how)
                        found = new if found is None else found.joined(new)
                        if (
                            key is not None
                            and self._results is not None
                            and fabric.global_rank == 0
                        ):
                            self._results.save(key, found)
                assert found is not None
                if self._part is not None:
                    found = found.at(np.isin(found.samples, samples))
                scores[task] = self._measured(task, found)
                for note in self.tasks[task].notes(name, found) if self._part is None else ():
                    if note not in self._notes:
                        log.warning("%s", note)
                        self._notes.append(note)
        if known and self._part is None:
            log.info("'%s' was evaluated before on %s.", name, ", ".join(known))
        return {task: scores[task] for task in wanted}

    def _measured(self, task: str, scores: SampleScores) -> SampleScores:
        """Add what metrics measure of the details, which is not kept: a user may change them."""
        try:
            return scores.measured(self.describe(task).metrics)
        except ValueError as error:
            raise FusionBenchError(f"{error}.", place=("metrics",)) from error

    def identity(self, task: str, fabric: Fabric) -> str | None:
        """Return a hash of what a result depends on besides the model; None if none is kept."""
        key = self._key(task, self._samples(task, None), fabric, "")
        return None if key is None else hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def _task_of(self, name: str, node: Any, place: DatasetPlace) -> str:
        """Return the task that the dataset called ``name`` belongs to."""
        known = {canonical_name(task): task for task in self.tasks}
        task = known.get(canonical_name(name))
        if task is None:
            raise place.refusal(
                "the task pool has no such task.", did_you_mean(name, self.task_names)
            )
        if node is None:
            raise place.refusal("names no dataset.", f"To leave it out: '~{place}'.")
        return task

    def _evaluation(self, fabric: Fabric, model: str, progress: str) -> Evaluation:
        loading = Loading.for_device(self._dataloader_kwargs, fabric)
        loading = replace(loading, full_batches=self._compile)
        return Evaluation(fabric, loading, self._batch_limit, model, progress)

    def _first(self, fabric: Fabric, fast_dev_run: bool) -> int | None:
        """Return how many samples are evaluated, if not all are."""
        if not fast_dev_run:
            return None
        return Loading.for_device(self._dataloader_kwargs, fabric).batch_size

    @contextmanager
    def _alone(self, key: dict[str, Any] | None, fabric: Fabric, timeout: float) -> Iterator[bool]:
        """Let the first process lock a result against other runs; yield whether it has the lock."""
        with ExitStack() as held:
            mine = True
            if key is None or self._results is None:
                yield mine
                return
            if fabric.global_rank == 0:
                mine = held.enter_context(self._results.alone(key, timeout))
            yield fabric.broadcast(mine) if fabric.world_size > 1 else mine

    def _on_device(self, model: nn.Module | Callable[[], nn.Module], fabric: Fabric) -> nn.Module:
        module = model if isinstance(model, nn.Module) else model()
        module = fabric.strategy.precision.convert_module(module)
        module = fabric.to_device(module).eval()
        if self._compile:
            getattr(module, "base_model", module).compile()
        return module

    def _samples(self, task: str, first: int | None) -> NDArray[np.int64]:
        """Return which samples are evaluated: all, a fixed random subset, or the first few."""
        if self._part is not None:
            return self._part[task]
        count = len(self.tasks[task])
        samples = np.arange(count, dtype=np.int64)
        if self._max_samples is not None and self._max_samples < count:
            drawn = np.random.default_rng(_SUBSET_SEED).permutation(count)
            samples = np.sort(drawn[: self._max_samples]).astype(np.int64)
        return samples if first is None else samples[:first]

    def _key(
        self, task: str, samples: NDArray[np.int64], fabric: Fabric, weights_sha256: str | None
    ) -> dict[str, Any] | None:
        """Return all that a result depends on; None where it cannot be known again."""
        if weights_sha256 is None or self._results is None:
            return None
        return {
            "weights": weights_sha256,
            **self.tasks[task].key(),
            # A part goes on with what is known of other parts; it never counts as a whole.
            "samples": _PART if self._part is not None else _hash(samples),
            "precision": str(fabric.strategy.precision.precision),
            "device": fabric.device.type,
            "compile": self._compile,
        }

    def _computation(self, key: Mapping[str, Any] | None) -> str | None:
        """Return the hash of what a model's answers depend on besides what it is asked."""
        if key is None:
            return None
        own = {k: key[k] for k in ("weights", "architecture", "precision", "device", "compile")}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    def _known(self, task: str, key: dict[str, Any] | None, fabric: Fabric) -> SampleScores | None:
        """Return what the first process finds in the cache, so that all take the same way.

        Of a part that may be scores of other samples, too.
        """
        if key is None or self._results is None:
            return None
        found = None
        if fabric.global_rank == 0:
            if self._part is not None:
                every = np.arange(len(self.tasks[task]), dtype=np.int64)
                found = self._results.load({**key, "samples": _hash(every)})
            found = found or self._results.load(key)
        return fabric.broadcast(found) if fabric.world_size > 1 else found


def _missing(samples: NDArray[np.int64], found: SampleScores | None) -> NDArray[np.int64]:
    return samples if found is None else samples[~np.isin(samples, found.samples)]


def _hash(samples: NDArray[np.int64]) -> str:
    return hashlib.sha256(samples.data).hexdigest()
