"""Mixtures of experts, from configs to mergekit's documents and back."""

from typing import Any

import pytest
import yaml
from recipes.test_moe import DOCUMENT

from fusion_bench.problems import FusionBenchError
from fusion_bench.recipes import translate
from fusion_bench.recipes.export import export

METHOD = {"_target_": "fusion_bench.method.MixtureOfExperts"}
POOL = {"models": {"_pretrained_": "x/base", "a": "x/a", "b": "x/b"}}


def document(method: dict[str, Any], pool: dict[str, Any] | None = None) -> Any:
    found = export({"method": METHOD | method, "modelpool": POOL | (pool or {})})
    return yaml.safe_load(found.text)


def test_there_and_back() -> None:
    made = translate(DOCUMENT)
    again = export({"method": made.method, "modelpool": made.modelpool}).text
    assert yaml.safe_load(again) == yaml.safe_load(DOCUMENT)
    assert translate(again) == made


@pytest.mark.parametrize("layout", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_random_gates_and_noise_of_all(layout: str) -> None:
    options = {"gate": "random", "noise": 0.5, "layout": layout, "experts_per_token": 1}
    options["experts"] = ["a", {"model": "b", "noise": 0, "scale": 2, "positive_prompts": "x"}]
    found = document(options)
    assert found["gate_mode"] == "random" and found["experts_per_token"] == 1
    assert found["experts"] == [
        {"source_model": "x/a", "noise_scale": 0.5},
        {
            "source_model": "x/b",
            "positive_prompts": ["x"],
            "noise_scale": 0,
            "residual_scale": 2,
        },
    ]
    assert translate(yaml.safe_dump(found)).method["layout"] == layout


def test_copies_of_one_model_and_all_models() -> None:
    one = {"models": {"a": "x/a"}}
    found = document({"gate": "random", "num_experts": 3}, one)
    assert found["base_model"] == "x/a" and found["experts"] == [{"source_model": "x/a"}] * 3
    assert [own["source_model"] for own in document({"gate": "random"})["experts"]] == [
        "x/a",
        "x/b",
    ]


def test_what_no_document_has() -> None:
    with pytest.raises(FusionBenchError) as caught:
        document({"gate": "zero"}, {"tokenizer": "union"})
    keys = [problem.key for problem in caught.value.problems]
    assert keys == [
        "method.gate",
        "method.experts[0].positive_prompts",
        "method.experts[1].positive_prompts",
        "modelpool.tokenizer",
    ]
