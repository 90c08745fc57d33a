"""Checks published figures by running the methods."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from fusion_bench import __version__
from fusion_bench.configs import composed
from fusion_bench.instantiate import SharedObjects, instantiate
from fusion_bench.problems import FusionBenchError, Problem, ResultError, did_you_mean, within
from fusion_bench.programs.fabric_model_fusion import FabricModelFusionProgram
from fusion_bench.programs.preflight import preflight
from fusion_bench.programs.prepare import Prepared, prepare
from fusion_bench.programs.spec import Places, Section
from fusion_bench.report.reference import BASELINES, Reference
from fusion_bench.report.reproduction import Reproduction, check
from fusion_bench.report.table import wide_console
from fusion_bench.storage import check_file_name, claimed

log = logging.getLogger(__name__)

#: What is run where only the baselines are wanted.
_CHEAPEST = ["method=simple_average"]


class ReproduceProgram:
    """Runs the methods of a published table and compares every figure.

    Each row is an ordinary run with its report in ``rows/<name>`` of the output directory. A
    restart skips finished rows.

    Args:
        reference: the name of a table that comes with the package, or the path of a YAML file.
        methods: the rows to check; by default all.
        fabric: as in ``FabricModelFusionProgram``.
        seed: as in ``FabricModelFusionProgram``.
        output_dir: the directory for the reports; ``None`` writes none.
        dry_run: check the reference and each row's config, and stop before anything is loaded.

    Raises:
        FusionBenchError: a reference that cannot be read, or rows that are none.
    """

    def __init__(
        self,
        reference: str,
        methods: Sequence[str] | None = None,
        fabric: Section = None,
        seed: int | None = None,
        output_dir: str | Path | None = None,
        dry_run: bool = False,
    ):
        self.name = Path(reference).stem
        self.reference = Reference.load(reference)
        self.rows = list(self.reference.rows if methods is None else methods)
        self.output_dir = None if output_dir is None else Path(output_dir).absolute()
        self.dry_run = dry_run
        for row in self.rows:
            with within("methods"):
                check_file_name(row)
            if row not in self.reference.rows:
                raise FusionBenchError(
                    f"'{reference}' has no '{row}'. {did_you_mean(row, self.reference.rows)}",
                    place=("methods",),
                )
        if not self.rows:
            raise FusionBenchError(
                "is empty.", "Name a row, or remove the key to check all.", place=("methods",)
            )
        runs = {r: self.reference.rows[r].overrides for r in self.rows if r not in BASELINES}
        self.programs = {
            row: self._program(row, overrides, fabric, seed)
            for row, overrides in (runs or {"baselines": _CHEAPEST}).items()
        }

    def _program(
        self, row: str, overrides: Sequence[str], fabric: Section, seed: int | None
    ) -> FabricModelFusionProgram:
        reference = self.reference
        pools = [f"modelpool={reference.modelpool}", f"taskpool={reference.taskpool}"]
        with within("reference", "rows", row):
            config = composed(*pools, *reference.overrides, *overrides)
            node = config | {"similarity": False, "seed": seed}
            if fabric is not None:
                node["fabric"] = fabric
            place = self.output_dir and self.output_dir / "rows" / quote(row, safe="")
            program: FabricModelFusionProgram = instantiate(node, output_dir=place)
        return program

    def prepared(self) -> dict[str, Prepared]:
        """Return the parts of every row's run."""
        shared, runs = SharedObjects(), {}
        for row, program in self.programs.items():
            place = ("reference", "rows", row)
            # The rows have the same pools, and so the same problems with them.
            places = Places(
                (*place, "method"), ("reference", "modelpool"), ("reference", "taskpool")
            )
            spec = replace(program.spec, places=places, dry_run=self.dry_run)
            known = [problem.inside(*place) for problem in program.problems]
            run = runs[row] = prepare(spec, shared, known)
            tasks = [] if run.taskpool is None else run.taskpool.task_names
            for task in self.reference.tasks if tasks else ():
                if task not in tasks:
                    reason = f"'{self.reference.taskpool}' has no '{task}'."
                    problem = Problem(("reference", "tasks"), reason, did_you_mean(task, tasks))
                    run.problems.add([problem])
        return runs

    def run(self) -> Reproduction | None:
        """Run every row, compare and write; returns the figures, or ``None`` after a dry run.

        Raises:
            FusionBenchError: with all problems of the rows' configs.
            ResultError: figures that are off by more than their tolerance.
        """
        preflight(*self.prepared().values())
        if self.dry_run:
            log.info("Dry run: the reference is valid; nothing was loaded.")
            return None
        with claimed(self.output_dir, ("hydra", "run", "dir"), inside=True):
            result = self._run_rows()
        result.print(wide_console())
        if result.failed:
            raise ResultError(
                f"{result.sentence()}.\n"
                + "\n".join(figure.sentence() for figure in result.failed),
                place=("reproduce",),
            )
        log.info("%s.", result.sentence().capitalize())
        return result

    def _run_rows(self) -> Reproduction:
        """Run every row and write the results."""
        reports = {}
        for place, (row, program) in enumerate(self.programs.items(), start=1):
            log.info("Row %d of %d: %s", place, len(self.programs), row)
            if (report := program.run()) is not None:
                reports[row] = report
        result = Reproduction(
            name=self.name,
            version=__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            reference=self.reference,
            figures=check(self.reference, self.rows, reports),
            reports={row: f"rows/{quote(row, safe='')}/report.json" for row in reports},
        )
        if self.output_dir is not None:
            result.save(self.output_dir)
            log.info("Reproduction: %s", self.output_dir / "reproduce.html")
        return result
