"""Similarity by embeddings, against transformers without batches."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from fixtures_texts import CPU, OTHERS, TEXTS, pool_of, write_classifier, write_t5
from scipy.stats import spearmanr
from torch import nn

from fusion_bench.method import RegMeanAlgorithm
from fusion_bench.modelpool import SequenceClassificationModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.results.metrics import PEARSON, SPEARMAN
from fusion_bench.taskpool import SimilarityTask, TaskPool
from fusion_bench.weights import Weights

SCORES = [0.5, 2.0, 1.0, 3.0, 2.5]
KEYS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "last": "pooling_mode_lasttoken",
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `base`, `a` and `b` of two kinds, with the files of sentence-transformers."""
    root = tmp_path_factory.mktemp("embeddings")
    for kind in ("bert", "gpt2"):
        for seed, name in enumerate(("base", "a", "b")):
            write_classifier(root / kind / name, kind, seed)
            write_modules(root / kind / name, "cls")
    return root


def write_modules(folder: Path, mode: str, more: str | None = None) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    kinds |= {f"3_{more}": more} if more else {}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    said = {key: own == mode for own, key in KEYS.items()}
    config = {"word_embedding_dimension": 12, **said, "pooling_mode_mean_sqrt_len_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def data(**more: Any) -> Dataset:
    return Dataset.from_dict({"sentence1": TEXTS, "sentence2": OTHERS, "score": SCORES, **more})


def models(family: Path, kind: str = "bert") -> SequenceClassificationModelPool:
    names = {"_pretrained_": "base", "a": "a", "b": "b"}
    return SequenceClassificationModelPool(
        {name: str(family / kind / folder) for name, folder in names.items()}
    )


def tasks(family: Path, kind: str = "bert", **more: Any) -> TaskPool:
    batch_size = more.pop("batch_size", None)
    given = {"dataset": data(), "name": "t", **more}
    return pool_of(SimilarityTask(**given), models(family, kind).tokenizer, batch_size)


def plain(folder: Path, mode: str, prompt: str = "", longest: int = 10**6) -> list[float]:
    model = transformers.AutoModel.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def embedding(text: str) -> torch.Tensor:
        with torch.no_grad():
            cut = {"truncation": True, "max_length": longest} if longest < 10**6 else {}
            ids = tokenizer(prompt + text, return_tensors="pt", **cut)["input_ids"]
            states = model(input_ids=ids).last_hidden_state[0]
        if mode == "max":
            return states.amax(dim=0)
        return {"mean": states.mean(dim=0), "cls": states[0], "last": states[-1]}[mode]

    pairs = zip(TEXTS, OTHERS, strict=True)
    return [float(torch.cosine_similarity(embedding(a), embedding(b), dim=0)) for a, b in pairs]


@pytest.mark.parametrize("mode", KEYS)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_cosine_is_that_of_the_tokens_alone(family: Path, kind: str, mode: str) -> None:
    expected = plain(family / kind / "a", mode)
    model = models(family, kind).load_model("a")
    for size in (1, 10):
        scores = tasks(family, kind, pooling=mode, batch_size=size).evaluate(model, CPU)["t"]
        np.testing.assert_allclose(scores.details["predictions"], expected, rtol=1e-4, atol=1e-6)
    assert scores.value(PEARSON) == pytest.approx(np.corrcoef(expected, SCORES)[0, 1], rel=1e-3)
    found = spearmanr(np.float32(expected), SCORES).statistic
    assert scores.value(SPEARMAN) == pytest.approx(found)


def test_a_folder_names_the_length_and_the_prompt(family: Path, tmp_path: Path) -> None:
    folder = tmp_path / "named"
    copytree(family / "bert" / "a", folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 5}))
    prompts = {"prompts": {"query": f"{TEXTS[0]} "}, "default_prompt_name": "query"}
    model = models(family).load_model("a")
    for said, prompt in (({}, ""), (prompts, f"{TEXTS[0]} ")):
        (folder / "config_sentence_transformers.json").write_text(json.dumps(said))
        found = tasks(family, pooling=str(folder)).evaluate(model, CPU)["t"]
        expected = plain(family / "bert" / "a", "cls", prompt, 5)
        np.testing.assert_allclose(found.details["predictions"], expected, rtol=1e-4)
        assert found.details["truncated"].any()


