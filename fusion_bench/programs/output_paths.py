"""The output paths of a run, and what may be replaced there."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fusion_bench.command import typed
from fusion_bench.companions import ADAPTER_FILES, KNOWN, TEMPLATES
from fusion_bench.problems import ConfigError, Place, did_you_mean, within
from fusion_bench.programs.environment import config_sha256
from fusion_bench.resolving import yaml_of
from fusion_bench.storage import check_unclaimed, claimed, write_text

#: What a saved model's directory holds, beside weights and chat templates. Where there is anything
#: else it is not replaced.
_MODEL_FILES = (*KNOWN, *ADAPTER_FILES, "ensemble.json", "README.md")
_WEIGHTS = (".safetensors", ".safetensors.index.json")

#: Bytes of a name, beside which there are others that begin with it.
_LONGEST_NAME = 220
#: What a run writes into its output directory.
_REPORT_FILES = (
    "config.yaml",
    "report.md",
    "report.html",
    "report.scores.safetensors",
    "report.answers.safetensors",  # of earlier versions
    "report.json",
)


#: These verbs have a flag of their own in place of the config key.
_VERBS = ("merge", "extract-lora")


def _overwriting() -> str:
    """Return what is to be typed for another run's output to be replaced."""
    return "--overwrite" if typed()[1:2] and typed()[1] in _VERBS else "overwrite=true"


