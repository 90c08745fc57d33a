"""Where a run happens: its processes and devices, and their description in the report."""

import hashlib
import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fusion_bench import __version__
from fusion_bench.errors import ConfigError
from fusion_bench.instantiate import instantiate
from fusion_bench.report import Run, Search, Seconds, Tuning

_PACKAGES = ("torch", "transformers", "datasets", "lightning", "hydra-core", "safetensors", "numpy")


def make_fabric(section: Any) -> Fabric:
    """Return Fabric from a config section; without one, one process on the best device.

    Several local processes are forks, or spawned where there is no safe fork, unless the section
    names another strategy: one that runs the command line again would start a sweep per process.
    """
    if isinstance(section, Fabric):
        return section
    defaults = {"_target_": "lightning.Fabric", "accelerator": "auto", "devices": 1}
    node = {**defaults, **(section or {})}
    try:
        fabric = instantiate(node, "fabric")
        reruns_command = isinstance(fabric.strategy.launcher, _SubprocessScriptLauncher)
        if node.get("strategy", "auto") == "auto" and reruns_command:
            fabric = instantiate({**node, "strategy": _local_strategy()}, "fabric")
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        mend = "Give fabric.accelerator=auto and fabric.devices=1 to take what is here."
        raise ConfigError(f"fabric: {error} {mend}") from error
    return fabric


def describe_run(
    fabric: Fabric,
    config: Mapping[str, Any],
    seed: int | None,
    seconds: Seconds,
    inputs: Mapping[str, str],
    tuning: Tuning | None = None,
    search: Search | None = None,
) -> Run:
    """Return the report's account of what was run, when, and with what."""
    return Run(
        version=__version__,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=sys.argv,
        config=dict(config),
        config_sha256=config_sha256(config),
        seed=seed,
        precision=str(fabric.strategy.precision.precision),
        device=_device_name(fabric.device),
        world_size=fabric.world_size,
        packages={name: version(name) for name in _PACKAGES},
        seconds=seconds,
        inputs=dict(inputs),
        tuning=tuning,
        search=search,
    )


def config_sha256(config: Mapping[str, Any]) -> str:
    """Return the hash of a config, as JSON with sorted keys."""
    canonical = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _local_strategy() -> str:
    return "ddp_fork" if sys.platform == "linux" else "ddp_spawn"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
