"""A model's files, whether they lie here or on the Hub."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
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
        sizes: the bytes of files on the Hub, as far as it tells them.
        scratch: where files go that are not here, in place of the Hub's cache.
    """

    name: str
    files: frozenset[str]
    directory: Path | None = None
    repo_id: str = ""
    commit: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict, compare=False)
    scratch: Path | None = None

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
            here = self.has(*files)
            place = Path(
                snapshot_download(
                    self.repo_id,
                    revision=self.commit,
                    allow_patterns=list(files),
                    local_files_only=here,
                    cache_dir=None if here else self.scratch,
                )
            )
            if gaps := [name for name in files if not (place / name).is_file()]:
                raise FileNotFoundError(f"There is no '{gaps[0]}' in the local cache.")
            refuse_damaged(blob_of(place / name) for name in files)
            return place

        return read("model", self.name, download)


def locate(name: str, scratch: Path | None = None) -> Repository:
    """Find a directory, a ``zoo:`` name, or a repository on the Hub, ``owner/name[@revision]``.

    Of a repository only the list of its files is asked for; without a network, its state in the
    local cache is taken. With a ``scratch`` directory nothing is put into that cache.

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
        return _on_hub(name, repo_id, revision or None, scratch)


def _on_hub(name: str, repo_id: str, revision: str | None, scratch: Path | None) -> Repository:
    """Ask which state of a repository is meant, and for the list of its files."""
    from huggingface_hub import HfApi, constants

    cached = _in_cache(name, repo_id, revision)
    if cached is not None and constants.HF_HUB_OFFLINE:
        return cached

    def ask() -> Repository:
        # This also notes in the cache which commit was meant, for later runs without a network.
        asked = HfApi().resolve_revision(repo_id, revision=revision, cache_dir=scratch)
        commit = asked.resolved
        info = HfApi().model_info(repo_id, revision=commit, files_metadata=True)
        siblings = [file for file in info.siblings or () if "/" not in file.rfilename]
        return Repository(
            name,
            frozenset(file.rfilename for file in siblings),
            repo_id=repo_id,
            commit=commit,
            sizes={file.rfilename: file.size for file in siblings if file.size is not None},
            scratch=scratch,
        )

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


def hub_cache() -> Path:
    """Return where the Hub's client keeps what it fetches."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
