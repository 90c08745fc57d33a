"""Scenes with a class, a depth and a direction for each pixel: the zoo's shapes, given a height.

A drawn shape becomes a rounded stone that lies on a slope, lit from one side.
"""

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusion_bench.zoo.dense import CLASSES
from fusion_bench.zoo.images import SIZE, _shape

_FINE = 4 * SIZE  # pixels of a drawing's side
_EDGE = 14.0  # pixels of a drawing over which a stone's edge is round
_NEAR, _FAR = 2.0, 3.0  # metres to the bottom and to the top of the slope
_HEIGHT = 0.5  # metres of a stone
_PIXEL = 1.5 / _FINE  # metres that a pixel of a drawing is wide
_LIGHT = np.array([-0.55, -0.45, 0.7])  # right, down, towards the camera
_LIGHT /= np.linalg.norm(_LIGHT)


@dataclass(frozen=True)
class Scenes:
    """Scenes of one split.

    Attributes:
        images: uint8 of shape (n, SIZE, SIZE, 3).
        segmentation: indices into ``CLASSES``, uint8 of shape (n, SIZE, SIZE).
        depth: metres, float32 of shape (n, SIZE, SIZE).
        normals: right, down and towards the camera, float32 of shape (n, 3, SIZE, SIZE).
    """

    images: NDArray[np.uint8]
    segmentation: NDArray[np.uint8]
    depth: NDArray[np.float32]
    normals: NDArray[np.float32]


def make(split: str, count: int) -> Scenes:
    """Return ``count`` scenes of each shape for a split; the same ones on every call."""
    rng = np.random.default_rng(zlib.crc32(f"scenes/{split}".encode()))
    kinds = np.repeat(np.arange(1, len(CLASSES)), count)
    drawn = [_scene(int(kind), rng) for kind in rng.permutation(kinds)]
    images, segmentation, depth, normals = (np.stack(part) for part in zip(*drawn, strict=True))
    return Scenes(images, segmentation, depth, normals)


def _scene(kind: int, rng: np.random.Generator) -> tuple[NDArray[np.generic], ...]:
    from scipy.ndimage import distance_transform_edt

    shape = np.asarray(_shape(CLASSES[kind], rng)) > 127
    inside = np.minimum(distance_transform_edt(shape) / _EDGE, 1)
    height = _HEIGHT * np.sqrt(1 - (1 - inside) ** 2)
    slope = np.linspace(_FAR, _NEAR, _FINE)[:, None]
    depth = slope - height
    down, right = np.gradient(-depth, _PIXEL)
    directions = np.stack([-right, -down, np.ones_like(depth)])
    normals = _shrunk(directions / np.linalg.norm(directions, axis=0))
    normals /= np.linalg.norm(normals, axis=0)
    covered = _shrunk(shape[None].astype(np.float64))[0]
    ground, stone = rng.uniform(40, 120, size=3), rng.uniform(140, 255, size=3)
    color = ground[:, None, None] + (stone - ground)[:, None, None] * covered
    lit = 0.35 + 0.65 * np.maximum(np.tensordot(_LIGHT, normals, 1), 0)
    pixels = color * lit + rng.normal(0, 4, size=(1, SIZE, SIZE))
    return (
        np.moveaxis(pixels, 0, -1).clip(0, 255).astype(np.uint8),
        np.where(covered > 0.5, kind, 0).astype(np.uint8),
        _shrunk(depth[None])[0].astype(np.float32),
        normals.astype(np.float32),
    )


def _shrunk(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the means of squares of pixels, so that the last two sides become ``SIZE``."""
    parts = values.reshape(len(values), SIZE, _FINE // SIZE, SIZE, _FINE // SIZE)
    return parts.mean(axis=(2, 4))
