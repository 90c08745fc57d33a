"""Our settings for mergekit's methods, against a reference in float64.

The reference is written from what those configurations mean, tensor by tensor.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fusion_bench.method import (
    DareTaskArithmetic,
    DareTiesMerging,
    DellaMerging,
    KarcherMeanAlgorithm,
    ModelBreadcrumbs,
    ModelStock,
    MultiSlerpAlgorithm,
    NuSlerpAlgorithm,
    SCEAlgorithm,
    SlerpMergeAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    WeightedAverageAlgorithm,
)
from fusion_bench.method.checks import Pool
from fusion_bench.weights import TensorWeights, Weights, in_memory
from fusion_bench.weights.draws import bernoulli, uniform

Array = NDArray[np.float64]
SHAPES = {"matrix": (13, 17), "norm": (29,), "small": (3,)}
NAMES = ("a", "b", "c")
WEIGHTS = ([1.0, 1.0, 1.0], [0.7, 0.25, 0.4], [0.9, -0.35, 0.6])
DENSITIES = ([0.5, 0.5, 0.5], [0.3, 0.62, 1.0])


def drawn(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {key: torch.randn(*shape, generator=random) for key, shape in SHAPES.items()}


MODELS: dict[str, Weights] = {
    name: TensorWeights(drawn(seed)) for seed, name in enumerate(("_pretrained_", *NAMES))
}
TUNED = {name: MODELS[name] for name in NAMES}


def array(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def deltas(key: str) -> tuple[Array, list[Array]]:
    base = array(MODELS["_pretrained_"][key])
    # The difference of two float32 numbers is rounded once, as it is where models are merged.
    found = [array(TUNED[name][key] - MODELS["_pretrained_"][key]) for name in NAMES]
    return base, found


def named(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(NAMES, values, strict=True))


def merged(
    base: Array,
    parts: Sequence[Array],
    weights: Sequence[float],
    scale: float,
    elects: bool,
    normalize: bool,
) -> Array:
    """Merge sparse deltas: R = sum of mask W, divided where it is normalized."""
    weighted = [w * part for w, part in zip(weights, parts, strict=True)]
    if not elects:
        total = sum(weights)
        divisor: Any = total if normalize and abs(total) >= 1e-8 else 1.0
        return base + scale * sum(weighted) / divisor
    sign = np.where(sum(weighted) >= 0, 1.0, -1.0)
    masks = [np.sign(one) == sign for one in weighted]
    result = sum(mask * one for mask, one in zip(masks, weighted, strict=True))
    if normalize:
        divisor = sum(mask * w for mask, w in zip(masks, weights, strict=True))
        result = result / np.where(divisor == 0, 1, divisor)
    return base + scale * result


def largest(delta: Array, density: float) -> Array:
    """Keep the floor(d n) largest by magnitude, at least 1."""
    if density >= 1:
        return delta
    order = np.argsort(-np.abs(delta).reshape(-1), kind="stable")
    mask = np.zeros(delta.size)
    mask[order[: max(1, int(density * delta.size))]] = 1
    return delta * mask.reshape(delta.shape)


def medium(delta: Array, density: float, gamma: float) -> Array:
    """Drop the floor(gamma n) largest, and keep floor(d n) below; the top gives way."""
    if density >= 1:
        return delta
    kept, top = int(density * delta.size), int(gamma * delta.size)
    top = min(top, delta.size - kept)
    order = np.argsort(-np.abs(delta).reshape(-1), kind="stable")
    mask = np.zeros(delta.size)
    mask[order[top : top + kept]] = 1
    return delta * mask.reshape(delta.shape)


def rescaled(sparse: Array, whole: Array) -> Array:
    left = np.abs(sparse).sum()
    return sparse if left == 0 else sparse * np.abs(whole).sum() / left


def assert_merged(method: Any, expected: Callable[[str], Array], own: Any = None) -> None:
    found = in_memory(method.fuse(Pool(MODELS if own is None else own)))
    for key in SHAPES:
        np.testing.assert_allclose(array(found[key]), expected(key), rtol=2e-5, atol=4e-6)


every = [
    pytest.mark.parametrize("weights", WEIGHTS),
    pytest.mark.parametrize("densities", DENSITIES),
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(weights: list[float], normalize: bool) -> None:
    def expected(key: str) -> Array:
        return merged(*deltas(key), weights, 0.8, False, normalize)

    method = TaskArithmeticAlgorithm(0.8, weights=named(weights), normalize=normalize)
    assert_merged(method, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("densities", DENSITIES)
@pytest.mark.parametrize(("normalize", "rescale"), [(True, False), (False, False), (True, True)])
def test_ties(weights: list[float], densities: list[float], normalize: bool, rescale: bool) -> None:
    def expected(key: str) -> Array:
        base, whole = deltas(key)
        parts = [largest(delta, d) for delta, d in zip(whole, densities, strict=True)]
        if rescale:
            parts = [rescaled(*pair) for pair in zip(parts, whole, strict=True)]
        return merged(base, parts, weights, 1.2, True, normalize)

    method = TiesMergingAlgorithm(
        1.2,
        named(densities),
        merge_func="mean" if normalize else "sum",
        scope="tensor",
        keep="at_least_one",
        zero_sign="positive",
        weights=named(weights),
        rescale="l1" if rescale else "none",
    )
    assert_merged(method, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("densities", DENSITIES)
@pytest.mark.parametrize(("elects", "normalize"), product([False, True], repeat=2))
def test_dare(weights: list[float], densities: list[float], elects: bool, normalize: bool) -> None:
    def expected(key: str) -> Array:
        base, whole = deltas(key)
        parts = []
        for name, delta, density in zip(NAMES, whole, densities, strict=True):
            keep = bernoulli(1 - round(1 - density, 12), delta.size, (7, name, key))
            parts.append(rescaled(keep.reshape(delta.shape) * delta, delta))
        return merged(base, parts, weights, 0.9, elects, normalize)

    ratios = named([round(1 - density, 12) for density in densities])
    own = named(weights)
    method: Any = DareTaskArithmetic(
        0.9, ratios, rescale="l1", seed=7, weights=own, normalize=normalize
    )
    if elects:
        func = "mean" if normalize else "sum"
        method = DareTiesMerging(
            ratios,
            rescale="l1",
            scaling_factor=0.9,
            threshold=1,
            merge_func=func,
            zero_sign="positive",
            seed=7,
            weights=own,
        )
    assert_merged(method, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("densities", DENSITIES)
@pytest.mark.parametrize("gammas", [[0.01, 0.1, 0.2], [0.6, 0.6, 0.6]])
@pytest.mark.parametrize(("elects", "normalize"), product([False, True], repeat=2))
def test_breadcrumbs(
    weights: list[float],
    densities: list[float],
    gammas: list[float],
    elects: bool,
    normalize: bool,
) -> None:
    def expected(key: str) -> Array:
        base, whole = deltas(key)
        parts = [medium(*one) for one in zip(whole, densities, gammas, strict=True)]
        return merged(base, parts, weights, 0.7, elects, normalize)

    method = ModelBreadcrumbs(
        0.7,
        named(densities),
        named(gammas),
        gives_way="gamma",
        weights=named(weights),
        merge="elect" if elects else "linear",
        merge_func="mean" if normalize else "sum",
        zero_sign="positive",
    )
    assert_merged(method, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("densities", DENSITIES)
@pytest.mark.parametrize(("elects", "normalize"), product([False, True], repeat=2))
def test_della(weights: list[float], densities: list[float], elects: bool, normalize: bool) -> None:
    epsilons = [0.15, 0.1, 0.2]

    def pruned(key: str, name: str, delta: Array, density: float, epsilon: float) -> Array:
        if density >= 1:
            return delta
        rows = delta.reshape(-1, delta.shape[-1])
        ranks = np.argsort(np.argsort(np.abs(rows), axis=1, kind="stable"), axis=1)
        keep = density - epsilon + 2 * epsilon * ranks / (rows.shape[1] - 1)
        draws = uniform(rows.size, (3, name, key)).reshape(rows.shape)
        return rescaled(((draws < keep) * rows).reshape(delta.shape), delta)

    def expected(key: str) -> Array:
        base, whole = deltas(key)
        given = zip(NAMES, whole, densities, epsilons, strict=True)
        return merged(base, [pruned(key, *one) for one in given], weights, 1.1, elects, normalize)

    method = DellaMerging(
        1.1,
        named(densities),
        named(epsilons),
        "half",
        "l1",
        "elect" if elects else "linear",
        "mean" if normalize else "sum",
        3,
        weights=named(weights),
        zero_sign="positive",
    )
    assert_merged(method, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize", [False, True])
def test_linear(weights: list[float], normalize: bool) -> None:
    def expected(key: str) -> Array:
        total = sum(w * array(TUNED[name][key]) for w, name in zip(weights, NAMES, strict=True))
        return np.asarray(total / (sum(weights) if normalize else 1))

    assert_merged(WeightedAverageAlgorithm(named(weights), normalize), expected, TUNED)


def arc(a: Array, b: Array, t: float, axis: int | None) -> Array:
    norms = [np.linalg.norm(one, axis=axis, keepdims=axis is not None) for one in (a, b)]
    cos = ((a / norms[0]) * (b / norms[1])).sum(axis=axis, keepdims=axis is not None)
    angle = np.arccos(np.clip(cos, -1, 1))
    return np.asarray((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle))


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("axis", [None, -1, 0])
@pytest.mark.parametrize("weights", [[1.0, 3.0], [0.4, 0.2]])
def test_nuslerp(weights: list[float], axis: int | None, based: bool) -> None:
    own = {name: MODELS[name] for name in ("_pretrained_", "a", "b")[not based :]}

    def expected(key: str) -> Array:
        origin = array(MODELS["_pretrained_"][key]) if based else np.zeros(SHAPES[key])
        a, b = (array(MODELS[name][key]) - origin for name in ("a", "b"))
        return origin + arc(a, b, weights[1] / sum(weights), axis)

    method = NuSlerpAlgorithm({"a": weights[0], "b": weights[1]}, axis)
    found = in_memory(method.fuse(Pool(own)))  # type: ignore[arg-type]
    for key in SHAPES:
        if axis == 0 and len(SHAPES[key]) == 1:
            continue  # then it is along the only dimension
        np.testing.assert_allclose(array(found[key]), expected(key), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(t: float) -> None:
    own = {name: MODELS[name] for name in ("_pretrained_", "a")}

    def expected(key: str) -> Array:
        return arc(array(own["_pretrained_"][key]), array(own["a"][key]), t, None)

    assert_merged(SlerpMergeAlgorithm(t), expected, own)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.2, 0.9]])
def test_multislerp(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)

    def expected(key: str) -> Array:
        base, whole = deltas(key)
        norms = [np.linalg.norm(delta) for delta in whole]
        mean = sum(s * d / n for s, d, n in zip(shares, whole, norms, strict=True))
        return base + mean / np.linalg.norm(mean) * (shares @ norms)

    assert_merged(MultiSlerpAlgorithm(named(weights)), expected)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(filter_wise: bool) -> None:
    def expected(key: str) -> Array:
        base, whole = deltas(key)
        shape = (-1, SHAPES[key][-1]) if filter_wise else (1, -1)
        rows = [delta.reshape(shape) for delta in whole]
        units = [row / np.linalg.norm(row, axis=1, keepdims=True) for row in rows]
        pairs = [(units[i] * units[j]).sum(1, keepdims=True) for i, j in ((0, 1), (0, 2), (1, 2))]
        cos = sum(pairs) / 3
        t = 3 * cos / (1 + 2 * cos)
        return base + (t * sum(rows) / 3).reshape(SHAPES[key])

    assert_merged(ModelStock(filter_wise=filter_wise), expected)


@pytest.mark.parametrize("select_topk", [1.0, 0.4])
def test_sce(select_topk: float) -> None:
    def expected(key: str) -> Array:
        base, whole = deltas(key)
        parts = np.stack(whole)
        variance = parts.var(axis=0)
        if select_topk < 1:
            count = int(select_topk * np.count_nonzero(variance))
            order = np.argsort(-variance.reshape(-1), kind="stable")
            mask = np.zeros(variance.size)
            mask[order[:count]] = 1
            parts = parts * mask.reshape(variance.shape)
        energy = (parts**2).reshape(3, -1).sum(1)
        weights = (energy / energy.sum()).reshape(3, *[1] * base.ndim)
        sign = np.where(parts.sum(0) >= 0, 1, -1)
        agree = (parts * sign) > 0
        divisor = (weights * agree).sum(0)
        merged = (weights * parts * agree).sum(0) / np.where(divisor == 0, 1, divisor)
        return np.asarray(base + merged)

    assert_merged(SCEAlgorithm(select_topk), expected)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.2, 0.9], [0.0, 1.0, 1.0]])
def test_karcher(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)

    def expected(key: str) -> Array:
        whole = [array(TUNED[name][key]).reshape(-1) for name in NAMES]
        norms = np.array([np.linalg.norm(one) for one in whole])
        units = [one / norm for one, norm in zip(whole, norms, strict=True)]
        mean = sum(s * unit for s, unit in zip(shares, units, strict=True))
        mean = mean / np.linalg.norm(mean)
        for _ in range(100):
            step = np.zeros_like(mean)
            for share, unit in zip(shares, units, strict=True):
                cos = np.clip(unit @ mean, -1, 1)
                angle = np.arccos(cos)
                if angle > 1e-12:
                    step += share * angle / np.sin(angle) * (unit - cos * mean)
            length = np.linalg.norm(step)
            if length < 1e-12:
                break
            mean = np.cos(length) * mean + np.sin(length) * step / length
        return np.asarray(mean * (shares @ norms)).reshape(SHAPES[key])

    method = KarcherMeanAlgorithm(100, 1e-9, weights=named(weights))
    assert_merged(method, expected, TUNED)