def test_a_folder_names_the_pooling(family: Path, tmp_path: Path) -> None:
    folder = str(family / "bert" / "a")
    model = models(family).load_model("a")
    named = tasks(family, pooling=folder).evaluate(model, CPU)["t"].details["predictions"]
    np.testing.assert_allclose(named, plain(family / "bert" / "a", "cls"), rtol=1e-4)
    write_classifier(tmp_path / "other", "bert")
    problems = {}
    for what in ("bare", "dense", "sqrt"):
        if what == "dense":
            write_modules(tmp_path / "other", "mean", "Dense")
        if what == "sqrt":
            write_modules(tmp_path / "other", "sqrt")
        pool = TaskPool({"t": SimilarityTask(data(), pooling=str(tmp_path / "other"), name="t")})
        (problems[what],) = [p for p in pool.plan().problems if p.place[-1] == "pooling"]
        with pytest.raises(FusionBenchError) as caught:
            tasks(family, pooling=str(tmp_path / "other")).prepare(CPU)
        assert str(caught.value.problems[0]) == str(problems[what])
    assert "has no modules.json, which would name its pooling" in problems["bare"].reason
    assert "has a module 'Dense', which is not computed here" in problems["dense"].reason
    assert "is none of mean, cls, max, last" in problems["sqrt"].reason


def test_what_is_saved_is_whole_and_evaluates_the_same(family: Path, tmp_path: Path) -> None:
    pool = models(family)
    pool.save_model(pool.weights("a"), tmp_path / "saved")
    saved = {str(f.relative_to(tmp_path / "saved")) for f in (tmp_path / "saved").rglob("*.json")}
    assert {"modules.json", "1_Pooling/config.json"} <= saved
    again = SequenceClassificationModelPool({"x": str(tmp_path / "saved")})
    task = SimilarityTask(data(), pooling=str(tmp_path / "saved"), name="t")
    found = pool_of(task, again.tokenizer).evaluate(again.load_model("x"), CPU)["t"]
    first = tasks(family, pooling="cls").evaluate(pool.load_model("a"), CPU)["t"]
    assert np.array_equal(found.details["predictions"], first.details["predictions"])


def test_an_encoder_decoder_is_asked_for_its_encoder(tmp_path: Path) -> None:
    write_t5(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    task = SimilarityTask(data(), tokenizer=str(tmp_path), name="t")
    found = pool_of(task).evaluate(model, CPU)["t"].details["predictions"]
    assert np.isfinite(found).all() and len(set(found)) > 1


def test_a_constant_model_has_no_value(family: Path) -> None:
    model: Any = models(family).load_model("a")
    model.encoder.layer[1].output.LayerNorm.weight.data.zero_()
    pool = tasks(family)
    scores = pool.evaluate(model, CPU, name="merged")["t"]
    assert np.isnan(scores.value(PEARSON)) and np.isnan(scores.value(SPEARMAN))
    assert "'merged' on 't': spearman and pearson has no value" in pool.notes[0]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"sentence1": ["", *TEXTS[1:]]}, "sample 0: a text is empty. Leave the sample out."),
        ({"score": [None, *SCORES[1:]]}, "sample 0: the label None is no number."),
    ],
)
def test_what_is_wrong_is_said(family: Path, more: dict[str, Any], problem: str) -> None:
    with pytest.raises(FusionBenchError) as caught:
        tasks(family, dataset=data(**more)).prepare(CPU)
    assert str(caught.value.problems[0]).startswith(f"tasks.t.dataset: {problem}")


def test_methods_may_learn_from_it(family: Path) -> None:
    own = tasks(family, pooling="mean").tuning({"t": data()}, CPU, ("here",))["t"]
    inputs, labels = next(own.batches(own.sample(None), 5))
    model: nn.Module = models(family).load_model("a")
    found = own.classify(model)(inputs)[:, 0].detach().numpy()
    np.testing.assert_allclose(found, plain(family / "bert" / "a", "mean"), rtol=1e-4)
    assert labels.tolist() == SCORES
    both = {name: str(family / "bert" / name) for name in ("a", "b")}
    pool = SequenceClassificationModelPool(both)
    assert isinstance(RegMeanAlgorithm().run(pool, CPU, {"a": own, "b": own}), Weights)
