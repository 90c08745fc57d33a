"""One name for an entry that checkpoints of other times call otherwise."""

from collections.abc import Iterable

from fusion_bench.weights import Renamed, Weights, learned, without_prefix

#: What is in the names of norms that all loaders read, and none writes any more.
_OLD_NORMS = ("LayerNorm.gamma", "LayerNorm.beta")
#: What is in all names for which transformers knows another; to import it takes two seconds.
_TWO_NAMES = (*_OLD_NORMS, ".weight_g", ".weight_v", ".parametrizations.", "language_model.model")


def under_current_names(weights: Weights) -> Weights:
    """Return ``weights`` with the names for norms that every loader knows."""
    old = [key for key in weights if any(name in key for name in _OLD_NORMS)]
    if not old:
        return weights
    new = {key: name for key, name in _names(old).items() if name not in weights}
    return Renamed(weights, {new.get(key, key): key for key in weights})


def under_keys_of(reference: Weights, weights: Weights) -> Weights:
    """Return ``weights`` with the reference's keys, where a prefix or an old name tells them apart.

    What models compute themselves need not be in both.
    """
    if prefix := without_prefix(weights, learned(reference)):
        there = {key: f"{prefix}{key}" for key in reference}
        return Renamed(weights, {key: own for key, own in there.items() if own in weights})
    if prefix := without_prefix(reference, learned(weights)):
        return Renamed(weights, {f"{prefix}{key}": key for key in weights})
    strange = [key for key in weights if key not in reference and _has_two_names(key)]
    if not strange:
        return weights
    known = _names(key for key in reference if _has_two_names(key))
    back = {new: key for key, new in known.items()}
    names = {key: back.get(new, new) for key, new in _names(strange).items()}
    names = {key: name for key, name in names.items() if name not in weights}
    return Renamed(weights, {names.get(key, key): key for key in weights})


def _has_two_names(key: str) -> bool:
    return any(part in key for part in _TWO_NAMES)


def _names(keys: Iterable[str]) -> dict[str, str]:
    """Return what transformers calls these entries when it loads them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    names = {key: key for key in keys}
    for renaming in get_checkpoint_conversion_mapping("legacy"):
        names = {key: renaming.rename_source_key(name)[0] for key, name in names.items()}
    return names
