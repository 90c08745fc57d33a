"""Models of different tokenizers, merged token by token, against rows put together here."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llm import average, rewrite, tensors, write_lora
from fixtures_tokens import CODE, COMMON, Kind, trained, write_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_bench.method import TaskArithmeticAlgorithm
from fusion_bench.modelpool import (
    CausalLMPool,
    HFModelPool,
    Seq2SeqLMPool,
    SequenceClassificationModelPool,
)
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import ByToken, Weights, in_memory

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
Rows = dict[str, Tensor]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `base` and `a` with one tokenizer, and `b`, `c` with others that overlap."""
    root = tmp_path_factory.mktemp("tokens")
    common, code = trained("bpe", COMMON, 300), trained("bpe", CODE, 290, ["<|im_start|>"])
    mixed = trained("bpe", [*CODE, "fancy words sing"], 300, ["<|im_end|>", "<|im_start|>"])
    write_model(root / "base", common, seed=0)
    write_model(root / "a", common, seed=1)
    write_model(root / "b", code, seed=2)
    write_model(root / "c", mixed, seed=3)
    write_model(root / "padded", common, seed=4, rows=len(common) + 5)
    write_model(root / "tied", common, seed=5, tied=True)
    write_model(root / "tied_b", code, seed=6, tied=True)
    return root


def pool(family: Path, *names: str, **settings: Any) -> CausalLMPool:
    models = {"_pretrained_" if name == "base" else name: str(family / name) for name in names}
    return CausalLMPool(models, **{"tokenizer": "union", **settings})


def vocabulary(folder: Path) -> dict[str, int]:
    return dict(AutoTokenizer.from_pretrained(folder).get_vocab())


def fused(method: Any, models: CausalLMPool) -> Rows:
    merged = method.run(models)
    assert isinstance(merged, Weights)
    return in_memory(merged)


def by_token(
    family: Path,
    names: tuple[str, ...],
    key: str,
    *,
    base: str | None = None,
    sources: Mapping[str, Callable[[str], Tensor]] | None = None,
    forced: tuple[str, ...] = (),
) -> Callable[[str], dict[str, Tensor]]:
    """Return what gives the row of a token in each model, in float64, by the rules in words."""
    tables = {name: tensors(family / name)[key].double() for name in names}
    ids = {
        name: {t: i for t, i in vocabulary(family / name).items() if i < len(tables[name])}
        for name in names
    }

    def rows(token: str) -> dict[str, Tensor]:
        owners = [name for name in names if token in ids[name]]
        own = {name: tables[name][ids[name][token]] for name in owners}
        if sources and token in sources:
            default = sources[token](key)
        elif len(owners) == 1:
            default = own[owners[0]]
        elif base in owners:
            default = own[base]
        elif owners:
            default = torch.stack([own[name] for name in owners]).mean(0)
        else:
            default = torch.zeros(tables[names[0]].shape[1]).double()
        return {
            name: own[name] if name in own and token not in forced else default for name in names
        }

    return rows


def test_the_union_keeps_the_bases_ids_and_appends_what_is_new(family: Path) -> None:
    models = pool(family, "base", "a", "b", "c")
    ids = models.tokenizer.tokenizer.get_vocab()
    base, b, c = (vocabulary(family / name) for name in ("base", "b", "c"))
    assert {token: ids[token] for token in base} == base
    added = {"<|im_start|>", "<|im_end|>"}
    by_id = [sorted(own, key=own.__getitem__) for own in (b, c)]
    new_b = [t for t in by_id[0] if t not in base and t not in added]
    new_c = [t for t in by_id[1] if t not in base and t not in b and t not in added]
    assert new_b
    assert new_c
    expected = [*new_b, *new_c, "<|im_start|>", "<|im_end|>"]
    assert [ids[token] for token in expected] == list(range(len(base), len(ids)))
    assert models.vocabulary == len(ids)


@pytest.mark.parametrize("key", TABLES)
def test_each_model_has_the_row_of_each_token(family: Path, key: str) -> None:
    names = ("base", "a", "b", "c")
    models = pool(family, *names)
    rows = by_token(family, names, key, base="base")
    stored = {
        name: models.weights("_pretrained_" if name == "base" else name)[key] for name in names
    }
    for token, i in models.tokenizer.tokenizer.get_vocab().items():
        for name, row in rows(token).items():
            assert torch.allclose(stored[name][i].double(), row, atol=1e-7), (token, name)


