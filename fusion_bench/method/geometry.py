"""Interpolation between tensors along lines and great circles."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Inputs

#: Sines of angles that are 0 but for rounding: a cosine near 1 tells them to half its digits.
_STRAIGHT = 1e-7
#: What is left of a length of 0 that is computed from its square, as a share of what cancels out.
_NOTHING = 1e-7


def lerp(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Return the point ``t`` of the way from ``start`` to ``end``, both ends exactly."""
    if t == 0:
        return start.clone()
    return end.clone() if t == 1 else start * (1 - t) + end * t


def themselves(
    key: str, start: int, tensors: Sequence[Tensor], base: Tensor | None
) -> Sequence[Tensor]:
    """Return the tensors themselves, for a statistic."""
    return tensors


def combined(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the sum of the tensors, each times its weight."""
    total = tensors[0] * float(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:].tolist(), strict=True):
        total.add_(tensor, alpha=weight)
    return total


def arc(t: float, cos: float) -> tuple[float, float]:
    """Return the shares of both ends in the point ``t`` of the way along the arc between them.

    ``cos`` is the cosine between the ends, which are combined as they are: their norms are not
    interpolated apart.
    """
    angle = math.acos(cos)
    sine = math.sin(angle)
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


def along_arcs(products: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the shares of vectors in the point that goes along arcs from one to the next.

    The point goes ``w_2 / (w_1 + w_2)`` of the way from the first to the second, from there towards
    the third, and so on; ``0.5`` of the way where a sum is 0. Vectors are combined as in ``arc``,
    and linearly where there is no arc between them: one line holds both. A zero vector is at a
    right angle to all.

    Args:
        products: the inner products of all pairs, in float64, shape (models, models, ...).
        weights: one for each model.

    Returns:
        The shares, in float64, shape (models, ...).
    """
    shares, total = torch.zeros_like(products[0]), weights[0]
    shares[0] = 1
    lengths = products.diagonal().movedim(-1, 0).sqrt()
    for model, weight in enumerate(weights[1:], 1):
        total += weight
        t = weight / total if abs(total) >= 1e-6 else 0.5
        to_next = (products[model] * shares).sum(0)
        squared = torch.einsum("i...,ij...,j...->...", shares, products, shares)
        length = squared.clamp(min=0).sqrt()
        # What is left of vectors that cancel out is rounding.
        length = length * (length > _NOTHING * (shares.abs() * lengths).amax(0))
        cos = (to_next / length / lengths[model]).nan_to_num(0, 0, 0).clamp(-1, 1)
        angle = cos.arccos()
        sine = angle.sin()
        straight = sine < _STRAIGHT
        shares = shares * torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
        shares[model] = torch.where(straight, t, torch.sin(t * angle) / sine)
    return shares


def between(start: Tensor, end: Tensor, shares: tuple[float, float]) -> Tensor:
    """Return the sum of two tensors, each times its share."""
    return start * shares[0] + end * shares[1]


def two_ends(tensors: Sequence[Tensor], base: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the two tensors to interpolate; the pretrained model's is the start."""
    return (tensors[0], tensors[1]) if base is None else (base, tensors[0])


def refuse_all_but_two(inputs: Inputs, method: str) -> None:
    """Refuse any number of models except two, including the pretrained one."""
    names = [*(["_pretrained_"] if inputs.aligned.base is not None else []), *inputs.names]
    if len(names) != 2:
        raise FusionBenchError(
            f"{method} needs exactly two models, including the pretrained one; there are "
            f"{len(names)}: {', '.join(names)}."
        )
