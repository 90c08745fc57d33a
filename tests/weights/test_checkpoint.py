import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_weights import FLOATS, OTHERS, all_bits, total, weights, written
from safetensors.torch import save_file
from torch import Tensor, nn

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import TensorWeights, merge, open_checkpoint


def model() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype).removeprefix("torch."): torch.rand(2, 3, generator=random).mul(90).to(dtype)
        for dtype in FLOATS + OTHERS
    }
    return tensors | {"scalar": torch.tensor(1.5), "none": torch.empty(0, 3), "ü": torch.ones(1)}


def to_safetensors(folder: Path) -> Path:
    save_file(model(), folder / "model.safetensors")
    return folder / "model.safetensors"


def to_sharded_safetensors(folder: Path) -> Path:
    written(TensorWeights(model()), folder / "sharded", max_shard_size=40)
    return folder / "sharded" / "model.safetensors.index.json"


def to_bin(folder: Path) -> Path:
    torch.save(model(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def to_old_bin(folder: Path) -> Path:
    path = folder / "old.bin"
    torch.save(model(), path, _use_new_zipfile_serialization=False)
    return path


def to_sharded_bin(folder: Path) -> Path:
    tensors = model()
    shards = {"1.bin": list(tensors)[:4], "2.bin": list(tensors)[4:]}
    for name, keys in shards.items():
        torch.save({key: tensors[key] for key in keys}, folder / name)
    return index(folder, {key: name for name, keys in shards.items() for key in keys})


def to_training_checkpoint(folder: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": model()}, folder / "last.ckpt")
    return folder / "last.ckpt"


def to_parameters(folder: Path) -> Path:
    tensors = {key: nn.Parameter(value, requires_grad=False) for key, value in model().items()}
    torch.save(tensors, folder / "model.pth")
    return folder / "model.pth"


def index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


FORMATS = [
    to_safetensors,
    to_sharded_safetensors,
    to_bin,
    to_old_bin,
    to_sharded_bin,
    to_training_checkpoint,
    to_parameters,
]


@pytest.mark.parametrize("write", FORMATS)
def test_all_formats_hold_the_same(write: Callable[[Path], Path], tmp_path: Path) -> None:
    opened, module = open_checkpoint(write(tmp_path)), TensorWeights(model())
    assert opened.keys() == module.keys()
    assert {key: opened.spec(key) for key in opened} == {key: module.spec(key) for key in module}
    assert all_bits(opened) == all_bits(module)
    assert opened.files and all(file.is_file() for file in opened.files)
    assert not any(tensor.requires_grad for tensor in opened.values())


def test_ties_in_a_pickle_are_kept(tmp_path: Path) -> None:
    shared = torch.ones(3)
    torch.save({"a": shared, "b": shared}, tmp_path / "model.bin")
    assert open_checkpoint(tmp_path / "model.bin").tied_to("b") == "a"


def test_a_file_is_mapped_and_never_written_to(tmp_path: Path) -> None:
    for path in (to_safetensors(tmp_path), to_bin(tmp_path)):
        before = path.read_bytes()
        open_checkpoint(path)["float32"].zero_()
        assert path.read_bytes() == before


def refusal(path: Path) -> str:
    with pytest.raises(FusionBenchError) as raised:
        open_checkpoint(path)
    assert str(path) in str(raised.value)
    return str(raised.value)


# --- damaged files


def test_what_is_not_there(tmp_path: Path) -> None:
    assert "There is no such" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize("write", [to_safetensors, to_bin, to_old_bin])
def test_a_truncated_file_is_damaged(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    for size in {0, 1, 7, 8, 9, 100, *range(0, len(content), 97), len(content) - 1}:
        path.write_bytes(content[:size])
        # A name that is cut off is one that is not let in.
        assert re.search("damaged|they are refused", refusal(path))


def test_a_flipped_bit_in_a_header_is_refused_or_a_difference(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    sound = TensorWeights(tensors)
    content = path.read_bytes()
    refused = 0
    for position in range(8 + int.from_bytes(content[:8], "little")):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                merge({"m": open_checkpoint(path)}, total, sound)
            except FusionBenchError:
                refused += 1
            else:
                opened = open_checkpoint(path)
                assert {key: opened.spec(key) for key in opened} == {
                    k: sound.spec(k) for k in sound
                }
    assert refused > 1000


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [to_bin, to_old_bin])
def test_a_flipped_byte_in_a_pickle_is_refused_or_read(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    for position in range(0, min(len(content), 1500), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            assert len(open_checkpoint(path))
        except FusionBenchError as error:
            assert str(path) in str(error)


class Caller:
    """Unpickling one runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(zipped: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "model.bin", tmp_path / "executed"
    content = {"a": torch.ones(1), "b": Caller(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "can run code; they are refused" in refusal(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(1)], "does not contain a state dict"),
        (torch.ones(1), "does not contain a state dict"),
        ({}, "does not contain a state dict"),
        ({"state_dict": {}}, "does not contain a state dict"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch' is not a tensor"),
        ({"model": {"a": torch.ones(1)}}, "'model' is not a tensor"),
        ({1: torch.ones(1)}, "'1' is not a tensor"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is not a plain dense tensor"),
        ({"a": torch.empty(2, device="meta")}, "'a' is not a plain dense tensor"),
    ],
)
def test_what_is_no_state_dict(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert said in refusal(tmp_path / "model.pt")


def test_nonsense_is_damaged(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.bin", "model.pt"):
        (tmp_path / name).write_bytes(b"nonsense" * 99)
        assert "damaged" in refusal(tmp_path / name)


# --- damaged indices


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = to_sharded_bin(tmp_path)
    (tmp_path / "2.bin").unlink()
    assert "names '2.bin', which is missing" in refusal(path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    path = to_sharded_bin(tmp_path)
    shard = tmp_path / "2.bin"
    shard.write_bytes(shard.read_bytes()[:-99])
    with pytest.raises(FusionBenchError, match=r"2\.bin.*damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "{there}/x.safetensors", "a/../../x.safetensors", "a/x.safetensors"),
        *("..", ".", "", "/", "x.safetensors/.."),
    ],
)
def test_a_shard_outside_of_the_directory_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "here" / "a").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "here" / "a"):
        save_file({"a": torch.ones(1)}, place / "x.safetensors")
    path = index(tmp_path / "here", {"a": name.format(there=tmp_path)})
    assert "which is outside its directory. It is refused." in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"3", b"null", b"{}", b"\xff\xfe\x00", b"[" * 10**5),
        *(b'{"weight_map": 3}', b'{"weight_map": ["a"]}', b'{"weight_map": {}}'),
        *(b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": null}}'),
    ],
    ids=range(13),
)
def test_what_is_no_index(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    assert "is not an index of shards" in refusal(path)


def test_an_index_lists_what_its_shards_hold(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.safetensors")
    message = refusal(index(tmp_path, {"a": "x.safetensors", "c": "x.safetensors"}))
    assert "'c' is not in 'x.safetensors'" in message
    assert "'b' is in 'x.safetensors' unlisted" in message


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    assert "which is missing" in refusal(index(tmp_path, {"a": "a\0b"}))


def test_ties_across_pickled_shards_are_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.save({name: torch.ones(3)}, tmp_path / f"{name}.bin")
    opened = open_checkpoint(index(tmp_path, {"a": "a.bin", "b": "b.bin"}))
    assert opened.tied_to("b") == "b"
    assert all_bits(opened) == all_bits(weights(a=torch.ones(3), b=torch.ones(3)))


@pytest.mark.parametrize("by", ["shard", "index"])
def test_a_shard_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path, by: str) -> None:
    (tmp_path / "here").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    path = index(tmp_path / "here", {"a": "x.safetensors"})
    (tmp_path / "here" / "x.safetensors").symlink_to(tmp_path / "x.safetensors")
    if by == "index":
        path = path.rename(tmp_path / path.name)
        (tmp_path / "here" / path.name).symlink_to(path)
        path = tmp_path / "here" / path.name
    with pytest.raises(FusionBenchError, match=r"x\.safetensors' is a link to"):
        open_checkpoint(path)


def test_an_index_of_a_size_that_none_has(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(2**33)
    assert "has 8192 MiB; no more than 128 MiB" in refusal(path)
