r"""Model soups: averages of models, selected or weighted on a validation split.

Greedy: models join the average one by one, the best first, where it gets better by that. Learned:
$\theta = \sum_t \mathrm{softmax}(a)_t\,\theta_t$ with the $a$ that minimise the cross entropy.
Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fusion_bench.arguments import keeps_arguments
from fusion_bench.method.adamerging import Mixture, per_key
from fusion_bench.method.base import aligned
from fusion_bench.method.contract import Data, ModelPool, Split
from fusion_bench.method.data import (
    LearningAlgorithm,
    check_descent,
    descent,
    merged,
    parameter_keys,
)
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.problems import FusionBenchError, check_choice
from fusion_bench.progress import bar
from fusion_bench.results import Metric, normalized
from fusion_bench.weights import Weights

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

Granularity = Literal["layer", "model"]


class GreedySoupAlgorithm(LearningAlgorithm):
    """The average of the models that improve it; equally good models keep the pool's order.

    The score is the mean over all tasks of their metric. Where the tasks have different metrics, it
    is the mean share of the best single model's value.

    Args:
        accept_equal: also add a model if the score stays the same.
        split: the split of the datasets to evaluate on, with its labels.
    """

    uses_labels = True

    @keeps_arguments
    def __init__(self, accept_equal: bool = False, split: Split = "validation"):
        check_choice("split", split, Split)
        self.accept_equal = accept_equal
        self.split = split

    def learn(self, pool: ModelPool, fabric: "Fabric", data: Data) -> Weights:
        """Evaluate every model, then add one after the other."""

        def soup(names: list[str]) -> Weights:
            models = {name: pool.weights(name) for name in names}
            return merged(pool, models, SimpleAverageAlgorithm().merge_tensor)

        def values(weights: Weights) -> list[float]:
            module = fabric.to_device(pool.build_model(weights))
            return [task.evaluate(module).value(task.metric) for task in data.values()]

        names = list(pool.model_names)
        alone = {
            name: values(soup([name]))
            for name in bar(names, "models alone", total=len(names), unit="models")
        }
        score = _score([task.metric for task in data.values()], list(alone.values()))
        ranked = sorted(names, key=lambda name: -score(alone[name]))  # stable
        chosen, best = ranked[:1], alone[ranked[0]]
        for name in ranked[1:]:
            found = values(soup([*chosen, name]))
            difference = score(found) - score(best)
            if difference > 0 or (self.accept_equal and difference == 0):
                chosen, best = [*chosen, name], found
        figures = (f"{task} {value:.4g}" for task, value in zip(data, best, strict=True))
        log.info("The soup contains %s (%s).", ", ".join(chosen), ", ".join(figures))
        return soup(chosen)


def _score(
    metrics: Sequence[Metric], alone: Sequence[Sequence[float]]
) -> Callable[[Sequence[float]], float]:
    """Return what makes one figure, greater for a better model, of a value per task.

    Args:
        metrics: the tasks'.
        alone: the values of each model alone.

    Raises:
        FusionBenchError: metrics that differ and cannot be normalised.
    """
    if len({(metric.name, metric.unit) for metric in metrics}) == 1:
        sign = 1 if metrics[0].higher_is_better else -1
        return lambda values: sign * sum(values) / len(values)
    for metric in metrics:
        if not metric.normalise:
            raise FusionBenchError(
                f"The tasks have different metrics, and {metric.name} cannot be normalised, so "
                "that models cannot be ranked by all tasks."
            )
    best = [
        (max if metric.higher_is_better else min)(own)
        for metric, own in zip(metrics, zip(*alone, strict=True), strict=True)
    ]

    for metric, reference in zip(metrics, best, strict=True):
        if not reference > 0:
            raise FusionBenchError(
                f"The best model's {metric.name} is {reference:g}, so that other values are no "
                "shares of it, and models cannot be ranked by all tasks."
            )

    def score(values: Sequence[float]) -> float:
        shares = (
            float(normalized(value, reference, metric.higher_is_better))
            for value, reference, metric in zip(values, best, metrics, strict=True)
        )
        return sum(shares) / len(metrics)

    return score


class LearnedSoupAlgorithm(LearningAlgorithm):
    """The weighted average of all models, with learned weights that sum to 1.

    Args:
        granularity: weights for each model, or for each model and ``layer``, one parameter tensor.
        lr: AdamW's learning rate.
        max_steps: steps of AdamW; each sees one batch of every task.
        batch_size: images of a task in a step.
        split: the split of the datasets to use, with its labels.
        seed: the random seed.
    """

    uses_labels = True

    @keeps_arguments
    def __init__(
        self,
        granularity: Granularity = "model",
        lr: float = 0.05,
        max_steps: int = 100,
        batch_size: int = 32,
        split: Split = "validation",
        seed: int | None = None,
    ):
        check_choice("granularity", granularity, Granularity)
        check_choice("split", split, Split)
        check_descent(max_steps, batch_size, lr)
        self.granularity = granularity
        self.lr = lr
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.split = split
        self.seed = seed or 0

    def learn(self, pool: ModelPool, fabric: "Fabric", data: Data) -> Weights:
        """Learn the weights and a temperature of the logits, and merge."""
        models = {name: pool.weights(name) for name in pool.model_names}
        inputs = aligned(pool, models=models)
        module = fabric.to_device(pool.build_model(inputs.reference)).requires_grad_(True)
        keys = parameter_keys(module, inputs.reference)
        keys += [  # running statistics are averaged too
            key
            for key, buffer in module.named_buffers()
            if key in inputs.reference and buffer.is_floating_point()
        ]
        mixture = Mixture(module, keys, None, inputs.models)
        columns = len(keys) if self.granularity == "layer" else 1
        logits = nn.Parameter(torch.zeros(len(models), columns, device=fabric.device))
        temperature = nn.Parameter(torch.ones((), device=fabric.device))
        optimizer = torch.optim.AdamW([logits, temperature], lr=self.lr, weight_decay=0)
        steps = descent(
            data, module, self.max_steps, self.batch_size, self.seed, "learning the soup"
        )
        for shown, tasks in steps:
            optimizer.zero_grad()
            weights = logits.softmax(dim=0)
            mixture.set(weights.detach())
            total = 0.0
            for answers, labels in tasks:
                loss = cross_entropy(temperature * answers.float(), labels) / len(data)
                loss.backward()
                total += loss.item()
            weights.backward(mixture.gradient(columns))
            optimizer.step()
            shown.detail = f"loss {total:.4f}"
        weights = logits.detach().softmax(dim=0)
        by_key, shares = per_key(weights, keys), weights.mean(dim=1).tolist()
        named = (f"{name} {share:.2f}" for name, share in zip(models, shares, strict=True))
        log.info("The soup: %s.", ", ".join(named))

        def merge_tensor(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            total = torch.zeros_like(tensors[0])
            for weight, tensor in zip(by_key.get(key, shares), tensors, strict=True):
                total.add_(tensor, alpha=weight)
            return total

        return merged(pool, models, merge_tensor)
