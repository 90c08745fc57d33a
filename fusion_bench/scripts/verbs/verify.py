"""Verify a merged model's folder: its files are whole, finite, and what recipe and report say.

Every entry is read. Of the models that it was merged from, those that are on this machine are
compared with the recipe's hashes. With a report, the weights are compared with the hash that it has
of them. The exit code is 1 if something differs.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

EXAMPLES = """
fusion_bench verify merged
fusion_bench verify merged --report outputs/2026-01-31/12-00-00/report.json
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the folder and the report."""
    parser.add_argument("folder", type=Path, help="a folder that fusion_bench has written")
    parser.add_argument("--report", type=Path, help="its run's report.json or folder")


def run(arguments: Namespace) -> None:
    """Print what was found.

    Raises:
        ResultError: something differs.
    """
    from fusion_bench.programs.verify import verify

    for fact in verify(arguments.folder, arguments.report):
        print(fact)
