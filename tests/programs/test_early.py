"""What a run would find out late, when much was computed: it is refused before."""

import io
import json
import re
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError

Config = dict[str, Any]

ENSEMBLE = {"_target_": "fusion_bench.method.SimpleEnsembleAlgorithm"}
ARITHMETIC = {"_target_": "fusion_bench.method.TaskArithmeticAlgorithm"}
#: What a run found out late, or never; each is refused before it begins.
LATE: list[tuple[str, Any, str]] = [
    ("method", {}, "method: has no _target_"),
    ("method", "simple_average", "method: 'simple_average' is not a config node"),
    ("method", ["a"], "method: .* is not a config node"),
    ("modelpool", {"models": {}}, "modelpool: has no _target_"),
    ("modelpool", "x", "modelpool: 'x' is not a config node"),
    ("taskpool", {"test_datasets": {}}, "taskpool: has no _target_"),
    ("taskpool", "x", "taskpool: 'x' is not a config node"),
    ("search", {"space": {"a": [1]}}, "search: has no _target_"),
    ("search", "grid", "search: 'grid' is not a config node"),
    ("fabric", "cpu", "fabric: 'cpu' is not a mapping"),
    ("taskpool.test_datasets.a", {"path": "x"}, r"test_datasets\.a: has no _target_"),
    ("taskpool.test_datasets.a", "x", r"test_datasets\.a: 'x' is not a config node"),
    ("taskpool.processor", {"a": 1}, r"taskpool\.processor: has no _target_.*CLIPProcessor"),
    ("modelpool.models.a", {"paht": "x"}, r"models\.a\.paht: there is no such key"),
    ("taskpool.test_datasets.a.streaming", True, r"streaming: a stream can be neither"),
    ("modelpool.max_shard_size", "abc", r"modelpool\.max_shard_size: 'abc' is not a size"),
    (
        "modelpool.max_shard_size",
        None,
        r"modelpool\.max_shard_size: null is not a whole number or a text",
    ),
    ("modelpool.max_shard_size", 0, r"modelpool\.max_shard_size: '0' is not a size"),
    ("modelpool.max_shard_size", -5, r"modelpool\.max_shard_size: '-5' is not a size"),
    ("seed", -1, "seed: -1 is not a number from 0"),
    ("seed", 2**40, "seed: .* is not a number from 0"),
    ("taskpool.dataloader_kwargs.batch_size", 0, "batch_size: '0' is not 1 or more"),
    ("taskpool.dataloader_kwargs.num_workers", -1, "num_workers: '-1' is not 0 or more"),
    ("taskpool.dataloader_kwargs.prefetch_factor", -2, "prefetch_factor: '-2' is not 1"),
    ("taskpool.dataloader_kwargs.foo", 1, "foo: there is no such argument"),
    ("taskpool.dataloader_kwargs.drop_last", True, "drop_last: would leave samples"),
    ("method", {**ARITHMETIC, "scaling_factor": float("nan")}, r"scaling_factor: NaN"),
    ("modelpool.models.a", "/a\udc80b", r"modelpool\.models\.a: .* not valid UTF-8"),
    ("merged_model_save_path", "", "merged_model_save_path: '' is not a valid path"),
    ("merged_model_save_path", "a\0b", "merged_model_save_path: .* is not a valid path"),
    ("merged_model_save_path", "a\udc80b", "merged_model_save_path: .* is not a valid path"),
    ("merged_model_save_path", "x" * 300, "merged_model_save_path: .* is not a valid path"),
    ("merged_model_save_path", "/", "merged_model_save_path: '/' is the root"),
    ("report_save_path", "x" * 300 + ".json", "report_save_path: .* is not a valid path"),
]


LINES = {"_target_": "fusion_bench.method.LiNeSAlgorithm"}
ADAMERGING = {"_target_": "fusion_bench.method.AdaMergingAlgorithm"}
LATE += [
    ("modelpool.models.x", None, r"modelpool\.models\.x: null is not allowed.*'~modelpool"),
    ("modelpool.models._pretrained_", None, r"models\._pretrained_: null is not allowed"),
    ("taskpool.test_datasets.a", None, r"taskpool\.test_datasets\.a: null is not allowed"),
    ("modelpool.train_datasets", {"a": None}, r"train_datasets\.a: null is not allowed"),
    ("method", {**LINES, "base_method": ENSEMBLE}, r"method\.base_method: .* returns a module"),
    ("method", {**ADAMERGING, "weights": "/no/f"}, r"method\.weights: '/no/f' is not a file of"),
    ("modelpool", None, "modelpool: missing"),
]


def changed(config: Config, key: str, value: Any) -> Config:
    config = deepcopy(config)
    *above, last = key.split(".")
    node = config
    for name in above:
        node = node[name]
    node[last] = value
    return config


