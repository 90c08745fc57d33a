"""Composes a config with Hydra and runs the program that it names."""

import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from fusion_bench import precheck
from fusion_bench.catalog import GROUPS, KINDS, suggestion
from fusion_bench.command import file_as_options, option, replaced
from fusion_bench.configs import CONFIG_DIR
from fusion_bench.instantiate import SharedObjects, accepts, instantiate
from fusion_bench.problems import (
    FusionBenchError,
    Problem,
    Problems,
    chain,
    did_you_mean,
)
from fusion_bench.recipes import told_in_recipe
from fusion_bench.redact import secret_keys
from fusion_bench.resolving import to_container, yaml_of
from fusion_bench.scripts.hydra_version import check_hydra
from fusion_bench.scripts.process import closed_stdin, plain_messages, unexpected
from fusion_bench.scripts.recipes import refuse_recipe, take_recipe
from fusion_bench.scripts.sweep import Failed, attempt, killed_workers
from fusion_bench.scripts.words import choice, models
from fusion_bench.shown import colour, set_up_streams
from fusion_bench.storage import disk_failures
from fusion_bench.trust import config_folders

log = logging.getLogger(__name__)

#: What every config may be given on the command line, whether or not its YAML has the key.
_PROGRAM_KEY = re.compile(
    r"((method|modelpool|taskpool|fabric|search)(?=={)|recipe|seed|baselines|report_save_path|merged_model_save_path|overwrite|allow_test_split|similarity|fast_dev_run|dry_run|"
    r"method\.(base_method\.)*(show_pbar|inplace|where)|fabric\.\w+(\.\w+)*|path\.\w+|print_config|print_function_call|search\.space\.\w+|method\.(base_method\.)*(options|methods)(\.\w+)?|modelpool\.(models|policy|(train|val|test)_datasets)\.[\w-]+|modelpool\.max_shard_size|"
    r"taskpool\.(cache|cache_size|max_samples|per_class|save_predictions|compile|tasks\.[\w-]+\.\w+))="
)
#: Of a method's options its YAML may have but some; the class itself refuses those it lacks. In a
#: sweep an option goes to those methods alone whose YAML has it.
_OPTION = re.compile(r"method(\.\w[\w-]*)+=")
#: Exceptions whose message is enough.
EXPECTED = (FusionBenchError, HydraException, OmegaConfBaseException, YAMLError)
_PATH_FLAGS = ("--config-path", "-cp")
_DIRECTORY_FLAGS = (*_PATH_FLAGS, "--config-dir", "-cd")


@runtime_checkable
class Scored(Protocol):
    """A result with a figure that a sweeper may maximise."""

    @property
    def objective(self) -> float | None:
        """The figure, if something was evaluated."""


def run_composed(words: Sequence[str], show_traceback: bool = False) -> None:
    """Compose a config from Hydra's options and overrides, and run the program that it names.

    Args:
        words: of the command line, without the name of the command.
        show_traceback: print the traceback of an error.

    Raises:
        SystemExit: an error, whose message is printed.
    """
    parts = SharedObjects()

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="fabric_model_fusion")
    def run(config: DictConfig) -> float | Failed | None:
        set_up_streams()  # again, for a job that is done in another process
        colour(logging.getLogger().handlers)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return attempt(partial(_run_program, parts=parts), config, explained)
        with plain_messages(show_traceback, explain), disk_failures():
            return _run_program(config, parts)

    with plain_messages(show_traceback, explain), killed_workers(), disk_failures():
        check_hydra()
        from fusion_bench.scripts.hydra_patches import set_up_hydra  # not before the check

        set_up_hydra()
        with closed_stdin(), replaced(_prepared(list(words))), _raising():
            run()


def composed_settings(words: Sequence[str]) -> dict[str, Any]:
    """Return the config that words of the command line stand for, resolved; nothing is run.

    Raises:
        SystemExit: an error, whose message is printed.
    """
    printed = io.StringIO()
    with redirect_stdout(printed):
        run_composed(file_as_options([*words, "--cfg", "job", "--resolve"]))
    settings = yaml.safe_load(printed.getvalue())
    take_recipe(settings)
    return dict(settings)


