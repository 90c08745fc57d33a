"""An adapter goes on the model that it was trained on, or nowhere."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import fusion_bench
from fixtures_llm import (
    VOCABULARY,
    average,
    metadata,
    rewrite,
    tensors,
    write_llama,
    write_lora,
)
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.modelpool.sources.adapter import is_same_model, split
from fusion_bench.problems import ConfigError, FusionBenchError
from fusion_bench.repository import Repository
from fusion_bench.weights import AdapterConfig, in_memory

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
KEY = f"{MODULES[0]}.weight"
ADAPTER = "adapter_config.json"
IDS = torch.arange(VOCABULARY)[None]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write the models `base` and `other`, and the adapter `x`, trained on `other`."""
    for seed, name in enumerate(("base", "other")):
        write_llama(tmp_path / name, seed=seed, dtype=torch.float32)
    write_lora(
        *(tmp_path / "x", tensors(tmp_path / "other"), MODULES), base_name=str(tmp_path / "other")
    )
    return tmp_path


def pool(root: Path, **models: Any) -> CausalLMPool:
    return CausalLMPool({"_pretrained_": str(root / "base"), **models})


def both(models: CausalLMPool, name: str = "x") -> str:
    """Return what preflight says, which is what a run says."""
    said = "\n".join(map(str, models.plan(built=False).problems))
    with pytest.raises(ConfigError) as raised:
        models.weights(name)
    assert str(raised.value) in said
    return str(raised.value)


def rename_base(root: Path, **settings: Any) -> None:
    rewrite(root / "x", lambda config: config.update(settings), ADAPTER)


def test_an_adapter_of_another_base_is_refused_and_told_what_to_type(root: Path) -> None:
    message = both(pool(root, x=str(root / "x")))
    assert f"'{root / 'other'}'" in message and f"'_pretrained_' is '{root / 'base'}'" in message
    first, second = re.findall(r"'models\.x=[^']*'", message)
    for typed, base in ((first, "base"), (second, "other")):
        (override,) = OverridesParser.create().parse_overrides(shlex.split(typed))
        models = pool(root, x=override.value())
        assert models.plan(built=False).problems == []
        other = "other" if base == "base" else "base"
        got = models.weights("x")[KEY]
        assert torch.linalg.matrix_rank(got - tensors(root / base)[KEY], rtol=1e-4) == 2
        assert torch.linalg.matrix_rank(got - tensors(root / other)[KEY], rtol=1e-4) > 2


def test_its_own_base_makes_a_whole_model_that_is_merged_with_the_rest(root: Path) -> None:
    source = {"path": str(root / "x"), "base": str(root / "other")}
    models = pool(root, x=source, other=str(root / "other"))
    added = models.weights("x")[KEY] - tensors(root / "other")[KEY]
    merged = SimpleAverageAlgorithm(show_pbar=False).run(models)
    for key, value in tensors(root / "other").items():
        change = added / 2 if key == KEY else 0
        if key != f"{MODULES[1]}.weight":
            assert torch.allclose(merged[key], value + change, atol=1e-5)  # type: ignore[arg-type]
    models.save_model(merged, root / "m")  # type: ignore[arg-type]
    recipe = json.loads(metadata(root / "m" / "model.safetensors")["fusion_bench"])
    assert recipe["sources"]["x"]["base"] == str(root / "other")
    assert set(recipe["sources"]["x"]["sha256"]) == {
        "adapter_model.safetensors",
        "model.safetensors",
    }
    assert "base" not in recipe["sources"]["other"]
    card = (root / "m" / "README.md").read_text()
    assert f"| `x` | `{root / 'x'}` on `{root / 'other'}` |" in card


def test_the_command_line_takes_an_adapter_with_its_base(root: Path) -> None:
    places = [f"_pretrained_={root / 'base'}", f"x={{path: {root / 'x'}, base: {root / 'other'}}}"]
    words = [f"modelpool.models.{place}" for place in places]
    done = fusion_bench(
        *("--config-name", "merge_llm", *words, "merged_model_save_path=m"), cwd=root
    )
    assert done.returncode == 0, done.stderr
    expected = pool(root, x={"path": str(root / "x"), "base": str(root / "other")}).weights("x")
    assert torch.allclose(tensors(root / "m")[KEY], expected[KEY], atol=1e-6)


