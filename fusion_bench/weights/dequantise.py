"""Finds out how weights are quantised, by their keys, types and config."""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from fusion_bench.problems import FusionBenchError
from fusion_bench.weights.coded import (
    Awq,
    Coded,
    Dequantised,
    FourBits,
    Grid,
    Mxfp4,
    Packed,
    Scaled,
)
from fusion_bench.weights.mapping import TensorSpec, Weights

#: The methods that can be decoded, as a config.json calls them.
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "awq", "bitsandbytes", "mxfp4")
#: Formats of compressed-tensors that can be.
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "dense")

#: What a damaged file's shapes and texts may raise while they are looked at.
_NOT_UNDERSTOOD = (
    *(ValueError, TypeError, KeyError, IndexError),
    *(AttributeError, OverflowError, RecursionError),
)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: Types that weights have only when they are quantised.
_CODES = (*_FLOAT8, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
#: How the names of weights end that are quantised if they are whole numbers.
_OF_WEIGHTS = (".weight", "_proj", "_blocks", ".weight_packed", ".qweight")
#: Lists of modules that are stored as they were, as the ways to quantise call them.
_KEPT = ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules")
#: What the scales of a weight in fp8 or int8 are called, after its name.
_SCALES = ("_scale_inv", "_scale")
#: What else is kept for a module's weight, its inputs and its outputs.
_BESIDE = re.compile(
    r"\.(weight_(scale|scale_inv|zero_point|g_idx|shape|format)|qzeros|scales|g_idx|SCB"
    r"|(in|out)put_(scale|zero_point|g_idx)|activation_scale|input_scale_ub"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.bitsandbytes__(nf4|fp4)))$"
)
#: Scales of the keys and values that are kept while a text is made.
_CACHE = re.compile(r"\.(k|v|q|attn)_scale$|\.[kqv]_proj\.output_(scale|zero_point)$")


def undecodable(settings: Mapping[str, Any]) -> str | None:
    """Return what of a ``quantization_config`` cannot be decoded; None where all can.

    Args:
        settings: what stands there.
    """
    method = settings.get("quant_method")
    if method not in METHODS:
        return str(method or "with an unnamed method")
    if method == "compressed-tensors":
        groups = settings.get("config_groups")
        each = list(groups.values()) if isinstance(groups, Mapping) else []
        formats = {group.get("format") for group in each if isinstance(group, Mapping)}
        for name in {settings.get("format"), *formats} - {None, "mixed-precision"}:
            if name not in _FORMATS:
                return f"compressed-tensors, {name}"
        for key in ("sparsity_config", "transform_config"):
            section = settings.get(key)
            if isinstance(section, Mapping) and section and section.get("format") != "dense":
                return f"compressed-tensors with a {key}"
    version, bits = settings.get("version", "gemm"), settings.get("bits", 4)
    if method == "awq" and (version != "gemm" or bits != 4):
        return f"awq, {version}, {bits} bits"
    return None


def told_by_values(settings: Mapping[str, Any]) -> bool:
    """Return whether files must be read, not their headers alone, to know the weights' shapes."""
    return settings.get("quant_method") == "bitsandbytes" or "pack-quantized" in str(settings)


def dequantised(
    weights: Weights,
    settings: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    name: str = "The model",
) -> Weights:
    """Return quantised weights as numbers, decoded when they are read.

    Scales and the like are left out. ``weights`` are returned where none is quantised.

    Args:
        weights: what is stored.
        settings: the ``quantization_config`` of its config.json; may be empty.
        dtype: the type of the weights before.
        name: what the model is called, for messages.

    Raises:
        FusionBenchError: scales that do not fit, or a way to quantise that is not known.
    """
    coded: dict[str, Coded] = {}
    for key in weights:
        try:
            if (found := _found(weights, key, settings, dtype)) is not None:
                coded[key] = found[1]
                coded[found[0]] = coded.pop(key)
        except _NOT_UNDERSTOOD as error:
            raise FusionBenchError(
                f"'{name}': '{key}' is quantised in a way that is not understood: {_said(error)}.",
                "Use the original model.",
            ) from error
    used = {source for entry in coded.values() for source in entry.sources}
    for key in weights if settings or coded else ():
        if key not in used and _is_code(weights, key) and not _is_kept(key, settings):
            raise FusionBenchError(
                f"'{name}': the scale of '{key}' is missing.",
                "Download the model again, or use the original model.",
            )
    if not coded:
        return weights
    modules = {key.removesuffix(".weight") for key in coded}
    entries: dict[str, Coded | str] = {}
    sources = {entry.sources[0]: name for name, entry in coded.items()}
    for key in weights:
        beside = _BESIDE.search(key)
        if key in sources:
            entries[sources[key]] = coded[sources[key]]
        elif key in used or _CACHE.search(key):
            continue
        elif beside is None or key[: beside.start()] not in modules:
            entries[key] = key
    return Dequantised(weights, entries)


