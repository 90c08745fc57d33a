"""The loop that every method of one tensor at a time runs in."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fusion_bench.errors import FusionBenchError
from fusion_bench.progress import bar
from fusion_bench.weights.mapping import Weights

#: ``merge_tensor(key, tensors, base)``: one float32 tensor from the same entry of every model.
MergeTensor = Callable[[str, Sequence[Tensor], Tensor | None], Tensor]


@torch.no_grad()
def merge(
    models: Mapping[str, Weights],
    merge_tensor: MergeTensor,
    base: Weights | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Merge ``models`` entry by entry, in the order and the dtypes of ``base`` or the first model.

    Floating-point entries reach ``merge_tensor`` as float32 copies (float64 stays) and are cast
    once, at the end. Integer and boolean entries are copied. Tied entries are merged once and
    stay tied.

    Raises:
        FusionBenchError: no models, or models whose keys or shapes differ; every difference is
            listed.
    """
    if not models:
        raise FusionBenchError("There is nothing to merge: the model pool names no model.")
    reference_name, reference = (
        ("_pretrained_", base) if base is not None else next(iter(models.items()))
    )
    check_alike(reference_name, reference, models)
    merged: dict[str, Tensor] = {}
    for key in bar(reference, "fusing", unit="tensor") if progress else reference:
        first = reference.tied_to(key)
        if first != key:
            merged[key] = merged[first]
        elif not reference.spec(key).dtype.is_floating_point:
            merged[key] = reference[key].clone()
        else:
            result = merge_tensor(
                key,
                [_working_copy(weights[key]) for weights in models.values()],
                None if base is None else _working_copy(base[key]),
            )
            merged[key] = result.to(reference.spec(key).dtype)
    return merged


def check_alike(name: str, reference: Weights, models: Mapping[str, Weights]) -> None:
    """Compare keys and shapes of ``models`` with ``reference``, called ``name``.

    Raises:
        FusionBenchError: with a line for each missing key, extra key and other shape.
    """
    problems: list[str] = []
    for model, weights in models.items():
        problems += [f"{model}: lacks '{key}'" for key in reference if key not in weights]
        problems += [f"{model}: has an extra '{key}'" for key in weights if key not in reference]
        problems += [
            f"{model}: '{key}' is {list(weights.spec(key).shape)}, "
            f"in {name} {list(reference.spec(key).shape)}"
            for key in reference
            if key in weights and weights.spec(key).shape != reference.spec(key).shape
        ]
    if problems:
        raise FusionBenchError(
            f"These models cannot be merged: their weights are not like those of '{name}'. "
            "Use models that were fine-tuned from the same base.\n  " + _shortened(problems)
        )


def _working_copy(tensor: Tensor) -> Tensor:
    # A copy, also of a float32 tensor: the method may then work in place.
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.to(dtype, copy=True)


def _shortened(lines: list[str], most: int = 20) -> str:
    shown = lines[:most] + ([f"… and {len(lines) - most} more"] if len(lines) > most else [])
    return "\n  ".join(shown)
