"""The rules for addresses: which ones may be opened, for every caller.

``datasets`` passes every address to fsspec, which supports dozens of schemes and chains of them
(``reference://…::http://…``). Some schemes render templates that read the environment and send it
to a server. So only local paths, ``hf://``, and ``http(s)://`` in the user's own config are
allowed. A dataset's card, metadata and rows may name only local files in the dataset's own folder.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from glob import glob
from pathlib import Path
from threading import RLock
from typing import IO, TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import yaml
from omegaconf import OmegaConf

from fusion_bench.problems import ConfigError, Problem

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_LOADS = ("datasets.load_dataset", "datasets.load_from_disk")
#: Arguments of theirs that say where something is.
_PLACES = ("path", "data_files", "data_dir", "dataset_path", "cache_dir")
_WEB = ("http", "https")
#: Schemes of fsspec that unpack what another address, which is looked at as well, leads to.
_ARCHIVES = ("zip", "gzip", "bz2", "lz4", "xz", "zstd")
#: Pictures may be links that lead out of a folder; what is read as text or as tables may not.
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
#: Files in which a folder of data describes itself to ``datasets``.
_CARDS = ("README.md", ".huggingface.yaml")
_LINES_OF_JSON = (".jsonl", ".ndjson", ".json")
_MOST_OF_A_CARD = 10 * 2**20
_MOST_OF_A_PICTURE = 2**30
_LOCK = RLock()


class AddressError(ConfigError):
    """An address or a file must not be opened."""


def address_problems(target: str, node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the key and the problem of each forbidden address in a call's arguments."""
    if target.startswith("fusion_bench."):
        return  # they look for paths and repositories alone
    for argument, value in node.items():
        place = target in _LOADS and argument in _PLACES
        for key, text in _texts(value, str(argument)):
            if (place or "://" in text) and (mistake := _mistake(text)):
                yield key, mistake


def refuse_addresses(node: Mapping[str, Any]) -> None:
    """Refuse forbidden addresses in a call's arguments.

    Raises:
        AddressError: with a problem for each, whose place is relative to the node.
    """
    found = address_problems(str(node.get("_target_")), node)
    if problems := tuple(Problem((key,), mistake) for key, mistake in found):
        error = AddressError(problems[0].reason)
        error.problems = problems
        raise error


def _mistake(address: str) -> str | None:
    """Return the problem of an address in a user's config, or ``None``."""
    scheme = _scheme(address)
    if "::" in address:
        return f"'{address}' is a chain of addresses, which is not supported. Name one file."
    if scheme in ("file", "local"):
        return f"'{address}' is not supported. Give the path instead."
    if scheme not in ("", "hf", *_WEB):
        return (
            f"'{address}' is not supported: '{scheme}' is not an allowed scheme. Download the "
            "data and give the local path."
        )
    return None


def _scheme(address: str) -> str:
    """Return an address's scheme as fsspec parses it; empty for a path."""
    scheme, separator, _ = address.partition("://")
    if separator:
        return "" if len(scheme) == 1 else scheme  # a drive's letter
    return "data" if address.startswith("data:") else ""


