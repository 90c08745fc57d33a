import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessorPil

from fusion_bench.storage import cache_dir
from fusion_bench.taskpool.images.labelled import LabelledImages
from fusion_bench.taskpool.images.pixels import PixelStore, PreparedImages
from fusion_bench.taskpool.images.preprocess import Preprocessor
from fusion_bench.tasks import Task

SHAPE = (3, 8, 8)
SIZE = 3 * 8 * 8
CAP = 10**9
PROCESSOR = CLIPImageProcessorPil(
    size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_convert_rgb=True
)
fork = multiprocessing.get_context("fork")


class Counted(LabelledImages):
    """A dataset that counts what is decoded."""

    decoded = 0

    def image(self, index: int) -> Any:
        self.decoded += 1
        return super().image(index)


def images(count: int = 5, seed: int = 0, task: Task | None = None) -> Counted:
    random = np.random.default_rng(seed)
    pictures = [
        Image.fromarray(random.integers(0, 256, (12, 9 + i, 3), np.uint8)) for i in range(count)
    ]
    features = Features(
        {"image": ImageFeature(), "other": ImageFeature(), "label": ClassLabel(names=["x"])}
    )
    columns = {"image": pictures, "other": pictures[::-1], "label": [0] * count}
    return Counted("t", Dataset.from_dict(columns, features=features), task or Task())


def prepared(data: Counted | None = None, max_bytes: int = CAP, **settings: Any) -> PreparedImages:
    processor = CLIPImageProcessorPil(**(PROCESSOR.to_dict() | settings))
    return PreparedImages(data or images(), Preprocessor(processor), max_bytes)


def content(found: PreparedImages) -> list[Any]:
    return [found.pixels(i).tolist() for i in range(len(found.data))]


def expected(data: Counted | None = None) -> list[Any]:
    return content(prepared(data, max_bytes=0))


def stores() -> set[Path]:
    return {path for path in (cache_dir() / "images").glob("*") if path.is_dir()}


def the_store() -> Path:
    (store,) = stores()
    return store


def flip(file: Path, place: int) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[place] ^= 1
    file.write_bytes(damaged)


def picture(number: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, SHAPE, np.uint8)


def fill(name: str, count: int) -> None:
    store = PixelStore(name, count, SHAPE, CAP)
    for index in range(count):
        store.put(index, picture(index))


def test_what_is_put_is_got() -> None:
    store = PixelStore("a", 3, SHAPE, CAP)
    assert store.get(1) is None
    store.put(1, picture(1))
    for found in (store.get(1), PixelStore("a", 3, SHAPE, CAP).get(1)):
        assert found is not None and np.array_equal(found, picture(1))
    assert store.get(0) is None and store.get(2) is None


def test_a_black_image_is_an_image() -> None:
    store = PixelStore("a", 1, SHAPE, CAP)
    store.put(0, np.zeros(SHAPE, np.uint8))
    assert store.get(0) is not None


def test_what_is_got_cannot_be_written_to() -> None:
    store = PixelStore("a", 1, SHAPE, CAP)
    store.put(0, picture(0))
    found = store.get(0)
    assert found is not None and not found.flags.writeable


def test_each_image_is_decoded_once_ever() -> None:
    first = images()
    assert content(prepared(first)) == expected()
    assert first.decoded == 5
    second = images()
    assert content(prepared(second)) == expected()
    assert second.decoded == 1  # to see whether the processor still does the same


def test_without_room_for_any_nothing_is_kept() -> None:
    content(prepared(max_bytes=0))
    assert stores() == set()


@pytest.mark.parametrize("index", [1, 4])
def test_a_damaged_image_is_prepared_again(index: int) -> None:
    content(prepared())
    flip(the_store() / "images", index * SIZE + 7)
    data = images()
    assert content(prepared(data)) == expected()
    assert data.decoded == 2
    again = images()
    assert content(prepared(again)) == expected()
    assert again.decoded == 1