@contextmanager
def _raising() -> Iterator[None]:
    """Let Hydra raise, instead of printing and exiting."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]


def _prepared(words: list[str]) -> list[str]:
    """Return the command line for Hydra.

    A config directory may be relative to where the user is; Hydra's own reading is relative to
    this file. The program's keys need no ``++``.
    """
    prepared: list[str] = []
    own = {group: _own_names(group) for group in GROUPS.values()}
    swept = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(words))
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        follows_flag = position > 0 and words[position - 1] in _PATH_FLAGS
        if follows_flag:
            word = _directory(word)
        elif flag in _PATH_FLAGS and equals:
            word = f"{flag}={_directory(value)}"
        elif _PROGRAM_KEY.match(word) or (_OPTION.match(word) and not swept):
            word = f"++{word}"
        elif flag == "modelpool.models":
            *before, word = models(word)
            prepared += before
        elif (group := flag.lstrip("+").partition("@")[0]) in own:
            word = choice(word, own[group])
        prepared.append(word)
    return prepared


def _directory(name: str) -> str:
    path = Path(name).absolute()
    if not path.is_dir() and "://" not in name:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) if siblings else ""
        raise FusionBenchError(f"--config-path: there is no directory '{name}'. {hint}".rstrip())
    return str(path) if path.is_dir() else name


def _run_program(config: DictConfig, parts: SharedObjects) -> float | None:
    """Run the program; return the result's objective for a sweeper, if any."""
    settings = to_container(config, throw_on_missing=True)
    if not isinstance(settings, dict) or "_target_" not in settings:
        name = HydraConfig.get().job.config_name or ""
        directory, slash, file = name.rpartition("/")
        if isinstance(settings, dict) and {"merge_method", "slices"} & settings.keys():
            raise refuse_recipe(f"{name}.yaml")
        raise FusionBenchError(
            f"The config '{name}' has no program at its top level. "
            + (
                f"Give its directory: '--config-path …/{directory} --config-name {file}'."
                if slash
                else "Add '_target_: fusion_bench.programs.FabricModelFusionProgram'."
            )
        )
    result = run_settings(settings, HydraConfig.get().runtime.output_dir, parts)
    return result.objective if isinstance(result, Scored) else None


def run_settings(settings: dict[str, Any], output_dir: str | None, parts: SharedObjects) -> object:
    """Run the program of a resolved config; returns its result.

    Args:
        settings: the config, with the program's ``_target_``.
        output_dir: the directory for the report.
        parts: objects that are shared between runs of this process.

    Raises:
        FusionBenchError: with all problems of the config.
    """
    part = re.match(r"fusion_bench\.(method|modelpool|taskpool)\.", str(settings["_target_"]))
    if part is not None:
        raise FusionBenchError(
            f"This is a {part[1]}, not a whole config.",
            f"Put it below the key '{part[1]}:' of one, or the file into a folder '{part[1]}/'.",
        )
    secrets = secret_keys(settings)
    Problems(
        Problem((key,), "looks like a token, and configs are saved.") for key in secrets
    ).raise_all()
    _take_out_theirs(settings)
    places = take_recipe(settings)
    with told_in_recipe(places, "recipe"):
        return _run_settings(settings, output_dir, parts)


def _run_settings(settings: dict[str, Any], output_dir: str | None, parts: SharedObjects) -> object:
    # For a program without this key it was about the folder alone.
    looked_at = {key: value for key, value in settings.items() if key != "overwrite"}
    Problems(precheck.problems(looked_at)).raise_all()
    settings.setdefault("_recursive_", False)  # the program makes its parts itself
    if not accepts(settings["_target_"], "overwrite"):  # which then was about the folder alone
        settings.pop("overwrite", None)
    arguments: dict[str, Any] = {"output_dir": output_dir}
    if accepts(settings["_target_"], "parts"):
        arguments["parts"] = parts
    result: object = instantiate(settings, **arguments).run()
    return result


def _take_out_theirs(settings: dict[str, Any]) -> None:
    """Take out what configs of FusionBench hold for the command line, and print the config."""
    settings.pop("path", None)  # other keys refer to it, and are resolved
    settings.pop("print_function_call", None)  # the log tells the steps
    if settings.get("merged_model_save_kwargs") is None:
        settings.pop("merged_model_save_kwargs", None)
    if settings.pop("print_config", False) is True:
        print(yaml_of(settings))


def explained(error: Exception) -> str:
    """Return a message for any error."""
    return explain(error) or unexpected(error)


