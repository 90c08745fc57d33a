"""Makes the plan of a run and finds all problems, before any weight is loaded."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fusion_bench.method.base import aligned
from fusion_bench.method.contract import FusionMethod, ModelPool
from fusion_bench.method.data import own_data
from fusion_bench.method.plain import class_name, refuse_without_pretrained
from fusion_bench.modelpool.sources import Sources
from fusion_bench.plan import Plan, Step
from fusion_bench.problems import ConfigError, Problem, Problems
from fusion_bench.programs.fusing import LearnedSplit, require_taskpool
from fusion_bench.programs.pools import PlacedModelPool
from fusion_bench.programs.prepare import Prepared
from fusion_bench.programs.search import Located
from fusion_bench.report.table import wide_console
from fusion_bench.repository import hub_cache
from fusion_bench.shown import visible
from fusion_bench.weights import MergePolicy, Weights

log = logging.getLogger(__name__)

#: A download that people want to know of before it begins.
_LARGE = 1_000_000_000
_TAKES_ROOM = ("build", "download", "prepare", "write")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def preflight(prepared: Prepared) -> Plan:
    """Find all problems of a run before it begins; a dry run prints the plan.

    Raises:
        ConfigError: with every problem that there is.
    """
    spec = prepared.spec
    plan = Plan(problems=Problems(prepared.problems))
    with plan.collect():
        prepared.paths.check_unclaimed()
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes one is enough
        with TemporaryDirectory() if spec.dry_run else nullcontext() as scratch:
            _look(plan, prepared, None if scratch is None else Path(scratch))
        if spec.dry_run:
            show(plan, wide_console())
    plan.problems.raise_all()
    announce(plan)
    return plan


def _look(plan: Plan, prepared: Prepared, scratch: Path | None) -> None:
    """Add the steps and problems of the run's parts to ``plan``.

    Args:
        plan: has the problems that are known already.
        prepared: the parts.
        scratch: a temporary directory for small downloads, in a dry run.
    """
    modelpool, taskpool = prepared.modelpool, prepared.taskpool
    if modelpool is not None:
        plan.take(modelpool.plan(scratch, built=taskpool is not None), "modelpool")
    if taskpool is not None:
        plan.take(taskpool.plan(scratch), "taskpool")
    _check_nodes(plan, prepared, scratch)
    if modelpool is not None:
        _compare(plan, modelpool, prepared.methods())
        _compare_data(plan, prepared, modelpool, scratch)
    _add_steps(plan, prepared)
    _check_room(plan)
    _check_memory(plan, prepared)


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
    config = prepared.spec.config
    if prepared.modelpool is None:
        with plan.collect("modelpool"):
            sources = Sources(_mapping(config["modelpool"], "models"), "AutoModel")
            sources.scratch = scratch
            for name in sources:
                with plan.collect("modelpool", "models", name):
                    sources[name].plan(plan)
    if prepared.taskpool is None:
        from fusion_bench.taskpool.described import describe

        for name, node in _mapping(config["taskpool"], "test_datasets").items():
            place = ("taskpool", "test_datasets", name)
            if not any(problem.place[:3] == place for problem in plan.problems):
                with plan.collect(*place):
                    describe(node, scratch)


def _mapping(node: object, key: str) -> Mapping[str, object]:
    """Return what a node has under a key, if that is a mapping."""
    found = node.get(key) if isinstance(node, Mapping) else None
    return found if isinstance(found, Mapping) else {}


class _Opened:
    """A pool of the models with readable headers."""

    def __init__(self, pool: PlacedModelPool, opened: Mapping[str, Weights]):
        self._pool = pool
        self._opened = opened

    @property
    def model_names(self) -> Sequence[str]:
        return [name for name in self._pool.model_names if name in self._opened]

    @property
    def has_pretrained(self) -> bool:
        return self._pool.has_pretrained

    @property
    def policy(self) -> MergePolicy:
        return self._pool.policy

    @property
    def vocabulary(self) -> int | None:
        return self._pool.vocabulary

    def weights(self, name: str) -> Weights:
        return self._opened[name]

    def load_model(self, name: str) -> nn.Module:
        return self._pool.load_model(name)

    def build_model(self, weights: Mapping[str, Tensor]) -> nn.Module:
        return self._pool.build_model(weights)


def _compare(
    plan: Plan, modelpool: PlacedModelPool, methods: Sequence[tuple[FusionMethod, Located]]
) -> None:
    """Compare keys, shapes, types and tying by headers, and models with methods."""
    pool: ModelPool = _Opened(modelpool, plan.weights)
    needed = [*(["_pretrained_"] if modelpool.has_pretrained else []), *modelpool.model_names]
    merging = any(method.needs.weights for method, _ in methods)
    sound = _can_be_merged(plan, modelpool, pool, needed) if merging else True
    whole = sound and all(name in plan.weights for name in needed)
    for method, located in methods:
        with plan.collect(), located():
            refuse_without_pretrained(method, modelpool)
            if not method.needs.weights:
                method.check_pool(modelpool)
            elif whole:
                method.check_pool(pool)


def _can_be_merged(
    plan: Plan, modelpool: PlacedModelPool, opened: ModelPool, needed: Sequence[str]
) -> bool:
    """Check whether the opened models can be merged."""
    if not opened.model_names or needed[0] not in plan.weights:
        return False
    before = len(plan.problems)
    with plan.collect("modelpool", "models"):
        plan.note(*aligned(opened).notes)
    with plan.collect("modelpool", "models"):
        plan.note(*modelpool.compare(list(plan.weights)))
    return len(plan.problems) == before


def _compare_data(
    plan: Plan, prepared: Prepared, modelpool: PlacedModelPool, scratch: Path | None
) -> None:
    """Check the datasets for learning and for a search."""
    uses: dict[LearnedSplit, list[FusionMethod]] = {}
    for method, _ in prepared.methods():
        if method.needs.split is not None:
            uses.setdefault(LearnedSplit.of(method), []).append(method)
            with plan.collect():
                require_taskpool(method, prepared.taskpool)
    if prepared.search is not None:
        uses[prepared.search.learned] = []
    if prepared.taskpool is None:
        return
    for learned, methods in uses.items():
        with plan.collect():
            datasets, place = learned.named(modelpool, prepared.taskpool)
            if any(method.needs.own_data for method in methods):
                with plan.collect(*place):
                    own_data(modelpool.model_names, datasets)
            plan.take(prepared.taskpool.plan_tuning(datasets, place, scratch), "taskpool")
            for name, node in datasets.items():
                if _is_test_split(node) and not prepared.spec.allow_test_split:
                    with plan.collect():
                        raise learned.refusal((*place, name))


def _is_test_split(node: object) -> bool:
    from fusion_bench.taskpool.tuning import is_test_split

    split = node.get("split") if isinstance(node, Mapping) else None
    return isinstance(split, str) and is_test_split(split)


def _add_steps(plan: Plan, prepared: Prepared) -> None:
    modelpool, taskpool, methods = prepared.modelpool, prepared.taskpool, prepared.methods()
    if plan.weights:
        total = sum(sum(w.spec(key).nbytes for key in w) for w in plan.weights.values())
        plan.add(Step("read", f"{_count(len(plan.weights), 'model')}", total))
    if modelpool is not None and methods:
        what = f"{class_name(methods[0][0])} of {_count(len(modelpool.model_names), 'model')}"
        if prepared.search is not None:
            what += f", with {_count(len(methods), 'setting')}"
        device = "" if prepared.fabric is None else f", on {prepared.fabric.device}"
        plan.add(Step("compute", f"{what}{device}"))
    if taskpool is not None:
        evaluated = "the merged model"
        if prepared.spec.baselines != "none":
            evaluated += " and its inputs"
        plan.add(Step("evaluate", f"{evaluated}, on {_count(len(taskpool.task_names), 'task')}"))
    if (path := prepared.paths.model_path) is not None:
        size = None if modelpool is None else _merged_bytes(plan, modelpool)
        plan.add(Step("write", "the merged model", size, path, "merged_model_save_path"))
    output_dir = prepared.spec.output_dir
    for key, place in (
        ("report_save_path", prepared.paths.report_path),
        ("output_dir", output_dir and output_dir / "report.json"),
    ):
        if place is not None:
            plan.add(Step("write", "the report", None, place, key))


def _merged_bytes(plan: Plan, modelpool: PlacedModelPool) -> int | None:
    """Return the size of a merged model, which has the reference's entries."""
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
    if free is not None and needed > free:
        plan.problems.append(
            Problem(
                ("modelpool", "models"),
                f"a merged model takes {decimal(needed)} of memory, and {decimal(free)} are free.",
                "Set modelpool.policy.dtype=bfloat16, or use '~taskpool' with a "
                "merged_model_save_path, to write it to disk entry by entry.",
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
                "Set modelpool.policy.dtype=bfloat16 or fabric.accelerator=cpu.",
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
