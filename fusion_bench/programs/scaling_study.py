"""Merges random subsets of a growing number of experts, for models of several sizes.

Yadav et al., What Matters for Model Merging at Scale?, https://arxiv.org/abs/2410.03617
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path

import numpy as np
from lightning.fabric import Fabric
from pydantic import ValidationError

from fusion_bench import __version__
from fusion_bench.catalog import full_name
from fusion_bench.configs import composed
from fusion_bench.instantiate import SharedObjects, instantiate
from fusion_bench.method.plain import as_method
from fusion_bench.problems import (
    FusionBenchError,
    Problem,
    Problems,
    check_choice,
    did_you_mean,
    within,
)
from fusion_bench.programs.environment import describe_run, launch, make_fabric
from fusion_bench.programs.evaluating import Evaluator
from fusion_bench.programs.fusing import (
    MERGED,
    describe_tuning,
    fuse,
    materialize,
    seeded,
    tuning_data,
)
from fusion_bench.programs.output_paths import OutputPaths
from fusion_bench.programs.pools import PlacedModelPool, TaskPool, placed
from fusion_bench.programs.preflight import preflight
from fusion_bench.programs.prepare import Prepared, prepare_pools
from fusion_bench.programs.previous import identities
from fusion_bench.programs.setting import Setting
from fusion_bench.programs.spec import Baselines, FusionSpec, Places, Section, plain
from fusion_bench.progress import SAMPLES, kept, quiet_libraries, step
from fusion_bench.report import Seconds, Tuning, metric_info
from fusion_bench.report.scaling import Base, Merge, Normalizer, Study
from fusion_bench.report.table import wide_console
from fusion_bench.storage import cache_dir, claimed, write_text
from fusion_bench.tasks import canonical_name
from fusion_bench.trust import users_code
from fusion_bench.weights import is_special

log = logging.getLogger(__name__)


class ScalingStudy:
    """Measures merging for different numbers of experts and sizes of models.

    Each merge is evaluated on all tasks of its base: held-in are those of the merged experts,
    held-out the others. Finished merges are cached, so an interrupted study resumes.

    Args:
        bases: a name to the config nodes ``modelpool`` and ``taskpool`` of a pretrained model and
            its experts. Each expert has the name of its task.
        methods: names of method configs, or config nodes.
        counts: how many experts are merged.
        subsets: number of random subsets for each count; fewer if there are not enough.
        held_in: the divisor of the accuracy on held-in tasks: that of the task's ``expert``, of the
            pretrained ``base``, or ``none``.
        held_out: the same for held-out tasks.
        categories: maps a name to tasks that count as one.
        fabric: as in ``FabricModelFusionProgram``; so are the next two.
        seed: also the seed of the subsets.
        allow_test_split: let the methods learn from data that the models are evaluated on.
        output_dir: the directory for the study; ``None`` writes none.
        dry_run: check the config and stop before anything is loaded.

        problems: known problems of the config, reported with the others.
    """

    #: What is wrong with the bases and methods is said here, for all of them at once.
    tells_all_problems = True

    def __init__(
        self,
        bases: Mapping[str, Section] | None = None,
        methods: Sequence[Section] | None = None,
        counts: Sequence[int] | None = None,
        subsets: int = 3,
        held_in: Normalizer = "expert",
        held_out: Normalizer = "base",
        categories: Mapping[str, Sequence[str]] | None = None,
        fabric: Section = None,
        seed: int = 0,
        allow_test_split: bool = False,
        output_dir: str | Path | None = None,
        dry_run: bool = False,
        problems: Sequence[Problem] = (),
    ):
        self.bases = bases or {}
        self.methods = methods or []
        self.counts = sorted(set(counts or []))
        self.subsets = subsets
        self.held_in = held_in
        self.held_out = held_out
        self.categories = {name: list(tasks) for name, tasks in (categories or {}).items()}
        self.fabric = fabric
        self.seed = seed
        self.allow_test_split = allow_test_split
        self.output_dir = None if output_dir is None else Path(output_dir).absolute()
        self.dry_run = dry_run
        self.problems = problems
        self.config: dict[str, object] = {
            "_target_": "fusion_bench.programs.ScalingStudy",
            "_recursive_": False,
            "bases": bases,
            "methods": methods,
            "counts": counts,
            "subsets": subsets,
            "held_in": held_in,
            "held_out": held_out,
            "categories": categories,
            "fabric": fabric,
            "seed": seed,
            "allow_test_split": allow_test_split,
        }

    def run(self) -> Study | None:
        """Merge, evaluate, save and print; returns the study, or ``None`` after a dry run.

        Raises:
            FusionBenchError: with all problems of the arguments and of what they name.
        """
        quiet_libraries()
        work = self._prepared()
        if self.dry_run:
            log.info("Dry run: the config is valid; nothing was loaded.")
            return None
        with (
            kept(lambda: "Merges and results so far are in the cache: the same command goes on."),
            claimed(self.output_dir, ("hydra", "run", "dir"), inside=True),
        ):
            study: Study = launch(work.fabric, work.merge_and_evaluate)
            if work.fabric.global_rank == 0 and self.output_dir is not None:
                study.save(self.output_dir)
                log.info("Study: %s", self.output_dir / "study.html")
        if work.fabric.global_rank == 0:
            study.print(wide_console())
        return study

    def _prepared(self) -> "_Work":
        """Return what there is to do.

        Raises:
            FusionBenchError: with all problems.
        """
        problems = Problems(self.problems)
        self._check_arguments(problems)
        fabric = None
        with problems.collect():
            fabric = make_fabric(self.fabric)
        if isinstance(self.fabric, Mapping) and self.fabric.get("loggers") is not None:
            reason = "the merges of a study are not sent to loggers."
            problems.append(Problem(("fabric", "loggers"), reason, "Remove it."))
        methods = self._methods(problems)
        runs = {}
        for name, node in self.bases.items():
            runs[name] = self._base(name, node, methods, problems)
            runs[name].fabric = fabric
        preflight(*runs.values(), known=problems)
        assert fabric is not None
        return _Work(self, fabric, methods, {name: _Source.of(run) for name, run in runs.items()})

    def _check_arguments(self, problems: Problems) -> None:
        with problems.collect():
            check_choice("held_in", self.held_in, Normalizer)
        with problems.collect():
            check_choice("held_out", self.held_out, Normalizer)
        told = {problem.place[0] for problem in self.problems}
        needed = {"bases": self.bases, "methods": self.methods, "counts": self.counts}
        for key, values in needed.items():
            if not values and key not in told:
                problems.append(Problem((key,), "is empty.", "Name at least one."))
        if self.subsets < 1:
            problems.append(Problem(("subsets",), f"{self.subsets} is not 1 or more."))

    def _methods(self, problems: Problems) -> dict[str, Setting]:
        """Return the methods by name; equal names get numbers."""
        found: dict[str, Setting] = {}
        for index, method in enumerate(self.methods):
            place = ("methods", index)
            with problems.collect(*place):
                name, node = _method(method, self.seed)
                made = as_method(instantiate(node, "method"))
                same = sum(known.partition(" ")[0] == name for known in found)
                name = f"{name} {same + 1}" if same else name
                found[name] = Setting(made, place, node=node)
        return found

    def _base(
        self, name: str, node: Section, methods: Mapping[str, Setting], problems: Problems
    ) -> Prepared:
        """Return the parts of a base's run: of each method, a merge of each number of experts."""
        place, node = ("bases", name), plain(node)
        parts = node if isinstance(node, Mapping) else {}
        modelpool, taskpool = (
            own if isinstance(own := parts.get(part), Mapping) else None
            for part in ("modelpool", "taskpool")
        )
        if taskpool is None:
            problems.append(Problem((*place, "taskpool"), "missing; give it as a config node."))
        spec = FusionSpec(
            method=None,
            modelpool=modelpool,
            taskpool=taskpool,
            seed=self.seed,
            allow_test_split=self.allow_test_split,
            dry_run=self.dry_run,
            places=Places(modelpool=(*place, "modelpool"), taskpool=(*place, "taskpool")),
        )
        paths = OutputPaths(spec.config, self.output_dir, overwrite=False)
        run = Prepared(spec, SharedObjects(), paths, Problems())
        prepare_pools(run)
        if run.modelpool is not None and run.taskpool is not None:
            self._check_base(name, run.modelpool, run.taskpool, run.problems)
        if run.modelpool is not None:
            experts = run.modelpool.model_names
            counts = [count for count in self.counts if 1 <= count <= len(experts)]
            chosen = [choices(len(experts), count, 1, self.seed)[0] for count in counts]
            run.settings = [
                replace(setting, models=[experts[index] for index in indices])
                for setting in methods.values()
                for indices in chosen
            ]
        return run

    def _check_base(
        self, name: str, modelpool: PlacedModelPool, taskpool: TaskPool, problems: Problems
    ) -> None:
        """Check that the base's experts, the tasks and the counts belong together."""
        place, experts = (*modelpool.place, "models"), modelpool.model_names
        tasks = {canonical_name(task): task for task in taskpool.task_names}
        if not modelpool.has_pretrained:
            problems.append(Problem(place, "add '_pretrained_', the base."))
        for expert in experts:
            if canonical_name(expert) not in tasks:
                reason = "the task pool has no task with this name."
                hint = did_you_mean(expert, tasks.values())
                problems.append(Problem((*place, expert), reason, hint))
        for count in self.counts:
            if not 1 <= count <= len(experts):
                reason = (
                    f"{count} is not a number from 1 to {len(experts)}, the experts of '{name}'."
                )
                problems.append(Problem(("counts",), reason))
        for category, members in self.categories.items():
            for task in members:
                if task not in taskpool.task_names:
                    reason = f"'{name}' has no task '{task}'."
                    hint = did_you_mean(task, taskpool.task_names)
                    problems.append(Problem(("categories", category), reason, hint))


