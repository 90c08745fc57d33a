"""What a model scored on a task, kept by content: nothing is evaluated twice."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.numpy import load, save

from fusion_bench.results.scores import SampleScores
from fusion_bench.sealed import read_sealed, write_sealed
from fusion_bench.storage import cache_dir, locked, warn_not_kept

log = logging.getLogger(__name__)

#: Goes up when the evaluation's figures may change, so that older results count no more.
EVALUATION_VERSION = 1


class ResultStore:
    """Scores on disk, under the hash of all that they depend on.

    Those of versions that knew image classification alone lie in a directory of their own, where
    such versions still find them.
    """

    def __init__(self) -> None:
        self._root = cache_dir() / "scores"
        self._earlier = cache_dir() / "results"

    def load(self, key: Mapping[str, Any]) -> SampleScores | None:
        """Return what is known under ``key``; a damaged file counts as nothing."""
        name = _name(key)
        with suppress(LookupError, TypeError, ValueError):  # of a version that kept something else
            if (content := read_sealed(self._root / name)) is not None:
                arrays = load(content)
                return SampleScores.from_arrays({tuple(k.split("/")): v for k, v in arrays.items()})
            if (content := read_sealed(self._earlier / name)) is not None:
                return SampleScores.classified(**load(content))
        return None

    def save(self, key: Mapping[str, Any], scores: SampleScores) -> None:
        """Keep scores; a disk that cannot take them is no reason to stop."""
        content = save({"/".join(name): array for name, array in scores.arrays().items()})
        try:
            write_sealed(self._root / _name(key), content)
        except OSError as error:
            warn_not_kept(error)

    @contextmanager
    def alone(self, key: Mapping[str, Any], timeout: float) -> Iterator[bool]:
        """Keep other processes from evaluating what this one is about to; yield whether it may.

        Where there is no lock to be had, on a disk that cannot be written to for one, or not in
        time, the same is evaluated twice: a waste, but no harm.

        Args:
            key: of the result.
            timeout: seconds to wait for another process that evaluates it, negative for as long as
                that lives. With 0 there is no waiting, and it yields false.
        """
        lock = locked(cache_dir() / "evaluating" / _name(key).name[:3], timeout)
        with ExitStack() as held:
            try:
                held.enter_context(lock)
            except TimeoutError:
                if timeout == 0:
                    yield False
                    return
            except (OSError, NotImplementedError) as error:
                log.debug("Evaluating without a lock: %s", error)
            yield True


def _name(key: Mapping[str, Any]) -> Path:
    canonical = json.dumps({"version": EVALUATION_VERSION, **key}, sort_keys=True)
    name = hashlib.sha256(canonical.encode()).hexdigest()
    return Path(name[:2], name)
