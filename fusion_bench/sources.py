"""Where a name in a config points to, and plain words for when it cannot be had."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn

from fusion_bench.errors import FusionBenchError, did_you_mean
from fusion_bench.instantiate import instantiate

ZOO = "zoo:"
_PRETRAINED = "pretrained_model_name_or_path"
_SECONDS_TO_ANSWER = 10.0
#: What a checkpoint may be made of; a repository often holds other frameworks' weights too.
_MODEL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def model_directory(name: str) -> str:
    """Return the local directory of a model, downloading a Hub repository where it is not cached.

    Args:
        name: ``zoo:<model>``, a local directory, or a Hub repository ``owner/name``.

    Raises:
        FusionBenchError: a directory or repository that does not exist, or a Hub that cannot be
            reached while the cache lacks the model.
    """
    if name.startswith(ZOO):
        from fusion_bench.zoo import model_path

        return str(model_path(name.removeprefix(ZOO)))
    if (local := _local(name)) is not None:
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    files = _repository_files(name, "model")
    if files is None:
        try:
            return snapshot_download(name, local_files_only=True)
        except LocalEntryNotFoundError:
            _unreachable(name)
    formats = ["*.safetensors", "*.bin"]
    weights = formats[0] if any(file.endswith(".safetensors") for file in files) else formats[1]
    return snapshot_download(name, allow_patterns=[*_MODEL_FILES, weights])


def load_pretrained(node: Any, key: str) -> Any:
    """Return what a config node asks for, a ``from_pretrained`` as a rule.

    Its ``pretrained_model_name_or_path`` may be whatever :func:`model_directory` takes.

    Raises:
        FusionBenchError: a name that cannot be resolved, or files that cannot be read.
    """
    name = node.get(_PRETRAINED) if isinstance(node, Mapping) else None
    with reading(key, str(name)):
        if isinstance(name, str) and "revision" not in node:
            node = {**node, _PRETRAINED: model_directory(name)}
        return instantiate(node, key)


def load_dataset(node: Any, key: str) -> Any:
    """Return the dataset that a config node asks for.

    ``datasets`` finds a Hub that cannot be reached only after many tries; it is asked once here.

    Raises:
        FusionBenchError: a repository, split or configuration that does not exist, or a Hub that
            cannot be reached while the cache lacks the dataset.
    """
    path = node.get("path") if isinstance(node, Mapping) else None
    from_hub = (
        isinstance(path, str)
        and node["_target_"] == "datasets.load_dataset"
        and _local(path, packaged=True) is None
    )
    with reading(key, str(path)):
        if not from_hub:
            return instantiate(node, key)
        reachable = _repository_files(str(path), "dataset") is not None
        with nullcontext() if reachable else _offline():
            try:
                return instantiate(node, key)
            except ConnectionError:
                if reachable:
                    raise
                _unreachable(str(path))


@contextmanager
def reading(key: str, name: str) -> Iterator[None]:
    """Turn what the libraries raise while they read ``name`` into one line that starts at ``key``.

    Raises:
        FusionBenchError: in place of the libraries' own exceptions.
    """
    from pickle import UnpicklingError

    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError

    try:
        yield
    except FusionBenchError as error:
        raise FusionBenchError(f"{key}: {error}") from error
    except UnpicklingError as error:
        raise FusionBenchError(
            f"{key}: the weights of '{name}' are pickled code, which is not run. "
            "Convert them to safetensors."
        ) from error
    except (OSError, ValueError, SafetensorError, DatasetsError, HfHubHTTPError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FusionBenchError(f"{key}: cannot read '{name}': {first_line}") from error


def _local(name: str, packaged: bool = False) -> str | None:
    """Return the absolute path of what exists locally; refuse what can only be a local path.

    ``packaged``: the name may also be a dataset format such as ``parquet`` or ``imagefolder``.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path.absolute())
    if packaged and "/" not in name:
        return name
    if name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) if siblings else ""
        raise FusionBenchError(f"there is no '{name}'. {hint}".rstrip())
    return None


def _repository_files(name: str, kind: Literal["model", "dataset"]) -> list[str] | None:
    """Return the names of a Hub repository's files; ``None`` where the Hub cannot be reached."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        info = HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS_TO_ANSWER)
    except HFValidationError:
        raise FusionBenchError(
            f"'{name}' is neither a local path nor a repository 'owner/name'."
        ) from None
    except GatedRepoError as error:
        raise FusionBenchError(
            f"'{name}' is gated: ask for access on its page, then log in with 'hf auth login'."
        ) from error
    except RepositoryNotFoundError as error:
        raise FusionBenchError(
            f"there is no {kind} '{name}', neither locally nor on the Hub. {_similar(name, kind)}"
            "If it is private, log in with 'hf auth login'."
        ) from error
    except HfHubHTTPError:
        return None
    except (OfflineModeIsEnabled, httpx2.TransportError):
        return None
    return [file.rfilename for file in info.siblings or []]


def _similar(name: str, kind: Literal["model", "dataset"]) -> str:
    """Return a hint at the nearest of the same owner's repositories."""
    from huggingface_hub import HfApi

    owner, slash, _ = name.partition("/")
    list_repositories = HfApi().list_models if kind == "model" else HfApi().list_datasets
    try:
        names = [r.id for r in list_repositories(author=owner, limit=1000)] if slash else []
    except Exception:  # a hint is not worth another error
        return ""
    hint = did_you_mean(name, names)
    return f"{hint} " if hint.startswith("Did") else ""


def _unreachable(name: str) -> NoReturn:
    raise FusionBenchError(
        f"the Hub cannot be reached and '{name}' is not in the local cache. Check the network, "
        "or type 'fusion_bench' alone: it needs none."
    )


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the libraries from trying, and waiting for, the Hub."""
    import datasets.config
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
