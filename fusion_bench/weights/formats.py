"""Unsupported formats: each is named, with the fix."""

import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch

from fusion_bench.weights.mapping import Weights

_ORIGINAL = "Use the original model."
_INSTALL = "" if find_spec("gguf") else ", after pip install 'fusion_bench[gguf]'"
_GGUF = (
    f"is in the format of llama.cpp. Name this file itself as the model{_INSTALL}, or use the "
    "original model."
)
_GGML = f"is in an old format of llama.cpp. {_ORIGINAL}"
_PYTORCH = (
    "Save it as safetensors: transformers 4 still reads it, with from_{kind}=True in "
    "from_pretrained, and save_pretrained then writes safetensors."
)
_EXPORTED = f"is exported for inference; its graph has no weight names for merging. {_ORIGINAL}"

#: Endings of file names and what such files are.
_BY_ENDING: Mapping[str, str] = {
    ".gguf": _GGUF,
    ".ggml": _GGML,
    ".onnx": _EXPORTED,
    ".engine": _EXPORTED,
    ".tflite": _EXPORTED,
    ".mlmodel": _EXPORTED,
    ".mlpackage": _EXPORTED,
    ".xml": _EXPORTED,
    ".h5": f"is a TensorFlow checkpoint. {_PYTORCH.format(kind='tf')}",
    ".keras": f"is a Keras checkpoint. {_ORIGINAL}",
    ".pb": f"is a TensorFlow graph. {_ORIGINAL}",
    ".ckpt.index": f"is a TensorFlow 1 checkpoint. {_PYTORCH.format(kind='tf')}",
    ".msgpack": f"is a Flax checkpoint. {_PYTORCH.format(kind='flax')}",
    ".ot": f"is a rust-bert checkpoint. {_ORIGINAL}",
    ".npz": "contains NumPy arrays, like older MLX models. Convert it to safetensors.",
    ".distcp": (
        "is a distributed checkpoint. 'python -m torch.distributed.checkpoint.format_utils "
        "dcp_to_torch FOLDER model.pt' converts it to one file, which you can use."
    ),
}
#: Files of PyTorch that are a model of their own.
_ONE_FILE = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")

#: How files begin, and what such files are.
_BY_BEGINNING: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", f"is a GGUF file: it {_GGUF}"),
    *((magic, f"is a GGML file: it {_GGML}") for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")),
    (b"\x89HDF\r\n", f"is HDF5, a TensorFlow or Keras checkpoint. {_ORIGINAL}"),
    (
        b"version https://git-lfs.github.com/",
        "is a Git LFS pointer instead of the file. Run 'git lfs pull' in its folder.",
    ),
    (b"<!DOCTYPE", "is a web page instead of the file. Download it again."),
    (b"<!doctype", "is a web page instead of the file. Download it again."),
    (b"<html", "is a web page instead of the file. Download it again."),
    (b"\x93NUMPY", "contains a NumPy array. Convert it to safetensors."),
    (b"\x1f\x8b", "is compressed with gzip. Unpack it first."),
    (b"\xfd7zXZ\0", "is compressed with xz. Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd. Unpack it first."),
)


def foreign_folder(
    files: Collection[str], folders: Collection[str], place: str, *, on_hub: bool = False
) -> str | None:
    """Return the format of a folder without weights, and the fix; ``None`` if unknown.

    Args:
        files: the names of the files at its top.
        folders: the names of the folders in it.
        place: what it is called.
        on_hub: whether it is a repository on the Hub.
    """
    place_here = f"Fetch it ('hf download {place} --local-dir FOLDER'), and" if on_hub else ""
    here, name = ("FOLDER", f"{place_here} name") if on_hub else (place, "Name")
    if "model_index.json" in files:
        parts = sorted({"transformer", "unet"} & set(folders) or folders)
        example = f", such as '{here}/{parts[0]}'" if parts else ""
        return f"'{place}' is a diffusers pipeline. {name} the folder of one part{example}."
    if "modules.json" in files and "0_Transformer" in folders:
        return (
            f"'{place}' is a sentence-transformers model, whose weights are in a subfolder. "
            f"{name} that: '{here}/0_Transformer'."
        )
    if "zero_to_fp32.py" in files or any(re.match("mp_rank_|zero_pp_rank_", f) for f in files):
        return (
            f"'{place}' is a training state of DeepSpeed. Its own script converts it to a "
            "checkpoint: 'python zero_to_fp32.py . OUTPUT'."
        )
    none = f"There are no weights in '{place}'"
    for ending, description in _BY_ENDING.items():
        if found := sorted(file for file in files if file.lower().endswith(ending)):
            which = f"{name} '{here}/{found[0]}'"
            if len(found) > 1:
                which = (
                    f"{name} one of the {len(found)} such files, for example '{here}/{found[0]}',"
                )
            told = description.replace("Name this file itself", which)
            return f"{none}: '{found[0]}' {told}"
    if "onnx" in folders:
        return f"{none}: what is in 'onnx' {_EXPORTED}"
    models = sorted(file for file in files if file.endswith(_ONE_FILE) and "optim" not in file)
    if any(file.startswith("ggml") for file in models):
        return f"{none}: '{models[0]}' {_GGML}"
    if models:
        return f"{none} under a usual name. {name} one of its files: '{here}/{models[0]}'."
    return None