def test_a_damaged_checksum_costs_its_image_alone() -> None:
    content(prepared())
    flip(the_store() / "checksums", 8 * 3)
    data = images()
    assert content(prepared(data)) == expected()
    assert data.decoded == 2


@pytest.mark.parametrize("file", ["images", "checksums"])
@pytest.mark.parametrize("size", [0, 5, None])
def test_a_file_of_another_size_is_not_trusted(file: str, size: int | None) -> None:
    content(prepared())
    path = the_store() / file
    path.write_bytes(b"x" * 9999 if size is None else path.read_bytes()[:size])
    data = images()
    assert content(prepared(data)) == expected()
    assert data.decoded == 5
    assert path.stat().st_size == {"images": 5 * SIZE, "checksums": 5 * 8}[file]


@pytest.mark.parametrize(
    "change",
    [
        lambda: prepared(resample=2),
        lambda: prepared(images(seed=1)),
        lambda: prepared(images(count=4)),
        lambda: prepared(images(task=Task(image_column="other"))),
    ],
)
def test_other_images_have_a_store_of_their_own(change: Callable[[], PreparedImages]) -> None:
    content(prepared())
    other = change()
    assert len(stores()) == 2
    assert content(other) == content(PreparedImages(other.data, other.preprocessor, 0))


def test_a_processor_that_changed_in_silence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    content(prepared())
    identity = prepared().identity
    preprocess = Preprocessor.pixels
    monkeypatch.setattr(Preprocessor, "pixels", lambda *args: 255 - preprocess(*args))
    data = images()
    changed = prepared(data)
    assert changed.identity == identity and len(stores()) == 1
    assert content(changed) == (255 - np.array(expected_before(preprocess))).tolist()
    assert data.decoded == 5


def expected_before(preprocess: Any) -> list[Any]:
    data = images()
    return [preprocess(Preprocessor(PROCESSOR), data.image(i)).tolist() for i in range(len(data))]


def test_images_of_another_shape_are_not_kept() -> None:
    class Sized:
        """A processor that leaves sizes as they are."""

        do_convert_rgb = True

        def __call__(self, image: Any, return_tensors: str, **options: bool) -> Any:
            return {"pixel_values": np.asarray(image).transpose(2, 0, 1)[None]}

    data = images(2)
    found = PreparedImages(data, Preprocessor(Sized()), CAP)
    assert [found.pixels(i).shape for i in (0, 1)] == [(3, 12, 9), (3, 12, 10)]
    assert found.pixels(1).tolist() == np.asarray(data.image(1)).transpose(2, 0, 1).tolist()


