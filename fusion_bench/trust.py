"""The allow-list of targets that a config may call.

Users add their own packages outside any config: in the environment variable ``FUSION_BENCH_ALLOW``,
with ``--allow`` on the command line, or as an entry point of an installed package in the group
``fusion_bench.allow``; and single files with ``--plugins``, or in ``FUSION_BENCH_PLUGINS``.
docs/security.md states the model.
"""

import gc
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from fusion_bench.addresses import address_problems
from fusion_bench.command import overrides
from fusion_bench.problems import ConfigError, did_you_mean

#: Names packages whose classes and functions a config may call, separated by commas.
ALLOW = "FUSION_BENCH_ALLOW"
#: Names Python files of the user's, whose classes and functions a config may call; separated as
#: ``PATH`` is.
PLUGINS = "FUSION_BENCH_PLUGINS"
#: Likewise environment variables that ``${oc.env:…}`` may read.
ALLOW_ENVIRONMENT = "FUSION_BENCH_ALLOW_ENV"
#: Set to 1, repositories may bring code of their own.
TRUST_REMOTE_CODE = "FUSION_BENCH_TRUST_REMOTE_CODE"
#: Set to 1, tasks may run what a model has written, as those do that score programs.
RUN_UNSAFE_CODE = "FUSION_BENCH_RUN_UNSAFE_CODE"
#: Allowed like a package: code that files of a user's own tasks for lm-eval name.
TASK_CODE = "lm_eval_tasks"

#: Our packages whose public names a config may call.
_OURS = ("method", "modelpool", "taskpool", "programs")
#: Single functions and classes, by the name that a config has for them.
_EXACT = frozenset(
    {
        "datasets.load_dataset",
        "datasets.load_from_disk",
        "fusion_bench.zoo.dense.load_dataset",
        "fusion_bench.zoo.language.load_dataset",
        "fusion_bench.zoo.load_dataset",
        "lightning.Fabric",
        "lightning.fabric.Fabric",
    }
)
#: Packages and the classes in them of which a config may call any subclass.
_FAMILIES = {
    "lightning.fabric.strategies.": ("lightning.fabric.strategies.Strategy",),
    "torch.optim.": ("torch.optim.Optimizer", "torch.optim.lr_scheduler.LRScheduler"),
}
_CSV = ("name", "version", "prefix", "flush_logs_every_n_steps")
_BOARD = ("name", "version", "prefix", "sub_dir", "default_hp_metric", "max_queue", "flush_secs")
_MLFLOW = ("experiment_name", "run_name", "tags", "save_dir", "prefix", "synchronous", "log_model")
_WANDB = (
    *("name", "save_dir", "dir", "version", "id", "project", "group", "job_type", "tags", "notes"),
    *("prefix", "mode", "offline", "anonymous", "log_model"),
)
#: Loggers, and the arguments that a config may give: none that says where figures are sent, or
#: that lets a library send more than it is given.
_LOGGERS = {
    "lightning.fabric.loggers.CSVLogger": ("root_dir", *_CSV),
    "lightning.fabric.loggers.TensorBoardLogger": ("root_dir", *_BOARD),
    "lightning.pytorch.loggers.CSVLogger": ("save_dir", *_CSV),
    "lightning.pytorch.loggers.TensorBoardLogger": ("save_dir", "log_graph", *_BOARD),
    "lightning.pytorch.loggers.MLFlowLogger": _MLFLOW,
    "lightning.pytorch.loggers.WandbLogger": _WANDB,
    "wandb.integration.lightning.fabric.WandbLogger": _WANDB,
}
#: Arguments that say where a logger sends what it gets, and the environment's names for them.
_DESTINATIONS = {"tracking_uri": "MLFLOW_TRACKING_URI", "entity": "WANDB_ENTITY"}
#: What of transformers may be made, by ``from_pretrained`` alone.
_PRETRAINED = (
    "transformers.PreTrainedModel",
    "transformers.models.auto.auto_factory._BaseAutoModelClass",
    "transformers.PreTrainedConfig",
    "transformers.AutoConfig",
    "transformers.PreTrainedTokenizerBase",
    "transformers.AutoTokenizer",
    "transformers.ProcessorMixin",
    "transformers.AutoProcessor",
    "transformers.image_processing_base.ImageProcessingMixin",
    "transformers.AutoImageProcessor",
)
#: Packages of which no more than the above is allowed.
_LISTED = ("datasets", "fusion_bench", "hydra", "lightning", "omegaconf", "torch", "transformers")
#: They return what their argument ``path`` names, which must be allowed itself.
_LOOKUPS = ("hydra.utils.get_method", "hydra.utils.get_class", "hydra.utils.get_object")
#: Readers of ``datasets`` that take more than files of data, or whose files name others.
_READERS = ("generator", "hdf5", "iceberg", "lance", "pandas", "spark", "sql", "vortex")
#: Arguments that say where a token is sent.
_CONNECTIONS = ("download_config", "endpoint", "mirror", "proxies", "storage_options")
_MANY = 500  # modules
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def find(name: str, *, called: bool = True) -> Any:
    """Return the object of a ``_target_``, or of a lookup with ``called=False``.

    The name is checked before the import, and the object after it: names that our modules merely
    import are not allowed.

    Raises:
        ConfigError: it is not on the list, or not there.
    """
    if not isinstance(name, str) or not _DOTTED.fullmatch(name) or not _may_be_imported(name):
        raise ConfigError(_refusal(name))
    try:
        found = _imported(name)
    except Exception as error:
        if is_users(name):
            raise ConfigError(_failure(name, error)) from error
        if not isinstance(error, ImportError | AttributeError | ValueError):
            raise
        raise ConfigError(f"cannot find '{name}'. {_nearest(name)}".rstrip()) from error
    if not _allowed(name, found) or (called and not callable(found)):
        raise ConfigError(_refusal(name))
    return found


