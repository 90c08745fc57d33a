"""Whole recipes on tiny Llamas, against a reference in float64."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from recipes.reference import Array, Tensors, run
from safetensors.torch import load_file, save_file

from fusion_bench.instantiate import instantiate
from fusion_bench.programs.fusing import seeded
from fusion_bench.recipes import translate
from fusion_bench.weights import Model, Weights

NAMES = ("base", "a", "b", "c")
Load = Callable[[str], Tensors]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write tiny Llamas, three of which are changes of the first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    base = {name: own.clone() for name, own in model.state_dict().items()}
    for name in NAMES:
        if name != "base":
            for key, own in model.state_dict().items():
                own.copy_(base[key] + 0.3 * torch.randn(own.shape))
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Stand in the models' folder; return what opens one in float64."""
    monkeypatch.chdir(models)
    return cache(partial(opened, models))


def opened(folder: Path, name: str) -> Tensors:
    """Return a model's tensors in the order of the model."""
    tensors = load_file(folder / name / "model.safetensors")
    order = ["model.embed_tokens", "model.layers", "model.norm", "lm_head"]
    keys = sorted(tensors, key=lambda key: [not key.startswith(own) for own in order])
    return {key: tensors[key].double().numpy() for key in keys}


def merged(text: str, seed: int | None = None) -> Tensors:
    """Return what our translation of a recipe makes."""
    found = translate(text)
    pool = instantiate({"_recursive_": False, **found.modelpool}, "modelpool")
    method = instantiate(seeded(found.method, seed), "method")
    method.check_pool(pool)
    fused = method.fuse(pool)
    weights = fused.weights if isinstance(fused, Model) else fused
    assert isinstance(weights, Weights)
    return {key: weights[key].double().numpy() for key in weights}