def _texts(value: Any, key: str, seen: tuple[int, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield each text in a value, with its key; what an own ``_target_`` is given is left out."""
    if isinstance(value, str | os.PathLike):
        yield key, os.fspath(value)
    elif isinstance(value, Mapping) and "_target_" not in value and id(value) not in seen:
        for name, child in value.items():
            yield from _texts(child, f"{key}.{name}", (*seen, id(value)))
    elif isinstance(value, list | tuple) and id(value) not in seen:
        for index, child in enumerate(value):
            yield from _texts(child, f"{key}[{index}]", (*seen, id(value)))


@dataclass(frozen=True)
class Folders:
    """The folders and files of a dataset.

    Attributes:
        own: folders and files in the user's config; ``None`` allows all, for a dataset from code
            that the user trusts.
    """

    own: tuple[Path, ...] | None = ()

    @classmethod
    def of(cls, node: Any) -> "Folders":
        """Return the folders of the dataset of a config node."""
        node = _plain(node)
        if not isinstance(node, Mapping) or node.get("_target_") not in _LOADS:
            return cls(None)
        path, data_dir = (str(node.get(key) or "") for key in ("path", "data_dir"))
        here = _home(path)
        # As 'datasets' takes relative names: in the folder, or where the path names a reader, here.
        bases = [here, here / data_dir] if here.is_dir() else []
        bases += [] if "/" in path and not bases else [Path(), _home(data_dir)]
        own: list[Path] = []
        for argument in _PLACES:
            for _, text in _texts(node.get(argument), argument):
                if _scheme(text):
                    continue
                named = _home(text)
                for base in [Path()] if named.is_absolute() else bases:
                    place = _fixed_part(_absolute(base / named))
                    if place.exists():  # what the user names may be a link itself
                        own += [place if place.is_dir() else place.parent]
                        own += [Path(os.path.realpath(place))]
        return cls(tuple(dict.fromkeys(own)))

    def refuse_outside(self, path: str) -> None:
        """Refuse a local data file outside the dataset's folders.

        Links to images are always followed because folders of links are common. Other links must
        not lead out.

        Raises:
            AddressError: it lies elsewhere.
        """
        if self.own is None:
            return
        place, real = _absolute(Path(path)), Path(os.path.realpath(path))
        if not self._hold(place):
            raise AddressError(
                f"'{path}' is outside the dataset's folder and is not opened. If you trust it, "
                "name it in the config: 'data_files: …'."
            )
        if place.suffix.lower() not in _PICTURES and not self._hold(real, real=True):
            raise AddressError(
                f"'{path}' is a link that leads out of the dataset's folder, to '{real}'. If you "
                "trust it, name the target in the config: 'data_files: …'."
            )

    def _hold(self, path: Path, *, real: bool = False) -> bool:
        known = [*(self.own or ()), *_caches()]
        known = [Path(os.path.realpath(place)) for place in known] if real else known
        return any(path.is_relative_to(place) for place in known)

    def holds(self, name: str) -> bool:
        """Return whether an image with this name is in the dataset's folders."""
        return self.own is None or self._hold(_absolute(Path(name)))

    def picture(self, name: str) -> bytes:
        """Return the content of an image that a row names.

        Raises:
            AddressError: it is not a local file of the dataset.
            OSError: it cannot be read.
        """
        scheme, _, rest = name.partition("://")
        member, chained, archive = rest.partition("::")
        if scheme == "zip" and chained and not _scheme(archive) and "::" not in archive:
            return self._unpacked(archive, member)  # as 'datasets' names what lies in an archive
        if _scheme(name) or "::" in name:
            raise AddressError(
                f"it names the address '{name}', and addresses in rows are not fetched. Use a "
                "copy of the dataset that contains its images"
            )
        if not self.holds(name):
            raise AddressError(f"it names '{name}', which is outside the dataset's folder")
        with _opened(name) as file:
            return file.read()

    def _unpacked(self, archive: str, member: str) -> bytes:
        self.refuse_outside(archive)
        try:
            with _opened(archive) as file, ZipFile(file) as packed:
                if packed.getinfo(member).file_size > _MOST_OF_A_PICTURE:
                    raise OSError(f"'{member}' is too large for an image")
                return packed.read(member)
        except (BadZipFile, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            raise OSError(f"'{member}' cannot be read from '{archive}': {error}") from error


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _opened(name: str) -> IO[bytes]:
    """Open a regular file, but no pipe or device, which could block forever."""
    try:
        file = open(name, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    except ValueError as error:  # a NUL in its name
        raise OSError(f"{name!r} is not a file name") from error
    state = os.fstat(file.fileno())
    if stat.S_ISREG(state.st_mode) and state.st_size <= _MOST_OF_A_PICTURE:
        return file
    file.close()
    raise OSError(f"'{name}' is not a regular file of a plausible size")


def _absolute(path: Path) -> Path:
    """Return the path without ``..``; links stay as they are."""
    return Path(os.path.abspath(path))  # noqa: PTH100, for Path leaves '..' in or follows links


def _home(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111, for Path raises where there is no home


def _fixed_part(path: Path) -> Path:
    """Return the fixed part of a pattern, or its folder."""
    for parent in reversed([path, *path.parents]):
        if any(sign in parent.name for sign in "*?["):
            return parent.parent
    return path


def _caches() -> Iterable[Path]:
    """Return the cache directories of the libraries."""
    import datasets
    from huggingface_hub import constants

    return [Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)]


@contextmanager
def fence(node: Any, *scratch: Path) -> Iterator[None]:
    """Limit what ``datasets`` may open while it loads a dataset's node.

    In this context, fsspec supports only the allowed schemes and the dataset's own local files,
    also for names in a card.

    Args:
        node: the config's node.
        scratch: more directories of the caller's own.

    Raises:
        AddressError: the config, the data set's card or one of its files names what is not opened.
    """
    node = _plain(node)
    folders = Folders.of(node)
    if folders.own is None:
        yield
        return
    folders = Folders((*folders.own, *scratch))
    refuse_addresses(node)
    _check_card(node, folders)

    import datasets  # noqa: F401, for it registers schemes of its own
    from fsspec.registry import _registry, get_filesystem_class, known_implementations

    named = [text for key in _PLACES for _, text in _texts(node.get(key), key)]
    schemes = {_scheme(text) for text in named}
    path = node.get("path") or node.get("dataset_path")
    if not isinstance(path, str) or not _home(path).exists():
        schemes.add("hf")
    allowed = {*_ARCHIVES, *schemes.intersection(("hf", *_WEB))}
    refused = {scheme: _refusing(scheme) for scheme in {*known_implementations, *_registry}}
    kept = {scheme: get_filesystem_class(scheme) for scheme in allowed & refused.keys()}
    local = _fenced(folders)
    with _LOCK:
        before = dict(_registry)
        _registry.update(refused | kept | {"file": local, "local": local})
        try:
            yield
        finally:
            _registry.clear()
            _registry.update(before)


@cache
def _refusing(scheme: str) -> "type[AbstractFileSystem]":
    """Return a file system class for fsspec that refuses a scheme."""
    from fsspec import AbstractFileSystem

    class Refusing(AbstractFileSystem):
        cachable = False
        protocol = scheme

        def __init__(self, *args: Any, **kwargs: Any):
            raise AddressError(
                f"it names an address with the scheme '{scheme}', which is not supported"
            )

        @staticmethod
        def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
            shown = path.partition("?")[0]
            raise AddressError(f"it names the address '{shown}', which is not supported")

    return Refusing


def _fenced(folders: Folders) -> "type[AbstractFileSystem]":
    """Return fsspec's local file system, limited to a dataset's own files."""
    from fsspec.implementations.local import LocalFileSystem

    class Fenced(LocalFileSystem):
        def glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> Any:
            found = super().glob(path, maxdepth, **kwargs)
            for file in filter(os.path.isfile, found):
                folders.refuse_outside(file)
                if file.lower().endswith(_LINES_OF_JSON):
                    _refuse_null(file)
            return found

        def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
            if "r" in mode:
                folders.refuse_outside(path)
            return super()._open(path, mode, *args, **kwargs)

        def __reduce__(self) -> tuple[Any, ...]:
            return LocalFileSystem, (self.auto_mkdir,)  # for another process, which writes its part

    return Fenced


def _refuse_null(file: str) -> None:
    """Refuse JSON lines with a ``null`` line because pyarrow crashes on it.

    Raises:
        AddressError: there is such a line.
    """
    with open(file, "rb") as lines:  # noqa: PTH123, as it is named by fsspec
        for number, line in enumerate(lines, start=1):
            text = line.lstrip()
            if number == 1 and text.startswith(b"["):
                return  # one list, which is read otherwise
            if text.startswith(b"null"):
                raise AddressError(f"line {number} of '{file}' is 'null'. Remove it.")


def _check_card(node: Mapping[str, Any], folders: Folders) -> None:
    """Check the file names in the card of a local folder before ``datasets`` reads it.

    Raises:
        AddressError: it names other files than the folder's, or cannot be read.
    """
    path = node.get("path")
    folder = _home(path) if isinstance(path, str) else None
    for name in _CARDS:
        if folder is None or not (file := folder / name).exists():
            continue
        folders.refuse_outside(str(file))
        for key, text in _named_by(file):
            names_data = key.partition(".")[2].startswith(("data_files", "data_dir"))
            up = ".." in Path(text).parts or Path(text).is_absolute()
            if "://" in text or (names_data and ("::" in text or _scheme(text) or up)):
                raise AddressError(
                    f"'{file}' names '{text}' ({key}). A card may name only files in its own "
                    "folder. Correct it, or name the files in the config: 'data_files: …'."
                )


def files_by_card(folder: Path) -> list[Path] | None:
    """Return the files that the ``configs`` of a folder's card name; None without such a card.

    Raises:
        AddressError: a card that cannot be read.
    """
    cards = [folder / name for name in _CARDS if (folder / name).is_file()]
    named = [each for card in cards for each in _named_by(card)]
    if not named:
        return None
    patterns = {
        text for key, text in named if key.partition(".")[2].startswith(("data_files", "data_dir"))
    } or {"**"}
    places = {
        folder / place
        for pattern in patterns
        for place in glob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207 as a library does
    }
    inside = (file for place in places if place.is_dir() for file in place.rglob("*"))
    return sorted(file for file in {*places, *inside} if file.is_file())


def _named_by(card: Path) -> Iterator[tuple[str, str]]:
    """Yield the texts under ``configs`` of a card, with their keys."""
    try:
        with _opened(str(card)) as file:
            content = file.read(_MOST_OF_A_CARD + 1)
        if len(content) > _MOST_OF_A_CARD:
            raise ValueError("it is too large")
        text = content.decode()
        if card.suffix == ".md":
            from huggingface_hub.repocard import REGEX_YAML_BLOCK

            block = REGEX_YAML_BLOCK.search(text)
            text = block[2] if block else ""
        named = _named_in(text)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())
        raise AddressError(f"'{card}' cannot be read ({reason}). Correct it.") from error
    yield from named


@lru_cache(maxsize=32)  # a card is looked at for each split, and to parse it takes milliseconds
def _named_in(text: str) -> tuple[tuple[str, str], ...]:
    said = yaml.safe_load(text)
    return tuple(_texts(said.get("configs") if isinstance(said, Mapping) else None, "configs"))
