"""The section ``policy`` of a pool's config."""

from collections.abc import Mapping
from typing import Any

from fusion_bench.problems import Problem, Problems, did_you_mean
from fusion_bench.weights import MergePolicy


def policy_of(section: Mapping[str, Any]) -> MergePolicy:
    """Return the policy that a section sets.

    Raises:
        FusionBenchError: keys or values that there are not.
    """
    known, problems = MergePolicy.options(), Problems()
    for name in section:
        if name not in known:
            hint = did_you_mean(name, known)
            problems.append(Problem((name,), "there is no such key.", hint))
    policy = MergePolicy()
    with problems.collect():
        policy = MergePolicy(**{name: own for name, own in section.items() if name in known})
    problems.raise_all()
    return policy