class OutputPaths:
    """The output paths of a run.

    Args:
        config: the run's config.
        output_dir: the directory for the report and its companion files.
        overwrite: whether another run's output may be replaced.

    Attributes:
        report_path: an extra path for the report.
        model_path: the merged model's directory.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        output_dir: Path | None,
        overwrite: bool,
    ):
        self.output_dir = output_dir
        self.report_path: Path | None = None
        self.model_path: Path | None = None
        self._overwrite = overwrite
        self._run = config_sha256(config)
        self._config = config

    def put_report(self, path: str | None) -> None:
        """Set the path from ``report_save_path``; ``{log_dir}`` in it is ``output_dir``.

        Raises:
            ConfigError: it can be no such path.
        """
        if path is not None and not path.endswith(".json"):
            raise ConfigError(f"'{path}' does not end in '.json'.", place=("report_save_path",))
        self.report_path = self._path("report_save_path", path)

    def put_model(self, path: str | None) -> None:
        """Set the path from ``merged_model_save_path``, with the same placeholder.

        Raises:
            ConfigError: it can be no such path.
        """
        self.model_path = self._path("merged_model_save_path", path)
        if self.model_path is not None and self.report_path in (
            self.model_path,
            *self.model_path.parents,
        ):
            raise ConfigError(
                f"'{self.report_path}' is the path of the report.",
                "Choose another path.",
                place=("merged_model_save_path",),
            )

    @property
    def reports(self) -> list[Path]:
        """All paths of the report's JSON."""
        own = None if self.output_dir is None else self.output_dir / "report.json"
        return [path for path in (own, self.report_path) if path is not None]

    def check_reports(self, *, done: bool = False) -> None:
        """Refuse to replace another run's report.

        This run's own report in the output directory is written again.

        Args:
            done: whether the run's own report was found and is reused.

        Raises:
            ConfigError: there is one, and ``overwrite`` does not allow to replace it.
        """
        named = self.report_path
        if named is not None and named.is_dir():
            raise ConfigError(
                f"'{named}' is a directory, but a file will be written there.",
                "Choose another path.",
                place=("report_save_path",),
            )
        if self._overwrite:
            return
        if named is not None and named.exists() and not (done and _config_of(named) == self._run):
            raise self._refusal(("report_save_path",), named)
        if self.output_dir is not None and not self._is_ours(self.output_dir):
            raise self._refusal(("hydra", "run", "dir"), self.output_dir)

    def _is_ours(self, directory: Path) -> bool:
        """Return whether the output directory belongs to this run."""
        if not any((directory / name).exists() for name in _REPORT_FILES):
            return True
        if _config_of(directory / "report.json") == self._run:
            return True
        if _config_of(directory / "report.json") is not None:
            return False
        with suppress(
            OSError, ValueError
        ):  # it is written first, and so tells whose the others are
            return (directory / "config.yaml").read_text(encoding="utf-8") == yaml_of(self._config)
        return False

    @staticmethod
    def _refusal(key: Place, path: Path) -> ConfigError:
        return ConfigError(
            f"'{path}' exists already and belongs to another run.",
            f"Choose another path, or give {_overwriting()}.",
            place=key,
        )

    def check_model(self, *, done: bool = False) -> None:
        """Refuse to replace another run's model, or anything that is not a model.

        An unfinished model of this run is replaced.

        Args:
            done: as above.

        Raises:
            ConfigError: there is one, and ``overwrite`` does not allow to replace it or it is
                nothing that a run could have left.
        """
        if self.model_path is None or not self.model_path.exists() or done:
            return
        key = ("merged_model_save_path",)
        if not (self._overwrite or self._was_left_unfinished()):
            raise ConfigError(
                f"'{self.model_path}' exists already.",
                f"Choose another path, or give {_overwriting()}.",
                place=key,
            )
        if (foreign := _foreign(self.model_path)) is not None:
            raise ConfigError(
                f"'{self.model_path}' is not replaced: '{foreign}' is not part of a saved model.",
                "Choose another path.",
                place=key,
            )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock all these paths against other runs.

        Raises:
            EnvironmentProblem: another run holds one of them.
        """
        with ExitStack() as claims:
            for path, key, inside in self._claims():
                claims.enter_context(claimed(path, key, inside=inside))
            yield

    def check_unclaimed(self) -> None:
        """Check that no other run has locked one of them.

        Raises:
            EnvironmentProblem: likewise.
        """
        for path, key, inside in self._claims():
            check_unclaimed(path, key, inside=inside)

    def _claims(self) -> Iterator[tuple[Path, Place, bool]]:
        places = (
            (self.output_dir, ("hydra", "run", "dir")),
            (self.report_path, ("report_save_path",)),
            (self.model_path, ("merged_model_save_path",)),
        )
        claimed_too = {self.output_dir, self.model_path}
        for path, key in places:
            # What lies in another of them is held with it.
            if path is not None and not claimed_too & set(path.parents):
                yield path, key, path == self.output_dir

    def begin_model(self) -> None:
        """Mark the model's directory as unfinished, in a file next to it."""
        if self.model_path is not None:
            write_text(self._note(self.model_path), self._run)

    def finished(self) -> None:
        """Remove the mark: the model is finished."""
        if self.model_path is not None:
            self._note(self.model_path).unlink(missing_ok=True)

    def _was_left_unfinished(self) -> bool:
        assert self.model_path is not None
        with suppress(OSError):
            return self._note(self.model_path).read_text(encoding="utf-8") == self._run
        return False

    @staticmethod
    def _note(model_path: Path) -> Path:
        return model_path.with_name(f".{model_path.name}.unfinished")

    def _path(self, key: str, path: str | None) -> Path | None:
        if path is None:
            return None
        with within(key):
            for placeholder in re.findall(r"\{(\w*)\}", path):
                if placeholder != "log_dir":
                    hint = did_you_mean(placeholder, ["log_dir"])
                    raise ConfigError(f"'{{{placeholder}}}' is unknown.", hint)
            if "{log_dir}" in path and self.output_dir is None:
                raise ConfigError("'{log_dir}' needs an output_dir.")
            if not path or "\0" in path or _names_no_file(path):
                raise ConfigError(f"'{path}' is not a valid path.", "Choose another.")
            place = Path(path.replace("{log_dir}", str(self.output_dir))).expanduser().absolute()
            if not place.name:
                raise ConfigError(f"'{path}' is the root of the file system.", "Choose another.")
            return place


def _names_no_file(path: str) -> bool:
    try:
        return any(len(part.encode()) > _LONGEST_NAME for part in Path(path).parts)
    except UnicodeEncodeError:  # a report could not tell of it
        return True


def _config_of(report: Path) -> str | None:
    """Return the hash of a report's config; ``None`` without a report."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return str(json.loads(report.read_text(encoding="utf-8"))["run"]["config_sha256"])
    return None


def _foreign(path: Path) -> str | None:
    """Return a file that is not part of a saved model; ``None`` for a model's directory."""
    if path.is_symlink() or not path.is_dir():
        return path.name
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            if (inner := _foreign(entry)) is not None:
                return f"{entry.name}/{inner}"
        elif not is_part(entry):
            return entry.name
    return None


def is_part(file: Path) -> bool:
    """Return whether a file belongs to a saved model."""
    if file.name in _MODEL_FILES or file.name.endswith(_WEIGHTS):
        return True
    return file.suffix == ".jinja" and file.parent.name == TEMPLATES
