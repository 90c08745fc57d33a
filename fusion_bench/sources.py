"""Where a name in a config points to, and plain words for when it cannot be read."""

import hashlib
import logging
import os
import re
import shutil
import sys
import time
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from difflib import get_close_matches
from errno import EINVAL
from functools import lru_cache, partial
from pathlib import Path
from pickle import PickleError
from traceback import walk_tb
from typing import Any, TypeVar

from omegaconf import OmegaConf

from fusion_bench.addresses import AddressError, fence, files_by_card, refuse_addresses
from fusion_bench.command import is_there
from fusion_bench.instantiate import instantiate
from fusion_bench.network import (
    DamagedError,
    asked_to_wait,
    blobs_of,
    broke_off,
    may_pass,
    patiently,
    refuse_damaged,
    status,
)
from fusion_bench.problems import (
    ConfigError,
    EnvironmentProblem,
    FusionBenchError,
    chain,
    did_you_mean,
)
from fusion_bench.storage import cache_dir
from fusion_bench.trust import TRUST_REMOTE_CODE

T = TypeVar("T")

log = logging.getLogger(__name__)

#: What names of embedded models begin with.
ZOO = "zoo:"
_LOADS = "datasets.load_dataset"
_PRETRAINED = "pretrained_model_name_or_path"
_REMEDY = "Delete this copy and fetch it again."
_DAMAGED = f"its weights are damaged. {_REMEDY}"
#: What reads files that nobody has looked at before, and fails in any way on bad ones.
_LIBRARIES = {"dataset": "datasets"}


def resolve(name: str) -> str:
    """Return what ``from_pretrained`` takes for a name in a config.

    ``zoo:<model>`` is a directory of the embedded zoo, and whatever exists here is itself, as an
    absolute path. Anything else is the name of a repository on the Hub.

    Raises:
        ConfigError: a path that does not exist, or what can be no repository's name.
    """
    if name.startswith(ZOO):
        from fusion_bench.zoo import families

        model = name.removeprefix(ZOO)
        return str(families.find(model).model_path(model))
    if _exists(name):
        return str(_path(name).absolute())
    refuse_missing_path(name)

    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"'{name}' is neither an existing path nor a repository on the Hub, whose names look "
            "like 'owner/name'."
        ) from error
    return name


def unbuilt(name: str) -> Path | None:
    """Return where the zoo will be built for a ``zoo:`` name; None where it is, or for others.

    Raises:
        FusionBenchError: the zoo has no such model.
    """
    if not name.startswith(ZOO):
        return None
    from fusion_bench.zoo import families

    place = families.find(name.removeprefix(ZOO)).place()
    return None if place.is_dir() else place


@contextmanager
def reading(kind: str, name: str) -> Iterator[None]:
    """Read a ``model``, ``dataset`` or ``processor``; what goes wrong is said in one line.

    The libraries try for minutes to reach a Hub that is out of reach, even where all files are in
    the local cache. So the Hub is looked for first, and without it they read the cache alone.
    Names without a slash are not looked for: they may be a config's own key.

    Raises:
        ConfigError: what was read is not there, is broken, or is not for us; the library's
            exception is its cause. Exceptions that speak of the program pass through unchanged.
        EnvironmentProblem: the network, the Hub or the disk failed.
    """
    refuse_missing_path(name)
    offline = _why_offline() if _on_hub(name) or _is_offline(name) else None
    with _cache_only() if offline else nullcontext():
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and _is_in_cache(error.filename):
                raise EnvironmentProblem(
                    f"Cannot read the {kind} '{name}': the cache '{cache_dir()}' cannot be written "
                    f"to ({error.strerror}). Set FUSION_BENCH_CACHE to a directory that can."
                ) from error
            if refusal := next((e for e in chain(error) if isinstance(e, AddressError)), None):
                raise AddressError(f"Cannot read the {kind} '{name}': {refusal}") from error
            if kind_and_reason := _reason(kind, name, error, offline):
                refused, reason = kind_and_reason
                if refused is EnvironmentProblem and "/" not in name:
                    near = _nearest(name, _siblings(Path(name)))
                    said = f"there is no folder '{name}' here"
                    reason = f"{said}. {near}" if near else f"{said}, and {reason}"
                raise refused(f"Cannot read the {kind} '{name}':", reason) from error
            raise
    if offline:
        log.info("Read the %s '%s' only from the local cache.", kind, name)


