"""Experts as a config names them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fusion_bench.problems import FusionBenchError, Problems, check_between, did_you_mean, within

#: The name of an expert's model, or a mapping that says more.
ExpertNode = str | Mapping[str, object]

_KEYS = ("model", "positive_prompts", "negative_prompts", "noise", "scale")


@dataclass(frozen=True)
class Expert:
    """A model whose MLPs become an expert.

    Attributes:
        model: its name in the pool.
        positive: the prompts that it is for.
        negative: those that it is not for.
        noise: the standard deviation of what is added to its weights; ``None`` where it has none of
            its own.
        scale: a factor on the last projection.
    """

    model: str
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    noise: float | None = None
    scale: float = 1.0


def read_expert(node: ExpertNode) -> Expert:
    """Return what a config says of an expert.

    Raises:
        FusionBenchError: all that is wrong with it.
    """
    if isinstance(node, str):
        return Expert(node)
    if not isinstance(node, Mapping):
        raise FusionBenchError(f"{node!r} is no expert.", "Give the name of a model.")
    problems = Problems()
    for key in node:
        with problems.collect(str(key)):
            if key not in _KEYS:
                raise FusionBenchError("there is no such key.", did_you_mean(str(key), _KEYS))
    model = node.get("model")
    with problems.collect("model"):
        if not isinstance(model, str):
            raise FusionBenchError("missing.", "Give the name of a model in the pool.")
    prompts: list[tuple[str, ...]] = []
    for key in ("positive_prompts", "negative_prompts"):
        with problems.collect(key):
            prompts.append(_texts(node.get(key)))
    numbers: list[float | None] = []
    for key, least in (("noise", 0.0), ("scale", -math.inf)):
        with problems.collect():
            numbers.append(_number(node.get(key), key, least))
    problems.raise_all()
    (positive, negative), (noise, scale) = prompts, numbers
    return Expert(str(model), positive, negative, noise, 1.0 if scale is None else scale)


def _number(node: object, key: str, least: float) -> float | None:
    if node is not None:
        check_between(key, node, least, math.inf)  # type: ignore[arg-type]
    return None if node is None else float(node)  # type: ignore[arg-type]


def _texts(node: object) -> tuple[str, ...]:
    texts = [node] if isinstance(node, str) else node
    if texts is None:
        return ()
    if not isinstance(texts, Sequence) or not all(isinstance(t, str) and t for t in texts):
        raise FusionBenchError(f"{node!r} is no list of texts.", "Give a list of prompts.")
    return tuple(texts)


def experts_of(
    nodes: Sequence[ExpertNode] | None, models: Sequence[str], count: int | None
) -> list[Expert]:
    """Return the experts; by default each of the pool's models, in ``count`` copies if it is one.

    Raises:
        FusionBenchError: an expert is not read, or the copies of several are asked for.
    """
    problems, experts = Problems(), [Expert(name) for name in models]
    if nodes is not None:
        experts = []
        for index, node in enumerate(nodes):
            with problems.collect("experts", index):
                experts.append(read_expert(node))
        problems.raise_all()
    if count is None or count == len(experts):
        return experts
    if len(experts) != 1:
        raise FusionBenchError(
            f"{count} for {len(experts)} experts.",
            "Remove it; it is the number of copies of a single one.",
            place=("num_experts",),
        )
    return experts * count


def refuse_unknown(expert: Expert, known: Collection[str]) -> None:
    """Refuse an expert whose model is not in the pool.

    Raises:
        FusionBenchError: as said.
    """
    if expert.model not in known:
        with within("model"):
            raise FusionBenchError(
                f"there is no model '{expert.model}'.", did_you_mean(expert.model, known)
            )
