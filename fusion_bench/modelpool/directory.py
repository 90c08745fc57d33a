"""A merged model's directory: weights, companions, recipe and card, whole or not at all."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fusion_bench.companions import (
    MODULE_FILES,
    MODULES,
    PROCESSORS,
    SENTENCE_CONFIGS,
    TEMPLATES,
    module_folders,
)
from fusion_bench.modelpool.card import Origin, model_card, recipe
from fusion_bench.modelpool.usage import adapter_usage, of_folder, usage
from fusion_bench.problems import EnvironmentProblem, FusionBenchError
from fusion_bench.repository import Repository
from fusion_bench.storage import file_sha256, read_json, whole_directory, write_text
from fusion_bench.weights import (
    Checkpoint,
    Weights,
    in_memory,
    open_checkpoint,
    write_checkpoints,
)

log = logging.getLogger(__name__)

#: The library whose modules are known.
_OWN_MODULES = "sentence_transformers."
#: So many files that stay behind are named in the log.
_NAMED = 20


@dataclass(frozen=True)
class Folder:
    """A model to write as a folder.

    Attributes:
        path: the directory, absolute; what is there is replaced.
        weights: computed as they are written, under the keys that they are to have.
        config: the run's config.
        write_companions: puts config, tokenizer and processor files into a directory; called
            first, so that one that is not there is noticed before the work.
        name: of the weights' file, in place of ``model``.
        notes: sentences for the card.
    """

    path: Path
    weights: Weights
    config: Mapping[str, Any] | None
    write_companions: Callable[[Path], None]
    name: str = "model"
    notes: tuple[str, ...] = ()


def write_directories(
    folders: Sequence[Folder], *, sources: Mapping[str, Origin], max_shard_size: int | str
) -> None:
    """Write models as Hugging Face directories, in one pass over what they are made of.

    The sources' files are hashed while the weights are written; the recipe is in the weights'
    metadata and in the card.

    Args:
        folders: the models.
        sources: what they were made from.
        max_shard_size: of the weights' files.

    Raises:
        FusionBenchError: a disk that is full or fails, or what is wrong with the weights.
    """
    with ThreadPoolExecutor(thread_name_prefix="hash") as pool, ExitStack() as ended:
        ended.callback(pool.shutdown, wait=False, cancel_futures=True)  # where it ends early
        files = {file for source in sources.values() for file in source.files}
        hashes = {file: pool.submit(file_sha256, file) for file in files}
        with ExitStack() as begun:
            parts = []
            for folder in folders:
                begun.enter_context(_plain_errors(folder.path))
                directory = begun.enter_context(whole_directory(folder.path))
                parts.append(_Part(folder, directory, sources, lambda f: hashes[f].result()))
            write_checkpoints([part.checkpoint(max_shard_size) for part in parts])
            for part in parts:
                part.write_card()


class _Part:
    """A folder that is being written.

    Args:
        folder: what it will be.
        directory: where it is written.
        sources: what the weights were made from.
        sha256: waits for a file's hash.
    """

    def __init__(
        self,
        folder: Folder,
        directory: Path,
        sources: Mapping[str, Origin],
        sha256: Callable[[Path], str],
    ):
        self._folder, self._directory, self._sources = folder, directory, sources
        folder.write_companions(directory)
        self._beside = {
            file.relative_to(directory).as_posix(): file_sha256(file)
            for file in sorted(directory.rglob("*"))
            if file.is_file()
        }
        self._final = cache(lambda: self._recipe(sha256))

    def _recipe(self, sha256: Callable[[Path], str]) -> dict[str, Any]:
        folder = self._folder
        return recipe(folder.config, self._sources, sha256, self._beside, folder.path)

    def checkpoint(self, max_shard_size: int | str) -> Checkpoint:
        """Return the weights' files."""
        pending = self._recipe(lambda file: "0" * 64)  # as long as a hash
        return Checkpoint(
            self._folder.weights,
            self._directory,
            max_shard_size=max_shard_size,
            metadata={"fusion_bench": json.dumps(pending)},
            finish=lambda: {"fusion_bench": json.dumps(self._final())},
            name=self._folder.name,
        )

    def write_card(self) -> None:
        """Write the card, once the weights are there."""
        name, directory = self._folder.path.name, self._directory
        adapter = self._folder.name != "model"
        code, notes = _usage(name, directory), self._folder.notes
        card = model_card(name, self._final(), code, adapter=adapter, notes=notes)
        write_text(directory / "README.md", card)


