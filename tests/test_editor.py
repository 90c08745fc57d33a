"""Schemas by which an editor checks YAMLs: they refuse what a run refuses, and nothing else."""

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
#: Those of ``path`` hold keys of FusionBench, which are anybody's.
FILES = sorted(set(CONFIG_DIR.rglob("*.yaml")) - set(CONFIG_DIR.glob("path/*")))
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
    "fusion_bench.programs.EvolutionSearch": {
        "space": {"t": {"low": 0, "high": 1}, "u": {"low": 0, "high": 1}}
    },
    "fusion_bench.programs.GridSearch": {"space": {"t": [0.5]}},
    "fusion_bench.programs.RaceSearch": {"space": {"t": [0.5]}},
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
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors]


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
        config = OmegaConf.to_container(compose(entry.name), resolve=True)
        assert isinstance(config, dict)
        folder, slash, _ = entry.name.partition("/")
        assert mistakes(config[folder] if slash else config, "config.json") == []
    groups = catalog.GROUPS
    entries = [
        (number, groups[entry.kind], entry.name)
        for number, entry in enumerate(catalog.entries())
        if entry.kind in groups and entry.target
    ]
    assert len(entries) > 70
    for half in (entries[::2], entries[1::2]):  # all together are more files than a config may have
        words = [f"+{group}@n{number}.{group}={name}" for number, group, name in half]
        parts = compose(overrides=words)
        for number, group, name in half:
            part = OmegaConf.to_container(parts[f"n{number}"], resolve=True)
            assert isinstance(part, dict)
            assert mistakes(part[group], f"config.json#/definitions/{group}") == [], name


def refused_by_run(node: dict[str, Any]) -> bool:
    try:
        section = node["_target_"].split(".")[1] if node["_target_"].endswith("Pool") else ""
        made = instantiate({"_recursive_": False, **node}, section)
        # The keys of what a search tries are for it to check, when it knows the method.
        if node["_target_"].endswith(("GridSearch", "RaceSearch")):
            made.settings({"_target_": "fusion_bench.method.LinearInterpolationAlgorithm"})
    except (FusionBenchError, AttributeError, TypeError):
        return True
    return False


@pytest.mark.parametrize(
    "target",
    [
        target
        for target in targets()
        if target.startswith("fusion_bench.method.") or target in LEAST
    ],
)
def test_a_schema_refuses_what_the_signature_refuses_and_no_more(target: str) -> None:
    least = {"_target_": target, **LEAST.get(target, {})}
    # A task is given its name by the pool, and loads its dataset later.
    options = signature(find(target)).parameters.keys() - {"name", "dataset"}
    for key in sorted({*options, "no_such_key"}):
        for value in VALUES:
            node = {**least, key: value}
            wrong = mistakes(node, f"config.json#/definitions/{target}")
            if value is VALUES[0] or key in least:  # otherwise no other value completes it
                missing = mistakes(node, "config.json#/definitions/complete")
            if wrong or missing:
                # A few classes take any empty value for none.
                assert value in ([], {}) or refused_by_run(node), wrong + missing
            else:
                check(node)


