from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES
from datasets import load_dataset
from fixtures_scores import answers as predicted
from fixtures_scores import losses
from lightning.fabric import Fabric
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessorPil,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    Dinov2Config,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.results import SampleScores
from fusion_bench.taskpool import ImageClassificationTaskPool
from fusion_bench.weights import sha256

CPU = Fabric(accelerator="cpu", devices=1)
SQUARE = {"height": 32, "width": 32}
TRANSFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
KINDS: dict[str, tuple[Any, Any]] = {
    "vit": (ViTConfig(**TRANSFORMER), ViTImageProcessorPil(size=SQUARE)),
    "resnet": (
        ResNetConfig(embedding_size=8, layer_type="basic", **STAGES),
        ConvNextImageProcessorPil(size={"shortest_edge": 32}),
    ),
    "convnext": (
        ConvNextConfig(num_stages=2, **STAGES),
        ConvNextImageProcessorPil(size={"shortest_edge": 32}),
    ),
    "dinov2": (
        Dinov2Config(**TRANSFORMER),
        BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=SQUARE),
    ),
}


def write(folder: Path, kind: str, names: list[str], seed: int, **changes: Any) -> Path:
    """Write a classifier with random weights, and its image processor."""
    config, processor = KINDS[kind]
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageClassification.from_config(
            type(config)(**(config.to_diff_dict() | labels | changes))
        )
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write <kind>/base, a bare backbone, and the classifiers <kind>/a and <kind>/b."""
    root = tmp_path_factory.mktemp("classifiers")
    for kind, (config, _) in KINDS.items():
        for seed, (task, names) in enumerate(CLASSES.items()):
            write(root / kind / task, kind, names, seed)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            bare = AutoModelForImageClassification.from_config(config).base_model
        bare.save_pretrained(root / kind / "base")
    return root


def models(zoo: Path, kind: str, *, base: bool = False) -> HFModelPool:
    named = {task: str(zoo / kind / task) for task in CLASSES}
    if base:
        named["_pretrained_"] = str(zoo / kind / "base")
    return HFModelPool(named)


def tasks(family: Path, classifiers: dict[str, Any], **more: Any) -> ImageClassificationTaskPool:
    node = {"_target_": "datasets.load_dataset", "split": "test"}
    datasets = {task: {**node, "path": str(family / "datasets" / task)} for task in classifiers}
    return ImageClassificationTaskPool(datasets, classifiers, **more)


def of(zoo: Path, kind: str, family: Path, **more: Any) -> ImageClassificationTaskPool:
    return tasks(family, {task: str(zoo / kind / task) for task in CLASSES}, **more)


def answers(scores: dict[str, SampleScores]) -> dict[str, Any]:
    return {task: (predicted(s), losses(s)) for task, s in scores.items()}


def by_hand(path: Path, family: Path, task: str, backbone: Any = None) -> tuple[Any, Any]:
    """Evaluate with transformers alone, an image at a time."""
    model = AutoModelForImageClassification.from_pretrained(path).eval()
    if backbone is not None:
        model.base_model.load_state_dict(backbone)
    predictions, losses = [], []
    for pixels, label in prepared(path, family, task):
        with torch.no_grad():
            logits = model(**pixels).logits[0]
        predictions.append(int(logits.argmax()))
        losses.append(float(-logits.log_softmax(0)[label]))
    return predictions, losses


@cache
def prepared(path: Path, family: Path, task: str) -> list[tuple[Any, int]]:
    """Return a task's images as a classifier of the zoo takes them, and their labels."""
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    rows = load_dataset(str(family / "datasets" / task), split="test")
    return [
        (processor(row["image"].convert("RGB"), return_tensors="pt"), row["label"]) for row in rows
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_an_individual_model_answers_as_by_hand(zoo: Path, family: Path, kind: str) -> None:
    evaluated = of(zoo, kind, family).evaluate(models(zoo, kind).load_model("b"), CPU, ["b"])["b"]
    predictions, expected = by_hand(zoo / kind / "b", family, "b")
    assert len(set(expected)) > 9  # or the comparison would say little
    assert predicted(evaluated) == predictions
    assert losses(evaluated) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "base"),
    [("vit", False), ("resnet", False), *((kind, True) for kind in KINDS)],
)
def test_a_merged_backbone_is_evaluated_with_each_tasks_head(
    zoo: Path, family: Path, kind: str, base: bool, tmp_path: Path
) -> None:
    pool = models(zoo, kind, base=base)
    merged = SimpleAverageAlgorithm(show_pbar=False).run(pool)
    module = pool.build_model(merged)
    scores = of(zoo, kind, family).evaluate(module, CPU)
    for task in CLASSES:
        predictions, expected = by_hand(zoo / kind / task, family, task, module.state_dict())
        assert predicted(scores[task]) == predictions
        assert losses(scores[task]) == pytest.approx(expected, rel=1e-4, abs=1e-5)

    pool.save_model(merged, tmp_path / "merged")
    again = HFModelPool({"merged": str(tmp_path / "merged")})
    assert sha256(again.weights("merged")) == sha256(pool.open_saved(tmp_path / "merged"))
    saved = of(zoo, kind, family).evaluate(again.load_model("merged"), CPU)
    assert answers(saved) == answers(scores)
    assert AutoModel.from_pretrained(tmp_path / "merged")


