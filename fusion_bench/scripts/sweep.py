"""The parts of a sweep around its jobs: directories, failures and the leaderboard."""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fusion_bench import precheck
from fusion_bench.problems import (
    ConfigError,
    EnvironmentProblem,
    FusionBenchError,
    Place,
    Problems,
)
from fusion_bench.progress import kept, step
from fusion_bench.scripts.folder import check_folder
from fusion_bench.scripts.tally import Tally
from fusion_bench.shown import Stream, message
from fusion_bench.storage import claimed, write_text
from fusion_bench.trust import environment_variable

log = logging.getLogger(__name__)

T = TypeVar("T")

_RECORD = "job.json"
_LONGEST_NAME = 100
#: Each is composed on its own, which takes a good while for so many.
_MOST_JOBS = 100_000
#: Strategies that have their processes at once; any other runs the command line again for each.
_FORKS = re.compile("auto|dp|.*_(fork|spawn|notebook)")
#: The launchers' packages, and what of ours brings them.
_EXTRAS = {
    "hydra_joblib_launcher": "joblib",
    "hydra_submitit_launcher": "slurm",
    "hydra_ray_launcher": "ray",
}


@dataclass(frozen=True)
class Failed:
    """The return value of a failed job, so the others continue."""

    message: str


@dataclass(frozen=True)
class Record:
    """The record of a job in its directory, next to its report.

    Attributes:
        sweep: the id of one start of a sweep.
        number: the job's index in the sweep.
        overrides: the swept overrides, which form its name.
        error: the error of a failed job.
    """

    sweep: str
    number: int
    overrides: list[str]
    error: str | None = None

    @property
    def name(self) -> str:
        """What people read."""
        return " ".join(self.overrides) or f"job {self.number}"


def exit_with_error(error: FusionBenchError) -> NoReturn:
    """End the process from a callback, where Hydra turns exceptions into warnings."""
    print(f"fusion_bench: {message(str(error))}", file=sys.stderr)
    sys.exit(error.exit_code)


def attempt(
    work: Callable[[DictConfig], T], config: DictConfig, explain: Callable[[Exception], str]
) -> T | Failed:
    """Run one job of a sweep; its output and errors go to its log."""
    hydra = HydraConfig.get()
    # In another process than the sweep's the terminal is not the job's.
    with _into_log(hydra), step(f"job {hydra.job.num + 1}", on_screen=False):
        try:
            check_strategy(config.get("fabric"))
            return work(config)
        except FusionBenchError as error:
            log.error("%s", error)
            return Failed(str(error))
        except Exception as error:
            log.error("%s", traceback.format_exc())
            return Failed(explain(error))


#: What stands for a value that is not known yet.
_OPEN = object()


@contextmanager
def killed_workers() -> Iterator[None]:
    """Report a killed worker process of a launcher in one line.

    Raises:
        EnvironmentProblem: that is so.
    """
    try:
        yield
    except BrokenExecutor as error:
        raise EnvironmentProblem(
            "A process of the sweep was ended from outside, maybe because memory ran out. Start "
            "the same command again to resume, with fewer jobs at once (hydra.launcher.n_jobs)."
        ) from error


def _without_open(value: Any) -> Any:
    """Return a config without what is only known later: interpolations and missing values."""
    if isinstance(value, dict):
        plain = {key: _without_open(own) for key, own in value.items() if key != "hydra"}
        return {key: own for key, own in plain.items() if own is not _OPEN}
    if isinstance(value, list):
        return [_without_open(own) for own in value]
    return _OPEN if isinstance(value, str) and ("${" in value or value == "???") else value