def test_a_base_may_be_a_model_of_the_pool_or_one_that_takes_no_part(root: Path) -> None:
    by_place = pool(root, x={"path": str(root / "x"), "base": str(root / "other")})
    expected = by_place.weights("x")[KEY]
    for name in ("other", "_other_"):
        models = pool(root, x={"path": str(root / "x"), "base": name}, **{name: root / "other"})
        assert torch.equal(models.weights("x")[KEY], expected)
        assert models.plan(built=False).problems == []
        assert models.architecture("x") == models.architecture(name)
        models.save_model(models.weights("x"), root / f"m{name}")
        file = root / f"m{name}" / "model.safetensors"
        assert json.loads(metadata(file)["fusion_bench"])["sources"]["x"]["base"] == name


def test_an_adapter_may_stand_on_an_adapter(root: Path) -> None:
    rename_base(root, base_model_name_or_path=str(root / "base"))
    write_lora(root / "y", tensors(root / "base"), MODULES[:1], base_name=str(root / "x"), seed=5)
    models = pool(root, x=root / "x", y={"path": root / "y", "base": "x"})
    assert models.plan(built=False).problems == []
    change = models.weights("y")[KEY] - models.weights("x")[KEY]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    models = pool(root, y={"path": root / "y", "base": "x"}, x={"path": root / "x", "base": "y"})
    assert "y on x on y" in both(models, "y")


@pytest.mark.parametrize("kind", ["same", "link", "dots", "copy", "file", "module"])
def test_the_same_model_under_another_path_is_the_same(root: Path, kind: str) -> None:
    source: Any = root / "base"
    declared = root / "base"
    if kind == "link":
        declared = root / "link"
        declared.symlink_to(source)
    elif kind == "dots":
        declared = root / "x" / ".." / "base"
    elif kind == "copy":
        declared = shutil.copytree(source, root / "copy")
    elif kind == "file":
        source = root / "base" / "model.safetensors"
    elif kind == "module":
        source = AutoModelForCausalLM.from_pretrained(root / "base")
    rename_base(root, base_model_name_or_path=str(declared))
    models = CausalLMPool({"_pretrained_": source, "x": root / "x"})
    change = models.weights("x")[KEY] - tensors(root / "base")[KEY]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    plan = models.plan(built=False)
    assert plan.problems == [] and plan.notes == []


@pytest.mark.parametrize("kind", ["gone", "hub", "changed copy", "module"])
def test_what_cannot_be_seen_to_be_the_same_is_refused(root: Path, kind: str) -> None:
    source: Any = root / "base"
    declared = {"gone": "/gone/base", "hub": "owner/base"}.get(kind, str(root / "copy"))
    if kind == "module":
        source = AutoModelForCausalLM.from_pretrained(root / "base")
        declared = str(root / "other")
    elif kind == "changed copy":
        held = tensors(shutil.copytree(source, root / "copy"))
        held["model.norm.weight"][0] += 1
        save_file(held, root / "copy" / "model.safetensors", {"format": "pt"})
    rename_base(root, base_model_name_or_path=declared)
    models = CausalLMPool({"_pretrained_": source, "x": root / "x"})
    message = both(models)
    assert f"'{declared}'" in message and "base: _pretrained_}" in message
    given = {"path": root / "x", "base": "_pretrained_"}
    models = CausalLMPool({"_pretrained_": source, "x": given})
    assert models.weights("x")[KEY] is not None
    (note,) = models.plan(built=False).notes
    assert note.startswith(f"x: the adapter's config says that it was trained on '{declared}'; it")


def test_an_adapter_that_names_no_base_is_put_on_the_pretrained_model_and_it_is_said(
    root: Path,
) -> None:
    rename_base(root, base_model_name_or_path=None)
    models = pool(root, x=root / "x")
    plan = models.plan(built=False)
    assert plan.problems == [] and "x" in plan.weights
    assert plan.notes == ["x: the adapter names no base and is merged into '_pretrained_'."]


HUB = "/h/models--Owner--Name/snapshots/abc1234567"


