"""What of a merged model is shared: the files of its folder, and a card that says what it is."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from fusion_bench.companions import own_file
from fusion_bench.forms import leaves
from fusion_bench.modelpool.card import with_section
from fusion_bench.modelpool.usage import renamed, usage
from fusion_bench.network import broke_off, patiently, status
from fusion_bench.problems import ConfigError, EnvironmentProblem, FusionBenchError
from fusion_bench.programs.output_paths import is_part
from fusion_bench.redact import redacted
from fusion_bench.report import Report
from fusion_bench.report.table import results
from fusion_bench.repository import locate
from fusion_bench.storage import read_json, write_text
from fusion_bench.weights import open_repository

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

T = TypeVar("T")

_CARD = "README.md"
#: What people may put beside a model, besides what a run writes.
_LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt")
#: What the Hub itself puts into each repository.
_ATTRIBUTES = ".gitattributes"
_NAME = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
_MOST_OF_A_CARD = 2**20


@dataclass(frozen=True)
class Package:
    """A merged model as it is sent.

    Attributes:
        folder: where it is.
        repository: where it goes, ``owner/name``.
        files: the names of its files, and their sizes in bytes.
        card: the text of the card.
        notes: what whoever sends it should know.
    """

    folder: Path
    repository: str
    files: Mapping[str, int]
    card: str
    notes: list[str]


def add_results(folder: Path, report: Report) -> None:
    """Put a report's table into the card of each merged model of a run.

    That of a trial run, with a batch of each task, says too little.
    """
    if report.run.config.get("fast_dev_run"):
        return
    for card in (folder / _CARD, *folder.glob(f"*/{_CARD}")):
        with suppress(FileNotFoundError):
            text = card.read_text(encoding="utf-8")
            write_text(card, with_section(text, "Results", "\n".join(results(report))))


def packed(folder: Path, repository: str, report: Path | None = None) -> Package:
    """Return what of a merged model is sent; nothing is changed.

    Args:
        folder: of the model.
        repository: where it goes, ``owner/name``.
        report: a ``report.json`` whose table goes into the card.

    Raises:
        ConfigError: it is no merged model, holds other files, or something that looks like a token.
    """
    if not _NAME.fullmatch(repository) or ".." in repository or "--" in repository:
        raise ConfigError(f"'{repository}' is not a repository. Give owner/name.")
    folder = folder.absolute()
    made = _recipe(folder)
    names = [*_files(folder)]
    open_repository(locate(str(folder)))  # tells of weights that are cut off or missing
    sources = dict(_sources(made))
    licences = {name: _licence(*source) for name, source in sources.items()}
    found = Report.load(report) if report is not None else None
    card = _card(folder, repository, made, names, licences, found)
    for name in names:
        _refuse_secrets(folder / name, card if name == _CARD else None)
    sizes = {
        name: len(card.encode()) if name == _CARD else (folder / name).stat().st_size
        for name in names
    }
    return Package(folder, repository, sizes, card, [*_notes(made, card, licences)])


def sent(package: Package, *, public: bool, overwrite: bool) -> str:
    """Send a merged model to the Hub; returns its address.

    All files appear in one commit. What was sent of the weights before an interruption is not sent
    again.

    Args:
        package: the model.
        public: whether everybody may read it.
        overwrite: replace what is in the repository.

    Raises:
        ConfigError: nobody is logged in, or may write there; or there is another model.
        EnvironmentProblem: the network or the Hub fails.
    """
    from huggingface_hub import (
        CommitOperationAdd,
        CommitOperationDelete,
        HfApi,
        get_token,
        is_offline_mode,
    )

    repository, api = package.repository, HfApi()
    if is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing is sent. Unset it.")
    if get_token() is None:
        raise ConfigError(
            "You are not logged in to the Hub. Run 'hf auth login', or set HF_TOKEN to a token "
            "that may write."
        )
    there = _there(api, repository)
    if there is not None:
        _refuse_other(package, there, public=public, overwrite=overwrite)
    else:
        _asked(lambda: api.create_repo(repository, private=not public, exist_ok=True), repository)
    old = set() if there is None else {file.rfilename for file in there.siblings or ()}
    operations: list[Any] = [
        CommitOperationAdd(name, package.card.encode() if name == _CARD else package.folder / name)
        for name in package.files
    ]
    gone = sorted(old - {*package.files, _ATTRIBUTES})
    operations += [CommitOperationDelete(path_in_repo=name) for name in gone]
    message = "Upload a model that FusionBench merged"
    commit = _asked(
        lambda: api.create_commit(repository, operations, commit_message=message), repository
    )
    if there is not None and there.private and public:
        _asked(lambda: api.update_repo_settings(repository, private=False), repository)
    return str(commit.repo_url)


def _there(api: "HfApi", repository: str) -> Any:
    """Return what the Hub tells of a repository; ``None`` where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return patiently(lambda: api.model_info(repository, files_metadata=True))
    except RepositoryNotFoundError:
        return None
    except Exception as error:
        raise _explained(error, repository) from error


