"""What is known of a dataset before it is loaded: columns, classes, splits and sizes."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_bench.addresses import Folders, fence, refuse_addresses
from fusion_bench.plan import Plan, Step
from fusion_bench.problems import (
    FusionBenchError,
    Place,
    Problem,
    did_you_mean,
    error_of,
    key_of,
    within,
)
from fusion_bench.repository import hub_cache
from fusion_bench.sources import load, reading, refuse_missing_path, with_own_tables
from fusion_bench.taskpool.embedded import EMBEDDED_TEXTS, Columns, embedded_rows
from fusion_bench.zoo import CLASS_NAMES, SPLITS, TASKS, dense, language
from fusion_bench.zoo import load_dataset as load_from_zoo

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, Features

_LOADS = "datasets.load_dataset"
_READS = "datasets.load_from_disk"
_ZOO = "fusion_bench.zoo.load_dataset"
_SCENES = "fusion_bench.zoo.dense.load_dataset"


@dataclass(frozen=True)
class DatasetPlace:
    """Where a dataset stands in the config, for messages.

    Attributes:
        place: relative to the task pool.
        whole: it is from the config's beginning instead.
    """

    place: Place
    whole: bool = False

    def located(self) -> AbstractContextManager[None]:
        """Put this place before that of each problem that is raised in the context."""
        return within(*self.place, whole=self.whole)

    def refusal(self, reason: str, remedy: str = "") -> FusionBenchError:
        """Return what to raise where the dataset cannot be used."""
        return error_of([Problem(self.place, reason, remedy, whole=self.whole)])

    def __str__(self) -> str:
        return key_of(self.place)


@dataclass(frozen=True)
class Described:
    """A dataset as its card, its files' schema or its builder describe it.

    Attributes:
        splits: a split's name to its number of samples, where that is known.
        features: the columns' types by their names, where they are known.
        download: bytes to fetch; 0 where it is here, None where nobody knows.
        prepared: bytes that it takes as Arrow tables, beside those; likewise.
        column: reads a column of a split, as Arrow's ``ChunkedArray``; None where that takes more
            than a look at local files.
    """

    splits: Mapping[str, int | None]
    features: Mapping[str, Any] | None
    download: int | None = 0
    prepared: int | None = 0
    column: Callable[[str, str], Any] | None = None


#: Why a dataset without a length is refused.
WHY_NOT_STREAMED = (
    "a stream can be neither counted nor read again, which an evaluation needs. Remove "
    "'streaming: true'."
)


def describe(node: Any, scratch: Path | None = None) -> Described | None:
    """Describe what a dataset's node loads; None where that takes loading it.

    No data is downloaded. With a ``scratch`` directory nothing is put into the caches of Hugging
    Face either.

    Args:
        node: a call of ``datasets.load_dataset`` or ``load_from_disk``, or a dataset of the zoo.
        scratch: a directory for what has to be fetched, such as dataset cards.

    Raises:
        FusionBenchError: a source that is not there, or has no such split; places are relative to
            the node.
    """
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if target in (_LOADS, _READS):
        refuse_addresses(node)
    describes = {
        _LOADS: _described_by_builder,
        _READS: _described_on_disk,
        _ZOO: _described_zoo,
        _SCENES: _described_scenes,
        EMBEDDED_TEXTS: _described_texts,
    }
    if target not in describes or any(map(_is_node, node.values())):
        return None
    given = _arguments(node)
    if target == _LOADS and given.get("streaming"):
        raise FusionBenchError(WHY_NOT_STREAMED, place=("streaming",))
    name = next((given[k] for k in ("path", "dataset_path", "name") if k in given), target)
    with reading("dataset", str(name)), fence(node, *([scratch] if scratch else [])):
        found = describes[target](_arguments(with_own_tables(node)), scratch)
        if found is not None and target in (_LOADS, _READS):
            _refuse_split(found, given.get("split"), str(name))
    return found


def plan_dataset(
    plan: Plan, node: Any, place: DatasetPlace, scratch: Path | None
) -> Described | None:
    """Note in a plan what loading a dataset takes; return as ``describe``.

    Raises:
        FusionBenchError: as ``describe``, with the dataset's place.
    """
    with place.located():
        described = describe(node, scratch)
    if described is not None and described.download != 0:
        plan.add(Step("download", node["path"], described.download, hub_cache(), "HF_HOME"))
    if described is not None and described.prepared:
        cache = Path(node.get("cache_dir") or datasets_cache())
        plan.add(Step("prepare", node["path"], described.prepared, cache, "HF_HOME"))
    return described


def load_split(node: Any) -> Any:
    """Load what a dataset's node names; a ``DatasetDict`` where that is no single split.

    ``datasets.load_from_disk`` takes no ``split``; here it does.

    Args:
        node: a call as ``describe`` takes it, or a dataset.

    Raises:
        FusionBenchError: a source that cannot be read, or has no such split; places are relative
            to the node.
    """
    if not isinstance(node, Mapping) or node.get("_target_") != _READS or "split" not in node:
        return load("dataset", node)
    split, name = node["split"], str(node.get("dataset_path"))
    found = load("dataset", {k: v for k, v in node.items() if k != "split"})
    if split is None:
        return found
    if not isinstance(found, Mapping):
        _refuse_split_of_one(split, None if found.split is None else str(found.split), name)
        return found
    from datasets import ReadInstruction, concatenate_datasets

    with reading("dataset", name):
        sizes = {own: len(rows) for own, rows in found.items()}
        parts = ReadInstruction.from_spec(str(split)).to_absolute(sizes)
    chosen = [
        found[part.splitname]
        if (part.from_, part.to) == (0, sizes[part.splitname])
        else found[part.splitname].select(range(part.from_, part.to))
        for part in parts
    ]
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def split_names(split: str) -> list[str]:
    """Return the names in what ``datasets`` takes for a split: ``train[:80%]+test`` has two."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def names_no_split(splits: Mapping[str, Any]) -> FusionBenchError:
    """Return what to say of a node that stands for several splits."""
    return FusionBenchError("names no split.", f"Add 'split: …', one of: {', '.join(splits)}.")


