"""Verify a merged model's folder: its files are whole, finite, and what recipe and report say.

Every entry is read. The models that it was merged from, as far as they are on this machine, are
compared with the recipe's hashes. If all are, some entries are computed again from the recipe, and
compared with those of the folder. With a report, the weights are compared with the hash that it has
of them. The exit code is 1 if something differs, and if the weights were compared with neither.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

EXAMPLES = """
fusion_bench verify merged
fusion_bench verify merged --entries all
fusion_bench verify merged --report outputs/2026-01-31/12-00-00/report.json
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the folder and the report."""
    parser.add_argument("folder", type=Path, help="a folder that fusion_bench has written")
    parser.add_argument(
        "--entries",
        default="16",
        metavar="N",
        help="how many entries are computed again: a number, or all; default: 16",
    )
    parser.add_argument("--report", type=Path, help="its run's report.json or folder")


def run(arguments: Namespace) -> None:
    """Print what was found.

    Raises:
        ResultError: something differs, or the weights were compared with nothing.
    """
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.programs.verify import verify

    if not (arguments.entries == "all" or arguments.entries.isdecimal()):
        raise FusionBenchError(f"--entries: '{arguments.entries}' is not a number.", "Or give all.")
    entries = None if arguments.entries == "all" else int(arguments.entries)
    for fact in verify(arguments.folder, arguments.report, entries):
        print(fact)
