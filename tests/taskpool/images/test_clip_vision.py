import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from fixtures_scores import loss_sum, losses, num_right
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from fusion_bench.problems import FusionBenchError
from fusion_bench.results import SampleScores
from fusion_bench.storage import cache_dir
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from fusion_bench.taskpool.images import clip_vision
from fusion_bench.taskpool.images.evaluate import Loading
from fusion_bench.tasks import readable


def pool(program_config: dict[str, Any], **changes: Any) -> CLIPVisionModelTaskPool:
    arguments = {k: v for k, v in program_config["taskpool"].items() if k != "_target_"}
    return CLIPVisionModelTaskPool(**(arguments | changes))


def cpu(**arguments: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **arguments)


def model(family: Path, name: str = "a") -> CLIPVisionModel:
    return CLIPVisionModel.from_pretrained(family / "models" / name)


def sums(scores: dict[str, SampleScores]) -> dict[str, tuple[int, float]]:
    return {task: (num_right(score), loss_sum(score)) for task, score in scores.items()}


def one_by_one(family: Path, task: str) -> tuple[int, float]:
    """Evaluate model `a` with transformers alone, an image at a time, in float64."""
    path = family / "models" / "base"
    clip = CLIPModel.from_pretrained(path).double().eval()
    encoder = model(family).double().eval()
    processor, tokenizer = (
        CLIPImageProcessorPil.from_pretrained(path),
        CLIPTokenizer.from_pretrained(path),
    )
    data = load_dataset(str(family / "datasets" / task), split="test")
    names = data.features["label"].names
    correct, loss = 0, 0.0
    with torch.no_grad():
        tokens = tokenizer(
            [f"a photo of a {readable(n)}." for n in names], padding=True, return_tensors="pt"
        )
        texts = clip.get_text_features(**tokens).pooler_output
        texts = texts / texts.norm(dim=-1, keepdim=True)
        for row in data:
            pixels = processor(row["image"].convert("RGB"), return_tensors="pt")["pixel_values"]
            image = clip.visual_projection(encoder(pixels.double()).pooler_output)[0]
            logits = clip.logit_scale.exp() * texts @ (image / image.norm())
            correct += int(logits.argmax()) == row["label"]
            loss -= float(logits.log_softmax(0)[row["label"]])
    return correct, loss


@pytest.mark.parametrize("task", ["a", "b"])
def test_against_an_independent_reference(
    family: Path, program_config: dict[str, Any], task: str
) -> None:
    correct, loss = one_by_one(family, task)
    score = pool(program_config).evaluate(model(family), cpu(), [task])[task]
    assert (num_right(score), score.num_samples) == (correct, 23)
    assert 0 < num_right(score) < 23  # or the comparison would say little
    assert loss_sum(score) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 2), (7, 0), (64, 2)])
