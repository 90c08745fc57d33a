r"""AdaMerging: $\theta = \theta_0 + \sum_t \lambda_t \tau_t$ with learned coefficients.

The coefficients, one per model or one per model and tensor, minimise the entropy of the merged
model's predictions on unlabelled images of all tasks. Yang et al., AdaMerging,
https://arxiv.org/abs/2310.02575
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.method.base import aligned
from fusion_bench.method.contract import Data, ModelPool, Split
from fusion_bench.method.data import (
    LearningAlgorithm,
    check_descent,
    descent,
    merged,
    own_data,
    parameter_keys,
)
from fusion_bench.method.ties_merging import TiesMergingAlgorithm
from fusion_bench.problems import (
    ConfigError,
    FusionBenchError,
    Problems,
    check_between,
    check_choice,
)
from fusion_bench.storage import read_json, write_text
from fusion_bench.weights import Weights
from fusion_bench.weights.ops import task_vectors

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Granularity = Literal["layer", "task"]


class AdaMergingAlgorithm(LearningAlgorithm):
    """Task arithmetic with coefficients that are learned without labels.

    Args:
        granularity: a coefficient for each model and ``layer``, which is one parameter tensor, or
            one for each ``task``.
        init_values: the coefficients at the beginning; ``null`` is one over the number of models.
        weights: a file of coefficients from ``save_merging_weights`` to start from; with
            ``max_steps: 0`` they are used unchanged.
        lr: Adam's learning rate.
        max_steps: steps of Adam; each uses one batch of every task.
        batch_size: images of a task in a step.
        clamp_weights: keep the coefficients between 0 and 1.
        plusplus: AdaMerging++: first trim the task vectors to ``threshold`` percent and keep the
            values with the elected sign, as in TIES.
        threshold: for ``plusplus``.
        save_merging_weights: JSON file for the learned coefficients.
        split: the split of the datasets to use; the paper adapts to the test images.
        seed: the random seed.
    """

    needs_own_data = True
    needs_pretrained = True

    @keeps_arguments
    def __init__(
        self,
        granularity: Granularity = "layer",
        init_values: float | None = 0.3,
        weights: str | None = None,
        lr: float = 1e-3,
        max_steps: int = 1000,
        batch_size: int = 16,
        clamp_weights: bool = False,
        plusplus: bool = False,
        threshold: float = 20,
        save_merging_weights: str | None = None,
        split: Split = "train",
        seed: int | None = None,
    ):
        check_choice("granularity", granularity, Granularity)
        check_choice("split", split, Split)
        check_descent(max_steps, batch_size, lr)
        self.granularity = granularity
        self.init_values = init_values
        self.weights = weights
        self.lr = lr
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.clamp_weights = clamp_weights
        self.plusplus = plusplus
        check_between("threshold", threshold, 0, 100)
        self.threshold = threshold
        self.save_merging_weights = save_merging_weights
        self.split = split
        self.seed = seed or 0

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse models that cannot be merged, and a file of coefficients that does not fit.

        Raises:
            FusionBenchError: with both.
        """
        problems = Problems()
        with problems.collect():
            super().check_pool(pool)
        with problems.collect():
            if self.weights is not None:
                self._known(self.weights, list(pool.model_names))
        problems.raise_all()

    def learn(self, pool: ModelPool, fabric: "Fabric", data: Data) -> Weights:
        """Learn the coefficients and merge; other entries are copied from the pretrained model.

        Raises:
            FusionBenchError: no pretrained model, models that differ in keys, shapes or dtypes, a
                model without data, or a file of coefficients that does not fit.
        """
        names = list(pool.model_names)
        own = own_data(names, data)
        base, models = pool.weights("_pretrained_"), self._models(pool)
        inputs = aligned(pool, models=models)
        module = fabric.to_device(pool.build_model(base)).requires_grad_(True)
        keys = parameter_keys(module, base)
        mixture = Mixture(module, keys, base, inputs.models)
        coefficients = nn.Parameter(self._initial(names, keys).to(fabric.device))
        self._learn(mixture, coefficients, own)
        used = self._clamped(coefficients.detach())
        if self.save_merging_weights is not None:
            self._save({"models": names, "keys": keys, "coefficients": used.tolist()})
        by_key = per_key(used, keys)

        def merge_tensor(key: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
            assert base is not None
            total, vectors = base.clone(), task_vectors(key, 0, tensors, base)
            for weight, vector in zip(by_key.get(key, ()), vectors, strict=False):
                total.add_(vector, alpha=weight)
            return total

        return merged(pool, models, merge_tensor)

    def _models(self, pool: ModelPool) -> Mapping[str, Weights]:
        if self.plusplus:
            return TiesMergingAlgorithm(1.0, self.threshold).agreeing(pool)
        return {name: pool.weights(name) for name in pool.model_names}

    def _initial(self, names: list[str], keys: list[str]) -> Tensor:
        """Return the initial coefficients: a row per model, a column per tensor or just one."""
        columns = len(keys) if self.granularity == "layer" else 1
        if self.weights is None:
            value = 1 / len(names) if self.init_values is None else self.init_values
            return torch.full((len(names), columns), float(value))
        found, known = self._known(self.weights, names)
        if found.shape[1] != columns or (columns > 1 and known != keys):
            raise _other_coefficients(self.weights)
        return found

    @staticmethod
    def _known(file: str, names: list[str]) -> tuple[Tensor, list[str]]:
        """Return the coefficients in a file, a row for each model, and the columns' keys.

        Raises:
            FusionBenchError: no such file, or one of other models.
        """
        try:
            known = read_json(Path(file))
            found = torch.tensor(known["coefficients"], dtype=torch.float32)
            models, keys = known["models"], list(known.get("keys", []))
        except (ConfigError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise FusionBenchError(
                f"'{file}' is not a file of coefficients ({error}).", place=("weights",)
            ) from error
        if models != names or found.ndim != 2 or len(found) != len(names):
            raise _other_coefficients(file)
        return found, keys

    def _save(self, coefficients: Mapping[str, object]) -> None:
        assert self.save_merging_weights is not None
        try:
            write_text(Path(self.save_merging_weights), json.dumps(coefficients))
        except OSError as error:
            raise FusionBenchError(
                f"cannot write it: {error}", place=("save_merging_weights",)
            ) from error

    def _clamped(self, coefficients: Tensor) -> Tensor:
        return coefficients.clamp(0, 1) if self.clamp_weights else coefficients

    def _learn(self, mixture: "Mixture", coefficients: nn.Parameter, data: Data) -> None:
        """Minimise the entropy of the predictions."""
        optimizer = torch.optim.Adam([coefficients], lr=self.lr)
        steps = descent(
            data, mixture.module, self.max_steps, self.batch_size, self.seed, "adapting"
        )
        for shown, answers in steps:
            used = self._clamped(coefficients)
            mixture.set(used.detach())
            entropy = 0.0
            for logits, _ in answers:
                loss = entropies(logits).mean()
                loss.backward()
                entropy += loss.item()
            optimizer.zero_grad()
            used.backward(mixture.gradient(used.shape[1]))
            optimizer.step()
            shown.detail = f"entropy {entropy / len(data):.4f}"


def _other_coefficients(file: str) -> FusionBenchError:
    """Return the problem of a file that does not fit."""
    reason = f"'{file}' contains coefficients of other models, tensors or granularity."
    return FusionBenchError(reason, place=("weights",))


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of each prediction, in nats."""
    log_probs = logits.float().log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def per_key(weights: Tensor, keys: Sequence[str]) -> dict[str, list[float]]:
    """Return the models' weights by key; ``weights`` has one column, or a column per key."""
    return dict(zip(keys, weights.expand(-1, len(keys)).T.tolist(), strict=True))


class Mixture:
    """A module whose parameters are the base's plus a weighted sum of vectors.

    The gradient of a weight is the product of its vector and the parameters' gradient, so no graph
    goes through the sum.

    Args:
        module: takes the parameters; the vectors are kept on its device.
        keys: of the parameters, and buffers, that are mixed.
        base: what the vectors are added to; ``None`` adds them to nothing.
        models: by name; the vectors are their differences from the base.
    """

    def __init__(
        self,
        module: nn.Module,
        keys: list[str],
        base: Mapping[str, Tensor] | None,
        models: Mapping[str, Mapping[str, Tensor]],
    ):
        self.module = module
        entries = module.state_dict(keep_vars=True)
        self._parameters = [entries[key] for key in keys]
        self._base: list[Tensor] = []
        self._vectors: list[Tensor] = []
        for key, parameter in zip(keys, self._parameters, strict=True):
            origin = torch.zeros_like(parameter, dtype=torch.float32)
            if base is not None:
                origin.copy_(base[key])
            rows = (model[key].to(origin) - origin for model in models.values())
            self._base.append(origin)
            self._vectors.append(torch.stack([row.flatten() for row in rows]))

    @torch.no_grad()
    def set(self, weights: Tensor) -> None:
        """Set the module's parameters; ``weights`` has a row per model, and one or many columns."""
        columns = weights.expand(-1, len(self._parameters)).unbind(dim=1)
        parts = zip(self._parameters, self._base, self._vectors, columns, strict=True)
        for parameter, base, vectors, column in parts:
            parameter.copy_(base + (column.to(vectors) @ vectors).view(base.shape))

    @torch.no_grad()
    def gradient(self, columns: int) -> Tensor:
        """Return the gradient of the weights, and clear that of the parameters."""
        found = []
        for parameter, vectors in zip(self._parameters, self._vectors, strict=True):
            gradient = parameter.grad
            parameter.grad = None
            if gradient is None:
                found.append(torch.zeros(len(vectors), device=vectors.device))
            else:
                found.append(vectors @ gradient.flatten().float())
        stacked = torch.stack(found, dim=1)
        return stacked if columns > 1 else stacked.sum(dim=1, keepdim=True)