def _said(error: Exception) -> str:
    """Return what an error says; of a key that is missing, that it is."""
    return f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)


def _is_code(weights: Weights, key: str) -> bool:
    """Return whether an entry means nothing without a scale."""
    dtype = weights.spec(key).dtype
    if dtype in _CODES:
        return not key.endswith(("_scale", "_scale_inv", "_scales"))
    whole = (torch.int8, torch.uint8, torch.int32)
    return dtype in whole and key.endswith(_OF_WEIGHTS)


def _is_kept(key: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a config lists an entry's module as one that is not quantised."""
    lists = [settings.get(name) for name in _KEPT]
    listed = [each for found in lists if isinstance(found, list) for each in found if each]
    names = (key, key.removesuffix(".weight"))
    return any(
        name.endswith(str(each)) or _fits(str(each).removeprefix("re:"), name)
        for each in listed
        for name in names
    )


def _fits(pattern: str, name: str) -> bool:
    """Return whether a name, or the modules that it begins with, fit a pattern."""
    try:
        return re.match(rf"(?:{pattern})(?=\.|$)", name) is not None
    except re.error:
        return name == pattern


def _found(
    weights: Weights, key: str, settings: Mapping[str, Any], dtype: torch.dtype
) -> tuple[str, Coded] | None:
    """Return what a stored entry is called, and how it is decoded; None for a plain one."""
    spec = weights.spec(key)
    stem = key.rpartition(".")[0]
    if key.endswith(".weight") and spec.dtype == torch.int8 and f"{stem}.SCB" in weights:
        grid = Grid(_scales(weights, f"{stem}.SCB"), spec.shape)
        return key, Scaled(TensorSpec(spec.shape, dtype), key, f"{stem}.SCB", grid, divisor=127.0)
    if spec.dtype in (*_FLOAT8, torch.int8):
        scale = next((f"{key}{end}" for end in _SCALES if f"{key}{end}" in weights), None)
        if scale is None:
            return None
        grid = Grid(_scales(weights, scale), spec.shape, _block(settings, stem))
        zero = _beside(weights, f"{stem}.weight_zero_point", weights.spec(scale).shape)
        if zero is None and _asymmetric(settings, stem):
            raise KeyError(f"{stem}.weight_zero_point")
        return key, Scaled(TensorSpec(spec.shape, dtype), key, scale, grid, zero)
    if key.endswith(".weight_packed") and spec.dtype == torch.int32:
        return f"{stem}.weight", _packed(weights, stem, spec, settings, dtype)
    if key.endswith(".qweight") and settings.get("quant_method") == "awq":
        columns, words = spec.shape
        groups, rows = _scales(weights, f"{stem}.scales")
        if rows != 8 * words or columns % groups or spec.dtype != torch.int32:
            raise ValueError(f"scales of {[groups, rows]} for {[columns, 8 * words]}")
        group = settings.get("group_size") or columns // groups
        if groups != (columns // group if group > 0 else 1):
            raise ValueError(f"{groups} scales a row of {columns} in groups of {group}")
        zero = _beside(weights, f"{stem}.qzeros", (groups, words))
        if zero is None and settings.get("zero_point", True):
            raise KeyError(f"{stem}.qzeros")
        return f"{stem}.weight", Awq(
            TensorSpec((rows, columns), dtype), key, f"{stem}.scales", zero
        )
    for kind in ("nf4", "fp4"):
        if f"{key}.quant_state.bitsandbytes__{kind}" in weights:
            return key, _four_bits(weights, key, f"{key}.quant_state.bitsandbytes__{kind}")
    name = key.removesuffix("_blocks")
    if name != key and f"{name}_scales" in weights and spec.dtype == torch.uint8:
        experts, out, count, half = spec.shape
        _beside(weights, f"{name}_scales", (experts, out, count), torch.uint8)
        if half != 16:
            raise ValueError(f"blocks of {2 * half} numbers")
        return name, Mxfp4(TensorSpec((experts, 32 * count, out), dtype), key, f"{name}_scales")
    return None


def _scales(weights: Weights, key: str) -> tuple[int, ...]:
    """Return the shape of scales, which are numbers themselves."""
    spec = weights.spec(key)
    if spec.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"scales in {spec.dtype}")
    return spec.shape


def _beside(
    weights: Weights, key: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> str | None:
    """Return the key where there is such an entry, which must have this shape."""
    if key not in weights:
        return None
    spec = weights.spec(key)
    if spec.shape != shape or spec.dtype != (dtype or spec.dtype):
        raise ValueError(f"'{key}' of {list(spec.shape)} in place of {list(shape)}")
    return key


def _block(settings: Mapping[str, Any], module: str) -> tuple[int, int] | None:
    """Return the rows and columns of a block, where the config says so."""
    block = settings.get("weight_block_size")
    for args in _arguments(settings, module):
        block = block or args.get("block_structure")
        block = block or ([1, size] if (size := _group_size(args)) else None)
    if block is None:
        return None
    if not isinstance(block, list) or [type(n) for n in block] != [int, int] or min(block) < 1:
        raise ValueError(f"blocks of {block}")
    return block[0], block[1]


def _group_size(args: Mapping[str, Any]) -> int:
    """Return how many columns have a scale in common; 0 for all of them."""
    by_group = args.get("strategy", "group") == "group"
    return max(int(args.get("group_size") or 0), 0) if by_group else 0


def _asymmetric(settings: Mapping[str, Any], module: str) -> bool:
    """Return whether a module's weights have zero points by the config."""
    said = [args.get("symmetric", True) for args in _arguments(settings, module)]
    return bool(said) and not any(said)


def _arguments(settings: Mapping[str, Any], module: str) -> list[Mapping[str, Any]]:
    """Return how a module's weights are quantised by a config of compressed-tensors.

    Groups that name the module go before those that name classes, which the weights do not tell.
    """
    groups = settings.get("config_groups")
    named, others, everything = [], [], []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        args = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(args, Mapping):
            continue
        everything.append(args)
        targets = [str(each) for each in group.get("targets") or ()]
        names = [each for each in targets if each.startswith("re:") or "." in each]
        if any(_fits(each.removeprefix("re:"), module) for each in names):
            named.append(args)
        elif len(names) < len(targets) or not targets:
            others.append(args)
    return named or others or everything


def _packed(
    weights: Weights, stem: str, spec: TensorSpec, settings: Mapping[str, Any], dtype: torch.dtype
) -> Packed:
    """Return how an entry of packed integers is decoded."""
    arguments = _arguments(settings, stem)
    bits = {args.get("num_bits") for args in arguments}
    if bits not in ({2}, {4}, {8}):
        raise ValueError(f"integers of {' and '.join(sorted(map(str, bits))) or 'unknown'} bits")
    number = int(bits.pop() or 0)
    rows, words = spec.shape
    columns = words * 32 // number
    height, across = _scales(weights, f"{stem}.weight_scale")
    size = max(_group_size(args) for args in arguments)
    if (shape := f"{stem}.weight_shape") in weights:
        said = weights[shape].flatten().tolist()
        if len(said) != 2 or said[0] != rows or -(-said[1] * number // 32) != words:
            raise ValueError(f"'{shape}' says {said} of {[rows, columns]}")
        columns = said[1]
    elif size and -(-across * size * number // 32) == words:  # the last word may be padded
        columns = min(columns, across * size)
    fits = columns <= (size or columns) if across == 1 else columns == across * size
    if height != rows or columns == 0 or not fits:
        groups = f" in groups of {size}" if size else ""
        raise ValueError(f"scales of {[height, across]} for {[rows, columns]}{groups}")
    zero = _beside(weights, f"{stem}.weight_zero_point", (-(-rows * number // 32), across))
    if zero is None and _asymmetric(settings, stem):
        raise KeyError(f"{stem}.weight_zero_point")
    return Packed(
        TensorSpec((rows, columns), dtype),
        f"{stem}.weight_packed",
        f"{stem}.weight_scale",
        number,
        zero,
        _beside(weights, f"{stem}.weight_g_idx", (columns,)),
    )


def _four_bits(weights: Weights, key: str, state: str) -> FourBits:
    """Return how an entry of bitsandbytes' 4 bits is decoded, as is said beside it."""
    said = json.loads(bytes(weights[state].tolist()))
    shape, size, nested = tuple(said["shape"]), said["blocksize"], said.get("nested_blocksize")
    counts = (*shape, size, *([] if nested is None else [nested]))
    spec = TensorSpec(shape, getattr(torch, said["dtype"]))
    if not isinstance(spec.dtype, torch.dtype) or not all(
        isinstance(count, int) and count > 0 for count in counts
    ):
        raise ValueError(f"its state is {said}")
    blocks = -(-spec.numel // size)
    sizes = {"": -(-spec.numel // 2), ".absmax": blocks, ".quant_map": 16}
    if nested is not None:
        sizes |= {".nested_absmax": -(-blocks // nested), ".nested_quant_map": 256}
    for end, size_of in sizes.items():
        if (found := weights.spec(f"{key}{end}").numel) != size_of:
            raise ValueError(f"'{key}{end}' of {found} numbers in place of {size_of}")
    return FourBits(spec, key, size, nested, float(said["nested_offset"]) if nested else 0.0)
