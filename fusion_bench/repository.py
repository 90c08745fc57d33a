"""A model's files, local or on the Hub."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fusion_bench.command import is_there
from fusion_bench.companions import KNOWN, check_folder, own_file, refuse_size
from fusion_bench.network import blob_of, may_pass, patiently, refuse_damaged
from fusion_bench.problems import ConfigError
from fusion_bench.sources import read, reading, resolve
from fusion_bench.trust import trusts_remote_code

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """A directory of files; files on the Hub are downloaded when they are needed.

    Attributes:
        name: its name in the config.
        files: the names of its top-level files.
        nested: the names of files in subfolders on the Hub.
        directory: its path, if it is local.
        commit: the commit of a repository on the Hub.
        sizes: the sizes of files on the Hub, if known.
        scratch: the directory for downloads, instead of the Hub's cache.
    """

    name: str
    files: frozenset[str]
    directory: Path | None = None
    nested: frozenset[str] = field(default=frozenset(), compare=False)
    repo_id: str = ""
    commit: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict, compare=False)
    scratch: Path | None = None

    @property
    def folders(self) -> frozenset[str]:
        """The names of the folders in it."""
        if self.directory is not None:
            return frozenset(path.name for path in self.directory.iterdir() if path.is_dir())
        return frozenset(name.partition("/")[0] for name in self.nested)

    @property
    def code(self) -> frozenset[str]:
        """The names of its code files, if the user allows remote code."""
        if not trusts_remote_code():
            return frozenset()
        return frozenset(name for name in self.files if name.endswith(".py"))

    def inside(self, folder: str) -> frozenset[str]:
        """Return the names of the files in a folder, with the folder's name prepended."""
        if self.directory is not None:
            return frozenset(f"{folder}/{name}" for name in _listed(self.directory / folder))
        return frozenset(name for name in self.nested if name.rpartition("/")[0] == folder)

    def _lacks(self, files: tuple[str, ...]) -> list[str]:
        """Return those of ``files`` that the repository does not have."""
        nested = {name.rpartition("/")[0] for name in files} - {""}
        known = self.files.union(*map(self.inside, nested))
        return sorted(set(files) - known)

    def has(self, *files: str) -> bool:
        """Return whether ``files`` are local already, in the directory or the Hub's cache."""
        if self.directory is not None:
            return not self._lacks(files)
        from huggingface_hub import try_to_load_from_cache

        return all(
            isinstance(try_to_load_from_cache(self.repo_id, name, revision=self.commit), str)
            for name in files
        )

    def fetch(self, *files: str) -> Path:
        """Return the directory with ``files``; missing files are downloaded.

        Raises:
            ConfigError: files that the repository does not have, or that may not be read, such as
                links to elsewhere.
            EnvironmentProblem: a download that failed, or brought other content than the Hub
                states.
        """
        if lacking := self._lacks(files):
            raise ConfigError(f"There is no '{lacking[0]}' in '{self.name}'.")
        if self.directory is not None:
            check_folder(self.directory)
            for name in set(files).difference(KNOWN):
                own_file(self.directory, name)
            return self.directory
        for name in files:
            refuse_size(f"{self.name}/{name}", name, self.sizes.get(name, 0))
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
            for name in files:
                own_file(place, name)
            return place

        return read("model", self.name, download)


def locate(name: str, scratch: Path | None = None) -> Repository:
    """Find a directory, a ``zoo:`` name, or a repository on the Hub, ``owner/name[@revision]``.

    Only the list of a repository's files is requested. Without a network, the cached commit is
    used. With a ``scratch`` directory, nothing is added to the cache.

    Raises:
        ConfigError: nothing of that name.
        EnvironmentProblem: a Hub that cannot be reached, or fails.
    """
    named = "@" not in name or is_there(Path(name).expanduser())
    repo_id, _, revision = (name, "", "") if named else name.partition("@")
    place = Path(resolve(repo_id))
    if place.is_absolute():
        if revision:
            raise ConfigError(f"'{name}': '{repo_id}' is a local directory, without revisions.")
        if not place.is_dir():
            raise ConfigError(f"'{name}' is not a directory.")
        return Repository(name, _listed(place), directory=place)

    with reading("model", repo_id):
        return _on_hub(name, repo_id, revision or None, scratch)


def _on_hub(name: str, repo_id: str, revision: str | None, scratch: Path | None) -> Repository:
    """Request the commit of a repository and the list of its files."""
    from huggingface_hub import HfApi, constants

    cached = _in_cache(name, repo_id, revision)
    if cached is not None and constants.HF_HUB_OFFLINE:
        return cached

    def ask() -> Repository:
        # This also notes in the cache which commit was meant, for later runs without a network.
        asked = HfApi().resolve_revision(repo_id, revision=revision, cache_dir=scratch)
        commit = asked.resolved
        info = HfApi().model_info(repo_id, revision=commit, files_metadata=True)
        siblings = info.siblings or ()
        files = frozenset(file.rfilename for file in siblings)
        nested = frozenset(file for file in files if "/" in file)
        return Repository(
            name,
            files - nested,
            nested=nested,
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
        log.warning("The Hub does not answer; the last cached version of '%s' is used.", name)
        return cached


def _in_cache(name: str, repo_id: str, revision: str | None) -> Repository | None:
    """Return the last used commit of a repository, if a part of it is cached."""
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
        files = {file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*")}
        nested = frozenset(file for file in files if "/" in file)
        return Repository(
            name, _listed(snapshot), nested=nested, repo_id=repo_id, commit=snapshot.name
        )
    return None


def _listed(directory: Path) -> frozenset[str]:
    """Return the names of the files in a directory; none if it does not exist."""
    if not directory.is_dir():
        return frozenset()
    return frozenset(file.name for file in directory.iterdir() if file.is_file())


def hub_cache() -> Path:
    """Return the cache directory of the Hub's client."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