@pytest.mark.parametrize(
    ("declared", "revision", "source", "commit", "same"),
    [
        ("owner/name", None, "owner/name", "abc1234567", True),
        ("Owner/Name", None, "owner/name", "abc1234567", True),
        ("owner/name", None, "owner/name@v2", "abc1234567", True),
        ("owner/name", "main", "owner/name", "abc1234567", True),
        ("owner/name", "v2", "owner/name@v2", "abc1234567", True),
        ("owner/name", "abc1234567", "owner/name@v2", "abc1234567", True),
        ("owner/name", "abc1234", "owner/name", "abc1234567", True),
        (HUB, None, "owner/name", "abc1234567", True),
        (HUB, None, "owner/name", "ffff234567", False),
        ("owner/name", "v1", "owner/name@v2", "abc1234567", False),
        ("owner/name", "v1", "owner/name", "abc1234567", False),
        ("owner/name", "main", "owner/name@v2", "abc1234567", False),
        ("owner/name-2", None, "owner/name", "abc1234567", False),
        ("other/name", None, "owner/name", "abc1234567", False),
        ("name", None, "owner/name", "abc1234567", False),
        ("/somewhere/name", None, "owner/name", "abc1234567", False),
    ],
)
def test_names_and_states_on_the_hub(
    declared: str, revision: str | None, source: str, commit: str, same: bool
) -> None:
    config = AdapterConfig(declared, 1.0, False, False, {}, revision)
    place = Repository(source, frozenset(), repo_id=source.partition("@")[0], commit=commit)
    assert is_same_model(config, place) == same


def test_a_place_in_the_hubs_cache_has_the_hubs_name(root: Path) -> None:
    cached = root / HUB.removeprefix("/")
    shutil.copytree(root / "base", cached)
    place = Repository(str(cached), frozenset(), directory=cached)
    for declared, same in (("Owner/Name", True), ("Owner/Other", False), (HUB, True)):
        config = AdapterConfig(declared, 1.0, False, False, {})
        assert is_same_model(config, place) == same


@pytest.mark.parametrize(
    ("source", "fact"),
    [
        ({"path": "{x}", "bsae": "y"}, "models.x.bsae: there is no such key"),
        ({"base": "y"}, "models.x.path: name a model, got 'None'"),
        ({"path": 3}, "models.x.path: name a model, got '3'"),
        ({"path": "{x}", "base": ["y"]}, "models.x.base: name a model"),
        ({"path": "{x}", "base": ""}, "models.x.base: name a model"),
        ({}, "models.x.path: name a model"),
        ({"pretrained_model_name_or_path": "{x}"}, "models.x.pretrained_model_name_or_path: there"),
    ],
)
def test_a_mapping_that_is_no_model_is_refused_at_once(
    source: dict[str, Any], fact: str, root: Path
) -> None:
    named = {k: v.format(x=root / "x") if isinstance(v, str) else v for k, v in source.items()}
    with pytest.raises(ConfigError, match=re.escape(fact)):
        pool(root, x=named)


@pytest.mark.parametrize(
    ("source", "fact"),
    [
        ({"path": "{root}/x", "base": "_other_"}, "models.x.base: '_other_' is not in the pool"),
        ({"path": "{root}/x", "base": "{root}/gone"}, "models.x.base: There is no such directory"),
        (
            {"path": "{root}/other", "base": "_pretrained_"},
            "models.x.base: '{root}/other' is no ad",
        ),
        ({"path": "{root}/x", "base": "x"}, "x on x"),
        ({"path": "{root}/other/model.safetensors", "base": "y"}, "is no adapter"),
    ],
)
def test_bases_that_cannot_be(source: dict[str, str], fact: str, root: Path) -> None:
    named = {key: value.format(root=root) for key, value in source.items()}
    assert fact.format(root=root) in both(pool(root, x=named))


def test_a_path_alone_is_the_name_alone(root: Path) -> None:
    models = CausalLMPool({"other": {"path": root / "other"}, "x": {"path": str(root / "x")}})
    assert models.plan(built=False).problems == []
    assert torch.equal(models.weights("other")[KEY], tensors(root / "other")[KEY])


def test_without_a_pretrained_model_the_first_may_be_an_adapter_with_its_base(root: Path) -> None:
    models = CausalLMPool({"x": {"path": root / "x", "base": root / "base"}})
    models.save_model(models.weights("x"), root / "m")
    config = json.loads((root / "m" / "config.json").read_text())
    assert config == json.loads((root / "base" / "config.json").read_text())
    assert models.weights("x").files[1] == root / "base" / "model.safetensors"


