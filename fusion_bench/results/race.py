r"""Races of candidates on growing, shared parts of a finite set of samples.

A score is the weighted sum of the means of tasks over *all* their samples. A step takes one sample
more of each task that has one left, in a random order that is the same for all candidates. So the
unseen samples of a task are exchangeable, and the mean of the next one is that of all unseen ones.

Whether one candidate is really no better than another is tested by betting (Waudby-Smith and
Ramdas, Estimating means of bounded random variables by betting, 2024), without replacement and
stratified by task. Let :math:`d_k` be the next difference of task :math:`k` in :math:`[-1, 1]`,
:math:`u_k` its weight times its unseen share, and :math:`A` what the seen samples add to the
difference of the scores. If that is at most 0, then :math:`A + \sum_k u_k E[d_k] \le 0`. With
:math:`K` tasks left and a bet :math:`\lambda \ge 0` that was chosen before,

.. math:: \prod_k \left(1 + \lambda (u_k d_k + A / K)\right)

then has an expectation of at most 1, by the inequality of the means. So the product over all steps,
or the mean of several such products, ever exceeds :math:`1 / \alpha` with a probability of at most
:math:`\alpha` (Ville's inequality), for any number of samples and of looks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf, log, log2
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fusion_bench.results.metrics import Numbers

#: The bets, as shares of the largest that cannot lose everything.
_BETS = 2.0 ** -np.arange(1, 7)
#: Sums of rounded shares differ by less.
_ROUNDING = 1e-12
#: Without a limit, the first look is after this share of the steps; each doubles them.
_FIRST_LOOK = 1 / 16

#: The number of a candidate and the samples by task, to values in [0, 1] by task.
Evaluate = Callable[[int, Mapping[str, NDArray[np.int64]]], Mapping[str, Numbers]]


def evidence(
    differences: Sequence[Numbers], sizes: Sequence[int], weights: Sequence[float], start: int = 0
) -> float:
    """Return the log of the largest wealth of bets that the first candidate is better.

    If it is not, the evidence ever exceeds ``log(1 / alpha)`` with a probability of at most
    ``alpha``.

    Args:
        differences: for each task those of the first samples, in [-1, 1], in their random order:
            as many for each, or all of a smaller task.
        sizes: how many samples each task has in all.
        weights: of the tasks' means, above 0.
        start: the step from which on bets are made, because the candidates were chosen by the
            samples before.
    """
    steps = max(map(len, differences))
    count = np.array(sizes, dtype=np.float64)[:, None]
    share = np.array(weights, dtype=np.float64)[:, None] / count
    table = np.zeros((len(sizes), steps))
    for row, own in zip(table, differences, strict=True):
        row[: len(own)] = own
    seen = np.concatenate([[0.0], np.cumsum((share * table).sum(axis=0))])  # A, before each step
    unseen = share * np.maximum(count - np.arange(steps + 1), 0)  # u
    if (seen[start:] > unseen[:, start:].sum(axis=0) + _ROUNDING).any():
        return inf  # whatever the others are
    if start >= steps:
        return 0.0
    offset, unseen, table = seen[start:-1], unseen[:, start:-1], table[:, start:]
    there = unseen > 0
    part = offset / there.sum(axis=0)
    largest = 1 / np.maximum(unseen.max(axis=0) - part, _ROUNDING)
    gains = np.where(there, largest * (unseen * table + part), 0)
    wealth = np.cumsum(np.log1p(_BETS[:, None, None] * gains).sum(axis=1), axis=1)
    top = wealth.max(axis=0)
    mixed = top + np.log(np.exp(wealth - top).mean(axis=0))
    return max(0.0, float(mixed.max()))


def least(sizes: Mapping[str, int], count: int) -> int:
    """Return with how many samples so many candidates can race: one of each task in each round."""
    return len(sizes) * count * _rounds(count)


def _rounds(count: int) -> int:
    """Return in how many rounds one candidate is left, if the worse half drops out after each."""
    return ceil(log2(max(count, 2)))


@dataclass
class Racer:
    """A candidate in a race.

    Attributes:
        values: each task's values by sample; ``nan`` where it was not evaluated.
        steps: how far it came.
        left: why it dropped out: it is ``worse`` than another, or was ``behind`` when there were
            not enough samples for all; ``None`` of one that came to the end.
        by: the number of the candidate that led then, or won.
        behind: by how much the score was lower than that one's, on the same samples.
    """

    values: dict[str, Numbers]
    steps: int = 0
    left: Literal["worse", "behind"] | None = None
    by: int | None = None
    behind: float = 0.0


@dataclass
class Race:
    """A race; candidates are numbered in the order in which they are added.

    The best candidate on all samples drops out as ``worse`` with a probability of at most
    ``alpha``, all looks and candidates together. One that is ``behind`` drops out without such a
    promise.

    Args:
        sizes: how many samples each task has.
        weights: of the tasks' means in the score, above 0.
        evaluate: evaluates a candidate on samples.
        alpha: see above.
        seed: of the random order of samples.

    Attributes:
        racers: the candidates.
        spent: how many samples were evaluated for all of them.
    """

    sizes: Mapping[str, int]
    weights: Mapping[str, float]
    evaluate: Evaluate
    alpha: float = 0.05
    seed: int = 0
    racers: list[Racer] = field(default_factory=list)
    spent: int = 0

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        self.order = {task: random.permutation(size) for task, size in self.sizes.items()}
        self._start = 0

    @property
    def length(self) -> int:
        """The steps in which all samples are evaluated."""
        return max(self.sizes.values())

    @property
    def running(self) -> list[int]:
        """The candidates that have not dropped out, the best one first; of equals the first one."""
        left = [number for number, racer in enumerate(self.racers) if racer.left is None]
        return sorted(left, key=lambda number: -self.score(number))

    def add(self) -> int:
        """Add a candidate; return its number."""
        self.racers.append(Racer({t: np.full(size, np.nan) for t, size in self.sizes.items()}))
        return len(self.racers) - 1

    def samples(self, steps: int) -> int:
        """Return how many samples a candidate takes for its first steps."""
        return sum(min(steps, size) for size in self.sizes.values())

    def taken(self, number: int) -> int:
        """Return how many samples a candidate has taken."""
        return self.samples(self.racers[number].steps)

    def steps_for(self, samples: float) -> int:
        """Return the most steps that a candidate takes with so many samples."""
        low, high = 0, self.length
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.samples(middle) <= samples else (low, middle - 1)
        return low

    def score(self, number: int) -> float:
        """Return a candidate's score on the samples so far."""
        racer = self.racers[number]
        if racer.steps == 0:
            return -inf
        means = {task: float(np.nanmean(own)) for task, own in racer.values.items()}
        return sum(weight * means[task] for task, weight in self.weights.items())

    def advance(self, numbers: Sequence[int], steps: int) -> None:
        """Evaluate candidates up to a step."""
        for number in numbers:
            racer = self.racers[number]
            new = {t: np.sort(own[racer.steps : steps]) for t, own in self.order.items()}
            new = {task: samples for task, samples in new.items() if samples.size}
            if not new:
                continue
            for task, values in self.evaluate(number, new).items():
                racer.values[task][new[task]] = values
            self.spent += self.samples(steps) - self.taken(number)
            racer.steps = steps

    def settle(self, most: float | None = None) -> int:
        """Let the candidates race to the end; return the winner.

        With a limit each round gets the same share of the samples, and the worse half drops out
        after it (sequential halving; Karnin, Koren and Somekh, 2013), besides those that are worse
        for sure. Without one only these do, and the race goes on until a single one or no sample is
        left.

        Args:
            most: how many samples may be evaluated in all, those before included.
        """
        self._start = step = self.racers[0].steps
        if step and most is not None:
            self._keep(ceil(len(self.racers) / 2))
        rounds = _rounds(len(self.running))
        while len(self.running) > 1 and step < self.length and rounds:
            if most is None:
                step = min(self.length, 2 * step or ceil(_FIRST_LOOK * self.length))
            else:
                share = (most - self.spent) / (rounds * len(self.running))
                step = self.steps_for(self.samples(step) + share)
                rounds -= 1
            self.advance(self.running, step)
            self._drop_worse()
            if most is not None and rounds:
                self._keep(ceil(len(self.running) / 2))
        winner, *others = self.running
        for number in others:
            self._leave(number, None, winner)
        return winner

    def _drop_worse(self) -> None:
        """Drop those that are worse than the best one for sure."""
        best, *others = self.running
        enough = log(max(len(self.racers) - 1, 1) / self.alpha)
        for number in others:
            if self.evidence(best, number) >= enough:
                self._leave(number, "worse", best)

    def evidence(self, one: int, other: int) -> float:
        """Return the evidence that a candidate is better than another."""
        mine, theirs = self.racers[one], self.racers[other]
        steps = min(mine.steps, theirs.steps)
        seen = {task: own[:steps] for task, own in self.order.items()}
        differences = [mine.values[t][own] - theirs.values[t][own] for t, own in seen.items()]
        weights = [self.weights[task] for task in seen]
        return evidence(differences, list(self.sizes.values()), weights, self._start)

    def _keep(self, count: int) -> None:
        """Drop all but the best."""
        best, *_ = running = self.running
        for number in running[max(count, 2) :]:
            self._leave(number, "behind", best)

    def _leave(self, number: int, left: Literal["worse", "behind"] | None, by: int) -> None:
        racer = self.racers[number]
        racer.left, racer.by, racer.behind = left, by, self.score(by) - self.score(number)
