"""Show one thing: what it does, its options with types, defaults and meanings, its YAML, its page.

NAME is what 'fusion_bench ls' prints, or another name of it, such as ties.
"""

import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion_bench.catalog import Entry

EXAMPLES = """
fusion_bench show ties
fusion_bench show demo_language
fusion_bench show CausalLMPool/zoo
"""
_FLAGS = {"methods": "method=", "models": "modelpool=", "tasks": "taskpool="}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the name."""
    parser.add_argument("name", help="of a method, a model, a task, a dataset or a config")


def run(arguments: Namespace) -> None:
    """Print what is known of it, of each kind that has the name.

    Raises:
        FusionBenchError: there is nothing of that name, with the nearest.
    """
    from fusion_bench.catalog import entries, find

    found = [entry for entry in entries() if entry.name == arguments.name]
    for entry in found or [find(arguments.name)]:
        print("\n".join(_lines(entry)))


def _lines(entry: "Entry") -> Iterator[str]:
    from fusion_bench.catalog import options, text_of

    yield f"{entry.name}: {entry.summary}"
    yield ""
    facts = {
        "use": _use(entry),
        "needs" if entry.kind == "methods" else "from": entry.needs or "nothing but the models",
        "cost": entry.cost,
        "paper": entry.paper,
        "page": f"docs/{entry.page}" if entry.page else "",
        "class": entry.target,
    }
    yield from (f"  {name:6} {fact}" for name, fact in facts.items() if fact)
    if own := options(entry.target):
        yield from ("", "options:")
        for option in own:
            given = "required" if option.required else f"default {as_yaml(option.default)}"
            yield f"  {option.name}: {option.type}; {given}"
            if option.meaning:
                yield textwrap.indent(textwrap.fill(option.meaning, 90), " " * 6)
    if text := text_of(entry):
        yield from ("", f"config/{entry.file}:", textwrap.indent(text.rstrip(), "  "))


def _use(entry: "Entry") -> str:
    if entry.kind == "configs":
        folder, _, name = entry.name.rpartition("/")
        if folder:
            return f"fusion_bench cp {entry.name} my.yaml"
        return f"fusion_bench --config-name {name}"
    if entry.kind == "models" and not entry.target:
        return f"fusion_bench modelpool.models.mine={entry.name}"
    return f"fusion_bench {_FLAGS[entry.kind]}{entry.name}" if entry.kind in _FLAGS else ""


def as_yaml(value: object) -> str:
    """Return a value as YAML in one line."""
    import yaml

    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    )
