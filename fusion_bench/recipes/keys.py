"""Keys that a recipe should not have: mistakes, and what says nothing."""

from collections.abc import Collection
from difflib import get_close_matches

from fusion_bench.recipes.methods import PARAMETERS

#: What is noted of a key that says nothing.
IDLE_KEY = "there is no such key; it has no effect, as in mergekit."
#: So alike are a key and what was meant by it.
_ALIKE = 0.8


def refused_key(key: str, known: Collection[str]) -> tuple[str, str] | None:
    """Return what is wrong with a key that is not known, and what to do.

    None for a key that is like no other, such as ``license``, which mergekit ignores as well.

    Args:
        key: the key.
        known: the keys that there may be in its place.
    """
    if "parameters" in known and key in PARAMETERS:
        remedy = f"Write it as 'parameters: {{{key}: …}}'."
        return "it is a parameter, and would be ignored.", remedy
    begun = [own for own in known if own.startswith(key) or own.endswith(f"_{key}")]
    near = begun if len(key) > 2 else []
    if near := near or get_close_matches(key, known, n=1, cutoff=_ALIKE):
        return "there is no such key.", f"Did you mean '{near[0]}'?"
    return None
