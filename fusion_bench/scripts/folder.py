"""Checks the output folder of a run before Hydra writes to it.

A config names the folder, and Hydra replaces what it finds there.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core import utils
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fusion_bench.command import overrides
from fusion_bench.problems import ConfigError, Place
from fusion_bench.storage import check_unclaimed, is_first_process

#: What Hydra keeps of a run, in a folder within its own.
_RECORD = ("config.yaml", "hydra.yaml", "overrides.yaml")
_configure_log = utils.configure_log


def check_folder(folder: Path, key: Place, record: str | None = None) -> None:
    """Refuse a folder with files that are not from a run; logs are ignored and appended to.

    Args:
        folder: the output folder of a run or a sweep.
        key: its key in the config.
        record: the subfolder for Hydra's files.

    Raises:
        ConfigError: it does, and the user did not type ``overwrite=true``; or something there is
            a link to elsewhere.
    """
    files = [folder / (record or ".hydra"), folder / "optimization_results.yaml"]
    files += [files[0] / name for name in _RECORD]
    for path in files:
        if path.is_symlink():
            raise ConfigError(
                f"'{path}' is a link, and links are not written to.", "Remove it.", place=key
            )
    if overrides().get("overwrite") == "true":
        return
    if record and record != ".hydra" and files[0].exists() and not _is_record(files[0]):
        raise ConfigError(
            f"'{folder}' contains '{record}', which is not from a run.",
            "Choose a new folder or another hydra.output_subdir, or type overwrite=true.",
            place=key,
        )
    left = ("multirun.yaml", "report.json", ".hydra/hydra.yaml", f"{record or '.hydra'}/hydra.yaml")
    if any(_names_fusion_bench(folder / name) for name in left):
        return
    kept = [path for path in files[2:] if path.exists()]
    for path in (*_results(folder), *kept):
        raise ConfigError(
            f"'{folder}' holds '{path.relative_to(folder)}', which is not from a run.",
            "Choose a new folder, or type overwrite=true.",
            place=key,
        )


def configure_log(
    log_config: DictConfig, verbose_config: bool | str | Sequence[str] = False
) -> None:
    """Open a job's logs in its folder for appending, after a check.

    Hydra calls it for each job, before it writes anything.

    Raises:
        ConfigError: the folder is not this run's to write to.
        EnvironmentProblem: another run is writing to it.
    """
    if not HydraConfig.initialized():  # a launcher's own messages, before its jobs
        _configure_log(log_config, verbose_config)
        return
    hydra = HydraConfig.get()
    folder, sweep = Path(hydra.runtime.output_dir), hydra.mode == RunMode.MULTIRUN
    if is_first_process():
        key = ("hydra", "sweep", "subdir") if sweep else ("hydra", "run", "dir")
        check_folder(folder, key, hydra.output_subdir)
        check_unclaimed(folder, key, inside=True)
        _check_record(folder, key)
    folders = (folder, Path(hydra.sweep.dir).absolute()) if sweep else (folder,)
    config: Any = OmegaConf.to_container(log_config, resolve=True)
    logs = [folder / f"{hydra.job.name}.log"]
    for handler in (config.get("handlers") or {}).values():
        if handler and "filename" in handler:
            path = folder / handler["filename"]
            logs.append(path if path.parent in folders else folder / path.name)
            handler |= {"filename": str(logs[-1]), "mode": "a"}
    for path in logs:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ConfigError(f"'{path}' is not a regular file, so no log is written. Remove it.")
    _configure_log(OmegaConf.create(config), verbose_config)


def _check_record(folder: Path, key: Place) -> None:
    """Refuse to replace the record of another run with results."""
    hydra = HydraConfig.get()
    whole: Any = hydra._get_root()  # type: ignore[attr-defined]
    if hydra.output_subdir is None or whole.get("overwrite") is True or not any(_results(folder)):
        return
    task = OmegaConf.masked_copy(whole, [name for name in whole if name != "hydra"])
    with suppress(FileNotFoundError):
        record = (folder / hydra.output_subdir / _RECORD[0]).read_text(encoding="utf-8")
        if record != OmegaConf.to_yaml(task):
            raise ConfigError(
                f"'{folder}' exists already and belongs to another run.",
                "Choose another path, or give overwrite=true.",
                place=key,
            )


def _results(folder: Path) -> Iterator[Path]:
    """Yield files that are neither hidden nor logs."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.startswith(".") and (path.suffix != ".log" or path.is_dir()):
            yield path


def _is_record(folder: Path) -> bool:
    """Return whether a folder has only Hydra's files of one of our runs."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != set(_RECORD):
        return False
    settings = folder / "hydra.yaml"
    return _names_fusion_bench(settings) and settings.read_text(encoding="utf-8").startswith(
        "hydra:"
    )


def _names_fusion_bench(path: Path) -> bool:
    with suppress(OSError, ValueError):
        return "fusion_bench" in path.read_text(encoding="utf-8")
    return False


# At once: where a job runs in another process, this module comes along.
utils.configure_log = configure_log
