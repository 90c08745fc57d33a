"""What is found out once for each key, by all threads that wait for it."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Crew:
    """Threads that need the same thing: one finds it, and the others help it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._work: Callable[[], None] | None = None
        self._helping = 0
        self._is_done = False

    def spread(self, work: Callable[[], None]) -> None:
        """Do ``work`` together with those who wait; it returns where nothing is left to begin."""
        with self._changed:
            self._work = work
            self._changed.notify_all()
        try:
            work()
        finally:
            with self._changed:
                self._work = None
                self._changed.wait_for(lambda: self._helping == 0)

    def help(self) -> None:
        """Take part in what is spread until all is done."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_done or self._work is not None)
                if self._work is None:
                    return
                work = self._work
                self._helping += 1
            try:
                work()
            finally:
                with self._changed:
                    if self._work is work:  # it has nothing left
                        self._work = None
                    self._helping -= 1
                    self._changed.notify_all()

    def done(self) -> None:
        """Let the others go."""
        with self._changed:
            self._is_done = True
            self._changed.notify_all()


class PerKey(Generic[T]):
    """A function of a key that is computed once for each, when it is first called.

    Args:
        find: computes it; what it spreads over the crew is shared by the threads that ask for the
            same key meanwhile.
    """

    def __init__(self, find: Callable[[str, Crew], T]):
        self._find = find
        self._lock = threading.Lock()
        self._crews: dict[str, Crew] = {}
        self._found: dict[str, T] = {}

    def __call__(self, key: str) -> T:
        """Return what was found for a key."""
        with self._lock:
            crew, mine = self._crews.get(key), False
            if crew is None:
                crew, mine = self._crews.setdefault(key, Crew()), True
        if not mine:
            crew.help()
            return self._found[key] if key in self._found else self(key)
        try:
            found = self._found[key] = self._find(key, crew)
        except BaseException:
            with self._lock:
                del self._crews[key]  # the others try by themselves
            raise
        finally:
            crew.done()
        return found


class LastPiece:
    """A function of a piece of an entry; each thread remembers the last result.

    Several that need the same of a piece, one after the other, get the same tensor: none may write
    to it.

    Args:
        compute: the function, of an entry's key, the piece's start, the models' tensors and the
            pretrained model's.
    """

    def __init__(self, compute: Callable[[str, int, Sequence[Tensor], Tensor | None], Tensor]):
        self._compute = compute
        self._last = threading.local()

    def __call__(
        self, key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
    ) -> Tensor:
        """Return what the function gives for a piece."""
        piece = key, start, (tensors[0] if base is None else base).shape
        known: tuple[Any, Tensor] | None = getattr(self._last, "found", None)
        if known is None or known[0] != piece:
            self._last.found = known = piece, self._compute(key, start, tensors, base)
        return known[1]
