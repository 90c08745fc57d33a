"""The zoo's images: nothing that is tested on was trained on."""

import numpy as np
import pytest

from fusion_bench.zoo import CLASS_NAMES, SPLITS, TASKS
from fusion_bench.zoo.images import SIZE, Split, make

_cache: dict[str, dict[str, Split]] = {}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def splits(task: str) -> dict[str, Split]:
    if task not in _cache:
        _cache[task] = make(task)
    return _cache[task]


def test_shapes_and_types(task: str, splits: dict[str, Split]) -> None:
    assert tuple(splits) == SPLITS
    for split in splits.values():
        count = len(split.labels)
        assert split.images.shape == (count, SIZE, SIZE, 3)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert len(split.sources) == count


def test_every_class_has_its_share(task: str, splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        counts = np.bincount(split.labels, minlength=len(CLASS_NAMES[task]))
        assert len(counts) == len(CLASS_NAMES[task])
        if name == "train":  # small photographs yield fewer patches
            assert counts.min() >= 40
        else:
            assert counts.min() >= 0.85 * counts.max()
    assert len(splits["test"].labels) >= 200
    assert len(splits["validation"].labels) >= 75


def test_no_source_is_on_two_sides(task: str, splits: dict[str, Split]) -> None:
    sources = {name: set(split.sources) for name, split in splits.items()}
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not sources[one] & sources[other]


@pytest.mark.parametrize("task", ["textures", "photos"])
def test_no_pixel_of_a_photograph_is_on_two_sides(task: str, splits: dict[str, Split]) -> None:
    owner: dict[tuple[str, int, int], str] = {}
    for name, split in splits.items():
        for source in split.sources:
            photo, corner = source.rsplit(" ", 1)
            left, top = map(int, corner.split(","))
            for x in range(left, left + SIZE):
                for y in range(top, top + SIZE):
                    assert owner.setdefault((photo, x, y), name) == name


def test_no_image_is_on_two_sides(task: str, splits: dict[str, Split]) -> None:
    seen = {name: {image.tobytes() for image in split.images} for name, split in splits.items()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_the_turns_of_a_face_stay_together() -> None:
    splits = make("faces")
    for split in splits.values():
        faces = [source for source in split.sources if source.startswith("face ")]
        assert {faces.count(face) for face in faces} == {4}


def test_the_same_images_every_time(task: str, splits: dict[str, Split]) -> None:
    again = make(task)
    for name, split in splits.items():
        assert np.array_equal(split.images, again[name].images)
        assert np.array_equal(split.labels, again[name].labels)
        assert split.sources == again[name].sources
