"""Preprocessed images on disk, mapped into memory: each is decoded once for all runs."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from fusion_bench.storage import cache_dir, locked, warn_not_kept
from fusion_bench.taskpool.images.labelled import DatasetImages
from fusion_bench.taskpool.images.preprocess import Preprocessor

log = logging.getLogger(__name__)


class PixelStore:
    """Images of one shape as bytes, each beside its checksum.

    Several processes may read and fill it at once: what they write is the same. An image whose
    checksum does not fit is as good as none.

    Args:
        name: what identifies these images.
        count: how many there may be.
        shape: of each.
        max_bytes: what all stores together may take; those unused for longest make room.

    Raises:
        OSError: from ``open``, where there is no room or no right to write.
    """

    def __init__(self, name: str, count: int, shape: tuple[int, ...], max_bytes: int):
        self.shape = shape
        self._bytes = int(np.prod(shape))
        self._directory = _root() / hashlib.sha256(name.encode()).hexdigest()
        size = count * self._bytes
        with locked(_root() / "stores"):
            _make_room(size, max_bytes, keep=self._directory)
            self._directory.mkdir(parents=True, exist_ok=True)
            self._images = _opened(self._directory / "images", size)
            self._checksums = _opened(self._directory / "checksums", 8 * count)
            # While this is held nobody takes the store away.
            fcntl.flock(self._checksums, fcntl.LOCK_SH)
            os.utime(self._directory)
            weakref.finalize(self, _close, self._images, self._checksums)
        self._mapped = np.memmap(
            self._directory / "images", dtype=np.uint8, mode="r", shape=(count, *shape)
        )
        self._sums = np.memmap(
            self._directory / "checksums", dtype=np.uint64, mode="r", shape=(count,)
        )

    def get(self, index: int) -> NDArray[np.uint8] | None:
        """Return an image, not to be written to; ``None`` where it is not there whole."""
        expected = self._sums[index]
        if expected == 0:
            return None
        image = self._mapped[index]
        return image if _checksum(image) == expected else None

    def put(self, index: int, image: NDArray[np.uint8]) -> None:
        """Keep an image.

        Raises:
            OSError: a full disk, for one.
        """
        os.pwrite(self._images, image.data, index * self._bytes)
        os.pwrite(self._checksums, _checksum(image).tobytes(), 8 * index)

    def clear(self) -> None:
        """Forget all images."""
        os.pwrite(self._checksums, bytes(8 * len(self._sums)), 0)


class PreparedImages:
    """A dataset's images as a model takes them, but for the last step, ``preprocessor.finish``.

    Args:
        data: the images.
        preprocessor: what becomes of them.
        max_bytes: what all prepared images on disk may take together; 0 keeps none.
    """

    def __init__(self, data: DatasetImages, preprocessor: Preprocessor, max_bytes: int):
        self.data = data
        self.preprocessor = preprocessor
        self._store: PixelStore | None = None
        if max_bytes and preprocessor.in_bytes:
            self._store = self._opened(max_bytes)

    @property
    def identity(self) -> str:
        """What identifies these images."""
        source = [self.data.fingerprint, self.data.image_column, self.preprocessor.identity]
        return json.dumps(source)

    def pixels(self, index: int) -> NDArray[Any]:
        """Return a sample's pixels, not to be written to; called from several threads."""
        store = self._store  # another thread may give it up meanwhile
        kept = store.get(index) if store is not None else None
        if kept is not None:
            return kept
        pixels = self.preprocessor.pixels(self.data.image(index))
        if store is not None and pixels.shape == store.shape:
            try:
                store.put(index, pixels)
            except OSError as error:
                self._store = None
                warn_not_kept(error)
        return pixels

    def _opened(self, max_bytes: int) -> PixelStore | None:
        """Open the store, and make sure that it holds what the processor gives today."""
        first = self.preprocessor.pixels(self.data.image(0))
        try:
            store = PixelStore(self.identity, len(self.data), first.shape, max_bytes)
            kept = store.get(0)
            if kept is not None and not np.array_equal(kept, first):
                store.clear()
            store.put(0, first)
        except OSError as error:
            warn_not_kept(error)
            return None
        return store


def _close(*files: int) -> None:
    for file in files:
        os.close(file)


def _root() -> Path:
    return cache_dir() / "images"


def _checksum(image: NDArray[np.uint8]) -> np.uint64:
    return np.uint64(xxhash.xxh3_64_intdigest(image.data) or 1)  # 0 stands for no image


def _opened(path: Path, size: int) -> int:
    """Open a file of exactly ``size`` bytes; one of another size is begun anew."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if os.fstat(file).st_size != size:
        os.ftruncate(file, 0)
        os.ftruncate(file, size)
    return file


def _make_room(needed: int, max_bytes: int, keep: Path) -> None:
    """Remove the stores unused for longest until ``needed`` bytes more may be taken.

    One that is in use may still be filled, so it counts whole; and none is removed in vain.
    """
    stores = sorted(
        (store for store in _root().glob("*") if store.is_dir() and store != keep),
        key=lambda store: store.stat().st_mtime,
    )
    in_use = {store for store in stores if _in_use(store)}
    sizes = {store: _size(store) if store in in_use else _allocated(store) for store in stores}
    enough = needed + sum(sizes[store] for store in in_use) <= max_bytes
    for store in stores:
        if not enough or sum(sizes.values()) + needed <= max_bytes:
            break
        if store in in_use:
            continue
        shutil.rmtree(store, ignore_errors=True)
        sizes.pop(store)
        log.info("Preprocessed images in %s were removed to free space.", store)
    free = shutil.disk_usage(_root()).free + _allocated(keep)
    if not enough or needed > 0.9 * free:
        raise OSError(f"no room for {needed / 1e9:.1f} GB of preprocessed images")


def _size(store: Path) -> int:
    with suppress(OSError):
        return sum(file.stat().st_size for file in store.iterdir())
    return 0


def _allocated(store: Path) -> int:
    with suppress(OSError):
        return sum(file.stat().st_blocks * 512 for file in store.iterdir())
    return 0


def _in_use(store: Path) -> bool:
    """Return whether a running process uses the store."""
    try:
        file = os.open(store / "checksums", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
