"""The config files, and whole configs composed from them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from fusion_bench.problems import FusionBenchError, did_you_mean

_PACKAGE = Path(__file__).resolve().parent
#: Inside the package when installed from a wheel, beside it in a checkout.
CONFIG_DIR = next(d for d in (_PACKAGE / "config", _PACKAGE.parent / "config") if d.is_dir())


#: The comment by which an editor finds the schema of a YAML.
_SCHEMA_LINE = "# yaml-language-server: $schema="
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where there is one
#: What ``register`` has filled.
_filled: Mapping[str, Any] | None = None


def register() -> None:
    """Register the config choices of datasets and suites, where one file defines several."""
    from hydra.core.config_store import ConfigNode, ConfigStore  # as slow as the rest of a command
    from omegaconf import OmegaConf

    class Unmade(ConfigNode):
        """A choice whose node is made when it is taken, which few of them ever are."""

        def __copy__(self) -> ConfigNode:
            node = OmegaConf.create(self.node)
            return ConfigNode(self.name, node, self.group, self.package, self.provider)

    global _filled
    repo = ConfigStore.instance().repo
    if _filled is repo:
        return
    for group, name, node in (*datasets(), *suites()):
        place: Any = repo
        for part in group.split("/"):
            place = place.setdefault(part, {})
        file = f"{name}.yaml"
        place[file] = Unmade(file, node, group, None, "fusion_bench")  # type: ignore[arg-type]
    _filled = repo


def datasets() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield group, name and node of each split of each dataset."""
    for file, content in _read("dataset"):
        call = {"_target_": "datasets.load_dataset", **content}
        group = file.parent.relative_to(CONFIG_DIR).as_posix()
        for group_of_split, split in call.pop("splits").items():
            yield f"{group}/{group_of_split}", file.stem, {file.stem: {**call, "split": split}}


def suites() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield group, name and node of each model, model pool and task pool of each suite."""
    for _, family in _read("suite"):
        suites = {name: list(_tasks(family["suites"], name)) for name in family["suites"]}
        every = dict.fromkeys(task for tasks in suites.values() for task in tasks)
        model, modelpool = f"model/{family['model']}", f"modelpool/{family['modelpool']}"
        taskpool, dataset = f"taskpool/{family['taskpool']}", f"dataset/{family['dataset']}"
        for architecture, suffix in family["suffixes"].items():
            base = family["pretrained"].format(architecture=architecture)
            yield model, architecture, {"_pretrained_": base}
            for task in every:
                tuned = family["finetuned"].format(architecture=architecture, task=task)
                yield model, f"{architecture}_{task}", {task: tuned}
            for suite, tasks in suites.items():
                models = [architecture, *(f"{architecture}_{task}" for task in tasks)]
                pool: list[Any] = [f"/{modelpool}/_template@_here_", {f"/{model}@models": models}]
                pool += [{f"/{dataset}/train@train_datasets": tasks}]
                yield modelpool, f"{architecture}_{suite}", {"defaults": pool}
                pool = [f"/{taskpool}/_template@_here_"]
                pool += [{f"/{dataset}/test@test_datasets": tasks}, "_self_"]
                name = f"{family['model']}-classification_{suite}{suffix}"
                yield taskpool, name, {"defaults": pool, "base_model": base}


def merged(file: Path) -> dict[str, Any]:
    """Return a file's node, with what its defaults list brings to the same place.

    Args:
        file: below ``CONFIG_DIR``.
    """
    node = yaml.load((CONFIG_DIR / file).read_text(encoding="utf-8"), Loader=_LOADER)
    whole: dict[str, Any] = {}
    for each in node.pop("defaults", ()):
        name, _, package = str(each).partition("@")
        if not isinstance(each, str) or name == "_self_" or package not in ("", "_here_"):
            continue
        own = Path(name.strip("/")) if name.startswith("/") else file.parent / name
        whole |= merged(own.with_suffix(".yaml"))
    return whole | node


def schema_line(file: Path, source: Path = Path("own.yaml"), root: Path = CONFIG_DIR) -> str:
    """Return the comment at the top of a YAML by which an editor finds its schema.

    Within a checkout it is a relative path, which holds on every machine. Elsewhere it is the
    address of the schema in this installation.

    Args:
        file: that begins with the line.
        source: a config below ``root`` of the same kind; by default a whole config.
        root: the directory of configs, with the schemas.
    """
    group = source.parts[0] if len(source.parts) > 1 else ""
    kind = {"": "config", "_get_started": "config", "launcher": "hydra"}.get(group, group)
    schema = root / "schema" / f"{'policy' if source.stem == '_policy' else kind}.json"
    if (root.parent / "pyproject.toml").is_file() and file.resolve().is_relative_to(root.parent):
        return _SCHEMA_LINE + Path(os.path.relpath(schema, file.resolve().parent)).as_posix()
    return _SCHEMA_LINE + schema.as_uri()


def without_schema_line(text: str) -> str:
    """Return a YAML without the comment for editors."""
    first, newline, rest = text.partition("\n")
    return rest if newline and first.startswith(_SCHEMA_LINE) else text


def _tasks(suites: Mapping[str, Any], name: str) -> Iterator[str]:
    if "extends" in suites[name]:
        yield from _tasks(suites, suites[name]["extends"])
    yield from suites[name]["tasks"]


def _read(group: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for file in sorted((CONFIG_DIR / group).rglob("*.yaml")):
        yield file, yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)


def composed(*overrides: str) -> dict[str, Any]:
    """Return the default run's config with ``overrides``, as the command line would have it.

    Within a run of the command line, its config directories are searched too.

    Raises:
        FusionBenchError: a config or a key that is not there.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    from fusion_bench.resolving import to_container

    inside = GlobalHydra.instance().is_initialized()
    if not inside:
        register()
    try:
        with (
            nullcontext() if inside else initialize_config_dir(str(CONFIG_DIR), version_base="1.3")
        ):
            try:
                config = compose("fabric_model_fusion", list(overrides))
            except MissingConfigException as error:
                group, _, name = (error.missing_cfg_file or "").partition("/")
                hint = did_you_mean(name, _choices(group))
                raise FusionBenchError(f"there is no {group} '{name}'.", hint) from error
        found: Any = to_container(config, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise FusionBenchError(str(error).splitlines()[0]) from error
    return dict(found)


def _choices(group: str) -> list[str]:
    """Return the names of a group's configs, and of those in its subgroups, as Hydra finds them."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.object_type import ObjectType

    loader = GlobalHydra.instance().config_loader()
    found = loader.get_group_options(group)
    for inner in loader.get_group_options(group, ObjectType.GROUP):
        found += [f"{inner}/{name}" for name in _choices(f"{group}/{inner}")]
    return [name for name in found if not name.startswith("_")]