def read(kind: str, name: str, call: Callable[[], T]) -> T:
    """Return what ``call`` reads; while the Hub fails it is called again.

    Raises:
        FusionBenchError: as ``reading``.
    """
    with reading(kind, name):
        return patiently(call) if _on_hub(name) else call()


def load(kind: str, node: Any, called: str = "") -> Any:
    """Return what a config node asks for: a call of ``from_pretrained`` or ``load_dataset``.

    A ``pretrained_model_name_or_path`` in it may be whatever ``resolve`` takes.

    Args:
        kind: ``model``, ``dataset`` or ``processor``.
        node: the node; places of problems are relative to it.
        called: what messages call it where it names no source; by default its target.

    Raises:
        FusionBenchError: as ``resolve`` and ``reading``.
    """
    named = node if isinstance(node, Mapping) else {}
    target = str(named.get("_target_", type(node).__name__))
    refuse_addresses(named)
    # It would hold, and write beside a model, whatever is in a file of that name.
    if kind == "processor" and target.endswith("Config.from_pretrained"):
        raise ConfigError(
            "a config is not a processor.", "Name a tokenizer's or processor's class."
        )
    pretrained = named.get(_PRETRAINED)
    name = pretrained or named.get("path")
    if not isinstance(name, str):
        name = called or target

    def call() -> Any:
        wanted = node
        if isinstance(pretrained, str):
            wanted = {**named, _PRETRAINED: resolve(pretrained)}
        if kind != "dataset":
            return instantiate(wanted)
        with fence(node):
            return instantiate(with_own_tables(wanted))

    return read(kind, name, partial(_intact, kind, name, call) if _on_hub(name) else call)


def with_own_tables(node: Any) -> Any:
    """Return a dataset's node with a cache of its own for the files that are in its folder now.

    Where a card names the files, ``datasets`` finds prepared tables by the folder's name and the
    card. So it would read those of another folder of that name, or of files that have changed.

    Raises:
        AddressError: a card that cannot be read.
    """
    path = node.get("path") if isinstance(node, Mapping) else None
    if not isinstance(path, str) or node.get("_target_") != _LOADS or node.get("cache_dir"):
        return node
    folder = _path(path)
    files = files_by_card(folder)
    if files is None:
        return node
    import datasets

    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = hashlib.sha256(repr((str(folder.resolve()), states)).encode()).hexdigest()[:16]
    return {**node, "cache_dir": str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / name)}


def _intact(kind: str, name: str, call: Callable[[], T]) -> T:
    """Return what ``call`` makes of the Hub's files, if they are what the Hub has."""
    try:
        made = call()
    except Exception as error:
        _raise_what_was_dropped(kind, name, error)
        try:
            refuse_damaged(blobs_of(kind, name))
        except DamagedError as damaged:
            raise damaged from error
        raise
    try:
        refuse_damaged(blobs_of(kind, name))
    except DamagedError:
        prepared = getattr(made, "cache_files", [])  # of a dataset, made of the damaged files
        for files in prepared.values() if isinstance(prepared, Mapping) else [prepared]:
            for file in files:
                shutil.rmtree(Path(file["filename"]).parent, ignore_errors=True)
        raise
    return made


def _raise_what_was_dropped(kind: str, name: str, error: Exception) -> None:
    """Raise why a file could not be had, where a library says that there is none.

    It does so whatever the Hub answered.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if kind == "dataset" or not isinstance(error, OSError) or may_pass(error):
        return
    for file in re.findall(r"[\w-]+(?:\.[\w-]+)*\.(?:safetensors|bin|json)\b", str(error)):
        try:
            get_hf_file_metadata(hf_hub_url(name, file))
        except Exception as reason:
            if may_pass(reason):
                raise reason from error


def plain_source(source: Any) -> Any:
    """Return a model's name where a config node says no more than that."""
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    node = OmegaConf.to_container(source, resolve=True) if OmegaConf.is_config(source) else source
    if not isinstance(node, Mapping) or set(node) != {"_target_", _PRETRAINED}:
        return node
    return node[_PRETRAINED] if str(node["_target_"]).startswith("transformers.") else node


