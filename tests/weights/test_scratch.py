import errno
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from fusion_bench.problems import EnvironmentProblem
from fusion_bench.weights.scratch import Scratch, on_disk


def test_what_is_put_aside_comes_back() -> None:
    scratch = Scratch()
    tensors = {
        "a": torch.randn(3, 5),
        ("b", 1): torch.randn(2, 4).double().T,
        "c": torch.ones(7, dtype=torch.bfloat16),
        "empty": torch.zeros(4, 0),
        "scalar": torch.tensor(2.0),
    }
    for key, tensor in tensors.items():
        scratch.put(key, tensor)
    for key, tensor in tensors.items():
        found = scratch.get(key)
        assert found.equal(tensor) and found.dtype == tensor.dtype
    with pytest.raises(KeyError):
        scratch.get("d")


def test_it_outlives_its_owner_where_it_is_in_use() -> None:
    scratch = Scratch()
    scratch.put("a", torch.arange(5000.0))
    found = scratch.get("a")
    del scratch
    assert found.sum() == 4999 * 2500


def test_threads_do_not_disturb_each_other() -> None:
    scratch = Scratch()

    def work(number: int) -> None:
        for i in range(20):
            scratch.put((number, i), torch.full((1000 + i,), float(number)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        for i in range(20):
            assert scratch.get((number, i)).tolist() == [number] * (1000 + i)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch()
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(scratch, "_file", full)
        with pytest.raises(EnvironmentProblem, match=r"No space left.*Set TMPDIR"):
            scratch.put("a", torch.ones(3))


def test_a_vector_in_a_file() -> None:
    vector = on_disk((3000,), torch.float64)
    assert vector.shape == (3000,) and vector.dtype == torch.float64 and not vector.any()
    vector[5:] = 2
    assert vector.sum() == 2 * 2995
    assert on_disk((4, 0), torch.float32).shape == (4, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the system reserves no room")
def test_a_disk_without_room_for_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(EnvironmentProblem, match=r"No space left.*Set TMPDIR"):
        on_disk((10,), torch.float32)
