"""Makes the plan of a run and finds all problems, before any weight is loaded."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fusion_bench.method.base import TensorwiseAlgorithm, aligned
from fusion_bench.method.contract import Describing, FusionMethod, ModelPool, Outlining
from fusion_bench.method.data import own_data
from fusion_bench.method.family import Family
from fusion_bench.method.plain import class_name, refuse_without_pretrained
from fusion_bench.method.stack import refuse_other_widths
from fusion_bench.modelpool.sources import Sources
from fusion_bench.plan import Plan, Step
from fusion_bench.problems import ConfigError, Place, Problem, Problems
from fusion_bench.programs.fusing import LearnedSplit, without_taskpool
from fusion_bench.programs.outline import outlined
from fusion_bench.programs.owners import check_owners, owners, ownership_hint
from fusion_bench.programs.pools import PlacedModelPool
from fusion_bench.programs.prepare import Prepared
from fusion_bench.programs.setting import Setting
from fusion_bench.programs.spec import plain
from fusion_bench.programs.told_options import tell_filters, tell_options
from fusion_bench.recipes import translate
from fusion_bench.report.table import wide_console
from fusion_bench.repository import hub_cache
from fusion_bench.shown import visible
from fusion_bench.storage import is_first_process
from fusion_bench.tokenizer import TokenizerSource
from fusion_bench.weights import (
    Config,
    MergePolicy,
    Model,
    TensorWeights,
    Weights,
    predicted_peak,
)
from fusion_bench.weights.blueprint import Blueprint

log = logging.getLogger(__name__)

#: The memory of the program itself when it merges, with torch: what benchmarks/memory.py found.
_PROGRAM = 285_000_000
#: A download that people want to know of before it begins.
_LARGE = 1_000_000_000
_TAKES_ROOM = ("build", "download", "prepare", "write")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def preflight(*runs: Prepared, known: Sequence[Problem] = ()) -> Plan:
    """Find all problems of runs before the first begins; a dry run prints the plan.

    Args:
        runs: the runs, which are planned together.
        known: problems that are none of theirs.

    Raises:
        ConfigError: with every problem that there is.
    """
    plan, planned = Plan(problems=Problems(known)), dict[int, Plan]()
    first = is_first_process()  # of several, one is enough to look at everything
    dry_run = any(run.spec.dry_run for run in runs)
    with TemporaryDirectory() if dry_run else nullcontext() as scratch:
        for run in runs:
            plan.problems.add(run.problems)
            with plan.collect():
                run.paths.check_unclaimed()
            if first:
                plan.take(_seen(run, None if scratch is None else Path(scratch), planned))
    if first:
        _check_room(plan)
        if dry_run:
            show(plan, wide_console())
    plan.problems.raise_all()
    announce(plan)
    return plan


def _seen(run: Prepared, scratch: Path | None, planned: dict[int, Plan]) -> Plan:
    """Return the steps and problems of a run's parts.

    Args:
        run: the parts.
        scratch: a temporary directory for small downloads, in a dry run.
        planned: the plans of pools, some of which several runs share, by their ids.
    """
    plan = Plan(problems=Problems(run.problems))
    recipe = None if run.spec.recipe is None else translate(run.spec.recipe)
    if recipe is not None:
        plan.note(*recipe.notes)
    modelpool, taskpool, places = run.modelpool, run.taskpool, run.spec.places
    if modelpool is not None:
        if id(modelpool) not in planned:
            planned[id(modelpool)] = modelpool.plan(scratch, built=taskpool is not None)
        plan.take(planned[id(modelpool)], *places.modelpool)
        if recipe is not None and plan.weights.keys() >= set(modelpool.model_names):
            tell_filters(plan, recipe.filters, plan.weights.values())
    if taskpool is not None:
        if id(taskpool) not in planned:
            planned[id(taskpool)] = taskpool.plan(scratch)
        plan.take(planned[id(taskpool)], *places.taskpool)
    merges = bool(run.settings) or run.spec.method is not None
    if modelpool is not None and taskpool is not None and merges:
        names = modelpool.model_names
        with plan.collect(*places.taskpool):
            check_owners(taskpool, names)
            hint = ownership_hint(owners(taskpool, names), names)
            plan.note(*([] if hint is None else [hint]))
    _check_nodes(plan, run, scratch)
    options: list[Step] = []
    if modelpool is not None:
        options = _compare(plan, modelpool, run.settings)
        _outline(plan, modelpool, run.settings, told=run.taskpool is None or run.spec.dry_run)
        _compare_data(plan, run, modelpool, scratch)
    _add_steps(plan, run)
    for step in options:
        plan.add(step)
    _check_memory(plan, run)
    return plan


def announce(plan: Plan) -> None:
    """Log large downloads."""
    sizes = plan.downloads()
    if sum(size or 0 for size in sizes.values()) >= _LARGE:
        each = ", ".join(f"{name} ({_size(size)})" for name, size in sizes.items())
        log.info("Downloading %s: %s.", _total(sizes), each)


def show(plan: Plan, console: Console) -> None:
    """Print the plan."""
    table = Table(box=box.SIMPLE_HEAVY, pad_edge=False)
    for column in ("the plan", "what"):
        table.add_column(column)
    table.add_column("size", justify="right")
    table.add_column("where", overflow="fold")
    downloads = [Step("download", name, size) for name, size in plan.downloads().items()]
    begun = [step for step in plan.steps if step.verb == "build"]
    others = [step for step in plan.steps if step.verb not in ("build", "download")]
    for step in [*begun, *downloads, *others]:
        moved = step.verb in _TAKES_ROOM and step.nbytes is None and step.verb != "write"
        size = "unknown" if moved else "" if step.nbytes is None else decimal(step.nbytes)
        cells = (step.verb, step.what, size, str(step.place or ""))
        table.add_row(*(Text(visible(cell)) for cell in cells))
    for note in plan.notes:
        table.add_row("note", Text(visible(note)))
    console.print(table)


def _check_nodes(plan: Plan, prepared: Prepared, scratch: Path | None) -> None:
    """Check the nodes of a pool that could not be created."""
    spec = prepared.spec
    if prepared.modelpool is None:
        place = spec.places.modelpool
        with plan.collect(*place):
            sources = Sources(_mapping(plain(spec.modelpool), "models"), "AutoModel")
            sources.scratch = scratch
            for name in sources:
                with plan.collect(*place, "models", name):
                    sources[name].plan(plan)
    if prepared.taskpool is None:
        from fusion_bench.taskpool.datasets import describe

        for name, node in _mapping(plain(spec.taskpool), "test_datasets").items():
            place = (*spec.places.taskpool, "test_datasets", name)
            if not any(problem.place[: len(place)] == place for problem in plan.problems):
                with plan.collect(*place):
                    describe(node, scratch)


def _mapping(node: object, key: str) -> Mapping[str, object]:
    """Return what a node has under a key, if that is a mapping."""
    found = node.get(key) if isinstance(node, Mapping) else None
    return found if isinstance(found, Mapping) else {}


class _Headers:
    """Some models of a pool, as far as they are known.

    Args:
        pool: the pool.
        names: the models to merge.
        opened: their weights; of a model that is not among them nothing but the name is known.
        has_pretrained: whether there is a pretrained model.
    """

    def __init__(
        self,
        pool: PlacedModelPool,
        names: Sequence[str],
        opened: Mapping[str, Weights],
        has_pretrained: bool,
    ):
        self._pool = pool
        self._opened = opened
        self.model_names = names
        self.has_pretrained = has_pretrained

    @property
    def policy(self) -> MergePolicy:
        return self._pool.policy

    @property
    def vocabulary(self) -> int | None:
        return self._pool.vocabulary if self._opened else None

    @property
    def tokenizer(self) -> TokenizerSource:
        return self._pool.tokenizer

    def weights(self, name: str) -> Weights:
        return self._opened.get(name, TensorWeights({}))

    def load_model(self, name: str) -> nn.Module:
        return self._pool.load_model(name)

    def model(self, name: str) -> Model:
        config = self._pool.model(name).config if self._opened else None
        return Model(self.weights(name), config, "")

    def build_model(self, weights: Mapping[str, Tensor] | Model) -> nn.Module:
        return self._pool.build_model(weights)

    def as_built(self, weights: Weights) -> tuple[Weights, nn.Module]:
        return self._pool.as_built(weights)

    def blueprint(self, config: Config) -> Blueprint | None:
        return self._pool.blueprint(config)


def _compare(plan: Plan, modelpool: PlacedModelPool, settings: Sequence[Setting]) -> list[Step]:
    """Compare keys, shapes, types and tying by headers, and models with methods.

    Where not all models can be compared, methods are still asked about their number and names.

    Returns:
        What the methods' options are for which entries.
    """
    needed = [*(["_pretrained_"] if modelpool.has_pretrained else []), *modelpool.model_names]
    wanted = {s.method.needs.alike for s in settings if s.method.needs.weights}
    sound = {alike: _can_be_merged(plan, modelpool, needed, alike) for alike in sorted(wanted)}
    opened = plan.weights if all(name in plan.weights for name in needed) else {}
    told: dict[Place, list[Step]] = {}  # of several settings of a method those of the first
    for setting in settings:
        needs, based = setting.method.needs, modelpool.has_pretrained
        with plan.collect(), setting.located():
            refuse_without_pretrained(setting.method, modelpool)
        names = modelpool.model_names if setting.models is None else setting.models
        fits = not needs.weights or sound.get(needs.alike)
        known = opened if fits and (based or not needs.base) else {}
        # A method of the user's may look for an entry.
        unknown = suppress(LookupError) if known == {} else nullcontext()
        with plan.collect(), setting.located(), unknown:
            # That the pretrained model is missing is said already.
            pool = _Headers(modelpool, names, known, based or needs.base)
            setting.method.check_pool(pool)
            if known and setting.place not in told:
                told[setting.place] = tell_options(plan, setting.method, pool, setting.place)
    return [step for steps in told.values() for step in steps]


def _outline(
    plan: Plan, modelpool: PlacedModelPool, settings: Sequence[Setting], *, told: bool
) -> None:
    """Add what a merge takes, and if ``told`` what entries come from, where headers tell that."""
    if plan.problems or len(settings) != 1 or settings[0].models is not None:
        return
    method = settings[0].method
    names = [*(["_pretrained_"] if modelpool.has_pretrained else []), *modelpool.model_names]
    if not isinstance(method, Outlining) or not plan.weights.keys() >= set(names):
        return
    pool = _Headers(modelpool, modelpool.model_names, plan.weights, modelpool.has_pretrained)
    made = method.outline(pool)
    merged = made.weights if isinstance(made, Model) else made
    several = [m.method for m in method.members.values()] if isinstance(method, Family) else []
    plan.writes = nbytes_of(merged) * max(len(several), 1)
    plan.holds = _PROGRAM + max(_peak(own, pool, merged) for own in several or [method])
    if plan.holds > _LARGE:
        largest = max(merged, key=lambda key: merged.cost(key).peak_bytes)
        shape = " x ".join(map(str, merged.spec(largest).shape))
        plan.note(
            f"The merge takes much memory; its largest entry is '{largest}', {shape}. Methods that "
            "factorise matrices leave out those that match exclude_keys."
        )
    if not told:
        return
    outline = outlined(merged, {name: plan.weights[name] for name in names})
    plan.reads = outline.nbytes
    said = [method.described(pool)] if isinstance(method, Describing) else []
    plan.entries = [*said, *outline.lines]


def _peak(method: FusionMethod, pool: ModelPool, merged: Weights) -> int:
    """Return the bytes that a method takes at most to write what it merges."""
    if isinstance(method, TensorwiseAlgorithm):
        return method.predicted_peak(method.inputs(pool))
    return predicted_peak(merged)


def nbytes_of(weights: Weights) -> int:
    """Return the bytes that weights take in memory or in files; tied entries count once."""
    return sum(weights.spec(key).nbytes for key in weights if weights.tied_to(key) == key)


def _can_be_merged(
    plan: Plan, modelpool: PlacedModelPool, needed: Sequence[str], alike: bool
) -> bool:
    """Check whether the opened models can be merged; ``alike`` asks for the same layers too."""
    names = [name for name in modelpool.model_names if name in plan.weights]
    if not names or needed[0] not in plan.weights:
        return False
    before = len(plan.problems)
    opened: ModelPool = _Headers(modelpool, names, plan.weights, modelpool.has_pretrained)
    if alike:
        with plan.collect(*modelpool.place, "models"):
            plan.note(*aligned(opened).notes)
    else:
        with plan.collect(*modelpool.place, "models"):
            refuse_other_widths(opened)
        if len(plan.problems) > before:  # that their configs differ follows from it
            return False
    with plan.collect(*modelpool.place, "models"):
        plan.note(*modelpool.compare(list(plan.weights), layers=alike))
    return len(plan.problems) == before


def _compare_data(
    plan: Plan, run: Prepared, modelpool: PlacedModelPool, scratch: Path | None
) -> None:
    """Check the datasets for learning and for a search."""
    uses: dict[LearnedSplit, list[FusionMethod]] = {}
    for setting in run.settings:
        method = setting.method
        if method.needs.split is not None:
            places = replace(run.spec.places, method=setting.place)
            uses.setdefault(LearnedSplit.of(method, places), []).append(method)
            if run.spec.taskpool is None:
                plan.problems.add(without_taskpool(method, places).problems)
    if run.search is not None:
        uses[run.search.learned] = []
    if run.taskpool is None:
        return
    for learned, methods in uses.items():
        with plan.collect():
            datasets, place = learned.named(modelpool, run.taskpool)
            if any(method.needs.own_data for method in methods):
                with plan.collect(*place):
                    own_data(modelpool.model_names, datasets)
            tuning = run.taskpool.plan_tuning(datasets, place, scratch)
            plan.take(tuning, *run.spec.places.taskpool)
            for name, node in datasets.items():
                if _is_test_split(node) and not run.spec.allow_test_split:
                    with plan.collect():
                        raise learned.refusal((*place, name))


def _is_test_split(node: object) -> bool:
    from fusion_bench.taskpool.images.tuning import is_test_split

    split = node.get("split") if isinstance(node, Mapping) else None
    return isinstance(split, str) and is_test_split(split)


def _add_steps(plan: Plan, prepared: Prepared) -> None:
    modelpool, taskpool, settings = prepared.modelpool, prepared.taskpool, prepared.settings
    if plan.weights:
        total = plan.reads if taskpool is None else None  # which evaluates whole models
        if total is None:
            total = sum(sum(w.spec(key).nbytes for key in w) for w in plan.weights.values())
        plan.add(Step("read", f"{_count(len(plan.weights), 'model')}", total))
    for line in plan.entries:
        plan.add(Step("merge", line))
    if modelpool is not None and settings:
        merged = (modelpool.model_names if s.models is None else s.models for s in settings)
        *sizes, largest = dict.fromkeys(map(len, merged))
        names = dict.fromkeys(class_name(setting.method) for setting in settings)
        what = f"{', '.join(names)} of {''.join(f'{size}, ' for size in sizes)}"
        what += _count(largest, "model")
        if prepared.search is not None:
            what += f", with {prepared.search.planned(len(settings))}"
        device = "" if prepared.fabric is None else f", on {prepared.fabric.device}"
        plan.add(Step("compute", f"{what}{device}"))
        if plan.holds is not None and taskpool is None and prepared.paths.model_path is not None:
            plan.add(Step("hold", "memory at most, the program's own among it", plan.holds))
        elif (whole := _merged_bytes(plan, modelpool)) is not None and not plan.problems:
            what = "a merged model to evaluate" if taskpool is not None else "the merged model"
            plan.add(Step("hold", f"memory at least: {what}, and the program", _PROGRAM + whole))
    if taskpool is not None:
        evaluated = "the merged model" if settings else "the models"
        if settings and prepared.spec.baselines != "none":
            evaluated += " and its inputs"
        plan.add(Step("evaluate", f"{evaluated}, on {_count(len(taskpool.task_names), 'task')}"))
    if (path := prepared.paths.model_path) is not None:
        size = None if modelpool is None else _merged_bytes(plan, modelpool)
        plan.add(Step("write", "the merged model", size, path, "merged_model_save_path"))
    for logger in prepared.tracker.loggers:
        plan.add(Step("track", f"the figures, with {logger.name}"))
    output_dir = prepared.spec.output_dir
    for key, place in (
        ("report_save_path", prepared.paths.report_path),
        ("output_dir", output_dir and output_dir / "report.json"),
    ):
        if place is not None:
            plan.add(Step("write", "the report", None, place, key))


def _merged_bytes(plan: Plan, modelpool: PlacedModelPool) -> int | None:
    """Return the size of a merged model: as outlined, or else that of the reference."""
    if plan.writes is not None:
        return plan.writes
    name = "_pretrained_" if modelpool.has_pretrained else modelpool.model_names[0]
    weights = plan.weights.get(name)
    if weights is None:
        return None
    dtype, total = modelpool.policy.torch_dtype, 0
    for key in weights:
        spec = weights.spec(key)
        if weights.tied_to(key) == key:
            width = dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype
            total += spec.numel * width.itemsize
    return total


def _check_room(plan: Plan) -> None:
    """Check for paths that are not writable and for full disks."""
    downloads = sum(size or 0 for size in plan.downloads().values())
    steps = [step for step in plan.steps if step.verb in _TAKES_ROOM and step.place is not None]
    if downloads:
        steps = [step for step in steps if step.verb != "download"]
        steps.append(Step("download", "", downloads, hub_cache(), "HF_HOME"))
    disks: dict[int, list[Step]] = {}
    for step in steps:
        assert step.place is not None
        # What is written takes the place of another only when it is whole, beside it.
        there = _existing(step.place.parent if step.verb == "write" else step.place)
        with plan.collect(step.key):
            if not there.is_dir():
                raise ConfigError(
                    f"'{step.place}' cannot be written: '{there}' is not a directory. Choose "
                    "another path."
                )
            if not os.access(there, os.W_OK):
                raise ConfigError(f"'{there}' is not writable. Choose another path.")
            disks.setdefault(there.stat().st_dev, []).append(step)
    for own in disks.values():
        assert own[0].place is not None
        needed = sum(step.nbytes or 0 for step in own)
        free = shutil.disk_usage(_existing(own[0].place)).free
        if needed > free:
            wanted = [step for step in own if step.nbytes]
            each = ", ".join(f"{decimal(step.nbytes or 0)} in '{step.place}'" for step in wanted)
            keys = ", ".join(dict.fromkeys(step.key for step in wanted))
            plan.problems.append(
                Problem(
                    (keys,),
                    f"the disk has {decimal(free)} left, and {decimal(needed)} are needed: "
                    f"{each}. Free some space, or choose a path on another disk.",
                )
            )


def _check_memory(plan: Plan, prepared: Prepared) -> None:
    """Check whether a merged model fits in memory, as a lower bound."""
    modelpool, taskpool, fabric = prepared.modelpool, prepared.taskpool, prepared.fabric
    if modelpool is None or not plan.weights or (taskpool is None and prepared.paths.model_path):
        return  # entry by entry it goes to the disk
    needed, free = _merged_bytes(plan, modelpool), _free_memory()
    if needed is None:
        return
    smaller = modelpool.policy.typed("dtype", "bfloat16")
    if free is not None and needed > free:
        plan.problems.append(
            Problem(
                (*modelpool.place, "models"),
                f"a merged model takes {decimal(needed)} of memory, and {decimal(free)} are free.",
                f"Set {smaller}, or merge without a task pool to a merged_model_save_path, which "
                "writes it to disk entry by entry.",
            )
        )
    # Asking a GPU sets it up, after which processes cannot be forked.
    if fabric is None or fabric.device.type != "cuda" or fabric.world_size > 1 or taskpool is None:
        return
    free = torch.cuda.mem_get_info(fabric.device)[0]
    if needed > free:
        plan.problems.append(
            Problem(
                ("fabric", "accelerator"),
                f"a merged model takes {decimal(needed)} on {fabric.device}, where "
                f"{decimal(free)} are free.",
                f"Set {smaller} or {{here}}accelerator=cpu.",
            )
        )


def _free_memory() -> int | None:
    """Return the available memory in bytes, as far as the system reports it."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        kilobytes = sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
        found.append(1024 * kilobytes)
    with suppress(OSError, ValueError):
        found.append(int(_CGROUP.read_text()))
    return min(found, default=None)


def _existing(place: Path) -> Path:
    """Return the nearest existing parent of a path, or the path itself."""
    return next(p for p in (place, *place.parents) if p.exists())


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(size: int | None) -> str:
    return "size unknown" if size is None else decimal(size)


def _total(sizes: Mapping[str, int | None]) -> str:
    return decimal(sum(size or 0 for size in sizes.values()))
