"""The specification of a run, from the config."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf

from fusion_bench.problems import Place
from fusion_bench.programs.recipe import recorded

Baselines = Literal["own_task", "all_tasks", "none"]
#: Stands for the run's directory in a path of the config.
LOG_DIR = "{log_dir}"
#: A section of the config: a node, or an object that was made by somebody else.
Section = object


@dataclass(frozen=True)
class Places:
    """Where the parts of a run stand in the config, which may name several runs."""

    method: Place = ("method",)
    modelpool: Place = ("modelpool",)
    taskpool: Place = ("taskpool",)


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
    recipe: str | None = None
    places: Places = Places()

    @cached_property
    def config(self) -> dict[str, object]:
        """The config as plain data for the report, enough to repeat the run."""
        return {
            "_target_": "fusion_bench.programs.FabricModelFusionProgram",
            "_recursive_": False,
            "method": recorded(self.method),
            "modelpool": recorded(self.modelpool),
            "taskpool": recorded(self.taskpool),
            "fabric": self._fabric(),
            "search": recorded(self.search),
            "seed": self.seed,
            "baselines": self.baselines,
            "report_save_path": self.report_save_path,
            "merged_model_save_path": self.merged_model_save_path,
            "overwrite": self.overwrite,
            "allow_test_split": self.allow_test_split,
            "similarity": self.similarity,
            "fast_dev_run": self.fast_dev_run,
            "dry_run": self.dry_run,
            **({} if self.recipe is None else {"recipe": self.recipe}),
        }

    def _fabric(self) -> object:
        """Return the section with loggers that write into the directory of whoever repeats it."""
        node = recorded(self.fabric)
        if not isinstance(node, dict) or "loggers" not in node or self.output_dir is None:
            return node
        return {**node, "loggers": _moved(node["loggers"], str(self.output_dir))}


def _moved(value: object, directory: str) -> object:
    """Return a value with the run's directory replaced by ``{log_dir}``."""
    if isinstance(value, Mapping):
        return {name: _moved(inner, directory) for name, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, directory) for inner in value]
    if isinstance(value, str) and Path(value).is_relative_to(directory):
        return LOG_DIR + value.removeprefix(directory)
    return value


def plain(section: Section) -> object:
    """Return a config section as plain data; anything else stays as it is."""
    return (
        OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
    )