@pytest.mark.processes
def test_two_processes_may_fill_a_store_at_once() -> None:
    count = 200
    workers = [fork.Process(target=fill, args=("a", count)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    store = PixelStore("a", count, SHAPE, CAP)
    for index in range(count):
        found = store.get(index)
        assert found is not None and np.array_equal(found, picture(index))


def test_several_threads_may_prepare_at_once() -> None:
    data = images(40)
    found = prepared(data)
    with ThreadPoolExecutor(8) as pool:
        several = list(pool.map(found.pixels, list(range(40)) * 3))
    assert [pixels.tolist() for pixels in several] == expected(images(40)) * 3


@pytest.mark.processes
def test_a_writer_that_was_killed_leaves_a_usable_store() -> None:
    count = 20_000
    worker = fork.Process(target=fill, args=("a", count))
    worker.start()
    store = PixelStore("a", count, SHAPE, CAP)
    while store.get(50) is None:
        time.sleep(0.001)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    found = [store.get(i) for i in range(count)]
    there = [i for i, image in enumerate(found) if image is not None]
    assert 50 < len(there) < count
    assert all(np.array_equal(found[i], picture(i)) for i in there[-100:])  # type: ignore[arg-type]
    store.put(count - 1, picture(1))
    assert store.get(count - 1) is not None


def made(name: str, age: float) -> Path:
    """Return a full store that was last used so many seconds ago."""
    before = stores()
    fill(name, 50)
    (store,) = stores() - before
    os.utime(store, (time.time() - age,) * 2)
    return store


def taken(store: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in store.iterdir())


def test_the_stores_unused_for_longest_make_room() -> None:
    new, old, middle = made("new", 10), made("old", 30), made("middle", 20)
    cap = 2 * taken(new) + 50 * SIZE
    PixelStore("another", 50, SHAPE, cap)
    assert stores() >= {new, middle} and old not in stores()


def test_using_a_store_makes_it_new() -> None:
    one, two = made("one", 30), made("two", 20)
    PixelStore("one", 50, SHAPE, CAP)
    PixelStore("another", 50, SHAPE, taken(one) + 50 * SIZE)
    assert one in stores() and two not in stores()


def test_a_store_does_not_make_room_for_itself() -> None:
    store = made("a", 30)
    found = PixelStore("a", 50, SHAPE, 50 * SIZE)
    assert found.get(49) is not None
    assert stores() == {store}


def hold(name: str, ready: Any) -> None:
    store = PixelStore(name, 50, SHAPE, CAP)
    ready.set()
    time.sleep(60)
    store.get(0)


@pytest.mark.processes
def test_a_store_in_use_by_a_living_process_stays() -> None:
    used, idle = made("used", 30), made("idle", 20)
    ready = fork.Event()
    worker = fork.Process(target=hold, args=("used", ready))
    worker.start()
    assert ready.wait(30)
    os.utime(used, (1, 1))
    cap = taken(used) + 50 * SIZE
    PixelStore("another", 50, SHAPE, cap)
    assert used in stores() and idle not in stores()
    with pytest.raises(OSError, match="no room"):
        PixelStore("third", 50, SHAPE, 50 * SIZE)
    worker.kill()
    worker.join()
    PixelStore("third", 50, SHAPE, 50 * SIZE)
    assert used not in stores()


def test_an_empty_store_in_use_counts_as_if_it_were_full() -> None:
    held = PixelStore("held", 50, SHAPE, CAP)
    with pytest.raises(OSError, match="no room"):
        PixelStore("another", 50, SHAPE, 80 * SIZE)
    assert held.get(0) is None


def test_nothing_is_removed_for_what_can_have_no_room() -> None:
    old = made("old", 30)
    with pytest.raises(OSError, match="no room"):
        PixelStore("huge", 500, SHAPE, 100 * SIZE)
    assert stores() == {old}


def test_a_store_that_cannot_be_had_costs_time_only(caplog: pytest.LogCaptureFixture) -> None:
    assert content(prepared(max_bytes=100)) == expected()
    assert "no room" in caplog.text


def test_a_place_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "file"))
    assert content(prepared()) == expected()
    assert caplog.text.count("continues without") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_rights_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path))
    assert content(prepared()) == expected()
    assert "continues without" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Mount a disk of a megabyte as the cache."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(options, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("no right to mount")
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(disk))
    yield disk
    gc.collect()  # which closes the store's files
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_too_small_costs_time_only(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = {"size": {"shortest_edge": 512}, "crop_size": {"height": 512, "width": 512}}
    assert prepared(**large).pixels(4).shape == (3, 512, 512)
    assert "no room" in caplog.text


def test_a_disk_that_fills_up_costs_time_only(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    found = prepared(images(100))
    with (small_disk / "junk").open("wb", buffering=0) as junk, pytest.raises(OSError):
        while True:
            junk.write(bytes(4096))
    with ThreadPoolExecutor(8) as pool:
        several = list(pool.map(found.pixels, range(100)))
    assert [pixels.tolist() for pixels in several] == expected(images(100))
    assert "continues without" in caplog.text


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_files_are_closed_with_the_store() -> None:
    made("a", 0)
    before = open_files()
    store = PixelStore("a", 50, SHAPE, CAP)
    store.get(0)
    assert open_files() > before
    del store
    assert open_files() == before
