"""The real command line: merged language models, evaluated on own tasks of lm-eval."""

from pathlib import Path

import pytest
from commandline import fusion_bench
from fixtures_harness import byte_tokenizer, tiny_llama
from hub import client_environment, closed_endpoint
from pyarrow.parquet import read_schema

from fusion_bench.report import Report


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "choice", "rolling")):
        tiny_llama(seed).save_pretrained(root / name)  # type: ignore[operator]
        byte_tokenizer().save_pretrained(root / name)
    return root


def test_a_merge_and_its_report(tasks: Path, models: Path, tmp_path: Path) -> None:
    env = client_environment(closed_endpoint(), tmp_path / "hf")
    env["FUSION_BENCH_CACHE"] = str(tmp_path / "cache")
    done = fusion_bench(
        *("--config-name", "fabric_model_fusion", "taskpool=LMEvalHarnessTaskPool/_template"),
        *("modelpool=CausalLMPool/_template", "merged_model_save_path=merged"),
        *(f"+modelpool.models.{name}={models / name}" for name in ("choice", "rolling")),
        *("+modelpool.models._pretrained_=" + str(models / "base"), "method=task_arithmetic"),
        *("taskpool.tasks=[choice,rolling]", f"taskpool.include_path={tasks}"),
        *("+taskpool.save_predictions=true", "report_save_path=r.json"),
        *("fabric.accelerator=cpu", "baselines=all_tasks"),
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("outputs/*/*/predictions/merged/choice.parquet")
    assert {"document", "acc", "acc_norm", "prediction"} <= set(read_schema(file).names)
    report = Report.model_validate_json((tmp_path / "r.json").read_text())
    assert set(report.tasks) == {"choice", "rolling"}
