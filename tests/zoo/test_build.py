"""Building the zoo: whole or not at all, once, and without a trace on the caller."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from commandline import python

from fusion_bench import zoo
from fusion_bench.method.checks import threads
from fusion_bench.problems import ConfigError, FusionBenchError
from fusion_bench.zoo import build
from fusion_bench.zoo.dense.recipe import DenseRecipe
from fusion_bench.zoo.language import RECIPES
from fusion_bench.zoo.recipe import Recipe

SMALL = Recipe(
    width=32, layers=1, pretrain_steps=2, pretrain_batch=16, finetune_steps=1, finetune_batch=8
)

#: The logger of what is told of a build.
TOLD_BY = "fusion_bench.zoo.built"

#: Draws each task's images once for all tests; that they are always the same is tested elsewhere.
make = cache(build.make)

_write_dataset = build._write_dataset

# A process that builds, from far fewer images. It says when it is in the middle of it, and waits
# there or is killed.
SCRIPT = """
import os, signal, sys, time
from fusion_bench.zoo import build
from fusion_bench.zoo.recipe import Recipe

def few(task, make=build.make):
    if task not in ("faces", "shapes"):
        task = "faces"
    return make(task)

def slow(*args, finetune=build.finetune):
    print("training", flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(sys.argv[1]))
    finetune(*args)

build.CLASS_NAMES = {task: build.CLASS_NAMES["faces"] for task in build.TASKS}
build.make = lambda task: few("faces")
build.finetune = slow
recipe = Recipe(
    width=32, layers=1, pretrain_steps=2, pretrain_batch=16, finetune_steps=1, finetune_batch=8
)
print("at", build.ensure(recipe), flush=True)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a small zoo, once for all tests; returns the cache directory."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSION_BENCH_CACHE", str(directory))
        patch.setattr(build, "make", make)
        zoo.model_path("clip-tiny", SMALL)
    return directory


@pytest.fixture
def cache(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that holds a small zoo."""
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(built))
    return built


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the faces once; to encode them takes longer than to train a small zoo."""
    directory = tmp_path_factory.mktemp("faces")
    _write_dataset(directory, "faces", make("faces"))
    return directory


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: Path) -> Path:
    """Make a build take no time, and an empty cache to build in."""
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path))
    faces = make("faces")
    names = build.CLASS_NAMES["faces"]
    monkeypatch.setattr(build, "_write_dataset", lambda at, *_: copytree(written, at))
    monkeypatch.setattr(build, "make", lambda task: faces)
    monkeypatch.setattr(build, "CLASS_NAMES", dict.fromkeys(zoo.TASKS, names))
    return tmp_path


def _zoos(cache: Path) -> list[Path]:
    return [path for path in (cache / "zoo").iterdir() if path.is_dir()]


def test_the_pretrained_model_is_a_whole_clip(cache: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    path = zoo.model_path("clip-tiny", SMALL)
    assert path.is_relative_to(cache)
    model, loading = CLIPModel.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values())
    processor = CLIPProcessor.from_pretrained(path)
    image = zoo.load_dataset("photos", recipe=SMALL)[0]["image"]
    inputs = processor(text=["a photo of a cat."], images=image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert inputs["input_ids"][0, -1] == model.config.text_config.eos_token_id
    assert model(**inputs).logits_per_image.shape == (1, 1)


@pytest.mark.parametrize("task", zoo.TASKS)
def test_the_finetuned_models_are_vision_encoders(cache: Path, task: str) -> None:
    from safetensors import safe_open
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    path = zoo.model_path(f"clip-tiny_{task}", SMALL)
    tuned, loading = CLIPVisionModel.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values())
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert all(key.startswith("vision_model.") for key in file.keys())  # noqa: SIM118
    base = CLIPVisionModel.from_pretrained(zoo.model_path("clip-tiny", SMALL)).state_dict()
    assert tuned.state_dict().keys() == base.keys()
    assert any(not torch.equal(value, base[key]) for key, value in tuned.state_dict().items())
    assert CLIPImageProcessorPil.from_pretrained(path).size["shortest_edge"] == 32


@pytest.mark.parametrize("task", zoo.TASKS)
def test_the_datasets_are_those_that_were_made(cache: Path, task: str) -> None:
    import datasets

    made = make(task)
    for split in zoo.SPLITS:
        dataset = zoo.load_dataset(task, split, recipe=SMALL)
        assert isinstance(dataset.features["image"], datasets.Image)
        assert dataset.features["label"].names == list(zoo.CLASS_NAMES[task])
        assert dataset["label"][:] == made[split].labels.tolist()
        assert np.array_equal(np.asarray(dataset[3]["image"]), made[split].images[3])
        for file in dataset.cache_files:
            assert Path(file["filename"]).is_relative_to(cache)


