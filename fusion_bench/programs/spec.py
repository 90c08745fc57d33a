"""The specification of a run, from the config."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

Baselines = Literal["own_task", "all_tasks", "none"]
#: A section of the config: a node, or an object that was made by somebody else.
Section = Any


@dataclass(frozen=True)
class FusionSpec:
    """The arguments of ``FabricModelFusionProgram``; see there.

    Raises nothing: whether the values can be is found by ``prepare``.
    """

    method: Section
    modelpool: Section
    taskpool: Section = None
    fabric: Section = None
    search: Section = None
    output_dir: Path | None = None
    seed: int | None = None
    baselines: Baselines = "own_task"
    report_save_path: str | None = None
    merged_model_save_path: str | None = None
    overwrite: bool = False
    allow_test_split: bool = False
    similarity: bool = True
    fast_dev_run: bool = False
    dry_run: bool = False

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config as plain data for the report, enough to repeat the run."""
        return {
            "_target_": "fusion_bench.programs.FabricModelFusionProgram",
            "_recursive_": False,
            "method": plain(self.method),
            "modelpool": plain(self.modelpool),
            "taskpool": plain(self.taskpool),
            "fabric": plain(self.fabric),
            "search": plain(self.search),
            "seed": self.seed,
            "baselines": self.baselines,
            "report_save_path": self.report_save_path,
            "merged_model_save_path": self.merged_model_save_path,
            "overwrite": self.overwrite,
            "allow_test_split": self.allow_test_split,
            "similarity": self.similarity,
            "fast_dev_run": self.fast_dev_run,
            "dry_run": self.dry_run,
        }


def plain(section: Section) -> Any:
    """Return a section as plain data; an object is replaced by its class name."""
    if OmegaConf.is_config(section):
        return OmegaConf.to_container(section, resolve=True)
    if section is None or isinstance(section, Mapping):
        return section
    return f"{type(section).__module__}.{type(section).__qualname__}"
