"""Answers of a model to single requests, kept while they are computed: nothing is asked twice."""

import hashlib
import json
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from fusion_bench.storage import cache_dir, warn_not_kept

log = logging.getLogger(__name__)

#: Goes up when answers may change, so that older ones count no more.
ANSWERS_VERSION = 1
#: How many keys a query may hold.
_AT_ONCE = 500
_SEAL = 8


class RequestStore:
    """A file of answers by the hash of the request, for one model and one way to compute.

    A batch of answers is kept whole or not at all. Several processes may write to the file. A file
    that is damaged is begun anew.

    Args:
        computation: all that answers depend on besides the request.
    """

    def __init__(self, computation: Mapping[str, Any]):
        canonical = json.dumps({"version": ANSWERS_VERSION, **computation}, sort_keys=True)
        name = hashlib.sha256(canonical.encode()).hexdigest()
        self.path = cache_dir() / "requests" / name[:2] / f"{name}.sqlite"
        self._file: sqlite3.Connection | None = None

    def known(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the answers that are known, by key."""
        found: dict[bytes, bytes] = {}
        if not self.path.exists():
            return found

        def look(file: sqlite3.Connection) -> None:
            for i in range(0, len(keys), _AT_ONCE):
                part = list(keys[i : i + _AT_ONCE])
                marks = ",".join("?" * len(part))
                rows = file.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part)
                for key, sealed in rows:
                    seal, answer = sealed[:_SEAL], sealed[_SEAL:]
                    if seal == _seal(key, answer):
                        found[key] = answer

        self._use(look)
        return found

    def keep(self, answers: Mapping[bytes, bytes]) -> None:
        """Keep answers; a disk that cannot take them is no reason to stop."""
        rows = [(key, _seal(key, answer) + answer) for key, answer in answers.items()]

        def write(file: sqlite3.Connection) -> None:
            with file:
                file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

        self._use(write)

    def _use(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Use the file; what goes wrong with it is no reason to stop."""
        try:
            if self._file is None:
                self._file = self._open()
            work(self._file)
        except sqlite3.OperationalError as error:
            warn_not_kept(OSError(0, str(error)))
        except sqlite3.DatabaseError as error:
            log.warning("'%s' is damaged (%s) and begun anew.", self.path, error)
            if self._file is not None:
                self._file.close()
            self._file = None
            for path in self._files():
                path.unlink(missing_ok=True)
        except OSError as error:
            warn_not_kept(error)

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = sqlite3.connect(self.path, timeout=60)
        # Written answers outlive the process; after a power failure some are asked again. This
        # comes first: to change the mode else waits for the disk.
        file.execute("PRAGMA synchronous=OFF")
        file.execute("PRAGMA journal_mode=WAL")
        file.execute(
            "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer BLOB) WITHOUT ROWID"
        )
        return file

    def _files(self) -> list[Path]:
        return [self.path.with_name(self.path.name + end) for end in ("", "-wal", "-shm")]


def _seal(key: bytes, answer: bytes) -> bytes:
    return xxhash.xxh64_digest(key + answer)