def explain(error: Exception) -> str | None:
    """Return the message for the user, with a suggested name if there is one.

    ``None`` for errors that nobody foresaw.
    """
    if not isinstance(error, EXPECTED):
        return None
    first_line = str(error).partition("\n")[0]
    if isinstance(error, YAMLError):
        return " ".join(str(error).split())
    if isinstance(error, MissingConfigException):
        # Hydra's own message goes on with its search path, which tells people little.
        return f"{first_line.rstrip('.')}. {_nearest_config(error.missing_cfg_file or '')}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: missing; give it on the command line: '{error.full_key}=…'."
    if "{log_dir}" in first_line:
        return f"""{first_line}. Quote it twice: 'report_save_path="{{log_dir}}/name.json"'."""
    if isinstance(error, OverrideParseException):
        return (
            f"{_parse_failure(error)}. Quote values with '=', ',' or spaces once more: "
            """'reports=["a","sweep/x=1"]'."""
        )
    if isinstance(error, FusionBenchError):
        return str(error)
    cause = error.__cause__
    if isinstance(error, InterpolationResolutionError):  # a resolver of ours may have raised it
        ours = [e for e in chain(error) if isinstance(e, FusionBenchError)]
        return f"{error.full_key}: {ours[0] if ours else first_line}"
    if isinstance(cause, ValidationError):
        return f"{first_line}: {str(cause).partition(chr(10))[0]}"
    if isinstance(cause, OmegaConfBaseException) and isinstance(cause.parent_node, DictConfig):
        names = [str(name) for name in cause.parent_node]
        hint = did_you_mean(str(cause.key), names)
        if dotted := re.search(r"modelpool\.models\.([^'=]*\.[^'=]*)", first_line):
            return (
                f"{first_line} A dot in a key begins another key. Give the models as one mapping, "
                f"'modelpool.models={{{dotted[1]}: path, …}}', or as a list of paths."
            )
        return f"{first_line} {hint} To add a new key, put a '+' before it."
    if several := re.match("Ambiguous value for argument '(.*)'$", first_line):
        key, _, values = several[1].lstrip("+").partition("=")
        return (
            f"{key}={values}: add -m to run once for each. Or quote it: '{key}=[{values}]' is "
            f"""a list, "{key}='{values}'" a text."""
        )
    return " ".join(str(error).split()) if isinstance(error, HydraException) else str(error)


def _parse_failure(error: OverrideParseException) -> str:
    """Return the problem of an invalid override in one line."""
    first_line, _, rest = error.message.partition("\n")
    reason = rest.partition("\n")[0] if first_line.startswith("Error parsing") else ""
    text = f"{first_line}: {reason}" if reason and not reason.startswith("See ") else first_line
    return text if error.override in text else f"'{error.override}': {text}"


def _nearest_config(missing: str) -> str:
    """Suggest the config with the most similar name, anywhere in its group."""
    group, _, name = missing.partition("/")
    kinds = [kind for kind in KINDS if GROUPS.get(kind) == group]
    if kinds and not get_close_matches(name, _own_names(group), n=1):
        sentence, *lines = suggestion(name, kinds)
        return "\n  ".join([sentence, *lines])
    names = _config_names(missing)
    last = [Path(name).name for name in names]
    for close in get_close_matches(Path(missing).name, last, n=1):
        alike = [name for name in names if Path(name).name == close]
        return did_you_mean(get_close_matches(missing, alike, n=1, cutoff=0)[0], alike)
    return did_you_mean("", names)


def _own_names(group: str) -> set[str]:
    """Return the names of a group's configs in the user's own config directories."""
    directories = [own / group for own in _own_folders()]
    files = ((own, file) for own in directories for file in own.rglob("*.yaml"))
    return {file.relative_to(own).with_suffix("").as_posix() for own, file in files}


def _own_folders() -> list[Path]:
    """Return the user's own config directories, as typed or beside their own code."""
    return [*map(Path, option(*_DIRECTORY_FLAGS)), *config_folders()]


def _config_names(missing: str) -> list[str]:
    """Return the names of the configs that a person might have meant by ``missing``."""
    group, slash, _ = missing.partition("/")
    names = set()
    for directory in {CONFIG_DIR, *_own_folders()}:
        files = (directory / group).rglob("*.yaml") if slash else directory.glob("*.yaml")
        names |= {str(f.relative_to(directory).with_suffix("")) for f in files}
    parent = missing.rpartition("/")[0]
    with suppress(OSError):  # there is no such group of Hydra's own
        stored = ConfigStore.instance().list(parent) if slash else []
        names |= {f"{parent}/{name.removesuffix('.yaml')}" for name in stored}
    return [name for name in names if not Path(name).name.startswith("_")]
