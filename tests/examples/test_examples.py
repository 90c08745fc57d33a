import importlib.util
from pathlib import Path

import numpy as np
import pytest
from commandline import REPOSITORY, python
from sklearn.metrics import balanced_accuracy_score

from fusion_bench.results import ACCURACY, SampleScores, stderr
from fusion_bench.results.statistics import resampled

OWN_METRIC = REPOSITORY / "examples" / "own_metric.py"
# what is no script is imported by name
SCRIPTS = sorted(set((REPOSITORY / "examples").glob("*.py")) - {OWN_METRIC})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_runs(script: Path) -> None:
    done = python(script.read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stderr
    assert "True" in done.stdout


def test_own_metric() -> None:
    spec = importlib.util.spec_from_file_location("own_metric", OWN_METRIC)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    metric = module.balanced_accuracy()
    random = np.random.default_rng(0)
    labels = np.minimum(random.integers(0, 9, 200), 4)
    predictions = np.where(random.random(200) < labels / 4, labels, random.integers(0, 5, 200))
    scores = SampleScores.classified(np.arange(200), labels, predictions).measured([metric])
    expected = balanced_accuracy_score(labels, predictions)
    assert scores.value(metric) == pytest.approx(expected, rel=1e-12)
    assert expected < scores.value(ACCURACY) - 0.05
    drawn = resampled(metric, [scores], random)[0]
    assert np.isfinite(drawn).all()
    assert stderr(metric, scores) == pytest.approx(drawn[1:].std(), rel=0.1)