def _usage(name: str, directory: Path) -> str | None:
    """Return the code that uses a model; None without a config."""
    adapter = directory / "adapter_config.json"
    if adapter.exists():
        code = adapter_usage(name, read_json(adapter))
        return None if code is None else of_folder(code)
    file = directory / "config.json"
    content = read_json(file) if file.exists() else None
    if not isinstance(content, dict):
        return None
    return of_folder(usage(name, content, {path.name for path in directory.iterdir()}))


def processor_files(repository: Repository) -> list[str]:
    """Return the names of a repository's files of tokenizers and processors."""
    templates = [n for n in repository.inside(TEMPLATES) if n.endswith(".jinja")]
    return sorted([*(repository.files & set(PROCESSORS)), *templates])


def sentence_transformer(repository: Repository) -> list[str]:
    """Return the names of the files by which sentence-transformers encodes with a model.

    Of the modules that it has beside the model itself, those of that library are known.

    Raises:
        ConfigError: a list of modules that is no such, or names folders elsewhere.
    """
    if MODULES not in repository.files:
        return []
    file = repository.fetch(MODULES) / MODULES
    modules = module_folders(read_json(file), str(file))
    if foreign := sorted(kind for kind in modules.values() if not kind.startswith(_OWN_MODULES)):
        log.warning(
            "'%s' has modules of its own code (%s), which is not copied: what is saved is no model "
            "of sentence-transformers.",
            repository.name,
            foreign[0],
        )
        return []
    names = [MODULES, *(repository.files & set(SENTENCE_CONFIGS))]
    for folder in modules:
        known = {f"{folder}/{name}" for name in MODULE_FILES}
        names += repository.inside(folder) & known
    return sorted(names)


def copy_files(repository: Repository, names: Iterable[str], directory: Path) -> None:
    """Copy a repository's files into a directory; weights become safetensors.

    Raises:
        ConfigError: one of them may not be read.
    """
    names = list(names)
    if not names:
        return
    place = repository.fetch(*names)
    for name in names:
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        if target.suffix == ".bin":  # a pickle, which might run code where the copy is read
            safe = target.with_suffix("").with_name("model.safetensors")
            save_file(in_memory(open_checkpoint(place / name)), safe, metadata={"format": "pt"})
        else:
            shutil.copyfile(place / name, target)


def tell_what_is_left(repository: Repository, copied: Collection[str]) -> None:
    """Name in the log what a model's folder holds that does not go with a merged model."""
    weights = (".safetensors", ".bin", ".index.json")
    left = [
        *(name for name in repository.files - set(copied) if not name.endswith(weights)),
        *(f"{name}/" for name in repository.folders - {c.partition("/")[0] for c in copied}),
    ]
    if left := sorted(name for name in left if not name.startswith((".", "README"))):
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        log.info("Not copied from '%s': %s%s.", repository.name, ", ".join(left[:_NAMED]), more)
    if modules := sorted(n for n in copied if "/" in n and n.endswith((".safetensors", ".bin"))):
        log.warning(
            "These weights of '%s' are copied, not merged: %s.", repository.name, ", ".join(modules)
        )


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Speak of the path that was asked for, not of the place beside it that is written to first."""
    aside = re.compile(re.escape(str(path.parent / f".{path.name}-")) + r"\w{8}/new")
    try:
        yield
    except FusionBenchError as error:
        error.problems = tuple(
            replace(problem, reason=aside.sub(lambda _: str(path), problem.reason))
            for problem in error.problems
        )
        raise
    except OSError as error:
        raise EnvironmentProblem(f"Cannot write '{path}': {error.strerror or error}.") from error