def test_a_pretrained_model_with_more_than_its_backbone(zoo: Path, tmp_path: Path) -> None:
    AutoModel.from_config(KINDS["vit"][0]).save_pretrained(tmp_path / "base")  # with a pooler
    named = {"_pretrained_": str(tmp_path / "base"), "a": str(zoo / "vit" / "a")}
    with pytest.raises(FusionBenchError, match="pooler"):
        SimpleAverageAlgorithm(show_pbar=False).run(HFModelPool(named))


def test_the_order_of_evaluating_does_not_matter(zoo: Path, family: Path) -> None:
    pool = models(zoo, "vit")
    before = {name: sha256(pool.weights(name)) for name in CLASSES}
    both = of(zoo, "vit", family)
    first = {name: answers(both.evaluate(pool.load_model(name), CPU)) for name in "ab"}
    second = {name: answers(both.evaluate(pool.load_model(name), CPU)) for name in "ba"}
    assert second == first and first["a"] != first["b"]
    assert {name: sha256(pool.weights(name)) for name in CLASSES} == before


def test_another_precision_leaves_the_heads_as_they_are(zoo: Path, family: Path) -> None:
    half = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    pool, both = models(zoo, "vit"), of(zoo, "vit", family)
    first = answers(both.evaluate(pool.load_model("a"), CPU))
    assert answers(both.evaluate(pool.load_model("a"), half)) != first
    assert answers(both.evaluate(pool.load_model("a"), CPU)) == first


def test_modules_that_are_given_are_not_changed(zoo: Path, family: Path) -> None:
    given = {
        task: AutoModelForImageClassification.from_pretrained(zoo / "vit" / task)
        for task in CLASSES
    }
    backbones = {task: model.base_model for task, model in given.items()}
    pool = HFModelPool(backbones)
    before = {name: sha256(pool.weights(name)) for name in CLASSES}
    both = tasks(family, given, processor=str(zoo / "vit" / "a"))
    merged = pool.build_model(SimpleAverageAlgorithm(show_pbar=False).run(pool))
    both.evaluate(merged, CPU)
    assert {name: sha256(pool.weights(name)) for name in CLASSES} == before
    assert given["a"].base_model is backbones["a"]
    expected = of(zoo, "vit", family).evaluate(models(zoo, "vit").load_model("a"), CPU)
    assert answers(both.evaluate(pool.load_model("a"), CPU)) == answers(expected)


def test_results_are_kept_by_head(zoo: Path, family: Path, tmp_path: Path) -> None:
    built = []

    def build() -> Any:
        built.append(1)
        return models(zoo, "vit").load_model("a")

    def evaluate(classifier: Path) -> SampleScores:
        pool = tasks(family, {"a": str(classifier)})
        return pool.evaluate(build, CPU, weights_sha256="w")["a"]

    first = evaluate(zoo / "vit" / "a")
    assert losses(evaluate(zoo / "vit" / "a")) == losses(first) and len(built) == 1
    other = write(tmp_path / "other", "vit", CLASSES["a"], seed=9)
    assert losses(evaluate(other)) != losses(first) and len(built) == 2


def refused(zoo: Path, family: Path, classifier: Any, **more: Any) -> str:
    with pytest.raises(FusionBenchError) as error:
        tasks(family, {"a": classifier}, **more).evaluate(
            models(zoo, "vit").load_model("a"), CPU, name="m"
        )
    return str(error.value)


def test_another_number_of_classes(zoo: Path, family: Path) -> None:
    text = refused(zoo, family, str(zoo / "vit" / "b"))
    assert text == ("classifiers.a: it has 5 classes, the dataset has 3.")


