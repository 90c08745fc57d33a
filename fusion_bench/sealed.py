"""Files with a checksum, so that damage is noticed."""

import hashlib
from contextlib import suppress
from pathlib import Path

from fusion_bench.storage import write_bytes


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