def test_the_pretrained_model_may_be_an_adapter_itself(root: Path) -> None:
    models = CausalLMPool({"_pretrained_": root / "x", "other": root / "other"})
    assert models.plan(built=False).problems == []
    expected = CausalLMPool({"x": root / "x"}).weights("x")[KEY]
    assert torch.equal(models.weights("_pretrained_")[KEY], expected)
    rename_base(root, base_model_name_or_path=None)
    with pytest.raises(FusionBenchError, match=r"_pretrained_: the adapter names no base model"):
        CausalLMPool({"_pretrained_": root / "x", "other": root / "other"}).weights("_pretrained_")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `base` and `a`, in float32."""
    root = tmp_path_factory.mktemp("llama")
    for seed, name in enumerate(("base", "a")):
        write_llama(root / name, seed=seed, dtype=torch.float32)
    return root


@pytest.mark.parametrize("with_pretrained", [True, False])
def test_two_adapters_are_averaged(family: Path, tmp_path: Path, with_pretrained: bool) -> None:
    base = CausalLMPool({"base": family / "base"}).weights("base")
    added = []
    for seed, name in enumerate("xy"):
        declared = "/gone" if with_pretrained else str(family / "base")
        folder = tmp_path / name
        added.append(write_lora(folder, dict(base), MODULES[seed:], base_name=declared, seed=seed))
    models: dict[str, Any] = {name: tmp_path / name for name in "xy"}
    if with_pretrained:  # the place of the training is gone, so that the config must confirm it
        models = {n: {"path": place, "base": "_pretrained_"} for n, place in models.items()}
        models["_pretrained_"] = family / "base"
    merged = in_memory(average(CausalLMPool(models)))
    assert set(merged) == set(base)
    for key in base:
        total = sum(part[key] for part in added if key in part)
        expected = base[key].double() + total / 2
        assert torch.allclose(merged[key].double(), expected, atol=1e-5)


def test_an_adapter_is_loaded_and_saved_as_a_whole_model(family: Path, tmp_path: Path) -> None:
    base = dict(CausalLMPool({"base": family / "base"}).weights("base"))
    added = write_lora(tmp_path / "x", base, MODULES, base_name=str(family / "base"))
    models = CausalLMPool({"x": tmp_path / "x"})
    expected = AutoModelForCausalLM.from_pretrained(family / "base")
    with torch.no_grad():
        for key, value in added.items():
            expected.state_dict()[key] += value
        models.save_model(models.weights("x"), tmp_path / "m")
        for model in (
            models.load_model("x"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        ):
            assert torch.allclose(
                model(IDS).logits,
                expected(IDS).logits,
                atol=1e-4,
            )
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= names
    assert not any(name.startswith("adapter") for name in names)


def test_an_adapter_is_merged_with_whole_models(family: Path, tmp_path: Path) -> None:
    base = dict(CausalLMPool({"base": family / "base"}).weights("base"))
    added = write_lora(tmp_path / "x", base, MODULES)
    a = CausalLMPool({"a": family / "a"}).weights("a")
    models = {"_pretrained_": family / "base", "a": family / "a", "x": tmp_path / "x"}
    merged = in_memory(average(CausalLMPool(models)))
    key = f"{MODULES[0]}.weight"
    expected = (a[key].double() + base[key].double() + added[key]) / 2
    assert torch.allclose(merged[key].double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["module", "file"])
def test_an_adapters_base_may_be_a_module_or_a_file(
    family: Path, tmp_path: Path, kind: str
) -> None:
    base = dict(CausalLMPool({"base": family / "base"}).weights("base"))
    added = write_lora(tmp_path / "x", base, MODULES)
    source: Any = family / "base" / "model.safetensors"
    if kind == "module":
        source = AutoModelForCausalLM.from_pretrained(family / "base")
    models = CausalLMPool({"_pretrained_": source, "x": tmp_path / "x"})
    weights = in_memory(models.weights("x"))
    for key, value in added.items():
        assert torch.allclose(weights[key].double(), base[key].double() + value, atol=1e-5)
    models.save_model(models.weights("x"), tmp_path / "m")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_an_adapter_without_a_base_says_how_to_name_one(family: Path, tmp_path: Path) -> None:
    base = dict(CausalLMPool({"base": family / "base"}).weights("base"))
    write_lora(tmp_path / "x", base, MODULES, base_name=str(family / "bsae"))
    write_lora(tmp_path / "y", base, MODULES, base_name=None)
    with pytest.raises(FusionBenchError, match=r"models\.x.*bsae.*Did you mean.*'_pretrained_'"):
        CausalLMPool({"x": tmp_path / "x"}).weights("x")
    with pytest.raises(FusionBenchError, match=r"models\.y.*names no base.*'_pretrained_'"):
        CausalLMPool({"y": tmp_path / "y"}).weights("y")


def test_an_adapter_of_another_base_is_refused(family: Path, tmp_path: Path) -> None:
    other = {"model.layers.7.self_attn.q_proj.weight": torch.zeros(12, 12)}
    write_lora(tmp_path / "x", other, ["model.layers.7.self_attn.q_proj"])
    with pytest.raises(FusionBenchError, match=r"do not have under this name(.|\n)*layers\.7"):
        CausalLMPool({"_pretrained_": family / "base", "x": tmp_path / "x"}).weights("x")


def test_an_adapter_without_weights_is_refused(family: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "x", {}, [])
    (tmp_path / "x" / "adapter_model.safetensors").unlink()
    with pytest.raises(FusionBenchError, match=r"models\.x.*adapter_model\.safetensors"):
        CausalLMPool({"_pretrained_": family / "base", "x": tmp_path / "x"}).weights("x")


def test_an_adapters_own_copy_of_a_layer_is_what_it_changes(family: Path, tmp_path: Path) -> None:
    base = dict(CausalLMPool({"base": family / "base"}).weights("base"))
    added = write_lora(tmp_path / "x", base, MODULES)
    file = tmp_path / "x" / "adapter_model.safetensors"
    copy = torch.ones_like(base[f"{MODULES[0]}.weight"])
    name = f"base_model.model.{MODULES[0]}.base_layer.weight"
    save_file({**load_file(file), name: copy}, file)
    models = CausalLMPool({"_pretrained_": family / "base", "x": tmp_path / "x"})
    key = f"{MODULES[0]}.weight"
    assert torch.allclose(models.weights("x")[key].double(), copy.double() + added[key])


def test_base_and_adapter_in_one_name(root: Path) -> None:
    write_lora(root / "y", tensors(root / "base"), MODULES[:1], seed=3, base_name="owner/unknown")
    base, other, x, y = (str(root / name) for name in ("base", "other", "x", "y"))
    models = pool(
        root, x=f"{other}+{x}", y=f"{base}+{y}", both=f"{other}+{x}+{y}", own="_pretrained_+" + y
    )
    assert models.plan(built=False).problems == []
    same = pool(root, x={"path": x, "base": other}, y={"path": y, "base": base})
    for name in "xy":
        for key, value in in_memory(same.weights(name)).items():
            assert torch.equal(models.weights(name)[key], value)
    assert torch.equal(models.weights("own")[KEY], models.weights("y")[KEY])
    # One after another, as if each were merged in turn.
    added = models.weights("y")[KEY] - models.weights("_pretrained_")[KEY]
    wanted = models.weights("x")[KEY] + added
    assert (models.weights("both")[KEY] - wanted).abs().max() < 1e-6
    origin = models.weights("both").files
    assert {file.parent.name for file in origin} == {"other", "x", "y"}


def test_a_plus_in_a_path_separates_nothing(root: Path) -> None:
    shutil.copytree(root / "other", root / "c++")
    shutil.copytree(root / "x", root / "a+b")
    assert split(str(root / "c++")) is None
    both = (str(root / "c++"), str(root / "a+b"))
    assert split("+".join(both)) == both
    assert split("owner/model@main+owner/adapter@v1") == ("owner/model@main", "owner/adapter@v1")
    assert split("owner/model+") is None and split("+owner/adapter") is None
    models = pool(root, x="+".join(both))
    assert torch.equal(
        models.weights("x")[KEY], pool(root, x=f"{root / 'other'}+{root / 'x'}").weights("x")[KEY]
    )


def test_what_follows_a_plus_is_an_adapter(root: Path) -> None:
    base, other, x = (str(root / name) for name in ("base", "other", "x"))
    assert "is no adapter" in both(pool(root, x=f"{base}+{other}"))
    assert "is no adapter" in both(pool(root, x=f"{base}+{other}+{x}"))
    assert "no such directory: './gone'" in both(pool(root, x=f"./gone+{x}"))


def test_models_on_the_command_line_may_have_a_plus(root: Path) -> None:
    words = ["--config-name", "merge_llm", f"+modelpool.models.x={root / 'other'}+{root / 'x'}"]
    words += [f"+modelpool.models._pretrained_={root / 'base'}", "dry_run=true"]
    done = fusion_bench(*words, "method=task_arithmetic", cwd=root)
    assert done.returncode == 0, done.stderr
