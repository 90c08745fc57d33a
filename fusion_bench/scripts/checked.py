"""Checks a config's settings for Hydra itself, before Hydra uses them.

Before our own code runs, Hydra creates callbacks, log handlers, launchers and sweepers, sets
environment variables, and imports packages to search for configs. An untrusted YAML may contain all
of these. Settings that run commands are accepted only on the command line.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import (
    ConfigDefault,
    GroupDefault,
    InputDefault,
    ResultDefault,
)
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fusion_bench.catalog import full_name
from fusion_bench.command import overrides, typed
from fusion_bench.configs import CONFIG_DIR
from fusion_bench.problems import ConfigError, Place, Problem, Problems
from fusion_bench.redact import secret_keys
from fusion_bench.resolving import bounded as bounded_interpolations
from fusion_bench.resolving import resolve_all
from fusion_bench.scripts.bounds import bounded
from fusion_bench.scripts.shared_files import SharedRepository
from fusion_bench.trust import allowed_packages, is_users

_PLUGINS = "hydra_plugins.hydra_"
_SWEEPS = "fusion_bench.scripts.sweep.SweepCallback"
_TARGETS = re.compile(
    r"hydra\._internal\.core_plugins\.(basic_launcher\.BasicLauncher|basic_sweeper\.BasicSweeper)"
    r"|hydra\.experimental\.callbacks\.LogJobReturnCallback"
    r"|hydra_plugins\.fusion_bench_grid\.GridSweeper"
    rf"|{_PLUGINS}joblib_launcher\.joblib_launcher\.JoblibLauncher"
    rf"|{_PLUGINS}submitit_launcher\.submitit_launcher\.(Local|Slurm)Launcher"
    rf"|{_PLUGINS}ray_launcher\.ray_launcher\.RayLauncher"
    rf"|{_PLUGINS}optuna_sweeper\.optuna_sweeper\.OptunaSweeper|optuna\.samplers\.[A-Z]\w*Sampler"
    r"|fusion_bench\.scripts\.(sweep\.SweepCallback|winner\.JudgeWinner)"
)
#: What a config may say of logging, and how; all else is refused, its handlers' attributes too.
_ROOM = r"[^$\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*"
_LOGGING: Mapping[str, Mapping[str, str]] = {
    "formatters": {
        "class": r"logging\.Formatter",
        "()": r"colorlog\.ColoredFormatter",
        "format": _ROOM,
        "datefmt": _ROOM,
        "style": r"[%{$]",
        "validate": "True|False",
        "log_colors": _ROOM,
    },
    "filters": {"()": r"fusion_bench\.redact\.Redacting"},
    "handlers": {
        # Those that rotate remove files.
        "class": r"logging\.(StreamHandler|FileHandler|NullHandler)|rich\.logging\.RichHandler",
        "stream": r"ext://sys\.std(out|err)",
        # It goes into the run's folder; whatever is written into it, no such file is ever run.
        "filename": r"(\$\{hydra\.(runtime\.output_dir|sweep\.dir)\}/)?"
        r"(\$\{hydra\.job\.name\}|[\w-]|\.(?!\.))+\.log",
        "mode": "[aw]",
        "formatter": r"[\w-]+",
        "level": r"\w+",
        "filters": r"[\w-]+",
        "encoding": r"[\w-]+",
        "delay": "True|False",
        **dict.fromkeys(
            ("markup", "rich_tracebacks", "show_level", "show_path", "show_time"), "True|False"
        ),
    },
    "loggers": {
        "level": r"\w+",
        "handlers": r"[\w-]+",
        "filters": r"[\w-]+",
        "propagate": "True|False",
    },
}
#: What Hydra makes objects of, or hands on as it is; its other settings are texts and numbers.
_FREE = re.compile(
    r"(callbacks|launcher|sweeper|job\.env_(set|copy)|(job|hydra)_logging)\b.*", re.S
)
#: What an interpolation may stand for there: a text of Hydra's own.
_PLAIN = re.compile(
    r"\$\{(hydra\.(runtime\.output_dir|job\.(name|num|id)|sweep\.(dir|subdir))"
    r"|fusion_bench\.\w+:[\w,]*|now:[^${}]*)\}"
)
#: What starts programs, opens connections or carries the environment away.
_COMMANDS = re.compile(
    r"launcher\.(setup|python|srun_args|additional_parameters|comment)(\..*|\[.*)?"
    r"|launcher\.ray\.init\.address|launcher\.ray\..*runtime_env.*"
    r"|sweeper\.(storage|custom_search_space)|job\.env_copy.*|job\.env_set.*"
)
_HARMLESS = re.compile(
    r"job\.env_set\.((OMP|MKL|OPENBLAS)_NUM_THREADS|CUDA_VISIBLE_DEVICES|TOKENIZERS_PARALLELISM"
    r"|HF_HUB_OFFLINE|NCCL_(DEBUG|P2P_DISABLE|IB_DISABLE|SHM_DISABLE|SOCKET_IFNAME)|HYDRA_FULL_ERROR)"
)

#: The folder of a run that names none, as ``config/hydra/output`` has it.
_NOW = "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}"
#: Groups that can always be chosen, and what Hydra composes where a sweep chooses.
_DEFAULTS = {
    "method": "simple_average",
    "modelpool": "CLIPVisionModelPool/zoo",
    "taskpool": "CLIPVisionModelTaskPool/zoo",
}


#: The folder of this run, wherever it is.
_OUTPUT_DIR = "${hydra:runtime.output_dir}"


class CheckedConfigLoader(ConfigLoaderImpl):
    """Composes like Hydra, and refuses forbidden settings."""

    def __init__(self, config_search_path: ConfigSearchPath):
        super().__init__(config_search_path)
        self.repository = SharedRepository(config_search_path)
        self._whole: tuple[list[ResultDefault], DictConfig] | None = None
        self._composed: tuple[str | None, list[str], DictConfig] | None = None

    def mode(self, config_name: str | None, overrides: Sequence[str]) -> RunMode | None:
        """Return the mode that a config or override sets.

        Hydra composes the config to know it, and once more to run it. Here the second one is the
        first, where it is no sweep.
        """
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        swept = any(each.is_sweep_override() for each in parsed)
        config = self.load_configuration(
            config_name,
            list(overrides),
            RunMode.MULTIRUN if swept else RunMode.RUN,
            validate_sweep_overrides=False,
        )
        mode: RunMode | None = config.hydra.mode
        if not swept and mode is None:
            chosen = "hydra.mode=RUN"  # which Hydra adds then
            config.hydra.mode = RunMode.RUN
            config.hydra.overrides.hydra.append(chosen)
            self._composed = (config_name, [*overrides, chosen], config)
        return mode

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Return the composed config.

        Raises:
            ConfigError: with a line for each thing that it may not ask for.
        """
        known, self._composed = self._composed, None
        if known and run_mode == RunMode.RUN and known[:2] == (config_name, overrides):
            return known[2]
        try:
            with bounded_interpolations():
                self._check_search_path(config_name, overrides)
                config = super().load_configuration(
                    config_name, overrides, run_mode, from_shell, validate_sweep_overrides
                )
            _use_log_dir(config, run_mode)
            if run_mode == RunMode.RUN:
                _use_free_folder(config)
            resolve_all(config)
        except (HydraException, OmegaConfBaseException):
            raise
        except RecursionError as error:
            raise ConfigError(
                f"'{config_name}' cannot be composed: it refers to itself, or is nested too "
                "deeply. Check its interpolations and defaults lists."
            ) from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if str(error).startswith("Config group override"):
                for key in (word[: -len("=null")] for word in overrides if word.endswith("=null")):
                    reason = "null is not a choice of a config group."
                    raise ConfigError(reason, f"Type '~{key}' instead.", place=(key,)) from error
            # What Hydra makes of no text, of trees without end, or of its own key set to null.
            raise ConfigError(f"'{config_name}' cannot be composed: {error}.") from error
        Problems(dict.fromkeys(_problems(config))).raise_all()
        if config.get("dry_run") is True:  # it leaves nothing but its log
            config.hydra.output_subdir = None
        with open_dict(config.hydra):  # it looks after the folders of a sweep, whatever a file says
            config.hydra.callbacks["leaderboard"] = {"_target_": _SWEEPS}
        return config

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        parsed, repository = super()._parse_overrides_and_create_caching_repo(
            config_name, overrides
        )
        chosen = {
            each.key_or_group: each.value()
            for each in parsed
            if each.key_or_group in _DEFAULTS and each.type is OverrideType.CHANGE
        }
        return parsed, _choosable(bounded(repository), config_name, chosen)

    def _compose_config_from_defaults_list(
        self, defaults: list[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        """Return what files make together, which jobs of a sweep share where they choose alike."""
        if self._whole is None or self._whole[0] != defaults:
            whole = super()._compose_config_from_defaults_list(defaults, repo)
            self._whole = defaults, whole
        own = deepcopy(self._whole[1])  # a job's values are put into it
        OmegaConf.clear_cache(own)  # the time in a folder's name is the job's, too
        return own

    def _check_search_path(self, config_name: str | None, overrides: Sequence[str]) -> None:
        """Refuse search paths that would import a package."""
        for word in overrides:  # some of which a file may have given, to be swept
            if word.lstrip("+").startswith("hydra.searchpath") and word not in typed():
                raise ConfigError(
                    "cannot be swept.",
                    "Give a single value on the command line.",
                    place=("hydra", "searchpath"),
                )
        found = self.repository.load_config(config_name) if config_name else None
        main = found.config if found is not None else None
        searched = OmegaConf.select(main, "hydra.searchpath") if isinstance(main, DictConfig) else 0
        for place in searched if isinstance(searched, Sequence) else ():
            package = str(place).removeprefix("pkg://").replace("/", ".").partition(".")[0]
            ours = package in {"fusion_bench", "hydra"} | allowed_packages()
            if str(place).startswith("pkg://") and not ours:
                raise ConfigError(
                    f"'{place}' would import a package.",
                    f"If you trust it, allow it outside the config: --allow {package}.",
                    place=("hydra", "searchpath"),
                )


def _use_free_folder(config: DictConfig) -> None:
    """Number the run's folder where another run began in the same second."""
    run: Any = OmegaConf.to_container(config.hydra.run, resolve=False)
    if run.get("dir") != _NOW:
        return
    first = folder = str(config.hydra.run.dir)
    number = 1
    while Path(folder).exists():
        number += 1
        folder = f"{first}-{number}"
    config.hydra.run.dir = folder


def _use_log_dir(config: DictConfig, run_mode: RunMode) -> None:
    """Let ``path.log_dir`` name the output folder, as in FusionBench, and then stand for it."""
    if not isinstance(path := config.get("path"), DictConfig):
        return
    folders: Any = OmegaConf.to_container(path, resolve=False)
    chosen = folders.get("log_dir")
    with open_dict(config):
        path.log_dir = _OUTPUT_DIR
        if chosen is None or chosen == _OUTPUT_DIR:
            return
        chosen = str(chosen).replace("${.", "${path.")
        if run_mode == RunMode.RUN and "hydra.run.dir" not in overrides():
            config.hydra.run.dir = chosen
        elif run_mode == RunMode.MULTIRUN and OmegaConf.is_missing(config.hydra.sweep, "dir"):
            config.hydra.sweep.dir = chosen


def _choosable(
    repository: CachingConfigRepository, config_name: str | None, chosen: Mapping[str, object]
) -> CachingConfigRepository:
    """Let a group be chosen where the main config has a node of its own in its place.

    Hydra knows no choice without an entry in the defaults list, and would keep the options of the
    method that is replaced.

    Args:
        repository: of one composition.
        config_name: the main config.
        chosen: the groups that the command line chooses, with the choice.
    """
    load = repository.load_config

    def load_config(config_path: str) -> ConfigResult | None:
        result = load(config_path)
        for each in (result.defaults_list or ()) if result is not None else ():
            if isinstance(each, GroupDefault) and isinstance(each.value, str):
                group = str(each.group).lstrip("/")
                if group in _DEFAULTS and not repository.config_exists(f"{group}/{each.value}"):
                    each.value = full_name(group, each.value)  # a name that people type
        if result is None or config_path != config_name:
            return result
        whole = result.config
        defaults: list[InputDefault] = list(result.defaults_list or ())
        listed = {
            str(each.group).lstrip("/"): each.value
            for each in defaults
            if isinstance(each, GroupDefault)
        }
        alone = all(each.is_self() for each in defaults if isinstance(each, ConfigDefault))
        for group, choice in chosen.items():
            if not isinstance(whole, DictConfig) or not OmegaConf.is_dict(whole.get(group)):
                continue
            if listed[group] == choice if group in listed else "_target_" not in whole[group]:
                continue
            with open_dict(whole):
                del whole[group]
            if group not in listed and alone:
                added = GroupDefault(group=group, value=_DEFAULTS[group])
                defaults = [added, *(defaults or [ConfigDefault(path="_self_")])]
                result.defaults_list = defaults
        return result

    repository.load_config = load_config  # type: ignore[method-assign]
    return repository


def _problems(config: DictConfig) -> Iterator[Problem]:
    whole: Any = OmegaConf.to_container(config, resolve=False)
    hydra = whole.pop("hydra")
    # An override is found where it has put its value; so Hydra's own key comes second.
    for key in [*secret_keys(whole)] or secret_keys(hydra, "hydra"):
        yield Problem(
            (key,),
            "looks like a token or a password, and configs are saved.",
            "Run 'hf auth login', or set it in the environment.",
        )
    for section in ("job_logging", "hydra_logging"):
        yield from _logging_problems(hydra.get(section), ("hydra", section))
    handlers = _at(hydra, "hydra_logging.handlers")
    for name, handler in handlers.items() if isinstance(handlers, Mapping) else ():
        if isinstance(handler, Mapping) and handler.get("filename") is not None:
            yield Problem(
                ("hydra", "hydra_logging", "handlers", name, "filename"),
                "Hydra's own messages go to the terminal.",
                "Name the file in hydra.job_logging.",
            )
    for key, value, pattern in (
        ("output_subdir", hydra.get("output_subdir"), r"\.?[\w-]+"),
        ("job.name", _at(hydra, "job.name"), r"\?\?\?|[\w-][\w.=,+-]*"),
    ):
        if value is not None and not _fits(value, pattern):
            yield Problem(("hydra", key), f"'{value}' is not a plain name.")
    yield from _value_problems(hydra)
    for key, value in _leaves(hydra):
        if isinstance(value, str) and "${" in _PLAIN.sub("", value) and _FREE.fullmatch(key):
            yield Problem(("hydra", key), f"'{value}' is not plain text; write it out.")
    yield from _call_problems(hydra, ("hydra",))
    yield from _command_problems(hydra)


def _value_problems(hydra: Mapping[str, object]) -> Iterator[Problem]:
    """Yield a problem for each setting with a value that would crash Hydra."""
    for key in ("launcher", "sweeper"):
        if not isinstance(_at(hydra, f"{key}._target_"), str):
            remedy = f"Choose one: 'hydra/{key}=…', or remove the key."
            yield Problem(("hydra", key), "is empty.", remedy)
    size = _at(hydra, "sweeper.max_batch_size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        place = ("hydra", "sweeper", "max_batch_size")
        yield Problem(place, f"'{size}' is neither a positive integer nor null.")
    if not isinstance(verbose := hydra.get("verbose"), bool | str | list):
        reason = f"'{verbose}' is not true, false or the name of a logger."
        yield Problem(("hydra", "verbose"), reason)


def _call_problems(node: object, place: Place) -> Iterator[Problem]:
    """Yield a problem for each forbidden call under Hydra's own key."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            if name == "_target_" and child is not None:
                if not (_TARGETS.fullmatch(str(child)) or is_users(str(child))):
                    yield Problem((*place, name), f"Hydra may not create '{child}' here.")
            else:
                yield from _call_problems(child, (*place, str(name)))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _call_problems(child, (*place, index))
    elif place[:2] == ("hydra", "launcher") and re.search(r"[\0-\x1f]", str(node)):
        yield Problem(place, "contains a line break, which would start another command.")


def _logging_problems(config: object, place: Place) -> Iterator[Problem]:
    """Yield a problem for each forbidden logging setting."""
    if not isinstance(config, Mapping):
        if config is not None:
            yield Problem(place, f"'{config}' is not a mapping.")
        return
    parts = {name: value for name, value in config.items() if name != "root"}
    for name, value in parts.items():
        if name in ("version", "disable_existing_loggers"):
            if not isinstance(value, bool | int):
                reason = f"'{value}' is not a number, true or false."
                yield Problem((*place, name), reason)
        elif name not in _LOGGING:
            yield Problem((*place, name), "is not allowed in a file.")
        else:
            yield from _setting_problems(value, (*place, name), _LOGGING[name])
    root = {"root": config.get("root")}
    yield from _setting_problems(root, place, _LOGGING["loggers"])


def _setting_problems(section: object, place: Place, known: Mapping[str, str]) -> Iterator[Problem]:
    """Yield a problem for each setting of named items with an unknown form."""
    if section is not None and not isinstance(section, Mapping):
        yield Problem(place, f"'{section}' is not a mapping.")
        return
    for name, settings in (section or {}).items():
        if settings is not None and not isinstance(settings, Mapping):
            yield Problem((*place, name), f"'{settings}' is not a mapping.")
            continue
        for setting, given in (settings or {}).items():
            # A mapping elsewhere is of no form at all.
            colours = setting == "log_colors" and isinstance(given, Mapping)
            values = list(given.values()) if colours else _values(given)
            if not all(_fits(value, known.get(str(setting), "(?!)")) for value in values):
                reason = f"'{given}' is not allowed in a file."
                yield Problem((*place, name, setting), reason)


def _values(given: object) -> Sequence[object]:
    return given if isinstance(given, list) else [given]


def _fits(value: object, pattern: str) -> bool:
    """Return whether a value is plain, and of a form."""
    if value is None or not isinstance(value, str | bool | int | float):
        return value is None
    return re.fullmatch(pattern, str(value), re.DOTALL) is not None


@cache
def launchers() -> dict[str, DictConfig | ListConfig]:
    """Return the settings of our launchers by name."""
    return {file.stem: OmegaConf.load(file) for file in (CONFIG_DIR / "launcher").glob("*.yaml")}


def _command_problems(hydra: Mapping[str, object]) -> Iterator[Problem]:
    """Yield a problem for each setting that is allowed only on the command line."""
    ours = [OmegaConf.to_container(launcher) for launcher in launchers().values()]
    for key, value in _leaves(hydra):
        top = ".".join(key.partition("[")[0].split(".")[:2])
        own = top.startswith("launcher.") and any(
            isinstance(launcher, Mapping) and launcher.get(top.split(".")[1]) == _at(hydra, top)
            for launcher in ours
        )
        by_hand = any(
            f"hydra.{key}".startswith((word, f"{word}.", f"{word}["))
            for word in overrides()
            if word.startswith("hydra.")
        )
        if value in (None, "", "auto") or own or by_hand:
            continue
        if _COMMANDS.fullmatch(key) and not _HARMLESS.fullmatch(key):
            yield Problem(
                ("hydra", key),
                "may run commands or contain secrets, so it is not allowed in a file.",
                f"Give it on the command line: '++hydra.{key.partition('[')[0]}=…'.",
            )


def _at(node: object, path: str) -> object:
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _leaves(node: object, key: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _leaves(child, f"{key}[{index}]")
    else:
        yield key, node
