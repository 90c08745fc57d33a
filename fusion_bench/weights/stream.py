"""Reads weights piece by piece on all cores, into memory or a module."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from queue import Empty, SimpleQueue
from typing import Protocol

import torch
from torch import Tensor, nn

from fusion_bench.progress import step
from fusion_bench.threads import threads_each
from fusion_bench.weights.mapping import Cost, TensorSpec, Weights

#: Elements in a piece. In float32 it is a megabyte, about what a core's own cache holds.
PIECE = 2**18
#: Bytes of anonymous memory that entries which cannot be cut may take in all threads together.
ROOM = 2**29

#: What is done with elements of an entry, from ``start`` on: ``consume(key, start, values)``.
Consume = Callable[[str, int, Tensor], None]


class NotYet(Exception):  # noqa: N818
    """Something of the whole model is missing, which is known when all pieces were merged once.

    Args:
        find: finds it now, by another look.
    """

    def __init__(self, find: Callable[[], object]):
        super().__init__()
        self.find = find


class Pieces(Protocol):
    """Entries that can be taken piece by piece."""

    @property
    def in_pieces(self) -> bool:
        """Whether entries may be cut."""

    @property
    def show_progress(self) -> bool:
        """Whether to show a progress bar."""

    @property
    def files(self) -> object:
        """The files behind the entries; asking for them downloads them."""

    def __iter__(self) -> Iterator[str]: ...

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of an entry."""

    def tied_to(self, key: str) -> str:
        """Return the first key of the same entry."""

    def pieces(self, key: str, size: int) -> Iterator[tuple[int, int]]:
        """Yield where pieces of at most ``size`` elements start and stop."""

    def bytes_to_read(self, key: str) -> int:
        """Return the number of bytes to read for an entry."""

    def cost(self, key: str) -> Cost:
        """Return what reading an entry takes."""


def stream(weights: Weights, consume: Consume, piece: int = PIECE) -> None:
    """Hand every entry to ``consume(key, start, values)``, as ``visit`` does.

    Pieces that had better wait until all others are merged come last.

    Raises:
        FusionBenchError: what ``weights.verify`` has to say when everything was read.
    """
    _stream([(weights, consume)], piece)


def stream_together(parts: Sequence[tuple[Weights, Consume]], piece: int = PIECE) -> None:
    """Hand every entry of several weights to what each has beside it, as ``stream`` does.

    Weights whose entries are cut alike take turns: all read a piece before the next one is read. So
    the files that they are made of are read once, and what they have in common is in the cache.

    Raises:
        FusionBenchError: what ``weights.verify`` has to say.
    """
    alike: dict[object, list[tuple[Weights, Consume]]] = {}
    for weights, consume in parts:
        alike.setdefault(_form(weights, piece), []).append((weights, consume))
    for group in alike.values():
        _stream(group, piece)


def _form(weights: Weights, piece: int) -> object:
    """Return what is equal for weights whose entries have the same names and are cut alike."""
    cut = (
        (key, weights.tied_to(key), weights.spec(key).shape, next(weights.pieces(key, piece), None))
        for key in weights
    )
    return weights.in_pieces, *cut


def _stream(parts: Sequence[tuple[Weights, Consume]], piece: int) -> None:
    """Hand over the entries of weights that are cut alike."""
    waiting: SimpleQueue[tuple[str, int, int, list[tuple[Weights, Consume]]]] = SimpleQueue()

    def work(key: str, start: int, stop: int) -> None:
        missing = []
        for weights, consume in parts:
            values = weights.read_or_wait(key, start, stop)
            if values is None:
                missing.append((weights, consume))
            else:
                consume(key, start, values)
        if missing:
            waiting.put((key, start, stop, missing))

    def finish() -> None:
        with suppress(Empty):
            while not failures:
                key, start, stop, missing = waiting.get_nowait()
                for weights, consume in missing:
                    consume(key, start, weights.read(key, start, stop))

    first, _ = parts[0]
    failures: list[BaseException] = []
    visit(first, work, piece, "merging tensors", times=len(parts))
    if not waiting.empty():
        _in_threads(finish, failures, threads_for(first))
    if failures:
        raise failures[0]
    for weights, _ in parts:
        weights.verify()


def predicted_peak(weights: Weights) -> int:
    """Return the bytes of anonymous memory that ``stream`` takes at most, beside what there was."""
    return _most(weights) * threads_for(weights)