@pytest.mark.parametrize(
    "text",
    [
        "{defaults: [fabric_model_fusion, {override /method: ties_merging}, _self_], seed: 1}",
        "{defaults: [my_own, _self_], anything: 1}",
        "{_target_: my_programs.Own, anything: 1}",
        "{defaults: [{method: lines/lines}, _self_], method: {_target_: my.Own, a: 1}}",
        "{defaults: [scaling_study, _self_], counts: [2]}",
        "{defaults: [a, {method: ties_merging}, {method: wudi/wudi}], method: {iter_num: 1}}",
        "{defaults: [{method: ties_merging}], method: {_target_: my.Own, lr: 1}}",
        "{defaults: [{method: my_own}], method: {lr: 1}}",
        "{defaults: [{method: lines/lines}], method: {base_method: {scaling_factor: 1}}}",
        "{defaults: [search], search: {space: {threshold: [1, 2]}}, hydra: {sweep: {dir: a}}}",
        "{defaults: [{optional method@a.method: null}, fabric: auto], overwrite: yes}",
        "{defaults: [fabric_model_fusion], modelpool: {models: {a: {base: '${.._pretrained_}'}}}}",
        "{defaults: [fabric_model_fusion], fabric: '${oc.select:x}', similarity: '???'}",
    ],
)
def test_what_a_file_may_leave_to_others(text: str) -> None:
    assert whole(text) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{method: {}}", ": '_target_' is a required"),
        ("{defaults: [fabric_model_fusion], modelpol: 1}", "modelpol"),
        ("{defaults: method}", "defaults"),
        ("{defaults: [a, {override /method: ties_merging}], method: {threshold: x}}", "threshold"),
        ("{defaults: [a, {method: lines/lines}], method: {base_method: {lr: 1}, lr: 1}}", "lr"),
        (
            "{defaults: [{taskpool: CLIPVisionModelTaskPool/clip-vit-classification_TA8}],"
            " taskpool: {tasks: {mnist: {template: a}}}}",
            "template",
        ),
        ("{defaults: [x], method: [ties]}", "method"),
        ("{defaults: [x], method: {_target_: fusion_bench.method.Ties}}", "method._target_"),
        ("{defaults: [search], search: {_target_: fusion_bench.method.OPCM}}", "search._target_"),
        (
            "{defaults: [x], search: {_target_: fusion_bench.programs.GridSearch, space: {t: 1}}}",
            "search.space.t",
        ),
        ("{_target_: fusion_bench.programs.FabricModelFusionProgram}", "'method' is a required"),
    ],
)
def test_what_no_run_takes(text: str, place: str) -> None:
    assert any(place in mistake for mistake in whole(text))


def test_the_line_for_a_file_of_ones_own_is_an_address(tmp_path: Path) -> None:
    file = tmp_path / "my config.yaml"
    address = (CONFIG_DIR / "schema" / "config.json").as_uri()
    assert schema_line(file) == f"# yaml-language-server: $schema={address}"
    installed = tmp_path / "my venv" / "config"
    assert schema_line(file, root=installed).endswith("/my%20venv/config/schema/config.json")
    inside = schema_line(ROOT / "config" / "mine" / "own.yaml")
    assert inside == "# yaml-language-server: $schema=../schema/config.json"


def test_classes_of_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "own_of_schemas"
    package.mkdir()
    (package / "__init__.py").write_text("from own_of_schemas.half import Halved\n")
    (package / "half.py").write_text(
        "class Halved:\n"
        '    """Half of it.\n\n    Args:\n        share: how much.\n    """\n'
        "    def __init__(self, share: float, kind: str = 'x'): ...\n"
        "class _Hidden: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FUSION_BENCH_ALLOW", "own_of_schemas")
    own = list(users_targets("own_of_schemas"))
    assert own == ["own_of_schemas.Halved", "own_of_schemas.half.Halved"]
    written = schema_files([*targets(), *own])["config.json"]
    known = Draft7Validator(written)
    node: dict[str, Any] = {"_target_": "own_of_schemas.Halved", "share": "its own matter"}
    config = {"defaults": ["fabric_model_fusion"], "method": node}
    assert known.is_valid(config)
    assert written["definitions"]["own_of_schemas.Halved"]["properties"]["share"]["description"]
    node["shear"] = 1
    assert not known.is_valid(config)


def test_docs_and_settings_name_schemas_that_are_there() -> None:
    text = (ROOT / ".vscode" / "settings.json").read_text("utf-8")
    settings = yaml.safe_load(text)["yaml.schemas"]
    assert {Path(schema).name for schema in settings} == schemas().keys()
    assert all((ROOT / schema).is_file() for schema in settings)
    recommended = (ROOT / ".vscode" / "extensions.json").read_text("utf-8")
    assert re.search('"redhat.vscode-yaml"', recommended)