@pytest.mark.parametrize("key", TABLES)
def test_without_a_base_the_mean_of_the_owners_is_taken(family: Path, key: str) -> None:
    names = ("a", "b", "c")
    models = pool(family, *names)
    rows = by_token(family, names, key)
    shared = set(vocabulary(family / "b")) & set(vocabulary(family / "c"))
    means = [token for token in shared if token not in vocabulary(family / "a")]
    assert means
    merged = in_memory(average(models))[key]
    for token, i in models.tokenizer.tokenizer.get_vocab().items():
        expected = torch.stack([*rows(token).values()]).mean(0)
        assert torch.allclose(merged[i].double(), expected, atol=1e-6), token


def test_task_arithmetic_on_a_token_that_the_base_lacks_gives_the_only_owners_row(
    family: Path,
) -> None:
    models = pool(family, "base", "a", "b")
    merged = fused(TaskArithmeticAlgorithm(scaling_factor=0.7), models)
    ids = models.tokenizer.tokenizer.get_vocab()
    tables = {name: tensors(family / name) for name in ("base", "a", "b")}
    base, b = vocabulary(family / "base"), vocabulary(family / "b")
    for key in TABLES:
        for token in set(b) - set(base):
            assert torch.allclose(merged[key][ids[token]], tables["b"][key][b[token]], atol=1e-6)
        for token in set(base) - set(b):  # b's task vector is 0 there
            i = base[token]
            start, end = tables["base"][key][i].double(), tables["a"][key][i].double()
            expected = start + 0.7 * (end - start)
            assert torch.allclose(merged[key][ids[token]].double(), expected, atol=1e-6)


def test_chosen_rows_and_force(family: Path) -> None:
    names = ("base", "a", "b")
    setting = {
        "source": "base",
        "tokens": {
            "<|im_start|>": {"source": "b"},
            "<new>": {"source": {"kind": "model_token", "model": "a", "token": "the"}},
            "<zero>": {"source": {"kind": "zero"}},
            "<nth>": {"source": {"kind": "model_token", "model": "b", "token_id": 7}},
            "cat": {"source": {"kind": "zero"}, "force": True},
            "the": {"force": True},
        },
    }
    models = pool(family, *names, tokenizer=setting)
    b, a = vocabulary(family / "b"), vocabulary(family / "a")

    def row(name: str, i: int) -> Callable[[str], Tensor]:
        return lambda key: tensors(family / name)[key][i].double()

    sources = {
        "<|im_start|>": row("b", b["<|im_start|>"]),
        "<new>": row("a", a["the"]),
        "<zero>": lambda key: torch.zeros(12).double(),
        "<nth>": row("b", 7),
        "cat": lambda key: torch.zeros(12).double(),
    }
    ids = models.tokenizer.tokenizer.get_vocab()
    new = [token for token in setting["tokens"] if token not in a]
    assert [ids[token] for token in new] == [len(a) + n for n in range(len(new))]
    assert "cat" in ids or "Ġcat" in ids
    for key in TABLES:
        rows = by_token(family, names, key, base="base", sources=sources, forced=("cat", "the"))
        for name in names:
            stored = models.weights("_pretrained_" if name == "base" else name)[key]
            for token, i in ids.items():
                assert torch.allclose(stored[i].double(), rows(token)[name], atol=1e-7), token
    # A forced row is the base's in all models.
    the = [models.weights(name)[TABLES[0]][ids["the"]] for name in ("_pretrained_", "a", "b")]
    assert torch.equal(the[0], the[1])
    assert torch.equal(the[0], the[2])


def test_another_model_may_be_the_base(family: Path) -> None:
    models = pool(family, "a", "b", "c", tokenizer={"source": "union", "base": "b"})
    rows = by_token(family, ("a", "b", "c"), TABLES[0], base="b")
    ids = models.tokenizer.tokenizer.get_vocab()
    b = vocabulary(family / "b")
    assert {token: ids[token] for token in b} == b
    stored = models.weights("a")[TABLES[0]]
    for token, i in ids.items():
        assert torch.allclose(stored[i].double(), rows(token)["a"], atol=1e-7)


