"""Writes what the command line, editors and pages know of every config, from the code itself.

    .venv/bin/python tools/write_catalog.py

It writes ``config/catalog.json``, the JSON schemas, and the tables of ``docs/choose.md``. It reads
signatures and docstrings, the YAMLs under ``config/``, the table of methods in the documentation,
and times and scores in ``benchmarks/results/``.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from inspect import getmodule
from pathlib import Path
from typing import Any

from fusion_bench.catalog import KINDS, Kind
from fusion_bench.configs import CONFIG_DIR, datasets, merged, suites
from fusion_bench.editor import schema_files
from fusion_bench.method import ExtractLora, TensorwiseAlgorithm
from fusion_bench.method.data import LearningAlgorithm
from fusion_bench.method.ensemble import EnsembleAlgorithm
from fusion_bench.schemas import targets
from fusion_bench.trust import find
from fusion_bench.zoo import families

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, str]

#: Methods that make a model for each task.
_PER_TASK = ("emr_merging/emr_merging", "tall_mask/task_arithmetic")

_POOLS = "configuration.md"
_TASKS = "evaluation.md"
_DOCUMENTED = {
    "compare": "compare.md",
    "demo_dense": "dense.md",
    "demo_language": "language_tasks.md",
    "evaluate": "evaluation.md",
    "fabric_model_fusion": "zoo.md",
    "merge_llm": "weights.md",
    "repeat": "reproduce.md",
    "reproduce": "reproduce.md",
    "scaling_study": "scaling_study.md",
    "scaling_study_language": "scaling_study.md",
    "search": "search.md",
    "search_evolution": "search.md",
    "search_optuna": "search.md",
    "search_race": "search.md",
    "search_winner": "search.md",
}


def written() -> dict[Path, str]:
    """Return the text of each file to write."""
    catalog = {kind: list(_ENTRIES[kind]()) for kind in KINDS}
    schema = CONFIG_DIR / "schema"
    return {
        CONFIG_DIR / "catalog.json": _json(catalog),
        RESULTS / "choose.md": "\n".join(_chooser(catalog["methods"])),
        **{schema / name: _json(own) for name, own in schema_files(targets()).items()},
    }


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _methods() -> Iterator[Row]:
    table = (ROOT / "docs" / "methods" / "index.md").read_text("utf-8")
    cost = json.loads((RESULTS / "methods_cost.json").read_text("utf-8"))
    times = cost["eight ViT-B/32 encoders into memory"]
    page = ""
    for row in re.findall(r"^\|(.*\| `[\w/]+` \|.*)\|$", table, re.MULTILINE):
        link, config, *_, summary = (cell.strip() for cell in row.split("|"))
        page = match[1] if (match := re.search(r"\((\w+\.md)\)", link)) else page
        name = config.strip("`")
        file = Path("method") / f"{name}.yaml"
        target = _target(file)
        yield {
            "name": name,
            "summary": summary,
            "target": target,
            "needs": _needs(find(target)),
            "cost": _cost(find(target), times.get(name)),
            "paper": _paper(find(target)),
            "page": f"methods/{page}",
            "file": file.as_posix(),
        }


def _chooser(methods: Iterable[Row]) -> Iterator[str]:
    """Yield the lines of one table for each kind of data that people have."""
    images, texts = (_scores(RESULTS / f"methods_{name}.md") for name in ("zoo", "language"))
    groups: dict[str, list[Row]] = {
        "Only the models": [],
        "The models and the pretrained model": [],
        "Data too": [],
        "A model for each task, or all models at once": [],
    }
    for row in methods:
        several = row["name"] in _PER_TASK or row["name"].startswith("ensemble/")
        data, base = "data" in row["needs"], "pretrained" in row["needs"]
        groups[list(groups)[3 if several else 2 if data else 1 if base else 0]].append(row)
    for title, rows in groups.items():
        yield from (f"### {title}", "")
        yield "| method | what it does | needs | cost | images, % | texts, % |"
        yield "| --- | --- | --- | --- | ---: | ---: |"
        for row in sorted(rows, key=lambda row: -float(images.get(row["name"], -1))):
            figures = (scores.get(row["name"], "–") for scores in (images, texts))
            cells = [f"[`{row['name']}`]({row['page']})", row["summary"], row["needs"] or "–"]
            yield f"| {' | '.join([*cells, row['cost'], *figures])} |"
        yield ""


def _scores(file: Path) -> dict[str, str]:
    """Return the last column of a table of results, by the method's name."""
    rows = re.findall(r"^\| ([\w/]+) \|.*\| ([\d.]+) \|$", file.read_text("utf-8"), re.MULTILINE)
    return dict(rows)


def _needs(method: type) -> str:
    base = not issubclass(method, EnsembleAlgorithm) and getattr(method, "needs_pretrained", False)
    data = ""
    if issubclass(method, LearningAlgorithm):
        data = "labelled data" if method.uses_labels else "data"
    return ", ".join(filter(None, ["pretrained" if base else "", data]))


def _cost(method: type, measured: Mapping[str, float] | None) -> str:
    if issubclass(method, LearningAlgorithm):
        return "learns"
    heavy = method is ExtractLora or (issubclass(method, TensorwiseAlgorithm) and method.heavy)
    times = measured["times the average"] if measured else 100.0 if heavy else 1.0
    return "low" if times <= 5 else "medium" if times <= 50 else "high"