def _refuse_other(package: Package, there: Any, *, public: bool, overwrite: bool) -> None:
    repository = package.repository
    if not there.private and not public:
        raise ConfigError(
            f"'{repository}' is public. Give --public if everybody may read this model, or choose "
            "another name."
        )
    old = {file.rfilename for file in there.siblings or ()} - {_ATTRIBUTES}
    if old and not overwrite:
        raise ConfigError(
            f"'{repository}' holds {len(old)} files already, such as '{min(old)}'. Choose another "
            "name, or give --overwrite to replace all of them."
        )


def _asked(call: Callable[[], T], repository: str) -> T:
    try:
        return patiently(call)
    except Exception as error:
        raise _explained(error, repository) from error


def _explained(error: Exception, repository: str) -> FusionBenchError:
    """Return what went wrong, and what to do."""
    code, reason = status(error), " ".join(str(error).split())
    if code in (401, 403):
        return ConfigError(
            f"The Hub does not let you write to '{repository}' ({code}). Check the owner's name, "
            "and log in with a token that may write: 'hf auth login'."
        )
    if code is not None or broke_off(error) is not None:
        return EnvironmentProblem(
            f"'{repository}' was not written: {(broke_off(error) or reason).rstrip('.')}.",
            "Start the command again; what was sent already is not sent again.",
        )
    return FusionBenchError(f"'{repository}' was not written: {reason}")


def _recipe(folder: Path) -> Mapping[str, Any]:
    """Return how a model was merged, as its weights tell it.

    Raises:
        ConfigError: the folder has no merged model.
    """
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise ConfigError(f"There is no folder '{folder}'.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        models = sorted(file.parent.name for file in folder.glob("*/config.json"))
        hint = "Give the folder that merged_model_save_path named."
        if models:
            hint = f"It holds several models: push each, such as '{folder / models[0]}'."
        raise ConfigError(
            f"'{folder}' is not a merged model: it has no weights (*.safetensors). {hint}"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"'{folder}' is not a whole model: it has no config.json. Give the folder that "
            "merged_model_save_path named, or copy the file of a model that was merged."
        )
    try:
        with safe_open(own_file(folder, weights[0].name), "pt") as file:
            metadata = file.metadata() or {}
        made = json.loads(metadata["fusion_bench"])
        sources = made["sources"]
        assert all(isinstance(source["source"], str) for source in sources.values())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"'{weights[0]}' cannot be read: {error}.") from error
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(
            f"'{folder}' was not merged by FusionBench: '{weights[0].name}' does not say what it "
            "was made from. For other models use 'hf upload'."
        ) from error
    assert isinstance(made, dict)
    return made


def _files(folder: Path) -> Iterator[str]:
    """Yield the names of a model's files.

    Raises:
        ConfigError: there are others, or links that lead out.
    """
    for path, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names) + sorted(f for f in folders if (Path(path) / f).is_symlink()):
            file = Path(path) / name
            inner = file.relative_to(folder).as_posix()
            if not (is_part(file) or inner in _LICENCES):
                raise ConfigError(
                    f"'{file}' is not part of a merged model, and is not sent. Remove it, or push "
                    "a copy of the folder without it."
                )
            own_file(folder, inner)
            yield inner
    if not (folder / _CARD).exists():
        yield _CARD


def _card(
    folder: Path,
    repository: str,
    made: Mapping[str, Any],
    names: list[str],
    licences: Mapping[str, str | None],
    report: Report | None,
) -> str:
    """Return the model's card with what people need of it; what they have written stays."""
    from huggingface_hub import ModelCard

    from fusion_bench.modelpool.card import model_card

    file = folder / _CARD
    text = _text_of(file) if file.exists() else model_card(folder.name, made)
    config = read_json(folder / "config.json")
    if "\n## Usage\n" not in text:
        code = usage(repository, config if isinstance(config, dict) else {}, names)
        text = with_section(text, "Usage", f"```python\n{code}\n```")
    text = renamed(text, repository)
    if report is not None:
        text = with_section(text, "Results", "\n".join(results(report)))
    rows = [f"| `{name}` | {licence or 'not stated'} |" for name, licence in licences.items()]
    table = ["Of the models that this one was merged from:", "", "| Model | Licence |"]
    text = with_section(text, "Licences", "\n".join([*table, "| --- | --- |", *rows]))
    stated = set(licences.values())
    try:
        card = ModelCard(text)
        if len(stated) == 1 and None not in stated and card.data.get("license") is None:
            card.data["license"] = stated.pop()
        return str(card)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"The header of '{file}' cannot be read: {' '.join(str(error).split())} Correct it, or "
            "remove the file; a new one is written."
        ) from error


def _text_of(file: Path) -> str:
    if file.stat().st_size > _MOST_OF_A_CARD:
        raise ConfigError(f"'{file}' is larger than a card may be (1 MiB). Shorten it.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{file}' is not UTF-8. Save it as such.") from error


def _sources(made: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Yield each origin of a model, with its place and its commit."""
    for source in made["sources"].values():
        for key in ("", "base_"):
            named = source.get("base" if key else "source")
            if isinstance(named, str):
                yield named, (named, source.get(f"{key}commit"))


def _licence(name: str, commit: str | None) -> str | None:
    """Return the licence that a model's card states, as far as it can be found."""
    from huggingface_hub import ModelCard, hf_hub_download

    with suppress(Exception):  # of a card that is not there, or is no card
        if commit is not None:
            place = name.partition("@")[0]
            download = hf_hub_download
            file = patiently(lambda: download(place, _CARD, revision=commit), briefly=True)
        else:
            file = str(Path(name) / _CARD)
        stated = ModelCard(_text_of(Path(file))).data.get("license")
        return stated if isinstance(stated, str) else None
    return None


def _refuse_secrets(file: Path, text: str | None) -> None:
    """Refuse a file with what looks like a token or a password.

    Raises:
        ConfigError: it has one.
    """
    if text is None:
        with file.open("rb") as content:
            size = 8 + int.from_bytes(content.read(8), "little") if _is_weights(file) else -1
            content.seek(0)
            text = content.read(size).decode("utf-8", errors="ignore")
    for line in text.splitlines():
        if (safe := redacted(line)) != line:
            at = max(0, safe.find("***") - 30)
            raise ConfigError(
                f"'{file}' holds what looks like a token: '{safe[at : at + 60].strip()}'. Remove "
                "it, and if it was real, revoke it."
            )


def _is_weights(file: Path) -> bool:
    return file.suffix == ".safetensors"


def _notes(made: Mapping[str, Any], card: str, licences: Mapping[str, str | None]) -> Iterator[str]:
    """Yield what whoever shares a model should know."""
    if unknown := [name for name, licence in licences.items() if licence is None]:
        yield f"No licence is known of {', '.join(unknown)}: check that you may share the model."
    texts = {own for own in leaves(made) if isinstance(own, str)}
    if paths := sorted(text for text in texts if Path(text).is_absolute()):
        yield (
            f"The card and the weights' headers name paths of this machine, such as '{paths[0]}'."
        )
    if "\n## Results\n" not in card:
        yield "The card has no results. Give --report …/report.json for its table."