@dataclass(frozen=True)
class _Work:
    """A study with all that it merges and evaluates."""

    study: ScalingStudy
    fabric: Fabric
    methods: Mapping[str, Setting]
    sources: "Mapping[str, _Source]"

    def merge_and_evaluate(self, fabric: Fabric) -> Study:
        """Do the work; called in every process, with the same result in each."""
        quiet_libraries()
        start = time.perf_counter()
        jobs = list(self._jobs())
        log.info("Merges: %d", len(jobs))
        merges = []
        with step("Study", self._num_samples(jobs, fabric), SAMPLES, shown=fabric.global_rank == 0):
            evaluated = {name: self._evaluated(base, fabric) for name, base in self.sources.items()}
            for number, job in enumerate(jobs, start=1):
                with step(f"merge {number} of {len(jobs)}"):
                    merges.append(self._merge(*job, fabric))
        total = round(time.perf_counter() - start, 3)
        seconds = Seconds(load=0, fuse=0, evaluate=0, total=total)
        study = Study(
            run=describe_run(fabric, self.study.config, self.study.seed, seconds, {}),
            held_in=self.study.held_in,
            held_out=self.study.held_out,
            categories=self.study.categories,
            metrics={
                task: metric_info(source.taskpool.describe(task).main)
                for source in self.sources.values()
                for task in source.taskpool.task_names
            },
            bases=evaluated,
            merges=merges,
        )
        study.summarise()
        return study

    def _num_samples(
        self, jobs: Sequence[tuple[str, str, int, int, list[str]]], fabric: Fabric
    ) -> int | None:
        """Return how many samples are evaluated, with all models together."""
        counts = []
        for base, source in self.sources.items():
            with within(*source.places.taskpool, keyed_only=True):
                source.taskpool.prepare(fabric)
            evaluator = source.evaluator(source.experts, fabric, "own_task")
            merges = sum(job[0] == base for job in jobs)
            tasks = evaluator.baseline_tasks() + merges * evaluator.task_names
            counts.append(evaluator.num_samples(tasks))
        return None if None in counts else sum(filter(None, counts))

    def _evaluated(self, base: "_Source", fabric: Fabric) -> Base:
        """Evaluate a base and its experts, once for all merges."""
        evaluator = base.evaluator(base.experts, fabric, "own_task")
        evaluator.evaluate_baselines()
        pretrained = evaluator.models["_pretrained_"]
        experts = [evaluator.models[model].tasks for model in base.experts]
        return Base(
            num_parameters=pretrained.num_parameters,
            pretrained=pretrained.tasks,
            experts={task: result for tasks in experts for task, result in tasks.items()},
        )

    def _jobs(self) -> Iterator[tuple[str, str, int, int, list[str]]]:
        """Yield base, method, count, number of the subset and experts of each merge."""
        study = self.study
        for base, source in self.sources.items():
            for count in study.counts:
                chosen = choices(len(source.experts), count, study.subsets, study.seed)
                for subset, indices in enumerate(chosen):
                    for method in self.methods:
                        yield base, method, count, subset, [source.experts[i] for i in indices]

    def _merge(
        self, base: str, method: str, count: int, subset: int, models: list[str], fabric: Fabric
    ) -> Merge:
        source, setting, seed = self.sources[base], self.methods[method], self.study.seed
        made = as_method(instantiate(setting.node, "method"))
        evaluator = source.evaluator(models, fabric, "none")
        pool, taskpool = evaluator.modelpool, source.taskpool
        places = replace(source.places, method=setting.place)
        allowed = self.study.allow_test_split
        data = tuning_data(made, pool, taskpool, fabric, allowed, places)
        learned = describe_tuning(made, taskpool, data)
        path = _cached(pool, taskpool, setting.node, learned, fabric, seed)
        merge = _known(path, fabric)
        if merge is not None:
            with step("", evaluator.num_samples(evaluator.task_names), SAMPLES) as work:
                work.skip(work.total or 0)
        else:
            fabric.seed_everything(seed, verbose=False)
            with setting.located(keyed_only=True):
                fused = materialize(fuse(made, pool, fabric, data))
            if list(fused) != [MERGED]:
                raise FusionBenchError(
                    f"{method} returns several models, {', '.join(fused)}, and none is for all "
                    "tasks.",
                    "Remove the method.",
                    place=setting.place,
                )
            evaluator.evaluate_merged(fused)
            merge = Merge(
                base=base,
                method=method,
                count=count,
                subset=subset,
                models=models,
                tasks=evaluator.models[MERGED].tasks,
            )
            if path is not None and fabric.global_rank == 0:
                with suppress(OSError):  # it is only to save time
                    write_text(path, merge.model_dump_json())
        return merge.model_copy(update={"base": base, "method": method, "subset": subset})


