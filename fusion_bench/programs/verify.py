"""Verifies a merged model: that its files are whole, finite, and what recipe and report say."""

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from fusion_bench import modelpool
from fusion_bench.modelpool import AdapterPool, HFModelPool
from fusion_bench.modelpool.kinds import pool_node
from fusion_bench.problems import FusionBenchError, ResultError
from fusion_bench.programs.recompute import NotComputed, recompute
from fusion_bench.report import Report
from fusion_bench.repository import locate
from fusion_bench.sources import ZOO, unbuilt
from fusion_bench.storage import file_sha256
from fusion_bench.weights import Weights
from fusion_bench.weights.digest import sha256
from fusion_bench.weights.stream import PIECE

#: So many entries are computed again.
ENTRIES = 16
#: The recipe in a model's card.
_RECIPE = re.compile(r"^## Recipe\n\n(`{3,})yaml\n(.*?)\n\1$", re.MULTILINE | re.DOTALL)


def verify(
    folder: Path, report: Path | None = None, entries: int | None = ENTRIES
) -> Iterator[str]:
    """Yield what is sound, a sentence each.

    Args:
        folder: a merged model's.
        report: the ``report.json`` of the run, or the run's folder.
        entries: how many entries are computed again from the recipe; ``None`` computes all.

    Raises:
        FusionBenchError: a folder without a model, or a file that is no report.
        ResultError: entries that are not finite, other sources than the recipe has, or other
            weights than the recipe gives or the report has. ``NotComputed`` where neither of both
            was compared.
    """
    recipe = recipe_of(folder)
    weights = _pool(folder, recipe).weights("model")
    parameters = sum(weights.spec(name).numel for name in weights)
    bad = [name for name in weights if not _finite(weights, name)]
    if bad:
        raise ResultError(
            f"'{folder}': {len(bad)} of {len(weights)} entries hold NaN or infinity: '{bad[0]}' …"
        )
    yield f"{len(weights)} entries with {parameters:,} parameters are there, all finite."
    yield from _files(folder, recipe)
    place, missing = yield from _sources(folder, recipe)
    try:
        yield _computed_again(folder.absolute(), recipe, place, missing, entries)
    except NotComputed as error:
        if report is None:
            raise NotComputed(f"'{folder}' is not verified. {error}") from error
        yield str(error)
    if report is not None:
        yield _of_report(folder, weights, report)
    yield f"'{folder}' is verified."


def _computed_again(
    folder: Path, recipe: Mapping[str, Any], place: Path, missing: bool, entries: int | None
) -> str:
    """Compare entries with what the recipe gives.

    Args:
        folder: the model's, absolute.
        recipe: of its card.
        place: what the recipe's names of folders are relative to.
        missing: whether a source is not here.
        entries: how many are compared; ``None`` compares all.

    Raises:
        NotComputed: nothing was computed again.
        ResultError: other weights than the recipe gives.
    """
    if not recipe:
        raise NotComputed("It has no recipe: FusionBench did not write it, or no longer so.")
    if missing:
        raise NotComputed(
            "Nothing was computed again: that needs all models, where the recipe names them."
        )
    if entries == 0:
        raise NotComputed("Nothing was computed again, as --entries 0 asks.")
    with chdir(place):  # the names are in many places of a config
        return recompute(folder, recipe["config"], entries)


def _of_report(folder: Path, weights: Weights, report: Path) -> str:
    """Compare the weights with a report's.

    Raises:
        ResultError: none of its merged models has them.
    """
    found = Report.load(report / "report.json" if report.is_dir() else report)
    identity = sha256(weights)
    merged = {name: one for name, one in found.models.items() if one.role == "merged"}
    if identity not in {model.identity for model in merged.values()}:
        raise ResultError(
            f"'{folder}' has other weights than the merged model of '{report}'.",
            details=[
                f"{identity} here",
                *(f"{model.identity} {name}" for name, model in merged.items()),
            ],
        )
    return f"The weights are those of the report: {identity}."


def _finite(weights: Weights, name: str) -> bool:
    if not weights.spec(name).dtype.is_floating_point:
        return True
    pieces = weights.pieces(name, PIECE)
    return all(bool(weights.read(name, *piece).isfinite().all()) for piece in pieces)


