"""Copy a config into a file of your own, to be changed and run: 'fusion_bench FILE'.

A method, a pool of models or of tasks becomes a whole config: one that is there already, with your
choice in it, and each of a method's options written out with its meaning.
"""

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion_bench.catalog import Entry, Kind

EXAMPLES = """
fusion_bench cp ties_merging my.yaml
fusion_bench cp demo_language my.yaml && fusion_bench my.yaml
"""
COPIED: tuple["Kind", ...] = ("methods", "models", "tasks", "configs")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the name, the file and the permission to replace it."""
    parser.add_argument("name", help="as 'fusion_bench ls' prints it")
    parser.add_argument("file", type=Path, help="the YAML to write")
    parser.add_argument("--kind", choices=COPIED, help="where a name is of several")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")


def run(arguments: Namespace) -> None:
    """Write the file.

    Raises:
        FusionBenchError: no such name, a file that is there already, or one of another kind.
    """
    from fusion_bench.catalog import entries, find
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.storage import write_text

    file: Path = arguments.file
    if file.suffix not in (".yaml", ".yml"):
        raise FusionBenchError(f"'{file}' is no YAML.", f"Name it '{file.with_suffix('.yaml')}'.")
    if file.exists() and not arguments.overwrite:
        raise FusionBenchError(f"'{file}' is there already.", "Add --overwrite to replace it.")
    kinds: list[Kind] = [arguments.kind] if arguments.kind else list(COPIED)
    same = [each for each in entries() if each.name == arguments.name and each.kind in kinds]
    if len(same) > 1:
        raise FusionBenchError(
            f"'{arguments.name}' is one of {' and of '.join(each.kind for each in same)}.",
            f"Say which: '--kind {same[0].kind}'.",
        )
    entry = find(arguments.name, kinds)
    write_text(file, copied(entry, file))
    print(f"{file}: run it with: fusion_bench {shlex.quote(str(file))}")


def copied(entry: "Entry", file: Path) -> str:
    """Return the text of a whole config for an entry.

    Raises:
        FusionBenchError: an entry that is one model.
    """
    from fusion_bench.catalog import text_of
    from fusion_bench.configs import schema_line

    if entry.kind == "configs":
        return f"{schema_line(file)}\n{text_of(entry)}"
    return "\n".join([schema_line(file), *_whole(entry, file)]) + "\n"


def _whole(entry: "Entry", file: Path) -> Iterator[str]:
    """Yield the lines of the config whose defaults are ``base``, with the entry in it."""
    import yaml

    from fusion_bench.catalog import GROUPS, options, text_of
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.scripts.verbs.show import as_yaml

    if not entry.target:
        raise FusionBenchError(
            f"'{entry.name}' is one model.", f"Use it: 'modelpool.models.mine={entry.name}'."
        )
    group = GROUPS[entry.kind]
    yield f"# {entry.name}: {entry.summary}."
    yield "#"
    yield f"#   fusion_bench {shlex.quote(str(file))}"
    yield "defaults:"
    yield f"  - {_base(entry)}"
    yield f"  - override /{group}: {entry.name}"
    if entry.kind == "tasks":
        yield "  # The models that these tasks belong to:"
        yield "  # - override /modelpool: …"
    yield "  - _self_"
    given = yaml.safe_load(text_of(entry)) if entry.kind == "methods" else {}
    meanings = {option.name: option for option in options(entry.target)}
    own = {key: value for key, value in given.items() if key not in ("defaults", "_target_")}
    if own:
        yield from ("", f"{group}:")
    for key, value in own.items():
        if option := meanings.get(key):
            yield f"  # {option.type}: {option.meaning}"
        yield f"  {key}: {as_yaml(value)}"


def _base(entry: "Entry") -> str:
    """Return the config that goes best with an entry; models alone are not evaluated."""
    if entry.kind == "models":
        return "merge_llm"
    language = entry.kind == "tasks" and not entry.name.startswith(("CLIP", "Image"))
    return "demo_language" if language else "fabric_model_fusion"