def agree(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    for key, own in expected.items():
        assert found[key].shape == own.shape, key
        np.testing.assert_allclose(found[key], own, rtol=2e-5, atol=2e-6, err_msg=key)


def recipe(
    method: str, count: int, parameters: str = "{}", own: str = "{}", base: bool = True
) -> str:
    """Return a recipe of so many models beside the base."""
    lines = [f"merge_method: {method}", "dtype: float32", f"parameters: {parameters}"]
    lines += ["base_model: base"] if base else []
    lines += ["models:"]
    for name in NAMES[1 : count + 1]:
        lines += [f"  - model: {name}", f"    parameters: {own}"]
    return "\n".join(lines)


GRADIENT = "{weight: [0.2, 0.9, 0.4], density: [{filter: mlp, value: [0.2, 0.7]}, {value: 0.5}]}"

PLAIN = {
    "linear": recipe("linear", 3, own="{weight: 0.7}", base=False),
    "linear of its own sum": recipe(
        "linear", 2, "{normalize: false}", "{weight: [0.1, 0.5]}", base=False
    ),
    "slerp": recipe("slerp", 1, "{t: [{filter: self_attn, value: [0, 0.5, 1]}, {value: 0.3}]}"),
    "slerp beyond its ends": recipe("slerp", 1, "{t: [{filter: mlp, value: -0.5}, {value: 1.7}]}"),
    "nuslerp": recipe("nuslerp", 2, own="{weight: [0.3, 0.8]}", base=False),
    "nuslerp by rows": recipe("nuslerp", 2, "{nuslerp_flatten: false}", "{weight: 0.4}"),
    "nuslerp by columns": recipe(
        "nuslerp", 2, "{nuslerp_flatten: false, nuslerp_row_wise: true}", "{weight: 0.4}"
    ),
    "multislerp": recipe("multislerp", 3, own="{weight: [0.2, 0.6]}"),
    "karcher": recipe("karcher", 3, "{max_iter: 30, tol: 1e-9}", base=False),
    "task_arithmetic": recipe(
        "task_arithmetic", 2, "{lambda: 0.6}", "{weight: [{filter: mlp, value: 2}, {value: 0.5}]}"
    ),
    "task_arithmetic normalised": recipe(
        "task_arithmetic", 2, "{normalize: true}", "{weight: [0.3, 1]}"
    ),
    "ties": recipe("ties", 3, "{lambda: 0.9}", GRADIENT),
    "ties of sums": recipe("ties", 3, "{normalize: false}", GRADIENT),
    "ties with nearly nothing": recipe("ties", 2, own="{weight: 1, density: 0.0001}"),
    "ties rescaled": recipe("ties", 2, "{rescale: true}", "{weight: 1, density: 0.3}"),
    "dare_linear": recipe("dare_linear", 2, own="{weight: 0.5}"),
    "dare_ties": recipe("dare_ties", 3, own="{weight: 0.5}"),
    "breadcrumbs": recipe("breadcrumbs", 2, own="{weight: 0.5, density: 0.6, gamma: 0.1}"),
    "breadcrumbs beyond all": recipe("breadcrumbs", 2, own="{weight: 1, density: 0.9, gamma: 0.3}"),
    "breadcrumbs_ties": recipe(
        "breadcrumbs_ties", 3, own="{weight: 0.5, density: [0.5, 0.8], gamma: 0.05}"
    ),
    "della": recipe("della", 2, own="{weight: 0.5}"),
    "della_linear": recipe("della_linear", 2, "{lambda: 0.5}", "{weight: 0.5}"),
    "model_stock": recipe("model_stock", 3),
    "model_stock by rows": recipe("model_stock", 2, "{filter_wise: true}"),
    "nearswap": recipe("nearswap", 1, "{t: 0.1}"),
    "arcee_fusion": recipe("arcee_fusion", 1),
    "sce": recipe("sce", 3),
    "sce of some": recipe("sce", 3, "{select_topk: 0.4}"),
    "ram": recipe("ram", 3, "{epsilon: 0.2}"),
    "ramplus_tl": recipe("ramplus_tl", 3, "{epsilon: 0.3, r: 0.5, alpha: 0.7}"),
    "passthrough": recipe("passthrough", 1, own="{scale: [1, 0.5]}", base=False),
}


@pytest.mark.parametrize("name", PLAIN)
def test_every_method(name: str, here: Load) -> None:
    agree(merged(PLAIN[name]), run(PLAIN[name], here))


DRAWN = {
    "dare_linear": "{weight: [0.3, 0.9], density: 0.6}",
    "dare_ties": "{weight: 0.7, density: [0.4, 0.8]}",
    "della": "{weight: 0.6, density: 0.6, epsilon: 0.2}",
    "della_linear": "{weight: 0.6, density: 0.5, epsilon: 0.1}",
}


@pytest.mark.parametrize("method", DRAWN)
@pytest.mark.parametrize("rescale", ["true", "false"])
def test_what_is_drawn(method: str, rescale: str, here: Load) -> None:
    # A model alone shows which of its elements were kept: the same as beside others.
    text = recipe(method, 2, f"{{rescale: {rescale}}}", DRAWN[method])
    alone: dict[str, Tensors] = {}
    base = here("base")
    for name in ("a", "b"):
        one = yaml.safe_load(text)
        one["models"] = [own for own in one["models"] if own["model"] == name]
        one["parameters"] = {"rescale": False}
        one["models"][0]["parameters"]["weight"] = 1
        found = merged(yaml.safe_dump(one), seed=1)
        alone[name] = {key: (own != base[key]).astype(float) for key, own in found.items()}
    kept = np.concatenate([own.ravel() for own in alone["a"].values()]).mean()
    assert 0.35 < kept < 0.75

    def masks(model: str, key: str) -> Array:
        return alone[model][key]

    agree(merged(text, seed=1), run(text, here, masks))


TWO_STAGES = """\
name: first
merge_method: task_arithmetic
base_model: base
dtype: float32
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: [0, 1]}}
---
name: second
merge_method: linear
dtype: float32
models:
  - {model: first, parameters: {weight: 1}}
  - {model: c, parameters: {weight: 2}}
---
merge_method: ties
base_model: base
dtype: float32
models:
  - {model: second, parameters: {weight: 1, density: 0.5}}
  - {model: first, parameters: {weight: 0.5, density: 0.7}}
  - {model: c, parameters: {weight: 0.5, density: 0.7}}
"""


def test_stages(here: Load) -> None:
    agree(merged(TWO_STAGES), run(TWO_STAGES, here))


def test_a_base_among_the_models(here: Load) -> None:
    # Task vector methods skip it, and linear takes it like the others.
    for method in ("ties", "linear"):
        text = recipe(method, 2, own="{weight: 1}")
        text += "\n  - {model: base, parameters: {weight: 0.5}}"
        agree(merged(text), run(text, here))


def test_the_base_is_one_more_model_with_a_weight_for_all(here: Load) -> None:
    text = recipe("linear", 2, "{weight: 0.5}")
    agree(merged(text), run(text, here))


def test_levels(here: Load) -> None:
    # The model's own filter fits some tensors, the others have the weight of the whole recipe.
    own = "{weight: [{filter: q_proj, value: 3}, {filter: layers.1., value: [1, 2]}]}"
    text = recipe("task_arithmetic", 2, "{weight: [{filter: mlp, value: 0.1}, {value: 0.7}]}", own)
    agree(merged(text), run(text, here))


#: Stand-ins for the kinds of recipes that mergekit's own documentation shows.
EXAMPLES = {
    "linear of two": """\
models:
  - model: a
    parameters: {weight: 1.0}
  - model: b
    parameters: {weight: 0.3}
merge_method: linear
dtype: float32
""",
    "slerp with gradients and filters": """\
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: a, layer_range: [0, 4]}
merge_method: slerp
base_model: base
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float32
""",
    "slerp along a gradient": """\
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [0, 4]}
merge_method: slerp
base_model: a
parameters: {t: [0.1, 1, 0.3]}
dtype: float32
""",
    "ties with densities of each model": """\
models:
  - model: a
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: b
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: c
    parameters:
      density: 0.33
      weight: [{filter: mlp, value: 0.5}, {value: 0}]
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
    "layers of several models": """\
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, value: 0}]}}]
  - sources: [{model: a, layer_range: [3, 4]}]
