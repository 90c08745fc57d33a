import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llm import VOCABULARY, WORDS, write_llama
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from fusion_bench.modelpool import CausalLMPool, MergedModel
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs.verify import verify
from fusion_bench.storage import file_sha256

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Tensors]:
    return {
        name: write_llama(tmp_path / name, seed=seed, dtype=torch.float32)
        for seed, name in enumerate("abc")
    }


def node(folder: Path, **more: Any) -> dict[str, Any]:
    models = {"a": str(folder / "a"), "b": str(folder / "b")}
    return {
        "_target_": "fusion_bench.modelpool.MergedModel",
        "modelpool": {"_target_": "fusion_bench.modelpool.CausalLMPool", "models": models},
        "method": {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"},
        **more,
    }


def test_a_merge_of_a_merge(three: dict[str, Tensors], tmp_path: Path) -> None:
    pool = CausalLMPool({"_pretrained_": node(tmp_path), "c": str(tmp_path / "c")})
    merged = TaskArithmeticAlgorithm(scaling_factor=0.5).fuse(pool)
    for key, own in three["c"].items():
        mean = (three["a"][key] + three["b"][key]) / 2
        torch.testing.assert_close(merged[key], mean + 0.5 * (own - mean))


def test_it_is_built_and_saved_like_its_own_reference(
    three: dict[str, Tensors], tmp_path: Path
) -> None:
    pool = CausalLMPool({"first": node(tmp_path), "c": str(tmp_path / "c")})
    assert not pool.plan().problems
    module = pool.load_model("first")
    key = "model.norm.weight"
    mean = (three["a"][key] + three["b"][key]) / 2
    torch.testing.assert_close(module.state_dict()[key], mean)
    pool.save_model(SimpleAverageAlgorithm().fuse(pool), tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names


def test_its_tokenizer_template_and_config_are_those_of_the_merge(
    three: dict[str, Tensors], tmp_path: Path
) -> None:
    tokenizer = tmp_path / "b" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"cat"', '"cow"'))
    inner = node(tmp_path)
    inner["modelpool"] |= {"tokenizer": "union", "chat_template": "chatml"}
    for more in ({}, {"tokenizer": "un"}, {"tokenizer": "union"}):
        pool = CausalLMPool({"un": inner, "c": inner}, **more)
        assert not pool.plan().problems and pool.compare() == []
        path = tmp_path / "saved"
        pool.save_model(SimpleAverageAlgorithm().fuse(pool), path)
        made = AutoTokenizer.from_pretrained(path)
        assert set(made.get_vocab()) == {*WORDS, "cow"}
        assert "<|im_start|>" in made.chat_template
        assert json.loads((path / "config.json").read_text())["vocab_size"] == VOCABULARY + 1
        rows = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
        for word, model in (("cow", "b"), ("cat", "a")):  # the only owner's row
            own = three[model]["model.embed_tokens.weight"][WORDS.index("cat")]
            torch.testing.assert_close(rows[made.get_vocab()[word]], own)


def test_tokenizers_are_compared_with_its_own(three: dict[str, Tensors], tmp_path: Path) -> None:
    tokenizer = tmp_path / "b" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"cat"', '"cow"'))
    inner = node(tmp_path)
    inner["modelpool"]["tokenizer"] = "b"
    pool = CausalLMPool({"x": inner, "c": str(tmp_path / "c")})
    with pytest.raises(FusionBenchError, match="cow"):
        pool.compare()
    assert CausalLMPool({"x": inner, "b": str(tmp_path / "b")}).compare() == []


def test_it_is_rounded_to_its_type_before_it_is_merged_further(
    three: dict[str, Tensors], tmp_path: Path
) -> None:
    inner = node(tmp_path)
    inner["modelpool"]["policy"] = {"dtype": "bfloat16"}
    for x, policy in (("_pretrained_", "float32"), ("x", "float32"), ("x", None)):
        models = {x: inner, "c": str(tmp_path / "c")}
        pool = CausalLMPool(models, policy={"dtype": policy})
        merged = SimpleAverageAlgorithm().fuse(pool)
        for key, c in three["c"].items():
            mean = (three["a"][key].double() + three["b"][key].double()) / 2
            rounded = mean.bfloat16()
            assert torch.equal(pool.weights(x)[key], rounded)
            if x == "x" and policy:
                expected = (rounded.double() + c.double()) / 2
                torch.testing.assert_close(merged[key].double(), expected, rtol=1e-6, atol=1e-8)
    assert pool.weights("x").spec(key).dtype is torch.bfloat16
    pool.save_model(pool.weights("x"), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_card_lists_its_models_and_verify_computes_it_again(
    three: dict[str, Tensors], tmp_path: Path
) -> None:
    (tmp_path / "b" / "README.md").write_text("---\nlicense: mit\n---\n")
    dare = {"_target_": "fusion_bench.method.DareTaskArithmetic", "seed": 1}
    inner = node(tmp_path, method=dare)
    inner["modelpool"]["models"] = {"_pretrained_": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    target = "fusion_bench.modelpool.CausalLMPool"
    outer = {"_target_": target, "models": {"x": inner, "c": str(tmp_path / "c")}}
    config = {"method": node(tmp_path)["method"], "modelpool": outer}
    pool = CausalLMPool(outer["models"])
    path = tmp_path / "saved"
    pool.save_model(SimpleAverageAlgorithm().fuse(pool), path, config)
    sources = {"x/_pretrained_": "a", "x/b": "b", "c": "c"}
    card = (path / "README.md").read_text()
    for name, folder in sources.items():
        row = f"| `{name}` | `{tmp_path / folder}` |"
        assert row in card
        assert file_sha256(tmp_path / folder / "model.safetensors") in card
    assert f"| `x/b` | `{tmp_path / 'b'}` |  | `mit` |" in card
    told = list(verify(path))
    assert [line.partition(":")[0] for line in told if "has the files" in line] == [*sources]
    assert told[-2].startswith("16 of") and told[-2].endswith("are equal bit for bit.")
    assert told[-1] == f"'{path}' is verified."


def test_it_may_be_given_as_an_object(three: dict[str, Tensors], tmp_path: Path) -> None:
    inner = CausalLMPool({name: str(tmp_path / name) for name in "ab"})
    pool = CausalLMPool({"first": MergedModel(inner, SimpleAverageAlgorithm())})
    key = "lm_head.weight"
    mean = (three["a"][key] + three["b"][key]) / 2
    torch.testing.assert_close(pool.weights("first")[key], mean)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"method": {"_target_": "fusion_bench.method.SlerpMergeAlgorithm", "t": "half"}},
         "models.x.method.t"),
        ({"method": None}, "models.x.method"),
        ({"modelpool": {"_target_": "fusion_bench.modelpool.CausalLMPool",
                        "models": {"a": "missing/here/a"}}}, "models.x.modelpool.models.a"),
    ],
)  # fmt: skip
def test_problems_have_their_places(
    more: dict[str, Any], key: str, three: dict[str, Tensors], tmp_path: Path
) -> None:
    pool = CausalLMPool({"x": node(tmp_path, **more), "c": str(tmp_path / "c")})
    found = [problem.key for problem in pool.plan(tmp_path).problems]
    assert any(own.startswith(key) for own in found), found


def test_models_that_do_not_fit_are_refused_in_the_plan(
    three: dict[str, Tensors], tmp_path: Path
) -> None:
    method = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm"}
    pool = CausalLMPool({"x": node(tmp_path, method=method), "c": str(tmp_path / "c")})
    assert "_pretrained_" in str(pool.plan().problems[0])
    with pytest.raises(FusionBenchError):
        pool.weights("x")
