"""Fuse, then evaluate: the main program."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from urllib.parse import quote

from lightning.fabric import Fabric
from omegaconf import OmegaConf
from torch import nn

from fusion_bench.instantiate import SharedObjects, check_part, instantiate
from fusion_bench.plan import Plan
from fusion_bench.problems import (
    ConfigError,
    EnvironmentProblem,
    Problem,
    Problems,
    check_between,
    check_choice,
    within,
)
from fusion_bench.programs.environment import describe_run, launch, make_fabric, plain_failures
from fusion_bench.programs.evaluating import Baselines, Evaluator
from fusion_bench.programs.fusing import (
    MERGED,
    TuningData,
    describe_tuning,
    fuse,
    materialize,
    seeded,
    tuning_data,
)
from fusion_bench.programs.output_paths import OutputPaths
from fusion_bench.programs.preflight import announce, preflight, show
from fusion_bench.programs.previous import Previous, identities, known_similarity
from fusion_bench.programs.publish import publish
from fusion_bench.programs.search import Setting
from fusion_bench.progress import quiet_libraries
from fusion_bench.report import Answers, Report, Search, Seconds, compare_contenders
from fusion_bench.report.table import wide_console
from fusion_bench.storage import whole_directory
from fusion_bench.weights import Weights

if TYPE_CHECKING:
    from fusion_bench.taskpool import TuningImages

log = logging.getLogger(__name__)

_LARGEST_SEED = 2**32 - 1  # NumPy's


@runtime_checkable
class Savable(Protocol):
    """A module that is no plain checkpoint, and writes itself."""

    def save(self, directory: Path, modelpool: Any, config: Mapping[str, Any]) -> None:
        """Write the directory, whole or not at all."""


class FabricModelFusionProgram:
    """Fuses a model pool with a method and evaluates the result beside the models it came from.

    Args:
        method: the fusion method, as config node or object; so are the next four.
        modelpool: the models.
        taskpool: the tasks; without it nothing is evaluated.
        fabric: ``lightning.Fabric``'s arguments; by default one process on the best device.
        search: finds the method's options first, such as ``GridSearch``; the method must be a node.
        output_dir: where the report and the config go; ``None`` writes none.
        seed: seeds every random number generator.
        baselines: what is evaluated beside the merged model: the pretrained model on every task and
            each individual model on its ``own_task``, on ``all_tasks``, or ``none`` of them.
        report_save_path: one more place for the report's JSON; ``{log_dir}`` in it is
            ``output_dir``.
        merged_model_save_path: directory for the merged model; likewise.
        overwrite: replace what another run left at these two paths, or in ``output_dir``.
        allow_test_split: let the method learn from data that the models are evaluated on.
        similarity: measure how the task vectors lie to each other, which reads the weights once.
        fast_dev_run: evaluate only the first batch of each task.
        dry_run: print the plan and all problems, and stop before anything is loaded.
        parts: what other runs of this process have made, for those that follow.
        problems: what is known to be wrong with the config, to be said with the rest.

    Raises:
        ConfigError: with all that is wrong in any of them, and in what they name.
    """

    #: What is wrong with the sections is said here, for all of them at once.
    tells_all_problems = True

    def __init__(
        self,
        method: Any,
        modelpool: Any,
        taskpool: Any = None,
        fabric: Any = None,
        search: Any = None,
        output_dir: str | Path | None = None,
        seed: int | None = None,
        baselines: Baselines = "own_task",
        report_save_path: str | None = None,
        merged_model_save_path: str | None = None,
        overwrite: bool = False,
        allow_test_split: bool = False,
        similarity: bool = True,
        fast_dev_run: bool = False,
        dry_run: bool = False,
        parts: SharedObjects | None = None,
        problems: Sequence[Problem] = (),
    ):
        self.config: dict[str, Any] = {
            "_target_": f"fusion_bench.programs.{type(self).__name__}",
            "_recursive_": False,
            "method": _plain(method),
            "modelpool": _plain(modelpool),
            "taskpool": _plain(taskpool),
            "fabric": _plain(fabric),
            "search": _plain(search),
            "seed": seed,
            "baselines": baselines,
            "report_save_path": report_save_path,
            "merged_model_save_path": merged_model_save_path,
            "overwrite": overwrite,
            "allow_test_split": allow_test_split,
            "similarity": similarity,
            "fast_dev_run": fast_dev_run,
            "dry_run": dry_run,
        }
        # In a dry run a pool keeps what it fetches in a place of its own.
        self._shared = SharedObjects() if parts is None or dry_run else parts
        self.fabric_config = fabric
        self.output_dir = None if output_dir is None else Path(output_dir).absolute()
        self.seed = seed
        self.baselines = baselines
        self.allow_test_split = allow_test_split
        self.fast_dev_run = fast_dev_run
        self.dry_run = dry_run
        self.similarity = similarity
        self.search: Any = None
        self.method: Any = None
        self.modelpool: Any = None
        self.taskpool: Any = None
        self.settings: list[Setting] = []
        self._notes: list[str] = []
        plan = Plan(problems=Problems(problems))
        with plan.collect():
            check_choice("baselines", baselines, Baselines)
        with plan.collect():
            if seed is not None and not isinstance(seed, int):
                raise ConfigError(f"'{seed}' is not a whole number.", place=("seed",))
            if seed is not None:
                check_between("seed", seed, 0, _LARGEST_SEED)
        with plan.collect("search"):
            check_part(search, "search")
            self.search = instantiate(_lazily(search), "search")
        with plan.collect("method"):
            check_part(method, "method")
            if self.search is None:
                self.method = instantiate(seeded(method, seed), "method")
        with plan.collect():
            if self.search is not None:
                self.settings = self.search.settings(_plain(seeded(method, seed)))
                self.method = self.settings[0].method
        with plan.collect("modelpool"):
            self.modelpool = self._pool(modelpool, "modelpool")
        with plan.collect("taskpool"):
            self.taskpool = self._pool(taskpool, "taskpool")
            if search is not None and taskpool is None:
                raise ConfigError("search: needs a task pool to evaluate the settings on.")
            if output_dir is None and getattr(self.taskpool, "save_predictions", False):
                raise ConfigError("taskpool.save_predictions: needs an output_dir.")
        self.output_paths = OutputPaths(self.config, self.output_dir, overwrite)
        with plan.collect("report_save_path"):
            self.output_paths.put_report(report_save_path)
        with plan.collect("merged_model_save_path"):
            self.output_paths.put_model(merged_model_save_path)
        self._previous = Previous.find(self.output_paths.reports, self.config)
        for check in (self.output_paths.check_reports, self.output_paths.check_model):
            with plan.collect():
                check(done=self._previous is not None)
        if plan.problems:
            self._look_ahead(plan)

    def _pool(self, node: Any, section: str) -> Any:
        check_part(node, section)
        plain = _plain(node)
        if not isinstance(plain, Mapping):
            return node
        return self._shared.get([section, plain], lambda: instantiate(_lazily(plain), section))

    def run(self) -> Report | None:
        """Fuse, evaluate, save and print; returns the report, or ``None`` after a dry run."""
        plan = Plan()
        fabric = self._look_ahead(plan)
        if self.dry_run:
            log.info("Dry run: the config is sound; nothing was loaded.")
            return None
        self._quiet_libraries()
        self._notes = plan.notes
        for note in plan.notes:
            log.warning("%s", note)
        log.info(
            "Fusing %s with %s", ", ".join(self.modelpool.model_names), type(self.method).__name__
        )
        with self.output_paths.claimed():
            report, answers = launch(fabric, self._fuse_and_evaluate)
            # Where processes were started by us, this one is their parent.
            if fabric.global_rank == 0:
                with plain_failures():
                    publish(report, answers, self.output_dir, self.output_paths.report_path)
                self.output_paths.finished()
                if self.output_paths.model_path is not None:
                    log.info("Merged model: %s", self.output_paths.model_path)
                elif not report.tasks and report.run.search is None:
                    log.warning(
                        "The merged model was neither evaluated nor saved; give a task pool or %s.",
                        "merged_model_save_path",
                    )
        return report

    def _look_ahead(self, plan: Plan) -> Fabric:
        """Find all that would stop the run, before it begins; returns what it runs on.

        Raises:
            ConfigError: with every problem that there is.
        """
        self._quiet_libraries()
        fabric = None
        with plan.collect():
            fabric = make_fabric(self.fabric_config)
        with plan.collect():
            self.output_paths.check_unclaimed()
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes one is enough
            with TemporaryDirectory() if self.dry_run else nullcontext() as scratch:
                preflight(plan, self, fabric, None if scratch is None else Path(scratch))
            if self.dry_run:
                show(plan, wide_console())
        plan.problems.raise_all()
        announce(plan)
        assert fabric is not None
        return fabric

    def _fuse_and_evaluate(self, fabric: Fabric) -> tuple[Report, Answers]:
        """Do the work; called in every process, with the same result in each."""
        self._quiet_libraries()  # again, for a process that was spawned
        self._seed_everything(fabric)
        clock = _Clock()
        evaluator = self._evaluate(fabric)
        with clock.measure("load"):
            if self.taskpool is not None:
                self.taskpool.prepare(fabric)
            inputs = identities(self.modelpool)
            searched = None
            if self.search is not None:
                searched = self.search.data(
                    self.modelpool, self.taskpool, fabric, self.allow_test_split
                )
            data = self._data(self.method, fabric)
            if (done := self._done_before(inputs, data, searched, fabric)) is not None:
                return done
        self._seed_everything(fabric)  # again: what was loaded before need not have been loaded now
        method, search = self.method, None
        if self.search is not None and searched is not None:
            with clock.measure("search"):
                search = self._search(searched, fabric)
            method = self.settings[search.winner].method
            data = self._data(method, fabric)
        evaluated = search is None or search.judge_test
        with clock.measure("fuse"):
            wanted = evaluated or self.output_paths.model_path is not None
            merged = self._fuse(fabric, method, data, search) if wanted else {}
        with clock.measure("evaluate"):
            if evaluated:
                evaluator.take(self._evaluated_baselines(fabric, inputs))
                evaluator.evaluate_merged(merged)
                evaluator.summarise()
        similarity = None
        if self.similarity and fabric.global_rank == 0:
            similarity = known_similarity(self.modelpool, inputs)
        seconds = Seconds(**clock.seconds, total=clock.total())
        report = Report(
            run=describe_run(
                fabric,
                self.config,
                self.seed,
                seconds,
                inputs,
                describe_tuning(method, self.taskpool, data),
                search,
                self._all_notes(),
            ),
            tasks=evaluator.task_infos(),
            models=evaluator.models,
            similarity=similarity,
        )
        report.comparisons = compare_contenders(report, evaluator.answers)
        return report, evaluator.answers

    def _all_notes(self) -> list[str]:
        """Return what the report is to say of the models and of how they were evaluated."""
        pools = (getattr(pool, "notes", ()) for pool in (self.modelpool, self.taskpool))
        return list(dict.fromkeys(note for notes in (self._notes, *pools) for note in notes))

    def _evaluate(self, fabric: Fabric) -> Evaluator:
        return Evaluator(
            self.modelpool,
            self.taskpool,
            fabric,
            self.baselines,
            self.fast_dev_run,
            self.output_dir,
        )

    def _evaluated_baselines(self, fabric: Fabric, inputs: Mapping[str, str]) -> Evaluator:
        """Return one that has evaluated the models to compare with, maybe in an earlier run."""

        def evaluated() -> Evaluator:
            evaluator = self._evaluate(fabric)
            evaluator.evaluate_baselines()
            return evaluator

        if getattr(self.taskpool, "save_predictions", False):  # they go into each run's directory
            return evaluated()
        pools = [id(self.modelpool), id(self.taskpool)]  # the same for the same config
        how = [str(fabric.strategy.precision.precision), str(fabric.device), fabric.world_size]
        about = ["baselines", pools, how, self.baselines, self.fast_dev_run, dict(inputs)]
        return self._shared.get(about, evaluated)

    def _seed_everything(self, fabric: Fabric) -> None:
        if self.seed is not None:
            fabric.seed_everything(self.seed, verbose=False)

    def _quiet_libraries(self) -> None:
        if self.taskpool is not None:  # a merge alone imports neither transformers nor datasets
            quiet_libraries()

    def _data(self, method: Any, fabric: Fabric) -> TuningData:
        return tuning_data(method, self.modelpool, self.taskpool, fabric, self.allow_test_split)

    def _search(self, data: "Mapping[str, TuningImages]", fabric: Fabric) -> Search:
        """Find the method's options; leaves the random numbers as they were at first."""
        found: Search = self.search.run(
            self.settings,
            data,
            self.modelpool,
            self.taskpool,
            fabric,
            baselines=self.baselines,
            allow_test_split=self.allow_test_split,
            seed=self.seed,
            fast_dev_run=self.fast_dev_run,
        )
        if self.seed is not None:
            fabric.seed_everything(self.seed, verbose=False)
        return found

    def _fuse(
        self, fabric: Fabric, method: Any, data: TuningData, search: Search | None
    ) -> dict[str, nn.Module | Weights]:
        """Return what the method makes, by name; saved, where a path is given.

        Merged weights are computed as they are written; they are held in memory only if they are
        to be evaluated or to be thrown away.
        """
        path = self.output_paths.model_path
        with within("method", keyed_only=True):
            merged = fuse(method, self.modelpool, fabric, data)
        if self.taskpool is not None or path is None:
            merged = materialize(merged)
        if path is None:
            return merged
        places = {
            name: path / quote(name.removeprefix(MERGED).lstrip("/"), safe="") for name in merged
        }
        config = self.config if search is None else {**self.config, "method": search.method}
        if fabric.global_rank == 0:
            self.output_paths.begin_model()
            with _whole(path, several=list(merged) != [MERGED]) as whole:
                for name, place in places.items():
                    self._save(merged[name], whole / place.relative_to(path), config)
        fabric.barrier()
        if self.taskpool is not None:
            return merged
        for name, place in places.items():
            if isinstance(merged[name], Weights):
                merged[name] = self.modelpool.open_saved(place)
        return merged

    def _save(self, model: nn.Module | Weights, place: Path, config: Mapping[str, Any]) -> None:
        try:
            if isinstance(model, Savable):
                model.save(place, self.modelpool, config)
            else:
                self.modelpool.save_model(model, place, config)
        except OSError as error:
            raise EnvironmentProblem(
                f"Cannot write it: {error}", place=("merged_model_save_path",)
            ) from error

    def _done_before(
        self,
        inputs: Mapping[str, str],
        data: TuningData,
        searched: TuningData,
        fabric: Fabric,
    ) -> tuple[Report, Answers] | None:
        """Return the result that this very run had left here, if nothing has changed since."""
        found = None
        path = self.output_paths.model_path
        model_is_there = path is None or path.exists()
        if self._previous is not None and model_is_there and fabric.global_rank == 0:
            found = self._previous.still_true(inputs, self.taskpool, data, searched)
        if fabric.world_size > 1:
            found = fabric.broadcast(found)
        if found is None:
            self.output_paths.check_reports()
            self.output_paths.check_model()
            return None
        log.info("This run was done before; its report stands.")
        return found


class _Clock:
    """Measures named steps."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 3)

    def total(self) -> float:
        return round(time.perf_counter() - self._start, 3)


@contextmanager
def _whole(directory: Path, *, several: bool) -> Iterator[Path]:
    """Yield where models go: several together take the place of what was in the directory."""
    if not several:
        yield directory  # a model alone sees to that itself
        return
    with whole_directory(directory) as place:
        yield place


def _lazily(section: Any) -> Any:
    # A pool's datasets and models are made when their turn comes, also where the YAML forgets
    # to say so.
    return {"_recursive_": False, **section} if isinstance(section, Mapping) else section


def _plain(section: Any) -> Any:
    if OmegaConf.is_config(section):
        return OmegaConf.to_container(section, resolve=True)
    if section is None or isinstance(section, Mapping):
        return section
    return f"{type(section).__module__}.{type(section).__qualname__}"
