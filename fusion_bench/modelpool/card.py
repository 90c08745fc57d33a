"""How a merged model came about: the recipe in its metadata, and the card beside it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fusion_bench import __version__
from fusion_bench.shown import visible


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
        name: what the config calls it.
        commit: its state on the Hub.
        files: what its weights were read from.
        base: what an adapter was put on.
    """

    name: str
    commit: str | None = None
    files: tuple[Path, ...] = ()
    base: "Origin | None" = None


def recipe(
    config: Mapping[str, Any] | None,
    sources: Mapping[str, Origin],
    sha256: Callable[[Path], str],
) -> dict[str, Any]:
    """Return all that is needed to make the model again, as plain data.

    Args:
        config: the run's config.
        sources: name to source.
        sha256: gives a file's hash.
    """
    return {
        "version": __version__,
        "sources": {
            name: {
                "source": source.name,
                **({"commit": source.commit} if source.commit else {}),
                **({} if source.base is None else _base(source.base)),
                "sha256": {file.name: sha256(file) for file in source.files},
            }
            for name, source in sources.items()
        },
        "config": dict(config or {}),
    }


def model_card(title: str, recipe: Mapping[str, Any]) -> str:
    """Return the ``README.md`` of a merged model, with the header that the Hub reads."""
    from huggingface_hub import ModelCardData

    sources: Mapping[str, Mapping[str, Any]] = recipe["sources"]
    named = [(s["source"], s.get("commit")) for s in sources.values()]
    named += [(s["base"], s.get("base_commit")) for s in sources.values() if "base" in s]
    bases = list(dict.fromkeys(name.partition("@")[0] for name, commit in named if commit))
    header = ModelCardData(
        library_name="transformers",
        base_model=bases or None,
        base_model_relation="merge" if bases else None,
        tags=["merge", "fusion_bench"],
    ).to_yaml()
    rows = [
        f"| {_cell(name)} | {_place(source)} | {source.get('commit', '')} |"
        for name, source in sources.items()
    ]
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join(
        [
            "---",
            header,
            "---",
            "",
            f"# {title}",
            "",
            f"These weights were merged by FusionBench {recipe['version']} from the models below.",
            "",
            "| Name | Origin | Commit |",
            "| --- | --- | --- |",
            *rows,
            "",
            "## Recipe",
            "",
            f"{fence}yaml",
            text.rstrip(),
            fence,
            "",
        ]
    )


def _base(source: Origin) -> dict[str, str]:
    commit = {"base_commit": source.commit} if source.commit else {}
    return {"base": source.name, **commit}


def _place(source: Mapping[str, Any]) -> str:
    """Return a source's cell: its name, and for an adapter what it was put on."""
    base = f" on {_cell(source['base'])}" if "base" in source else ""
    return f"{_cell(source['source'])}{base}"


def _cell(text: str) -> str:
    """Return text that stays text in a table."""
    return "`" + re.sub(r"[|`\n]", " ", visible(text)) + "`"
