"""Runs a report's config again, and compares every figure."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fusion_bench.instantiate import SharedObjects, accepts, instantiate
from fusion_bench.problems import FusionBenchError, ResultError, within
from fusion_bench.programs.fabric_model_fusion import FabricModelFusionProgram
from fusion_bench.report import Report
from fusion_bench.report.table import wide_console

log = logging.getLogger(__name__)

_PROGRAM = "fusion_bench.programs.FabricModelFusionProgram"


@dataclass(frozen=True)
class Repeated:
    """A figure of a report, and what it is now.

    Attributes:
        model: whose.
        task: on what.
        metric: the metric's name.
        before: its value in the report.
        now: its value in the new one; ``None`` where that has no such figure.
    """

    model: str
    task: str
    metric: str
    before: float
    now: float | None

    def same(self, tolerance: float) -> bool:
        """Return whether they differ by no more than ``tolerance``, as a share of the value."""
        if self.now is None:
            return False
        return abs(self.now - self.before) <= tolerance * max(abs(self.before), abs(self.now))


class RepeatProgram:
    """Runs the config of a report again, and compares every figure of the two reports.

    The models are fused and evaluated anew; nothing that was kept of earlier evaluations is used.

    Args:
        report: a ``report.json``, or the folder of a run.
        tolerance: by how much a figure may differ, as a share of its value.
        fabric: where it runs, as in ``FabricModelFusionProgram``; by default as in the report.
        output_dir: the folder for the new report; ``None`` writes none.
        dry_run: check the config, and stop before anything is loaded.
    """

    def __init__(
        self,
        report: str,
        tolerance: float = 0.0,
        fabric: object = None,
        output_dir: str | Path | None = None,
        dry_run: bool = False,
    ):
        path = Path(report).absolute()
        self.path = path / "report.json" if path.is_dir() else path
        self.tolerance = tolerance
        self.fabric = fabric
        self.output_dir = output_dir
        self.dry_run = dry_run

    def run(self) -> Report | None:
        """Run it; returns the new report, or ``None`` after a dry run.

        Raises:
            FusionBenchError: no report, or one whose config cannot be run.
            ResultError: a figure that differs.
        """
        with within("report"):
            before = Report.load(self.path)
            node = _node(before) | {"dry_run": self.dry_run}
        if self.fabric is not None:
            node["fabric"] = self.fabric
        program: FabricModelFusionProgram = instantiate(
            node, output_dir=self.output_dir, parts=SharedObjects()
        )
        now = program.run()
        if now is None:
            return None
        figures = list(compared(before, now))
        different = [figure for figure in figures if not figure.same(self.tolerance)]
        same = f"{len(figures) - len(different)} of {len(figures)} figures are the same"
        identical = _same_weights(before, now)
        said = "the same, bit by bit" if identical else "not the same bit by bit"
        merged = any(model.role == "merged" for model in before.models.values())
        log.info("%s%s.", same, f"; the merged weights are {said}" if merged else "")
        if not different and (figures or identical):
            return now
        if different:
            _print(different)
        raise ResultError(
            f"{same} as in '{self.path}', and the merged weights are {said}.",
            "Give 'tolerance=0.01' to accept differences of 1 %.",
            details=[f"{name} was {a}, now {b}" for name, a, b in _changed(before, now)],
        )


def compared(before: Report, now: Report) -> Iterator[Repeated]:
    """Yield each figure of a report beside that of another."""
    for name, model in before.models.items():
        for task, result in model.tasks.items():
            other = now.models[name].tasks.get(task) if name in now.models else None
            for metric, value in result.metrics.items():
                again = other.metrics.get(metric) if other else None
                if value.value is not None:
                    yield Repeated(name, task, metric, value.value, again.value if again else None)


def _node(report: Report) -> dict[str, Any]:
    """Return the report's config, to be run without its outputs and caches.

    Raises:
        FusionBenchError: it is of another program.
    """
    node = dict(report.run.config)
    if node.get("_target_") != _PROGRAM:
        raise FusionBenchError(
            f"its config is run by '{node.get('_target_')}'.", "Name the report of a single run."
        )
    node |= {"report_save_path": None, "merged_model_save_path": None, "overwrite": False}
    if isinstance(fabric := node.get("fabric"), dict):  # what is only compared is not tracked
        node["fabric"] = {key: value for key, value in fabric.items() if key != "loggers"}
    taskpool = node.get("taskpool")
    if isinstance(taskpool, dict) and accepts(taskpool.get("_target_"), "cache"):
        node["taskpool"] = {**taskpool, "cache": False}
    return node


def _same_weights(before: Report, now: Report) -> bool:
    """Return whether each merged model has the hash that it had."""
    merged = (name for name, model in before.models.items() if model.role == "merged")
    return all(
        name in now.models and now.models[name].identity == before.models[name].identity
        for name in merged
    )


def _changed(before: Report, now: Report) -> Iterator[tuple[str, str, str]]:
    """Yield what of the machine and its software is another than it was."""
    one, other = before.run, now.run
    facts = [("device", one.device, other.device), ("precision", one.precision, other.precision)]
    facts += [("fusion_bench", one.version, other.version)]
    facts += [(name, old, other.packages.get(name, "")) for name, old in one.packages.items()]
    yield from (fact for fact in facts if fact[1] != fact[2])


def _print(figures: list[Repeated]) -> None:
    table = Table(box=box.SIMPLE_HEAVY, pad_edge=False)
    for place, title in enumerate(("model", "task", "metric", "then", "now")):
        table.add_column(title, justify="right" if place > 2 else "left", no_wrap=True)
    for one in figures:
        now = "–" if one.now is None else f"{one.now:.6g}"
        cells = (one.model, one.task, one.metric, f"{one.before:.6g}", now)
        table.add_row(*map(Text, cells))
    wide_console().print(table)
