"""Heads that map features of patches to pixels, and their files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fusion_bench.patch_head import CONFIG, WEIGHTS, PatchHead
from fusion_bench.problems import ConfigError


def test_each_patch_becomes_its_square_of_pixels() -> None:
    head = PatchHead(hidden_size=4, channels=2, scale=3)
    features = torch.randn(5, 4, 2, 3)
    found = head(features)
    assert found.shape == (5, 2, 6, 9)
    alone = head(features[:1, :, 1:, 2:])
    assert torch.allclose(found[:1, :, 3:, 6:], alone, atol=1e-6)


def test_it_computes_in_float32_whatever_the_encoder_does() -> None:
    head, features = PatchHead(4, 1, 2), torch.randn(1, 4, 2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(features)
    assert found.dtype == torch.float32
    assert torch.equal(found, head(features.float()))


def test_it_is_read_as_it_was_saved(tmp_path: Path) -> None:
    head = PatchHead(4, 2, 3)
    head.save(tmp_path)
    read = PatchHead.read(tmp_path)
    assert read.config == head.config == {"hidden_size": 4, "channels": 2, "scale": 3}
    features = torch.randn(1, 4, 2, 2)
    assert torch.equal(read(features), head(features))
    assert not read.training


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": 4, "channels": 2}, "'scale' is None"),
        ({"hidden_size": 4, "channels": 0, "scale": 3}, "'channels' is 0"),
        ({"hidden_size": True, "channels": 2, "scale": 3}, "'hidden_size' is True"),
        ({"hidden_size": 2**40, "channels": 2, "scale": 3}, "'hidden_size'"),
        ([4, 2, 3], "'hidden_size' is None"),
        ({"hidden_size": 4, "channels": 2, "scale": 4}, "does not hold its weights"),
        ({"hidden_size": 2**19, "channels": 2**19, "scale": 2**19}, "does not hold its weights"),
    ],
)
def test_a_config_that_cannot_be_is_told(tmp_path: Path, config: object, words: str) -> None:
    PatchHead(4, 2, 3).save(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        PatchHead.read(tmp_path)


def test_damaged_or_foreign_weights_are_told(tmp_path: Path) -> None:
    PatchHead(4, 2, 3).save(tmp_path)
    for spoil in (
        lambda file: file.write_bytes(file.read_bytes()[:-3]),
        lambda file: save_file({"other": torch.ones(2)}, file),
    ):
        spoil(tmp_path / WEIGHTS)
        with pytest.raises(ConfigError, match="does not hold its weights"):
            PatchHead.read(tmp_path)