def argument_problems(target: str, node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the key and the problem of each argument that could run untrusted code."""
    if target in _LOOKUPS:
        try:
            find(node.get("path", ""), called=False)
        except ConfigError as error:
            yield "path", str(error)
    if node.get("trust_remote_code") and not trusts_remote_code():
        yield (
            "trust_remote_code",
            "would run code from the repository. If you trust its owner, allow it outside the "
            f"config: --trust-remote-code, or {TRUST_REMOTE_CODE}=1 in the environment.",
        )
    if is_users(target):
        return
    if target in _LOGGERS:
        yield from _logger_problems(target, node)
        return
    yield from address_problems(target, node)
    if node.get("_args_"):
        yield "_args_", "positional arguments are not allowed. Give each argument by name."
    if node.get("weights_only", True) is not True:
        yield "weights_only", "pickled objects can run code; only weights are read. Remove the key."
    kernel = node.get("attn_implementation", "sdpa")
    if fetches_code(kernel):
        yield "attn_implementation", f"'{kernel}' would fetch code. Choose sdpa or eager."
    for name in _CONNECTIONS:
        if node.get(name):
            yield (
                name,
                ("may send your token to another server. Set it in the environment, or remove it."),
            )
    if node.get("use_kernels") or node.get("kernel_config"):
        yield "use_kernels", "would fetch code. Remove it."
    if target == "datasets.load_dataset" and node.get("path") in _READERS:
        yield (
            "path",
            (f"'{node['path']}' accepts more than data files; this reader is not supported."),
        )


def take_options(words: Iterable[str]) -> list[str]:
    """Take the trust options out of a command's words; a config cannot set them.

    They go into the environment, from which other processes of this run have them too.

    Raises:
        ConfigError: what is allowed is no name of a package, or no Python file.
    """
    left, rest = [], iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag == "--allow":
            allow(value if equals else next(rest, ""))
        elif flag == "--plugins":
            allow_plugin(value if equals else next(rest, ""))
        elif word == "--trust-remote-code":
            os.environ[TRUST_REMOTE_CODE] = "1"
        elif word == "--run-unsafe-code":
            os.environ[RUN_UNSAFE_CODE] = "1"
        else:
            left.append(word)
    return left


def _logger_problems(target: str, node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the key and the problem of each argument that a file may not give to a logger."""
    for name, value in node.items():
        typed = {text.strip("'\"") for key, text in overrides().items() if key.endswith(f".{name}")}
        if value is None or name in ("_target_", "_recursive_", "_convert_"):
            continue
        if name in _DESTINATIONS:
            if str(value) not in typed:
                yield (
                    name,
                    "says where figures are sent, so it is not allowed in a file. Give it on the "
                    f"command line, or set {_DESTINATIONS[name]} in the environment.",
                )
        elif name not in _LOGGERS[target]:
            hint = did_you_mean(str(name), _LOGGERS[target])
            yield name, f"is not allowed for a logger in a config. {hint}"
        elif isinstance(value, str) and ("://" in value or "$" in value):
            yield name, f"'{value}' is neither a name nor a path. Give one without '://' and '$'."


def trusts_remote_code() -> bool:
    """Return whether the user allows code from repositories."""
    return os.environ.get(TRUST_REMOTE_CODE) == "1"


def runs_unsafe_code() -> bool:
    """Return whether the user allows tasks to run what a model has written."""
    return os.environ.get(RUN_UNSAFE_CODE) == "1"


def trusts_task_code() -> bool:
    """Return whether the user allows code that files of own tasks name."""
    return TASK_CODE in allowed_packages()


def fetches_code(kernel: Any) -> bool:
    """Return whether transformers would download the attention implementation.

    It fetches what has a repository's name, and flash attention that is not installed here, if the
    package ``kernels`` is.
    """
    if not isinstance(kernel, str) or not re.fullmatch(r"\w+", kernel):
        return True
    if not kernel.startswith("flash_") or find_spec("kernels") is None:
        return False
    return find_spec("flash_attn") is None and find_spec("flash_attn_interface") is None


def allowed_packages() -> frozenset[str]:
    """Return the packages that the user allows in addition to ours."""
    named = {part.strip() for part in os.environ.get(ALLOW, "").split(",")} | plugins().keys()
    installed = _entry_points("fusion_bench.allow")
    return frozenset(name for name in named.union(installed) if _DOTTED.fullmatch(name))


def allow(packages: str) -> None:
    """Allow packages, separated by commas, in this process and in those that it starts.

    Raises:
        ConfigError: it names no package.
    """
    if not re.fullmatch(r"\w+(\.\w+)*(,\w+(\.\w+)*)*", packages):
        raise ConfigError("--allow: name packages, such as '--allow my_methods'.")
    os.environ[ALLOW] = ",".join(filter(None, [os.environ.get(ALLOW), packages]))


@cache
def _entry_points(group: str) -> tuple[str, ...]:
    """Return the entry points of installed packages; to look through all of them takes a while."""
    return tuple(point.value for point in entry_points(group=group))


def plugins() -> dict[str, Path]:
    """Return the user's Python files, by the names that they are imported by."""
    files = map(Path, filter(None, os.environ.get(PLUGINS, "").split(os.pathsep)))
    return {file.stem: file for file in files}


def allow_plugin(name: str) -> None:
    """Let configs call what a Python file defines, also in other processes of this run.

    Raises:
        ConfigError: there is no such file, or its name is that of another module.
    """
    file = Path(name).absolute()
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"--plugins: there is no Python file '{name}'.")
    found = find_spec(file.stem) if file.stem.isidentifier() else None
    taken = found is not None and (found.origin is None or Path(found.origin) != file)
    if taken or not file.stem.isidentifier() or os.pathsep in str(file):
        reason = f"another module is called '{file.stem}'" if taken else "it cannot be imported"
        raise ConfigError(f"--plugins: {reason}, so rename '{name}'.")
    os.environ[PLUGINS] = os.pathsep.join(filter(None, [os.environ.get(PLUGINS), str(file)]))


