"""Entries of a checkpoint that are not learned: a model computes them from its config."""

import re

from fusion_bench.weights.mapping import TensorSpec, Weights

#: Buffers that older libraries stored and newer ones do not; every loader does without them.
_BUFFERS = re.compile(
    r"(^|\.)("
    r"(original_)?inv_freq|(cos|sin)_cached|position_ids|embeddings\.token_type_ids|masked_bias"
    r"|relative_position_index|(encoder|decoder)\.version"
    r")$"
)
#: Also the name of a layer's bias, which has one dimension.
_MASK = re.compile(r"(^|\.)(attn|attention|crossattention)\.bias$")


def is_computed(key: str, spec: TensorSpec) -> bool:
    """Return whether models compute an entry themselves, such as frequencies and masks."""
    if _MASK.search(key):
        return len(spec.shape) == 4 and spec.shape[:2] == (1, 1)
    return bool(_BUFFERS.search(key))


def learned(weights: Weights) -> dict[str, TensorSpec]:
    """Return the entries that are not computed."""
    specs = {key: weights.spec(key) for key in weights}
    return {key: spec for key, spec in specs.items() if not is_computed(key, spec)}
