"""Evaluates the winner of a search whose settings are the jobs of a sweep."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric import Fabric

from fusion_bench.arguments import keeps_arguments
from fusion_bench.instantiate import instantiate
from fusion_bench.method.plain import as_method
from fusion_bench.problems import ConfigError, FusionBenchError, within
from fusion_bench.programs.fabric_model_fusion import FabricModelFusionProgram
from fusion_bench.programs.fusing import LearnedSplit, describe_data, uses_test_split
from fusion_bench.programs.pools import PlacedModelPool, TaskPool
from fusion_bench.programs.search import GridSearch
from fusion_bench.programs.setting import Setting
from fusion_bench.programs.spec import FusionSpec, Section
from fusion_bench.report import Report, Search

if TYPE_CHECKING:
    from fusion_bench.taskpool import LearningData


class SearchWinner:
    """Evaluates the best job of a sweep on the test split, once.

    Args:
        sweep: the sweep's directory. Its jobs had ``search.judge_test=false`` and differ only in
            the method's config.
        output_dir: the directory for the report; ``None`` writes none.
        report_save_path: as in ``FabricModelFusionProgram``; so are the next two.
        merged_model_save_path: directory for the winner.
        overwrite: replace what is at these two paths.
        dry_run: check the sweep and the winner's config, and stop before anything is loaded.
    """

    def __init__(
        self,
        sweep: str,
        output_dir: str | Path | None = None,
        report_save_path: str | None = None,
        merged_model_save_path: str | None = None,
        overwrite: bool = False,
        dry_run: bool = False,
    ):
        self.sweep = Path(sweep).absolute()
        self._changes = {
            "search": {"_target_": "fusion_bench.programs.SweptSearch", "sweep": str(self.sweep)},
            "output_dir": output_dir,
            "report_save_path": report_save_path,
            "merged_model_save_path": merged_model_save_path,
            "overwrite": overwrite,
            "dry_run": dry_run,
        }

    def run(self) -> Report | None:
        """Evaluate the winner; returns its report, or ``None`` after a dry run.

        Raises:
            FusionBenchError: no such jobs there, or jobs that differ in more than the method.
        """
        config = SweptSearch(str(self.sweep)).config
        program: FabricModelFusionProgram = instantiate(config | self._changes)
        return program.run()


class SweptSearch:
    """A search whose settings were evaluated by a sweep's jobs.

    Args:
        sweep: the sweep's directory.

    Raises:
        FusionBenchError: no such jobs there, or jobs that differ in more than the method.
    """

    judge_test = True

    @keeps_arguments
    def __init__(self, sweep: str):
        self.sweep = sweep
        trials = _trials(Path(sweep))
        self.config = trials[0].run.config
        self._found = [trial.run.search for trial in trials if trial.run.search is not None]
        self._grid = GridSearch({}, self._found[0].split, judge_test=False)
        methods = [search.method for search in self._found]
        keys = dict.fromkeys(key for method in methods for key in method)
        self._varying = [k for k in keys if len(_distinct(m.get(k) for m in methods)) > 1]

    @property
    def learned(self) -> LearnedSplit:
        """The split that the settings were evaluated on."""
        return self._grid.learned

    def settings(self, method: Section) -> list[Setting]:
        """Return the jobs' settings; ``method`` is ignored."""
        with within("method"):
            return [
                Setting(
                    as_method(instantiate(search.method, "method")),
                    node=search.method,
                    options=self._options(search),
                )
                for search in self._found
            ]

    def planned(self, count: int) -> str:
        """Return in words how many jobs there are."""
        return self._grid.planned(count)

    def run(
        self,
        settings: Sequence[Setting],
        data: "Mapping[str, LearningData]",
        modelpool: PlacedModelPool,
        taskpool: TaskPool,
        fabric: Fabric,
        spec: FusionSpec,
    ) -> tuple[Search, Setting]:
        """Return the jobs' figures with the winner.

        Raises:
            FusionBenchError: they were evaluated on other data than there is now.
        """
        now = describe_data(data)
        if any(search.tasks != now for search in self._found):
            raise FusionBenchError(
                f"the jobs in '{self.sweep}' were evaluated on different data.",
                "Run the sweep again.",
                place=("sweep",),
            )
        candidates = [
            search.best.model_copy(update={"options": setting.options})
            for search, setting in zip(self._found, settings, strict=True)
        ]
        scores = [candidate.score for candidate in candidates]
        winner = scores.index(max(scores))
        found = self._found[0].model_copy(
            update={
                "test_split": uses_test_split(data),
                "judge_test": True,
                "space": {k: _distinct(c.options[k] for c in candidates) for k in self._varying},
                "candidates": candidates,
                "winner": winner,
                "method": settings[winner].node,
            }
        )
        return found, settings[winner]

    def _options(self, search: Search) -> dict[str, object]:
        return {key: search.method.get(key) for key in self._varying}


def _trials(sweep: Path) -> list[Report]:
    """Return the reports of jobs that did not use the test split, by finish time."""
    trials = []
    for path in sorted(sweep.rglob("report.json"), key=lambda path: path.stat().st_mtime_ns):
        with suppress(ConfigError):
            report = Report.load(path)
            if report.run.search is not None and not report.run.search.judge_test:
                trials.append(report)
    if not trials:
        raise FusionBenchError(
            f"there is no job with search.judge_test=false in '{sweep}' that has a report. "
            "Give the directory of such a sweep.",
            place=("sweep",),
        )
    first = trials[0].run.config
    for trial in trials:
        for key in sorted({*first, *trial.run.config} - {"method"}):
            if trial.run.config.get(key) != first.get(key):
                raise FusionBenchError(
                    f"the jobs in '{sweep}' differ in '{key}', not only in the method.",
                    "Sweep only the method's options to get one winner.",
                    place=("sweep",),
                )
    return trials


def _distinct(values: Iterable[object]) -> list[object]:
    found: list[object] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
