"""The processes and devices of a run, and their description in the report."""

import hashlib
import json
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar, cast

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric import Fabric
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from fusion_bench import __version__
from fusion_bench.command import typed
from fusion_bench.instantiate import instantiate
from fusion_bench.memory import out_of_memory
from fusion_bench.problems import ConfigError, EnvironmentProblem, FusionBenchError, within
from fusion_bench.programs.spec import Section
from fusion_bench.report import Run, Search, Seconds, Tuning
from fusion_bench.shown import are_set_up, set_up_streams
from fusion_bench.storage import disk_failures
from fusion_bench.threads import end_threads
from fusion_bench.trust import users_code

T = TypeVar("T")

_PACKAGES = ("torch", "transformers", "datasets", "lightning", "hydra-core", "safetensors", "numpy")


def make_fabric(section: Section) -> Fabric:
    """Return Fabric from a config section; without one, one process on the best device.

    Loggers are none of its arguments here: ``Tracker`` makes them.

    Several local processes are forked, or spawned without a safe fork, unless the section names
    another strategy. A strategy that reruns the command line would start a sweep per process.
    """
    if isinstance(section, Fabric):
        return section
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(
            f"'{section}' is not a mapping.", "Set fabric.accelerator=… instead.", place=("fabric",)
        )
    defaults = {"_target_": "lightning.Fabric", "accelerator": "auto", "devices": 1}
    node = {**defaults, **(section or {})}
    node.pop("loggers", None)
    try:
        with within("fabric"):
            fabric = instantiate(node, "fabric")
        reruns_command = isinstance(fabric.strategy.launcher, _SubprocessScriptLauncher)
        if node.get("strategy", "auto") == "auto" and reruns_command:
            fabric = instantiate({**node, "strategy": _local_strategy()}, "fabric")
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        key = _wrong_key(node)
        fix = "Set fabric.accelerator=auto and fabric.devices=1 to use an available device."
        raise ConfigError(
            f"{str(error).rstrip('.')}.",
            fix if key in (None, "accelerator", "devices") else "",
            place=("fabric",) if key is None else ("fabric", key),
        ) from error
    return fabric


def _wrong_key(node: Mapping[str, object]) -> str | None:
    """Return the key without which Fabric could be made, if there is one."""
    for key in (key for key in node if key != "_target_"):
        with suppress(ValueError, TypeError, RuntimeError, MisconfigurationException):
            instantiate({name: node[name] for name in node if name != key}, "fabric")
            return key
    return None


def launch(fabric: Fabric, work: Callable[[Fabric], T]) -> T:
    """Run ``work`` in all of Fabric's processes, and return the first one's result.

    Raises:
        FusionBenchError: what one of the processes raised.
        EnvironmentProblem: a process was killed, memory ran out, or a disk cannot be written to.
    """
    launcher = fabric.strategy.launcher
    if not isinstance(launcher, _MultiProcessingLauncher):
        with plain_failures():
            return cast(T, fabric.launch(work))
    end_threads()
    # A process that was started by ours could else only tell its traceback.
    errors = multiprocessing.get_context(launcher._start_method).SimpleQueue()
    try:
        # Lightning's own queue holds 64 KB: a process with more to tell would wait for ever.
        with TemporaryDirectory() as place:
            result = Path(place) / "result"
            fabric.launch(
                partial(_sending, work=work, errors=errors, shown=are_set_up(), result=result)
            )
            return cast(T, pickle.loads(result.read_bytes()))
    except ProcessRaisedException as error:
        if errors.empty():
            raise
        raise errors.get() from error
    except ProcessExitedException as error:
        raise EnvironmentProblem(
            f"process {error.error_index} was ended from outside "
            f"({error.signal_name or f'exit code {error.exit_code}'}); memory may have run out.",
            "Start the command again to resume.",
            place=("fabric", "devices"),
        ) from error


def _sending(
    fabric: Fabric,
    work: Callable[[Fabric], T],
    errors: "SimpleQueue[FusionBenchError]",
    shown: bool,
    result: Path,
) -> None:
    """Run the work; leave its result in a file, and send expected errors without a traceback."""
    if shown:  # as in the parent
        set_up_streams()
    try:
        with plain_failures():
            found = work(fabric)
            if fabric.local_rank == 0:
                result.write_bytes(pickle.dumps(found))
    except FusionBenchError as error:
        errors.put(error)
        raise


@contextmanager
def plain_failures() -> Iterator[None]:
    """Report out-of-memory and disk errors in one line.

    Raises:
        EnvironmentProblem: that is so.
    """
    try:
        with disk_failures():
            yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition(". ")[0] or "the machine has no memory left"
        raise EnvironmentProblem(
            f"Out of memory: {reason}. Choose a device with more memory, or stop other programs "
            "that use it."
        ) from error


def describe_run(
    fabric: Fabric,
    config: Mapping[str, object],
    seed: int | None,
    seconds: Seconds,
    inputs: Mapping[str, str],
    tuning: Tuning | None = None,
    search: Search | None = None,
    notes: Sequence[str] = (),
) -> Run:
    """Return the report's description of the run."""
    return Run(
        version=__version__,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=typed(),
        method=_chosen_method(),
        config=dict(config),
        config_sha256=config_sha256(config),
        seed=seed,
        precision=str(fabric.strategy.precision.precision),
        device=_device_name(fabric.device),
        world_size=fabric.world_size,
        packages=_versions() | users_code(config),
        seconds=seconds,
        inputs=dict(inputs),
        notes=list(notes),
        tuning=tuning,
        search=search,
    )


@cache
def _versions() -> dict[str, str]:
    """Return the packages' versions, which are files to be read: once for all jobs of a sweep."""
    return {name: version(name) for name in _PACKAGES}


def config_sha256(config: Mapping[str, object]) -> str:
    """Return the hash of a config, as JSON with sorted keys."""
    canonical = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _chosen_method() -> str | None:
    """Return the name of the method's config, if the command chose one."""
    if not HydraConfig.initialized():
        return None
    return HydraConfig.get().runtime.choices.get("method")


def _local_strategy() -> str:
    return "ddp_fork" if sys.platform == "linux" else "ddp_spawn"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
