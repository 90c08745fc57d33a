"""What is trained comes out the same for any number of threads."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_contract import kind, method, nodes
from fixtures_tuning import CPU, Images
from torch import Tensor, nn

from fusion_bench.method.checks import BASE, TrainablePool, assert_same, entries, threads
from fusion_bench.problems import ConfigError
from fusion_bench.threads import fixed_threads

SMALL, LARGE = 1_000_000, 86_000_000
COUNTS = (1, 2, 3, 8)

LEARNING = [name for name in nodes() if kind(name) == "data"]
#: What is enough to see the threads in the result, were their number not fixed.
OPTIONS: dict[str, dict[str, Any]] = {
    "adamerging": {"max_steps": 4, "batch_size": 256},
    "fisher_merging": {"num_fisher_examples": 4},
    "model_soup/learned": {"max_steps": 4, "batch_size": 256},
}


class Net(nn.Module):
    """Wide enough for torch to split its sums among threads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(48, 512), nn.Linear(512, 6)])
        random = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            values = torch.randn(parameter.shape, generator=random)
            parameter.data = values / parameter.shape[-1] ** 0.5

    def forward(self, values: Tensor) -> Tensor:
        for layer in self.layers:
            values = layer(values).tanh()
        return 3 * values


class Watched(Images):
    """Images that see how many threads there are when they are learned from."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        images = torch.randn(256, 48, generator=random)
        super().__init__(images, torch.randint(0, 6, (256,), generator=random), self._classify)
        self.seen: set[int] = set()

    def _classify(self, module: nn.Module) -> nn.Module:
        self.seen.add(torch.get_num_threads())
        return module

    def batches(self, samples: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().batches(samples, batch_size):
            self.seen.add(torch.get_num_threads())
            yield batch


@pytest.mark.parametrize("name", LEARNING)
def test_what_is_learned_does_not_depend_on_the_threads(name: str) -> None:
    models = {BASE: Net(0), "a": Net(1), "b": Net(2)}
    options = next((own for key, own in OPTIONS.items() if name.startswith(key)), {})
    found = []
    for count in COUNTS:
        data = {model: Watched(ord(model)) for model in "ab"}
        with threads(count):
            found.append(entries(method(name, **options).run(TrainablePool(models), CPU, data)))
            assert torch.get_num_threads() == count
        assert {seen for images in data.values() for seen in images.seen} == {2}
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("solver", ["adam", "lstsq"])
def test_what_is_fitted_does_not_depend_on_the_threads(solver: str) -> None:
    models = {BASE: Net(0), "a": Net(1), "b": Net(2)}
    found = []
    for count in COUNTS:
        with threads(count):
            found.append(entries(method("wudi/wudi", iter_num=20, solver=solver).run(models)))
    for other in found[1:]:
        assert_same(other, found[0])


def test_on_another_device_nothing_is_changed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    with threads(3), fixed_threads(LARGE, torch.device("cuda")):
        assert torch.get_num_threads() == 3


@pytest.mark.parametrize("mine", COUNTS)
def test_the_size_of_the_work_decides_and_not_the_caller(mine: int) -> None:
    with threads(mine):
        counts = []
        for elements in (SMALL, LARGE):
            with fixed_threads(elements):
                counts.append(torch.get_num_threads())
        assert counts == [2, 8]
        with pytest.raises(ZeroDivisionError), fixed_threads(SMALL):
            raise ZeroDivisionError
        assert torch.get_num_threads() == mine


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OMP_THREAD_LIMIT", "1"),
        ("OMP_DYNAMIC", "true"),
        ("OMP_DYNAMIC", " TRUE "),
        ("OMP_MAX_ACTIVE_LEVELS", "0"),
    ],
)
def test_an_environment_that_allows_fewer_threads_is_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    before = torch.get_num_threads()
    expected = f"^{variable}={value}: .* Unset {variable}\\.$"
    with pytest.raises(ConfigError, match=expected), fixed_threads(SMALL):
        pass
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OMP_THREAD_LIMIT", "2"),
        ("OMP_THREAD_LIMIT", "many"),  # the library itself complains of it, and goes on
        ("OMP_DYNAMIC", "false"),
        ("OMP_MAX_ACTIVE_LEVELS", "1"),
        ("OMP_NUM_THREADS", "1"),
        ("MKL_NUM_THREADS", "1"),
    ],
)
def test_an_environment_that_allows_enough_is_not(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with fixed_threads(SMALL):
        assert torch.get_num_threads() == 2


def test_a_limit_below_what_large_models_need_is_refused_for_them_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_THREAD_LIMIT", "4")
    with fixed_threads(SMALL):
        pass
    with pytest.raises(ConfigError, match="using 8 threads"), fixed_threads(LARGE):
        pass
    assert os.environ["OMP_THREAD_LIMIT"] == "4"


def test_the_threads_of_small_models_have_cores_of_their_own() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is one core")

    def cores() -> dict[int, set[int]]:
        tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        return {task: os.sched_getaffinity(task) for task in tasks}

    with fixed_threads(SMALL):
        found = cores()
        mine = found[threading.get_native_id()]
        others = [own for own in found.values() if own.isdisjoint(mine)]
        assert mine < allowed and others == [allowed - mine]
        done = threading.Event()
        begun = threading.Thread(target=done.wait)
        begun.start()
    assert os.sched_getaffinity(begun.native_id or 0) == allowed
    done.set()
    begun.join()
    assert all(own == allowed for own in cores().values())
    with fixed_threads(LARGE):
        assert os.sched_getaffinity(0) == allowed
