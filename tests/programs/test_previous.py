"""A run that was done before is not done again, unless something has changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llm import write_llama, write_lora
from safetensors.torch import load_file, save_file

from fusion_bench.instantiate import instantiate
from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs.pools import placed
from fusion_bench.programs.previous import identities
from fusion_bench.report import Report


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with each merge."""
    done: list[str] = []
    before = SimpleAverageAlgorithm.run

    def run(self: SimpleAverageAlgorithm, *arguments: Any) -> Any:
        done.append("merge")
        return before(self, *arguments)

    monkeypatch.setattr(SimpleAverageAlgorithm, "run", run)
    return done


def run(config: dict[str, Any], **changes: Any) -> Report:
    return instantiate({**config, **changes}).run()


def test_the_report_stands(
    program_config: dict[str, Any], tmp_path: Path, merges: list[str]
) -> None:
    saved = {
        "merged_model_save_path": "{log_dir}/merged",
        "report_save_path": str(tmp_path / "r.json"),
    }
    first = run(program_config, output_dir=tmp_path / "out", **saved)
    before = (tmp_path / "out" / "report.json").read_bytes()
    second = run(program_config, output_dir=tmp_path / "out", **saved)
    assert second == first and len(merges) == 1
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    run(program_config, output_dir=tmp_path / "elsewhere")
    assert len(merges) == 2


def test_another_config_is_another_run(
    program_config: dict[str, Any], tmp_path: Path, merges: list[str]
) -> None:
    run(program_config, output_dir=tmp_path)
    run(program_config, output_dir=tmp_path, seed=1, overwrite=True)
    assert len(merges) == 2


def test_another_model_under_the_same_name(
    program_config: dict[str, Any], tmp_path: Path, merges: list[str]
) -> None:
    source = Path(program_config["modelpool"]["models"]["a"])
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in source.iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    program_config["modelpool"]["models"]["a"] = str(mine)
    model = "{log_dir}/merged"
    first = run(program_config, output_dir=tmp_path / "out", merged_model_save_path=model)
    weights = {k: v + torch.ones_like(v) for k, v in load_file(mine / "model.safetensors").items()}
    (mine / "model.safetensors").unlink()
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    # What is there belongs to other models, and is not replaced unasked.
    with pytest.raises(FusionBenchError, match=r"merged_model_save_path: .* exists already"):
        run(program_config, output_dir=tmp_path / "out", merged_model_save_path=model)
    second = run(program_config, output_dir=tmp_path / "new")
    assert len(merges) == 2
    assert second.run.inputs["b"] == first.run.inputs["b"]
    assert second.run.inputs["a"] != first.run.inputs["a"]
    assert second.models["merged"].identity != first.models["merged"].identity


@pytest.mark.parametrize("damage", ["report.json", "report.scores.safetensors"])
def test_a_damaged_report_counts_as_none(
    program_config: dict[str, Any], tmp_path: Path, merges: list[str], damage: str
) -> None:
    first = run(program_config, output_dir=tmp_path)
    (tmp_path / damage).write_bytes((tmp_path / damage).read_bytes()[:50])
    assert run(program_config, output_dir=tmp_path).models == first.models
    assert len(merges) == 2


def test_the_report_tells_similarities_and_intervals(
    program_config: dict[str, Any], tmp_path: Path
) -> None:
    report = run(program_config, output_dir=tmp_path)
    assert report.similarity is not None
    assert report.similarity.models == ["a", "b"] and report.similarity.parts[0] == "all"
    assert set(report.run.inputs) == {"_pretrained_", "a", "b"}
    pairs = {(c.of, c.beside): c for c in report.comparisons}
    assert set(pairs) == {("merged", "pretrained"), ("merged", "individual")}
    merged = report.models["merged"]
    for (_, other), found in pairs.items():
        for task in found.tasks:
            difference = found.on(task)
            assert difference is not None
            beside = report.models["_pretrained_" if other == "pretrained" else task]
            expected = merged.tasks[task].main.value - beside.tasks[task].main.value
            assert difference.difference == pytest.approx(expected)
            assert difference.low <= difference.difference <= difference.high
    assert run(program_config, similarity=False).similarity is None


def test_what_else_decides_counts_too(tmp_path: Path) -> None:
    """The weights are the same, and what is computed with them is not."""
    base = write_llama(tmp_path / "base")
    write_lora(tmp_path / "a", base, ["model.layers.0.self_attn.q_proj"])
    models = {"_pretrained_": str(tmp_path / "base"), "a": str(tmp_path / "a")}

    def known() -> dict[str, str]:
        return identities(placed(CausalLMPool(models)))

    first = known()
    assert known() == first
    for folder, name, key, value in (
        ("a", "adapter_config.json", "lora_alpha", 60),
        ("base", "config.json", "rms_norm_eps", 0.3),
    ):
        file = tmp_path / folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
        changed = known()
        assert changed["a"] != first["a"]
        first = changed
