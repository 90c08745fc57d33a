"""A family of the zoo in the cache directory: whole or not at all, and built once.

What is told of a build stands here, for this file has no part in the names of what is built.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from fusion_bench.progress import kept, step
from fusion_bench.storage import locked, whole_directory

_log = logging.getLogger(__name__)

Advance = Callable[[str, int], None]
"""Called with what is being done, and how many samples were seen since the last call."""


def ensure(
    root: Path, what: str, takes: str, samples: int, build: Callable[[Path, Advance], None]
) -> Path:
    """Return ``root``; ``build`` it in an empty directory if it is not there.

    Processes that ask at the same time build it once. A terminal shows a bar; a log has a line
    before and one after, and others in between.

    Args:
        root: where the family is, or will be.
        what: is built, for messages.
        takes: how long, for messages.
        samples: that training sees.
        build: writes the family.
    """
    if root.is_dir():
        return root
    with locked(root):
        if root.is_dir():  # another process has built it while this one waited
            return root
        started = time.monotonic()
        _log.info("Building %s, once, in %s: takes %s.", what, root, takes)
        with (
            kept(lambda: "Of what was being built nothing is kept; the next run builds it."),
            whole_directory(root) as scratch,
            step(f"building {what}", samples, "samples") as work,
        ):

            def advance(phase: str, seen: int) -> None:
                work.detail = phase
                work.advance(seen)

            build(scratch, advance)
        _log.info("Built %s in %.0f s.", what, time.monotonic() - started)
    return root