def test_a_second_call_builds_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda *args: pytest.fail("built again"))
    zoo.model_path("clip-tiny_digits", SMALL)


def test_another_recipe_has_another_place() -> None:
    assert SMALL.key() == Recipe(**json.loads(json.dumps(vars(SMALL)))).key()
    assert SMALL.key() != Recipe().key()


def test_what_is_told_of_a_build_has_no_part_in_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def recorded(path: Path, read_bytes: Callable[[Path], bytes] = Path.read_bytes) -> bytes:
        read.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", recorded)
    for recipe in (Recipe(), DenseRecipe(), RECIPES["t5-tiny"]):
        read.clear()
        recipe.key()
        assert {"build.py", "train.py"} <= set(read) and "built.py" not in read


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: zoo.model_path("clip-tiny_digit"), "clip-tiny_digits"),
        (lambda: zoo.model_path("../clip-tiny"), "clip-tiny"),
        (lambda: zoo.model_path("clip-tiny-narow_digits"), "clip-tiny-narrow_digits"),
        (lambda: zoo.load_dataset("digit"), "digits"),
        (lambda: zoo.load_dataset("digits", "tests"), "test"),
        (lambda: zoo.load_dataset("digits", "all"), "train"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_built(
    call, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ensure", lambda recipe: pytest.fail("built"))
    with pytest.raises(FusionBenchError, match=f"'?{hint}'?"):
        call()


def test_a_failed_build_leaves_nothing(few_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build, "finetune", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build.ensure(SMALL)
    assert _zoos(few_images) == []
    assert zoo.model_path("clip-tiny_faces", SMALL).is_dir()


@pytest.mark.processes
def test_a_killed_build_leaves_nothing_that_counts(few_images: Path) -> None:
    done = python(SCRIPT, "killed")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "training\n")
    assert [path.name[0] for path in _zoos(few_images)] == ["."]
    root = build.ensure(SMALL)
    assert _zoos(few_images) == [root]


@pytest.mark.processes
def test_two_processes_build_once(few_images: Path) -> None:
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: python(SCRIPT, "0.2"), range(2)))
    assert [process.returncode for process in done] == [0, 0]
    assert sorted(process.stdout.count("training") for process in done) == [0, len(zoo.TASKS)]
    assert len(_zoos(few_images)) == 1


def test_the_callers_torch_is_left_alone(few_images: Path) -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1], torch.get_num_threads()
    with torch.inference_mode():
        build.ensure(SMALL)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert torch.get_num_threads() == before[2]


def test_the_same_weights_whatever_the_caller_drew(few_images: Path, tmp_path: Path) -> None:
    weights = []
    for number in range(2):
        torch.manual_seed(number)
        build.build(tmp_path / str(number), SMALL)
        path = tmp_path / str(number) / "models" / "clip-tiny_faces" / "model.safetensors"
        weights.append(path.read_bytes())
    assert weights[0] == weights[1]


def test_the_same_weights_for_any_number_of_threads(few_images: Path, tmp_path: Path) -> None:
    # wide enough for sums to be split
    recipe = Recipe(layers=1, pretrain_steps=1, finetune_steps=1)
    weights = []
    for count in (1, 3):
        with threads(count):
            build.build(tmp_path / str(count), recipe)
        files = sorted((tmp_path / str(count)).glob("models/*/model.safetensors"))
        assert len(files) == len(zoo.MODELS)
        weights.append([file.read_bytes() for file in files])
    assert weights[0] == weights[1]


def test_too_few_threads_are_refused_before_anything_is_drawn(
    few_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    monkeypatch.setattr(build, "make", lambda task: pytest.fail("drawn"))
    with pytest.raises(ConfigError, match="Unset OMP_THREAD_LIMIT"):
        build.ensure(SMALL)
    assert _zoos(few_images) == []


def test_without_a_terminal_it_logs_two_lines(
    few_images: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        root = build.ensure(SMALL)
    mine = [record.getMessage() for record in caplog.records if record.name == TOLD_BY]
    assert len(mine) == 2
    assert str(root) in mine[0]
    assert "100%" not in capfd.readouterr().err


@pytest.mark.cold
def test_importing_is_light() -> None:
    code = (
        "import sys, fusion_bench.zoo; heavy = {'torch', 'transformers', 'datasets', 'sklearn', "
        "'skimage', 'matplotlib', 'numpy', 'tokenizers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
    assert time.monotonic() - started < 10
