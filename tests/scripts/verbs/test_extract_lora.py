"""The verb that extracts an adapter, from the models to the table in the terminal."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from commandline import fusion_bench
from fixtures_peft import FAMILIES, write_pair
from rich.console import Console

from fusion_bench.method import ExtractLora
from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs.preflight import nbytes_of
from fusion_bench.scripts import verbs
from fusion_bench.scripts.verbs.extract_lora import _table

WORDS = ["extract-lora", "tuned", "--base", "base", "--out", "adapter"]


def test_an_adapter_is_extracted_and_its_errors_are_shown(tmp_path: Path) -> None:
    write_pair("llama", tmp_path)
    done = fusion_bench(*WORDS, "--rank", "4", cwd=tmp_path, env={"COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    errors = json.loads((tmp_path / "adapter" / "adapter_errors.json").read_text())["modules"]
    worst = max(errors, key=lambda own: own["error"])
    table = done.stdout[done.stdout.index("What the adapter misses") :]
    first = next(line for line in table.splitlines() if "model.layers.*" in line).split()
    kind = worst["module"].replace(".0.", ".*.").replace(".1.", ".*.")
    assert first[:3] == [kind, "2", "4"]
    assert first[4:] == [f"{worst['error']:.2%}", worst["module"].split(".")[2]]
    assert str(tmp_path / "adapter" / "adapter_errors.png") in done.stdout
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and "Adapter: " in done.stdout
    verified = fusion_bench("verify", "adapter", cwd=tmp_path)
    assert verified.returncode == 0 and "computed again from the recipe" in verified.stdout
    again = fusion_bench(*WORDS, "--energy", "0.9", cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr
    assert "or give --overwrite." in again.stderr
    again = fusion_bench(
        *WORDS, "--energy", "0.9", "--overwrite", "embeddings=factors", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and "embed_tokens" in config["target_modules"]
    # The adapter on its base is a model, in any verb.
    pair = ["merge", "base+adapter", "tuned", "--base", "base", "--out", "merged", "--method", "ta"]
    done = fusion_bench(*pair, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    write_pair("llama", tmp_path)
    done = fusion_bench(*WORDS, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "valid" in done.stdout and not (tmp_path / "adapter").exists()
    assert "a LoRA adapter of a rank up to 32" in done.stdout and " hold " in done.stdout


@pytest.mark.parametrize(
    "options", [{"rank": 3}, {"energy": 0.5}, {"rank": 3, "embeddings": "factors"}]
)
@pytest.mark.parametrize("family", ["llama-tied", "vit", "gpt2"])
def test_the_size_is_told_by_headers(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = write_pair(family, tmp_path)
    models = {"_pretrained_": str(base), "m": str(tuned)}
    pool = HFModelPool(models, model_class=FAMILIES[family][0])
    method = ExtractLora(**options)
    told = nbytes_of(method.outline(pool))
    made = method.fuse(pool).adapter.tensors  # type: ignore[union-attr]
    size = sum(made.spec(key).nbytes for key in made)
    assert size <= told
    if "energy" not in options:
        assert told <= 1.05 * size


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    base, tuned = map(str, write_pair("llama", tmp_path))
    with pytest.raises(FusionBenchError, match="there are 2 models"):
        verbs.run("extract-lora", [base, tuned, "--base", base, "--out", "x"])
    with pytest.raises(FusionBenchError, match="is one of the models"):
        verbs.run("extract-lora", [tuned, "--base", base, "--out", tuned, "--overwrite"])
    done = fusion_bench(*WORDS, "--rank", "0", cwd=tmp_path)
    assert done.returncode == 2 and "method.rank: 0 is not a whole number" in done.stderr


def test_a_long_name_is_broken_behind_a_dot() -> None:
    name = "model.layers.*.post_attention_layernorm"
    change = {"module": name.replace("*", "0"), "how": "whole", "rank": 0, "error": 0.0}
    console = Console(width=80, record=True, file=StringIO())
    console.print(_table([change, {**change, "module": "x", "error": None}], 80))
    text = console.export_text()
    first = next(line for line in text.splitlines() if "model.layers" in line)
    assert first.split()[0].endswith(".") and "post_attention_layernorm" in text