def _path(name: str) -> Path:
    with suppress(RuntimeError):  # the home directory of nobody known
        return Path(name).expanduser()
    return Path(name)


def _exists(name: str) -> bool:
    return bool(name) and is_there(_path(name))


def _on_hub(name: str) -> bool:
    """Tell whether a name can only be meant for the Hub; one without a slash may be a key."""
    return "/" in name and not name.startswith(ZOO) and not _exists(name)


def _is_offline(name: str) -> bool:
    """Tell whether a name without a slash can be in the cache alone, as no one asks the Hub."""
    imported = "huggingface_hub" in sys.modules
    if not imported and not {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"} & os.environ.keys():
        return False  # as the library would say, whose import takes a while
    if name.startswith(ZOO) or _exists(name):
        return False
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def refuse_missing_path(name: str) -> None:
    """Raise if the name can only be a path, and nothing is there."""
    like_path = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1
    if not like_path or "://" in name or name.startswith(ZOO) or _exists(name):
        return
    path = _path(name)
    missing = next(p for p in (*reversed(path.parents), path) if not is_there(p))
    nearest = _nearest(str(missing), _siblings(missing))
    raise ConfigError(f"There is no such directory: '{name}'. {nearest}".rstrip())


def _is_in_cache(file: object) -> bool:
    """Tell whether it is what we keep between runs, the zoo for one."""
    return isinstance(file, str) and Path(file).is_relative_to(cache_dir())


def _siblings(path: Path) -> list[str]:
    with suppress(OSError):
        return [str(sibling) for sibling in path.parent.iterdir()]
    return []


def _nearest(name: str, choices: Iterable[str]) -> str:
    """Suggest the choice that ends the most alike; unlike `did_you_mean`, never list them all."""
    by_end = {Path(choice).name: choice for choice in choices}
    return "".join(
        did_you_mean(by_end[end], [by_end[end]])
        for end in get_close_matches(Path(name).name, by_end, n=1)
    )


def _why_offline() -> str | None:
    """Return what to say if the cache, all there is to read, has gaps; None if the Hub answers."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        fact, fix = "HF_HUB_OFFLINE is set", "Unset it"
    elif not _hub_answers(constants.ENDPOINT, int(time.monotonic() // 60)):
        fact, fix = f"the Hub ({_endpoint()}) cannot be reached", "Check the network"
    else:
        return None
    return (
        f"{fact}, and the local cache does not hold all of it. {fix}, or run 'fusion_bench' "
        "without arguments, which needs no network."
    )


@lru_cache(maxsize=1)
def _hub_answers(endpoint: str, minute: int) -> bool:
    """Ask for any answer at all; ``minute`` is there to forget the answer after a while."""
    from httpx2 import InvalidURL
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import hf_raise_for_status

    def ask() -> None:
        response = get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if response.status_code >= 500:
            hf_raise_for_status(response)

    try:
        patiently(ask, briefly=True)
    except (HTTPError, InvalidURL, OSError, ValueError):
        return False
    return True


def _endpoint() -> str:
    """Return where the Hub is, without the password that the address may hold."""
    from huggingface_hub import constants

    return re.sub("//[^/]*@", "//", constants.ENDPOINT)


@contextmanager
def _cache_only() -> Iterator[None]:
    """Do for the length of a context what HF_HUB_OFFLINE does; that is read at import only."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reason(
    kind: str, name: str, error: Exception, offline: str | None
) -> tuple[type[FusionBenchError], str] | None:
    """Return what is wrong with the source, or None where the error does not speak of it."""
    if reason := _reason_of_the_world(error, offline):
        return EnvironmentProblem, reason
    if reason := _reason_of_the_source(kind, name, error):
        return ConfigError, reason
    if isinstance(error, OSError) and error.errno is not None:  # the disk
        return EnvironmentProblem, " ".join(str(error).split())
    text = " ".join(str(error).split())
    if _is_read_from_elsewhere(error):
        return FusionBenchError, text or type(error).__name__
    library = _LIBRARIES.get(kind, "transformers")
    if not isinstance(error, MemoryError) and _is_raised_in(library, error):
        said = f"{type(error).__name__}: {text[:300]}"
        return ConfigError, f"'{library}' cannot make anything of it ({said})."
    return None


