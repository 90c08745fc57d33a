"""Compare the merged models of several runs, on the samples that all of them were evaluated on.

The differences have confidence intervals, and there is a page with tables and pictures.
"""

from argparse import ArgumentParser, Namespace

EXAMPLES = """
fusion_bench compare outputs/2026-01-31/12-00-00 outputs/2026-01-31/13-00-00
fusion_bench compare average.json ties.json --names average ties
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the reports and their names."""
    parser.add_argument("reports", nargs="+", help="report.json files, or the folders of runs")
    parser.add_argument("--names", nargs="+", default=[], help="what to call them")
    parser.add_argument("--not-strict", action="store_true", help="also if they are not comparable")


def run(arguments: Namespace) -> None:
    """Run the comparison.

    Raises:
        FusionBenchError: another number of names than of reports.
    """
    from fusion_bench.command import is_there
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.scripts.run import run_composed
    from fusion_bench.scripts.words import in_grammar

    given = [word for word in arguments.reports if "=" not in word or is_there(word)]
    overrides = [word for word in arguments.reports if word not in given]
    if len(given) < 2:
        raise FusionBenchError("there is nothing to compare.", "Name at least two runs.")
    reports: object = given
    if arguments.names:
        if len(arguments.names) != len(given):
            count = f"{len(arguments.names)} names for {len(given)} reports"
            raise FusionBenchError(f"--names: {count}.", "Give one for each.")
        reports = dict(zip(arguments.names, given, strict=True))
    words = [f"reports={in_grammar(reports)}", f"strict={str(not arguments.not_strict).lower()}"]
    run_composed(["--config-name", "compare", *words, *overrides])