merge_method: passthrough
dtype: float32
""",
    "stages": TWO_STAGES,
}
MORE = {
    "slices that are merged": """\
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [1, 3], parameters: {weight: [0.2, 0.8]}}
      - {model: b, layer_range: [2, 4], parameters: {weight: 1}}
  - sources:
      - {model: base, layer_range: [1, 4]}
      - {model: c, layer_range: [1, 4]}
    parameters: {weight: [0, 1, 0.5], density: [{filter: mlp, value: 0.4}]}
merge_method: ties
base_model: base
parameters: {density: 0.6, lambda: 0.9}
dtype: float32
""",
    "a base of one slice": """\
slices:
  - sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]
    parameters: {t: [0.2, 0.6]}
    base_model: b
  - sources: [{model: a, layer_range: [1, 4]}, {model: b, layer_range: [1, 4]}]
merge_method: slerp
base_model: a
parameters: {t: [{filter: "layers.2.", value: 0.9}, {value: [0, 1]}]}
dtype: float32
""",
    "filters by the models' own names and by those of the result": """\
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - model: a
        layer_range: [1, 3]
        parameters: {weight: [{filter: layers.1., value: 2}, {value: 0.5}]}
  - sources:
      - {model: base, layer_range: [1, 3]}
      - model: b
        layer_range: [2, 4]
        parameters: {weight: [{filter: layers.2., value: 3}, {value: 0.7}]}
merge_method: task_arithmetic
base_model: base
parameters: {lambda: [{filter: layers.3., value: 0.1}, {value: 1}]}
dtype: float32
""",
    "scales by the model's own names": """\
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources:
      - model: b
        layer_range: [1, 4]
        parameters: {scale: [{filter: layers.3., value: 0.5}, {value: 2}]}
merge_method: passthrough
dtype: float32
""",
    "one model twice in a slice": """\
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}]
    parameters: {weight: 1}
merge_method: linear
dtype: float32
""",
}


@pytest.mark.parametrize("name", [*EXAMPLES, *MORE])
def test_examples(name: str, here: Load) -> None:
    text = {**EXAMPLES, **MORE}[name]
    agree(merged(text), run(text, here))


def test_an_adapter_on_its_own_model(here: Load, models: Path, tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    down, up = draws.normal(size=(2, 8)), draws.normal(size=(8, 2))
    key = "model.layers.1.self_attn.q_proj"
    (tmp_path / "lora").mkdir()
    adapter = {
        f"base_model.model.{key}.lora_A.weight": torch.tensor(down, dtype=torch.float32),
        f"base_model.model.{key}.lora_B.weight": torch.tensor(up, dtype=torch.float32),
    }
    save_file(adapter, tmp_path / "lora" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    text = json.dumps({**settings, "base_model_name_or_path": "elsewhere"})
    (tmp_path / "lora" / "adapter_config.json").write_text(text, encoding="utf-8")

    def opened_with(name: str) -> Tensors:
        path, plus, _ = name.partition("+")
        tensors = here(path)
        weight = f"{key}.weight"
        return {**tensors, weight: tensors[weight] + 3 * up @ down} if plus else tensors

    # The adapter is put on 'a', and not on the base of the merge.
    text = recipe("task_arithmetic", 2, own="{weight: 0.7}")
    text = text.replace("model: a", f"model: a+{tmp_path / 'lora'}")
    agree(merged(text), run(text, opened_with))
