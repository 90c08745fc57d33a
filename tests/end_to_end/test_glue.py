"""The GLUE suites run as they are, on small models and few texts in place of those on the Hub."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from fixtures_llm import tensors, write_lora
from fixtures_texts import OTHERS, TEXTS, write_classifier, write_t5

from fusion_bench.configs import composed
from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError
from fusion_bench.report import Report

#: The columns with texts of each task, and its classes.
GLUE = {
    "cola": (["sentence"], 2),
    "mnli": (["premise", "hypothesis"], 3),
    "mrpc": (["sentence1", "sentence2"], 2),
    "qnli": (["question", "sentence"], 2),
    "qqp": (["question1", "question2"], 2),
    "rte": (["sentence1", "sentence2"], 2),
    "sst2": (["sentence"], 2),
    "stsb": (["sentence1", "sentence2"], 0),
}


def write_glue(root: Path) -> None:
    """Write each task's data as the Hub has them: train and test, which differ."""
    for task, (columns, count) in GLUE.items():
        for part in ("train", "test"):
            texts = {name: [f"{text} {part}" for text in TEXTS] for name in columns[:1]}
            texts |= dict.fromkeys(columns[1:], OTHERS)
            names = [f"LABEL_{i}" for i in range(count)]
            kind = ClassLabel(names=names) if count else Value("float32")
            labels = [i % count if count else i + 0.5 for i in range(len(TEXTS))]
            features = Features({name: Value("string") for name in columns} | {"label": kind})
            rows = Dataset.from_dict({**texts, "label": labels}, features=features)
            rows.save_to_disk(str(root / task / part))


def replaced(node: Any, names: Callable[[str], str], data: Path) -> Any:
    """Return a config with other models and data."""
    if isinstance(node, str):
        return names(node)
    if not isinstance(node, Mapping):
        return node
    if node.get("_target_") == "datasets.load_dataset":
        assert node["path"] == "nyu-mll/glue"
        part = "train" if node["split"] == "train" else "test"
        place = str(data / node["name"] / part)
        return {"_target_": "datasets.load_from_disk", "dataset_path": place}
    return {key: replaced(own, names, data) for key, own in node.items()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the models that the suites name, and the data."""
    root = tmp_path_factory.mktemp("hub")
    write_glue(root / "glue")
    write_t5(root / "google_flan-t5-base")
    modules = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.v"]
    write_classifier(root / "openai-community_gpt2", "gpt2")
    base = tensors(root / "google_flan-t5-base")
    for seed, (task, (_, count)) in enumerate(GLUE.items()):
        adapter = root / f"tanganke_flan-t5-base_glue-{task}_lora-16"
        write_lora(adapter, base, modules, seed=seed)
        if count:
            write_classifier(root / f"tanganke_gpt2_{task}", "gpt2", seed + 1, num_labels=count)
    return root


def program(hub: Path, out: Path, *overrides: str, **more: Any) -> Any:
    def names(text: str) -> str:
        place = hub / text.replace("/", "_")
        return str(place) if place.is_dir() and "/" in text else text

    config = replaced(composed(*overrides, "baselines=none"), names, hub / "glue")
    config["taskpool"]["cache"] = False
    return instantiate(config | more, output_dir=out)


T5 = ("modelpool=Seq2SeqLMPool/flan-t5-base_glue_lora16", "taskpool=flan-t5_glue_text_generation")
GPT2 = ("modelpool=gpt-2_glue", "taskpool=gpt-2_glue")


@pytest.mark.parametrize(("suite", "tasks"), [(T5, 8), (GPT2, 7)])
def test_the_suite_runs(hub: Path, suite: tuple[str, ...], tasks: int, tmp_path: Path) -> None:
    program(hub, tmp_path, *suite, "dry_run=true").run()
    assert list(tmp_path.iterdir()) == []
    report = program(hub, tmp_path, *suite, "merged_model_save_path=null").run()
    assert isinstance(report, Report)
    found = report.models["merged"].tasks
    assert len(found) == tasks
    main = {name.removeprefix("glue-"): next(iter(own.metrics)) for name, own in found.items()}
    expected = dict.fromkeys(GLUE, "accuracy") | {"stsb": "spearman"}
    assert main == {name: expected[name] for name in main}


@pytest.mark.parametrize(
    ("suite", "method"),
    [
        (T5, ["adamerging/task_wise", "max_steps=2", "batch_size=4"]),
        (GPT2, ["fisher_merging/clip_fisher_merging", "num_fisher_examples=4"]),
    ],
    ids=["t5", "gpt2"],
)
def test_methods_learn(
    hub: Path, suite: tuple[str, ...], method: list[str], tmp_path: Path
) -> None:
    name, *options = method
    overrides = [f"method={name}", *(f"method.{option}" for option in options)]
    report = program(hub, tmp_path, *suite, *overrides, "merged_model_save_path=null").run()
    assert isinstance(report, Report) and report.run.tuning is not None
    assert not report.run.tuning.test_split


def test_a_search_evaluates_on_other_texts(hub: Path, tmp_path: Path) -> None:
    target = "fusion_bench.programs.GridSearch"
    search = {"_target_": target, "space": {"scaling_factor": [0.1, 0.5]}, "split": "train"}
    method = "method=task_arithmetic"
    report = program(hub, tmp_path, *GPT2, method, similarity=False, search=search).run()
    assert isinstance(report, Report) and report.run.search is not None
    assert report.run.search.split == "train"


def test_data_that_are_evaluated_need_leave(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(FusionBenchError, match="allow_test_split"):
        program(hub, tmp_path, *GPT2, "method=regmean/clip_regmean", "method.split=test").run()
