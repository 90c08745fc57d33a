r"""Fisher merging: $\theta_j = \sum_t c_t F_{t,j} \theta_{t,j} / \sum_t c_t F_{t,j}$.

$F_t$ is the diagonal of the Fisher information of model $t$ on its own task,
$F_{t,j} = \frac{1}{N} \sum_x \sum_y p(y|x) (\partial \log p(y|x) / \partial \theta_j)^2$: the more
a prediction depends on a parameter, the more weight that model has for it. Matena and Raffel,
Merging models with Fisher-weighted averaging, https://arxiv.org/abs/2111.09832
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.method.contract import Data, ModelPool, Split, TaskData
from fusion_bench.method.data import (
    LearningAlgorithm,
    check_patterns,
    check_sampling,
    drawn_batches,
    excluded,
    merged,
    of_classes,
    own_data,
    parameter_keys,
    wide,
)
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.problems import check_between, check_choice
from fusion_bench.weights import Weights

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

Estimator = Literal["exact", "sampled", "empirical", "batch_sqrt"]

#: Gradients are computed side by side as long as they take no more floats than this. That makes up
#: for the overhead of small models; large ones are quicker one by one.
_FLOATS = 2**26
#: From so many classes on, such as a vocabulary, their number is told.
_MANY = 200


class FisherMergingAlgorithm(LearningAlgorithm):
    """The average of all models, each parameter weighted by its Fisher information.

    Args:
        exclude_param_names_regex: parameters whose names match are copied from the pretrained
            model, or averaged if there is none.
        normalize_fisher_weight: divide each model's Fisher by its norm, so no model dominates.
        minimal_fisher_weight: added to each weight.
        num_fisher_examples: samples of each task, drawn at random; ``null`` takes all.
        estimator: of the sum over labels: ``exact``, which costs one backward pass a class and
            sample; ``sampled``, one label drawn from the model's answer; ``empirical``, the true
            label; ``batch_sqrt``, the square of a batch's summed gradient, as common code has it.
        batch_size: samples in a batch, which matters for ``batch_sqrt`` alone.
        split: the split of the datasets to use.
        seed: the random seed.
        dataloader_kwargs: may also contain ``batch_size``; its ``num_workers`` is ignored because
            the task pool's setting is used.
    """

    needs_own_data = True

    @keeps_arguments
    def __init__(
        self,
        exclude_param_names_regex: Sequence[str] = (),
        normalize_fisher_weight: bool = True,
        minimal_fisher_weight: float = 1e-6,
        num_fisher_examples: int | None = 256,
        estimator: Estimator = "exact",
        batch_size: int = 32,
        split: Split = "train",
        seed: int | None = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
    ):
        check_choice("estimator", estimator, Estimator)
        check_choice("split", split, Split)
        check_between("minimal_fisher_weight", minimal_fisher_weight, 0, 1)
        for key, value in (dataloader_kwargs or {}).items():
            check_choice("dataloader_kwargs", key, Literal["batch_size", "num_workers"])
            batch_size = value if key == "batch_size" else batch_size
        check_sampling("num_fisher_examples", num_fisher_examples, batch_size)
        check_patterns("exclude_param_names_regex", exclude_param_names_regex)
        self.exclude_param_names_regex = list(exclude_param_names_regex)
        self.normalize_fisher_weight = normalize_fisher_weight
        self.minimal_fisher_weight = minimal_fisher_weight
        self.num_fisher_examples = num_fisher_examples
        self.estimator = estimator
        self.uses_labels = estimator == "empirical"
        self.batch_size = batch_size
        self.split = split
        self.seed = seed or 0

    def learn(self, pool: ModelPool, fabric: "Fabric", data: Data) -> Weights:
        """Estimate the Fisher information of each model and merge.

        Raises:
            FusionBenchError: a model without data.
        """
        names = pool.model_names
        own = own_data(names, data)
        fishers = []
        for name in names:
            module = fabric.to_device(pool.load_model(name)).requires_grad_(True)
            parameter_keys(module, pool.weights(name))
            fishers.append(self.fisher(module, name, own[name]))
        coefficients = self._coefficients(fishers)

        def merge_tensor(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            if base is not None and excluded(key, self.exclude_param_names_regex):
                return base.clone()
            average = SimpleAverageAlgorithm().merge_tensor(key, tensors, base)
            if key not in fishers[0]:
                return average
            weighted, total = torch.zeros_like(average), torch.zeros_like(average)
            for fisher, coefficient, tensor in zip(fishers, coefficients, tensors, strict=True):
                weight = (fisher[key].to(tensor) + self.minimal_fisher_weight) * coefficient
                weighted += weight * tensor
                total += weight
            # Where no model has anything to say; NaN must not be taken for that.
            return torch.where(total == 0, average, weighted / total)

        models = {name: pool.weights(name) for name in names}
        return merged(pool, models, merge_tensor, weighted_sum=False)

    @torch.enable_grad()
    def fisher(self, module: nn.Module, name: str, data: TaskData) -> dict[str, Tensor]:
        """Return the diagonal Fisher information of a model, by parameter, on the CPU."""
        parameters = {
            key: parameter
            for key, parameter in module.named_parameters()
            if not excluded(key, self.exclude_param_names_regex)
        }
        if not parameters:
            return {}
        classify = data.classify(module)
        fisher = {key: wide(torch.zeros_like(p)) for key, p in parameters.items()}
        size = self.batch_size if self.estimator == "batch_sqrt" else 1
        random, told = torch.Generator().manual_seed(self.seed), False
        count, batches = drawn_batches(
            data, self.num_fisher_examples, size, self.seed, f"Fisher of {name}"
        )
        for images, labels in batches:
            log_probs = wide(of_classes(classify(images), name)).log_softmax(dim=-1)
            if self.estimator == "exact" and log_probs.shape[-1] > _MANY and not told:
                told = True
                log.warning(
                    "Fisher of %s: %d classes take as many backward passes a sample; "
                    "'estimator: sampled' takes one.",
                    name,
                    log_probs.shape[-1],
                )
            rows = self._rows(log_probs.detach(), labels, random)
            at_once = max(1, _FLOATS // sum(p.numel() for p in parameters.values()))
            for chunk in rows.split(at_once):
                several = len(chunk) > 1
                gradients = torch.autograd.grad(
                    log_probs,
                    list(parameters.values()),
                    chunk.view(-1, *log_probs.shape) if several else chunk.view_as(log_probs),
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=several,
                )
                for total, gradient in zip(fisher.values(), gradients, strict=True):
                    if gradient is not None:  # the answer does not depend on it
                        squares = wide(gradient).square()
                        total += squares.sum(dim=0) if several else squares
        return {key: (total / count).cpu() for key, total in fisher.items()}

    def _rows(self, log_probs: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        """Return weights of the log-probabilities; each row's gradient is squared by itself."""
        probs = log_probs.exp()
        if self.estimator == "batch_sqrt":
            return probs.sqrt().view(1, -1)
        if self.estimator == "exact":
            return probs[0].sqrt().diag()
        if self.estimator == "sampled":
            labels = torch.multinomial(probs.cpu(), 1, generator=random)[0].to(probs.device)
        return torch.nn.functional.one_hot(labels, probs.shape[-1]).to(probs)

    def _coefficients(self, fishers: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """Return the normalisation coefficients of the models' Fishers."""
        if not self.normalize_fisher_weight:
            return [1.0] * len(fishers)
        norms = [
            math.sqrt(math.fsum(float(f.double().square().sum()) for f in fisher.values()))
            for fisher in fishers
        ]
        inverse = [1 / (norm + self.minimal_fisher_weight or 1) for norm in norms]
        return [value / sum(inverse) for value in inverse]