def config_folders() -> list[Path]:
    """Return where the user's own code brings configs: beside plugins, and in installed packages.

    The latter say so as entry points in the group ``fusion_bench.configs``.
    """
    folders = [file.parent for file in plugins().values()]
    for package in _entry_points("fusion_bench.configs"):
        with suppress(ImportError):  # it is installed in part
            found = find_spec(package)
            folders += map(Path, (found and found.submodule_search_locations) or ())
    return list(dict.fromkeys(folders))


class _PluginFinder(MetaPathFinder):
    """Imports the user's Python files, where nothing that is installed has the name."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = plugins().get(fullname)
        return spec_from_file_location(fullname, file) if file else None


sys.meta_path.append(_PluginFinder())


def users_code(config: object) -> dict[str, str]:
    """Return the hash of each file of the user's code that a config calls, by the module's name.

    A result that was kept is only that of the same code.
    """
    if isinstance(config, Mapping):
        found = {key: code for own in config.values() for key, code in users_code(own).items()}
        target = str(config.get("_target_"))
        if is_users(target) and (file := _file_of(target)):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found[target.rpartition(".")[0]] = f"sha256:{digest[:16]}"
        return found
    if isinstance(config, list | tuple):
        return {key: code for own in config for key, code in users_code(own).items()}
    return {}


def _file_of(target: str) -> Path | None:
    """Return the file of the module that a target is in, if it can be found."""
    module = target
    while module := module.rpartition(".")[0]:
        try:
            found = find_spec(module)
        except Exception:  # the user's own code runs; what is wrong is said when it is called
            continue
        if found is not None and found.has_location and found.origin:
            return Path(found.origin)
    return None


def environment_variable(name: str, default: Any = None) -> Any:
    """Return the value of ``${oc.env:name}`` in a config.

    The value is saved in configs and reports, so an untrusted config could leak secrets.

    Raises:
        ConfigError: the user has not allowed it.
    """
    if name not in os.environ.get(ALLOW_ENVIRONMENT, "").split(","):
        raise ConfigError(
            f"${{oc.env:{name}}}: environment variables are not allowed in configs because "
            f"configs are saved. If this one is not secret, set {ALLOW_ENVIRONMENT}={name}."
        )
    return os.environ.get(name, default)


def _imported(name: str) -> Any:
    """Import the object of a dotted name; Hydra would also log what cannot be found."""
    first, *rest = name.split(".")
    with _uncollected():
        found: Any = import_module(first)
        for number, part in enumerate(rest, 2):
            if not hasattr(found, part):
                import_module(".".join(name.split(".")[:number]))
            found = getattr(found, part)
    return found


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from looking through many modules, which are there to stay.

    It takes a second while torch, transformers and the rest are imported.
    """
    collects, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - before > _MANY:
            gc.freeze()
        if collects:
            gc.enable()


