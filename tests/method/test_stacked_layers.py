"""Stacked layers, against stacks built by hand in float64."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_bench.method import (
    AdaMergingAlgorithm,
    EMRMerging,
    LiNeSAlgorithm,
    PassthroughAlgorithm,
    SimpleAverageAlgorithm,
    SimpleEnsembleAlgorithm,
    SlerpMergeAlgorithm,
    StackedLayers,
    TallMaskTaskArithmeticAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
)
from fusion_bench.method.checks import Pool
from fusion_bench.method.stack import refuse_other_widths
from fusion_bench.modelpool import CLIPVisionModelPool, HFModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import MergePolicy, Model, TensorWeights, Weights

PARTS = ("q.weight", "norm.weight", "norm.bias")


def numbered(layers: int, seed: int, stack: str = "model.layers") -> dict[str, Tensor]:
    """Return the entries of a model, in the order of a file that is sorted by names."""
    generator = torch.Generator().manual_seed(seed)
    keys = ["model.embed.weight", "model.norm.weight", "zhead.weight"]
    keys += [f"{stack}.{i}.{part}" for i in range(layers) for part in PARTS]
    return {key: torch.randn(6, generator=generator) for key in sorted(keys)}


def pool_of(**models: Mapping[str, Tensor]) -> Pool:
    return Pool({name: TensorWeights(own) for name, own in models.items()})


def layer(model: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {part: model[f"model.layers.{index}.{part}"].double() for part in PARTS}


def fused(pool: Any, slices: Sequence[Any], base_method: Any = None) -> Weights:
    made = StackedLayers(slices, base_method).fuse(pool)
    return made.weights if isinstance(made, Model) else made


def check_layers(made: Weights, layers: Sequence[Mapping[str, Tensor]]) -> None:
    assert {k for k in made if ".layers." in k} == {
        f"model.layers.{i}.{part}" for i in range(len(layers)) for part in PARTS
    }
    for index, own in enumerate(layers):
        for part, want in own.items():
            got = made[f"model.layers.{index}.{part}"]
            assert (got.double() - want).abs().max() <= 1e-6 * max(1, want.abs().max())


A, B, C = numbered(4, 0), numbered(6, 1), numbered(4, 2)


def test_depth_up_scaling() -> None:
    made = fused(pool_of(a=A), [{"models": {"a": [0, 3]}}, {"models": {"a": [1, 4]}}])
    check_layers(made, [layer(A, i) for i in (0, 1, 2, 1, 2, 3)])
    assert all(torch.equal(made[key], A[key]) for key in A if ".layers." not in key)
    # Layer 1 is there twice; the two are no ties.
    assert made.tied_to("model.layers.3.q.weight") == "model.layers.3.q.weight"


def test_what_is_in_front_is_the_first_s_and_what_is_behind_the_last_s() -> None:
    made = fused(pool_of(a=A, b=B), [{"models": {"b": [4, 6]}}, {"models": {"a": [0, 1]}}])
    check_layers(made, [layer(B, 4), layer(B, 5), layer(A, 0)])
    assert torch.equal(made["model.embed.weight"], B["model.embed.weight"])
    assert torch.equal(made["model.norm.weight"], A["model.norm.weight"])
    assert torch.equal(made["zhead.weight"], A["zhead.weight"])


def test_each_slice_is_merged_by_its_own_method() -> None:
    slices = [
        {"models": {"a": [0, 2], "c": [2, 4]}},
        {
            "models": {"a": [1, 2], "b": [5, 6], "c": [0, 1]},
            "base": "c",
            "base_method": TaskArithmeticAlgorithm(0.3),
        },
        {"models": {"a": None, "c": None}, "base_method": SlerpMergeAlgorithm(0.25)},
    ]
    made = fused(pool_of(a=A, b=B, c=C), slices, SimpleAverageAlgorithm())

    def slerp(one: Tensor, other: Tensor) -> Tensor:
        one, other = one.double(), other.double()
        angle = torch.arccos(one @ other / one.norm() / other.norm())
        return (torch.sin(0.75 * angle) * one + torch.sin(0.25 * angle) * other) / angle.sin()

    means = [{p: (layer(A, i)[p] + layer(C, i + 2)[p]) / 2 for p in PARTS} for i in (0, 1)]
    a, b, c = layer(A, 1), layer(B, 5), layer(C, 0)
    task = {p: c[p] + 0.3 * (a[p] - c[p] + b[p] - c[p]) for p in PARTS}
    arcs = [{p: slerp(layer(A, i)[p], layer(C, i)[p]) for p in PARTS} for i in range(4)]
    check_layers(made, [*means, task, *arcs])
    embed = (A["model.embed.weight"].double() + C["model.embed.weight"]) / 2
    torch.testing.assert_close(made["model.embed.weight"].double(), embed)
    want = slerp(A["zhead.weight"], C["zhead.weight"])
    torch.testing.assert_close(made["zhead.weight"].double(), want)


def test_the_pretrained_model_is_the_base_where_a_method_needs_one() -> None:
    pool = pool_of(_pretrained_=C, a=A)
    made = fused(pool, [{"models": {"a": [1, 3]}, "base_method": TaskArithmeticAlgorithm(0.5)}])
    halves = [{p: (layer(A, i)[p] + layer(C, i)[p]) / 2 for p in PARTS} for i in (1, 2)]
    check_layers(made, halves)
    # Beside others it is their base, with layers of its own; alone it is a model.
    shifted = {"models": {"_pretrained_": [0, 2], "a": [1, 3]}}
    made = fused(pool, [{**shifted, "base_method": TaskArithmeticAlgorithm(1)}])
    check_layers(made, [layer(A, 1), layer(A, 2)])
    made = fused(pool, [{"models": {"_pretrained_": [3, 4]}}])
    check_layers(made, [layer(C, 3)])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_slices(data: st.DataObject) -> None:
    models = {"a": A, "b": B, "c": C}
    counts = {"a": 4, "b": 6, "c": 4}
    slices, want = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        names = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
        length = data.draw(st.integers(1, 4))
        starts = {n: data.draw(st.integers(0, counts[n] - length)) for n in names}
        slices.append({"models": {n: [s, s + length] for n, s in starts.items()}})
        for i in range(length):
            own = [layer(models[n], s + i) for n, s in starts.items()]
            want.append({p: sum(each[p] for each in own) / len(own) for p in PARTS})
    made = fused(pool_of(**models), slices, SimpleAverageAlgorithm())
    check_layers(made, want)
    first, last = (list(one["models"]) for one in (slices[0], slices[-1]))
    for key, names in (("model.embed.weight", first), ("zhead.weight", last)):
        mean = sum(models[n][key].double() for n in names) / len(names)
        torch.testing.assert_close(made[key].double(), mean)


def test_gradients_restart_in_each_slice() -> None:
    ones = {key: torch.ones_like(value) for key, value in A.items()}
    method = PassthroughAlgorithm(where=[{"scale": {"gradient": [1, 2]}}])
    made = fused(pool_of(a=ones), [{"models": {"a": [0, 3]}}, {"models": {"a": [2, 4]}}], method)
    scales = [made[f"model.layers.{i}.q.weight"][0].item() for i in range(5)]
    assert scales == [1, 1.5, 2, 1, 2]
    assert made["model.embed.weight"][0] == made["zhead.weight"][0] == 1


def test_rules_of_the_common_method_need_not_match_in_each_slice() -> None:
    slices = [{"models": {"a": [0, 2]}}, {"models": {"a": [2, 4]}}]
    method = PassthroughAlgorithm(where=[{"match": "zhead*", "scale": 0.0}])
    assert fused(pool_of(a=A), slices, method)["zhead.weight"].count_nonzero() == 0
    wrong = PassthroughAlgorithm(where=[{"match": "head*", "scale": 0.0}])
    with pytest.raises(FusionBenchError, match=r"^base_method\.where\[0\]\.match: 'head\*'"):
        fused(pool_of(a=A), slices, wrong)
    slices[1]["base_method"] = method
    with pytest.raises(FusionBenchError, match=r"slices\[0\]\.base_method\.where"):
        fused(pool_of(a=A), [{**slices[0], "base_method": method}, slices[1]])


def test_origins_are_the_layers_that_entries_are_made_of() -> None:
    a, b = TensorWeights(A), TensorWeights(B)
    slices = [{"models": {"a": [1, 2], "b": [4, 5]}}, {"models": {"b": [0, 1]}}]
    made = fused(Pool({"a": a, "b": b}), slices, SimpleAverageAlgorithm())
    found = made.origins("model.layers.0.q.weight")
    assert [(own.weights, own.key) for own in found] == [
        (a, "model.layers.1.q.weight"),
        (b, "model.layers.4.q.weight"),
    ]
    assert [own.key for own in made.origins("model.layers.1.q.weight")] == [
        "model.layers.0.q.weight"
    ]


class Untouchable(TensorWeights):
    """Weights of which only the headers may be read."""

    def read(self, key: str, start: int, stop: int) -> Tensor:
        raise AssertionError(f"{key} was read")

    def __getitem__(self, key: str) -> Tensor:
        raise AssertionError(f"{key} was read")


def test_nothing_is_read_before_an_entry_is() -> None:
    pool = Pool({"a": Untouchable(A), "b": Untouchable(B)})
    slices = [{"models": {"a": [0, 4]}}, {"models": {"a": [1, 3], "b": [1, 3]}, "base": "a"}]
    slices[1]["base_method"] = TiesMergingAlgorithm(scope="tensor")
    method = StackedLayers(slices)
    method.check_pool(pool)
    assert method.described(pool) == (
        "layers 0–3 of a, 1–2 of a with 1–2 of b → 6 layers; 126 parameters"
    )
    made = method.fuse(pool)
    assert isinstance(made, Weights) and len(made) == 21
    with pytest.raises(AssertionError, match="was read"):
        made["model.embed.weight"]


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (
            [{"models": {"a": [2, 5]}}],
            r"slices\[0\]\.models\.a: there are no layers \[2, 5\): 'a' has 4, 0 to 3\. Give an",
        ),
        (
            [{"models": {"a": [0, 2]}}, {"models": {"a": [0, 2], "b": [0, 3]}}],
            r"slices\[1\]\.models: the models give different numbers of layers: a 2, b 3",
        ),
        (
            [{"models": {"a": [0, 2]}}, {"models": {"a": [0, 2], "bb": [0, 2]}}],
            r"slices\[1\]\.models\.bb: Model 'bb' is not in the pool\. Did you mean 'b'",
        ),
        (
            [{"models": {"a": [0, 2]}, "base": "d"}],
            r"slices\[0\]\.base: Model 'd' is not in the pool\. Known: a, b",
        ),
        (
            [{"models": {"a": [0, 2]}, "stack": "model.layer"}],
            r"slices\[0\]\.stack: the model has no stack 'model\.layer'\. Did you mean 'model\.lay",
        ),
        (
            [{"models": {"a": [0, 2], "b": [1, 3]}, "base_method": PassthroughAlgorithm()}],
            r"slices\[0\]: Passthrough takes one model, and here are 2: a, b",
        ),
        (
            [{"models": {"a": [0, 1]}, "base_method": TiesMergingAlgorithm()}],
            r"slices\[0\]\.base: TiesMergingAlgorithm needs a pretrained model\. Name one",
        ),
    ],
)
def test_what_the_models_do_not_have_is_refused(slices: Any, message: str) -> None:
    pool = Pool({"a": Untouchable(A), "b": Untouchable(B)})
    with pytest.raises(FusionBenchError, match=f"^{message}"):
        StackedLayers(slices, SimpleAverageAlgorithm()).check_pool(pool)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([], r"slices: \[\] is not a list of slices\. Give some"),
        ([3], r"slices\[0\]: 3 is not a mapping"),
        ([{}], r"slices\[0\]\.models: missing"),
        ([{"models": {"a": [2, 2]}}], r"slices\[0\]\.models\.a: \[2, 2\] is no range of layers"),
        ([{"models": {"a": [-1, 2]}}], r"slices\[0\]\.models\.a: \[-1, 2\] is no range"),
        ([{"models": {"a": 3}}], r"slices\[0\]\.models\.a: 3 is no range"),
        ([{"models": {"a": None}, "bases": "b"}], r"slices\[0\]\.bases: there is no such key\. Di"),
        (
            [{"models": {"a": None}}, {"models": {"a": None, "b": None}}],
            r"slices\[1\]\.base_method: missing; a, b must be merged\. Name a method here",
        ),
        (
            [{"models": {"a": None}, "base_method": SimpleEnsembleAlgorithm()}],
            r"slices\[0\]\.base_method: SimpleEnsembleAlgorithm needs whole models",
        ),
        (
            [{"models": {"a": None}, "base_method": {"_target_": "fusion_bench.method.Ties"}}],
            r"slices\[0\]\.base_method\._target_: ",
        ),
        (
            [{"models": {"a": None}, "base_method": AdaMergingAlgorithm("task")}],
            r"slices\[0\]\.base_method: AdaMergingAlgorithm needs whole models",
        ),
    ],
)
def test_slices_that_say_nothing_are_refused(slices: Any, message: str) -> None:
    with pytest.raises(FusionBenchError, match=f"^{message}"):
        StackedLayers(slices)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(FusionBenchError) as caught:
        StackedLayers([{"models": {"a": 1}}, {"model": {"a": [0, 1]}}])
    assert [problem.key for problem in caught.value.problems] == [
        "slices[0].models.a",
        "slices[1].models",
    ]


class Twins(SimpleAverageAlgorithm):
    """A method of a user's that makes two models."""

    def merger(self, inputs: Any) -> Any:
        made = super().merger(inputs)
        return {"one": made, "two": made}