@dataclass(frozen=True)
class _Source:
    """A base of the config: the node of its model pool, its experts and its tasks."""

    node: Mapping[str, object]
    experts: list[str]
    taskpool: TaskPool
    places: Places

    @classmethod
    def of(cls, run: Prepared) -> "_Source":
        """Return the base of a prepared run without problems."""
        assert run.modelpool is not None and run.taskpool is not None
        node = run.spec.modelpool
        assert isinstance(node, Mapping)
        return cls(node, run.modelpool.model_names, run.taskpool, run.spec.places)

    def evaluator(self, experts: Sequence[str], fabric: Fabric, baselines: Baselines) -> Evaluator:
        """Return what evaluates a pool of some experts, with their data."""
        own = {canonical_name(expert) for expert in experts}
        node = {**self.node, "_recursive_": False}
        for key, value in self.node.items():
            if key == "models" and isinstance(value, Mapping):
                node[key] = {k: v for k, v in value.items() if is_special(k) or k in experts}
            elif key.endswith("_datasets") and isinstance(value, Mapping):
                node[key] = {k: v for k, v in value.items() if canonical_name(k) in own}
        with within(*self.places.modelpool):
            pool = placed(instantiate(node, "modelpool"), self.places.modelpool)
        return Evaluator(pool, self.taskpool, fabric, baselines, place=self.places.taskpool)


