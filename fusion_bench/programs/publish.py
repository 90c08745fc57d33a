"""Prints a result and writes its files."""

import logging
from pathlib import Path

from fusion_bench.problems import EnvironmentProblem
from fusion_bench.report import Report, Scores, markdown, print_comparison
from fusion_bench.report.figures import comparison_sentence, search_sentence
from fusion_bench.report.page import page
from fusion_bench.report.table import wide_console
from fusion_bench.resolving import yaml_of
from fusion_bench.storage import write_text

log = logging.getLogger(__name__)


def publish(
    report: Report,
    scores: Scores,
    output_dir: Path | None,
    report_path: Path | None,
    prints: bool = True,
) -> None:
    """Write the report's files, ``report.json`` last, and then print the comparison if wanted.

    Raises:
        EnvironmentProblem: ``report_path`` cannot be written.
    """
    if output_dir is not None:
        write_text(output_dir / "config.yaml", yaml_of(report.run.config))
        if report.run.search is not None:
            found = {**report.run.config, "method": report.run.search.method, "search": None}
            write_text(output_dir / "winner.yaml", yaml_of(found))
        write_text(output_dir / "report.md", markdown(report))
        write_text(output_dir / "report.html", page(report, scores))
        save(report, scores, output_dir / "report.json")
    if report_path is not None:
        try:
            save(report, scores, report_path)
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot write it: {error}", place=("report_save_path",)
            ) from error
    if report.tasks and prints:
        print_comparison(report, wide_console())
    for comparison in report.main_comparisons():
        log.info(comparison_sentence(report, comparison))
    if report.run.tuning is not None and report.run.tuning.test_split:
        log.warning("The merged model was %s.", report.run.tuning.sentence())
    if report.run.search is not None:
        level = logging.WARNING if report.run.search.test_split else logging.INFO
        log.log(level, "Search: %s.", search_sentence(report.run.search))
    if report.run.config.get("fast_dev_run") and report.tasks:
        log.warning("Only the first batch of each task was evaluated (fast_dev_run).")
    for place in (output_dir and output_dir / "report.html", report_path):
        if place is not None:
            log.info("Report: %s", place)


def save(report: Report, scores: Scores, path: Path) -> None:
    """Write a report, and the predictions next to it."""
    if scores.tasks:
        scores.save(path)
    report.save(path)