def _may_be_imported(name: str) -> bool:
    """Return whether a target may be imported, by its name."""
    first, _, rest = name.partition(".")
    if first == "fusion_bench":
        return name in _EXACT or rest.partition(".")[0] in _OURS
    return (
        name in _EXACT
        or name in _LOGGERS
        or name in _LOOKUPS
        or name.startswith(tuple(_FAMILIES))
        or bool(re.fullmatch(r"transformers\.[\w.]+\.from_pretrained", name))
        or bool(re.fullmatch(r"torch\.\w+", name))  # a dtype, as is seen later
        or is_users(name)
    )


def is_users(name: str) -> bool:
    """Return whether a name is in a package that the user allows."""
    return any(name == package or name.startswith(f"{package}.") for package in allowed_packages())


def _allowed(name: str, found: Any) -> bool:
    """Return whether the object itself may be called."""
    first = name.partition(".")[0]
    if name in _EXACT or name in _LOGGERS or name in _LOOKUPS:
        return callable(found)
    if first == "fusion_bench":
        package = import_module(".".join(name.split(".")[:2]))
        return any(found is getattr(package, public) for public in package.__all__)
    if first == "transformers" and inspect.ismethod(found):
        owner = found.__self__
        return (
            found.__name__ == "from_pretrained"
            and found.__func__.__module__.startswith("transformers.")
            and inspect.isclass(owner)
            and owner.__module__.startswith("transformers.")
            and issubclass(owner, _classes(_PRETRAINED))
        )
    for prefix, bases in _FAMILIES.items():
        if (
            name.startswith(prefix)
            and inspect.isclass(found)
            and issubclass(found, _classes(bases))
        ):
            return found.__module__.partition(".")[0] == first
    if first == "torch" and type(found).__name__ == "dtype":
        return True
    return is_users(name) and is_users(str(getattr(found, "__module__", None)))


def _classes(names: tuple[str, ...]) -> tuple[type, ...]:
    return tuple(_imported(name) for name in names)


def _refusal(name: Any) -> str:
    package = str(name).partition(".")[0]
    said = f"'{name}' may not be called from a config."
    if nearest := _nearest(name):
        return f"{said} {nearest}"
    if not _DOTTED.fullmatch(str(name)) or package in {*sys.stdlib_module_names, *_LISTED}:
        return said
    return (
        f"{said} If you trust its code, allow it outside the config: --allow {package}, or for a "
        f"file of yours --plugins path/to/{package}.py."
    )


def _failure(name: str, error: Exception) -> str:
    """Return why something of the user's own code cannot be called."""
    package = name.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return (
            f"cannot find '{name}': '{package}' is not installed. Install it, or name the file: "
            f"--plugins path/to/{package}.py."
        )
    missing = error.name if isinstance(error, ModuleNotFoundError) else ""
    if missing and name.startswith(missing):
        parent, _, last = missing.rpartition(".")
        own = sys.modules[parent]
        hint = did_you_mean(last, [key for key in vars(own) if not key.startswith("_")])
        return f"cannot find '{name}' in {own.__file__}. {hint}".rstrip()
    trace, line = error.__traceback__, ""
    while trace is not None:
        if is_users(str(trace.tb_frame.f_globals.get("__name__"))):
            line = f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"cannot import '{name}': {type(error).__name__}: {error}{line}."


def _nearest(name: Any) -> str:
    """Suggest the most similar public name of ours, without other imports."""
    module, _, last = str(name).rpartition(".")
    package = ".".join(module.split(".")[:2])
    if package not in {f"fusion_bench.{ours}" for ours in _OURS}:
        return ""
    hint = did_you_mean(last, import_module(package).__all__)
    return hint if hint.startswith("Did") else ""  # else it would list all
