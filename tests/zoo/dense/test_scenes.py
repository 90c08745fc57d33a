"""Scenes: the same ones each time, whose answers fit each other."""

import numpy as np
import pytest

from fusion_bench.zoo.dense import CLASSES
from fusion_bench.zoo.dense.scenes import Scenes, make
from fusion_bench.zoo.images import SIZE


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return make("test", 3)


def test_shapes_and_types(scenes: Scenes) -> None:
    count = 3 * (len(CLASSES) - 1)
    assert scenes.images.shape == (count, SIZE, SIZE, 3) and scenes.images.dtype == np.uint8
    assert scenes.segmentation.shape == scenes.depth.shape == (count, SIZE, SIZE)
    assert scenes.normals.shape == (count, 3, SIZE, SIZE)
    assert scenes.depth.dtype == scenes.normals.dtype == np.float32


def test_they_are_the_same_on_every_call(scenes: Scenes) -> None:
    again = make("test", 3)
    for name, own in vars(scenes).items():
        assert np.array_equal(own, getattr(again, name))


def test_splits_have_other_scenes(scenes: Scenes) -> None:
    seen = {image.tobytes() for image in make("train", 3).images}
    assert not seen & {image.tobytes() for image in scenes.images}


def test_each_scene_has_the_ground_and_one_shape(scenes: Scenes) -> None:
    found = [set(np.unique(mask)) for mask in scenes.segmentation]
    assert all(len(own) == 2 and 0 in own for own in found)
    kinds = sorted(max(own) for own in found)
    assert kinds == sorted([*range(1, len(CLASSES))] * 3)


def test_a_stone_lies_on_the_ground(scenes: Scenes) -> None:
    assert scenes.depth.min() > 1.4 and scenes.depth.max() < 3.1
    slope = scenes.depth[scenes.segmentation == 0]
    assert np.abs(slope - np.round(slope, 1)).max() < 0.1
    for mask, depth in zip(scenes.segmentation, scenes.depth, strict=True):
        rows = np.flatnonzero((mask > 0).any(axis=1) & (mask == 0).any(axis=1))
        row = rows[len(rows) // 2]
        assert depth[row][mask[row] > 0].min() < depth[row][mask[row] == 0].max() - 0.1


def test_directions_are_those_of_the_depth(scenes: Scenes) -> None:
    """Where the surface is smooth, slopes of the depth give them."""
    lengths = np.linalg.norm(scenes.normals, axis=1)
    assert lengths == pytest.approx(1, abs=1e-5)
    for depth, normals in zip(scenes.depth, scenes.normals, strict=True):
        down, right = np.gradient(-depth.astype(np.float64), 1.5 / SIZE)
        found = np.stack([-right, -down, np.ones_like(down)])
        cosine = (found / np.linalg.norm(found, axis=0) * normals).sum(axis=0)
        assert np.median(np.degrees(np.arccos(np.clip(cosine, -1, 1)))) < 3