@pytest.mark.parametrize(("key", "value", "told"), LATE, ids=lambda v: ascii(v)[:40])
def test_what_runs_found_late_is_found_before(
    program_config: Config, key: str, value: Any, told: str
) -> None:
    config = changed(program_config, key, value)
    with pytest.raises(FusionBenchError, match=told):
        instantiate({**config, "dry_run": True}).run()


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 300, "\u00e9" * 60, "a\udc80"], ids=ascii)
def test_names_that_no_file_can_have(program_config: Config, name: str) -> None:
    config = deepcopy(program_config)
    config["modelpool"]["models"][name] = config["modelpool"]["models"]["a"]
    test = config["taskpool"]["test_datasets"]
    test[name] = test["a"]
    with pytest.raises(FusionBenchError) as refused:
        instantiate({**config, "dry_run": True}).run()
    keys = [
        re.split(r": '[^']*' is not a valid file name", line)[0]
        for line in str(refused.value).split("\n")
    ]
    assert keys == [f"modelpool.models.{name}", f"taskpool.test_datasets.{name}"]


@pytest.mark.parametrize("name", ["...", ".a", "a b ", "a/b", "A"])
def test_names_that_files_can_have(program_config: Config, tmp_path: Path, name: str) -> None:
    config = deepcopy(program_config)
    del config["taskpool"]
    config["modelpool"]["models"][name] = config["modelpool"]["models"]["a"]
    config |= {"method": ENSEMBLE, "merged_model_save_path": str(tmp_path / "m")}
    instantiate(config).run()
    described = json.loads((tmp_path / "m" / "ensemble.json").read_text())
    assert described["models"] == ["a", "b", name]
    assert len([place for place in (tmp_path / "m").iterdir() if place.is_dir()]) == 3


def test_places_that_are_in_each_others_way(program_config: Config, tmp_path: Path) -> None:
    place = str(tmp_path / "x.json")
    for model in (place, f"{place}/m"):
        with pytest.raises(
            FusionBenchError, match=r"merged_model_save_path: .* the path of the report"
        ):
            instantiate(program_config, report_save_path=place, merged_model_save_path=model).run()
    (tmp_path / "x.json").mkdir()
    with pytest.raises(FusionBenchError, match=r"report_save_path: .* is a directory"):
        instantiate(program_config, report_save_path=place, overwrite=True).run()


def test_a_stream_of_the_users_own_is_refused(family: Path) -> None:
    import datasets

    from fusion_bench.taskpool.images.labelled import LabelledImages
    from fusion_bench.tasks import Task

    stream = datasets.load_dataset(str(family / "datasets" / "a"), split="test", streaming=True)
    with pytest.raises(FusionBenchError, match=r"test_datasets\.a: a stream can be neither"):
        LabelledImages("a", stream, Task())


def test_markup_in_a_path_stays_text(program_config: Config, tmp_path: Path) -> None:
    place = tmp_path / "[red]x[/blue]\x1b]8;;x\x07"
    config = {**program_config, "dry_run": True, "merged_model_save_path": str(place)}
    out = io.StringIO()
    with redirect_stdout(out):
        instantiate(config).run()
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
    assert "[red]x[/blue]\\x1b]8;;x\\x07" in "".join(out.getvalue().split())


def test_the_coefficients_of_other_models_are_found_before(
    program_config: Config, tmp_path: Path
) -> None:
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"models": ["a"], "keys": [], "coefficients": [[0.1]]}))
    config = changed(program_config, "method", {**ADAMERGING, "weights": str(file)})
    with pytest.raises(FusionBenchError, match="contains coefficients of other models"):
        instantiate({**config, "dry_run": True}).run()


def test_a_wrong_number_of_weights_is_told_beside_other_problems(program_config: Config) -> None:
    one = {"_target_": "fusion_bench.method.WeightedAverageAlgorithm", "weights": [1.0]}
    config = changed(program_config, "method", {**LINES, "base_method": one})
    del config["modelpool"]["models"]["_pretrained_"]
    expected = "method.base_method.weights: 1 value for 2 models (a, b). Give one for each."
    for key, value, told in (
        ("seed", -1, "seed: -1"),
        ("modelpool.models.b", "/no/such", "modelpool.models.b: There is no such directory"),
    ):
        with pytest.raises(FusionBenchError) as refused:
            instantiate({**changed(config, key, value), "dry_run": True}).run()
        first, second, third = str(refused.value).splitlines()
        assert first.startswith(told) and third == expected
        assert second.startswith("method: LiNeSAlgorithm needs the pretrained model.")


def test_a_task_pool_that_cannot_be_made_is_not_missing(program_config: Config) -> None:
    config = changed(program_config, "method", ADAMERGING)
    config = changed(config, "taskpool.max_samples", 0)
    with pytest.raises(FusionBenchError) as refused:
        instantiate({**config, "dry_run": True}).run()
    assert [problem.key for problem in refused.value.problems] == ["taskpool.max_samples"]
