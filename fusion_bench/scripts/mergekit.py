"""The options of mergekit's commands: those that we have, and what to do in place of the others."""

import logging
import re
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator

from fusion_bench.problems import FusionBenchError, Problem, Problems

log = logging.getLogger(__name__)

#: Of a device: they mean the same here.
_DEVICE = ("cuda", "gpu_rich")
#: What is always so, or never needed, with the reason.
_IDLE = {
    "lazy_unpickle": "files are always read entry by entry",
    "lazy": "stages are not stored",
    "lazy_loader": "files are always read entry by entry",
    "low_cpu_memory": "memory is always small",
    "read_to_gpu": "entries are copied to the device when they are merged",
    "clone_tensors": "nothing that is merged shares memory with a file",
    "multi_gpu": "one device is enough",
    "async_write": "reading, merging and writing always overlap",
    "write_model_card": "a model card is always written",
    "copy_tokenizer": "the tokenizer is always copied",
    "safe_serialization": "files are always safetensors",
    "i_understand_this_is_not_useful_without_training": "equal experts are merged as well",
    "verbose": "the log tells the steps",
    "quiet": "the progress bar is only shown in a terminal",
}
#: What may not be turned off, and what to do.
_ALWAYS = {
    "write_model_card": "a model card is always written. Remove README.md afterwards.",
    "copy_tokenizer": "the tokenizer is always copied. Remove its files afterwards.",
    "safe_serialization": "weights are only written as safetensors.",
}
#: Options that we do not have, and what to do.
_LACKING = {
    "unsafe_truncate_embeddings": "rows are never cut off by their numbers. Match them by their "
    "tokens with 'tokenizer_source: union' in the recipe, or merge the rows that all models have "
    "and keep the others of the base, with modelpool.policy.on_vocabulary=common.",
    "load_in_4bit": "models are read as they are. Remove it.",
    "load_in_8bit": "models are read as they are. Remove it.",
}
#: Options with a value that are not needed, with the reason.
_IDLE_VALUES = {
    "lora_merge_cache": "adapters are merged entry by entry, without files",
    "lora_merge_dtype": "adapters are merged in float32",
    "write_threads": "the number of threads follows the machine",
    "intermediate_dir": "stages are computed when they are read, and not stored",
}
#: Options with a value that are set elsewhere.
_ELSEWHERE = {
    "out_path": "name the folder behind the recipe: 'merge recipe.yaml {value}'.",
    "transformers_cache": "set HF_HUB_CACHE={value} in the environment.",
    "num_threads": "set OMP_NUM_THREADS={value} in the environment.",
    "device": "give modelpool.policy.device={value}.",
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def add_arguments(parser: ArgumentParser) -> None:
    """Add mergekit's options; ``--help`` does not show them, docs/from_mergekit.md does."""

    def add(*names: str, **more: object) -> None:
        parser.add_argument(*names, help=SUPPRESS, **more)  # type: ignore[arg-type]

    for name in (*_DEVICE, "allow_crimes", *_IDLE, *_LACKING):
        more = ("-v",) if name == "verbose" else ("-q",) if name == "quiet" else ()
        add(_option(name), *more, action=BooleanOptionalAction, dest=name)
    for name in (*_IDLE_VALUES, *_ELSEWHERE, "out_shard_size", "random_seed"):
        short = {"num_threads": ("-j",), "intermediate_dir": ("-I",)}.get(name, ())
        add(_option(name), *short, dest=name)


def words(arguments: Namespace) -> Iterator[str]:
    """Yield the settings that the options mean; say what is not needed.

    Raises:
        FusionBenchError: options that we do not have, with what to do.
    """
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    problems = Problems()
    for key, remedy in _ELSEWHERE.items():
        if key in given:
            problems.add([_problem(key, f"In place of it, {remedy.format(value=given[key])}")])
    for key, reason in _LACKING.items():
        if given.get(key):
            problems.add([_problem(key, reason)])
    for key, reason in _ALWAYS.items():
        if given.get(key) is False:
            problems.add([_problem(f"no_{key}", reason)])
    with problems.collect():
        if (size := given.get("out_shard_size")) is not None:
            yield f"modelpool.max_shard_size={_bytes(str(size))}"
    problems.raise_all()
    if any(given.get(name) for name in _DEVICE):
        yield "modelpool.policy.device=cuda"
    if given.get("allow_crimes"):
        yield "modelpool.policy.on_config=warn"
    if "random_seed" in given:
        yield f"seed={given['random_seed']}"
    for key, reason in {**_IDLE, **_IDLE_VALUES}.items():
        if key in given and key not in ("verbose", "quiet", "write_model_card", "copy_tokenizer"):
            log.info("%s is not needed: %s.", _option(key), reason)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _problem(name: str, reason: str) -> Problem:
    return Problem((), f"{_option(name)}: {reason}")


def _bytes(size: str) -> int:
    """Return a size such as ``5B`` in bytes; it counts the bytes of a file.

    Raises:
        FusionBenchError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", size.upper())
    if match is None or float(match[1]) == 0:
        reason = f"--out-shard-size: '{size}' is not a size."
        raise FusionBenchError(reason, "Give a number of bytes, such as 5B.")
    return int(float(match[1]) * _UNITS[match[2]])
