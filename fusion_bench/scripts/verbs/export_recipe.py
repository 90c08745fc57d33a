"""Write a recipe of mergekit that means the same as a config.

CONFIG is a YAML, the name of a config, the report.json of a run, or the folder of a merged model.
What no recipe can have is told, with its place; nothing is written then.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXAMPLES = """
fusion_bench export-recipe my.yaml
fusion_bench export-recipe merge_llm method=ties 'modelpool.models={_pretrained_: base, a: a}'
fusion_bench export-recipe outputs/2026-01-31/12-00-00/report.json -o recipe.yaml
fusion_bench export-recipe merged
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the config and the file."""
    parser.add_argument(
        "config", help="a YAML, the name of a config, a report.json, or a merged folder"
    )
    parser.add_argument("overrides", nargs="*", default=[], help="settings, as key=value")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="the recipe to write")


def run(arguments: Namespace) -> None:
    """Print the recipe, or write it.

    Raises:
        FusionBenchError: what cannot be read, or has no recipe.
    """
    import sys

    from fusion_bench.recipes.export import export
    from fusion_bench.storage import write_text

    exported = export(_config(arguments.config, arguments.overrides))
    if arguments.out is None:
        print(exported.text, end="")
    else:
        write_text(arguments.out, exported.text)
        print(f"{arguments.out}: merge it with: fusion_bench merge {arguments.out} OUT")
    for note in exported.notes:
        print(f"Note: {note}", file=sys.stderr)


def _config(name: str, overrides: list[str]) -> Mapping[str, Any]:
    """Return a resolved config."""
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.recipes import is_recipe, read_text
    from fusion_bench.scripts.run import composed_settings
    from fusion_bench.storage import read_json

    file = Path(name)
    if file.is_dir():
        return _of_folder(file, overrides)
    if file.suffix in (".yaml", ".yml") and file.is_file() and is_recipe(read_text(file)):
        raise FusionBenchError(
            f"'{file}' is a recipe of mergekit already.",
            f"Merge it with: fusion_bench merge {file} OUT",
        )
    if file.suffix != ".json":
        words = [name] if file.suffix in (".yaml", ".yml") else ["--config-name", name]
        return composed_settings([*words, *overrides])
    if not file.is_file():
        raise FusionBenchError(f"there is no '{file}'.", "Name a report.json.")
    _refuse_settings(name, overrides)
    report = read_json(file)
    run = report.get("run", report) if isinstance(report, dict) else {}
    config = run.get("config") if isinstance(run, dict) else None
    if not isinstance(config, dict):
        raise FusionBenchError(f"'{file}' has no config.", "Name the report.json of a run.")
    return config


def _of_folder(folder: Path, overrides: list[str]) -> Mapping[str, Any]:
    """Return the config that made the model in a folder."""
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.programs.verify import recipe_of

    _refuse_settings(str(folder), overrides)
    config = recipe_of(folder).get("config")
    if config:
        return dict(config)
    if (folder / "report.json").is_file():
        return _config(str(folder / "report.json"), [])
    own = folder / "mergekit_config.yml"
    remedy = f"Its recipe is '{own}'." if own.is_file() else "Name the report.json of its run."
    raise FusionBenchError(f"'{folder}' does not say how it was merged.", remedy)


def _refuse_settings(name: str, overrides: list[str]) -> None:
    from fusion_bench.problems import FusionBenchError

    if overrides:
        reason = f"'{overrides[0]}': what '{name}' records cannot be changed."
        raise FusionBenchError(reason, "Leave it out, or change the recipe that is written.")
