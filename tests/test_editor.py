"""Schemas by which an editor checks YAMLs: they refuse only what a run refuses, and most of that."""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from jsonschema import Draft7Validator
from omegaconf import OmegaConf
from referencing import Registry, Resource

from fusion_bench import catalog
from fusion_bench.configs import CONFIG_DIR, register, schema_line, without_schema_line
from fusion_bench.editor import schema_files
from fusion_bench.instantiate import check, instantiate
from fusion_bench.problems import FusionBenchError
from fusion_bench.schemas import targets, users_targets
from fusion_bench.trust import find

ROOT = Path(__file__).parents[1]
FILES = sorted(CONFIG_DIR.rglob("*.yaml"))
#: What a config needs from the command line; its own comment says so.
NEEDS = {
    "compare": ["reports=[a/report.json,b/report.json]"],
    "merge_llm": ["+modelpool.models.a=owner/a"],
    "search_winner": ["sweep=multirun/sweep"],
}
#: A value of each kind that YAML can write.
VALUES: list[Any] = [
    *(None, True, 3, -1, 0.5, "text", "mean", "auto"),
    *([], ["text"], [0.5, 0.5], {}, {"text": 1}, {"text": "text"}, {"text": [1]}),
]
#: The least that a node of these classes needs.
LEAST: dict[str, dict[str, Any]] = {
    "fusion_bench.modelpool.HFModelPool": {"models": {"a": "owner/a"}},
    "fusion_bench.modelpool.CausalLMPool": {"models": {"a": "owner/a"}},
    "fusion_bench.modelpool.CLIPVisionModelPool": {"models": {"a": "owner/a"}},
    "fusion_bench.taskpool.CLIPVisionModelTaskPool": {
        "test_datasets": {"text": {"_target_": "datasets.load_dataset", "path": "owner/data"}},
        "base_model": "owner/clip",
    },
    "fusion_bench.taskpool.GenerationTask": {"dataset": {"_target_": "datasets.load_dataset"}},
    "fusion_bench.taskpool.PerplexityTask": {"dataset": {"_target_": "datasets.load_dataset"}},
    "fusion_bench.programs.GridSearch": {"space": {"t": [0.5]}},
    "fusion_bench.method.LiNeSAlgorithm": {
        "base_method": {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm"}
    },
}


@cache
def schemas() -> dict[str, Any]:
    files = (CONFIG_DIR / "schema").glob("*.json")
    return {file.name: json.loads(file.read_text("utf-8")) for file in files}


@cache
def validator(schema: str) -> Draft7Validator:
    registry: Registry[Any] = Registry().with_resources(
        (name, Resource.from_contents(content)) for name, content in schemas().items()
    )
    return Draft7Validator({"$ref": schema}, registry=registry)


def mistakes(value: object, schema: str) -> list[str]:
    errors = validator(schema).iter_errors(value)
    return [f"{error.json_path}: {error.message}" for error in errors]


def read(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file))


def whole(text: str) -> list[str]:
    return mistakes(OmegaConf.to_container(OmegaConf.create(text)), "config.json")


def test_they_are_schemas_themselves() -> None:
    assert len(schemas()) == 9
    for schema in schemas().values():
        Draft7Validator.check_schema(schema)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIG_DIR)))
def test_each_yaml_names_its_schema_and_fits_it(file: Path) -> None:
    source, text = file.relative_to(CONFIG_DIR), file.read_text("utf-8")
    package, _, rest = text.partition("\n")
    # Hydra wants its own comment first.
    text = rest if package.startswith("# @package") else text
    line = text.partition("\n")[0]
    assert line == schema_line(file, source)
    schema = (file.parent / line.partition("$schema=")[2]).resolve()
    assert schema.is_file()
    assert mistakes(read(file), schema.name) == []
    if package.startswith("# @package"):
        assert without_schema_line(text) == text.partition("\n")[2]


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ConfigStore.instance(), "repo", deepcopy(ConfigStore.instance().repo))
    register()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        yield


@pytest.mark.usefixtures("composed")
def test_what_is_composed_fits() -> None:
    for entry in catalog.of_kind("configs"):
        config = OmegaConf.to_container(
            compose(entry.name, NEEDS.get(entry.name, [])), resolve=True, throw_on_missing=True
        )
        folder, slash, _ = entry.name.partition("/")
        assert mistakes(config[folder] if slash else config, "config.json") == []
    groups = {kind: group for kind, group in catalog.GROUPS.items()}
    entries = [
        (number, groups[entry.kind], entry.name)
        for number, entry in enumerate(catalog.entries())
        if entry.kind in groups and entry.target
    ]
    assert len(entries) > 70
    words = [f"+{group}@n{number}.{group}={name}" for number, group, name in entries]
    parts = compose(overrides=words)
    for number, group, name in entries:
        part = OmegaConf.to_container(parts[f"n{number}"], resolve=True)
        assert isinstance(part, dict)
        assert mistakes(part[group], f"config.json#/definitions/{group}") == [], name


def refused_by_run(node: dict[str, Any]) -> bool:
    try:
        section = node["_target_"].split(".")[1] if node["_target_"].endswith("Pool") else ""
        made = instantiate({"_recursive_": False, **node}, section)
        # The keys of what a search tries are for it to check, when it knows the method.
        if "GridSearch" in node["_target_"]:
            made.settings({"_target_": "fusion_bench.method.LinearInterpolationAlgorithm"})
    except (FusionBenchError, AttributeError, TypeError):
        return True
    return False


@pytest.mark.parametrize(
    "target",
    [target for target in targets() if target.startswith("fusion_bench.method.") or target in LEAST],
)
def test_a_schema_refuses_what_the_signature_refuses_and_no_more(target: str) -> None:
    least = {"_target_": target, **LEAST.get(target, {})}
    # A task is given its name by the pool, and loads its dataset later.
    options = signature(find(target)).parameters.keys() - {"name", "dataset"}
    for key in sorted({*options, "no_such_key"}):
        for value in VALUES:
            node = {**least, key: value}
            wrong = mistakes(node, f"config.json#/definitions/{target}")
            wrong += mistakes(node, "config.json#/definitions/complete")
            if wrong:
                # A few classes take any empty value for none.
                assert value in ([], {}) or refused_by_run(node), wrong
            else:
                check(node)


