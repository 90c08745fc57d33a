"""The files of a model's folder that are read and copied, and their allowed locations.

Libraries read every file with a name that they know. So each such file is checked before any
library reads the folder.
"""

import re
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from fusion_bench.problems import ConfigError

#: A model's configs.
CONFIGS = ("config.json", "generation_config.json")
#: What is told of an adapter's errors, beside it.
ADAPTER_ERRORS, ADAPTER_PICTURE = "adapter_errors.json", "adapter_errors.png"
ADAPTER_FILES = (ADAPTER_ERRORS, ADAPTER_PICTURE)
#: Files of tokenizers.
TOKENIZER = (
    # transformers
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "vocab-src.json",
    "vocab-tgt.json",
    "target_vocab.json",
    "entity_vocab.json",
    "normalizer.json",
    "emoji.json",
    "byte_maps.json",
    "word_shape.json",
    "word_pronunciation.json",
    "prophetnet.tokenizer",
    # sentencepiece
    "tokenizer.model",
    "tokenizer.model.v1",
    "tokenizer.model.v2",
    "tokenizer.model.v3",
    "tokenizer.model.v7",
    "tokenizer.model.v7m1",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "source.spm",
    "target.spm",
    "ice_text.model",
    # tiktoken
    "tiktoken.model",
    "tekken.json",
    "qwen.tiktoken",
    "hy.tiktoken",
    "cl100k_base.tiktoken",
    "o200k_base.tiktoken",
)
#: Files of tokenizers and processors.
PROCESSORS = (
    *TOKENIZER,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
#: The folder of a tokenizer's or processor's further chat templates, each ``<name>.jinja``.
TEMPLATES = "additional_chat_templates"
#: What lists the modules of sentence-transformers, of which a folder's own model is the first.
MODULES = "modules.json"
#: Their configs, the older ones named for the kind of model.
SENTENCE_CONFIGS = (
    "config_sentence_transformers.json",
    *(
        f"sentence_{kind}_config.json"
        for kind in (
            *("bert", "roberta", "distilbert", "camembert", "albert"),
            *("xlm-roberta", "xlnet"),
        )
    ),
)
#: What a module's folder may hold.
MODULE_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
#: All at the top of a folder that is no weights.
KNOWN = (*CONFIGS, *PROCESSORS, MODULES, *SENTENCE_CONFIGS, "adapter_config.json")

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
#: A whole model, which may be named by itself.
_ONE_FILE = ("model.safetensors", "pytorch_model.bin")
#: No tokenizer is larger; the largest that is known has a tenth of it.
_LARGEST = 256 * 2**20
#: Where in its cache the Hub's client keeps files: those of a repository, and those of several.
_BLOB = re.compile(r"models--[^/]+/blobs/[^/]+|blobs/[0-9a-f]{2}/[0-9a-f]{64}")


def own_file(directory: Path, name: str) -> Path:
    """Return the path of a file in a model's folder, if it may be read.

    It must be a regular file of a plausible size, in this folder or in the Hub's cache. Other links
    are not followed because the file may be copied, and merged models are often shared.

    Raises:
        ConfigError: it may not.
    """
    file = directory / name
    try:
        real, home = file.resolve(strict=True), directory.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        if "\0" not in name and file.is_symlink():
            raise ConfigError(f"'{file}' is a broken link. Remove it.") from error
        raise ConfigError(f"There is no '{name}' in '{directory}'.") from error
    if not (_is_inside(real, home) or _is_blob(real, home)):
        instead = f", or name '{real}' itself" if name in _ONE_FILE else ""
        raise ConfigError(
            f"'{file}' is a link to '{real}', which is not a file of the model's folder. It is "
            f"not followed. Replace the link by a copy of the file{instead}."
        )
    refuse_size(str(file), name, _size(file, real))
    return file


def refuse_size(where: str, name: str, size: int) -> None:
    """Refuse a file that is too large for its name; weights may have any size.

    Raises:
        ConfigError: it is.
    """
    if size > _LARGEST and not name.endswith(_WEIGHTS):
        raise ConfigError(
            f"'{where}' has {size // 2**20} MiB; no more than {_LARGEST // 2**20} MiB of it are "
            "read. Remove it, or put the right file in its place."
        )


def check_folder(directory: Path) -> None:
    """Check all files in a folder that libraries may read on their own.

    Raises:
        ConfigError: one of them may not be read.
    """
    try:
        there = {file.name.casefold() for file in directory.iterdir()}
    except OSError:  # whoever reads a file there tells more
        return
    for name in KNOWN:  # file systems may ignore case
        if name.casefold() in there and not _is_plain(directory / name):
            own_file(directory, name)
    if TEMPLATES.casefold() in there and (directory / TEMPLATES).is_dir():
        for template in (directory / TEMPLATES).glob("*.jinja"):
            own_file(directory, f"{TEMPLATES}/{template.name}")


def _is_plain(file: Path) -> bool:
    """Return whether a file is no link and not large, or not there: it needs no closer look."""
    try:
        state = file.lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(state.st_mode) and state.st_size <= _LARGEST


def module_folders(modules: Any, where: str) -> dict[str, str]:
    """Return the folder and class of each module in a ``modules.json``.

    Args:
        modules: the content of the file.
        where: the file, for messages.

    Raises:
        ConfigError: it is not such a list, or names a folder elsewhere.
    """
    folders = {}
    for module in modules if isinstance(modules, list) else [None]:
        path, kind = (
            (module.get("path"), module.get("type")) if isinstance(module, dict) else (None, None)
        )
        if not (isinstance(path, str) and isinstance(kind, str)):
            raise ConfigError(
                f"'{where}' is not a list of modules. Download it again, or remove it."
            )
        if not path:
            continue  # the model itself
        if PurePosixPath(path).name != path or path.startswith(".") or re.search(r"[\\\0]", path):
            raise ConfigError(
                f"'{where}' names the folder {path!r}, which is not a folder next to it. It is "
                "refused."
            )
        folders[path] = kind
    return folders


def _is_inside(real: Path, home: Path) -> bool:
    """Return whether a file is in a folder and not hidden, like git's files."""
    if not real.is_relative_to(home):
        return False
    return not any(part.startswith(".") for part in real.relative_to(home).parts)


def _is_blob(real: Path, home: Path) -> bool:
    """Return whether a file is a blob in a cache of the Hub's client.

    That is the cache of the folder, or else the user's: earlier clients filled a chosen folder with
    links. File names there are hashes of the content, so an attacker cannot guess them.
    """
    from huggingface_hub import constants

    caches = [Path(constants.HF_HUB_CACHE).resolve()]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        repository = home.parents[1]
        if real.parent == repository / "blobs":
            return True
        caches.append(repository.parent / "blobs")
    for cache in caches:
        place = cache.parent if cache.name == "blobs" else cache
        if real.is_relative_to(cache) and _BLOB.fullmatch(real.relative_to(place).as_posix()):
            return True
    return False


def _size(file: Path, real: Path) -> int:
    state = real.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ConfigError(f"'{file}' is not a regular file. Remove it.")
    return state.st_size
