"""How many threads torch and numpy use, where the number affects the result or the speed."""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from fusion_bench.problems import ConfigError

_SMALL = 2**21  # elements
_FEW = 2  # more of them slow small models down; the embedded models' figures are those of two
_SEVERAL = 8
_CPU = torch.device("cpu")
_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5
_TASKS = Path("/proc/self/task")  # a folder for each thread of this process, named by its id


@contextmanager
def fixed_threads(elements: int, device: torch.device = _CPU) -> Iterator[None]:
    """Compute with a number of threads that depends on the size of the model, not the machine.

    Torch splits sums among its threads, and each split rounds differently. Training amplifies these
    differences. So all training on a CPU uses this context. The caller's number is restored
    afterwards.

    Args:
        elements: of the model that is trained.
        device: where it is trained; on any but a CPU nothing is changed.

    Raises:
        ConfigError: the environment keeps torch from having so many threads.
    """
    if device.type != "cpu":
        yield
        return
    count = _FEW if elements <= _SMALL else _SEVERAL
    _refuse_fewer(count)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with _kept_apart(count) if count == _FEW else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _kept_apart(count: int) -> Iterator[None]:
    """Give each of torch's threads cores of its own, where there are enough of them.

    On a busy machine Linux moves a thread to the core of the one that woke it. There they take
    turns at waiting for each other, and training a small model takes three times as long.
    """
    if sys.platform != "linux" or len(cores := sorted(os.sched_getaffinity(0))) < count:
        yield
        return
    end_threads()
    others = {*_TASKS.iterdir()}
    torch.ones(2**20).add_(1)  # large enough for all threads, which are begun here
    begun = sorted(int(task.name) for task in {*_TASKS.iterdir()} - others)
    for number, task in enumerate([0, *begun]):  # 0 is this thread
        _use(task, cores[number % count :: count])
    try:
        yield
    finally:
        for folder in {*_TASKS.iterdir()} - others:  # some may have been begun in here
            _use(int(folder.name), cores)
        _use(0, cores)


def _use(task: int, cores: Iterable[int]) -> None:
    """Let a thread run on these cores alone, if it is still there and the system allows it."""
    with suppress(OSError):
        os.sched_setaffinity(task, cores)


@contextmanager
def suited_threads(elements: int, device: torch.device = _CPU) -> Iterator[None]:
    """Compute with one thread where a model is too small for several, which wait for each other.

    Args:
        elements: of the model.
        device: where it computes; on any but a CPU nothing is changed.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or elements > _SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def threads_each(count: int) -> Iterator[None]:
    """Let operations of torch and numpy use so many threads, in threads that are begun inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count, "blas"):
            yield
    finally:
        torch.set_num_threads(before)


def end_threads() -> None:
    """End torch's threads, so this process can be forked.

    GNU's OpenMP keeps them for the next computation. A forked child does not have these threads and
    would wait for them forever. Both processes start new ones when needed.
    """
    with suppress(AttributeError):  # another OpenMP, which sees to it by itself
        ctypes.CDLL(None).omp_pause_resource_all(_PAUSE_HARD)


def _refuse_fewer(count: int) -> None:
    """Refuse environment variables that override ``torch.set_num_threads``."""
    limit = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    above = {
        "OMP_THREAD_LIMIT": limit.isdecimal() and 0 < int(limit) < count,
        "OMP_DYNAMIC": os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true",
        "OMP_MAX_ACTIVE_LEVELS": os.environ.get("OMP_MAX_ACTIVE_LEVELS", "").strip() == "0",
    }
    for name, refused in above.items():
        if refused:
            raise ConfigError(
                f"{name}={os.environ[name]}: prevents torch from using {count} threads, so a "
                f"trained model would differ between machines. Unset {name}."
            )
