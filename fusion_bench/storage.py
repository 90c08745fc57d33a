"""Cache directories, atomic writes and locks."""

import ctypes
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EPERM, EROFS
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import platformdirs
from filelock import FileLock, Timeout

from fusion_bench.problems import ConfigError, EnvironmentProblem, Place

log = logging.getLogger(__name__)

_IN_USE = ".in-use"
#: Letters of a name, as it is written in a file's, which gets an ending, too.
_LONGEST_NAME = 200
#: So many lists and mappings may lie in each other.
_DEEPEST = 100
#: No config, index or tokenizer is longer, in bytes, or holds more values.
_LONGEST = 128 * 2**20
_MOST_VALUES = 5_000_000
#: What the system says of a disk that is full, fails or may not be written to.
DISK = (ENOSPC, EDQUOT, EFBIG, EIO, EROFS, EACCES, EPERM)


@contextmanager
def disk_failures() -> Iterator[None]:
    """Report a disk that is full, faulty or not writable in one line.

    Raises:
        EnvironmentProblem: that is so.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        place = f": '{error.filename}'" if error.filename else ""
        raise EnvironmentProblem(
            f"A disk error ended the run: {error.strerror}{place}. Free some space, or choose "
            "another path."
        ) from error


def cache_dir() -> Path:
    """Return the directory for everything kept between runs.

    It is ``FUSION_BENCH_CACHE`` if set, otherwise the platform's user cache directory. It is not
    created here.
    """
    override = os.environ.get("FUSION_BENCH_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("fusion_bench", appauthor=False))


def warn_not_kept(error: OSError) -> None:
    """Warn once for each reason that the cache is not writable; the run continues without it."""
    _warn_once(cache_dir(), error.strerror or str(error))


@cache
def _warn_once(directory: Path, reason: str) -> None:
    log.warning(
        "The cache '%s' is not writable: %s. The run continues without it.", directory, reason
    )


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically through a temporary file; create parent directories."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically through a temporary file; create parent directories.

    Several processes may write the same file, one after the other. The next writer takes over the
    temporary file of a killed writer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_file(path) as (aside, file):
        try:
            os.ftruncate(file, 0)
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def read_json(path: Path) -> Any:
    """Return the content of an untrusted JSON file.

    Raises:
        ConfigError: it is not JSON, too large, or nested too deeply.
    """
    text = read_plausible(path)
    try:
        content = json.loads(text.decode("utf-8"))
        level = [content]
        for _ in range(_DEEPEST):
            level = [
                child
                for value in level
                if isinstance(value, dict | list)
                for child in (value.values() if isinstance(value, dict) else value)
            ]
        if level:
            raise RecursionError
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"'{path}' is not valid JSON. Download it again.") from error
    return content


def read_plausible(path: Path) -> bytes:
    """Return the bytes of an untrusted JSON file, which need not be JSON.

    Raises:
        ConfigError: it is too large, or no regular file.
        OSError: it cannot be read.
    """
    refuse_huge(path)
    text = path.read_bytes()
    if sum(map(text.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise ConfigError(
            f"'{path}' has more than {_MOST_VALUES:,} values, which is implausible. Replace it by "
            "the correct file."
        )
    return text


def refuse_huge(path: Path) -> None:
    """Refuse a JSON file that is too large or not a regular file.

    Raises:
        ConfigError: it is.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        what = "a folder" if path.is_dir() else "not a regular file"
        raise ConfigError(f"'{path}' is {what}. Name a JSON file.")
    if state.st_size > _LONGEST:
        raise ConfigError(
            f"'{path}' has {state.st_size // 2**20} MiB; no more than {_LONGEST // 2**20} MiB of "
            "JSON are read. Put the right file in its place."
        )


@contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield a temporary file next to ``path``, opened exclusively for writing."""
    aside = path.with_name(f".{_shortened(path.name)}.part")
    while True:
        file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, aside):
                yield aside, file
                return
            # Whoever had it before has renamed it meanwhile.
        finally:
            os.close(file)


def check_file_name(name: str) -> None:
    """Refuse a name that cannot be a file name.

    Raises:
        ConfigError: it is such a name.
    """
    try:
        usable = name not in ("", ".", "..") and len(quote(name, safe="")) <= _LONGEST_NAME
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise ConfigError(
            f"'{name}' is not a valid file name, and files with this name may be written.",
            "Choose another name.",
        )


def _is_at(file: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _shortened(name: str) -> str:
    """Return a shortened name, so a suffix can be added."""
    if len(os.fsencode(name)) < 240:
        return name
    return hashlib.sha256(name.encode()).hexdigest()


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces ``path`` when the block succeeds.

    An existing directory is replaced in one step; if the block fails, it stays unchanged. After a
    kill at any moment, either the old or the complete new directory exists. The next writer removes
    the temporary directory of a killed writer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        with FileLock(scratch / _IN_USE):
            fresh = scratch / "new"
            fresh.mkdir()
            try:
                yield fresh
                for file in [*fresh.rglob("*"), fresh]:
                    _sync(file)
                _put_in_place(fresh, path)
                _sync(path.parent)
            finally:
                _empty(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    for scratch in path.parent.glob(f".{glob.escape(path.name)}-????????"):
        lock = scratch / _IN_USE
        # A lock that can be had belongs to nobody who lives.
        with suppress(Timeout, OSError):
            if lock.exists():
                with FileLock(lock, blocking=False):
                    _empty(scratch)
                    shutil.rmtree(scratch, ignore_errors=True)
            else:
                scratch.rmdir()  # killed before its lock was there, or after it was removed


def _empty(scratch: Path) -> None:
    """Remove everything except the lock, which marks a leftover."""
    for content in ("new", "old"):
        shutil.rmtree(scratch / content, ignore_errors=True)


def _put_in_place(fresh: Path, path: Path) -> None:
    """Rename ``fresh`` to ``path``; an existing directory is renamed to ``fresh``."""
    if path.exists() and not _exchange(fresh, path):
        # Where the system cannot exchange two names there is a moment without any.
        path.replace(fresh.with_name("old"))
    if fresh.exists() and not path.exists():
        fresh.replace(path)


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two directories atomically; return whether the system supports it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold an exclusive lock for ``path`` across processes; it is released when the process ends.

    Args:
        path: the locked path; the lock is a file next to it.
        timeout: seconds to wait, by default without limit.

    Raises:
        TimeoutError: the lock was not released in time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=timeout):
        yield


@contextmanager
def claimed(path: Path | None, key: Place, *, inside: bool = False) -> Iterator[None]:
    """Lock an output path against other runs; the lock of a killed run is released.

    The first process of a run holds the lock for all its processes.

    Args:
        path: the output path, if any; a hidden file next to it is the lock.
        key: the config key of the path.
        inside: the hidden file is in ``path``, a directory that is not replaced.

    Raises:
        EnvironmentProblem: another run holds it.
    """
    if path is None or not is_first_process():
        yield
        return
    note = _note(path, inside)
    made = [place for place in note.parents if not place.exists()]
    note.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(note, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            if not _lock(file, path, key):
                yield
                return
            if _is_at(file, note):
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
                try:
                    yield
                finally:
                    note.unlink(missing_ok=True)
                    # Processes that were forked meanwhile have the file, too.
                    fcntl.flock(file, fcntl.LOCK_UN)
                    with suppress(OSError):  # something was written there
                        for place in made:
                            place.rmdir()
                return
            # Whoever had it before has removed it meanwhile.
        finally:
            os.close(file)


def check_unclaimed(path: Path, key: Place, *, inside: bool = False) -> None:
    """Check that a path is not locked by another run, without a trace.

    Raises:
        EnvironmentProblem: another run holds it.
    """
    if not is_first_process():
        return
    with suppress(FileNotFoundError, NotADirectoryError):
        file = os.open(_note(path, inside), os.O_RDWR | os.O_NOFOLLOW)
        try:
            _lock(file, path, key)
        finally:
            os.close(file)


def is_first_process() -> bool:
    """Return whether this is the process of a run that writes files."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(rank, "0") in ("", "0") for rank in ranks)


def _note(path: Path, inside: bool) -> Path:
    return path / ".claimed" if inside else path.with_name(f".{_shortened(path.name)}.claimed")


def _lock(file: int, path: Path, key: Place) -> bool:
    """Lock a file; return whether the file system supports locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(file, 200, 0).decode(errors="replace") or "which has just started"
        raise EnvironmentProblem(
            f"'{path}' is in use by another run ({holder}).",
            "Wait until it has ended, or choose another path.",
            place=key,
        ) from error
    except OSError as error:
        log.warning(
            "'%s' cannot be locked (%s). Do not start another run that writes to it.",
            path,
            error.strerror,
        )
        return False
    return True


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256, cached until the file changes."""
    file = path.resolve()
    state = file.stat()
    identity = f"{file} {state.st_ino} {state.st_size} {state.st_mtime_ns}"
    known = cache_dir() / "file_sha256" / hashlib.sha256(identity.encode()).hexdigest()
    with suppress(OSError):
        return known.read_text(encoding="utf-8")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    with suppress(OSError):  # it is only to save time
        write_text(known, digest)
    return digest