@contextmanager
def _into_log(hydra: HydraConf) -> Iterator[None]:
    """Send a job's output to its log; warnings also go to the console."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.ERROR + 1)
    path = Path(hydra.runtime.output_dir) / f"{hydra.job.name}.log"
    with Stream(path.open("ab"), "utf-8", by_line=True) as file, redirect_stdout(file):
        yield


class SweepCallback(Callback):
    """Gives a sweep its directory and ends it with a leaderboard.

    It is pickled and sent to each job.
    """

    def __init__(self) -> None:
        self._sweep = uuid4().hex
        self._begun = 0.0
        self._process = os.getpid()
        self._tally = Tally()
        self._claim, self._shown = ExitStack(), ExitStack()

    def __getstate__(self) -> dict[str, object]:
        """Return the state to pickle; the lock and the line of progress stay with the sweep."""
        held = ("_claim", "_shown")
        return {name: value for name, value in vars(self).items() if name not in held}

    def count(self, jobs: int) -> None:
        """Take note of the number of jobs, where the sweeper knows it."""
        self._tally.total = jobs

    def on_run_start(self, config: DictConfig, **kwargs: object) -> None:
        """Create the run's directory, or report the problem."""
        try:
            _make(Path(config.hydra.run.dir), ("hydra", "run", "dir"))
        except FusionBenchError as error:
            exit_with_error(error)

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Set the jobs' directories, unless the user does, and refuse invalid sweeps."""
        try:
            known = _without_open(OmegaConf.to_container(config, resolve=False))
            if known.get("merged_model_save_kwargs") is None:  # a key of FusionBench's
                known.pop("merged_model_save_kwargs", None)
            Problems(precheck.problems(known)).raise_all()
            check_strategy(config.get("fabric"))
            _check_launcher(config)
            jobs = check_grid(config)
        except FusionBenchError as error:
            exit_with_error(error)
        parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        given = [
            str(override.input_line) for override in parsed if not override.is_sweep_override()
        ]
        swept = [o.get_key_element().lstrip("+") for o in parsed if o.is_sweep_override()]
        swept += OmegaConf.select(config, "hydra.sweeper.params") or {}
        if OmegaConf.is_missing(config.hydra.sweep, "dir"):
            sources = [source.path for source in config.hydra.runtime.config_sources]
            # What stands in the files counts too: another config's reports are not replaced.
            whole: Any = OmegaConf.to_container(config, resolve=False)
            del whole["hydra"]
            about = [sources, config.hydra.job.config_name, sorted(given), sorted(swept), whole]
            config.hydra.sweep.dir = _sweep_directory(str(about[1]), swept, about)
        # Absolute, for a job may run in another directory.
        directory = Path(config.hydra.sweep.dir).absolute()
        self._set(config, "hydra.sweep.dir", str(directory))
        try:
            place = ("hydra", "sweep", "dir")
            check_folder(directory, place)
            _make(directory, place)
            self._claim.enter_context(claimed(directory, place, inside=True))
        except FusionBenchError as error:
            exit_with_error(error)
        self._tally.begin(directory, jobs)
        self._shown.enter_context(kept(self._tally.what_is_kept))
        say = partial(print, file=sys.stdout, flush=True)  # that of the jobs is their log
        self._shown.enter_context(step("Sweep", unit="jobs", measure=self._tally.onto, tell=say))
        write_text(directory / "multirun.yaml", OmegaConf.to_yaml(config))  # whose it is
        # A job is called by what is its own.
        common = [o.get_key_element().lstrip("+") for o in parsed if not o.is_sweep_override()]
        key = "hydra.job.config.override_dirname.exclude_keys"
        self._set(config, key, [*OmegaConf.select(config, key), *common])

    def on_job_start(self, config: DictConfig, **kwargs: object) -> None:
        """Record the job's start time, to recognise an older report."""
        self._begun = time.time()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: object) -> None:
        """Write the job's record, and print its result on the console."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        job = config.hydra.job
        result = job_return._return_value
        record = Record(
            self._sweep,
            job.num,
            own_overrides(config.hydra.overrides.task, job.config.override_dirname.exclude_keys),
            str(result.message if isinstance(result, Failed) else result)
            if isinstance(result, Failed | Exception)
            else None,
        )
        directory = Path(config.hydra.runtime.output_dir)
        write_text(directory / _RECORD, json.dumps(asdict(record), indent=2) + "\n")
        line, known = _line(record, directory, self._begun)
        self._tally.add(known=known)
        line = f"{line} ({self._tally.text(time.time())})"
        if os.getpid() != self._process and sys.stdout.isatty():  # where the sweep has its line
            line = "\r" + line.ljust(shutil.get_terminal_size().columns - 1)
        print(line, flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Write and print the leaderboard; the process fails where a job did."""
        with self._claim:
            self._shown.close()
            self._tally.end()
            self._end(config)

    def _end(self, config: DictConfig) -> None:
        directory = Path(config.hydra.sweep.dir).absolute()
        jobs = self._jobs(directory)
        failed = {path: job.error for path, job in jobs.items() if job.error is not None}
        try:
            _leaderboard(directory.name, directory, jobs)
        except Exception as error:  # Hydra would make a warning of it
            log.error("%s", traceback.format_exc())
            sys.exit(f"fusion_bench: no leaderboard: {error}")
        if failed:
            sys.exit(f"fusion_bench: {len(failed)} of {len(jobs)} jobs failed.")

    def _jobs(self, directory: Path) -> dict[Path, Record]:
        """Return the jobs of this sweep, by their directories, in the order of their numbers."""
        found = {}
        for path in directory.rglob(_RECORD):
            record = Record(**json.loads(path.read_text(encoding="utf-8")))
            if record.sweep == self._sweep:
                found[path.parent] = record
        return dict(sorted(found.items(), key=lambda job: job[1].number))

    @staticmethod
    def _set(config: DictConfig, key: str, value: object) -> None:
        """Set a key of Hydra's own, for this process and for each job."""
        OmegaConf.update(config, key, value)
        config.hydra.overrides.hydra.append(f"{key}={json.dumps(value)}")


