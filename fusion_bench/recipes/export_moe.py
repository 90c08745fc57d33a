"""From the config of a mixture of experts back to mergekit's document for one."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fusion_bench.problems import Problem, Problems
from fusion_bench.recipes.moe import GATES, LAYOUTS, RENAMED
from fusion_bench.recipes.places import BASE

TARGET = "fusion_bench.method.MixtureOfExperts"


def mixture_of(
    method: Mapping[str, Any],
    pool: Mapping[str, Any],
    paths: Mapping[str, str],
    names: Sequence[str],
    problems: Problems,
) -> dict[str, Any]:
    """Return the document of a mixture.

    Args:
        method: its node.
        pool: the node of the pool.
        paths: the pool's models, as a recipe names them.
        names: the models that are merged.
        problems: takes what no such document says.
    """
    base = BASE if BASE in paths else names[0]
    gate = {"gate": method.get("gate", "hidden")}
    gate |= {"state": method.get("state", "last")} if gate["gate"] == "hidden" else {}
    document: dict[str, Any] = {"base_model": paths[base]}
    if (theirs := next((name for name, own in GATES.items() if own == gate), None)) is None:
        reason = f"mergekit has no '{gate['gate']}'."
        problems.add([Problem(("method", "gate"), reason, "It has: hidden, embedding, random.")])
    document["gate_mode"] = theirs
    if (layout := method.get("layout", "auto")) != "auto":
        document["architecture"] = next(name for name, own in LAYOUTS.items() if own == layout)
    if (dtype := (pool.get("policy") or {}).get("dtype")) is not None:
        document["dtype"] = dtype
    document["experts_per_token"] = method.get("experts_per_token", 2)
    nodes = list(method["experts"] if method.get("experts") is not None else names)
    if method.get("num_experts") is not None and len(nodes) == 1:
        nodes *= method["num_experts"]
    noise = method.get("noise") or None
    document["experts"] = [_expert(node, paths, noise) for node in nodes]
    if theirs != "random":
        _refuse_without_prompts(document["experts"], problems)
    if method.get("shared_expert") is not None:
        document["shared_experts"] = [_expert(method["shared_expert"], paths, noise)]
    for key in ("tokenizer", "chat_template"):
        if pool.get(key) is not None:
            reason = "mergekit's documents for mixtures have no such setting."
            problems.add([Problem(("modelpool", key), reason, "Remove it, and set it afterwards.")])
    return document


def _expert(node: Any, paths: Mapping[str, str], noise: float | None) -> dict[str, Any]:
    own = {"model": node} if isinstance(node, str) else dict(node)
    made: dict[str, Any] = {"source_model": paths.get(own["model"], own["model"])}
    for theirs, ours in RENAMED.items():
        value = own.get(ours, noise if ours == "noise" else None)
        if value is not None:
            made[theirs] = _listed(value) if theirs.endswith("prompts") else value
    return made


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _refuse_without_prompts(experts: Collection[Mapping[str, Any]], problems: Problems) -> None:
    for index, own in enumerate(experts):
        if not own.get("positive_prompts"):
            place = ("method", "experts", index, "positive_prompts")
            problems.add([Problem(place, "missing; mergekit's gate needs some.", "Give some.")])
