"""Sends the figures of a run to Lightning's loggers, as ``fabric.loggers`` names them."""

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger, Logger

from fusion_bench.instantiate import check
from fusion_bench.problems import ConfigError, Place, Problems, key_of
from fusion_bench.programs.spec import LOG_DIR, Section, plain
from fusion_bench.report import Report, markdown
from fusion_bench.storage import write_text
from fusion_bench.trust import find

log = logging.getLogger(__name__)

#: The packages of which a logger needs one, and what to install.
_PACKAGES = {
    "TensorBoardLogger": (("tensorboardX", "tensorboard"), "tensorboardX"),
    "MLFlowLogger": (("mlflow",), "fusion_bench[mlflow]"),
    "WandbLogger": (("wandb",), "fusion_bench[wandb]"),
}
#: What a logger of files replaces where it finds it.
_REPLACED = ("metrics.csv", "hparams.yaml")
#: What the last report was sent to, in the run's directory.
_RECORD = ".tracked"


@dataclass(frozen=True)
class Named:
    """A logger of the config.

    Attributes:
        name: of its class.
        place: in the config.
        make: returns it; that of MLflow opens its database.
    """

    name: str
    place: Place
    make: Callable[[], Logger]


@dataclass(frozen=True)
class Tracker:
    """Where the figures of a run go.

    Attributes:
        loggers: of the config.
        output_dir: of the run.
        overwrite: whether another run's files may be replaced.
    """

    loggers: Sequence[Named]
    output_dir: Path | None = None
    overwrite: bool = False

    @classmethod
    def of(cls, section: Section, output_dir: Path | None, overwrite: bool) -> "Tracker":
        """Return the loggers of a section ``fabric``; their packages must be there.

        Args:
            section: Fabric's node, or Fabric itself, whose loggers are taken.
            output_dir: of the run; a logger whose node names no directory writes there.
            overwrite: whether another run's files may be replaced.

        Raises:
            ConfigError: a node that is no logger, or whose package is not installed.
        """
        place: Place = ("fabric", "loggers")
        node = plain(section)
        named: object = node.get("loggers") if isinstance(node, Mapping) else None
        if isinstance(section, Fabric):
            named = list(section.loggers)
        found, problems = [], Problems()
        for index, logger in enumerate(named if isinstance(named, list) else [named]):
            own = (*place, index) if isinstance(named, list) else place
            with problems.collect(*own):
                if logger is not None:
                    found.append(_named(logger, own, output_dir))
        problems.raise_all()
        return cls(found, output_dir, overwrite)

    def check(self) -> None:
        """Make what writes nothing yet, and refuse to replace the files of another run.

        Raises:
            ConfigError: there are some, and ``overwrite`` does not allow it; or a logger does not
                take its arguments.
        """
        problems = Problems()
        for logger in self.loggers:
            if logger.name != "MLFlowLogger":
                with problems.collect(*logger.place):
                    self._refuse_other(_made(logger))
        problems.raise_all()

    def track(self, report: Report) -> None:
        """Send a report to each logger; one that fails is a warning, for the work is done.

        A report that was sent is not sent again when its run is repeated.
        """
        sent = self._sent()
        for logger in self.loggers:
            about = f"{logger.place} {report.model_dump_json()}"
            mark = hashlib.sha256(about.encode()).hexdigest()
            if mark in sent:
                continue
            try:
                with _quiet():
                    made = logger.make()
                    self._refuse_other(made)
                    where = _send(made, report)
            except Exception as error:
                key, said = key_of(logger.place), " ".join(str(error).split())
                reason = f"{key}: {logger.name} failed: {said or type(error).__name__}"
                log.warning("%s. The report is complete.%s", reason.rstrip("."), self._remedy())
                continue
            log.info("%s: %s", logger.name, where)
            sent.append(mark)
            if self.output_dir is not None:
                with suppress(OSError):  # it would only be sent twice
                    write_text(self.output_dir / _RECORD, "".join(f"{mark}\n" for mark in sent))

    def _sent(self) -> list[str]:
        if self.output_dir is not None:
            with suppress(OSError):
                return (self.output_dir / _RECORD).read_text(encoding="utf-8").split()
        return []

    def _remedy(self) -> str:
        if self.output_dir is None:
            return ""
        return (
            f" To send it again, repeat the command with 'hydra.run.dir={self.output_dir}': "
            "nothing is computed again."
        )

    def _refuse_other(self, logger: Logger) -> None:
        """Refuse the directory of a logger that would replace what is there."""
        if self.overwrite or not isinstance(logger, CSVLogger):
            return
        directory = Path(logger.log_dir).expanduser().absolute()
        if self.output_dir is not None and directory.is_relative_to(self.output_dir):
            return
        for name in _REPLACED:
            if os.path.lexists(directory / name):
                raise ConfigError(
                    f"'{directory}' holds '{name}' of another run.",
                    "Choose another directory or version, or give overwrite=true.",
                )