def test_a_models_tokenizer(family: Path) -> None:
    models = pool(family, "base", "a", "b", tokenizer="b")
    assert models.tokenizer.tokenizer.get_vocab() == vocabulary(family / "b")
    rows = by_token(family, ("base", "a", "b"), TABLES[1], base="base")
    merged = in_memory(average(models))[TABLES[1]]
    for token, i in vocabulary(family / "b").items():
        each = rows(token)
        assert torch.allclose(merged[i].double(), (each["a"] + each["b"]) / 2, atol=1e-6)
    assert models.weights("b")[TABLES[1]].equal(tensors(family / "b")[TABLES[1]])


def test_a_tokenizer_from_a_folder(family: Path, tmp_path: Path) -> None:
    other = trained("bpe", ["something else entirely"], 280)
    other.save_pretrained(tmp_path / "t")
    models = pool(family, "a", "b", tokenizer={"source": str(tmp_path / "t")})
    assert models.tokenizer.tokenizer.get_vocab() == vocabulary(tmp_path / "t")
    assert in_memory(average(models))[TABLES[0]].shape[0] == len(other)
    with pytest.raises(FusionBenchError, match=r"tokenizer\.source: .*nowhere") as error:
        pool(family, "a", tokenizer={"source": "./nowhere"}).weights("a")
    assert error.value.exit_code == 2


def test_rows_without_a_token_are_left_out(family: Path) -> None:
    models = pool(family, "padded", "a", tokenizer="base")
    tokens = len(vocabulary(family / "a"))
    assert models.weights("padded").spec(TABLES[0]).shape[0] == tokens
    assert models.vocabulary == tokens
    both = [tensors(family / name)[TABLES[0]][:tokens].double() for name in ("padded", "a")]
    merged = in_memory(average(models))[TABLES[0]].double()
    assert torch.allclose(merged, (both[0] + both[1]) / 2, atol=1e-6)


def test_base_leaves_out_tokens_without_a_row(family: Path, tmp_path: Path) -> None:
    more = trained("bpe", COMMON, 300, ["<extra>", "[PAD]"])
    more.pad_token = "[PAD]"
    size = len(more) - 2
    write_model(tmp_path / "base", trained("bpe", COMMON, 300), rows=size)
    more.save_pretrained(tmp_path / "base")
    assert len(vocabulary(tmp_path / "base")) == size + 2
    models = CausalLMPool({"base": str(tmp_path / "base")}, tokenizer="base")
    made = models.tokenizer.tokenizer
    assert made.get_vocab() == vocabulary(family / "a")
    assert made.pad_token is None
    assert models.weights("base").spec(TABLES[0]).shape[0] == size
    assert any("'<extra>', '[PAD]'" in note for note in models.plan().notes)
    # The union keeps their ids; no model has a row for them.
    models = CausalLMPool({"base": str(tmp_path / "base")}, tokenizer="union")
    assert models.tokenizer.tokenizer.get_vocab()["<extra>"] == size
    assert not models.weights("base")[TABLES[0]][size:].any()
    assert any("No model has a row for '<extra>', '[PAD]'" in n for n in models.plan().notes)


def test_padding_rows_are_the_mean_of_the_real_ones(family: Path) -> None:
    models = pool(family, "base", "a", "b", tokenizer={"pad_to_multiple_of": 64})
    tokens = len(models.tokenizer.tokenizer.get_vocab())
    size = models.vocabulary
    assert size is not None
    assert size % 64 == 0
    assert 0 < size - tokens < 64
    for name in ("_pretrained_", "a", "b"):
        table = models.weights(name)[TABLES[0]].double()
        assert torch.allclose(table[tokens:], table[:tokens].mean(0).expand(size - tokens, -1))


