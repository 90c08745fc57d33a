r"""Model soups: averages of models, selected or weighted on a validation split.

Greedy: models join the average one by one, the best first, where it gets better by that. Learned:
$\theta = \sum_t \mathrm{softmax}(a)_t\,\theta_t$ with the $a$ that minimise the cross entropy.
Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

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
from fusion_bench.problems import check_choice
from fusion_bench.progress import bar
from fusion_bench.weights import Weights

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

Granularity = Literal["layer", "model"]


class GreedySoupAlgorithm(LearningAlgorithm):
    """The average of the models that improve it; equally good models keep the pool's order.

    The score is the mean accuracy over all tasks.

    Args:
        accept_equal: also add a model if the score stays the same.
        split: the split of the datasets to evaluate on, with its labels.
    """

    uses_labels = True

    def __init__(self, accept_equal: bool = False, split: Split = "validation"):
        check_choice("split", split, Split)
        self.accept_equal = accept_equal
        self.split = split

    def learn(self, pool: ModelPool, fabric: "Fabric", data: Data) -> Weights:
        """Evaluate every model, then add one after the other."""

        def soup(names: list[str]) -> Weights:
            models = {name: pool.weights(name) for name in names}
            return merged(pool, models, SimpleAverageAlgorithm().merge_tensor)

        def score(weights: Weights) -> float:
            module = fabric.to_device(pool.build_model(weights))
            scores = [task.evaluate(module) for task in data.values()]
            return sum(s.num_correct / s.num_samples for s in scores) / len(scores)

        names = list(pool.model_names)
        alone = {
            name: score(soup([name])) for name in bar(names, "soup", total=len(names), unit="model")
        }
        ranked = sorted(names, key=lambda name: -alone[name])  # stable
        chosen, best = ranked[:1], alone[ranked[0]]
        for name in ranked[1:]:
            found = score(soup([*chosen, name]))
            if found > best or (self.accept_equal and found == best):
                chosen, best = [*chosen, name], found
        log.info("The soup contains %s (%.1f %%).", ", ".join(chosen), 100 * best)
        return soup(chosen)


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
            shown.set_postfix(loss=f"{total:.4f}", refresh=False)
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
