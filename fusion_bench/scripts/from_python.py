"""Runs a config from Python, as the command line runs it."""

from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from fusion_bench import catalog
from fusion_bench.configs import CONFIG_DIR, composed
from fusion_bench.instantiate import SharedObjects
from fusion_bench.problems import ConfigError, FusionBenchError, did_you_mean, within
from fusion_bench.resolving import to_container
from fusion_bench.scripts.hydra_version import check_hydra
from fusion_bench.scripts.run import EXPECTED, explained, run_settings
from fusion_bench.storage import disk_failures

if TYPE_CHECKING:
    from fusion_bench.report import Report
    from fusion_bench.report.reproduction import Reproduction
    from fusion_bench.report.scaling import Study

_KINDS: Mapping[str, catalog.Kind] = {
    "method": "methods",
    "modelpool": "models",
    "taskpool": "tasks",
}


def run_config(
    config: str | PathLike[str] | Mapping[str, object],
    output_dir: str | PathLike[str] | None,
    overrides: Mapping[str, object],
) -> "Report | Study | Reproduction | None":
    """Run a config; see ``fusion_bench.api.run``.

    Raises:
        FusionBenchError: with all problems of the config.
    """
    place = None if output_dir is None else str(Path(output_dir).absolute())
    try:
        with disk_failures():
            read = OmegaConf.create(dict(config)) if isinstance(config, Mapping) else _read(config)
            settings = _changed(read, overrides)
            if "_target_" not in settings:
                raise ConfigError(
                    "it has no program at its top level.",
                    "Add '_target_: fusion_bench.programs.FabricModelFusionProgram'.",
                    place=("config",),
                )
            result = run_settings(settings, place, SharedObjects())
    except FusionBenchError:
        raise
    except MissingMandatoryValue as error:
        raise ConfigError("missing; give a value.", place=(str(error.full_key),)) from error
    except EXPECTED as error:
        raise ConfigError(explained(error)) from error
    return cast("Report | Study | Reproduction | None", result)


def section(group: str, name: str, seed: int | None = None) -> dict[str, Any]:
    """Return a config of ours by what a person calls it.

    Args:
        group: ``method``, ``modelpool`` or ``taskpool``.
        name: as ``fusion_bench ls`` has it, or an alias.
        seed: what the config may refer to.

    Raises:
        FusionBenchError: there is none, with the nearest.
    """
    entry = catalog.find(name, (_KINDS[group],))
    if not entry.target:
        raise ConfigError(f"'{name}' is one model.", "Give several, in a list.")
    check_hydra()
    from fusion_bench.scripts.hydra_patches import checked_composition  # not before the check

    with checked_composition():
        made = composed(f"{group}={entry.name}", f"seed={'null' if seed is None else seed}")
    return dict(made[group])


def _read(config: str | PathLike[str]) -> DictConfig:
    """Compose a file, or a config of ours by its name."""
    check_hydra()
    from fusion_bench.scripts.hydra_patches import checked_composition  # not before the check

    with within("config"):
        file = _file(fspath(config))
    with checked_composition(), initialize_config_dir(str(file.parent), version_base="1.3"):
        return compose(file.stem)


def _file(name: str) -> Path:
    file = Path(name).expanduser().absolute()
    if file.is_file():
        return file
    if file.suffix in (".yaml", ".yml"):
        beside = [path.name for path in file.parent.glob("*.y*ml")]
        raise ConfigError(f"there is no file '{name}'.", did_you_mean(file.name, beside))
    return CONFIG_DIR / catalog.find(name, ("configs",)).file


def _changed(config: DictConfig, overrides: Mapping[str, object]) -> dict[str, Any]:
    """Return the resolved config with changes.

    A section by its name comes first, so that others may change keys of it. What is no plain value
    is put in at the end. So what refers to a changed key has the new value.
    """
    OmegaConf.set_struct(config, False)
    seed = overrides.get("seed", OmegaConf.select(config, "seed"))
    late: dict[str, object] = {}
    named = {k: v for k, v in overrides.items() if k in _KINDS and isinstance(v, str)}
    for key, own in named.items():
        with within(key):
            node = section(key, own, seed if isinstance(seed, int) else None)
        OmegaConf.update(config, key, node, merge=False, force_add=True)
    for key, value in _leaves({k: v for k, v in overrides.items() if k not in named}):
        if value is None or isinstance(value, bool | int | float | str):
            OmegaConf.update(config, key, value, force_add=True)
        else:
            late[key] = value
    settings = cast(dict[str, Any], to_container(config, throw_on_missing=True))
    for key, value in late.items():
        *above, last = key.split(".")
        inner = settings
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return settings


def _leaves(overrides: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """Yield the changes by their whole keys; a node or an object stays whole."""
    for name, value in overrides.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and "_target_" not in value and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, fspath(value) if isinstance(value, PathLike) else value