def _paper(method: type) -> str:
    """Return the authors, title and address that a module's docstring ends with."""
    text = " ".join((getmodule(method).__doc__ or "").split())  # type: ignore[union-attr]
    found = re.findall(r"([A-Z][\w-]+(?: and [A-Z]\w+| et al\.)?, [^.]*?, (?:https?://\S+))", text)
    return found[-1].rstrip(".") if found else ""


def _models() -> Iterator[Row]:
    for _, node, row in _pools("modelpool"):
        given = [str(model) for model in node.get("models", {}).values()]
        whence = "Hub"
        if not given:
            whence = "yours"
        elif all(model.startswith("zoo:") for model in given):
            whence = "built here"
        said = f"{len(given) - ('_pretrained_' in node.get('models', {}))} models" if given else ""
        default = f"{said} fine-tuned from {given[0]}" if given else "models of your own"
        yield {**row, "summary": row["summary"] or default, "needs": whence, "page": _POOLS}
    for family in families.FAMILIES:
        for model in family.models:
            base, _, task = model.partition("_")
            summary = f"{base}, fine-tuned for {task}" if task else "a pretrained model of the zoo"
            yield {
                "name": f"zoo:{model}",
                "summary": summary,
                "needs": "built here",
                "page": "zoo.md",
            }
    seen = set()
    for group, _, node in suites():
        for key, model in node.items() if group.startswith("model/") else ():
            if model not in seen:
                base = key == "_pretrained_"
                summary = "a pretrained model" if base else f"a model fine-tuned for {key}"
                yield {"name": model, "summary": summary, "needs": "Hub"}
            seen.add(model)


def _tasks() -> Iterator[Row]:
    for _, node, row in _pools("taskpool"):
        tasks = [str(task) for task in node.get("tasks") or node.get("test_datasets") or ()]
        default = f"{len(tasks)} tasks: {', '.join(tasks)}" if tasks else "tasks of your own"
        whence = "yours" if not tasks else "built here" if "zoo" in row["name"] else "Hub"
        yield {**row, "summary": row["summary"] or default, "needs": whence, "page": _TASKS}


def _pools(group: str) -> Iterator[tuple[str, Mapping[str, Any], Row]]:
    """Yield name, node and what is known of each choice of a group."""
    for file in sorted((CONFIG_DIR / group).rglob("*.yaml")):
        path = file.relative_to(CONFIG_DIR)
        if not file.name.startswith("_"):
            name = path.relative_to(group).with_suffix("").as_posix()
            node = merged(path)
            row = {"name": name, "summary": _first_sentence(file), "target": node["_target_"]}
            yield name, node, {**row, "file": path.as_posix()}
    for own, name, made in suites():
        if own.partition("/")[0] == group:
            # What its defaults list names is a template, and models or datasets.
            template, brought = made["defaults"][:2]
            ((source, names),) = brought.items()
            node = merged(Path(template.strip("/").partition("@")[0]).with_suffix(".yaml"))
            if group == "modelpool":
                models = source.strip("/").partition("@")[0]
                found = (_suite_models()[f"{models}/{each}"] for each in names)
                node["models"] = dict(pair for each in found for pair in each.items())
            else:
                node["test_datasets"] = dict.fromkeys(names)
            name = f"{own.removeprefix(group).removeprefix('/')}/{name}"
            yield name, node, {"name": name, "summary": "", "target": node["_target_"]}


@cache
def _suite_models() -> Mapping[str, Mapping[str, str]]:
    return {f"{own}/{name}": dict(node) for own, name, node in suites() if own.startswith("model/")}


def _datasets() -> Iterator[Row]:
    splits: dict[str, list[str]] = {}
    nodes: dict[str, Mapping[str, Any]] = {}
    for group, name, node in datasets():
        parent, _, split = group.removeprefix("dataset/").rpartition("/")
        splits.setdefault(f"{parent}/{name}", []).append(split)
        nodes[f"{parent}/{name}"] = node[name]
    for name, given in splits.items():
        built = str(nodes[name]["_target_"]).startswith("fusion_bench.")
        source = nodes[name].get("path") or f"of the zoo: {nodes[name].get('name')}"
        yield {
            "name": name,
            "summary": f"{source} ({', '.join(given)})",
            "needs": "built here" if built else "Hub",
            "page": "configuration.md",
            "file": f"dataset/{name}.yaml",
        }


def _configs() -> Iterator[Row]:
    for file in [
        *sorted(CONFIG_DIR.glob("*.yaml")),
        *sorted(CONFIG_DIR.glob("_get_started/*.yaml")),
    ]:
        name = file.relative_to(CONFIG_DIR).with_suffix("").as_posix()
        yield {
            "name": name,
            "summary": _first_sentence(file),
            "target": _target(file),
            "page": _DOCUMENTED.get(name, "get_started/clip_simple_average.md"),
            "file": f"{name}.yaml",
        }


def _first_sentence(file: Path) -> str:
    """Return the first sentence of the comment that a YAML begins with."""
    comment = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("# "):
            break
        if not line.startswith("# yaml-language-server"):
            comment.append(line.removeprefix("# "))
    return " ".join(comment).partition(". ")[0].removesuffix(".")


def _target(file: Path) -> str:
    """Return the class that a YAML calls, or the one that its defaults list brings."""
    return str(merged(file)["_target_"])


_ENTRIES: Mapping[Kind, Callable[[], Iterator[Row]]] = {
    "methods": _methods,
    "models": _models,
    "tasks": _tasks,
    "datasets": _datasets,
    "configs": _configs,
}


if __name__ == "__main__":
    for path, text in written().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
