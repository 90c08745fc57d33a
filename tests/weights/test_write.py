import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from commandline import python
from drawn import examples
from fixtures_weights import FLOATS, OTHERS, all_bits, families, first, weights, written
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fusion_bench.problems import FusionBenchError
from fusion_bench.storage import whole_directory
from fusion_bench.weights import TensorWeights, merge, write_checkpoint


def header(file: Path) -> dict[str, dict[str, object]]:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    return json.loads(content[8 : 8 + size])


@given(families(), st.sampled_from([1, 30, 200, "1KB", "5GB"]))
@settings(max_examples=examples(40), deadline=None)
def test_what_was_written_is_read_again(
    family: dict[str, dict[str, Tensor]], max_shard_size: int | str
) -> None:
    tensors = family["x"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        opened = written(TensorWeights(tensors), out, max_shard_size=max_shard_size)
        assert all_bits(opened) == all_bits(tensors)
        by_library: dict[str, Tensor] = {}
        for file in out.glob("*.safetensors"):
            by_library |= load_file(file)
        assert all_bits(by_library) == all_bits(tensors)


def test_all_types_are_aligned_and_known_to_the_library(tmp_path: Path) -> None:
    others = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.complex64]
    tensors = {
        str(i): torch.ones(3).to(dtype) for i, dtype in enumerate([*OTHERS, *FLOATS, *others])
    }
    written(TensorWeights(tensors), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    assert all_bits(load_file(file)) == all_bits(tensors)
    for key, entry in header(file).items():
        if key != "__metadata__":
            assert entry["data_offsets"][0] % tensors[key].dtype.itemsize == 0  # type: ignore[index]


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    written(weights(a=1.0), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_shards_are_no_larger_than_asked_and_listed(tmp_path: Path) -> None:
    tensors = weights(**{name: torch.rand(10) for name in "abcde"}, large=torch.rand(99))
    written(tensors, tmp_path / "out", max_shard_size=85)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": (5 * 10 + 99) * 4}
    shards: dict[str, list[str]] = {}
    for key, name in index["weight_map"].items():
        shards.setdefault(name, []).append(key)
    assert sorted(shards.values()) == [["a", "b"], ["c", "d"], ["e"], ["large"]]
    for number, (name, keys) in enumerate(sorted(shards.items()), start=1):
        assert name == f"model-{number:05}-of-00004.safetensors"
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            assert sorted(file.keys()) == keys
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("max_shard_size", [40, "5GB"])
def test_the_metadata_is_in_each_file(max_shard_size: int | str, tmp_path: Path) -> None:
    tensors = weights(a=torch.rand(10), b=torch.rand(10))
    seen = []

    def finish() -> dict[str, str]:
        seen.append(1)
        return {"digest": "ü12"}

    options = {"metadata": {"digest": "0" * 10, "by": "me"}, "finish": finish}
    written(tensors, tmp_path / "out", max_shard_size=max_shard_size, **options)
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "digest": "ü12", "by": "me"}
    assert seen == [1]


def test_finish_is_asked_when_all_is_written(tmp_path: Path) -> None:
    computed: list[str] = []

    def method(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        computed.append(key)
        return tensors[0]

    def finish() -> dict[str, str]:
        return {"keys": " ".join(computed)}

    merged = merge({"m": weights(a=1.0, b=2.0)}, method)
    out = tmp_path / "out"
    written(merged, out, metadata={"keys": "---"}, finish=finish)
    assert header(out / "model.safetensors")["__metadata__"]["keys"] == "a b"


def test_longer_final_metadata_is_a_programs_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than the reserved space"):
        written(
            weights(a=1.0), tmp_path / "out", metadata={"a": ""}, finish=lambda: {"a": "x" * 99}
        )


@pytest.mark.parametrize(
    "size", ["5XB", "", "GB", "many", "-1GB", "0MB", 0, -5, "nanGB", None, [1]]
)
def test_an_impossible_size_is_a_plain_error(size: object, tmp_path: Path) -> None:
    with pytest.raises(FusionBenchError, match=r"max_shard_size: .* is not a size"):
        write_checkpoint(weights(a=1.0), tmp_path, max_shard_size=size)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_tied_entries_are_written_once(tmp_path: Path) -> None:
    shared = torch.rand(2)
    opened = written(TensorWeights({"b": shared, "a": shared}), tmp_path / "out")
    assert list(opened) == ["b"]


def test_no_entries_make_a_sound_file(tmp_path: Path) -> None:
    assert len(written(weights(), tmp_path / "out")) == 0


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(FusionBenchError, match="File exists"):
        write_checkpoint(weights(a=1.0), tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def test_a_directory_that_is_not_there_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(FusionBenchError, match=f"Cannot write '{tmp_path}/no'"):
        write_checkpoint(weights(a=1.0), tmp_path / "no")


def test_what_is_wrong_with_the_weights_is_said(tmp_path: Path) -> None:
    with pytest.raises(FusionBenchError, match="NaN, infinity or overflow"):
        write_checkpoint(merge({"m": weights(a=torch.nan)}, first), tmp_path)


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FusionBenchError):
        write_checkpoint(merge({"m": weights(a=torch.nan)}, first), tmp_path)
    written(weights(a=1.0, b=2.0), tmp_path / "out", max_shard_size=1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_type_that_safetensors_do_not_know_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(FusionBenchError, match="'a' has the type complex128"):
        write_checkpoint(weights(a=torch.ones(1, dtype=torch.complex128)), tmp_path)


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A place of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("max_shard_size", ["5GB", "300KB"])
def test_a_full_disk_is_said_before_any_work(max_shard_size: str, small_disk: Path) -> None:
    calls = []

    def method(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        calls.append(key)
        return tensors[0]

    merged = merge({"m": weights(**{name: torch.ones(2**16) for name in "abcdefgh"})}, method)
    out = small_disk / "out"
    with pytest.raises(FusionBenchError) as raised, whole_directory(out) as fresh:
        write_checkpoint(merged, fresh, max_shard_size=max_shard_size)
    assert str(small_disk) in str(raised.value)
    assert "the disk is full. The model takes 0.00 GB" in str(raised.value)
    assert not list(small_disk.iterdir()) and not calls


def test_a_full_disk_leaves_the_old_directory(small_disk: Path) -> None:
    out = small_disk / "out"
    for size, fits in ((2**10, True), (2**20, False)):
        try:
            with whole_directory(out) as fresh:
                write_checkpoint(weights(a=torch.ones(size)), fresh)
        except FusionBenchError:
            assert not fits
    assert load_file(out / "model.safetensors")["a"].shape == (2**10,)
    assert list(small_disk.iterdir()) == [out]


def test_a_disk_that_fills_up_on_the_way_is_said_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FusionBenchError, match="the disk is full"):
        write_checkpoint(weights(a=1.0), tmp_path)


def test_a_write_may_be_cut_short_by_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:5], offset))
    tensors = {"a": torch.rand(40)}
    assert all_bits(written(TensorWeights(tensors), tmp_path / "out")) == all_bits(tensors)


