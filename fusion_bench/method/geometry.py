"""Interpolation between tensors along lines and great circles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import Inputs


def lerp(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Return the point ``t`` of the way from ``start`` to ``end``, both ends exactly."""
    if t == 0:
        return start.clone()
    return end.clone() if t == 1 else start * (1 - t) + end * t


def cosine(one: Tensor, other: Tensor, epsilon: float = 0.0) -> float:
    """Return the cosine of the angle between two tensors taken as vectors, in float64.

    A tensor whose norm is at most ``epsilon`` has no direction: the cosine is 0.
    """
    one, other = one.double().flatten(), other.double().flatten()
    norms = float(one.norm()), float(other.norm())
    if min(norms) <= epsilon:
        return 0.0
    return max(-1.0, min(1.0, float((one / norms[0]) @ (other / norms[1]))))


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


def slerp(start: Tensor, end: Tensor, t: float, cos: float) -> Tensor:
    """Return the point ``t`` of the way along the arc; ``cos`` is the cosine between the ends.

    The tensors are combined as they are: their norms are not interpolated apart.
    """
    angle = torch.arccos(torch.tensor(cos, dtype=torch.float64))
    sine = torch.sin(angle)
    before = float(torch.sin((1 - t) * angle) / sine)
    after = float(torch.sin(t * angle) / sine)
    return start * before + end * after


def along_arcs(start: Tensor, end: Tensor, t: float, axis: int | None) -> Tensor:
    """Return the points ``t`` of the way along the arcs between the vectors along ``axis``.

    The vectors are combined as in ``slerp``, and linearly where there is no arc between them: one
    line holds both. A zero vector is at a right angle to all. ``axis`` ``None`` makes one vector of
    a tensor.
    """
    lengths = (torch.linalg.vector_norm(v, dim=axis, keepdim=True) for v in (start, end))
    directions = [v / length for v, length in zip((start, end), lengths, strict=True)]
    cos = (directions[0] * directions[1]).sum(axis, keepdim=True).nan_to_num(0).clamp(-1, 1)
    angle = cos.arccos()
    sine = angle.sin()
    straight = sine < 1e-8
    before = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
    after = torch.where(straight, t, torch.sin(t * angle) / sine)
    return start * before + end * after


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
