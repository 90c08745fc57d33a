"""Weights in a repository: described by their headers, downloaded at the first read."""

from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from torch import Tensor

from fusion_bench.network import patiently
from fusion_bench.problems import ConfigError, EnvironmentProblem
from fusion_bench.repository import Repository
from fusion_bench.sources import reading
from fusion_bench.weights.checkpoint import WEIGHT_FILES, open_checkpoint, shards
from fusion_bench.weights.formats import foreign_folder
from fusion_bench.weights.mapping import TensorSpec, TensorWeights, Weights
from fusion_bench.weights.write import DTYPES


def open_repository(repository: Repository) -> Weights:
    """Return the weights of a repository, mapped where its files are here.

    Safetensors on the Hub are not downloaded: one request per file reads the header with keys,
    shapes and dtypes.

    Raises:
        ConfigError: no weights, or damaged ones.
        EnvironmentProblem: a download that failed.
    """
    files = weight_files(repository)
    if repository.directory is not None:
        return open_checkpoint(repository.fetch(files[0]) / files[0])
    if "safetensors" in files[0] and not repository.has(*files):
        return HubWeights(repository, files)
    return open_checkpoint(repository.fetch(*files) / files[0])


def weight_files(repository: Repository) -> list[str]:
    """Return the names of the weight files; the first one opens all of them.

    Raises:
        ConfigError: there are none.
    """
    name = next((name for name in WEIGHT_FILES if name in repository.files), None)
    if name is None:
        single = [name for name in repository.files if name.endswith(".safetensors")]
        if len(single) != 1:
            problem = foreign_folder(
                repository.files,
                repository.folders,
                repository.name,
                on_hub=repository.directory is None,
            )
            if problem is not None:
                raise ConfigError(problem)
            raise ConfigError(
                f"There are no weights in '{repository.name}'. It needs one of: "
                f"{', '.join(WEIGHT_FILES)}."
            )
        name = single[0]
    if not name.endswith(".index.json"):
        return [name]
    return [name, *shards(repository.fetch(name) / name)]


class HubWeights(Weights):
    """Safetensors on the Hub.

    Args:
        repository: where they are.
        names: their files' names; the first is what opens all of them, an index for one.
    """

    def __init__(self, repository: Repository, names: list[str]):
        self._repository = repository
        self._names = names
        self._specs: dict[str, TensorSpec] = {}
        with reading("model", repository.name):
            for name in names:
                if not name.endswith(".json"):
                    self._specs |= _specs_asked_twice(repository, name)

    @cached_property
    def _local(self) -> TensorWeights:
        local = open_checkpoint(self._repository.fetch(*self._names) / self._names[0])
        # No hash is known of a header alone.
        if {key: local.spec(key) for key in local} != self._specs:
            raise EnvironmentProblem(
                f"'{self._repository.name}': the headers that were read first differ from those "
                "of the files. Try again."
            )
        return local

    @property
    def files(self) -> tuple[Path, ...]:
        """The files on this machine; they are downloaded if they are not here."""
        return self._local.files

    def __getitem__(self, key: str) -> Tensor:
        return self._local[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype as the header tells them."""
        return self._specs[key]

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the flattened entry; the first call downloads the files."""
        return self._local.read(key, start, stop)


def _specs_asked_twice(repository: Repository, file: str) -> dict[str, TensorSpec]:
    """Return a header's entries; a damaged header is read a second time."""
    from safetensors import SafetensorError

    with suppress(SafetensorError):
        return _specs(repository, file)
    return _specs(repository, file)


def _specs(repository: Repository, file: str) -> dict[str, TensorSpec]:
    """Return a header's entries, in the order of the mapped file."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError
    from safetensors import SafetensorError

    specs = {}
    try:
        header = patiently(
            lambda: HfApi().parse_safetensors_file_metadata(
                repository.repo_id, file, revision=repository.commit
            )
        )
        for key, tensor in sorted(header.tensors.items()):
            if tensor.dtype not in DTYPES:
                raise ConfigError(
                    f"'{repository.name}': '{key}' has the type {tensor.dtype}, which is not "
                    "supported."
                )
            specs[key] = TensorSpec(tuple(map(int, tensor.shape)), DTYPES[tensor.dtype])
    except (SafetensorsParsingError, AttributeError, TypeError, ValueError) as error:
        raise SafetensorError(str(error)) from error
    return specs
