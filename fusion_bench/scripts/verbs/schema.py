"""Write the JSON schemas by which an editor completes, explains and checks YAMLs while you type.

The schemas of what FusionBench has are installed with it, and the YAMLs of 'fusion_bench cp' name
them. Write your own to have the classes of your package in them too, and again after a change.
"""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

EXAMPLES = """
fusion_bench schema schema --allow my_methods
fusion_bench schema .vscode/schema
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the directory and the packages of the user's own."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        type=Path,
        default=Path("schema"),
        help="where to write them; by default 'schema'",
    )
    parser.add_argument(
        "--allow",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="a package or module whose classes your configs call",
    )


def run(arguments: Namespace) -> None:
    """Write the files, and say how a YAML names its schema.

    Raises:
        FusionBenchError: a package that cannot be imported.
    """
    from fusion_bench.editor import CONFIG, schema_files
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.schemas import targets, users_targets
    from fusion_bench.storage import disk_failures, write_text
    from fusion_bench.trust import TASK_CODE, allow, allowed_packages

    for packages in arguments.allow:
        allow(packages)
    own: list[str] = []
    for package in sorted(allowed_packages() - {TASK_CODE}):
        try:
            own += users_targets(package)
        except ImportError as error:
            raise FusionBenchError(
                f"--allow: cannot import '{package}': {error}.",
                "Install it, or name the directory that it is in in PYTHONPATH.",
            ) from error
    directory: Path = arguments.directory
    files = schema_files([*targets(), *dict.fromkeys(own)])
    if directory.exists() and not directory.is_dir():
        raise FusionBenchError(f"'{directory}' is a file.", "Name a folder.")
    for name in files:
        if (directory / name).exists() and not _is_schema(directory / name):
            raise FusionBenchError(
                f"'{directory / name}' is no schema, and is not replaced.", "Name another folder."
            )
    with disk_failures():
        for name, schema in files.items():
            write_text(directory / name, json.dumps(schema, indent=1, ensure_ascii=False) + "\n")
    print(f"{directory}: schemas of all that configs may call{', yours too' if own else ''}.")
    print("Begin a YAML with this line; in the same folder, a relative path does as well:")
    print(f"# yaml-language-server: $schema={(directory / CONFIG).resolve().as_uri()}")


def _is_schema(file: Path) -> bool:
    """Return whether a file is a JSON schema, as this verb writes them."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "json-schema.org" in str(found.get("$schema"))