def _named(node: object, place: Place, output_dir: Path | None) -> Named:
    """Return the logger of a node, with our defaults where it leaves something open."""
    if isinstance(node, Logger):
        return Named(type(node).__name__, place, lambda: node)
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(
            f"'{node}' is not a logger.",
            "Give a node, such as '_target_: lightning.fabric.loggers.CSVLogger'.",
        )
    target = str(node["_target_"])
    name = target.rpartition(".")[2]
    packages, install = _PACKAGES.get(name, ((), ""))
    if packages and not any(map(find_spec, packages)):
        raise ConfigError(
            f"{name} needs '{packages[0]}', which is not installed.",
            f"Run 'pip install \"{install}\"'.",
        )
    given = {
        str(key): _placed(value, output_dir)
        for key, value in node.items()
        if value is not None or key == "name"
    }
    arguments = {**_defaults(target, given, output_dir), **given}
    needed = {key: arguments[key] for key in _directory_key(target) if key in arguments}
    check({**needed, **given})
    if name == "WandbLogger":
        _check_login(given)
    function = find(target)
    keys = [key for key in arguments if not key.startswith("_")]
    return Named(name, place, lambda: function(**{key: arguments[key] for key in keys}))


def _made(logger: Named) -> Logger:
    """Make a logger.

    Raises:
        ConfigError: what it does not take.
    """
    try:
        made = logger.make()
    except Exception as error:  # of somebody else's library
        raise ConfigError(f"{logger.name}: {' '.join(str(error).split())}") from error
    if not isinstance(made, Logger):
        raise ConfigError(f"{logger.name} is not a logger of Lightning.", place=("_target_",))
    return made


def _placed(value: object, output_dir: Path | None) -> object:
    """Return a value with ``{log_dir}`` in it replaced by the run's directory."""
    if not isinstance(value, str) or LOG_DIR not in value:
        return value
    if output_dir is None:
        raise ConfigError(f"'{LOG_DIR}' needs an output_dir.")
    return value.replace(LOG_DIR, str(output_dir))


def _directory_key(target: str) -> tuple[str, ...]:
    """Return the argument by which a logger of files takes its directory, if it is one."""
    if not target.endswith((".TensorBoardLogger", ".CSVLogger")):
        return ()
    return ("root_dir",) if target.startswith("lightning.fabric.") else ("save_dir",)


def _defaults(
    target: str, given: Mapping[str, object], output_dir: Path | None
) -> dict[str, object]:
    """Return the arguments that a node leaves open; the runs of a sweep are grouped."""
    if key := _directory_key(target):  # beside the report, unless the node says where
        there = given.keys() & set(key) or output_dir is None
        return {} if there else {key[0]: str(output_dir), "name": "", "version": ""}
    sweep, run = _names(output_dir)
    found: dict[str, object] = {}
    if target.endswith(".WandbLogger"):
        found = {"name": run, "group": sweep, "save_dir": output_dir}
        found["project"] = os.environ.get("WANDB_PROJECT", "fusion_bench")
        found["settings"] = {"silent": True, "console": "off"}
        found["mode"] = "offline" if given.get("offline") else None
    elif target.endswith(".MLFlowLogger"):
        found = {"experiment_name": "fusion_bench", "run_name": run}
        found["tags"] = {"sweep": sweep} if sweep else None
        found["tracking_uri"] = os.environ.get("MLFLOW_TRACKING_URI")
        if not (found["tracking_uri"] or given.get("tracking_uri")):
            folder = Path(str(given.get("save_dir", "."))).expanduser().absolute()
            found["tracking_uri"] = f"sqlite:///{folder / 'mlflow.db'}"
            found["artifact_location"] = str(folder / "mlruns")
    return {key: value for key, value in found.items() if value is not None}


