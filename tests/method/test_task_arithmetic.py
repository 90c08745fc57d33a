import pytest
import torch
from torch import Tensor, nn

from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from fusion_bench.problems import FusionBenchError


def layer(values: list[list[float]]) -> nn.Linear:
    result = nn.Linear(2, 2, bias=False)
    result.weight.data = torch.tensor(values)
    return result


def merged(scaling_factor: float) -> Tensor:
    pool = {
        "_pretrained_": layer([[0.0, 0.0], [0.0, 0.0]]),
        "a": layer([[1.0, 2.0], [3.0, -4.0]]),
        "b": layer([[-1.0, 4.0], [1.0, 2.0]]),
    }
    return TaskArithmeticAlgorithm(scaling_factor=scaling_factor).run(pool)["weight"]


def test_by_hand() -> None:
    torch.testing.assert_close(merged(0.3), torch.tensor([[0, 1.8], [1.2, -0.6]]))


def test_zero_gives_the_pretrained_model() -> None:
    assert merged(0.0).tolist() == [[0, 0], [0, 0]]


def test_one_over_the_number_of_models_gives_the_average() -> None:
    torch.manual_seed(0)
    pool = {name: nn.Linear(7, 5) for name in ("_pretrained_", "a", "b", "c", "d")}
    average = SimpleAverageAlgorithm().run(pool)
    arithmetic = TaskArithmeticAlgorithm(scaling_factor=1 / 4).run(pool)
    for key in average:
        torch.testing.assert_close(arithmetic[key], average[key])


def test_the_pretrained_model_is_needed() -> None:
    with pytest.raises(FusionBenchError, match="_pretrained_"):
        TaskArithmeticAlgorithm().run({"a": nn.Linear(1, 1)})


def test_progress_bar_and_inplace_by_position() -> None:
    method = TaskArithmeticAlgorithm(0.3, False, True)
    assert (method.scaling_factor, method.show_pbar, method.inplace) == (0.3, False, True)
