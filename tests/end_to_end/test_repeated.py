"""A run that was done before asks no model and imports none of the libraries that make one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_llm import write_llama

CONFIG = """
_target_: fusion_bench.programs.FabricModelFusionProgram
_recursive_: false
method: {_target_: fusion_bench.method.SimpleAverageAlgorithm}
modelpool:
  _target_: fusion_bench.modelpool.CausalLMPool
  models: {_pretrained_: base, sort: a, mood: b}
taskpool:
  _target_: fusion_bench.taskpool.TaskPool
  tasks:
    sort:
      _target_: fusion_bench.taskpool.GenerationTask
      max_new_tokens: 2
      dataset: {_target_: fusion_bench.zoo.language.load_dataset, name: sort, split: validation}
    mood:
      _target_: fusion_bench.taskpool.MultipleChoiceTask
      dataset: {_target_: fusion_bench.zoo.language.load_dataset, name: mood, split: validation}
"""
#: What only the first run needs.
LIBRARIES = [
    *("transformers", "tokenizers", "datasets", "pandas", "pyarrow", "matplotlib", "accelerate"),
    *("torch._dynamo", "lightning.pytorch", "torchmetrics", "scipy", "huggingface_hub", "sklearn"),
]
COMMAND = f"""
import sys
from pathlib import Path
sys.argv = ["fusion_bench", "run.yaml", "hydra.run.dir=" + sys.argv[1]]
from fusion_bench.scripts.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
Path("imported").write_text(" ".join(n for n in {LIBRARIES!r} if n in sys.modules))
"""


@pytest.mark.cold  # each run in a process that has imported nothing yet
def test_a_run_that_was_done_before_imports_no_library_of_models(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write_llama(tmp_path / name, seed=seed)
    (tmp_path / "run.yaml").write_text(CONFIG)
    env = {**os.environ, "FUSION_BENCH_CACHE": str(tmp_path / "cache")}
    found = {}
    for name in ("first", "second"):
        words = [sys.executable, "-c", COMMAND, name]
        done = subprocess.run(
            words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads((tmp_path / name / "report.json").read_text())
        del report["run"]["seconds"], report["run"]["created_at"], report["run"]["command"]
        pictures = (tmp_path / name / "report.html").read_text().count("<svg")
        imported = set((tmp_path / "imported").read_text().split())
        found[name] = (report, pictures, imported)
    first, second = found["first"], found["second"]
    assert first[:2] == second[:2] and first[1] > 1
    assert {"transformers", "datasets", "matplotlib"} <= first[2]
    assert second[2] == set()
