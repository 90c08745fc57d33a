"""Creates the objects of a run, or collects the problems."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from lightning.fabric import Fabric

from fusion_bench.instantiate import SharedObjects, check_part, instantiate
from fusion_bench.method.plain import as_method
from fusion_bench.problems import (
    ConfigError,
    Place,
    Problem,
    Problems,
    check_between,
    check_choice,
)
from fusion_bench.programs.environment import make_fabric
from fusion_bench.programs.fusing import seeded
from fusion_bench.programs.output_paths import OutputPaths
from fusion_bench.programs.pools import (
    PlacedModelPool,
    ReadsTexts,
    TaskPool,
    as_taskpool,
    placed,
)
from fusion_bench.programs.previous import Previous
from fusion_bench.programs.search import OptionSearch, as_search
from fusion_bench.programs.setting import Setting
from fusion_bench.programs.spec import Baselines, FusionSpec, Section, plain
from fusion_bench.programs.tracking import Tracker
from fusion_bench.progress import quiet_libraries

P = TypeVar("P")

_LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclass
class Prepared:
    """The objects of a run; ``None`` for those with a problem.

    Attributes:
        spec: the config of the run.
        shared: objects that are shared between runs of this process.
        paths: the output paths.
        problems: the problems, with full config keys.
        settings: the method, or each that a search or a study tries.
        previous: the earlier report of the same run.
        tracker: where the figures go.
    """

    spec: FusionSpec
    shared: SharedObjects
    paths: OutputPaths
    problems: Problems
    search: OptionSearch | None = None
    settings: list[Setting] = field(default_factory=list)
    modelpool: PlacedModelPool | None = None
    taskpool: TaskPool | None = None
    fabric: Fabric | None = None
    previous: Previous | None = None
    tracker: Tracker = field(default_factory=lambda: Tracker(()))


def prepare(spec: FusionSpec, shared: SharedObjects, known: Sequence[Problem] = ()) -> Prepared:
    """Create the objects of a run, without large downloads or reads.

    Args:
        spec: the config.
        shared: objects that are shared between runs of this process.
        known: known problems.
    """
    if spec.taskpool is not None:  # a merge alone imports neither transformers nor datasets
        quiet_libraries()
    paths = OutputPaths(spec.config, spec.output_dir, spec.overwrite)
    made = Prepared(spec, shared, paths, Problems(known))
    collect = made.problems.collect
    with collect():
        check_choice("baselines", spec.baselines, Baselines)
    with collect():
        _check_seed(spec.seed)
    with collect("search"):
        check_part(spec.search, "search")
        made.search = as_search(instantiate(_lazily(spec.search), "search"))
    with collect(*spec.places.method):
        check_part(spec.method, "method")
        if made.search is None and spec.method is not None:
            method = as_method(instantiate(seeded(spec.method, spec.seed), "method"))
            made.settings = [Setting(method, spec.places.method)]
    with collect():
        if made.search is None and spec.method is None:
            _check_evaluation(spec)
    with collect():
        if made.search is not None:
            made.settings = made.search.settings(plain(seeded(spec.method, spec.seed)))
    prepare_pools(made)
    with collect("search"):
        if spec.search is not None and spec.taskpool is None:
            raise ConfigError("needs a task pool to evaluate the settings on.")
    with collect():
        paths.put_report(spec.report_save_path)
    with collect():
        paths.put_model(spec.merged_model_save_path)
    made.previous = Previous.find(paths.reports, spec.config)
    for check in (paths.check_reports, paths.check_model):
        with collect():
            check(done=made.previous is not None)
    with collect():
        made.fabric = make_fabric(spec.fabric)
    with collect():
        made.tracker = Tracker.of(spec.fabric, spec.output_dir, spec.overwrite)
        if made.previous is None:
            made.tracker.check()
    _tell_once(made.problems)
    return made


def prepare_pools(made: Prepared) -> None:
    """Create the pools of a run."""
    spec, collect = made.spec, made.problems.collect
    modelpool, taskpool = spec.places.modelpool, spec.places.taskpool
    with collect(*modelpool):
        if spec.modelpool is None:
            raise ConfigError("missing; give it as a config node.")
        seen = partial(placed, place=modelpool)
        made.modelpool = _shared(spec.modelpool, "modelpool", modelpool, seen, made.shared)
    with collect(*taskpool):
        if spec.taskpool is not None:
            made.taskpool = _shared(spec.taskpool, "taskpool", taskpool, as_taskpool, made.shared)
            if spec.output_dir is None and made.taskpool.save_predictions:
                raise ConfigError("needs an output_dir.", place=("save_predictions",))
            if made.modelpool is not None and isinstance(made.taskpool, ReadsTexts):
                made.taskpool = made.taskpool.with_tokenizer(made.modelpool.tokenizer)


def _check_evaluation(spec: FusionSpec) -> None:
    """Refuse a run that neither merges nor evaluates, and one that saves what it does not make."""
    if spec.taskpool is None or spec.baselines == "none":
        raise ConfigError(
            "null, so that nothing is merged; and no model is evaluated either.",
            "Name a method, or evaluate the models: with a task pool and "
            "{above}baselines=all_tasks.",
            place=spec.places.method,
        )
    if spec.merged_model_save_path is not None:
        raise ConfigError(
            "without a method there is no merged model.",
            "Remove it.",
            place=("merged_model_save_path",),
        )


def _check_seed(seed: object) -> None:
    if seed is None:
        return
    if not isinstance(seed, int):
        raise ConfigError(f"'{seed}' is not a whole number.", place=("seed",))
    check_between("seed", seed, 0, _LARGEST_SEED)


def _shared(
    section: Section,
    name: str,
    place: Place,
    seen: Callable[[object], P],
    shared: SharedObjects,
) -> P:
    """Return a pool, created once for the same config at the same place."""
    check_part(section, name)
    node = plain(section)
    if not isinstance(node, Mapping):
        return seen(section)
    return shared.get([*place, node], lambda: seen(instantiate(_lazily(node), name)))


def _lazily(section: Section) -> Section:
    # A pool's datasets and models are made when their turn comes, also where the YAML forgets
    # to say so.
    return {"_recursive_": False, **section} if isinstance(section, Mapping) else section


def _tell_once(problems: Problems) -> None:
    """Drop the problem of a seed that a method has from the program, which has it too."""
    told = {problem.reason for problem in problems if problem.place == ("seed",)}
    problems[:] = [
        problem
        for problem in problems
        if problem.place == ("seed",)
        or problem.place[-1:] != ("seed",)
        or problem.reason not in told
    ]