def test_a_method_of_several_models_is_refused() -> None:
    for several in (
        EMRMerging(),
        TallMaskTaskArithmeticAlgorithm(),
        LiNeSAlgorithm(EMRMerging()),
    ):
        slices = [{"models": {"a": None}, "base": "c", "base_method": several}]
        wanted = r"^slices\[0\]\.base_method: \w+ makes several models, and a slice"
        with pytest.raises(FusionBenchError, match=wanted):
            StackedLayers(slices)
    slices = [{"models": {"a": None, "c": None}, "base_method": Twins()}]
    with pytest.raises(FusionBenchError, match=r"^slices\[0\]\.base_method: Twins returns no"):
        StackedLayers(slices).fuse(pool_of(a=A, c=C))


def test_entries_of_a_slice_must_fit_each_other() -> None:
    odd = {**C, "model.layers.2.q.weight": torch.ones(7)}
    slices = [{"models": {"a": [0, 1], "c": [0, 1]}}, {"models": {"a": [2, 3], "c": [2, 3]}}]
    with pytest.raises(FusionBenchError, match=r"(?s)^slices\[1\]: These models cannot.*is \[7\]"):
        StackedLayers(slices, SimpleAverageAlgorithm()).check_pool(pool_of(a=A, c=odd))


def test_the_policy_gives_the_type() -> None:
    pool = Pool({"a": TensorWeights(A)}, MergePolicy(dtype="bfloat16"))
    assert fused(pool, [{"models": {"a": [0, 1]}}])["zhead.weight"].dtype == torch.bfloat16