def test_batch_size_and_workers_do_not_matter(
    family: Path, program_config: dict[str, Any], batch_size: int, num_workers: int
) -> None:
    reference = pool(program_config).evaluate(model(family), cpu())
    kwargs = {"batch_size": batch_size, "num_workers": num_workers, "shuffle": True}
    scores = pool(program_config, dataloader_kwargs=kwargs).evaluate(model(family), cpu())
    for task, score in scores.items():
        assert num_right(score) == num_right(reference[task])
        assert score.num_samples == reference[task].num_samples
        assert loss_sum(score) == pytest.approx(loss_sum(reference[task]), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions(family: Path, program_config: dict[str, Any], precision: Any) -> None:
    exact = pool(program_config).evaluate(model(family), cpu())["a"]
    rounded = pool(program_config).evaluate(model(family), cpu(precision=precision))["a"]
    assert loss_sum(rounded) != loss_sum(exact)
    assert loss_sum(rounded) == pytest.approx(loss_sum(exact), rel=0.05)


def test_fast_dev_run_evaluates_one_batch(family: Path, program_config: dict[str, Any]) -> None:
    tasks = pool(program_config, dataloader_kwargs={"num_workers": 0, "batch_size": 5})
    scores = tasks.evaluate(model(family), cpu(), fast_dev_run=True)
    assert [score.num_samples for score in scores.values()] == [5, 5]


def test_base_model_and_nodes(family: Path, program_config: dict[str, Any]) -> None:
    path = str(family / "models" / "base")
    expected = sums(pool(program_config).evaluate(model(family), cpu()))
    by_base = pool(program_config, clip_model=None, processor=None, base_model=path)
    assert sums(by_base.evaluate(model(family), cpu())) == expected
    by_node = pool(
        program_config,
        clip_model={
            "_target_": "transformers.CLIPModel.from_pretrained",
            "pretrained_model_name_or_path": path,
        },
        processor={
            "_target_": "transformers.CLIPProcessor.from_pretrained",
            "pretrained_model_name_or_path": path,
        },
        data_processor=path,
    )
    assert sums(by_node.evaluate(model(family), cpu())) == expected


def test_overrides_change_the_head(family: Path, program_config: dict[str, Any]) -> None:
    swapped = pool(program_config, tasks={"a": {"class_names": ["beach", "abbey", "cat"]}})
    plain = pool(program_config)
    scores = [p.evaluate(model(family), cpu(), ["a"])["a"] for p in (swapped, plain)]
    assert loss_sum(scores[0]) != loss_sum(scores[1])


def test_bad_arguments(family: Path, program_config: dict[str, Any]) -> None:
    with pytest.raises(FusionBenchError, match="there is no task"):
        pool(program_config, test_datasets={})
    with pytest.raises(FusionBenchError, match=r"clip_model: missing"):
        pool(program_config, clip_model=None)
    with pytest.raises(FusionBenchError, match=r"tasks\.c: there is no such task"):
        pool(program_config, tasks={"c": {}})
    with pytest.raises(FusionBenchError, match="Did you mean 'templates'"):
        pool(program_config, tasks={"a": {"template": []}})
    with pytest.raises(FusionBenchError, match="drop_last"):
        Loading.for_device({"drop_last": True}, cpu())
    other = CLIPVisionModel(CLIPVisionConfig(hidden_size=48, num_attention_heads=2))
    with pytest.raises(FusionBenchError, match=r"hidden_size 24, 'x' has 48"):
        pool(program_config).evaluate(other, cpu(), name="x")
    bare = pool(program_config, clip_model=str(family / "models" / "a"))
    with pytest.raises(FusionBenchError, match="not a full CLIP model"):
        bare.prepare(cpu())


class Counted:
    """How often text heads are made and whole CLIP models are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.heads = self.towers = 0
        make, read = clip_vision.text_head, CLIPModel.from_pretrained

        def text_head(*args: Any) -> torch.Tensor:
            self.heads += 1
            return make(*args)

        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            self.towers += 1
            return read(*args, **kwargs)

        monkeypatch.setattr(clip_vision, "text_head", text_head)
        monkeypatch.setattr(CLIPModel, "from_pretrained", from_pretrained)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def evaluated(family: Path, program_config: dict[str, Any], **changes: Any) -> SampleScores:
    return pool(program_config, **changes).evaluate(model(family), cpu(), ["a"])["a"]


def test_a_text_head_is_made_once_ever(
    family: Path, program_config: dict[str, Any], counted: Counted
) -> None:
    first = evaluated(family, program_config)
    assert (counted.heads, counted.towers) == (1, 1)
    second = evaluated(family, program_config)
    assert (counted.heads, counted.towers) == (1, 1)  # not even the text tower is read
    assert losses(second) == losses(first)


def test_without_the_cache_heads_are_made_each_time(
    family: Path, program_config: dict[str, Any], counted: Counted
) -> None:
    for _ in range(2):
        evaluated(family, program_config, cache=False)
    assert counted.heads == 2


def test_a_head_serves_all_models_of_a_pool(
    family: Path, program_config: dict[str, Any], counted: Counted
) -> None:
    tasks = pool(program_config, cache=False)
    for name in ("a", "b"):
        tasks.evaluate(model(family, name), cpu())
    assert (counted.heads, counted.towers) == (2, 1)


def test_other_texts_make_another_head(
    family: Path, program_config: dict[str, Any], counted: Counted
) -> None:
    plain = loss_sum(evaluated(family, program_config))
    changes: list[dict[str, Any]] = [
        {"templates": ["a drawing of a {}."]},
        {"templates": ["a photo of a {}.", "{}"]},
        {"class_names": ["abbey", "airplane", "beach"]},
        {"class_names": ["seaside", "fuselage", "priory"]},
    ]
    for made, change in enumerate(changes, start=2):
        changed = evaluated(family, program_config, tasks={"a": change})
        assert counted.heads == made and loss_sum(changed) != plain, change


def test_another_text_weight_makes_another_head(
    family: Path, program_config: dict[str, Any], counted: Counted, tmp_path: Path
) -> None:
    evaluated(family, program_config)
    path = shutil.copytree(family / "models" / "base", tmp_path / "base") / "model.safetensors"
    weights = load_file(path)
    weights["text_projection.weight"][0, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    evaluated(family, program_config, clip_model=str(path.parent))
    assert (counted.heads, counted.towers) == (2, 2)


@pytest.mark.parametrize("kind", ["directory", "object"])
def test_another_tokenizer_makes_another_head(
    family: Path, program_config: dict[str, Any], counted: Counted, tmp_path: Path, kind: str
) -> None:
    base = shutil.copytree(family / "models" / "base", tmp_path / "base")

    def processor() -> Any:
        return str(base) if kind == "directory" else CLIPProcessor.from_pretrained(base)

    evaluated(family, program_config, processor=processor())
    evaluated(family, program_config, processor=processor())
    assert counted.heads == 1
    for file in ("vocab.json", "tokenizer.json"):
        if (base / file).exists():
            text = (base / file).read_text(encoding="utf-8")
            swapped = re.sub(r'"b</w>": (\d+)', '"@@": \\1', text)
            swapped = swapped.replace('"c</w>"', '"b</w>"').replace('"@@"', '"c</w>"')
            (base / file).write_text(swapped, encoding="utf-8")
    evaluated(family, program_config, processor=processor())
    assert counted.heads == 2


def test_the_same_files_elsewhere_make_the_same_head(
    family: Path, program_config: dict[str, Any], counted: Counted, tmp_path: Path
) -> None:
    evaluated(family, program_config)
    copy = str(shutil.copytree(family / "models" / "base", tmp_path / "base"))
    evaluated(family, program_config, clip_model=copy, processor=copy)
    assert counted.heads == 1


def test_a_damaged_head_is_made_again(
    family: Path, program_config: dict[str, Any], counted: Counted
) -> None:
    first = evaluated(family, program_config)
    (file,) = (cache_dir() / "heads").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert losses(evaluated(family, program_config)) == losses(first)
    assert counted.heads == 2 and file.read_bytes() == content


def test_encoder_and_head_are_clips_own_logits(
    family: Path, program_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = family / "models" / "base"
    clip = CLIPModel.from_pretrained(path).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    classifier = clip_vision.ZeroShotClassifiers.classifier

    def spy(*args: Any) -> Any:
        classify = classifier(*args)

        def spied(images: torch.Tensor) -> torch.Tensor:
            seen.append((images, classify(images)))
            return seen[-1][1]

        return spied

    monkeypatch.setattr(clip_vision.ZeroShotClassifiers, "classifier", spy)
    names = ["abbey", "airplane cabin", "beach"]
    encoder = CLIPVisionModel.from_pretrained(path)
    pool(program_config).evaluate(encoder, cpu(), ["a"])
    texts = [f"a photo of a {name}." for name in names]
    tokens = CLIPTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    data = load_dataset(str(family / "datasets" / "a"), split="test")
    images = [row["image"] for row in data]
    pixels = CLIPImageProcessorPil.from_pretrained(path)(images, return_tensors="pt")
    assert torch.equal(torch.cat([p for p, _ in seen]), pixels["pixel_values"])
    with torch.no_grad():
        expected = clip(**pixels, **tokens).logits_per_image
    torch.testing.assert_close(
        torch.cat([logits for _, logits in seen]), expected, rtol=1e-5, atol=1e-4
    )
