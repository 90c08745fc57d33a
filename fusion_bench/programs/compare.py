"""Compares runs: their differences, with confidence intervals."""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fusion_bench import __version__
from fusion_bench.command import typed
from fusion_bench.problems import FusionBenchError, Problems
from fusion_bench.programs.environment import config_sha256
from fusion_bench.programs.publish import publish
from fusion_bench.report import Report, Run, Scores, Seconds, compare_contenders
from fusion_bench.report.side_by_side import (
    Evaluated,
    combined_models,
    common_tasks,
    evaluation_differences,
)
from fusion_bench.report.table import print_differences, wide_console
from fusion_bench.storage import claimed

log = logging.getLogger(__name__)


class CompareProgram:
    """Compares the merged models of several runs on their common samples.

    Args:
        reports: the runs' ``report.json``, or their directories; a mapping sets their names.
        strict: refuse runs that are not comparable.
        output_dir: the directory for the comparison's own report; ``None`` writes none.
        dry_run: read and check the reports, and stop before they are compared.

    Raises:
        FusionBenchError: fewer than two reports, or two of the same name.
    """

    def __init__(
        self,
        reports: Sequence[str] | Mapping[str, str],
        strict: bool = True,
        output_dir: str | Path | None = None,
        dry_run: bool = False,
    ):
        if len(reports) < 2:
            raise FusionBenchError(
                "name at least two, for example 'reports=[a/report.json,b/report.json]'.",
                place=("reports",),
            )
        self.named = isinstance(reports, Mapping)
        named = reports if isinstance(reports, Mapping) else _names([str(p) for p in reports])
        self.paths = {str(name): _file(Path(path)) for name, path in named.items()}
        for name in self.paths:
            if "/" in name:
                raise FusionBenchError(
                    f"'{name}' has a '/'. Give it another name.", place=("reports",)
                )
        self.strict = strict
        self.output_dir = None if output_dir is None else Path(output_dir).absolute()
        self.dry_run = dry_run
        self.config: dict[str, object] = {
            "_target_": "fusion_bench.programs.CompareProgram",
            "reports": {name: str(path) for name, path in self.paths.items()},
            "strict": strict,
        }

    def run(self) -> Report | None:
        """Read, compare, save and print; returns the report, or ``None`` after a dry run.

        Raises:
            FusionBenchError: a file that is no report, no task in common, or, unless ``strict`` is
                off, runs that are not comparable.
        """
        start = time.perf_counter()
        runs = self._read()
        tasks = common_tasks(runs)
        if not tasks:
            raise FusionBenchError("they have no common task.", place=("reports",))
        left_out = {t: None for run in runs.values() for t in run.report.tasks if t not in tasks}
        if left_out:
            log.warning("%s was not evaluated in all runs and is left out.", ", ".join(left_out))
        found = evaluation_differences(runs)
        if found and self.strict:
            raise FusionBenchError(
                "these runs are not comparable.",
                "Evaluate them in the same way, or set strict=false to compare them anyway.",
                details=found,
                place=("reports",),
            )
        for obstacle in found:
            log.warning("Not comparable: %s.", obstacle)
        if self.dry_run:
            log.info("Dry run: the reports can be compared; nothing was written.")
            return None
        infos, models, scores = combined_models(runs)
        report = Report(
            run=self._described(runs, time.perf_counter() - start, found),
            tasks=infos,
            models=models,
        )
        report.comparisons = compare_contenders(report, scores)
        with claimed(self.output_dir, ("hydra", "run", "dir"), inside=True):
            publish(report, scores, self.output_dir, None)
        print_differences(report, wide_console())
        return report

    def _read(self) -> dict[str, Evaluated]:
        """Return the reports.

        Raises:
            FusionBenchError: with each that cannot be read.
        """
        runs, problems = {}, Problems()
        for place, (name, path) in enumerate(self.paths.items()):
            with problems.collect("reports", name if self.named else place):
                runs[name] = _read(path)
        problems.raise_all()
        return runs

    def _described(
        self, runs: Mapping[str, Evaluated], seconds: float, found: Sequence[str]
    ) -> Run:
        """Return the description of this comparison, with the differences between the runs."""
        described = [evaluated.report.run for evaluated in runs.values()]
        return Run(
            version=__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            command=typed(),
            config=self.config,
            config_sha256=config_sha256(self.config),
            seed=None,
            precision=", ".join(dict.fromkeys(run.precision for run in described)),
            device=", ".join(dict.fromkeys(run.device for run in described)),
            world_size=1,
            packages={},
            notes=[f"Not comparable: {obstacle}." for obstacle in found],
            seconds=Seconds(load=round(seconds, 3), fuse=0, evaluate=0, total=round(seconds, 3)),
        )


def _file(path: Path) -> Path:
    """Return the report's file, given the file or its directory."""
    place = path.expanduser().absolute()
    return place / "report.json" if place.is_dir() else place


def _read(path: Path) -> Evaluated:
    report = Report.load(path)
    scores = Scores.load(path, report)
    if not report.tasks:
        raise FusionBenchError(f"nothing was evaluated in '{path}'.")
    return Evaluated(report, scores)


def _names(paths: Sequence[str]) -> dict[str, str]:
    """Return the reports by the shortest unique ends of their paths."""
    parts = []
    for path in paths:
        place = _file(Path(path))
        own = place.parent if place.name == "report.json" else place.with_suffix("")
        parts.append([re.sub(r"[/\\]", "", part) for part in own.parts])
    for count in range(1, max(map(len, parts)) + 1):
        names = [" ".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    twice = next(path for path in paths if paths.count(path) > 1)
    raise FusionBenchError(f"'{twice}' is listed twice.", place=("reports",))
