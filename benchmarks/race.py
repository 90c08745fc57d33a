"""Does a race find what a full search finds, with a fifth of the samples?

    python benchmarks/race.py            # ten minutes on two cores
    python benchmarks/race.py --small    # four settings on the language zoo, three seeds

Each setting of a grid is evaluated once on the whole validation split. Races with many seeds of
the samples' order are then replayed on the scores of single samples. That is exact: a race sees
nothing else. A winner is not distinguishable from the full search's if it is the same one, or if
the 95 % interval of the paired difference of both on the test split contains 0. Results are written
after each grid.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine

from fusion_bench.configs import composed
from fusion_bench.instantiate import SharedObjects
from fusion_bench.programs.evaluating import Evaluator
from fusion_bench.programs.fusing import MERGED, materialize
from fusion_bench.programs.prepare import Prepared, prepare
from fusion_bench.programs.setting_evaluator import SettingEvaluator, fused
from fusion_bench.programs.spec import FusionSpec
from fusion_bench.progress import quiet_libraries
from fusion_bench.results import Interval, SampleScores
from fusion_bench.results.race import Race
from fusion_bench.results.statistics import differences, interval
from fusion_bench.storage import write_text

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "zoo, method",
    "settings × samples",
    "budget",
    "samples taken",
    "with those of the individual models",
    "same winner",
    "not distinguishable",
    "points lost on validation",
    "on test",
    "best one dropped by the test",
)
BUDGETS = (0.1, 0.15, 0.2, None)
ZOOS = {
    "images": (),
    "language": ("modelpool=CausalLMPool/zoo", "taskpool=CausalLMEvaluation/zoo"),
}
GRIDS: dict[str, dict[str, list[float]]] = {
    "task_arithmetic": {"scaling_factor": [round(0.05 * (i + 1), 2) for i in range(20)]},
    "ties_merging": {
        "scaling_factor": [0.2, 0.4, 0.6, 0.8, 1.0],
        "threshold": [10, 20, 50, 100],
    },
}


@dataclass
class Grid:
    """A full search: its scores of single samples, and what is needed to compare winners."""

    prepared: Prepared
    evaluator: SettingEvaluator
    values: list[Mapping[str, Any]]

    @property
    def samples(self) -> int:
        """The samples of a setting."""
        return sum(self.evaluator.sizes.values())

    def scores(self) -> list[float]:
        """Return each setting's score on all samples."""
        weights = self.evaluator.weights
        return [sum(w * float(own[t].mean()) for t, w in weights.items()) for own in self.values]

    def race(self, budget: float | None, seed: int) -> tuple[Race, int]:
        """Replay a race; return it and its winner."""

        def look(number: int, samples: Mapping[str, Any]) -> dict[str, Any]:
            return {task: self.values[number][task][own] for task, own in samples.items()}

        race = Race(self.evaluator.sizes, self.evaluator.weights, look, seed=seed)
        for _ in self.values:
            race.add()
        most = None if budget is None else int(budget * len(self.values) * self.samples)
        return race, race.settle(most)


