"""A model's files, whether they lie here or on the Hub."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fusion_bench.errors import FusionBenchError
from fusion_bench.sources import reading, resolve


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
            FusionBenchError: files that the repository does not have, or a download that failed.
        """
        if lacking := sorted(set(files) - self.files):
            raise FusionBenchError(f"There is no '{lacking[0]}' in '{self.name}'.")
        if self.directory is not None:
            return self.directory
        from huggingface_hub import snapshot_download

        here = self.has(*files)
        with reading("model", self.name):
            return Path(
                snapshot_download(
                    self.repo_id,
                    revision=self.commit,
                    allow_patterns=list(files),
                    local_files_only=here,
                    cache_dir=None if here else self.scratch,
                )
            )


def locate(name: str, scratch: Path | None = None) -> Repository:
    """Find a directory, a ``zoo:`` name, or a repository on the Hub, ``owner/name[@revision]``.

    Of a repository only the list of its files is asked for; without a network, its state in the
    local cache is taken. With a ``scratch`` directory nothing is put into that cache.

    Raises:
        FusionBenchError: nothing of that name, or a Hub that cannot be reached.
    """
    named = "@" not in name or Path(name).expanduser().exists()
    repo_id, _, revision = (name, "", "") if named else name.partition("@")
    place = Path(resolve(repo_id))
    if place.is_absolute():
        if revision:
            raise FusionBenchError(f"'{name}': '{repo_id}' is a directory here, without revisions.")
        if not place.is_dir():
            raise FusionBenchError(f"'{name}' is no directory.")
        files = frozenset(file.name for file in place.iterdir() if file.is_file())
        return Repository(name, files, directory=place)

    from huggingface_hub import HfApi, constants, snapshot_download

    with reading("model", repo_id):
        if constants.HF_HUB_OFFLINE:
            snapshot = Path(
                snapshot_download(
                    repo_id,
                    revision=revision or None,
                    allow_patterns=[],  # any part of it will do
                    local_files_only=True,
                )
            )
            files = frozenset(file.name for file in snapshot.iterdir())
            return Repository(name, files, repo_id=repo_id, commit=snapshot.name)
        # This also notes in the cache which commit was meant, for later runs without a network.
        asked = revision or None
        commit = HfApi().resolve_revision(repo_id, revision=asked, cache_dir=scratch).resolved
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


def hub_cache() -> Path:
    """Return where the Hub's client keeps what it fetches."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
