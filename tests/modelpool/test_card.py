import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from fixtures_language import letters, tiny
from fixtures_llm import metadata, write_bert, write_llama
from huggingface_hub import ModelCard
from torch import nn

import fusion_bench
from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import (
    CausalLMPool,
    CLIPVisionModelPool,
    HFModelPool,
    Seq2SeqLMPool,
    SequenceClassificationModelPool,
)
from fusion_bench.modelpool.card import (
    Origin,
    model_card,
    recipe,
    stated_license,
    with_section,
)
from fusion_bench.modelpool.usage import renamed, usage
from fusion_bench.repository import locate

CONFIG: dict[str, Any] = {"method": {"scaling_factor": 0.3}, "seed": None, "list": [1, "zwei ´`"]}


def made(**sources: Origin) -> dict[str, Any]:
    return recipe(CONFIG, sources, lambda file: f"hash of {file}")


def test_a_recipe_names_version_command_config_and_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["/usr/bin/fusion_bench", "merge", "a", "b", "--out", "one folder"]
    monkeypatch.setattr("sys.argv", words)
    source = Origin("o/n@v1", "abc", (Path("one.bin"), Path("two.bin")))
    assert made(a=source, b=Origin("here")) == {
        "version": fusion_bench.__version__,
        "command": "fusion_bench merge a b --out 'one folder'",
        "sources": {
            "a": {
                "source": "o/n@v1",
                "commit": "abc",
                "sha256": {"one.bin": "hash of one.bin", "two.bin": "hash of two.bin"},
            },
            "b": {"source": "here", "sha256": {}},
        },
        "config": CONFIG,
    }


def test_the_hub_reads_the_cards_header() -> None:
    card = ModelCard(model_card("m", made(a=Origin("o/n@v1", "abc"), b=Origin("/here"))))
    assert card.data.to_dict() == {
        "base_model": ["o/n"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "fusion_bench"],
    }
    assert "| `a` | `o/n@v1` | abc |" in card.text and "| `b` | `/here` |  |" in card.text


def test_a_card_without_models_of_the_hub_names_no_base() -> None:
    data = ModelCard(model_card("m", made(b=Origin("/here")))).data
    assert data.base_model is None and data.get("base_model_relation") is None


@pytest.mark.parametrize(
    ("licenses", "header", "said"),
    [
        (("mit", "mit"), {"license": "mit"}, False),
        (("other: gemma", "other: gemma"), {"license": "other", "license_name": "gemma"}, False),
        (("mit", "apache-2.0"), {}, True),
        (("mit", None), {}, True),
    ],
)
def test_the_licenses_of_the_sources_are_stated(
    licenses: tuple[str | None, str | None], header: dict[str, str], said: bool
) -> None:
    sources = {name: Origin(name, license=own) for name, own in zip("ab", licenses, strict=True)}
    card = ModelCard(model_card("m", made(**sources)))
    found = {key: own for key, own in card.data.to_dict().items() if key.startswith("license")}
    assert found == header
    assert ("different licenses" in card.text) is said
    assert f"| `a` | `a` |  | `{licenses[0]}` |" in card.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# m\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "other: gemma"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("# no header\n", None),
        (None, None),
    ],
)
def test_a_license_is_read_from_a_models_card(
    tmp_path: Path, text: str | None, expected: str | None
) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert stated_license(locate(str(tmp_path))) == expected


@pytest.mark.parametrize("name", ["a|b", "a`b", "a\nb"])
def test_a_strange_name_stays_in_its_cell(name: str) -> None:
    card = model_card("m", made(**{name: Origin(name)}))
    (row,) = [line for line in card.splitlines() if line.startswith("| `a")]
    assert row.count("|") == 5 and row.count("`") == 4


def test_the_recipe_in_the_card_is_yaml_that_says_the_same() -> None:
    text = model_card("m", made(a=Origin("``` fence")))
    assert yaml.safe_load(text.split("````yaml\n")[1].split("\n````")[0]) == made(
        a=Origin("``` fence")
    )


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        write_bert(tmp_path / name, seed=seed)
    pool = HFModelPool({"a": tmp_path / "a", "b": tmp_path / "b"}, max_shard_size=4000)
    weights: Any = SimpleAverageAlgorithm(show_pbar=False).run(pool)
    pool.save_model(weights, tmp_path / "merged", CONFIG)
    return tmp_path / "merged"


def test_every_shard_has_the_recipe_in_its_header(merged: Path) -> None:
    headers = [metadata(file) for file in merged.glob("*.safetensors")]
    assert len(headers) > 1
    for header in headers:
        found = json.loads(header["fusion_bench"])
        assert found["version"] == fusion_bench.__version__ and found["config"] == CONFIG
        for name in "ab":
            file = merged.parent / name / "model.safetensors"
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            assert found["sources"][name] == {
                "source": str(merged.parent / name),
                "sha256": {"model.safetensors": digest},
            }


def test_the_card_and_the_header_tell_the_same(merged: Path) -> None:
    text = ModelCard.load(merged / "README.md").text
    header = metadata(next(merged.glob("*.safetensors")))
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("\n```")[0])
    assert shown == json.loads(header["fusion_bench"])
    assert text.strip().startswith("# merged")


def test_a_module_is_described_by_its_class(tmp_path: Path) -> None:
    pool = HFModelPool({"a": nn.Linear(2, 2)})
    pool.save_model(pool.weights("a"), tmp_path / "m")
    found = json.loads(metadata(tmp_path / "m" / "model.safetensors")["fusion_bench"])
    assert found["sources"]["a"]["source"] == "a Linear"