def _is_raised_in(package: str, error: Exception) -> bool:
    """Tell whether an exception comes out of a library, and not of what it may have called.

    Libraries take files to be as they wrote them, and have no exception for those that are not.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    return package in names and "fusion_bench" not in names[names.index(package) :]


def _is_read_from_elsewhere(error: Exception) -> bool:
    """Tell whether an exception is one of those that libraries raise for files and the Hub."""
    from huggingface_hub import errors

    known = (errors.EntryNotFoundError, errors.RevisionResolutionError)
    return isinstance(error, (OSError, errors.HTTPError, *known))


def _reason_of_the_world(error: Exception, offline: str | None) -> str | None:
    """Return what is wrong where the source itself may be right: Hub, network, or their copy."""
    if isinstance(error, DamagedError):
        if offline:
            return f"its copy in the local cache was damaged and is deleted: {offline}"
        return (
            "what came was damaged: its hash is not the one that the Hub states. It is deleted. "
            "Try again."
        )
    if offline:
        text = str(error)
        of_cache = text.startswith("Couldn't find cache for")
        if of_cache or (_is_read_from_elsewhere(error) and not _of_local_files(error)):
            return offline
        return None
    code = status(error)
    if code is not None and may_pass(error):
        wait = asked_to_wait(error)
        again = "Try again later." if wait is None else f"It asks to wait for {wait:g} seconds."
        return f"the Hub cannot serve it at the moment (status {code}). {again}"
    if code is None and (how := broke_off(error)):
        return f"the connection to the Hub broke ({how}). Try again."
    if code is None and (isinstance(error, ConnectionError) or "couldn't connect to" in str(error)):
        return "the connection to the Hub broke. Try again."
    return None


def _of_local_files(error: Exception) -> bool:
    """Tell whether an exception speaks of the content of files that are here."""
    return getattr(error, "errno", None) == EINVAL or bool(_not_json(str(error)))


def _not_json(text: str) -> re.Match[str] | None:
    return re.search(r"'([^']+)' is not a valid JSON file", " ".join(text.split()))


def _reason_of_the_source(kind: str, name: str, error: Exception) -> str | None:
    """Return what is wrong with the source itself.

    The libraries' own exceptions tell most; where they drop one for a plain OSError or ValueError,
    its text does.
    """
    from huggingface_hub import errors
    from safetensors import SafetensorError

    text = " ".join(str(error).split())
    if isinstance(error, errors.HFValidationError):
        return "this is no name of a repository on the Hub; they look like 'owner/name'."
    if isinstance(error, errors.StrictDataclassError):
        return f"its config.json does not fit ({text})."
    if isinstance(error, (ValueError, RuntimeError)) and not isinstance(error, OSError):
        return _reason_by_text(text)
    if isinstance(error, PickleError) and re.search("unsupported (global|class)", text, re.I):
        return (
            "its weights hold pickled objects, which can run code; they are refused. "
            "Ask for them as safetensors."
        )
    if isinstance(error, (PickleError, SafetensorError, EOFError)):
        return _DAMAGED
    if _is_from_datasets(error, "DatasetGenerationError"):
        return f"its files are damaged ({error.__cause__ or text}). {_REMEDY}"
    if not _is_read_from_elsewhere(error):
        return None

    if getattr(error, "errno", None) == EINVAL:  # how torch fails on a truncated archive
        return _DAMAGED
    if found := _not_json(text):
        return f"'{found[1]}' is not valid JSON. {_REMEDY}"

    causes = list(chain(error))
    page = f"{_endpoint()}/{'datasets/' if kind == 'dataset' else ''}{name}"
    if any(isinstance(e, errors.GatedRepoError) for e in causes) or "gated" in text:
        return f"it is gated. Ask for access at {page}, then run 'hf auth login'."
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in causes) or re.search(
        "doesn't exist on the Hub|not a valid model identifier", text
    ):
        return (
            "there is no such directory here and no such repository on the Hub, or it is private "
            f"and needs 'hf auth login'. {_nearest_repository(kind, name)}"
        ).rstrip()
    if status(error) in (401, 403):
        return f"the Hub denies access to {page}. Log in with 'hf auth login'."
    if isinstance(error, (errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError)):
        return text
    plain = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError)
    if status(error) == 404 and isinstance(error, plain):
        return f"the Hub has no such thing at {page}."
    if found := re.search(r"Unable to find '(.+?)'(?: with any supported extension|$)", text):
        return f"there is no file of data that fits '{found[1]}'."
    if re.search(r"doesn't contain any data files|No \(supported\) data files", text):
        return "it holds no data files."
    if found := re.search(r"Can't load (?:the )?(image processor|tokenizer|processor)", text):
        return f"it comes without {'an' if found[1][0] in 'aeiou' else 'a'} {found[1]}."
    if found := re.search(r"does not appear to have (.+?)\.(?: Checkout .*)?$", text):
        return f"it does not have {found[1]}."
    return None


def _reason_by_text(text: str) -> str | None:
    """Translate the ValueErrors and RuntimeErrors that are known to speak of a source."""
    if found := re.search(
        r'(?:Unknown|Bad) split:? "?(.+?)"?\. (?:Should be one of|Available splits:) (\[.*?\])',
        text,
    ):
        return f"it has no split '{found[1]}'. {did_you_mean(found[1], literal_eval(found[2]))}"
    if found := re.search(r"BuilderConfig '(.+?)' not found\. Available: (\[.*?\])", text):
        choices = did_you_mean(found[1], literal_eval(found[2]))
        return f"it has no configuration '{found[1]}'. {choices}"
    if found := re.search(r"Config name is missing\..*?configs: (\[.*?\])", text):
        return f"it has several configurations; choose one as 'name': {found[1].strip('[]')}."
    if text.startswith("Unrecognized instruction format"):
        return f"its split cannot be understood ({text.partition(': ')[2]})."
    if text.startswith("Dataset scripts are no longer supported"):
        return "it is a script, and scripts are no longer run. Name a repository of data files."
    if found := re.search("model type `(.+?)` but Transformers does not recognize", text):
        return f"its model type '{found[1]}' is unknown to the transformers that is installed here."
    if text.startswith("Unrecognized model in"):
        return "its config.json names no 'model_type'."
    if "custom code" in text and "trust_remote_code" in text:
        return (
            "it needs code of its own ('auto_map' in its configs), which is not run. If you trust "
            "its owner, say so outside of the config: --trust-remote-code, or "
            f"{TRUST_REMOTE_CODE}=1 in the environment."
        )
    if "`ignore_mismatched_sizes`" in text:
        return "its weights have other shapes than its config.json says."
    if "PytorchStreamReader" in text:
        return _DAMAGED
    return None


def _is_from_datasets(error: Exception, class_name: str) -> bool:
    """Tell whether the error is an instance of a class of ``datasets``, without importing it."""
    return any(
        cls.__module__ == "datasets.exceptions" and cls.__name__ == class_name
        for cls in type(error).__mro__
    )


def _nearest_repository(kind: str, name: str) -> str:
    """Suggest one of the owner's other repositories, or a directory that lies here."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import build_hf_headers

    choices = [os.path.normpath(path) for path in _siblings(Path(name))]
    # Asked for plainly, for the client's own way to list retries for long, and a suggestion is
    # not worth the wait.
    with suppress(HTTPError, ValueError):
        response = get_session().get(
            f"{constants.ENDPOINT}/api/{'datasets' if kind == 'dataset' else 'models'}",
            params={"author": name.partition("/")[0], "limit": 1000},
            headers=build_hf_headers(),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        response.raise_for_status()
        choices += [repository["id"] for repository in response.json()]
    return _nearest(name, choices)