def check_strategy(fabric: Mapping[str, object] | None) -> None:
    """Refuse strategies whose processes would each start the sweep again.

    Raises:
        FusionBenchError: a strategy of that kind, or a sweep under torchrun.
    """
    settings = fabric or {}
    strategy = settings.get("strategy", "auto")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise FusionBenchError(
            "A sweep under torchrun would run once in each of its processes. Start the jobs one "
            "by one, or let a launcher start them: 'hydra/launcher=submitit_slurm'."
        )
    one = settings.get("devices", 1) in (1, "1") and settings.get("num_nodes", 1) == 1
    started = "SLURM_NTASKS" in os.environ  # by SLURM, all of them
    if isinstance(strategy, str) and not (one or started or _FORKS.fullmatch(strategy)):
        raise FusionBenchError(
            f"'{strategy}' runs the command line again for each device, and each process would "
            "start its own sweep.",
            "Set fabric.strategy=ddp_spawn, or use one device per job and a launcher.",
            place=("fabric", "strategy"),
        )


def _make(directory: Path, key: Place) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"'{directory}' cannot be created: {error.strerror}.",
            "Choose another directory.",
            place=key,
        ) from error


def check_grid(config: DictConfig) -> int | None:
    """Check the number of jobs of a grid before they are listed; return it.

    Some of them may turn out to be the same. Of other sweepers it is the number of trials, if any.

    Raises:
        ConfigError: there are none, or too many.
    """
    if "GridSweeper" not in (target := config.hydra.sweeper._target_) and "Basic" not in target:
        trials = OmegaConf.select(config, "hydra.sweeper.n_trials")
        return trials if isinstance(trials, int) else None
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    words = [f"{key}={value}" for key, value in params.items()]
    jobs = 1
    for override in OverridesParser.create().parse_overrides(
        [*words, *config.hydra.overrides.task]
    ):
        if override.is_sweep_override():
            jobs *= _count(override)
    if jobs > _MOST_JOBS:
        raise ConfigError(f"A sweep of {jobs:,} jobs: more than {_MOST_JOBS:,}. List fewer values.")
    return jobs


def _count(override: Override) -> int:
    """Return the number of listed values; patterns are expanded later."""
    values = override.value()
    if isinstance(values, IntervalSweep):
        raise ConfigError(
            f"'{override.input_line}': a grid needs single values. Write range(start,stop,step), "
            "or search with 'hydra/sweeper=optuna'."
        )
    if isinstance(values, ChoiceSweep):
        count = len(values.list)
    elif isinstance(values, RangeSweep):
        if not values.step:
            raise ConfigError(f"'{override.input_line}': its step is 0. Choose another step.")
        count = math.ceil(((values.stop or 0) - (values.start or 0)) / values.step)
    else:
        return 1
    if count < 1:
        raise ConfigError(f"'{override.input_line}': has no value. Add at least one.")
    return count