def main() -> None:
    """Evaluate the grids, replay the races, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="to try it out")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=RESULTS / "race.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "race.md")
    arguments = parser.parse_args()
    zoos, grids, seeds = dict(ZOOS), GRIDS, arguments.seeds
    if arguments.small:
        zoos = {"language": ZOOS["language"]}
        grids, seeds = {"task_arithmetic": {"scaling_factor": [0.2, 0.4, 0.7, 1.0]}}, 3
    quiet_libraries()
    found: list[dict[str, Any]] = []
    for zoo, words in zoos.items():
        for method, space in grids.items():
            print(f"{zoo}, {method}: evaluating", flush=True)
            grid = evaluated(words, method, space)
            found += measured(grid, zoo, method, seeds)
            if arguments.small:
                print(table(found, seeds))
            else:
                write_text(arguments.json, json.dumps(found, indent=1) + "\n")
                write_text(arguments.markdown, table(found, seeds))


def evaluated(words: tuple[str, ...], method: str, space: Mapping[str, Any]) -> Grid:
    """Evaluate each setting on the whole validation split."""
    search = {"_target_": "fusion_bench.programs.RaceSearch", "space": dict(space)}
    config = composed(f"method={method}", *words, "seed=0") | {"search": search}
    spec = FusionSpec(**{k: v for k, v in config.items() if not k.startswith("_")})
    made = prepare(spec, SharedObjects())
    made.problems.raise_all()
    assert made.modelpool and made.taskpool and made.fabric and made.search
    made.taskpool.prepare(made.fabric)
    data = made.search.learned.data(made.modelpool, made.taskpool, made.fabric, False)
    evaluator = SettingEvaluator(data, made.modelpool, made.taskpool, made.fabric, spec, None)
    evaluator.settings, evaluator.count = made.settings, len(made.settings)
    evaluator.evaluate_individuals()
    every = {task: np.arange(size) for task, size in evaluator.sizes.items()}
    return Grid(made, evaluator, [evaluator(number, every) for number in range(evaluator.count)])


def measured(grid: Grid, zoo: str, method: str, seeds: int) -> list[dict[str, Any]]:
    """Replay races for each budget; return a row of figures for each."""
    scores = grid.scores()
    best = int(np.argmax(scores))
    tested: dict[int, dict[str, SampleScores]] = {}
    rows = []
    for budget in BUDGETS:
        races = [grid.race(budget, seed) for seed in range(seeds)]
        winners = [winner for _, winner in races]
        for winner in {best, *winners} - tested.keys():
            tested[winner] = on_test(grid, winner)
        gaps = {winner: difference(grid, tested[winner], tested[best]) for winner in set(winners)}
        whole = len(scores) * grid.samples
        own = grid.evaluator.samples_of_individuals
        spent = [race.spent for race, _ in races]
        rows.append(
            {
                "zoo": zoo,
                "method": method,
                "settings": len(scores),
                "samples": grid.samples,
                "budget": budget,
                "share": float(np.mean(spent)) / whole,
                "share_with_own": float(np.mean([s + own for s in spent])) / (whole + own),
                "same": sum(winner == best for winner in winners),
                "alike": sum(gaps[winner].low <= 0 <= gaps[winner].high for winner in winners),
                "best_dropped": sum(race.racers[best].left == "worse" for race, _ in races),
                "lost": 100 * float(np.mean([scores[best] - scores[winner] for winner in winners])),
                "lost_on_test": -100
                * float(np.mean([gaps[winner].estimate for winner in winners])),
            }
        )
    return rows


def on_test(grid: Grid, number: int) -> dict[str, SampleScores]:
    """Return a setting's scores on the test split."""
    made, setting = grid.prepared, grid.evaluator.settings[number]
    assert made.modelpool and made.taskpool and made.fabric
    evaluator = Evaluator(made.modelpool, made.taskpool, made.fabric, "none")
    merged = fused(setting, made.modelpool, made.taskpool, made.fabric, made.spec, {})
    evaluator.evaluate_merged(materialize(merged))
    return {task: own[MERGED] for task, own in evaluator.scores.tasks.items()}


def difference(
    grid: Grid, one: Mapping[str, SampleScores], other: Mapping[str, SampleScores]
) -> Interval:
    """Return the paired difference of the main metric's average on the test split."""
    random, taskpool = np.random.default_rng(0), grid.prepared.taskpool
    assert taskpool is not None
    drawn = [
        differences(taskpool.describe(task).main, own, other[task], None, random).plain
        for task, own in one.items()
    ]
    return interval(np.mean(drawn, axis=0))


def table(rows: list[dict[str, Any]], seeds: int) -> str:
    """Return the figures as Markdown."""
    lines = [
        f"Measured by `benchmarks/race.py` with {seeds} seeds on {machine()}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
    ]
    for row in rows:
        budget = "none" if row["budget"] is None else f"{100 * row['budget']:g} %"
        lines.append(
            f"| {row['zoo']}, {row['method']} | {row['settings']} × {row['samples']:,} | {budget} "
            f"| {100 * row['share']:.1f} % | {100 * row['share_with_own']:.1f} % | {row['same']} "
            f"| {row['alike']} | {row['lost']:.2f} | {row['lost_on_test'] + 0.0:.2f} "
            f"| {row['best_dropped']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
