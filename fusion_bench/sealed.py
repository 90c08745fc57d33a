"""Files with a checksum, so that damage is noticed."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fusion_bench.storage import cache_dir, write_bytes


def write_sealed(path: Path, content: bytes) -> None:
    """Write a file that begins with the SHA-256 of the rest; it appears whole or not at all."""
    write_bytes(path, hashlib.sha256(content).digest() + content)


def read_sealed(path: Path) -> bytes | None:
    """Return what was written; ``None`` for no file, or a damaged one."""
    with suppress(OSError):
        sealed = path.read_bytes()
        seal, content = sealed[:32], sealed[32:]
        if hashlib.sha256(content).digest() == seal:
            return content
    return None


def remembered(part: str, about: object, make: Callable[[], str], *, keeps: bool = True) -> str:
    """Return a text that depends on nothing but ``about``; it is made once and kept in the cache.

    A cache that cannot be written to is no reason to stop: the text is made again.

    Args:
        part: the cache's folder.
        about: JSON data, arrays among them.
        make: returns the text. What it raises passes through, and nothing is kept.
        keeps: whether a new text is kept, which a run that leaves nothing does not want.
    """
    canonical = json.dumps(about, default=_plain)  # order may matter
    name = hashlib.sha256(canonical.encode()).hexdigest()
    path = cache_dir() / part / name[:2] / name
    if (known := read_sealed(path)) is not None:
        return known.decode()
    made = make()
    with suppress(OSError):
        if keeps:
            write_sealed(path, made.encode())
    return made


def _plain(array: Any) -> Any:
    return array.tolist()