def foreign_file(path: Path) -> str | None:
    """Return the format of an unsupported weight file, and the fix; ``None`` if it may be valid."""
    with path.open("rb") as file:
        begin = file.read(64)
    for magic, description in _BY_BEGINNING:
        if begin.startswith(magic):
            return f"'{path}' {description}"
    if path.suffix == ".safetensors" and begin.startswith((b"PK\x03\x04", b"\x80\x02")):
        return f"'{path}' is a PyTorch file with the wrong suffix. Rename it to '{path.stem}.bin'."
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt") and begin[8:9] == b"{":
        return (
            f"'{path}' is a safetensors file with the wrong suffix. Rename it to "
            f"'{path.stem}.safetensors'."
        )
    ending = next((end for end in _BY_ENDING if path.name.lower().endswith(end)), None)
    return f"'{path}' {_BY_ENDING[ending]}" if ending else None


_FLOAT8 = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8"))
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32)
#: For each way to quantise: how the weights' keys end, and those of what belongs to them.
_QUANTISED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("GPTQ", ".qweight", (".g_idx",)),
    ("GPTQ or AWQ", ".qweight", (".scales", ".qzeros")),
    (
        "bitsandbytes, 4 bits",
        "",
        (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"),
    ),
    ("bitsandbytes, 8 bits", ".weight", (".SCB",)),
    ("EXL2", ".q_weight", (".q_scale",)),
    ("EXL3", ".trellis", (".suh", ".svh")),
    ("compressed-tensors", ".weight_packed", (".weight_scale",)),
    ("MXFP4", "_blocks", ("_scales",)),
    ("HQQ", ".W_q", (".scale", ".zero")),
    ("Quanto", "._data", ("._scale",)),
    ("AQLM", ".codes", (".codebooks",)),
    ("MLX", ".weight", (".scales",)),
)
#: What the scales of weights in few bits are called, after the weight or its module.
_SCALES = (
    *("_scale_inv", "_scale", "_scale_2", "_scales", "_global_scale"),
    *(".scale", ".scales", ".scale_weight", ".scale_inv", ".input_scale", ".weight_scale"),
)


def quantised(weights: Weights) -> str | None:
    """Return how weights are quantised, and two entries that show it; by keys and types."""
    few_bits = [k for k in weights if weights.spec(k).dtype in (*_FLOAT8, *_INTEGERS)]
    for key in few_bits:
        module = key.rpartition(".")[0]
        for name, ending, beside in _QUANTISED:
            stem = key.removesuffix(ending) if key.endswith(ending) else None
            for end in beside if stem is not None else ():
                if f"{stem}{end}" in weights:
                    return f"{name}: '{key}' goes with '{stem}{end}'"
        bits = "fp8" if weights.spec(key).dtype in _FLOAT8 else "integers"
        for end in _SCALES if bits == "fp8" or key.endswith("weight") else ():
            for partner in (f"{key}{end}", f"{module}{end}"):
                if partner in weights and partner != key:
                    return f"{bits} with scales: '{key}' goes with '{partner}'"
    return None


#: Adapters that add to the input, or decide anew for each of them: there is nothing to merge.
_NOT_MERGEABLE = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"),
    *("ADAPTION_PROMPT", "XLORA", "POLY", "CARTRIDGE"),
)


def foreign_adapter(kind: str) -> str:
    """Return the fix for a PEFT adapter that is not a LoRA adapter."""
    if kind in _NOT_MERGEABLE:
        return (
            f"an adapter of the type {kind} changes the model's inputs, not its weights, and "
            "cannot be merged."
        )
    return (
        f"an adapter of the type {kind} is not supported. Merge it into its base with PEFT "
        "(merge_and_unload) and use the result."
    )