def test_a_node_is_described_as_it_stands_in_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_BENCH_ALLOW", "torch")
    node = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2}
    pool = HFModelPool({"a": node})
    weights = pool.weights("a")
    pool.save_model(weights, tmp_path / "m")
    found = json.loads(metadata(tmp_path / "m" / "model.safetensors")["fusion_bench"])
    assert json.loads(found["sources"]["a"]["source"]) == node
    assert "torch.nn.Linear" in (tmp_path / "m" / "README.md").read_text()
    assert torch.equal(pool.open_saved(tmp_path / "m")["weight"], weights["weight"])


def llama(folder: Path) -> None:
    write_llama(folder, dtype=torch.float32)


def chat(folder: Path) -> None:
    tiny("Llama").save_pretrained(folder)  # type: ignore[operator]
    letters(chat=True).save_pretrained(folder)


def t5(folder: Path) -> None:
    tiny("T5").save_pretrained(folder)  # type: ignore[operator]
    letters().save_pretrained(folder)


def classifier(folder: Path) -> None:
    write_bert(folder, model_class="BertForSequenceClassification", id2label={0: "no", 1: "yes"})


KINDS: list[tuple[Any, Any, dict[str, str], str, str]] = [
    (CausalLMPool, llama, {}, "AutoModelForCausalLM", ""),
    (CausalLMPool, chat, {}, "apply_chat_template", ""),
    (Seq2SeqLMPool, t5, {}, "AutoModelForSeq2SeqLM", ""),
    (SequenceClassificationModelPool, write_bert, {}, "AutoModel\\b", r"torch.Size\(\[1, \d, 12"),
    (
        HFModelPool,
        classifier,
        {"model_class": "AutoModelForSequenceClassification"},
        "AutoModelForSequenceClassification",
        "^(no|yes)$",
    ),
    (CLIPVisionModelPool, None, {}, "CLIPVisionModel", r"torch.Size\(\[1, \d+\]\)"),
]


@pytest.mark.parametrize(("pool", "write", "more", "uses", "prints"), KINDS)
def test_the_code_of_a_card_runs(
    pool: Any,
    write: Any,
    more: dict[str, str],
    uses: str,
    prints: str,
    family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = {"a": family / "models" / "base"}
    if write is not None:
        write(tmp_path / "a")
        models = {"a": tmp_path / "a"}
    made = pool(models, **more)
    made.save_model(made.weights("a"), tmp_path / "merged")
    code = (tmp_path / "merged" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert re.search(uses, code)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert re.search(prints, capsys.readouterr().out)


def test_a_section_replaces_its_own_kind_alone() -> None:
    card = model_card("m", made(a=Origin("x")), 'name = "m"')
    once = with_section(card, "Results", "| a |")
    assert once.index("## Usage") < once.index("## Results\n\n| a |\n\n## Recipe")
    mine = once.replace("# m\n", "# Mine\n\nMy words.\n")
    twice = with_section(mine, "Results", "| b |")
    assert twice == mine.replace("| a |", "| b |")
    assert with_section("# Bare\n", "Results", "x").endswith("## Results\n\nx\n\n")


def test_the_code_of_a_card_is_renamed() -> None:
    card = model_card("m", made(a=Origin("x")), 'name = "m"\nother = "m"')
    assert 'name = "o/n"\nother = "m"' in renamed(card, "o/n")


def test_the_page_shows_code_that_runs(family: Path, tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "after_merging.md"
    causal, clip = re.findall(r"```py\n(.*?)\n```", page.read_text("utf-8"), re.DOTALL)
    assert causal == usage("merged", {"architectures": ["LlamaForCausalLM"]}, ["tokenizer.json"])
    pool = CLIPVisionModelPool({"a": family / "models" / "a"})
    pool.save_model(pool.weights("a"), tmp_path / "merged")
    for name, place in {
        "openai/clip-vit-base-patch32": family / "models" / "base",
        "merged": tmp_path / "merged",
    }.items():
        clip = clip.replace(f'"{name}"', f'"{place}"')
    made: dict[str, Any] = {}
    exec(compile(clip, "page", "exec"), made)
    inside, own = made["clip"].vision_model.state_dict(), made["merged"].state_dict()
    assert all(torch.equal(inside[key], own[key]) for key in own) and own


@pytest.mark.parametrize(
    ("kind", "encodes", "expected"),
    [
        ("LlamaForCausalLM", False, "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", False, "AutoModelForCausalLM"),
        ("BertForMaskedLM", False, "AutoModelForMaskedLM"),
        ("T5ForConditionalGeneration", True, "AutoModelForSeq2SeqLM"),
        ("LlavaForConditionalGeneration", False, "AutoModel"),
        ("BertForSequenceClassification", False, "AutoModelForSequenceClassification"),
        ("ViTForImageClassification", False, "AutoModelForImageClassification"),
        ("LlamaModel", False, "AutoModel"),
        ("", False, "AutoModel"),
    ],
)
def test_without_a_tokenizer_a_model_is_loaded_with_its_head(
    kind: str, encodes: bool, expected: str
) -> None:
    config = {"architectures": [kind] if kind else None, "is_encoder_decoder": encodes}
    code = usage("merged", config, ["config.json", "model.safetensors"])
    assert f"from transformers import {expected}\n" in code
    assert f"model = {expected}.from_pretrained(name)" in code
    assert hasattr(transformers, expected)
