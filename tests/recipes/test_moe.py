"""Mixtures of experts: what mergekit's document for them becomes."""

import pytest

from fusion_bench.problems import FusionBenchError
from fusion_bench.recipes import models_of, translate

DOCUMENT = """
base_model: org/base
gate_mode: hidden
dtype: bfloat16
experts_per_token: 3
experts:
  - source_model: org/base
    positive_prompts: [hello, "how are you"]
  - source_model: org/code@main
    positive_prompts: [def]
    negative_prompts: [hello]
    noise_scale: 0.1
    residual_scale: 0.5
  - source_model: org/base+org/lora
    positive_prompts: [sum]
shared_experts:
  - source_model: org/code@main
    residual_scale: 0.1
"""


def test_a_document_becomes_a_config() -> None:
    made = translate(DOCUMENT)
    assert made.method == {
        "_target_": "fusion_bench.method.MixtureOfExperts",
        "gate": "hidden",
        "state": "last",
        "experts_per_token": 3,
        "experts": [
            {"model": "_pretrained_", "positive_prompts": ["hello", "how are you"]},
            {
                "model": "code",
                "positive_prompts": ["def"],
                "negative_prompts": ["hello"],
                "noise": 0.1,
                "scale": 0.5,
            },
            {"model": "lora", "positive_prompts": ["sum"]},
        ],
        "shared_expert": {"model": "code", "scale": 0.1},
    }
    assert made.modelpool == {
        "_target_": "fusion_bench.modelpool.CausalLMPool",
        "models": {
            "_pretrained_": "org/base",
            "code": "org/code@main",
            "lora": {"path": "org/lora", "base": "org/base"},
        },
        "policy": {"dtype": "bfloat16"},
    }
    assert made.notes == () and models_of(DOCUMENT)[0][0] == "org/base"


def test_names_of_the_pool_and_copies_of_the_base() -> None:
    named = translate(DOCUMENT, None, {"org/code@main": "mine"})
    assert named.modelpool["models"]["mine"] == "org/code@main"  # type: ignore[index]
    copies = translate("base_model: a\nexperts: [{source_model: a}, {source_model: a}]\n")
    assert copies.modelpool["models"] == {"model": "a"}
    assert copies.method["experts"] == [{"model": "model"}, {"model": "model"}]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("hidden_avg", {"gate": "hidden", "state": "mean"}),
        ("cheap_embed", {"gate": "embedding"}),
        ("uniform_random", {"gate": "random"}),
    ],
)
def test_gates(mode: str, options: dict[str, str]) -> None:
    expert = '{source_model: b, positive_prompts: [""], residual_scale: 0}'
    made = translate(f"base_model: a\ngate_mode: {mode}\nexperts: [{expert}]\n")
    assert made.method["experts"] == [{"model": "b", "scale": 0}]
    assert options.items() <= made.method.items()
    assert bool(made.notes) == (mode == "uniform_random")


def test_every_mistake_is_told_at_once_with_its_place() -> None:
    with pytest.raises(FusionBenchError) as caught:
        translate("""
base_modle: a
gate_mode: hiden
dtype: float17
architecture: deepseek
experts:
  - {source_model: b, positive_prompt: [x]}
  - 3
shared_experts: [{source_model: b}, {source_model: c}]
""")
    found = {p.key: f"{p.reason} {p.remedy}".strip() for p in caught.value.problems}
    assert found == {
        "base_modle": "there is no such key. Did you mean 'base_model'?",
        "base_model": "missing.",
        "experts[0].positive_prompt": "there is no such key. Did you mean 'positive_prompts'?",
        "experts[1]": "3 is no expert. Give its source_model.",
        "shared_experts": "there are several. Name one; no layout has more.",
        "gate_mode": "'hiden' is unknown. Did you mean 'hidden'?",
        "architecture": "'deepseek' is unknown. Known: mixtral, qwen, qwen2, qwen3.",
        "dtype": "'float17' is no type of weights. Did you mean 'float16'?",
    }
