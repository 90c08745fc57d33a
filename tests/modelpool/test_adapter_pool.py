"""Adapters as models of their own, and the command line that merges them."""

import json
from pathlib import Path

import pytest
import torch
from commandline import fusion_bench
from fixtures_llm import rewrite, write_lora
from fixtures_peft import made, read, write_adapter
from safetensors.torch import load_file
from torch import Tensor

from fusion_bench.modelpool import AdapterPool
from fusion_bench.modelpool.adapter_folder import _arranged, draw
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights.adapter_builder import ModuleChange

BASE: dict[str, Tensor] = {f"layers.{i}.up.weight": torch.zeros(6, 5) for i in range(2)}
MODULES = ["layers.0.up", "layers.1.up"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write two adapters of a base that is not there."""
    for seed, name in enumerate("ab"):
        write_lora(tmp_path / name, BASE, MODULES, seed=seed, base_name="owner/base")
    return tmp_path


def pool(root: Path, **more: object) -> AdapterPool:
    return AdapterPool({name: str(root / name) for name in "ab"}, **more)  # type: ignore[arg-type]


def test_products_are_task_vectors_without_a_base(tmp_path: Path) -> None:
    added = write_lora(tmp_path / "a", BASE, MODULES[:1], base_name="owner/base")
    write_lora(tmp_path / "b", BASE, MODULES[1:], seed=1, base_name="owner/base")
    models = pool(tmp_path)
    assert not models.plan(built=False).problems
    assert list(models.weights("b")) == [f"{module}.weight" for module in MODULES]
    for key, value in added.items():
        assert torch.allclose(models.weights("a")[key], value.float(), atol=1e-6)
        assert not models.weights("b")[key].any() and not models.weights("_pretrained_")[key].any()


def test_the_command_line_merges_adapters(root: Path) -> None:
    words = ["--config-name", "merge_llm", "modelpool=AdapterPool/_template"]
    words += ["+modelpool.models.a=a", "+modelpool.models.b=b", "merged_model_save_path=out"]
    done = fusion_bench(*words, "method=lora/merge", "method.weights=[0.5,0.5]", cwd=root)
    assert done.returncode == 0, done.stderr
    config = json.loads((root / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["target_modules"] == MODULES
    stored = load_file(root / "out" / "adapter_model.safetensors")
    models = pool(root)
    for module in MODULES:
        b, a = (stored[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
        one, other = (models.weights(name)[f"{module}.weight"] for name in "ab")
        assert torch.allclose(b @ a, 0.5 * one + 0.5 * other, atol=1e-6)
    again = ["method=ties", "overwrite=true", "modelpool.rank=1"]
    done = fusion_bench(*words, *again, cwd=root)
    assert done.returncode == 0, done.stderr
    config = json.loads((root / "out" / "adapter_config.json").read_text())
    assert config["r"] == 1 and config["task_type"] == "CAUSAL_LM"  # as of both
    errors = json.loads((root / "out" / "adapter_errors.json").read_text())["modules"]
    worst = max(errors, key=lambda own: own["error"])
    said = f"up to {100 * worst['error']:.2g} % of a merged product: of {worst['module']}, at rank"
    assert (
        said in done.stderr + done.stdout and "A larger modelpool.rank" in done.stderr + done.stdout
    )
    assert said in (root / "out" / "README.md").read_text(encoding="utf-8")
    report = max(root.glob("outputs/*/*/report.json"), key=lambda file: file.stat().st_mtime_ns)
    assert any(said in note for note in json.loads(report.read_text())["run"]["notes"])
    assert f"Adapter: {root / 'out'}" in done.stdout
    verified = fusion_bench("verify", "out", cwd=root)
    assert verified.returncode == 0 and "computed again from the recipe" in verified.stdout
    done = fusion_bench(*words, *again, "dry_run=true", cwd=root)
    assert done.returncode == 0, done.stderr


def test_adapters_of_several_bases_are_refused(root: Path) -> None:
    rewrite(
        root / "b",
        lambda config: config.update(base_model_name_or_path="owner/other"),
        "adapter_config.json",
    )
    with pytest.raises(FusionBenchError, match="trained on several bases: 'owner/base'"):
        pool(root).compare()
    (note,) = pool(root, policy={"on_config": "warn"}).compare()
    assert "owner/other" in note
    write_lora(root / "c", {MODULES[0] + ".weight": torch.zeros(6, 4)}, MODULES[:1])
    other = AdapterPool({"a": str(root / "a"), "c": str(root / "c")})
    assert "they are of different bases" in str(other.plan(built=False).problems[0])


def test_mistakes_are_told(root: Path) -> None:
    with pytest.raises(FusionBenchError, match="the pool is empty"):
        AdapterPool({})
    with pytest.raises(FusionBenchError, match="merged without a base"):
        AdapterPool({"_pretrained_": "x", "a": "a"})
    with pytest.raises(FusionBenchError, match="no such key"):
        pool(root, policy={"on_confg": "warn"})
    (root / "model").mkdir()
    (problem,) = AdapterPool({"a": str(root / "model")}).plan(built=False).problems
    assert "is no adapter" in problem.reason and problem.place == ("models", "a")
    (problem,) = pool(root).plan().problems
    assert "cannot be evaluated" in problem.reason
    (root / "b" / "adapter_model.safetensors").unlink()
    (problem,) = pool(root).plan(built=False).problems
    assert "there are no weights" in problem.reason


def test_the_card_puts_a_merged_adapter_on_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's code runs, from another folder, though the adapters name the base by a path."""
    pytest.importorskip("peft")
    made("llama").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for told in ({}, {"task_type": "CAUSAL_LM"}):
        settings = {"r": 2, "target_modules": ["q_proj"], **told}
        write_adapter(tmp_path / "a", read("llama", Path("base")), **settings)
        models = AdapterPool({"a": str(tmp_path / "a")})
        models.save_model(models.weights("a"), tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        code = card.split("```python\n")[1].split("```")[0]
        assert str(tmp_path / "base") in code
        code = code.replace('"out"', f"{str(tmp_path / 'out')!r}")
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        exec(code, {})
        monkeypatch.chdir(tmp_path)


def test_the_class_of_the_base_is_told_by_what_is_known(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", BASE, MODULES, base_name="owner/base")
    for task, wanted in (
        ("CAUSAL_LM", "AutoModelForCausalLM"),
        ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
        (None, None),
    ):
        change = {"task_type": task}
        rewrite(tmp_path / "a", lambda c, change=change: c.update(change), "adapter_config.json")
        models = AdapterPool({"a": str(tmp_path / "a")})
        models.save_model(models.weights("a"), tmp_path / "out")
        written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (written["auto_mapping"] or {}).get("base_model_class") == wanted
        assert ("## Usage" in (tmp_path / "out" / "README.md").read_text()) == bool(wanted)


def test_a_missing_scaling_is_named(root: Path) -> None:
    rewrite(root / "b", lambda config: config.pop("lora_alpha"), "adapter_config.json")
    (problem,) = pool(root).plan(built=False).problems
    assert "'lora_alpha' is missing" in problem.reason


def test_many_kinds_of_modules_are_drawn_in_panels(tmp_path: Path) -> None:
    changes = [
        ModuleChange(f"model.layers.{layer}.{block}.experts.{expert}.{name}", "factors", 2, error)
        for block in map("block{}".format, range(12))
        for layer in range(3)
        for expert in range(2)
        for name, error in (("w1", 0.5), ("w2", 0.7 - 0.1 * layer))
    ]
    changes += [ModuleChange("head", "factors", 2, float("nan"))]
    blocks, alone = _arranged(changes)
    assert len(blocks) == 12 and not alone
    assert blocks["model.layers.*.block3.experts.*"] == {
        "w1": {layer: [0.5, 0.5] for layer in range(3)},
        "w2": {layer: [0.7 - 0.1 * layer] * 2 for layer in range(3)},
    }
    draw(changes, tmp_path / "many.png")
    draw([], tmp_path / "none.png")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")
