"""Executes a prepared run: loads, merges, evaluates and reports."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import quote

from lightning.fabric import Fabric
from torch import nn

from fusion_bench.instantiate import SharedObjects
from fusion_bench.method.contract import Product, Saving
from fusion_bench.method.plain import class_name
from fusion_bench.plan import Plan
from fusion_bench.problems import EnvironmentProblem, within
from fusion_bench.programs.clock import Clock
from fusion_bench.programs.environment import describe_run, launch, plain_failures
from fusion_bench.programs.evaluating import Evaluator
from fusion_bench.programs.fusing import (
    MERGED,
    TuningData,
    counted,
    describe_tuning,
    fuse,
    materialize,
    tuning_data,
    weights_of,
    with_weights,
)
from fusion_bench.programs.output_paths import OutputPaths
from fusion_bench.programs.pools import ForeseesWork, PlacedModelPool, ReadsTexts, TaskPool
from fusion_bench.programs.prepare import Prepared
from fusion_bench.programs.previous import Previous, identities, known_similarity
from fusion_bench.programs.publish import publish
from fusion_bench.programs.search import OptionSearch
from fusion_bench.programs.setting import Setting
from fusion_bench.programs.sharing import add_results
from fusion_bench.programs.spec import FusionSpec
from fusion_bench.progress import SAMPLES, kept, quiet_libraries, step
from fusion_bench.report import Report, Scores, Search, Seconds, compare_contenders
from fusion_bench.report.changes import changed_samples
from fusion_bench.storage import whole_directory

log = logging.getLogger(__name__)


@runtime_checkable
class Savable(Protocol):
    """A module that writes itself, instead of a plain checkpoint."""

    def save(self, directory: Path, modelpool: Saving, config: Mapping[str, object]) -> None:
        """Write the directory atomically."""


def execute(prepared: Prepared, plan: Plan, *, prints: bool = True) -> Report:
    """Fuse, evaluate, save and print.

    Args:
        prepared: the objects of the run, all available.
        plan: the plan; its notes go into the report.
        prints: print the comparison.

    Raises:
        FusionBenchError: what shows only now: a damaged file, memory or a disk that is full.
    """
    run = _complete(prepared, plan)
    run.quiet()
    for note in run.notes:
        log.warning("%s", note)
    names = ", ".join(run.modelpool.model_names)
    if run.settings:
        log.info("Merging %s with %s", names, class_name(run.settings[0].method))
    else:
        log.info("Evaluating %s", names)
    with kept(run.what_is_kept), run.paths.claimed():
        report, scores = launch(run.fabric, run.fuse_and_evaluate)
        # Where processes were started by us, this one is their parent.
        if run.fabric.global_rank == 0:
            with plain_failures(), Clock().measure("report"):
                publish(report, scores, run.spec.output_dir, run.paths.report_path, prints)
                if run.paths.model_path is not None and report.tasks:
                    add_results(run.paths.model_path, report)
            run.paths.finished()
            prepared.tracker.track(report)
            if run.paths.model_path is not None:
                log.info("Merged model: %s", run.paths.model_path)
            elif not report.tasks and report.run.search is None:
                log.warning(
                    "The merged model was neither evaluated nor saved; set a task pool or %s.",
                    "merged_model_save_path",
                )
    return report


def fused_modules(prepared: Prepared, plan: Plan) -> dict[str, nn.Module]:
    """Fuse in this process and return the merged models by name; nothing is saved or evaluated.

    Args:
        prepared: the objects of the run, all available.
        plan: the plan.

    Raises:
        FusionBenchError: as ``execute``, and models without a config to make a module by.
    """
    run = _complete(prepared, plan)
    quiet_libraries()
    for note in run.notes:
        log.warning("%s", note)
    with plain_failures():
        return run.fuse_alone(run.fabric)


def _complete(prepared: Prepared, plan: Plan) -> "_Run":
    """Return the prepared objects as a complete run."""
    made = prepared
    assert made.modelpool is not None and made.fabric is not None
    return _Run(
        made.spec,
        made.shared,
        made.paths,
        made.modelpool,
        made.taskpool,
        made.search,
        made.settings,
        made.previous,
        made.fabric,
        plan.notes,
    )


@dataclass(frozen=True)
class _Run:
    """A run with all its objects; without ``settings`` nothing is merged."""

    spec: FusionSpec
    shared: SharedObjects
    paths: OutputPaths
    modelpool: PlacedModelPool
    taskpool: TaskPool | None
    search: OptionSearch | None
    settings: list[Setting]
    previous: Previous | None
    fabric: Fabric
    notes: list[str]

    def fuse_and_evaluate(self, fabric: Fabric) -> tuple[Report, Scores]:
        """Do the work; called in every process, with the same result in each."""
        self.quiet()  # again, for a process that was spawned
        self._seed_everything(fabric)
        clock = Clock(fabric.global_rank == 0)
        chosen = self.settings[0] if self.settings else None
        evaluator = self._evaluator(fabric)
        with clock.measure("load"):
            if self.taskpool is not None:
                with within(*self.spec.places.taskpool, keyed_only=True):
                    self.taskpool.prepare(fabric)
            inputs = identities(self.modelpool)
            searched = None
            if self.search is not None and self.taskpool is not None:
                searched = self.search.learned.data(
                    self.modelpool, self.taskpool, fabric, self.spec.allow_test_split
                )
            data = self._data(chosen, fabric)
        if (done := self._earlier_result(inputs, data, searched, fabric)) is not None:
            return done
        self._seed_everything(fabric)  # again: what was loaded before need not have been loaded now
        search = None
        if searched is not None:
            with clock.measure("search"):
                search, chosen = self._search(searched, fabric)
            data = self._data(chosen, fabric)
        evaluated = search is None or search.judge_test
        with clock.measure("fuse", says=chosen is not None):
            wanted = evaluated or self.paths.model_path is not None
            merged = self._fuse(fabric, chosen, data, search) if chosen and wanted else {}
        with clock.measure("evaluate", says=evaluated and self.taskpool is not None):
            if evaluated:
                self._evaluate(evaluator, merged, fabric, inputs)
            evaluator.describe_inputs(inputs)
            evaluator.summarise()
        similarity = None
        if self.spec.similarity and fabric.global_rank == 0:
            similarity = known_similarity(self.modelpool, inputs)
        report = Report(
            run=describe_run(
                fabric,
                self.spec.config,
                self.spec.seed,
                Seconds(**clock.seconds, total=clock.total()),
                inputs,
                None if chosen is None else describe_tuning(chosen.method, self.taskpool, data),
                search,
                self._all_notes(),
            ),
            tasks=evaluator.task_infos(),
            models=evaluator.models,
            similarity=similarity,
        )
        report.comparisons = compare_contenders(report, evaluator.scores)
        self._take_examples(report, evaluator.scores)
        return report, evaluator.scores

    def fuse_alone(self, fabric: Fabric) -> dict[str, nn.Module]:
        """Return the merged models by name, in eval mode."""
        self._seed_everything(fabric)
        chosen = self.settings[0]
        data = self._data(chosen, fabric)
        self._seed_everything(fabric)
        with chosen.located(keyed_only=True):
            merged = fuse(chosen.method, self.modelpool, fabric, data)
            return {
                name: model if isinstance(model, nn.Module) else self.modelpool.build_model(model)
                for name, model in merged.items()
            }

    def what_is_kept(self) -> str:
        """Return what is kept of the run while it is not done, and how to go on."""
        if isinstance(self.taskpool, ForeseesWork) and self.taskpool.keeps_results:
            return "What was evaluated is in the cache: the same command goes on from there."
        return "Nothing is half-written: the same command starts again."

    def _take_examples(self, report: Report, scores: Scores) -> None:
        """Add the texts of the samples that the page shows."""
        if not isinstance(self.taskpool, ReadsTexts):
            return
        for task, samples in changed_samples(report, scores).items():
            texts = self.taskpool.examples(task, samples)
            scores.examples[task] = dict(zip(samples, texts, strict=bool(texts)))

    def quiet(self) -> None:
        """Silence libraries; a pure merge imports none of them."""
        if self.taskpool is not None:
            quiet_libraries()

    def _all_notes(self) -> list[str]:
        """Return the report's notes on the models and their evaluation."""
        of_tasks = [] if self.taskpool is None else self.taskpool.notes
        return list(dict.fromkeys([*self.notes, *self.modelpool.notes, *of_tasks]))

    def _evaluator(self, fabric: Fabric) -> Evaluator:
        return Evaluator(
            self.modelpool,
            self.taskpool,
            fabric,
            self.spec.baselines,
            self.spec.fast_dev_run,
            self.spec.output_dir,
            self.spec.places.taskpool,
        )

    def _evaluate(
        self,
        evaluator: Evaluator,
        merged: Mapping[str, Product],
        fabric: Fabric,
        inputs: Mapping[str, str],
    ) -> None:
        """Evaluate the baselines and the merged models, whose samples are counted together."""
        beside = evaluator.num_samples(evaluator.baseline_tasks())
        own = evaluator.num_samples(t for name in merged for t in evaluator.merged_tasks(name))
        total = None if beside is None or own is None else beside + own
        with step("", total, SAMPLES) as work:
            evaluator.take(self._evaluated_baselines(fabric, inputs))
            work.skip((beside or 0) - work.done)  # another run of this process has evaluated them
            evaluator.evaluate_merged(merged)

    def _evaluated_baselines(self, fabric: Fabric, inputs: Mapping[str, str]) -> Evaluator:
        """Return an evaluator with the baselines' results, possibly from the cache."""

        def evaluated() -> Evaluator:
            evaluator = self._evaluator(fabric)
            evaluator.evaluate_baselines()
            return evaluator

        if self.taskpool is not None and self.taskpool.save_predictions:
            return evaluated()  # they go into each run's directory
        pools = [id(self.modelpool), id(self.taskpool)]  # the same for the same config
        how = [str(fabric.strategy.precision.precision), str(fabric.device), fabric.world_size]
        asked = [self.spec.baselines, self.spec.fast_dev_run]
        return self.shared.get(["baselines", pools, how, *asked, dict(inputs)], evaluated)

    def _seed_everything(self, fabric: Fabric) -> None:
        if self.spec.seed is not None:
            fabric.seed_everything(self.spec.seed, verbose=False)

    def _data(self, chosen: Setting | None, fabric: Fabric) -> TuningData:
        if chosen is None:
            return None
        allowed, places = self.spec.allow_test_split, self.spec.places
        return tuning_data(chosen.method, self.modelpool, self.taskpool, fabric, allowed, places)

    def _search(self, data: TuningData, fabric: Fabric) -> tuple[Search, Setting]:
        """Search the method's options; the random state is restored afterwards."""
        assert self.search is not None and self.taskpool is not None and data is not None
        found = self.search.run(
            self.settings, data, self.modelpool, self.taskpool, fabric, self.spec
        )
        self._seed_everything(fabric)
        return found

    def _fuse(
        self, fabric: Fabric, chosen: Setting, data: TuningData, search: Search | None
    ) -> dict[str, Product]:
        """Return the merged models by name, saved if a path is given.

        Merged weights are computed while they are written. They are kept in memory only if they are
        evaluated or not saved.
        """
        path = self.paths.model_path
        with chosen.located(keyed_only=True):
            merged = fuse(chosen.method, self.modelpool, fabric, data)
        if self.taskpool is not None or path is None:
            merged = materialize(merged)
        if path is None:
            return merged
        directories = {
            name: path / quote(name.removeprefix(MERGED).lstrip("/"), safe="") for name in merged
        }
        config = self.spec.config
        if search is not None:
            config = {**config, "method": search.method}
        if fabric.global_rank == 0:
            self.paths.begin_model()
            several = list(merged) != [MERGED]
            with counted(merged), _model_directory(path, several=several) as whole:
                for name, directory in directories.items():
                    self._save(merged[name], whole / directory.relative_to(path), config)
        fabric.barrier()
        if self.taskpool is not None:
            return merged
        for name, directory in directories.items():
            if weights_of(merged[name]) is not None:
                saved = self.modelpool.open_saved(directory)
                merged[name] = with_weights(merged[name], saved)
        return merged

    def _save(self, model: Product, place: Path, config: Mapping[str, object]) -> None:
        try:
            if isinstance(model, Savable):
                model.save(place, self.modelpool, config)
            else:
                self.modelpool.save_model(model, place, config)
        except OSError as error:
            raise EnvironmentProblem(
                f"Cannot write it: {error}", place=("merged_model_save_path",)
            ) from error

    def _earlier_result(
        self,
        inputs: Mapping[str, str],
        data: TuningData,
        searched: TuningData,
        fabric: Fabric,
    ) -> tuple[Report, Scores] | None:
        """Return the earlier result of the same run, if nothing has changed since."""
        found = None
        path = self.paths.model_path
        model_is_there = path is None or path.exists()
        if self.previous is not None and model_is_there and fabric.global_rank == 0:
            found = self.previous.still_true(inputs, self.taskpool, data, searched)
        if fabric.world_size > 1:
            found = fabric.broadcast(found)
        if found is None:
            self.paths.check_reports()
            self.paths.check_model()
            return None
        log.info("This run is already done; its report is unchanged.")
        return found


@contextmanager
def _model_directory(directory: Path, *, several: bool) -> Iterator[Path]:
    """Yield the directory for models; several models replace the old directory together."""
    if not several:
        yield directory  # a model alone sees to that itself
        return
    with whole_directory(directory) as place:
        yield place