def _files(folder: Path, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Compare the files beside the weights, such as config and tokenizer, with the recipe.

    Raises:
        ResultError: a file that is missing or has another hash.
    """
    hashes: Mapping[str, str] = recipe.get("files", {})
    for name, digest in hashes.items():
        if not (folder / name).is_file():
            raise ResultError(f"'{folder}' lacks '{name}', which was written with it.")
        if file_sha256(folder / name) != digest:
            raise ResultError(f"'{folder / name}' is not the file that was written.")
    if hashes:
        yield f"{len(hashes)} files beside the weights are as they were written."


def recipe_of(folder: Path) -> Mapping[str, Any]:
    """Return the recipe of a model's card, or else in its weights; empty where there is none.

    Raises:
        FusionBenchError: it cannot be read.
    """
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    match = _RECIPE.search(text)
    written = match[2] if match else _in_weights(folder)
    if written is None:
        return {}
    try:
        found = yaml.safe_load(written)  # JSON is YAML
        files = dict(found.get("files") or {})
        return {
            "sources": dict(found["sources"]),
            "config": dict(found["config"]),
            "files": files,
            "folder": found.get("folder"),
        }
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise FusionBenchError(f"'{folder}': its recipe cannot be read.") from error


def _in_weights(folder: Path) -> str | None:
    """Return the recipe in the header of a folder's weights."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("fusion_bench")
    return None


def _pool(folder: Path, recipe: Mapping[str, Any]) -> HFModelPool | AdapterPool:
    """Return a pool of the model alone, which says which entries are the model's.

    It is of the kind that the model was merged by, or else of the one that its config names.
    """
    models = {"model": str(folder.absolute())}
    node = recipe.get("config", {}).get("modelpool")
    if not isinstance(node, Mapping):
        node = pool_node(models, heads=True)
    found: object = vars(modelpool).get(str(node.get("_target_")).rpartition(".")[2])
    if found is AdapterPool:
        return AdapterPool(models)
    if not isinstance(found, type) or not issubclass(found, HFModelPool):
        found = HFModelPool
    if found is HFModelPool:
        return HFModelPool(models, str(node.get("model_class") or "AutoModel"))
    return found(models)


def _sources(folder: Path, recipe: Mapping[str, Any]) -> Generator[str, None, tuple[Path, bool]]:
    """Compare the sources that are on this machine with the recipe.

    Returns:
        What the recipe's names of folders are relative to, and whether a source is missing.

    Raises:
        ResultError: another hash.
    """
    if not recipe:
        yield "It has no recipe, so its sources are not compared."
    sources: Mapping[str, Mapping[str, Any]] = recipe.get("sources", {})
    places = [Path.cwd()]
    if isinstance(run_from := recipe.get("folder"), str):
        places.insert(0, (folder.resolve() / run_from).resolve())
    places = [place for place in places if place.is_dir()]
    found = {
        place: {name: _here(source, place) for name, source in sources.items()} for place in places
    }
    place = next((one for one in places if None not in found[one].values()), places[0])
    missing = False
    for name, source in sources.items():
        known = found[place][name]
        if known is None:
            where = place / str(source.get("source"))
            said = f" ('{where}')" if run_from and not source.get("commit") else ""
            yield f"{name}: '{source.get('source')}'{said} is not on this machine."
            missing = True
            continue
        for file, path in known.items():
            if file_sha256(path) != source["sha256"][file]:
                raise ResultError(f"{name}: '{path}' is not the file that was merged.")
        yield f"{name}: '{source.get('source')}' has the files that were merged."
    return place, missing


def _here(source: Mapping[str, Any], place: Path) -> dict[str, Path] | None:
    """Return where a source's files are on this machine; ``None`` if one is not.

    Those of an adapter may be its base's.
    """
    files = [*dict(source.get("sha256") or {})]
    folders = [_folder(str(source.get("source")), source.get("commit"), files, place)]
    if "base" in source:
        folders.append(_folder(str(source["base"]), source.get("base_commit"), files, place))
    found: dict[str, Path] = {}
    for file in files:
        paths = (folder / file if folder.is_dir() else folder for folder in folders)
        here = next((path for path in paths if path.is_file()), None)
        if here is None:
            return None
        found[file] = here
    return found or None


def _folder(name: str, commit: object, files: Sequence[str], place: Path) -> Path:
    """Return where a model or its file is on this machine, if it is."""
    if name.startswith(ZOO) and unbuilt(name) is None:
        return locate(name).fetch(*files)
    here = place / Path(name).expanduser()
    if isinstance(commit, str) and not here.exists():
        from huggingface_hub import try_to_load_from_cache

        repository = name.partition("@")[0]
        found = [try_to_load_from_cache(repository, file, revision=commit) for file in files]
        cached = [Path(file).parent for file in found if isinstance(file, str)]
        return cached[0] if cached else here
    return here