@pytest.mark.parametrize(
    ("spelling", "order"),
    [
        (str, [1, 2, 0]),
        (str.upper, [2, 1, 0]),
        (lambda name: name.replace("_", " "), [1, 2, 0]),
    ],
)
def test_another_order_of_classes(
    zoo: Path, family: Path, tmp_path: Path, spelling: Any, order: list[int]
) -> None:
    names = [spelling(name) for name in CLASSES["a"]]
    ordered = write(tmp_path / "ordered", "vit", names, seed=0)
    head = AutoModelForImageClassification.from_pretrained(ordered)
    head.classifier.weight.data = head.classifier.weight.data[order]
    head.classifier.bias.data = head.classifier.bias.data[order]
    head.config.id2label = {output: names[own] for output, own in enumerate(order)}
    head.save_pretrained(tmp_path / "turned")
    KINDS["vit"][1].save_pretrained(tmp_path / "turned")
    model = models(zoo, "vit").load_model("a")
    first, second = (
        answers(tasks(family, {"a": str(place)}).evaluate(model, CPU, weights_sha256="w"))
        for place in (ordered, tmp_path / "turned")
    )
    assert first == second and len(set(first["a"][1])) > 9


def test_numbers_of_classes_are_told_as_numbers(zoo: Path, family: Path, tmp_path: Path) -> None:
    numbers = write(tmp_path / "numbers", "vit", ["1", "0", "2"], seed=0)
    plain = write(tmp_path / "plain", "vit", ["LABEL_0", "LABEL_1", "LABEL_2"], seed=0)
    model = models(zoo, "vit").load_model("a")
    first, second = (
        tasks(family, {"a": str(place)}).evaluate(model, CPU)["a"].details["predictions"]
        for place in (plain, numbers)
    )
    assert second.tolist() == [[1, 0, 2][output] for output in first]


def test_classes_of_other_names(zoo: Path, family: Path, tmp_path: Path) -> None:
    strange = write(tmp_path / "strange", "vit", ["Abtei", "Kabine", "Strand"], seed=0)
    text = refused(zoo, family, str(strange))
    assert text.startswith(
        "classifiers.a: it calls its classes 'Abtei', 'Kabine', 'Strand', the dataset "
        "'abbey', 'airplane cabin', 'beach': they cannot be matched."
    )
    (problem,) = tasks(family, {"a": str(strange)}).plan().problems
    assert str(problem) == text
    told = {"a": {"class_names": ["Abtei", "Kabine", "Strand"]}}
    assert tasks(family, {"a": str(strange)}, tasks=told).plan().problems == []
    tasks(family, {"a": str(strange)}, tasks=told).prepare(CPU)


def test_another_architecture(zoo: Path, family: Path) -> None:
    text = refused(zoo, family, str(zoo / "dinov2" / "a"))
    assert text.startswith("classifiers.a: its backbone is a Dinov2Model, that of 'm' a ViTModel.")


def test_another_size(zoo: Path, family: Path, tmp_path: Path) -> None:
    wide = write(tmp_path / "wide", "vit", CLASSES["a"], seed=0, hidden_size=32)
    assert "its backbone has hidden_size 32, that of 'm' 24" in refused(zoo, family, str(wide))


def test_a_backbone_is_no_classifier(zoo: Path, family: Path, tmp_path: Path) -> None:
    bare = write(tmp_path / "bare", "vit", CLASSES["a"], seed=0)
    AutoModelForImageClassification.from_pretrained(bare).base_model.save_pretrained(bare)
    config = AutoConfig.from_pretrained(bare)
    assert config.num_labels == 3
    assert "is no image classifier; it lacks 'classifier.bias'" in refused(zoo, family, str(bare))


def test_a_missing_classifier(family: Path) -> None:
    node = {"_target_": "datasets.load_dataset", "path": "p", "split": "test"}
    with pytest.raises(FusionBenchError, match=r"classifiers\.b: missing"):
        ImageClassificationTaskPool({"b": node}, {})


def test_a_classifier_that_is_not_there(zoo: Path, family: Path, tmp_path: Path) -> None:
    assert "no such directory" in refused(zoo, family, str(tmp_path / "nowhere"))


def test_a_module_brings_no_processor(zoo: Path, family: Path) -> None:
    module = AutoModelForImageClassification.from_pretrained(zoo / "vit" / "a")
    assert "processor: missing" in refused(zoo, family, module)


def test_classes_are_held_against_the_datasets_before_a_weight_is_read(
    family: Path, zoo: Path
) -> None:
    places = {task: str(zoo / "vit" / task) for task in ("a", "b")}
    assert tasks(family, places).plan().problems == []
    (problem,) = tasks(family, places | {"a": places["b"]}).plan().problems
    assert str(problem) == ("classifiers.a: it has 5 classes, the dataset has 3.")
    (problem,) = tasks(family, places | {"a": "/no/such"}).plan().problems
    assert str(problem).startswith("classifiers.a: There is no such directory")