def test_a_file_system_that_cannot_reserve_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int, offset: int, size: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    tensors = {"a": torch.rand(40), "b": torch.ones(3, dtype=torch.int8)}
    assert all_bits(written(TensorWeights(tensors), tmp_path / "out")) == all_bits(tensors)


# --- memory

MERGE = """
import sys, threading, time
from pathlib import Path
import torch
from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.weights import merge, open_checkpoint, write_checkpoint

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.005):
        most[0] = max(most[0], resident())

torch.ones(3).add_(1)
models = {str(i): open_checkpoint(Path(sys.argv[1])) for i in range(6)}
before = resident()
done, most = threading.Event(), [before]
thread = threading.Thread(target=watch)
thread.start()
method = SimpleAverageAlgorithm().merge_tensor
write_checkpoint(merge(models, method, elementwise=True), Path(sys.argv[2]))
done.set()
thread.join()
print(most[0] - before)
"""


def test_no_more_than_some_pieces_are_held_in_memory(tmp_path: Path) -> None:
    written(TensorWeights({"a": torch.rand(10 * 2**20)}), tmp_path / "in")  # 40 MB
    (tmp_path / "out").mkdir()
    arguments = [str(tmp_path / "in" / "model.safetensors"), str(tmp_path / "out")]
    process = python(MERGE, *arguments)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 30 * 1024
