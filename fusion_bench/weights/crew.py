"""What is found out once for each key, by all threads that wait for it."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

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


class LastOne(Generic[T]):
    """What each thread found last, for several that ask for the same one after the other."""

    def __init__(self) -> None:
        self._last = threading.local()

    def get(self, about: Hashable, find: Callable[[], T]) -> T:
        """Return what is known about something, or else what ``find`` finds."""
        known: tuple[Hashable, T] | None = getattr(self._last, "known", None)
        if known is None or known[0] != about:
            self._last.known = known = about, find()
        return known[1]