def test_models_without_numbered_layers_are_refused() -> None:
    with pytest.raises(FusionBenchError, match="no layers are found in the names"):
        StackedLayers([{"models": {"a": [0, 1]}}]).fuse(pool_of(a={"w": torch.ones(1)}))


# What follows needs models of transformers, with their configs.

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "vocab_size": 40,
}
CAUSAL = "AutoModelForCausalLM"


def written(folder: Path, model_class: str, *configs: Any) -> dict[str, str]:
    """Write models as files of transformers; return name to folder."""
    import transformers

    models = {}
    for seed, (name, config) in enumerate(zip("abc", configs, strict=False)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, model_class)(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(folder / name)
        models[name] = str(folder / name)
    return models


def owners(made: Model) -> dict[str, str]:
    """Return the folder that each entry outside of layers comes from."""
    return {
        key: origin.weights.files[0].parent.name
        for key in made.weights
        if not any(letter.isdigit() for letter in key)
        for origin in made.weights.origins(key)
    }


def reloaded(pool: HFModelPool, made: Model, folder: Path) -> Any:
    """Save a model and load it by transformers alone, with nothing missing or left over."""
    import transformers

    pool.save_model(made, folder)
    model, info = getattr(transformers, pool.model_class).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def stacked(pool: HFModelPool, slices: Sequence[Any], method: Any = None) -> Model:
    made = StackedLayers(slices, method)
    made.check_pool(pool)
    model = made.fuse(pool)
    assert isinstance(model, Model)
    return model


TWO = [{"models": {"a": [0, 3]}}, {"models": {"b": [1, 4]}}]


def test_a_llama_with_a_tied_head_stays_tied(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**SMALL, num_hidden_layers=4, tie_word_embeddings=True)
    pool = HFModelPool(written(tmp_path, "LlamaForCausalLM", config, config), CAUSAL)
    made = stacked(pool, TWO)
    assert owners(made) == {"model.embed_tokens.weight": "a", "model.norm.weight": "b"}
    model = reloaded(pool, made, tmp_path / "out")
    assert model.config.num_hidden_layers == len(model.model.layers) == 6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # What the pool builds computes the same.
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(pool.build_model(made)(tokens)[0], model(tokens)[0])


def test_heads_come_from_the_last_slice_though_files_are_sorted(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**SMALL, num_hidden_layers=4)
    pool = HFModelPool(written(tmp_path, "LlamaForCausalLM", config, config), CAUSAL)
    made = stacked(pool, TWO)
    assert owners(made)["lm_head.weight"] == owners(made)["model.norm.weight"] == "b"


def test_position_is_that_of_use_not_of_definition(tmp_path: Path) -> None:
    """OPT defines its last norm in front of its layers."""
    from transformers import OPTConfig

    own = {"ffn_dim": 24, "word_embed_proj_dim": 16, "num_hidden_layers": 4}
    config = OPTConfig(hidden_size=16, num_attention_heads=2, vocab_size=40, **own)
    pool = HFModelPool(written(tmp_path, "OPTForCausalLM", config, config), CAUSAL)
    found = owners(stacked(pool, TWO))
    assert found["model.decoder.final_layer_norm.weight"] == "b"
    assert found["model.decoder.embed_positions.weight"] == "a"


def test_lists_of_the_config_follow_the_layers(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    window = {"use_sliding_window": True, "sliding_window": 4}
    a = Qwen2Config(
        **SMALL, num_key_value_heads=1, num_hidden_layers=4, max_window_layers=2, **window
    )
    b = Qwen2Config(**SMALL, num_key_value_heads=1, num_hidden_layers=5, max_window_layers=5)
    pool = HFModelPool(written(tmp_path, "Qwen2ForCausalLM", a, b), CAUSAL)
    with pytest.raises(FusionBenchError, match="differ in what decides"):
        StackedLayers(TWO).fuse(pool)  # the one has a window, and the other has none
    pool = HFModelPool(written(tmp_path, "Qwen2ForCausalLM", a, a), CAUSAL)
    made = stacked(pool, TWO)
    full, sliding = "full_attention", "sliding_attention"
    assert made.config is not None
    assert made.config["layer_types"] == [full, full, sliding, full, sliding, sliding]
    assert made.config["num_hidden_layers"] == 6
    reloaded(pool, made, tmp_path / "out")


def test_a_pattern_that_the_class_would_make_of_positions_is_written_out(tmp_path: Path) -> None:
    """Gemma 2 makes every other layer a sliding one, unless layer_types says so."""
    from fixtures_llm import rewrite
    from transformers import Gemma2Config

    config = Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, num_hidden_layers=4)
    models = written(tmp_path, "Gemma2ForCausalLM", config)
    rewrite(tmp_path / "a", lambda content: content.pop("layer_types"))
    pool = HFModelPool(models, CAUSAL)
    same = stacked(pool, [{"models": {"a": [0, 2]}}, {"models": {"a": [2, 4]}}]).config
    assert same is not None and "layer_types" not in same
    made = stacked(pool, [{"models": {"a": [0, 1]}}, {"models": {"a": [0, 4]}}]).config
    assert made is not None
    full, sliding = "full_attention", "sliding_attention"
    assert made["layer_types"] == [sliding, sliding, full, sliding, full]


def test_max_window_layers_goes_with_the_number_of_layers(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    config = Qwen2Config(**SMALL, num_key_value_heads=1, num_hidden_layers=4, max_window_layers=4)
    pool = HFModelPool(written(tmp_path, "Qwen2ForCausalLM", config, config), CAUSAL)
    made = stacked(pool, TWO)
    assert made.config is not None
    assert (made.config["num_hidden_layers"], made.config["max_window_layers"]) == (6, 6)
    assert set(made.config["layer_types"]) == {"full_attention"}


@pytest.mark.parametrize(
    ("kind", "model_class", "options", "count", "front", "behind"),
    [
        (
            *("GPT2", CAUSAL, {"n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 32}),
            *("n_layer", "transformer.wpe.weight", "transformer.ln_f.weight"),
        ),
        (
            *("Bert", "AutoModelForMaskedLM", SMALL, "num_hidden_layers"),
            *("bert.embeddings.LayerNorm.weight", "cls.predictions.bias"),
        ),
        (
            "ViT",
            "AutoModelForImageClassification",
            {**SMALL, "image_size": 16, "patch_size": 8, "vocab_size": None},
            *("num_hidden_layers", "vit.embeddings.cls_token", "classifier.weight"),
        ),
    ],
)
def test_other_architectures(
    tmp_path: Path,
    kind: str,
    model_class: str,
    options: dict[str, Any],
    count: str,
    front: str,
    behind: str,
) -> None:
    import transformers

    heads = {"GPT2": "LMHeadModel", "Bert": "ForMaskedLM", "ViT": "ForImageClassification"}
    given = {key: value for key, value in options.items() if value is not None}
    config = getattr(transformers, f"{kind}Config")(**given, **{count: 4})
    pool = HFModelPool(written(tmp_path, kind + heads[kind], config, config), model_class)
    made = stacked(pool, TWO)
    assert made.config is not None and made.config[count] == 6
    found = owners(made)
    assert found[front] == "a" and found[behind] == "b"
    reloaded(pool, made, tmp_path / "out")


#: A model's two stacks: the key of its config with the number of layers, and the entry behind.
STACKS = {
    "encoder.block": ("num_layers", "encoder.final_layer_norm.weight"),
    "decoder.block": ("num_decoder_layers", "decoder.final_layer_norm.weight"),
}


def test_one_of_two_stacks(tmp_path: Path) -> None:
    from transformers import T5Config

    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=4, num_heads=2, vocab_size=40)
    models = written(tmp_path, "T5ForConditionalGeneration", config, config)
    pool = HFModelPool(models, "AutoModelForSeq2SeqLM")
    with pytest.raises(FusionBenchError, match=r"slices\[0\]\.stack: missing; the model has 2 st"):
        StackedLayers(TWO).check_pool(pool)
    for stack, (key, from_b) in STACKS.items():
        made = stacked(pool, [{**own, "stack": stack} for own in TWO])
        assert made.config is not None
        counts = {name: made.config[name] for name in ("num_layers", "num_decoder_layers")}
        assert counts == {"num_layers": 4, "num_decoder_layers": 4, key: 6}
        assert {name for name, owner in owners(made).items() if owner == "b"} == {from_b}
        reloaded(pool, made, tmp_path / stack)


def test_the_other_stack_s_number_is_written_where_it_went_without_saying(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, T5Config

    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=4, num_heads=2, vocab_size=40)
    models = written(tmp_path, "T5ForConditionalGeneration", config, config)
    for folder in models.values():
        file = Path(folder) / "config.json"
        said = json.loads(file.read_text("utf-8"))
        assert said.pop("num_decoder_layers") == 4
        file.write_text(json.dumps(said), encoding="utf-8")
    pool = HFModelPool(models, "AutoModelForSeq2SeqLM")
    for stack in STACKS:
        made = stacked(pool, [{**own, "stack": stack} for own in TWO])
        reloaded(pool, made, tmp_path / stack)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / stack)
        depths = len(loaded.encoder.block), len(loaded.decoder.block)
        assert depths == ((6, 4) if stack == "encoder.block" else (4, 6))


def test_biases_of_positions_stay_with_the_first_layer(tmp_path: Path) -> None:
    from transformers import T5Config

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "vocab_size": 40}
    a, b = (T5Config(**sizes, num_layers=i, num_decoder_layers=j) for i, j in ((4, 2), (2, 4)))
    models = written(tmp_path, "T5ForConditionalGeneration", a, b)
    pool = HFModelPool(models, "AutoModelForSeq2SeqLM")
    slices = [
        {"stack": "encoder.block", "models": {"a": [2, 4]}},
        {"stack": "encoder.block", "models": {"b": [0, 1]}},
        {"stack": "decoder.block", "models": {"b": [1, 4]}},
    ]
    made = stacked(pool, slices)
    assert made.config is not None
    assert (made.config["num_layers"], made.config["num_decoder_layers"]) == (3, 3)
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for stack, own in (("encoder", "a"), ("decoder", "b")):
        assert torch.equal(made.weights[f"{stack}.{bias}"], pool.weights(own)[f"{stack}.{bias}"])
    assert sum("relative_attention_bias" in key for key in made.weights) == 2
    reloaded(pool, made, tmp_path / "out")


def test_one_tower_of_clip(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    vision = {"hidden_size": 16, "intermediate_size": 24, "image_size": 16, "patch_size": 8}
    layers = {"num_attention_heads": 2, "num_hidden_layers": 4}
    text = {**SMALL, "num_hidden_layers": 4}
    config = CLIPConfig(text_config=text, vision_config={**vision, **layers}, projection_dim=8)
    pool = HFModelPool(written(tmp_path, "CLIPModel", config, config), "CLIPModel")
    made = stacked(pool, [{**own, "stack": "vision_model.encoder.layers"} for own in TWO])
    assert made.config is not None
    assert made.config["vision_config"]["num_hidden_layers"] == 6
    assert made.config["text_config"]["num_hidden_layers"] == 4
    found = owners(made)
    assert found["visual_projection.weight"] == "b" and found["text_projection.weight"] == "a"
    reloaded(pool, made, tmp_path / "out")


@pytest.mark.parametrize("first", ["a", "b"])
def test_encoders_of_clip_alone_and_in_a_whole_one(tmp_path: Path, first: str) -> None:
    from transformers import CLIPConfig, CLIPVisionConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8, "num_hidden_layers": 4}
    text = {**SMALL, "num_hidden_layers": 4}
    alone = written(tmp_path, "CLIPVisionModel", CLIPVisionConfig(**vision))["a"]
    whole = CLIPConfig(text_config=text, vision_config={**vision, "num_hidden_layers": 6})
    models = {"a": alone, "b": written(tmp_path / "whole", "CLIPModel", whole)["a"]}
    pool = CLIPVisionModelPool({first: models.pop(first), **models})
    made = stacked(pool, [{"models": {"a": [0, 3]}}, {"models": {"b": [1, 6]}}])
    assert made.config is not None and made.config["num_hidden_layers"] == 8
    reloaded(pool, made, tmp_path / "out")
    pool.build_model(made)


def test_modules_by_name_keep_their_ties() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMALL, num_hidden_layers=3, tie_word_embeddings=True)
    model: Any = LlamaForCausalLM(config)
    made: Any = StackedLayers([{"models": {"a": [0, 3]}}, {"models": {"a": [1, 3]}}]).run(
        {"a": model}
    )
    assert made["lm_head.weight"].data_ptr() == made["model.embed_tokens.weight"].data_ptr()
    own = "mlp.up_proj.weight"
    assert torch.equal(made[f"model.layers.4.{own}"], model.state_dict()[f"model.layers.2.{own}"])
    assert len({key.split(".")[2] for key in made if "layers" in key}) == 5


