"""Merged models that are computed one after the other, each while the one before is evaluated."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Self

import torch

from fusion_bench.method.contract import Product
from fusion_bench.programs.fusing import in_memory_product
from fusion_bench.progress import step


class OneAhead(Mapping[str, Product]):
    """Merged models by name, which are in memory from when they are asked for.

    Whoever asks for one has the next computed meanwhile, in a thread. None is kept here.

    Args:
        merged: the models, whose weights are computed when they are read.
    """

    def __init__(self, merged: Mapping[str, Product]):
        self._merged = dict(merged)
        self._names = list(merged)
        self._next: dict[str, Future[Product]] = {}
        self._threads = torch.get_num_threads()  # the evaluation of small models uses fewer
        self._ended = ExitStack()

    def __enter__(self) -> Self:
        self._pool = self._ended.enter_context(ThreadPoolExecutor(1, "fuse"))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._ended.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged)

    def __len__(self) -> int:
        return len(self._merged)

    def __getitem__(self, name: str) -> Product:
        begun = self._next.pop(name, None) or self._begin(name)
        found = begun.result()
        if (number := self._names.index(name) + 1) < len(self._names):
            self._next = {self._names[number]: self._begin(self._names[number])}
        return found

    def _begin(self, name: str) -> "Future[Product]":
        return self._pool.submit(self._computed, name)

    def _computed(self, name: str) -> Product:
        torch.set_num_threads(self._threads)
        with step("", shown=False):  # the terminal is the evaluation's
            return in_memory_product(self._merged[name])
