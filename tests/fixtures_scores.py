"""Sums of a classifier's scores."""

from fusion_bench.results import ACCURACY, LOSS, SampleScores


def num_right(scores: SampleScores) -> int:
    """Return how many samples were classified correctly."""
    return int(scores.totals(ACCURACY)[0])


def loss_sum(scores: SampleScores) -> float:
    """Return the sum of the losses, in nats."""
    return float(scores.totals(LOSS)[0])


def losses(scores: SampleScores) -> list[float]:
    """Return each sample's loss."""
    found: list[float] = scores.statistics["loss"][:, 0].tolist()
    return found


def answers(scores: SampleScores) -> list[int]:
    """Return the predicted classes."""
    found: list[int] = scores.details["predictions"].tolist()
    return found


def details(scores: SampleScores) -> list[list[float]]:
    """Return samples, labels, predictions and losses."""
    found = [scores.samples, scores.details["labels"], scores.details["predictions"]]
    return [values.tolist() for values in (*found, scores.statistics["loss"][:, 0])]
