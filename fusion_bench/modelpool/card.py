"""How a merged model came about: the recipe in its metadata, and the card beside it.

A card is text that people may edit: what is added later replaces its own section alone.
"""

import os
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fusion_bench import __version__
from fusion_bench.command import typed
from fusion_bench.forms import plain_yaml
from fusion_bench.problems import FusionBenchError
from fusion_bench.redact import redacted
from fusion_bench.repository import Repository
from fusion_bench.shown import visible

#: A model's card, whose header states the license.
_CARD = "README.md"
_LONGEST_LICENSE = 80
_OTHER = "other: "
#: Before which section others are put.
_LAST = "Recipe"


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
        name: what the config calls it.
        commit: its state on the Hub.
        files: what its weights were read from.
        base: what an adapter was put on.
        license: what its own card says.
        models: what a merge was made of; it has no files itself.
    """

    name: str
    commit: str | None = None
    files: tuple[Path, ...] = ()
    base: "Origin | None" = None
    license: str | None = None
    models: "Mapping[str, Origin]" = field(default_factory=dict)


def stored(sources: Mapping[str, Origin]) -> dict[str, Origin]:
    """Return sources with the models of a merge in its place, as ``merge/model``."""
    found: dict[str, Origin] = {}
    for name, source in sources.items():
        inside = stored(source.models)
        found |= {f"{name}/{inner}": own for inner, own in inside.items()} or {name: source}
    return found


def stated_license(place: Repository) -> str | None:
    """Return the license that a model's card states, if it does; ``other: name`` for a rare one."""
    if _CARD not in place.files:
        return None
    from huggingface_hub import metadata_load

    try:
        content = metadata_load(place.fetch(_CARD) / _CARD) or {}
    except (FusionBenchError, ValueError, yaml.YAMLError, OSError, UnicodeDecodeError):
        return None  # a merge does not fail for its sake
    found, name = content.get("license"), content.get("license_name")
    if found == "other" and isinstance(name, str):
        found = f"{_OTHER}{name}"
    return " ".join(found.split())[:_LONGEST_LICENSE] if isinstance(found, str) else None


def recipe(
    config: Mapping[str, Any] | None,
    sources: Mapping[str, Origin],
    sha256: Callable[[Path], str],
    beside: Mapping[str, str] | None = None,
    path: Path | None = None,
) -> dict[str, Any]:
    """Return all that is needed to make the model again, as plain data.

    Folders keep the names that were typed. Where one is relative, ``folder`` tells what to: the
    folder of the run as seen from the model's, which names no more of this machine than it must.

    Args:
        config: the run's config.
        sources: name to source.
        sha256: gives a file's hash.
        beside: the hashes of the files beside the weights, such as config and tokenizer.
        path: the model's folder.
    """
    program, *words = typed()
    return {
        "version": __version__,
        "command": redacted(shlex.join([Path(program).name, *words])),
        **({} if path is None or not _relative(sources) else {"folder": _run_from(path)}),
        "sources": {
            name: {
                "source": source.name,
                **({"commit": source.commit} if source.commit else {}),
                **({} if source.base is None else _base(source.base)),
                **({} if source.license is None else {"license": source.license}),
                "sha256": {file.name: sha256(file) for file in source.files},
            }
            for name, source in sources.items()
        },
        **({"files": dict(beside)} if beside else {}),
        "config": dict(config or {}),
    }


def _relative(sources: Mapping[str, Origin]) -> bool:
    """Tell whether a source is named by a path from where the run is."""
    named = [own for source in sources.values() for own in (source, source.base) if own is not None]
    return any(
        own.commit is None and not Path(own.name).is_absolute() and Path(own.name).exists()
        for own in named
    )


def _run_from(path: Path) -> str:
    return Path(os.path.relpath(Path.cwd(), path.resolve())).as_posix()


def model_card(
    title: str,
    recipe: Mapping[str, Any],
    code: str | None = None,
    *,
    adapter: bool = False,
    notes: Collection[str] = (),
) -> str:
    """Return the ``README.md`` of a merged model, with the header that the Hub reads.

    Args:
        title: the model's name.
        recipe: how it was made.
        code: how it is used.
        adapter: whether it is a LoRA adapter.
        notes: sentences about it.
    """
    from huggingface_hub import ModelCardData

    sources: Mapping[str, Mapping[str, Any]] = recipe["sources"]
    named = [(s["source"], s.get("commit")) for s in sources.values()]
    named += [(s["base"], s.get("base_commit")) for s in sources.values() if "base" in s]
    bases = list(dict.fromkeys(name.partition("@")[0] for name, commit in named if commit))
    licenses = {source.get("license") for source in sources.values()}
    common = (next(iter(licenses)) or "") if len(licenses) == 1 else ""
    header = ModelCardData(
        library_name="peft" if adapter else "transformers",
        license="other" if common.startswith(_OTHER) else common or None,
        license_name=common.removeprefix(_OTHER) if common.startswith(_OTHER) else None,
        base_model=bases or None,
        base_model_relation=("adapter" if adapter else "merge") if bases else None,
        tags=[*(["lora"] if adapter else []), "merge", "fusion_bench"],
    ).to_yaml()
    rows = [
        f"| {_cell(name)} | {_place(source)} | {source.get('commit', '')} | {_license(source)} |"
        for name, source in sources.items()
    ]
    text = plain_yaml(dict(recipe))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join(
        [
            "---",
            header,
            "---",
            "",
            f"# {title}",
            "",
            f"{'This LoRA adapter was made' if adapter else 'These weights were merged'} by "
            f"FusionBench {recipe['version']} from the models below.",
            "",
            "| Name | Origin | Commit | License |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            *_of_licenses(licenses),
            *(line for note in notes for line in (note, "")),
            "The command was",
            "",
            "```bash",
            recipe["command"].replace("```", "` ` `"),
            "```",
            "",
            *([] if code is None else ["## Usage", "", "```python", code, "```", ""]),
            f"## {_LAST}",
            "",
            f"{fence}yaml",
            text.rstrip(),
            fence,
            "",
        ]
    )


def with_section(card: str, title: str, body: str) -> str:
    """Return a card with a section, in place of the one of that title or before the recipe."""
    section = f"## {title}\n\n{body.strip()}\n\n"
    own = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if own.search(card):
        return own.sub(lambda _: section, card, count=1)
    before, recipe, after = card.partition(f"\n## {_LAST}\n")
    return f"{before.rstrip()}\n\n{section}{recipe.lstrip()}{after}" if recipe else card + section


def _base(source: Origin) -> dict[str, str]:
    commit = {"base_commit": source.commit} if source.commit else {}
    return {"base": source.name, **commit}


def _place(source: Mapping[str, Any]) -> str:
    """Return a source's cell: its name, and for an adapter what it was put on."""
    base = f" on {_cell(source['base'])}" if "base" in source else ""
    return f"{_cell(source['source'])}{base}"


def _license(source: Mapping[str, Any]) -> str:
    return _cell(source["license"]) if source.get("license") else "not stated"


def _of_licenses(licenses: Collection[str | None]) -> list[str]:
    """Return what is to be said of the licenses of a merged model's sources."""
    if len(licenses) == 1 and None not in licenses:
        return []
    return ["The sources state different licenses, or none. The terms of each apply.", ""]


def _cell(text: str) -> str:
    """Return text that stays text in a table."""
    return "`" + re.sub(r"[|`\n]", " ", visible(text)) + "`"
