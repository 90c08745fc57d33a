"""The metrics that a config chooses, and what is refused."""

import numpy as np
import pytest

from fusion_bench.problems import FusionBenchError
from fusion_bench.results import ACCURACY, LOSS, Metric
from fusion_bench.results.metrics import mean
from fusion_bench.taskpool.metrics import chosen_metrics

OWN = (ACCURACY, LOSS)


def test_the_order_is_the_configs() -> None:
    assert chosen_metrics(None, OWN) == OWN
    assert chosen_metrics(["loss", "accuracy"], OWN) == (LOSS, ACCURACY)
    mine = Metric("mine", "", True, value=mean, measure=lambda details: np.ones((1, 2)))
    assert chosen_metrics([mine, "loss"], OWN) == (mine, LOSS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("accuracy", "'accuracy' is not a list. Write it like '[accuracy]'."),
        ([], "'[]' is not a list"),
        (["acuracy"], "[0]: 'acuracy' is not measured by this task. Did you mean 'accuracy'?"),
        (["loss", "loss"], "[1]: 'loss' is listed twice."),
        (["spearman"], "[0]: 'spearman' is not measured by this task."),
        (["loss", "mean_iou"], "[1]: 'mean_iou' is not measured by this task."),
        (["os.system"], "[0]: 'os.system' may not be called from a config"),
    ],
)
def test_what_cannot_be_is_refused_by_its_place(names: list[str], message: str) -> None:
    with pytest.raises(FusionBenchError) as caught:
        chosen_metrics(names, OWN)
    assert str(caught.value).startswith(message)
