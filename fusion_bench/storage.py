"""Where files are kept, and how they appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock


def cache_dir() -> Path:
    """Return the directory for everything kept between runs.

    ``FUSION_BENCH_CACHE`` where set, else the platform's user cache directory. Not created here.
    """
    override = os.environ.get("FUSION_BENCH_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("fusion_bench", appauthor=False))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file aside, then rename it into place; parent directories are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        aside = Path(file.name)
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            aside.chmod(0o644)  # a temporary file is private to its owner
            aside.replace(path)
        except BaseException:
            aside.unlink()
            raise


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``path`` that takes its place when the block succeeds.

    A directory that was there before is replaced; when the block fails, it stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        fresh = scratch / "new"
        fresh.mkdir()
        yield fresh
        if path.exists():
            path.replace(scratch / "old")
        fresh.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of the whole directory ``path`` left; call it holding the lock."""
    for scratch in path.parent.glob(f".{path.name}-*"):
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock named after ``path`` across processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield
