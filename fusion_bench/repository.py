"""A model's files, whether they lie here or on the Hub."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fusion_bench.errors import ConfigError
from fusion_bench.network import blob_of, may_pass, patiently, refuse_damaged
from fusion_bench.sources import read, reading, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """A directory of files; those on the Hub are brought here when they are asked for.

    Attributes:
        name: what the config calls it.
        files: the names of its files, of those at the top alone.
        directory: where it lies, if it lies here.
        commit: which state of a repository on the Hub is meant.
    """

    name: str
    files: frozenset[str]
    directory: Path | None = None
    repo_id: str = ""
    commit: str | None = None

    def has(self, *files: str) -> bool:
        """Tell whether ``files`` are here already, in the directory or in the Hub's cache."""
        if self.directory is not None:
            return all(name in self.files for name in files)
        from huggingface_hub import try_to_load_from_cache

        return all(
            isinstance(try_to_load_from_cache(self.repo_id, name, revision=self.commit), str)
            for name in files
        )

    def fetch(self, *files: str) -> Path:
        """Return the directory in which ``files`` are; what is not here yet is downloaded.

        Raises:
            ConfigError: files that the repository does not have.
        WorldError: a download that failed, or brought other content than the Hub states.
        """
        if lacking := sorted(set(files) - self.files):
            raise ConfigError(f"There is no '{lacking[0]}' in '{self.name}'.")
        if self.directory is not None:
            return self.directory
        from huggingface_hub import snapshot_download

        def download() -> Path:
            place = Path(
                snapshot_download(
                    self.repo_id,
                    revision=self.commit,
                    allow_patterns=list(files),
                    local_files_only=self.has(*files),
                )
            )
            if gaps := [name for name in files if not (place / name).is_file()]:
                raise FileNotFoundError(f"There is no '{gaps[0]}' in the local cache.")
            refuse_damaged(blob_of(place / name) for name in files)
            return place

        return read("model", self.name, download)


def locate(name: str) -> Repository:
    """Find a directory, a ``zoo:`` name, or a repository on the Hub, ``owner/name[@revision]``.

    Of a repository only the list of its files is asked for; without a network, its state in the
    local cache is taken.

    Raises:
        ConfigError: nothing of that name.
        WorldError: a Hub that cannot be reached, or fails.
    """
    named = "@" not in name or Path(name).expanduser().exists()
    repo_id, _, revision = (name, "", "") if named else name.partition("@")
    place = Path(resolve(repo_id))
    if place.is_absolute():
        if revision:
            raise ConfigError(f"'{name}': '{repo_id}' is a directory here, without revisions.")
        if not place.is_dir():
            raise ConfigError(f"'{name}' is no directory.")
        files = frozenset(file.name for file in place.iterdir() if file.is_file())
        return Repository(name, files, directory=place)

    with reading("model", repo_id):
        return _on_hub(name, repo_id, revision or None)


def _on_hub(name: str, repo_id: str, revision: str | None) -> Repository:
    """Ask which state of a repository is meant, and for the list of its files."""
    from huggingface_hub import HfApi, constants

    cached = _in_cache(name, repo_id, revision)
    if cached is not None and constants.HF_HUB_OFFLINE:
        return cached

    def ask() -> Repository:
        # This also notes in the cache which commit was meant, for later runs without a network.
        commit = HfApi().resolve_revision(repo_id, revision=revision).resolved
        info = HfApi().model_info(repo_id, revision=commit)
        names = [file.rfilename for file in info.siblings or ()]
        files = frozenset(file for file in names if "/" not in file)
        return Repository(name, files, repo_id=repo_id, commit=commit)

    if cached is None:
        return patiently(ask)
    try:
        return patiently(ask, briefly=True)
    except Exception as error:
        if not may_pass(error):
            raise
        log.warning("The Hub fails; '%s' is taken from the local cache as it was last.", name)
        return cached


def _in_cache(name: str, repo_id: str, revision: str | None) -> Repository | None:
    """Return the state of a repository that was asked for last, if any part of it is here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with suppress(LocalEntryNotFoundError):
        snapshot = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=[],  # any part of it will do
                local_files_only=True,
            )
        )
        files = frozenset(file.name for file in snapshot.iterdir())
        return Repository(name, files, repo_id=repo_id, commit=snapshot.name)
    return None
