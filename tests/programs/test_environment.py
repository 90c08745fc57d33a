"""What becomes of a run where the machine fails it."""

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import ConfigError, EnvironmentProblem, FusionBenchError
from fusion_bench.programs.environment import launch, make_fabric
from fusion_bench.report import Report
from fusion_bench.threads import fixed_threads


def refuse_the_config(fabric: Fabric) -> None:
    if fabric.global_rank == 1:
        raise ConfigError("method.scaling_factor: 'much' is no number.")
    fabric.barrier()


def run_out_of_memory(fabric: Fabric) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has …")


def fill_the_disk(fabric: Fabric) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/data/file")


def be_killed(fabric: Fabric) -> None:
    if fabric.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fabric.barrier()


def err(fabric: Fabric) -> None:
    raise ZeroDivisionError


FAILURES: list[tuple[Callable[[Fabric], None], type[FusionBenchError], str]] = [
    (run_out_of_memory, EnvironmentProblem, "^Out of memory: CUDA out of memory. Choose"),
    (
        fill_the_disk,
        EnvironmentProblem,
        "^A disk error ended the run: No space left on device: '/data/file'",
    ),
]


@pytest.mark.parametrize(("work", "kind", "message"), FAILURES)
def test_failures_of_the_machine(
    work: Callable[[Fabric], None], kind: type[FusionBenchError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        launch(make_fabric({"accelerator": "cpu"}), work)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("work", "kind", "message"),
    [
        *FAILURES,
        (refuse_the_config, ConfigError, r"^method\.scaling_factor: 'much' is no number\.$"),
        (be_killed, EnvironmentProblem, r"process 1 was ended from outside \(SIGKILL\)"),
    ],
)
def test_failures_in_one_of_two_processes(
    work: Callable[[Fabric], None], kind: type[FusionBenchError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        launch(make_fabric({"accelerator": "cpu", "devices": 2}), work)


def tell_much(fabric: Fabric) -> bytes:
    fabric.barrier()
    return bytes(1_000_000)


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_a_result_may_be_larger_than_a_pipe() -> None:
    found = launch(make_fabric({"accelerator": "cpu", "devices": 2}), tell_much)
    assert len(found) == 1_000_000


def compute(fabric: Fabric) -> float:
    with fixed_threads(1_000):
        return float(torch.ones(1_000, 1_000).sum())


@pytest.mark.timeout(60)
def test_processes_compute_where_their_parent_did() -> None:
    """OpenMP's threads do not follow into a fork, which would wait for them."""
    fabric = {"accelerator": "cpu", "devices": 1}
    for devices in (1, 2, 2):
        found = launch(make_fabric(fabric | {"devices": devices}), compute)
        assert found == 1_000_000


def test_other_errors_are_not_disguised() -> None:
    with pytest.raises(ZeroDivisionError):
        launch(make_fabric({"accelerator": "cpu"}), err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^fabric\.accelerator: .*CUDA"):
        make_fabric({"accelerator": "cuda"})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("precision", "foo", "bf16-mixed"),
        ("strategy", "foo", "ddp_spawn"),
        ("num_nodes", 0, "positive integer"),
        ("devices", 0, "Set fabric.accelerator=auto and fabric.devices=1"),
    ],
)
def test_the_key_that_fabric_refuses(key: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^fabric\.{key}: .*{said}") as caught:
        make_fabric({"accelerator": "cpu", key: value})
    assert ("fabric.devices=1" in str(caught.value)) == (key == "devices")


def test_the_report_tells_that_memory_ran_out(
    program_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = instantiate(program_config).run()
    classify = torch.nn.functional.normalize

    def full(tensor: Any, **options: Any) -> Any:
        if tensor.dim() == 2 and len(tensor) > 5 and torch.is_inference_mode_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return classify(tensor, **options)

    monkeypatch.setattr("fusion_bench.zero_shot.normalize", full)
    program_config["taskpool"]["cache"] = False
    report = instantiate(program_config).run()
    assert isinstance(report, Report)
    assert report.run.notes == ["Memory ran out: 5 samples were evaluated at a time."]
    for name, model in report.models.items():
        for task, result in model.tasks.items():
            assert result.main.value == whole.models[name].tasks[task].main.value
