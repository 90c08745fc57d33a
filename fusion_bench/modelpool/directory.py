"""A merged model's directory: weights, companions, recipe and card, whole or not at all."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from fusion_bench.errors import FusionBenchError, WorldError
from fusion_bench.modelpool.card import Source, model_card, recipe
from fusion_bench.repository import Repository
from fusion_bench.storage import file_sha256, whole_directory, write_text
from fusion_bench.weights import Weights, write_checkpoint

#: What is copied beside merged weights; no weights, no code.
CONFIGS = ("config.json", "generation_config.json")
PROCESSORS = (
    "*token*.json",
    "*token*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "sentencepiece*.model",
    "spiece.model",
    "spm.model",
    "chat_template*",
    "*processor_config.json",
)


def write_directory(
    path: Path,
    weights: Weights,
    *,
    sources: Mapping[str, Source],
    config: Mapping[str, Any] | None,
    max_shard_size: int | str,
    write_companions: Callable[[Path], None],
) -> None:
    """Write a model as a Hugging Face directory, in place of what is at ``path``.

    The sources' files are hashed while the weights are written; the recipe is in the weights'
    metadata and in the card.

    Args:
        path: the directory, absolute.
        weights: computed as they are written, under the keys that they are to have.
        sources: what they were made from.
        config: the run's config.
        max_shard_size: of the weights' files.
        write_companions: puts config, tokenizer and processor files into a directory; called
            first, so that one that is not there is noticed before the work.

    Raises:
        FusionBenchError: a disk that is full or fails, or what is wrong with the weights.
    """
    with ThreadPoolExecutor(thread_name_prefix="hash") as pool, ExitStack() as ended:
        ended.callback(pool.shutdown, wait=False, cancel_futures=True)  # where it ends early
        files = {file for source in sources.values() for file in source.files}
        hashes = {file: pool.submit(file_sha256, file) for file in files}
        pending = recipe(config, sources, lambda file: "0" * 64)  # as long as a hash
        final = cache(lambda: recipe(config, sources, lambda file: hashes[file].result()))
        with _plain_errors(path), whole_directory(path) as directory:
            write_companions(directory)
            write_checkpoint(
                weights,
                directory,
                max_shard_size=max_shard_size,
                metadata={"fusion_bench": json.dumps(pending)},
                finish=lambda: {"fusion_bench": json.dumps(final())},
            )
            write_text(directory / "README.md", model_card(path.name, final()))


def fitting(repository: Repository, patterns: tuple[str, ...]) -> list[str]:
    """Return the names of a repository's files that fit the patterns."""
    return [file for file in repository.files if any(fnmatch(file, p) for p in patterns)]


def copy_files(repository: Repository, patterns: tuple[str, ...], directory: Path) -> list[str]:
    """Copy the files that fit the patterns; return their names."""
    names = fitting(repository, patterns)
    if names:
        place = repository.fetch(*names)
        for name in names:
            shutil.copyfile(place / name, directory / name)
    return names


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Speak of the path that was asked for, not of the place beside it that is written to first."""
    aside = re.compile(re.escape(str(path.parent / f".{path.name}-")) + r"\w{8}/new")
    try:
        yield
    except FusionBenchError as error:
        raise type(error)(aside.sub(lambda _: str(path), str(error))) from error
    except OSError as error:
        raise WorldError(f"Cannot write '{path}': {error.strerror or error}.") from error
