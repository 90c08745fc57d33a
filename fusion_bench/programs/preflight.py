"""Looks ahead: what a run will do, and all that stands in its way, before any weight is loaded."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric import Fabric
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fusion_bench.method.base import Comparing, aligned, refuse_without_pretrained
from fusion_bench.method.data import own_data
from fusion_bench.plan import Plan, Step
from fusion_bench.problems import ConfigError, Problem, within
from fusion_bench.programs.fusing import (
    learner,
    named_datasets,
    refuse_test_split,
    refuse_without_taskpool,
)
from fusion_bench.repository import hub_cache, locate
from fusion_bench.shown import visible
from fusion_bench.sources import unbuilt
from fusion_bench.weights import Weights

if TYPE_CHECKING:
    from fusion_bench.programs.fabric_model_fusion import FabricModelFusionProgram

log = logging.getLogger(__name__)

#: A download that people want to know of before it begins.
_LARGE = 1_000_000_000
_TAKES_ROOM = ("build", "download", "prepare", "write")
#: A context that says where in the config a method's options stand.
Located = Callable[[], AbstractContextManager[None]]
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def preflight(
    plan: Plan,
    program: "FabricModelFusionProgram",
    fabric: Fabric | None,
    scratch: Path | None = None,
) -> None:
    """Add to ``plan`` what the program's parts know of themselves, and what does not fit.

    Pools and methods that are plain objects, and know nothing ahead, are left alone.

    Args:
        plan: has the problems that are known already.
        program: those of its parts that could not be made are None.
        fabric: likewise.
        scratch: where small files go that are not here, for a run that leaves nothing.
    """
    modelpool, taskpool = program.modelpool, program.taskpool
    if hasattr(modelpool, "plan"):
        plan.take(modelpool.plan(scratch, built=taskpool is not None), "modelpool")
    if hasattr(taskpool, "plan"):
        plan.take(taskpool.plan(scratch), "taskpool")
    _look_at_nodes(plan, program, scratch)
    methods = [setting.method for setting in program.settings] or [program.method]
    if modelpool is not None:
        chosen: list[tuple[Any, Located]] = [(s.method, s.located) for s in program.settings]
        if not chosen and program.method is not None:
            chosen = [(program.method, partial(within, "method"))]
        _compare(plan, modelpool, chosen)
        _compare_data(plan, program, methods, scratch)
    _add_steps(plan, program, methods, fabric)
    _check_room(plan)
    _check_memory(plan, program, fabric)


def announce(plan: Plan) -> None:
    """Say what is downloaded, where it is much."""
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


def _look_at_nodes(plan: Plan, program: "FabricModelFusionProgram", scratch: Path | None) -> None:
    """Find what a pool's node names where the pool itself could not be made."""

    def named(pool: Any, section: str, key: str) -> Mapping[str, Any]:
        node = program.config[section] if pool is None else None
        found = node.get(key) if isinstance(node, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    for name, source in named(program.modelpool, "modelpool", "models").items():
        with plan.collect("modelpool", "models", name):
            if isinstance(source, str) and unbuilt(source) is None and not Path(source).is_file():
                locate(source, scratch)
    for name, node in named(program.taskpool, "taskpool", "test_datasets").items():
        key = f"taskpool.test_datasets.{name}"
        with plan.collect("taskpool", "test_datasets", name):
            from fusion_bench.taskpool.described import describe

            if not any(problem.key.startswith(f"{key}.") for problem in plan.problems):
                describe(node, key, scratch)


@dataclass(frozen=True)
class _Opened:
    """Those of a pool's models whose headers could be read, seen as a pool."""

    pool: Any
    opened: Mapping[str, Weights]

    @property
    def model_names(self) -> Sequence[str]:
        return [name for name in self.pool.model_names if name in self.opened]

    @property
    def has_pretrained(self) -> bool:
        return bool(self.pool.has_pretrained)

    @property
    def policy(self) -> Any:
        return self.pool.policy

    @property
    def vocabulary(self) -> int | None:
        return self.pool.vocabulary

    def weights(self, name: str) -> Weights:
        return self.opened[name]


def _compare(plan: Plan, modelpool: Any, methods: Sequence[tuple[Any, Located]]) -> None:
    """Compare keys, shapes, types and tying by headers, and models with methods."""
    for method, located in methods:
        with plan.collect(), located():
            refuse_without_pretrained(method, modelpool)
    pool = _Opened(modelpool, plan.weights)
    merging = [(method, located) for method, located in methods if _merges_weights(method)]
    needed = [*(["_pretrained_"] if modelpool.has_pretrained else []), *modelpool.model_names]
    if not merging or not pool.model_names or needed[0] not in plan.weights:
        return
    before = len(plan.problems)
    with plan.collect("modelpool", "models"):
        plan.note(*aligned(pool).notes)
    if isinstance(modelpool, Comparing):
        with plan.collect("modelpool", "models"):
            plan.note(*modelpool.compare(list(plan.weights)))
    if len(plan.problems) > before or any(name not in plan.weights for name in needed):
        return
    for method, located in merging:
        if hasattr(method, "inputs") and not _lacks_pretrained(method, modelpool):
            with plan.collect(), located():
                method.inputs(pool)


def _merges_weights(method: Any) -> bool:
    """Tell whether models that differ cannot be for this method; an ensemble takes them."""
    return hasattr(method, "inputs") or getattr(method, "needs_data", False)


def _lacks_pretrained(method: Any, modelpool: Any) -> bool:
    return getattr(method, "needs_pretrained", False) and not modelpool.has_pretrained


def _compare_data(
    plan: Plan, program: "FabricModelFusionProgram", methods: Sequence[Any], scratch: Path | None
) -> None:
    """Look at the datasets that methods learn from and a search evaluates on."""
    uses = {
        (method.split, learner(method), "method.split"): method
        for method in methods
        if getattr(method, "needs_data", False)
    }
    for method in uses.values():
        with plan.collect("taskpool"):
            refuse_without_taskpool(method, program.taskpool)
    if hasattr(program.search, "split"):
        uses[program.search.split, "the search evaluates on", "search.split"] = None
    if program.taskpool is None:
        return
    for split, user, key in uses:
        with plan.collect(*key.split(".")):
            datasets, where = named_datasets(split, program.modelpool, program.taskpool, user, key)
            if key == "method.split" and any(
                getattr(method, "needs_own_data", False) and method.split == split
                for method in methods
            ):
                with plan.collect(*where.split(".")):
                    own_data(program.modelpool.model_names, datasets)
            if hasattr(program.taskpool, "plan_tuning"):
                plan.take(program.taskpool.plan_tuning(datasets, where, scratch), *where.split("."))
            for name, node in datasets.items():
                with plan.collect(*where.split("."), name):
                    _refuse_named_test_split(program, node, f"{where}.{name}", key)


def _refuse_named_test_split(
    program: "FabricModelFusionProgram", node: Any, where: str, key: str
) -> None:
    from fusion_bench.taskpool.tuning import is_test_split

    split = node.get("split") if isinstance(node, Mapping) else None
    if isinstance(split, str) and is_test_split(split) and not program.allow_test_split:
        raise refuse_test_split(where, key)


def _add_steps(
    plan: Plan,
    program: "FabricModelFusionProgram",
    methods: Sequence[Any],
    fabric: Fabric | None,
) -> None:
    modelpool, taskpool = program.modelpool, program.taskpool
    if plan.weights:
        total = sum(sum(w.spec(key).nbytes for key in w) for w in plan.weights.values())
        plan.add(Step("read", f"{_count(len(plan.weights), 'model')}", total))
    if modelpool is not None and program.method is not None:
        what = f"{type(methods[0]).__name__} of {_count(len(modelpool.model_names), 'model')}"
        if program.search is not None:
            what += f", with {_count(len(methods), 'setting')}"
        device = "" if fabric is None else f", on {fabric.device}"
        plan.add(Step("compute", f"{what}{device}"))
    if taskpool is not None:
        evaluated = "the merged model"
        if program.baselines != "none":
            evaluated += " and those it is made of"
        plan.add(Step("evaluate", f"{evaluated}, on {_count(len(taskpool.task_names), 'task')}"))
    if program.output_paths.model_path is not None:
        size = None if modelpool is None else _merged_bytes(plan, modelpool)
        plan.add(
            Step(
                "write",
                "the merged model",
                size,
                program.output_paths.model_path,
                "merged_model_save_path",
            )
        )
    for key, place in (
        ("report_save_path", program.output_paths.report_path),
        ("output_dir", program.output_dir and program.output_dir / "report.json"),
    ):
        if place is not None:
            plan.add(Step("write", "the report", None, place, key))


def _merged_bytes(plan: Plan, modelpool: Any) -> int | None:
    """Return how much a merged model takes, which is like the reference."""
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
    """Look for places that cannot be written, and disks that are too small."""
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
                    f"'{step.place}' cannot be: '{there}' is no directory. Choose another path."
                )
            if not os.access(there, os.W_OK):
                raise ConfigError(f"'{there}' cannot be written to. Choose another path.")
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
                    f"{each}. Free some, or choose a place on another disk.",
                )
            )


