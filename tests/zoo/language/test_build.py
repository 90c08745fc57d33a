"""Building small families: whole or not at all, and the same each time."""

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from fusion_bench.plan import zoo_step
from fusion_bench.problems import ConfigError, FusionBenchError
from fusion_bench.sources import resolve, unbuilt
from fusion_bench.trust import find
from fusion_bench.zoo import language
from fusion_bench.zoo.language import RECIPES, TASKS, LanguageRecipe, build


def small(family: str) -> LanguageRecipe:
    """Return the family's recipe with next to no training."""
    sizes = {"width": 16, "layers": 1, "pretrain_batch": 4, "finetune_batch": 4, "samples": 20}
    steps = {"pretrain_steps": 2, "probe_steps": 2, "finetune_steps": 2}
    return replace(RECIPES[family], **sizes, **steps)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build each family, small; returns the directory of their directories."""
    root = tmp_path_factory.mktemp("families")
    for family in language.FAMILIES:
        build.build(root / family, family, small(family))
    return root


def directory(built: Path, name: str) -> Path:
    return built / name.partition("_")[0] / "models" / name


@pytest.mark.parametrize("name", language.MODELS)
def test_a_model_is_read_with_its_tokenizer(built: Path, name: str) -> None:
    family, _, task = name.partition("_")
    readers = {"bert": AutoModelForSequenceClassification if task else AutoModel}
    readers |= {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
    path = directory(built, name)
    reader = readers[RECIPES[family].kind]
    model, loading = reader.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values()) and not model.training
    tokens = AutoTokenizer.from_pretrained(path)
    assert model(**tokens("good", return_tensors="pt"), **decoder(model))[0].isfinite().all()
    assert model.config.vocab_size == len(tokens)
    assert model.config.pad_token_id == tokens.pad_token_id == 0
    files = {file.name for file in path.iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files == wanted | ({"generation_config.json"} if "bert" not in name else set())


def decoder(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    encodes = model.config.is_encoder_decoder
    return {"decoder_input_ids": torch.tensor([[0]])} if encodes else {}


@pytest.mark.parametrize("family", ["llama-tiny", "llama-tiny-tied", "t5-tiny"])
def test_answers_are_generated_until_their_end(built: Path, family: str) -> None:
    settings = GenerationConfig.from_pretrained(directory(built, family))
    ids = settings.pad_token_id, settings.bos_token_id, settings.eos_token_id
    assert ids == (0, 1, 2) and not settings.do_sample
    assert settings.decoder_start_token_id == (0 if family == "t5-tiny" else None)


def test_embeddings_are_tied_in_one_family_alone(built: Path) -> None:
    for family, tied in {"llama-tiny": False, "llama-tiny-tied": True}.items():
        model = AutoModelForCausalLM.from_pretrained(directory(built, family))
        same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert model.config.tie_word_embeddings == same == tied


def test_experts_differ_from_the_pretrained_model_by_the_backbone(built: Path) -> None:
    for family, tasks in TASKS.items():
        base = AutoModel.from_pretrained(directory(built, family)).state_dict()
        for task in tasks:
            own = AutoModel.from_pretrained(directory(built, f"{family}_{task}")).state_dict()
            assert own.keys() == base.keys()
            assert any(not torch.equal(value, base[key]) for key, value in own.items())


def test_an_encoders_head_has_the_classes_of_its_task(built: Path) -> None:
    names = {"similarity": ("score",), **language.CLASS_NAMES}
    for task in TASKS["bert-tiny"]:
        path = directory(built, f"bert-tiny_{task}")
        config = AutoModelForSequenceClassification.from_pretrained(path).config
        assert tuple(config.id2label.values()) == names[task]
        assert (config.problem_type == "regression") == (task == "similarity")


@pytest.mark.parametrize("family", ["llama-tiny-tied", "t5-tiny", "bert-tiny"])
def test_two_builds_are_the_same(built: Path, family: str, tmp_path: Path) -> None:
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.manual_seed(7)
    build.build(tmp_path, family, small(family))
    torch.set_rng_state(random)
    assert torch.get_num_threads() == threads
    for file in sorted((built / family).rglob("*.*")):
        assert file.read_bytes() == (tmp_path / file.relative_to(built / family)).read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path))
    return tmp_path


def test_each_family_is_built_whole_and_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = small("bert-tiny")
    with monkeypatch.context() as patch:
        patch.setattr(build.encoders, "finetune", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            language.model_path("bert-tiny", recipe)
    assert [path for path in (cache / "zoo").iterdir() if path.is_dir()] == []
    caplog.clear()  # of what the failed build told, where the level was set before
    with caplog.at_level(logging.INFO, "fusion_bench"):
        path = language.model_path("bert-tiny_sentiment", recipe)
    assert path.is_dir() and path.is_relative_to(language.place("bert-tiny", recipe))
    own = [record for record in caplog.records if record.name == "fusion_bench.zoo.built"]
    before, after = (record.getMessage() for record in own)
    assert before.startswith("Building the zoo's bert-tiny models, once, in ")
    assert after.startswith("Built the zoo's bert-tiny models in ")
    monkeypatch.setattr(build, "build", lambda *args: pytest.fail("built again"))
    language.model_path("bert-tiny", recipe)
    assert [path.name for path in (cache / "zoo").iterdir() if path.is_dir()] == [
        language.place("bert-tiny", recipe).name
    ]


def test_the_place_depends_on_family_and_recipe() -> None:
    own = [language.place(family) for family in language.FAMILIES]
    own.append(language.place("llama-tiny", replace(RECIPES["llama-tiny"], seed=1)))
    assert len(set(own)) == len(own)
    assert language.place("t5-tiny_sort") == language.place("t5-tiny", RECIPES["t5-tiny"])


def test_a_name_leads_to_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda root, *args: (root / "models").mkdir(parents=True))
    name = "zoo:llama-tiny-tied_sort"
    place = unbuilt(name)
    assert place == language.place("llama-tiny-tied")
    step = zoo_step(place)
    assert (step.verb, step.place) == ("build", place)
    assert step.what == "the zoo's llama-tiny-tied models, which take 1 to 2 minutes"
    assert resolve(name) == str(place / "models" / "llama-tiny-tied_sort")
    assert unbuilt(name) is None
    assert unbuilt("zoo:llama-tiny") == language.place("llama-tiny")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("llama-tiny_srot", "llama-tiny_sort"),
        ("t5-tiny_sentiment", "bert-tiny_sentiment"),
        ("lama-tiny", "llama-tiny"),
        ("../bert-tiny", "bert-tiny"),
        ("clip-tiny-dense_dept", "clip-tiny-dense_depth"),
        ("clip-tiny_digit", "clip-tiny_digits"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_of_all_families(
    name: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ensure", lambda *args: pytest.fail("built"))
    calls = [resolve, unbuilt, lambda own: language.model_path(own.removeprefix("zoo:"))]
    for call in calls[: 2 if name.startswith("clip") else 3]:
        with pytest.raises(FusionBenchError, match=f"no model '{name}'. Did you mean '{nearest}'"):
            call(f"zoo:{name}")


def test_other_functions_of_the_zoo_are_not_called() -> None:
    with pytest.raises(ConfigError):
        find("fusion_bench.zoo.language.model_path")


def test_importing_it_is_cheap() -> None:
    code = "import sys, fusion_bench.zoo.families; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "fusion_bench.zoo.language" in loaded
    assert not {"torch", "transformers", "datasets"} & set(loaded)