def _check_launcher(config: DictConfig) -> None:
    """Refuse a launcher that is not installed."""
    target = str(config.hydra.launcher._target_)
    package = target.split(".")[1] if target.startswith("hydra_plugins.") else ""
    if package in _EXTRAS and find_spec(f"hydra_plugins.{package}") is None:
        raise FusionBenchError(
            f"hydra/launcher={config.hydra.runtime.choices['hydra/launcher']}: not installed. "
            f"Run 'pip install \"fusion_bench[{_EXTRAS[package]}]\"'."
        )


def own_overrides(overrides: Sequence[str], common: Sequence[str]) -> list[str]:
    """Return a job's own overrides, without Hydra's plus signs."""
    plain = [override.lstrip("+") for override in overrides]
    return [override for override in plain if override.partition("=")[0] not in common]


def directory_name(text: str) -> str:
    """Return a readable and unique directory name for a text."""
    plain = re.sub(r"[^\w.=,+-]+", "_", text, flags=re.ASCII).strip("._")[:_LONGEST_NAME]
    if plain and plain == text == text.lower():
        return plain
    return f"{plain or 'job'}-{_hash(text)}"


def _sweep_directory(config_name: str, swept: Sequence[str], about: object) -> str:
    keys = [key.rpartition(".")[2] for key in swept]
    name = directory_name("-".join([config_name.rpartition("/")[2], *keys])[:_LONGEST_NAME])
    return f"multirun/{name}-{_hash(json.dumps(about, default=str))}"


def _job_directory(overrides: Sequence[str], common: Sequence[str]) -> str:
    own = sorted(own_overrides(overrides, common), key=lambda o: o.partition("="))
    return directory_name(",".join(own))


def _cores_by(number: int) -> int:
    """Return the number of parallel jobs for a number of cores per job."""
    return max(1, (os.cpu_count() or 1) // number)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _line(record: Record, directory: Path, begun: float) -> tuple[str, bool]:
    """Return the result of a job in one line, and whether it was known before the job."""
    if record.error is not None:
        return f"{record.name}: failed: {record.error.splitlines()[0]}", False
    if not (directory / "report.json").exists():
        return f"{record.name}: done", False
    from fusion_bench.report import Report, comparison
    from fusion_bench.report.figures import shown

    report = Report.load(directory / "report.json")
    cells: dict[str, str] = {}
    for row in comparison(report)[-1:]:
        common = report.main_metric
        if row.average is not None and common is not None:
            cells["average"] = shown(row.average.value, common.unit)
        if row.normalized is not None:
            cells["normalised"] = shown(row.normalized)
    if (search := report.run.search) is not None:
        cells["validation"] = shown(search.best.score, search.unit)
    figures = [f"{name} {value}" for name, value in cells.items()]
    # The report tells whole seconds.
    known = datetime.fromisoformat(report.run.created_at).timestamp() + 1 <= begun
    figures.append("done before" if known else f"{report.run.seconds.total:.1f} s")
    return f"{record.name}: {', '.join(figures)}", known


def _leaderboard(name: str, directory: Path, jobs: Mapping[Path, Record]) -> None:
    """Write and print the leaderboard of the jobs that have evaluated something."""
    from fusion_bench.report import Report, Scores
    from fusion_bench.report.leaderboard import Failure, Job, leaderboard
    from fusion_bench.report.leaderboard_files import print_leaderboard, save
    from fusion_bench.report.table import wide_console

    finished, failures = [], []
    for path, job in jobs.items():
        place, report = path.relative_to(directory).as_posix(), path / "report.json"
        if job.error is not None:
            failures.append(Failure(name=job.name, directory=place, message=job.error))
        elif report.exists() and (found := Report.load(report)).tasks:
            finished.append(Job(place, job.overrides, found, Scores.load(report, found)))
    if not finished and not failures:
        log.info("Nothing was evaluated, so there is no leaderboard.")
        return
    board = leaderboard(name, finished, failures)
    save(board, directory)
    print_leaderboard(board, wide_console())
    log.info("Leaderboard: %s", directory / "leaderboard.html")


# Where a job runs elsewhere this module comes along, and with it what the config needs.
OmegaConf.register_new_resolver("oc.env", environment_variable, replace=True)
OmegaConf.register_new_resolver("fusion_bench.cores_by", _cores_by, replace=True)
OmegaConf.register_new_resolver("fusion_bench.job_directory", _job_directory, replace=True)