def deepseek(layers: int) -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "v_head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": layers},
        **{"moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 1},
        **{"n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "first_k_dense_replace": 1},
    )


def test_layers_that_no_config_describes_are_refused(tmp_path: Path) -> None:
    models = written(tmp_path, "DeepseekV3ForCausalLM", deepseek(3))
    pool = HFModelPool(models, CAUSAL)
    stacked(pool, [{"models": {"a": [0, 3]}}, {"models": {"a": [1, 3]}}])
    with pytest.raises(FusionBenchError) as caught:
        StackedLayers([{"models": {"a": [0, 3]}}, {"models": {"a": [0, 3]}}]).check_pool(pool)
    told = str(caught.value)
    assert told.startswith("slices: no config of a 'deepseek_v3' describes these layers (first_k_")
    assert "has no 'model.layers.3.mlp.gate_proj.weight'" in told


def test_layers_that_share_their_weights_are_refused(tmp_path: Path) -> None:
    from transformers import AlbertConfig

    config = AlbertConfig(embedding_size=8, **SMALL, num_hidden_layers=4)
    pool = HFModelPool(written(tmp_path, "AlbertForMaskedLM", config), "AutoModelForMaskedLM")
    with pytest.raises(FusionBenchError, match=r"^slices\[0\]\.stack: the config of this 'albert'"):
        StackedLayers([{"models": {"a": [0, 4]}}]).check_pool(pool)


def test_models_of_other_widths_are_told_by_a_tensor(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    wide = {**SMALL, "hidden_size": 2 * SMALL["hidden_size"]}
    models = written(tmp_path, "LlamaForCausalLM", LlamaConfig(**SMALL), LlamaConfig(**wide))
    pool = HFModelPool(models, "AutoModelForCausalLM")
    with pytest.raises(FusionBenchError) as caught:
        refuse_other_widths(pool)
    size = SMALL["hidden_size"]
    assert str(caught.value) == (
        f"b: its 'model.layers.0.input_layernorm.weight' is [{2 * size}], and "
        f"'model.layers.0.input_layernorm.weight' of 'a' is [{size}]. Layers of models of "
        "different sizes fit in no model. Choose models of one size."
    )


@pytest.mark.parametrize("inverse", [False, True])
def test_layers_that_compute_with_their_number_are_told(
    tmp_path: Path, inverse: bool, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import GPT2Config

    sizes = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 8, "vocab_size": 11}
    config = GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=inverse)
    pool = HFModelPool(written(tmp_path, "GPT2LMHeadModel", config, config), "AutoModelForCausalLM")
    StackedLayers([{"models": {"a": [0, 2]}}, {"models": {"b": [2, 4]}}]).check_pool(pool)
    assert "another depth" not in caplog.text  # all stay at theirs
    StackedLayers(TWO).check_pool(pool)
    told = "slices[1]: with scale_attn_by_inverse_layer_idx=True a layer computes otherwise at"
    assert (told in caplog.text) is inverse


def test_a_config_of_a_billion_layers_fills_no_memory(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**SMALL, num_hidden_layers=2)
    pool = HFModelPool(written(tmp_path, "LlamaForCausalLM", config), CAUSAL)
    assert pool.blueprint({**config.to_dict(), "num_hidden_layers": 10**9}) is None
    with pytest.raises(FusionBenchError, match="cannot build a 'llama' by this config: "):
        pool.blueprint({**config.to_dict(), "hidden_act": "none such"})
    assert pool.blueprint({"model_type": "of a stranger"}) is None


def test_models_of_other_depth_are_compared_but_for_their_layers(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    a, b = (LlamaConfig(**SMALL, num_hidden_layers=count) for count in (4, 6))
    other = LlamaConfig(**SMALL, num_hidden_layers=6, hidden_act="gelu")
    pool = HFModelPool(written(tmp_path, "LlamaForCausalLM", a, b, other), CAUSAL)
    made = stacked(HFModelPool({n: str(tmp_path / n) for n in "ab"}, CAUSAL), TWO)
    assert made.config is not None and made.config["num_hidden_layers"] == 6
    with pytest.raises(FusionBenchError, match=r"c: 'hidden_act' is \"gelu\", in a \"silu\""):
        StackedLayers(TWO).fuse(pool)


def test_a_head_of_its_own_after_a_tied_one(tmp_path: Path) -> None:
    """The last slice's model has a tied head, and the merged model has its own."""
    from transformers import LlamaConfig

    untied = LlamaConfig(**SMALL, num_hidden_layers=4)
    tied = LlamaConfig(**SMALL, num_hidden_layers=4, tie_word_embeddings=True)
    pool = HFModelPool(written(tmp_path, "LlamaForCausalLM", untied, tied), CAUSAL)
    made = stacked(pool, TWO)
    own = pool.weights("b")["model.embed_tokens.weight"]
    assert torch.equal(made.weights["lm_head.weight"], own)
    reloaded(pool, made, tmp_path / "out")