def choices(total: int, count: int, subsets: int, seed: int) -> list[tuple[int, ...]]:
    """Draw different sets of ``count`` numbers below ``total``, or all of them."""
    random = np.random.default_rng([seed, count])
    wanted = min(subsets, comb(total, count))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < wanted:
        drawn = random.choice(total, count, replace=False)
        found[tuple(sorted(int(number) for number in drawn))] = None
    return list(found)


def _method(method: Section, seed: int) -> tuple[str, dict[str, object]]:
    """Return a method's name and node."""
    if isinstance(method, str):
        name = full_name("method", method)
        return method, composed(f"method={name}", f"seed={seed}")["method"]
    if not isinstance(method, Mapping) or "_target_" not in method:
        raise FusionBenchError(f"'{method}' is neither a config's name nor a config node.")
    node = seeded(method, seed)
    assert isinstance(node, Mapping)
    return str(method["_target_"]).rpartition(".")[2], dict(node)


def _cached(
    pool: PlacedModelPool,
    taskpool: TaskPool,
    node: Mapping[str, object],
    learned: Tuning | None,
    fabric: Fabric,
    seed: int,
) -> Path | None:
    """Return the cache path of a merge's result, if any; its name is a hash of the inputs."""
    tasks = {task: taskpool.identity(task, fabric) for task in taskpool.task_names}
    if None in tasks.values():
        return None
    facts = {
        "version": __version__,
        "models": identities(pool),
        "policy": str(pool.policy),
        "architecture": pool.architecture(),
        "method": node,
        **({"code": code} if (code := users_code(node)) else {}),
        "learned": None if learned is None else learned.model_dump(),
        "tasks": tasks,
        "seed": seed,
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return cache_dir() / "merges" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _known(path: Path | None, fabric: Fabric) -> Merge | None:
    """Return the first process's cached result to all processes."""
    found = None
    if path is not None and fabric.global_rank == 0:
        with suppress(OSError, ValidationError):
            found = Merge.model_validate_json(path.read_text(encoding="utf-8"))
    return fabric.broadcast(found) if fabric.world_size > 1 else found
