"""Each way of naming a model is known by what it takes."""

import json
from pathlib import Path

import pytest
from fixtures_llm import tensors, write_llama, write_lora
from torch import nn

from fusion_bench.modelpool import CausalLMPool
from fusion_bench.modelpool.sources import KINDS, Sources
from fusion_bench.modelpool.sources.adapter import Adapter
from fusion_bench.modelpool.sources.file import File
from fusion_bench.modelpool.sources.folder import Folder
from fusion_bench.modelpool.sources.gguf import Gguf
from fusion_bench.modelpool.sources.merged import Merged
from fusion_bench.modelpool.sources.module import Module
from fusion_bench.modelpool.sources.node import Node
from fusion_bench.modelpool.sources.source import Source
from fusion_bench.problems import FusionBenchError


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    write_llama(tmp_path / "folder")
    base = str(tmp_path / "folder")
    write_lora(tmp_path / "lora", tensors(tmp_path / "folder"), [], base_name=base)
    (tmp_path / "Q4.GGUF").touch()
    models = {
        "gguf": tmp_path / "Q4.GGUF",
        "module": nn.Linear(2, 2),
        "node": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2},
        "merged": {"_target_": "fusion_bench.modelpool.MergedModel"},
        "file": tmp_path / "folder" / "model.safetensors",
        "folder": str(tmp_path / "folder"),
        "adapter": tmp_path / "lora",
        "zoo": "zoo:clip-tiny",
        "number": 3,
    }
    return Sources(models, "AutoModelForCausalLM")


def test_the_first_that_takes_a_node_wins(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_BENCH_CACHE", "/nowhere")  # where the zoo is not
    kinds = {name: type(source) for name, source in sources.items()}
    assert kinds == {
        "gguf": Gguf,
        "module": Module,
        "node": Node,
        "merged": Merged,
        "file": File,
        "folder": Folder,
        "adapter": Adapter,
        "zoo": Folder,
        "number": Node,
    }
    assert len(KINDS) == len(set(kinds.values()))


def test_every_kind_answers_everything() -> None:
    wanted = {name for name in vars(Source) if not name.startswith("_")}
    for kind in (Module, Node, Gguf, File, Folder, Adapter):
        fields = set(kind.__dataclass_fields__)
        assert {name for name in wanted if not hasattr(kind, name)} <= fields


def test_one_model_is_looked_at_once(sources: Sources) -> None:
    assert sources["folder"] is sources["folder"]
    assert sources["folder"].at is sources["folder"].at


@pytest.mark.parametrize("use", ["weights", "load_model", "architecture"])
def test_what_is_wrong_with_a_model_is_told_at_its_place(use: str, tmp_path: Path) -> None:
    pool = CausalLMPool({"a": str(tmp_path / "gone")})
    with pytest.raises(FusionBenchError, match=r"^models\.a: There is no such directory"):
        getattr(pool, use)("a")


def test_the_texts_under_which_results_are_kept(sources: Sources) -> None:
    config = json.loads((sources["folder"].at.fetch("config.json") / "config.json").read_text())
    of_files = json.dumps(["AutoModelForCausalLM", config], sort_keys=True)
    for name in ("folder", "file", "adapter"):
        assert sources[name].architecture() == of_files
    node = '{"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2}'
    assert sources["node"].architecture() == node
    assert sources["module"].architecture() == str(nn.Linear(2, 2))
