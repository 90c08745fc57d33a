"""What a mergekit recipe means, in float64 and as plainly as possible.

It is written from a description of mergekit's behaviour, not from the code that it tests. Models
are dicts from names to arrays, in the order of the model. What is drawn at random is given.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

Array = NDArray[np.float64]
Tensors = dict[str, Array]
#: Gives the 0-1 mask that was drawn for a model's tensor.
Masks = Callable[[str, str], Array]

_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
_AFTER = ("model.norm.weight", "lm_head.weight")
_DEFAULTS = {
    **{"density": 1.0, "lambda": 1.0, "gamma": 0.01, "epsilon": 0.15, "scale": 1.0},
    **{"nuslerp_flatten": True, "nuslerp_row_wise": False, "normalize_weights": True, "eps": 1e-8},
    **{"max_iter": 10, "tol": 1e-5, "filter_wise": False, "select_topk": 1.0},
    **{"epsilon_of_ram": 1e-5, "r": 0.1, "alpha": 0.2},
}
_NORMALIZE = {"linear": True, "ties": True, "della": True}
_RESCALE = {"dare_linear": True, "dare_ties": True, "della": True, "della_linear": True}
_ELECT = {"ties", "dare_ties", "breadcrumbs_ties", "della"}
_VECTORS = {
    *("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"),
    *("della", "della_linear", "model_stock", "sce", "ram", "ramplus_tl"),
}


def run(text: str, load: Callable[[str], Tensors], masks: Masks | None = None) -> Tensors:
    """Return the tensors that a recipe makes."""
    documents = list(yaml.safe_load_all(text))
    named = {own["name"]: own for own in documents if own.get("name")}
    (final,) = [own for own in documents if not own.get("name")]

    @cache
    def opened(path: str) -> Tensors:
        return merge(named[path], opened, masks) if path in named else load(path)

    return merge(final, opened, masks)


def merge(
    recipe: Mapping[str, Any], load: Callable[[str], Tensors], masks: Masks | None
) -> Tensors:
    """Return the tensors that one document makes."""
    slices = recipe.get("slices")
    base_name = recipe.get("base_model")
    if slices is None:
        sources = list(recipe["models"])
        if base_name and all(source["model"] != base_name for source in sources):
            sources.append({"model": base_name})
        count = _layers(load(sources[0]["model"]))
        slices = [{"sources": [{**own, "layer_range": [0, count]} for own in sources]}]
    found: dict[str, Tensors] = {"before": {}, "layers": {}, "after": {}}
    offset = 0
    for number, part in enumerate(slices):
        first, last = number == 0, number == len(slices) - 1
        sources = part["sources"]
        begin, end = sources[0]["layer_range"]
        for name in load(sources[0]["model"]):
            match = _LAYER.fullmatch(name)
            if match is None:
                where = "after" if name in _AFTER else "before"
                if (where == "before" and first) or (where == "after" and last):
                    found[where][name] = _tensor(recipe, part, load, name, name, 0.0, 0, masks)
                continue
            index = int(match[2]) - begin
            if not 0 <= index < end - begin:
                continue
            t = index / (end - begin - 1) if end - begin > 1 else 1.0
            output = f"{match[1]}{offset + index}{match[3]}"
            found["layers"][output] = _tensor(recipe, part, load, name, output, t, index, masks)
        offset += end - begin
    return {**found["before"], **found["layers"], **found["after"]}


def _tensor(
    recipe: Mapping[str, Any],
    part: Mapping[str, Any],
    load: Callable[[str], Tensors],
    name: str,
    output: str,
    t: float,
    index: int,
    masks: Masks | None,
) -> Array:
    method = recipe["merge_method"]
    base_name = part.get("base_model") or recipe.get("base_model")
    levels = [part.get("parameters"), recipe.get("parameters")]

    def setting(parameter: str, source: Mapping[str, Any] | None = None, own: str = "") -> Any:
        chain = levels if source is None else [source.get("parameters"), *levels]
        for level in chain:
            stated = (level or {}).get(parameter.removesuffix("_of_ram"))
            value = _value(stated, own or output, t)
            if value is not None:
                return value
        if parameter == "normalize":
            return _NORMALIZE.get(method, False)
        if parameter == "rescale":
            return _RESCALE.get(method, False)
        return _DEFAULTS[parameter]

    sources = []
    for source in part["sources"]:
        match = _LAYER.fullmatch(name)
        own = name
        if match is not None:
            own = f"{match[1]}{source['layer_range'][0] + index}{match[3]}"
        sources.append((source, own, load(source["model"])[own]))
    base = next((x for s, _, x in sources if s["model"] == base_name), None)
    others = [(s, own, x) for s, own, x in sources if s["model"] != base_name]
    if method in ("linear", "karcher", "passthrough"):
        others = sources
    xs = [x for _, _, x in others]

    def each(parameter: str) -> list[float]:
        return [float(setting(parameter, source, own)) for source, own, _ in others]

    if method == "linear":
        return _linear(xs, each("weight"), setting("normalize"))
    if method == "passthrough":
        return xs[0] * each("scale")[0]
    if method == "slerp":
        assert base is not None
        return slerp(base, xs[0], float(setting("t")))
    if method == "nearswap":
        assert base is not None
        delta = xs[0] - base
        share = np.clip(float(setting("t")) / np.maximum(np.abs(delta), 1e-6), 0, 1)
        return base + share * delta
    if method == "arcee_fusion":
        assert base is not None
        return _arcee(base, xs[0])
    if method == "nuslerp":
        w = each("weight")
        axis = None
        if not setting("nuslerp_flatten"):
            axis = 0 if setting("nuslerp_row_wise") else -1
        return _nuslerp(xs, w, axis, base)
    if method == "multislerp":
        weights = each("weight")
        return _multislerp(xs, weights, bool(setting("normalize_weights")), base)
    if method == "karcher":
        return _karcher(xs, int(setting("max_iter")), float(setting("tol")))
    assert base is not None
    assert method in _VECTORS
    deltas = [x - base for x in xs]
    if method == "model_stock":
        return _stock(base, xs, bool(setting("filter_wise")))
    if method == "sce":
        return base + _sce(deltas, float(setting("select_topk")))
    if method in ("ram", "ramplus_tl"):
        plus = method == "ramplus_tl"
        r, alpha = (float(setting("r")), float(setting("alpha"))) if plus else (0.0, 0.0)
        return base + _ram(deltas, float(setting("epsilon_of_ram")), r, alpha)
    sparse = []
    for source, own, x in others:
        delta = x - base
        density = float(setting("density", source, own))
        s = delta
        if density < 1:
            gamma = float(setting("gamma", source, own))
            s = _sparse(method, delta, density, gamma)
            if method.startswith(("dare", "della")):
                assert masks is not None
                s = delta * masks(source["model"], own)
        if setting("rescale") and np.abs(s).sum() > 0:
            s = s * (np.abs(delta).sum() / np.abs(s).sum())
        sparse.append(s)
    return base + float(setting("lambda")) * _combined(
        sparse, each("weight"), method in _ELECT, bool(setting("normalize"))
    )


def _value(stated: Any, name: str, t: float) -> Any:
    """Return what one level says of a tensor; None if it says nothing."""
    if stated is None:
        return None
    conditions = [stated] if isinstance(stated, dict) else stated
    if isinstance(conditions, list) and all(isinstance(own, dict) for own in conditions):
        for own in conditions:
            if own.get("filter") in (None, "*") or own["filter"] in name:
                return gradient(own["value"], t)
        return None
    return gradient(stated, t)


def gradient(stated: Any, t: float) -> Any:
    """Return the value of a scalar or a gradient at a depth."""
    if not isinstance(stated, list):
        return stated
    s = t * (len(stated) - 1)
    i = math.floor(s)
    if isinstance(stated[i], bool | str):
        return stated[i]
    return (1 - (s - i)) * stated[i] + (s - i) * stated[min(i + 1, len(stated) - 1)]


def _layers(tensors: Tensors) -> int:
    indices = (match for match in map(_LAYER.fullmatch, tensors) if match)
    return 1 + max(int(match[2]) for match in indices)


def _linear(xs: list[Array], weights: list[float], normalize: bool) -> Array:
    total = np.sum([w * x for w, x in zip(weights, xs, strict=True)], axis=0)
    return np.asarray(total / sum(weights) if normalize else total)


def slerp(a: Array, b: Array, t: float) -> Array:
    """Return the point on the arc, or on the line where there is hardly an angle."""
    cos = float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    if abs(cos) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(np.clip(cos, -1, 1))
    return np.asarray((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle))


def _nuslerp(xs: list[Array], w: list[float], axis: int | None, base: Array | None) -> Array:
    a, b = xs if base is None else [x - base for x in xs]
    t = 0.5 if abs(sum(w)) < 1e-6 else w[1] / sum(w)

    def norm(x: Array) -> Array:
        return np.asarray(np.sqrt((x**2).sum(axis=axis, keepdims=True)))

    with np.errstate(all="ignore"):
        cos = np.clip(
            np.nan_to_num((a * b).sum(axis=axis, keepdims=True) / norm(a) / norm(b)), -1, 1
        )
        angle = np.arccos(cos)
        sine = np.sin(angle)
        one = np.where(sine < 1e-8, 1 - t, np.sin((1 - t) * angle) / sine)
        two = np.where(sine < 1e-8, t, np.sin(t * angle) / sine)
    mixed = one * a + two * b
    return mixed if base is None else base + mixed


def _multislerp(xs: list[Array], w: list[float], normalize: bool, base: Array | None) -> Array:
    vectors = xs if base is None else [x - base for x in xs]
    shares = [own / sum(w) for own in w] if normalize else w
    norms = [np.linalg.norm(x) for x in vectors]
    mean = np.sum([s * x / n for s, x, n in zip(shares, vectors, norms, strict=True)], axis=0)
    length = sum(s * n for s, n in zip(shares, norms, strict=True))
    mixed = mean / np.linalg.norm(mean) * length
    return np.asarray(mixed if base is None else base + mixed)


def _karcher(xs: list[Array], steps: int, tol: float) -> Array:
    norms = [float(np.linalg.norm(x)) for x in xs]
    units = [x / n for x, n in zip(xs, norms, strict=True)]
    mean = np.mean(units, axis=0)
    mean /= np.linalg.norm(mean)
    for _ in range(steps):
        step = np.zeros_like(mean)
        for unit in units:
            cos = float(np.clip((unit * mean).sum(), -1, 1))
            angle = np.arccos(cos)
            if angle > tol:
                step += angle / np.sin(angle) * (unit - cos * mean) / len(units)
        length = np.linalg.norm(step)
        if length <= tol:
            break
        mean = np.cos(length) * mean + np.sin(length) * step / length
        mean /= np.linalg.norm(mean)
    return np.asarray(mean * np.mean(norms))


def _arcee(base: Array, other: Array) -> Array:
    def softmax(x: Array) -> Array:
        e = np.exp(x - x.max(-1, keepdims=True))
        return np.asarray(e / e.sum(-1, keepdims=True))

    p, q = softmax(other), softmax(base)
    importance = np.abs(other - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    low, median, high = np.percentile(importance, [25, 50, 75])
    return np.where(importance >= median + 1.5 * (high - low), other, base)


def _stock(base: Array, xs: list[Array], filter_wise: bool) -> Array:
    rows = base.shape[0] if filter_wise and base.ndim > 1 else 1
    flat = [(x - base).reshape(rows, -1) for x in xs]
    mean = np.mean(flat, axis=0)
    n = len(xs)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    norms = [np.linalg.norm(own, axis=1) for own in flat]
    cos = np.mean([(flat[i] * flat[j]).sum(1) / norms[i] / norms[j] for i, j in pairs], axis=0)
    t = n * cos / (1 + (n - 1) * cos)
    return np.asarray(base + (t[:, None] * mean).reshape(base.shape))


def _sce(deltas: list[Array], topk: float) -> Array:
    if topk < 1:
        variance = np.var(deltas, axis=0)
        count = int(topk * np.count_nonzero(variance))
        mask = np.zeros(variance.size)
        mask[np.argsort(-variance.ravel(), kind="stable")[:count]] = 1
        deltas = [delta * mask.reshape(variance.shape) for delta in deltas]
    energy = np.array([(delta**2).mean() for delta in deltas])
    weights = energy / energy.sum()
    sign = np.where(np.sum(deltas, axis=0) >= 0, 1.0, -1.0)
    agree = [np.sign(delta) == sign for delta in deltas]
    top = np.sum([w * d * m for w, d, m in zip(weights, deltas, agree, strict=True)], axis=0)
    bottom = np.sum([w * m for w, m in zip(weights, agree, strict=True)], axis=0)
    return np.asarray(top / np.where(bottom == 0, 1, bottom))


def _ram(deltas: list[Array], epsilon: float, r: float, alpha: float) -> Array:
    active = [np.abs(delta) > epsilon for delta in deltas]
    count = np.sum(active, axis=0)
    result = np.zeros_like(deltas[0])
    for delta, own in zip(deltas, active, strict=True):
        unique, shared = int((own & (count == 1)).sum()), int((own & (count > 1)).sum())
        scale = 1 + r * float(np.clip(shared / unique, 0, alpha)) if unique else 1.0
        result += np.where(own & (count == 1), delta * scale, 0)
        result += np.where(own & (count > 1), delta / np.maximum(count, 1), 0)
    return result


def _sparse(method: str, delta: Array, density: float, gamma: float) -> Array:
    """Return what the methods that do not draw keep of a task vector."""
    n = delta.size
    order = np.argsort(-np.abs(delta).ravel(), kind="stable")
    mask = np.zeros(n)
    if method == "ties":
        mask[order[: max(1, math.floor(density * n))]] = 1
    elif method.startswith("breadcrumbs"):
        kept, top = math.floor(density * n), math.floor(gamma * n)
        top = min(top, n - kept)
        mask[order[top : top + kept]] = 1
    else:
        mask[:] = 1
    return delta * mask.reshape(delta.shape)


def _combined(sparse: list[Array], weights: list[float], elect: bool, normalize: bool) -> Array:
    weighted = [w * s for w, s in zip(weights, sparse, strict=True)]
    if not elect:
        total = np.sum(weighted, axis=0)
        share = sum(weights)
        return np.asarray(total / (1 if abs(share) < 1e-8 else share) if normalize else total)
    sign = np.where(np.sum(weighted, axis=0) >= 0, 1.0, -1.0)
    masks = [np.sign(own) == sign for own in weighted]
    total = np.sum([own * mask for own, mask in zip(weighted, masks, strict=True)], axis=0)
    if not normalize:
        return np.asarray(total)
    share = np.sum([w * mask for w, mask in zip(weights, masks, strict=True)], axis=0)
    return np.asarray(total / np.where(share == 0, 1, share))
