"""Run a report's config again, or the methods of a published table, and compare every figure.

A report is named by its file or by the folder of its run. A table is one that comes with the
package (zoo, clip_vit_b32_ta8) or a YAML of your own. The exit code is 1 if a figure differs by
more than its tolerance.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

EXAMPLES = """
fusion_bench reproduce outputs/2026-01-31/12-00-00/report.json
fusion_bench reproduce report.json --tolerance 0.01 fabric=auto
fusion_bench reproduce zoo 'methods=[task_arithmetic]'
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the report or table."""
    parser.add_argument("source", help="a report.json, the folder of a run, or a table")
    parser.add_argument("overrides", nargs="*", default=[], help="settings to change, as key=value")
    parser.add_argument("--tolerance", type=float, help="for a report: a share of each value")
    parser.add_argument("--dry-run", action="store_true", help="only check that it can be run")


def run(arguments: Namespace) -> None:
    """Run the program for what is named.

    Raises:
        FusionBenchError: a tolerance for a table, which has its own.
    """
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.scripts.run import run_composed
    from fusion_bench.scripts.words import in_grammar

    path = Path(arguments.source)
    report = path.is_dir() or path.suffix == ".json"
    if arguments.tolerance is not None and not report:
        raise FusionBenchError("--tolerance: a table has its own tolerances.", "Remove it.")
    words = ["--config-name", "repeat" if report else "reproduce"]
    words.append(f"{'report' if report else 'reference'}={in_grammar(arguments.source)}")
    if arguments.tolerance is not None:
        words.append(f"tolerance={arguments.tolerance}")
    words.append(f"dry_run={str(arguments.dry_run).lower()}")
    run_composed([*words, *arguments.overrides])
