"""What a dataset tells of itself before it is loaded: columns, classes, splits and sizes."""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_bench.addresses import fence, refuse_addresses
from fusion_bench.errors import FusionBenchError, did_you_mean
from fusion_bench.sources import reading, refuse_missing_path
from fusion_bench.zoo import CLASS_NAMES, SPLITS, TASKS
from fusion_bench.zoo import load_dataset as load_from_zoo

if TYPE_CHECKING:
    from datasets import Features

_LOADS = "datasets.load_dataset"
_READS = "datasets.load_from_disk"
_ZOO = "fusion_bench.zoo.load_dataset"


@dataclass(frozen=True)
class Described:
    """A dataset as its card, its files' schema or its builder describe it.

    Attributes:
        splits: a split's name to its number of samples, where that is known.
        features: the columns' types, where they are known.
        download: bytes to fetch; 0 where it is here, None where nobody knows.
        prepared: bytes that it takes as Arrow tables, beside those; likewise.
    """

    splits: Mapping[str, int | None]
    features: "Features | None"
    download: int | None = 0
    prepared: int | None = 0


def describe(node: Any, key: str, scratch: Path | None = None) -> Described | None:
    """Describe what a dataset's node loads; None where only loading it can tell.

    No data is downloaded. With a ``scratch`` directory nothing is put into the caches of Hugging
    Face either.

    Args:
        node: a call of ``datasets.load_dataset`` or ``load_from_disk``, or a dataset of the zoo.
        key: its place in the config.
        scratch: a directory for what has to be fetched, such as dataset cards.

    Raises:
        FusionBenchError: a source that is not there, or has no such split.
    """
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if target in (_LOADS, _READS):
        refuse_addresses(node, key)
    if target not in (_LOADS, _READS, _ZOO) or any(isinstance(v, Mapping) for v in node.values()):
        return None
    given = {name: value for name, value in node.items() if not str(name).startswith("_")}
    describes = {_LOADS: _described_by_builder, _READS: _described_on_disk, _ZOO: _described_zoo}
    name = next((given[k] for k in ("path", "dataset_path", "name") if k in given), key)
    with reading("dataset", str(name)), fence(node, *([scratch] if scratch else [])):
        found = describes[target](given, scratch)
        if found is not None and target != _ZOO:
            _refuse_split(found, given.get("split"), str(name), key)
    return found


def split_names(split: str) -> list[str]:
    """Return the names in what ``datasets`` takes for a split: ``train[:80%]+test`` has two."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def names_no_split(key: str, splits: Mapping[str, Any]) -> FusionBenchError:
    """Return what to say of a node that stands for several splits."""
    return FusionBenchError(f"{key}: names no split. Add 'split: …', one of: {', '.join(splits)}.")


def datasets_cache() -> Path:
    """Return where ``datasets`` keeps its tables."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE)


def _refuse_split(found: Described, split: Any, name: str, key: str) -> None:
    if split is None and found.splits:
        raise names_no_split(key, found.splits)
    for own in split_names(split) if isinstance(split, str) else ():
        if found.splits and own not in (*found.splits, "all"):
            raise FusionBenchError(
                f"{key}: Cannot read the dataset '{name}': it has no split '{own}'. "
                + did_you_mean(own, found.splits)
            )


def _described_zoo(given: Mapping[str, Any], scratch: Path | None) -> Described:
    from datasets import ClassLabel, Features, Image

    name, split = given.get("name"), given.get("split", "test")
    if name not in TASKS or split not in SPLITS:
        load_from_zoo(str(name), str(split))  # says what there is, and builds nothing
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASS_NAMES[str(name)]))})
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
            dict.fromkeys(splits), DatasetInfo.from_directory(place / splits[0]).features
        )
    return Described({}, DatasetInfo.from_directory(place).features)


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
    features = info.features
    if local and files:
        schemas = {split: _parquet(own) for split, own in files.items()}
        known = {split: schema[0] for split, schema in schemas.items()}
        features = features or next((schema[1] for schema in schemas.values()), None)
    if cached.is_dir():
        return Described(known, features)
    size = sum(Path(f).stat().st_size for own in files.values() for f in own) if local else None
    return Described(known, features, 0 if local else info.download_size, info.dataset_size or size)


def _parquet(files: list[str]) -> "tuple[int | None, Features | None]":
    """Return the number of rows and the columns that the files' footers tell."""
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