def _check_memory(plan: Plan, program: "FabricModelFusionProgram", fabric: Fabric | None) -> None:
    """Look whether a merged model that is to be held fits; what is less than that is not known."""
    modelpool, taskpool = program.modelpool, program.taskpool
    if (
        modelpool is None
        or not plan.weights
        or (taskpool is None and program.output_paths.model_path)
    ):
        return  # entry by entry it goes to the disk
    needed, free = _merged_bytes(plan, modelpool), _free_memory()
    if needed is None:
        return
    if free is not None and needed > free:
        plan.problems.append(
            Problem(
                ("modelpool", "models"),
                f"a merged model takes {decimal(needed)} of memory, and {decimal(free)} are free.",
                "Give modelpool.policy.dtype=bfloat16, or '~taskpool' with a "
                "merged_model_save_path, to write it to the disk entry by entry.",
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
                "Give modelpool.policy.dtype=bfloat16 or fabric.accelerator=cpu.",
            )
        )


def _free_memory() -> int | None:
    """Return the bytes of memory that may be had, as far as the system tells."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        kilobytes = sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
        found.append(1024 * kilobytes)
    with suppress(OSError, ValueError):
        found.append(int(_CGROUP.read_text()))
    return min(found, default=None)


def _existing(place: Path) -> Path:
    """Return the nearest that is there of a path and the directories above it."""
    return next(p for p in (place, *place.parents) if p.exists())


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(size: int | None) -> str:
    return "size unknown" if size is None else decimal(size)


def _total(sizes: Mapping[str, int | None]) -> str:
    return decimal(sum(size or 0 for size in sizes.values()))
