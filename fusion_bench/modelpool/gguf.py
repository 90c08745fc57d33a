"""What transformers makes of a GGUF file: a config, and each tensor's name and order of rows."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_bench.modelpool.build import skeleton
from fusion_bench.modelpool.layouts import arranged, positions
from fusion_bench.problems import ConfigError, FusionBenchError
from fusion_bench.storage import write_bytes
from fusion_bench.weights import Config, GgufWeights, Regrouped, Weights, shortened

#: Tensors that models compute themselves.
_COMPUTED = ("rope_freqs", "rope_factors")


def gguf_config(stored: GgufWeights) -> Config:
    """Return the config.json that a file's metadata stand for.

    Raises:
        ConfigError: an architecture that transformers does not read, or metadata of another.
    """
    from transformers import AutoConfig

    (path,), architecture = stored.files, stored.architecture
    _refuse_unknown(path, architecture)
    try:
        with TemporaryDirectory() as folder:  # in which no other file is found
            (Path(folder) / "model.gguf").symlink_to(path.absolute())
            made = AutoConfig.from_pretrained(
                folder, gguf_file="model.gguf", trust_remote_code=False
            )
        if made.get_text_config().num_hidden_layers > len(stored):
            raise ValueError("it has more layers than tensors")
        names = [type(skeleton("AutoModelForCausalLM", made)).__name__]
        made.name_or_path = ""  # the folder from which it was read
        content = {key: _shortest(value) for key, value in made.to_diff_dict().items()}
        return {**content, "dtype": "bfloat16", "architectures": names}
    except Exception as error:  # of odd metadata it raises anything
        reason = (str(error) or type(error).__name__).partition("\n")[0][:200]
        raise ConfigError(
            f"transformers cannot make a config of '{path}' ({architecture}): {reason}. Use the "
            "original model."
        ) from error


def write_gguf_tokenizer(path: Path, directory: Path) -> str | None:
    """Write the tokenizer that transformers makes of a file's metadata.

    Args:
        path: the file.
        directory: where the tokenizer's files go.

    Returns:
        Why there is none, if so.
    """
    from transformers import AutoTokenizer

    try:
        with TemporaryDirectory() as folder, TemporaryDirectory() as made:
            (Path(folder) / "model.gguf").symlink_to(path.absolute())
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file="model.gguf", trust_remote_code=False
            )
            tokenizer.save_pretrained(made)
            files = {file.name: file.read_bytes() for file in Path(made).iterdir()}
    except Exception as error:  # of odd metadata it raises anything
        return (str(error) or type(error).__name__).partition("\n")[0][:200]
    for name, content in files.items():
        write_bytes(directory / name, content)
    return None


def _shortest(value: Any) -> Any:
    """Return numbers in float32, as metadata have them, as the shortest text that means the same.

    This is what was in the original's config: 1e-05, not 9.999999747378752e-06.
    """
    if isinstance(value, dict):
        return {key: _shortest(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shortest(each) for each in value]
    if not isinstance(value, float) or abs(value) > np.finfo(np.float32).max:
        return value
    rounded = np.float32(value)
    return float(str(rounded)) if float(rounded) == value else value


def _refuse_unknown(path: Path, architecture: str) -> None:
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    same = {name.replace("_", "") for name in GGUF_SUPPORTED_ARCHITECTURES}
    if architecture.replace("-", "").replace("_", "") not in same or architecture in GGUF_ARCHS:
        raise ConfigError(
            f"'{path}' holds a model of the architecture {architecture!r}, whose GGUF files are "
            "not read here. Use the original model."
        )


def gguf_weights(stored: GgufWeights, config: Any) -> Weights:
    """Return a file's tensors as the entries of the model's class in transformers.

    Args:
        stored: the file's tensors.
        config: the model's config, as transformers has it.

    Raises:
        FusionBenchError: tensors that transformers does not read into this class by their order of
            rows alone, or that are missing.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    path = stored.files[0]
    model = skeleton("AutoModelForCausalLM", config)
    processor = TENSOR_PROCESSORS.get(stored.architecture, TensorProcessor)(config=config.to_dict())
    specs = {key: stored.spec(key) for key in stored}
    placed: dict[str, Tensor] = {}
    shifts: dict[str, float] = {}
    try:
        names = get_gguf_hf_weights_map(model, processor)
        for key, rows in zip(specs, positions(specs), strict=True):
            result = _processed(processor, names, key, rows.numpy(), placed)
            if result is None or key not in names:
                continue
            shift, moved = result
            placed[names[key]] = moved
            if shift:
                shifts[key] = shift
        entries = {key: arranged(rows, specs) for key, rows in placed.items()}
    except Exception as error:
        raise _not_read(path, f"{error or type(error).__name__}".partition("\n")[0]) from error
    if strange := [key for key, entry in entries.items() if entry is None]:
        raise _not_read(path, f"'{strange[0]}' is transposed there")
    expected = model.state_dict()
    tied = set(model.all_tied_weights_keys or {})
    lacking = [key for key in expected if key not in entries and key not in tied]
    unread = [key for key in specs if key not in names and not key.startswith(_COMPUTED)]
    if lacking:
        lines = [f"lacks '{key}'" for key in lacking]
        raise FusionBenchError(
            f"'{path}' is not a whole model, or has names that are not known.\n  "
            f"{shortened(lines)}" + (f"\n  '{unread[0]}' has no place" if unread else "")
        )
    for key, entry in entries.items():
        shape = list(expected[key].shape) if key in expected else None
        if entry is not None and shape is not None and shape != list(entry.shape):
            raise FusionBenchError(
                f"'{path}': '{key}' is {list(entry.shape)}, and {shape} by the config that is made "
                "of the file.",
                "Put the config.json of the original model beside it.",
            )
    known = {key: entry for key in expected if (entry := entries.get(key)) is not None}
    return Regrouped(GgufWeights(path, shifts), known)


def _processed(
    processor: Any, names: Any, key: str, rows: np.ndarray, placed: dict[str, Tensor]
) -> tuple[float, Tensor] | None:
    """Return what is added to an entry's elements, and where its rows go.

    What is put together of several tensors is placed at once; None is returned for it.
    """

    def process(values: np.ndarray, parsed: dict[str, Tensor]) -> np.ndarray | None:
        result = processor.process(
            weights=values,
            name=key,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": parsed},
        )
        return None if result.name is None else result.weights

    moved = process(rows, placed)
    if moved is None:
        return None
    with np.errstate(all="ignore"):
        zero, one = (process(np.full(rows.shape, value), {}) for value in (0.0, 1.0))
    if (
        zero is None
        or one is None
        or not (zero == zero.flat[0]).all()
        or not (one - zero == 1).all()
    ):
        raise ValueError(f"the numbers of '{key}' are others there")
    shift = float(zero.flat[0])
    return shift, torch.from_numpy(np.ascontiguousarray(moved - round(shift)))


def _not_read(path: Path, reason: str) -> FusionBenchError:
    return FusionBenchError(
        f"'{path}' holds a model whose GGUF files are not read here: {reason}.",
        "Use the original model.",
    )
