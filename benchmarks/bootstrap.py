"""How long the intervals of comparisons take.

    python benchmarks/bootstrap.py
    python benchmarks/bootstrap.py --small     # fewer samples, to try it out

Random scores of a task are resampled, on one core. A metric is a function of sums over samples; the
rows differ by the number of statistics that are summed. All is measured in turns.
"""

from collections.abc import Callable

import measure
import numpy as np
from measure import Record, alternate, rounds_of, summary
from threadpoolctl import threadpool_limits

from fusion_bench.results import ACCURACY, METRICS, Metric, SampleScores, with_ones
from fusion_bench.results.statistics import RESAMPLES, differences, interval, resampled

RMSE, MEAN_IOU = METRICS["rmse"], METRICS["mean_iou"]


def main() -> None:
    """Draw scores, resample them, print the tables."""
    parser = measure.parser(__doc__)
    parser.add_argument("--samples", type=int)
    arguments = parser.parse_args()
    samples = arguments.samples or (200 if arguments.small else 10_000)
    record = Record(arguments, rounds_of(arguments, 3), ["numpy"])
    size, random = samples, np.random.default_rng(0)
    kinds = {
        "accuracy": (ACCURACY, [with_ones(random.integers(0, 2, size)) for _ in range(2)]),
        "2 statistics (RMSE)": (RMSE, [with_ones(random.gamma(2, 1, size)) for _ in range(2)]),
        "30 statistics (mean IoU of 15 classes)": (MEAN_IOU, segmented(15, size, random)),
        "300 statistics (mean IoU of 150 classes)": (MEAN_IOU, segmented(150, size, random)),
    }
    contestants: dict[str, Callable[[], object]] = {}
    for name, (metric, rows) in kinds.items():
        models = [SampleScores(np.arange(size), {metric.name: own}) for own in rows]
        contestants |= {f"{name}: {what}": work for what, work in works(metric, models).items()}
    title = f"{RESAMPLES:,} resamples of {size:,} samples, one core"
    with threadpool_limits(1):
        record.table(
            title,
            lambda: {
                name: summary(seconds)
                for name, seconds in alternate(contestants, rounds_of(arguments, 3)).items()
            },
        )
    record.show()


def works(metric: Metric, models: list[SampleScores]) -> dict[str, Callable[[], object]]:
    """Return what is timed with a metric."""
    found = {
        "a pair": lambda: interval(
            differences(metric, *models, None, np.random.default_rng(0)).plain
        ),
    }
    if metric is not ACCURACY:
        one = models[:1]
        found["one model"] = lambda: interval(resampled(metric, one, np.random.default_rng(0))[0])
    return found


def segmented(classes: int, size: int, random: np.random.Generator) -> list[np.ndarray]:
    """Return two models' intersections and unions, of images of 256 × 256 pixels."""
    union = random.multinomial(2**16, np.full(classes, 1 / classes), size)
    return [
        np.concatenate([random.integers(0, union + 1), union], axis=1).astype(np.float64)
        for _ in range(2)
    ]


if __name__ == "__main__":
    main()