def threads_for(source: Pieces) -> int:
    """Return how many threads take entries; of those that cannot be cut, so many as have room."""
    every = torch.get_num_threads()
    return every if source.in_pieces else max(1, min(every, ROOM // max(1, _most(source))))


def _most(source: Pieces) -> int:
    return max((source.cost(key).peak_bytes for key in source), default=0)


def visit(
    source: Pieces,
    work: Callable[[str, int, int], None],
    piece: int,
    description: str,
    spread: Callable[[Callable[[], None]], None] | None = None,
    times: int = 1,
) -> None:
    """Call ``work(key, start, stop)`` for 1-d pieces of every entry, from several threads.

    Large pieces are taken in the order of the keys, small ones together; they may be worked on in
    any order. Tied entries come once, under their first key. Threads share nothing but the list of
    pieces, so that a busy core slows down its own work alone: operations that torch spreads over
    the cores wait for the slowest. Where entries cannot be cut, as many threads take them as there
    is room for, and in each torch's operations use their share of the cores. ``spread`` may choose
    other threads: it has some call what it is given, and returns when they are done. ``times``
    tells how many models ``work`` reads.
    """
    jobs = _jobs(source, piece)
    _ = source.files  # downloads what is not here yet
    nbytes = bytes_to_read(source) if source.show_progress else {}
    lock = threading.Lock()
    failures: list[BaseException] = []
    with step(description, times * sum(nbytes.values()), "B") if nbytes else nullcontext() as shown:

        def take_jobs() -> None:
            while not failures:
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                for key, start, stop in job:
                    work(key, start, stop)
                    if shown is not None:
                        share = (stop - start) / source.spec(key).numel
                        with lock:
                            shown.advance(times * nbytes[key] * share)

        if spread is not None:
            spread(lambda: _guarded(take_jobs, failures))
        else:
            _in_threads(take_jobs, failures, threads_for(source))
    if failures:
        raise failures[0]


def bytes_to_read(source: Pieces) -> dict[str, int]:
    """Return the number of bytes to read for each entry, those of tied ones under the first key."""
    return {key: source.bytes_to_read(key) for key in source if source.tied_to(key) == key}


def _jobs(source: Pieces, piece: int) -> Iterator[list[tuple[str, int, int]]]:
    """Yield the jobs of the threads: a piece, or several small ones.

    Two threads that both do small things wait for Python's lock more than they work.
    """
    small: list[tuple[str, int, int]] = []
    for key in source:
        if source.tied_to(key) != key:
            continue
        for start, stop in source.pieces(key, piece):
            if 8 * (stop - start) >= piece:
                yield [(key, start, stop)]
                continue
            small.append((key, start, stop))
            if sum(stop - start for _, start, stop in small) >= piece:
                yield small
                small = []
    yield small


def in_memory(weights: Weights) -> dict[str, Tensor]:
    """Return all entries as new tensors; tied entries share one tensor."""
    tensors = {
        key: torch.empty(spec.shape, dtype=spec.dtype)
        for key in weights
        if weights.tied_to(key) == key
        for spec in [weights.spec(key)]
    }
    flat = {key: tensor.view(-1) for key, tensor in tensors.items()}

    def store(key: str, start: int, values: Tensor) -> None:
        flat[key][start : start + len(values)].copy_(values)

    stream(weights, store)
    return {key: tensors[weights.tied_to(key)] for key in weights}


def into_module(weights: Weights, module: nn.Module) -> nn.Module:
    """Put the weights into ``module``, best built on the meta device, and return it.

    Nothing is copied into the module's own tensors; the new ones take their place.

    Raises:
        RuntimeError: from torch, where keys or shapes are not the module's.
    """
    module.load_state_dict(in_memory(weights), assign=True)
    return module


def _in_threads(work: Callable[[], None], failures: list[BaseException], count: int) -> None:
    """Run ``work`` in threads and wait; Ctrl-C stops them after the pieces at hand."""
    if count == 1:  # here, for in another thread torch would start a second set of its own
        with torch.no_grad():
            work()
        return
    with threads_each(torch.get_num_threads() // count):
        threads = [threading.Thread(target=_guarded, args=(work, failures)) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:
            failures.append(error)
            for thread in threads:
                thread.join()
            raise


@torch.no_grad()
def _guarded(work: Callable[[], None], failures: list[BaseException]) -> None:
    try:
        work()
    except BaseException as error:
        failures.append(error)