def refuse_unusable(dataset: Any, place: DatasetPlace, folders: Folders) -> None:
    """Refuse what is no single split whose samples can be counted, or is read from elsewhere.

    Raises:
        FusionBenchError: it is so.
    """
    from datasets import IterableDataset

    with place.located():
        if isinstance(dataset, dict):
            raise names_no_split(dataset)
        if isinstance(dataset, IterableDataset):
            raise FusionBenchError(WHY_NOT_STREAMED)
        for table in dataset.cache_files:
            folders.refuse_outside(table["filename"])


def columns_sha256(dataset: "Dataset", columns: Sequence[str], known: str = "") -> str:
    """Return the hash of what some columns of a split hold, after that of ``known``."""
    from pyarrow import PythonFile, ipc

    digest = _Digest(known)
    table = dataset.select_columns(list(columns)).with_format("arrow")[:]
    with ipc.new_stream(PythonFile(digest, "w"), table.schema) as stream:
        stream.write_table(table.replace_schema_metadata(None).combine_chunks())
    return digest.sha256.hexdigest()


class _Digest:
    """A file that keeps no more than the hash of what is written into it."""

    closed = False

    def __init__(self, known: str) -> None:
        self.sha256 = hashlib.sha256(known.encode())

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def datasets_cache() -> Path:
    """Return where ``datasets`` keeps its tables."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE)


def _refuse_split(found: Described, split: Any, name: str) -> None:
    if split is None and found.splits:
        raise names_no_split(found.splits)
    for own in split_names(split) if isinstance(split, str) else ():
        if found.splits and own not in (*found.splits, "all"):
            raise FusionBenchError(
                f"Cannot read the dataset '{name}': it has no split '{own}'.",
                did_you_mean(own, found.splits),
            )


def _refuse_split_of_one(split: Any, own: str | None, name: str) -> None:
    """Refuse a split of what is a single one, unless it is that one."""
    if split is not None and split != own:
        raise FusionBenchError(
            f"'{name}' holds a single dataset, which has no split '{split}'.",
            "Remove the key.",
            place=("split",),
        )


def _arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in node.items() if not str(name).startswith("_")}


def _is_node(value: Any) -> bool:
    """Return whether a value is made by a call of its own; other mappings are plain data."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_is_node, value.values()))
    return isinstance(value, list) and any(map(_is_node, value))


def _described_zoo(given: Mapping[str, Any], scratch: Path | None) -> Described:
    from datasets import ClassLabel, Features, Image

    name, split = given.get("name"), given.get("split", "test")
    if name not in TASKS or split not in SPLITS:
        load_from_zoo(str(name), str(split))  # says what there is, and builds nothing
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASS_NAMES[str(name)]))})
    return Described(dict.fromkeys(SPLITS), features)


def _described_scenes(given: Mapping[str, Any], scratch: Path | None) -> Described:
    if (split := given.get("split", "test")) not in SPLITS:
        dense.load_dataset(str(split))  # says what there is, and builds nothing
    return Described(dict.fromkeys(SPLITS), dense.columns())


def _described_texts(given: Mapping[str, Any], scratch: Path | None) -> Described:
    name, split = str(given.get("name")), str(given.get("split", "test"))
    language.check_dataset(name, split)
    drawn = embedded_rows(name, split, keeps=scratch is None)
    features = Columns(list(drawn[0]), lambda: language.columns(name))
    return Described(dict.fromkeys(SPLITS), features)