def _names(output_dir: Path | None) -> tuple[str | None, str | None]:
    """Return the name of the sweep, if this run belongs to one, and of the run."""
    run = None if output_dir is None else output_dir.name
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None, run
    return Path(HydraConfig.get().sweep.dir).name, run


def _check_login(node: Mapping[str, object]) -> None:
    """Refuse Weights & Biases without a key, which it would ask for when all is done.

    Raises:
        ConfigError: there is none.
    """
    mode = node.get("mode") or os.environ.get("WANDB_MODE", "online")
    if node.get("offline") or mode in ("offline", "disabled", "dryrun"):
        return
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "not logged in to Weights & Biases.",
            "Run 'wandb login', or set WANDB_API_KEY, or WANDB_MODE=offline.",
        )


def figures(report: Report) -> dict[str, float]:
    """Return a report's values by name: ``model/task/metric``, as fractions where in percent."""
    return dict(_figures(report))


def _figures(report: Report) -> Iterator[tuple[str, float]]:
    for name, model in report.models.items():
        for task, result in model.tasks.items():
            for metric, value in result.metrics.items():
                yield f"{name}/{task}/{metric}", value.value
            if result.main.normalized is not None:
                yield f"{name}/{task}/normalized", result.main.normalized
        if model.average is not None:
            for metric, value in model.average.metrics.items():
                yield f"{name}/average/{metric}", value.value
            if model.average.normalized is not None:
                yield f"{name}/average/normalized", model.average.normalized
    for step, seconds in report.run.seconds.model_dump().items():
        yield f"seconds/{step}", seconds


def _options(report: Report) -> dict[str, Any]:
    """Return what the run was given, by which a dashboard sorts."""
    method = report.run.search.method if report.run.search else report.run.config.get("method")
    run = report.run
    shown = {"seed": run.seed, "precision": run.precision, "device": run.device}
    return {"method": method, "models": ", ".join(run.inputs), "version": run.version, **shown}


def _send(logger: Any, report: Report) -> str:
    """Send a report to one logger; return where it can be seen."""
    name = type(logger).__name__
    with suppress(NotImplementedError):  # CSV in Fabric has figures alone
        logger.log_hyperparams(_options(report))
    logger.log_metrics(figures(report), step=0)
    artifact = _ARTIFACTS.get(name)
    where = artifact(logger.experiment, logger, report) if artifact else None
    logger.finalize("success")
    if name == "WandbLogger":
        logger.experiment.finish()  # else a sweep's next job would be written into this one
    return where or str(Path(logger.log_dir or "."))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the libraries tell of what they create."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch.loggers", "mlflow")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory .* exists")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _into_tensorboard(experiment: Any, logger: Logger, report: Report) -> None:
    experiment.add_text("report", markdown(report), 0)


def _into_mlflow(experiment: Any, logger: Any, report: Report) -> str:
    experiment.log_text(logger.run_id, report.model_dump_json(indent=2), "report.json")
    experiment.log_text(logger.run_id, markdown(report), "report.md")
    return f"run {logger.run_id} of experiment {logger.experiment_id}"


def _into_wandb(experiment: Any, logger: Logger, report: Report) -> str | None:
    import wandb

    artifact = wandb.Artifact(f"report-{experiment.id}", type="report")
    for name, text in (
        ("report.json", report.model_dump_json(indent=2)),
        ("report.md", markdown(report)),
    ):
        with artifact.new_file(name, encoding="utf-8") as file:
            file.write(text)
    experiment.log_artifact(artifact)
    return str(experiment.dir if experiment.offline else experiment.url)


#: How a report is put beside the figures, by the logger's name.
_ARTIFACTS: Mapping[str, Callable[[Any, Any, Report], str | None]] = {
    "TensorBoardLogger": _into_tensorboard,
    "MLFlowLogger": _into_mlflow,
    "WandbLogger": _into_wandb,
}