@pytest.mark.parametrize("names", [("base", "a", "b"), ("tied", "tied_b")])
def test_a_saved_model_is_loaded_and_answers_as_expected(
    family: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    models = pool(family, *names, tokenizer={"source": "union", "pad_to_multiple_of": 32})
    models.save_model(average(models), tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.config.vocab_size == models.vocabulary
    tied = names[0] == "tied"
    stored = tensors(tmp_path / "m")
    assert (TABLES[1] in stored) == (not tied)
    # By hand: float64 means of all tensors, tables by token.
    fused = [name for name in names if name != "base"]
    state = {
        key: sum(tensors(family / name)[key].double() for name in fused) / len(fused)
        for key in stored
        if key not in TABLES
    }
    ids = tokenizer.get_vocab()
    for key in TABLES[: 1 if tied else 2]:
        rows = by_token(family, names, key, base="base" if "base" in names else None)
        table = torch.zeros(model.config.vocab_size, 12).double()
        for token, i in ids.items():
            each = rows(token)
            table[i] = sum(each[name] for name in fused) / len(fused)
        table[len(ids) :] = table[: len(ids)].mean(0)
        state[key] = table
    reference = AutoModelForCausalLM.from_config(model.config).double().eval()
    reference.load_state_dict(state, strict=False)
    reference.tie_weights()
    text = "the cat sat under the tree"
    own = AutoTokenizer.from_pretrained(family / names[-2])
    told = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(told[0]) == text
    assert {tokenizer.convert_ids_to_tokens(int(i)) for i in told[0]} & set(own.get_vocab())
    with torch.no_grad():
        got, exact = model.eval()(told).logits, reference(told).logits
    assert torch.allclose(got.double(), exact, atol=1e-5)
    generated = model.generate(told, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > told.shape[1]


def test_an_input_reads_the_output_tokenizers_ids(family: Path) -> None:
    models = pool(family, "base", "b")
    loaded: Any = models.load_model("b")
    ids, own = models.tokenizer.tokenizer.get_vocab(), vocabulary(family / "b")
    text = ["print", "(", "<|im_start|>"]
    text = [token for token in text if token in own]
    original = AutoModelForCausalLM.from_pretrained(family / "b")
    with torch.no_grad():
        there = original(torch.tensor([[own[token] for token in text]])).logits[0]
        here = loaded(torch.tensor([[ids[token] for token in text]])).logits[0]
    order = [*own]
    assert torch.allclose(
        here[:, [ids[token] for token in order]], there[:, [own[t] for t in order]], atol=1e-6
    )
    assert loaded.config.vocab_size == len(ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_every_kind_of_tokenizer_is_united_saved_and_read(tmp_path: Path, kind: Kind) -> None:
    write_model(tmp_path / "a", trained(kind, COMMON, 300), seed=0)
    write_model(tmp_path / "b", trained(kind, CODE, 300, ["<|x|>"]), seed=1)
    for source in ("union", "base", "b"):
        models = pool(tmp_path, "a", "b", tokenizer=source)
        plan = models.plan()
        assert not plan.problems
        models.save_model(average(models), tmp_path / source)
        saved = AutoTokenizer.from_pretrained(tmp_path / source)
        assert saved.get_vocab() == models.tokenizer.tokenizer.get_vocab()
        for text in COMMON[:2]:
            own = AutoTokenizer.from_pretrained(tmp_path / ("b" if source == "b" else "a"))
            assert saved.decode(saved.encode(text)).replace(" ", "") == own.decode(
                own.encode(text)
            ).replace(" ", "")
        AutoModelForCausalLM.from_pretrained(tmp_path / source)


def test_the_plan_tells_sizes_and_rows(family: Path) -> None:
    notes = "\n".join(pool(family, "a", "b", "c").plan().notes)
    a, b, c = (set(vocabulary(family / name)) for name in "abc")
    assert (
        f"has {len(a)} tokens of 'a', {len(b - a)} more of 'b', {len(c - a - b)} more of" in notes
    )
    total = len(a | b | c)
    assert f"the model has {total} rows" in notes
    assert f"{total - len(a)} tokens are appended as added tokens" in notes
    means = len((b & c) - a) + len((a & c) - b) + len((a & b) - c)
    only = total - len(a & b & c) - means
    assert f"{total - len(a & b & c)} tokens are not in all models" in notes
    assert f"that of the only model with the token ({only})" in notes
    assert f"the mean of the models with the token ({means})" in notes
    assert "A sample text has" in notes


def test_models_of_one_tokenizer_are_seen_as_they_are(family: Path) -> None:
    models = pool(family, "base", "a")
    assert not isinstance(models.weights("a"), ByToken)
    assert (
        models.model("a").identity == pool(family, "base", "a", tokenizer=None).model("a").identity
    )


def test_configs_have_the_output_tokenizers_ids(family: Path, tmp_path: Path) -> None:
    other = trained("bpe", CODE, 290, ["<|end|>"])
    other.eos_token = "<|end|>"
    write_model(tmp_path / "chat", other, seed=1)
    end = other.eos_token_id
    rewrite(tmp_path / "chat", lambda c: c.update(eos_token_id=[2, end]), "generation_config.json")
    names = {"_pretrained_": str(family / "base"), "chat": str(tmp_path / "chat")}
    models = CausalLMPool(names, tokenizer="union")
    ids = models.tokenizer.tokenizer.get_vocab()
    assert models.model("chat").config["eos_token_id"] == ids["<|end|>"]  # type: ignore[index]
    assert models.model("_pretrained_").config["eos_token_id"] == 2  # type: ignore[index]
    models = CausalLMPool(names, tokenizer="chat")
    assert models.model("_pretrained_").config["eos_token_id"] == end  # type: ignore[index]
    models.save_model(models.weights("chat"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert (config["eos_token_id"], generation["eos_token_id"]) == (end, end)
    assert config["vocab_size"] == len(other)


def test_an_adapter_on_a_model_is_seen_by_token(family: Path, tmp_path: Path) -> None:
    modules = ["model.layers.0.self_attn.q_proj"]
    added = write_lora(tmp_path / "lora", tensors(family / "b"), modules)
    models = CausalLMPool(
        {"a": str(family / "a"), "x": {"path": str(tmp_path / "lora"), "base": str(family / "b")}},
        tokenizer="union",
    )
    rows = by_token(family, ("a", "b"), TABLES[0])
    stored = models.weights("x")
    for token, i in models.tokenizer.tokenizer.get_vocab().items():
        assert torch.allclose(stored[TABLES[0]][i].double(), rows(token)["b"])
    key = f"{modules[0]}.weight"
    exact = tensors(family / "b")[key].double() + added[key]
    assert torch.allclose(stored[key].double(), exact, atol=1e-5)


def test_mistakes_are_named_before_anything_is_read(family: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for file in (family / "b").iterdir():
        if "token" not in file.name:
            (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    models = CausalLMPool(
        {"a": str(family / "a"), "bare": str(tmp_path / "bare")}, tokenizer="union"
    )
    (problem,) = models.plan().problems
    assert problem.place == ("models", "bare")
    assert "no tokenizer beside it" in problem.reason

    tokens = {"<x>": {"source": "b"}, "<|im_start|>": {"source": "b"}}
    models = pool(family, "a", "b", tokenizer={"source": "union", "tokens": tokens})
    (problem,) = models.plan().problems
    assert problem.place == ("tokenizer", "tokens", "<x>", "source")
    assert problem.reason == "'b' has no row for the token '<x>'."

    row = {"kind": "model_token", "model": "b", "token_id": 100_000}
    models = pool(family, "a", "b", tokenizer={"tokens": {"<x>": {"source": row}}})
    (problem,) = models.plan().problems
    assert problem.place == ("tokenizer", "tokens", "<x>", "source", "token_id")

    with pytest.raises(FusionBenchError, match=r"tokenizer\.tokens\.<x>\.source: 'bb' is not in"):
        pool(family, "a", "b", tokenizer={"tokens": {"<x>": {"source": "bb"}}})


def test_models_without_tokens_are_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, intermediate_size=8, image_size=32)).save_pretrained(tmp_path / "v")
    with pytest.raises(FusionBenchError, match=r"^tokenizer: .*no vocab_size.*Remove tokenizer"):
        HFModelPool({"v": str(tmp_path / "v")}, tokenizer="union").weights("v")


def test_without_the_key_the_message_tells_of_it(family: Path) -> None:
    models = pool(family, "base", "b", tokenizer=None)
    with pytest.raises(FusionBenchError, match="tokenizer=union to match rows by their tokens"):
        in_memory(average(models))
    with pytest.raises(FusionBenchError, match="tokenizer=union to match rows by their tokens"):
        models.compare()
    assert pool(family, "base", "b").compare() == []


def test_the_tokenizer_that_is_saved_is_checked(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pool(family, "a", "b")
    tokenizer = models.tokenizer.tokenizer
    save = type(tokenizer).save_pretrained

    def damaging(self: Any, place: Any, **more: Any) -> Any:
        saved = save(self, place, **more)
        rewrite(Path(place), lambda c: c["added_tokens"].pop(), "tokenizer.json")
        return saved

    monkeypatch.setattr(type(tokenizer), "save_pretrained", damaging)
    with pytest.raises(FusionBenchError, match="another when it is read from its files"):
        models.save_model(models.weights("a"), tmp_path / "m")
    assert not (tmp_path / "m").exists()
    (problem,) = models.plan().problems
    assert problem.place == ("tokenizer",)


def test_text_that_only_the_merged_tokenizer_loses_is_an_error(tmp_path: Path) -> None:
    write_model(tmp_path / "a", trained("bpe", COMMON, 300), seed=0)
    other = trained("bpe", CODE, 300)
    from tokenizers import AddedToken

    other.add_tokens([AddedToken("the", special=True, normalized=False)], special_tokens=True)
    write_model(tmp_path / "b", other, seed=1)
    (problem,) = pool(tmp_path, "a", "b").plan().problems
    assert problem.place == ("tokenizer",)
    assert "the merged tokenizer makes" in problem.reason


def test_chat_templates(family: Path, tmp_path: Path) -> None:
    chat = AutoTokenizer.from_pretrained(family / "b")
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    write_model(tmp_path / "b", chat, seed=1)
    names = {"a": str(family / "a"), "b": str(tmp_path / "b")}
    messages = [{"role": "user", "content": "hello"}]

    def written(template: str | None, **more: Any) -> str:
        models = CausalLMPool(names, chat_template=template, **more)
        models.save_model(models.weights("a"), tmp_path / "m")
        saved = AutoTokenizer.from_pretrained(tmp_path / "m")
        text = saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    assert written("auto", tokenizer="union") == "hello"
    assert written("auto") == "hello"  # the tokenizer's tokens are as they were
    assert vocabulary(tmp_path / "m") == vocabulary(family / "a")
    assert written("{{ messages[0]['role'] }}", tokenizer="union") == "user"
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert written("chatml", tokenizer="union") == expected
    models = CausalLMPool(names, chat_template="chatml", tokenizer="union")
    assert any("writes '<|im_end|>', which is no token" in note for note in models.plan().notes)
    for wrong, words in (("chatlm", "Did you mean 'chatml'"), ("{% for %}", "it is not Jinja")):
        with pytest.raises(FusionBenchError, match=words):
            CausalLMPool(names, chat_template=wrong)
    models = CausalLMPool({"a": str(family / "a")}, chat_template="auto")
    assert any("no model has a chat template" in note for note in models.plan().notes)


def test_t5_and_bert_are_seen_by_token(tmp_path: Path) -> None:
    import transformers as hf

    first, second = trained("wordpiece", COMMON, 80), trained("wordpiece", CODE, 70)
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "t5": (
            hf.T5Config,
            hf.T5ForConditionalGeneration,
            {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        ),
        "bert": (
            hf.BertConfig,
            hf.BertForMaskedLM,
            {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            | {"intermediate_size": 16, "max_position_embeddings": 80},
        ),
        "bart": (
            hf.BartConfig,
            hf.BartForConditionalGeneration,
            {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
            | {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
            | {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
        ),
    }
    for kind, (config, made, sizes) in kinds.items():
        for name, tokenizer in (("a", first), ("b", second)):
            ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            model = made(
                config(vocab_size=len(tokenizer), decoder_start_token_id=0, **ids, **sizes)
            )
            folder = tmp_path / f"{kind}_{name}"
            if kind == "bart":
                model.final_logits_bias.normal_()
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        names = {name: str(tmp_path / f"{kind}_{name}") for name in "ab"}
        models: HFModelPool = (
            HFModelPool(names, "AutoModelForMaskedLM", tokenizer="union")
            if kind == "bert"
            else Seq2SeqLMPool(names, tokenizer="union")
        )
        assert not models.plan().problems
        ids = models.tokenizer.tokenizer.get_vocab()
        grown = [
            key for key in models.weights("a") if len(ids) in models.weights("a").spec(key).shape
        ]
        expected = {
            "t5": {"shared.weight"},
            "bert": {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"},
            "bart": {"model.shared.weight", "final_logits_bias"},
        }[kind]
        assert set(grown) >= expected
        saved = tmp_path / f"{kind}_m"
        models.save_model(average(models), saved)
        _, info = made.from_pretrained(saved, output_loading_info=True)
        assert not info["mismatched_keys"]
        assert not info["missing_keys"]
        own = {name: vocabulary(Path(path)) for name, path in names.items()}
        for key in expected:
            tables = {name: tensors(Path(path))[key] for name, path in names.items()}
            merged = tensors(saved)[key]
            tables = {n: t.view(-1, 1) if t.shape[0] == 1 else t for n, t in tables.items()}
            merged = merged.view(-1, 1) if merged.shape[0] == 1 else merged
            for token, i in ids.items():
                rows = [tables[n][own[n][token]] for n in "ab" if token in own[n]]
                expected_row = torch.stack(rows).mean(0)
                assert torch.allclose(merged[i], expected_row, atol=1e-6), (key, token)


def test_classifiers_are_merged_by_token_without_their_heads(tmp_path: Path) -> None:
    import transformers as hf

    tokenizers = {"a": trained("wordpiece", COMMON, 80), "b": trained("wordpiece", CODE, 70)}
    for name, tokenizer in tokenizers.items():
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = hf.BertConfig(vocab_size=len(tokenizer), intermediate_size=16, **sizes)
        hf.BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    names = {name: str(tmp_path / name) for name in tokenizers}
    models = SequenceClassificationModelPool(names, tokenizer="union")
    assert not models.plan().problems
    key = "embeddings.word_embeddings.weight"
    size = len(models.tokenizer.tokenizer.get_vocab())
    assert models.weights("b").spec(key).shape == (size, 16)
    loaded: Any = models.load_model("b")
    assert loaded.config.vocab_size == size


def test_a_merged_model_is_built_and_another_run_of_it_is_known(family: Path) -> None:
    models = pool(family, "base", "b")
    weights = models.weights("b")
    for given in (weights, models.model("b")):
        built: Any = models.build_model(given)
        assert built.config.vocab_size == models.vocabulary
    assert models.architecture() != pool(family, "base", "b", tokenizer="b").architecture()
    assert models.architecture() == pool(family, "base", "b").architecture()


def test_the_order_of_tokens_in_an_input_makes_no_difference(family: Path, tmp_path: Path) -> None:
    """The same model with its tokens, and rows, in another order is merged to the same bits."""
    size = len(vocabulary(family / "a"))
    drawn = torch.randperm(size - 4, generator=torch.Generator().manual_seed(0))
    order = torch.cat([torch.arange(4), 4 + drawn])  # new id to old id
    shutil.copytree(family / "a", tmp_path / "a")
    state = tensors(family / "a")
    state |= {key: state[key][order].contiguous() for key in TABLES}
    save_file(state, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    new = {int(old): i for i, old in enumerate(order)}

    def reorder(content: dict[str, Any]) -> None:
        tokens = content["model"]["vocab"]
        content["model"]["vocab"] = {token: new[i] for token, i in tokens.items()}

    rewrite(tmp_path / "a", reorder, "tokenizer.json")
    plain = in_memory(average(pool(family, "base", "a", "b")))
    moved = CausalLMPool(
        {
            "_pretrained_": str(family / "base"),
            "a": str(tmp_path / "a"),
            "b": str(family / "b"),
        },
        tokenizer="union",
    )
    assert vocabulary(tmp_path / "a") != vocabulary(family / "a")
    for key, value in in_memory(average(moved)).items():
        assert torch.equal(value, plain[key]), key