def _described_on_disk(given: Mapping[str, Any], scratch: Path | None) -> Described | None:
    """Read the JSON that ``save_to_disk`` leaves."""
    from datasets import DatasetInfo

    name = str(given.get("dataset_path"))
    place = Path(name).expanduser()
    if "://" in name:
        return None
    refuse_missing_path(f"{place.absolute()}")
    if (place / "dataset_dict.json").exists():
        splits = json.loads((place / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return Described(
            dict.fromkeys(splits),
            DatasetInfo.from_directory(place / splits[0]).features,
            column=lambda split, column: _on_disk(place / split, column),
        )
    own = json.loads((place / "state.json").read_text(encoding="utf-8"))["_split"]
    _refuse_split_of_one(given.get("split"), own, name)
    return Described(
        {},
        DatasetInfo.from_directory(place).features,
        column=lambda split, column: _on_disk(place, column),
    )


def _on_disk(place: Path, column: str) -> Any:
    from datasets import Dataset

    return Dataset.load_from_disk(place).select_columns(column).with_format("arrow")[:][column]


def _described_by_builder(given: Mapping[str, Any], scratch: Path | None) -> Described:
    import datasets

    takes = inspect.signature(datasets.load_dataset_builder).parameters
    loads = inspect.signature(datasets.load_dataset).parameters
    options = {k: v for k, v in given.items() if k in takes or k not in loads}
    root = Path(options.get("cache_dir") or datasets.config.HF_DATASETS_CACHE)
    kept_aside = scratch is not None and not datasets.config.HF_HUB_OFFLINE
    if kept_aside:
        options["cache_dir"] = str(scratch)
    with _hub_cache(scratch) if kept_aside and scratch is not None else nullcontext():
        builder = datasets.load_dataset_builder(**options)
    cached = Path(builder.cache_dir)
    if kept_aside and scratch is not None:
        cached = root / cached.relative_to(scratch)
    files = {str(s): list(f) for s, f in (builder.config.data_files or {}).items()}
    info = builder.info
    splits = {name: split.num_examples for name, split in (info.splits or {}).items()}
    known = {split: splits.get(split) for split in files} or splits
    local = all(Path(file).is_file() for own in files.values() for file in own)
    features, column = info.features, None
    if local and files:
        schemas = {split: _parquet(own) for split, own in files.items()}
        known = {split: schema[0] for split, schema in schemas.items()}
        if all(schema[1] is not None for schema in schemas.values()):
            column = partial(_column_of_parquet, files)
        features = features or next((schema[1] for schema in schemas.values()), None)
        features = features or _of_folders(builder)
    if cached.is_dir():
        return Described(known, features, column=column)
    size = sum(Path(f).stat().st_size for own in files.values() for f in own) if local else None
    return Described(
        known, features, 0 if local else info.download_size, info.dataset_size or size, column
    )


def _of_folders(builder: "DatasetBuilder") -> "Features | None":
    """Return the columns of a folder of pictures, whose directories name the classes.

    The builder finds them out by the files' names, as it does before it makes a dataset of them.
    """
    from datasets import DownloadManager
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import (
        FolderBasedBuilder,
    )

    files = [Path(file) for own in builder.config.data_files.values() for file in own]
    if not isinstance(builder, FolderBasedBuilder) or any(f.suffix == ".zip" for f in files):
        return None
    builder._split_generators(DownloadManager(dataset_name=builder.dataset_name))
    return builder.info.features


def _column_of_parquet(files: Mapping[str, Sequence[str]], split: str, column: str) -> Any:
    import pyarrow
    from pyarrow.parquet import read_table

    tables = [read_table(file, columns=[column], partitioning=None) for file in files[split]]
    return pyarrow.chunked_array([c for table in tables for c in table.column(column).chunks])


def _parquet(files: list[str]) -> "tuple[int | None, Features | None]":
    """Return the number of rows and the columns in the files' footers."""
    if not all(file.endswith(".parquet") for file in files):
        return None, None
    import pyarrow.parquet
    from datasets import Features

    footers = [pyarrow.parquet.read_metadata(file) for file in files]
    schema = footers[0].schema.to_arrow_schema()
    return sum(footer.num_rows for footer in footers), Features.from_arrow_schema(schema)


@contextmanager
def _hub_cache(directory: Path) -> Iterator[None]:
    """Let the Hub's client keep what it fetches in ``directory``, for the length of a context."""
    from huggingface_hub import constants

    before, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, str(directory)
    try:
        yield
    finally:
        constants.HF_HUB_CACHE = before
