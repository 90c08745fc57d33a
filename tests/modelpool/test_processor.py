"""Another processor may go beside a merged model than the reference's."""

from pathlib import Path

import pytest
from fixtures_llm import write_bert

from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the encoders `a` and `b`."""
    root = tmp_path_factory.mktemp("bert")
    for seed, name in enumerate("ab"):
        write_bert(root / name, seed=seed)
    return root


def test_another_processor_takes_the_place_of_the_references(family: Path, tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("words")
    models = HFModelPool({"a": str(family / "a")}, processor=str(tmp_path / "words"))
    models.save_model(models.weights("a"), tmp_path / "m")
    assert (tmp_path / "m" / "vocab.txt").read_text() == "words"
    assert not (tmp_path / "m" / "tokenizer.json").exists()


def test_a_processor_may_be_a_node(family: Path, tmp_path: Path) -> None:
    node = {
        "_target_": "transformers.AutoTokenizer.from_pretrained",
        "pretrained_model_name_or_path": str(family / "b"),
        "use_fast": True,
    }
    models = HFModelPool({"a": str(family / "a")}, processor=node)
    models.save_model(models.weights("a"), tmp_path / "m")
    assert (tmp_path / "m" / "tokenizer.json").exists()


def test_a_processor_that_is_not_there_is_noticed_before_the_work(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("fusion_bench.modelpool.directory.write_checkpoints")
    models = HFModelPool({"a": str(family / "a")}, processor=str(family / "aa"))
    with pytest.raises(FusionBenchError, match=r"aa'.*Did you mean"):
        models.save_model(models.weights("a"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use", ["plan", "save_model"])
def test_what_is_wrong_is_told_at_its_place(use: str, family: Path, tmp_path: Path) -> None:
    models = HFModelPool({"a": str(family / "a")}, processor=str(tmp_path / "gone"))
    with pytest.raises(FusionBenchError, match=r"^processor: There is no such directory"):
        if use == "plan":
            models.plan().problems.raise_all()
        models.save_model(models.weights("a"), tmp_path / "m")


def test_one_of_the_zoo_is_not_built_to_be_planned(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "cache"))
    HFModelPool({"a": str(family / "a")}, processor="zoo:clip-tiny").plan()
    assert not (tmp_path / "cache" / "zoo").exists()
