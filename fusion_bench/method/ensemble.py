r"""Ensembles: $F(x) = \sum_t w_t f_t(x)$; the models stay separate, their outputs are merged."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import torch
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.method.base import ModuleDict
from fusion_bench.method.contract import Data, ModelPool, Needs, Saving
from fusion_bench.problems import FusionBenchError, check_choice, check_one_each
from fusion_bench.storage import read_json, whole_directory, write_text

if TYPE_CHECKING:
    from lightning.fabric import Fabric

#: What is put together: whatever the models return, or what their classifiers make of it.
Of = Literal["outputs", "logits", "probabilities", "log_probabilities"]
#: The file that says how a saved ensemble's members belong together.
_FILE = "ensemble.json"


class Ensemble(nn.Module):
    """Several models whose outputs are combined.

    Args:
        models: name to model.
        weights: one per model, of a sum; ``None`` takes the largest value of each element.
        of: what is put together.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], weights: Sequence[float] | None, of: Of = "outputs"
    ):
        super().__init__()
        self.names = list(models)
        self.models = nn.ModuleList(models.values())
        self.weights = None if weights is None else list(weights)
        self.of = of

    @property
    def config(self) -> Any:
        """The first model's config."""
        return getattr(self.models[0], "config", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the combined outputs: tensors, and containers of tensors."""
        return self._together([model(*args, **kwargs) for model in self.models])

    def _together(self, outputs: list[Any]) -> Any:
        first = outputs[0]
        if isinstance(first, Tensor):
            return self._merged(outputs)
        if isinstance(first, Mapping):
            parts = {key: self._together([output[key] for output in outputs]) for key in first}
            return type(first)(**parts)
        if isinstance(first, tuple | list):
            return type(first)(self._together(list(part)) for part in zip(*outputs, strict=True))
        return first

    def _merged(self, tensors: Sequence[Tensor]) -> Tensor:
        if self.weights is None:
            return torch.stack(list(tensors)).amax(dim=0)
        total = tensors[0] * self.weights[0]
        for tensor, weight in zip(tensors[1:], self.weights[1:], strict=True):
            total = total + tensor * weight
        return total

    def save(self, directory: Path, modelpool: Saving, config: Mapping[str, Any]) -> None:
        """Write each model into a directory with its name, and the ensemble's description.

        ``load_ensemble`` reads it back.
        """
        with whole_directory(directory) as place:
            for name, model in zip(self.names, self.models, strict=True):
                modelpool.save_model(model, place / quote(name, safe=""), config)
            described = {"models": self.names, "weights": self.weights, "of": self.of}
            write_text(place / _FILE, json.dumps(described, indent=2) + "\n")


class LogitEnsemble(Ensemble):
    """An ensemble of classifiers that combines their logits.

    A task pool makes each model a classifier; called by itself, the ensemble takes the logits that
    the models return.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the ensemble's logits.

        Raises:
            FusionBenchError: models that return features.
        """
        outputs = [model(*args, **kwargs) for model in self.models]
        logits = [getattr(output, "logits", output) for output in outputs]
        if not all(isinstance(own, Tensor) for own in logits):
            raise FusionBenchError(
                f"a {type(self.models[0]).__name__} returns no logits.",
                "Evaluate the ensemble with a task pool, or set {here}of=outputs.",
                place=("of",),
            )
        return self.combine(logits)

    @property
    def members(self) -> Sequence[nn.Module]:
        """The models, each of which makes a classifier."""
        return list(self.models)

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the ensemble's logits."""
        logits = [own.float() for own in logits]
        if self.of == "logits":
            return self._merged(logits)
        log_probs = [own.log_softmax(dim=-1) for own in logits]
        if self.of == "log_probabilities" or self.weights is None:  # the log keeps the order
            return self._merged(log_probs)
        # Not the log of a sum of tiny numbers.
        shares = torch.tensor(self.weights).log()
        weighted = [own + share for own, share in zip(log_probs, shares, strict=True)]
        return torch.stack(weighted).logsumexp(dim=0)


def load_ensemble(directory: str | Path, models: Mapping[str, nn.Module]) -> Ensemble:
    """Return a saved ensemble; ``models`` are the models in its directories, by name."""
    known = read_json(Path(directory) / _FILE)
    named = {name: models[name] for name in known["models"]}
    return ensemble_of(named, known["weights"], known["of"])


def ensemble_of(
    models: Mapping[str, nn.Module], weights: Sequence[float] | None, of: Of
) -> Ensemble:
    """Return an ensemble of the kind ``of``."""
    return Ensemble(models, weights) if of == "outputs" else LogitEnsemble(models, weights, of)


class EnsembleAlgorithm:
    """A method that keeps all models and combines their outputs.

    Subclasses say in ``shares`` what each model's answer counts; by default none is weighed, and
    the largest is taken.
    """

    needs = Needs(weights=False)

    @keeps_arguments
    def __init__(self, of: Of = "outputs"):
        check_choice("of", of, Of)
        self.of = of

    def shares(self, names: Sequence[str]) -> list[float] | None:
        """Return each model's weight.

        Raises:
            FusionBenchError: unusable weights.
        """
        return None

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse an empty pool and a wrong number of weights.

        Raises:
            FusionBenchError: one of these.
        """
        if not pool.model_names:
            raise FusionBenchError("There is nothing to merge: the pool has no model.")
        self.shares(pool.model_names)

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Ensemble:
        """Load the models.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        self.check_pool(pool)
        models = {name: pool.load_model(name) for name in pool.model_names}
        shares = self.shares(list(models))
        return ensemble_of(models, shares, self.of)

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Ensemble:
        """Load a pool's models, or use the modules of a dict."""
        pool = ModuleDict(modelpool) if isinstance(modelpool, Mapping) else modelpool
        return self.fuse(pool, fabric, data)


class SimpleEnsembleAlgorithm(EnsembleAlgorithm):
    """The mean of all models' outputs, without the pretrained model.

    Args:
        of: what is averaged: ``outputs``, the models' return values (for an encoder its features),
            or their classifiers' ``logits``, ``probabilities`` or ``log_probabilities``.
    """

    @keeps_arguments
    def __init__(self, of: Of = "outputs"):
        super().__init__(of)

    def shares(self, names: Sequence[str]) -> list[float]:
        """Return the same for each."""
        return [1 / len(names)] * len(names)


class WeightedEnsembleAlgorithm(EnsembleAlgorithm):
    """The weighted sum of all models' outputs.

    Args:
        weights: one per model, in the pool's order; ``null`` weighs all alike.
        normalize: divide the weights by their sum.
        of: as in ``SimpleEnsembleAlgorithm``.
    """

    @keeps_arguments
    def __init__(
        self, weights: Sequence[float] | None = None, normalize: bool = True, of: Of = "outputs"
    ):
        super().__init__(of)
        self.weights = None if weights is None else list(weights)
        self.normalize = normalize

    def shares(self, names: Sequence[str]) -> list[float]:
        """Return each model's weight.

        Raises:
            FusionBenchError: another number of weights than models, weights whose sum is zero with
                ``normalize``, or negative ones for probabilities.
        """
        weights = self.weights if self.weights is not None else [1.0] * len(names)
        check_one_each("weights", weights, names)
        total = sum(weights) if self.normalize else 1.0
        if not math.isfinite(sum(weights)):
            raise FusionBenchError("some are not finite.", place=("weights",))
        if total == 0:
            raise FusionBenchError(
                "the weights sum to zero and cannot be normalised.",
                "Give {here}normalize=false.",
                place=("weights",),
            )
        shares = [weight / total for weight in weights]
        if self.of == "probabilities" and min(shares) < 0:
            raise FusionBenchError(
                "negative weights would give negative probabilities.",
                "Choose other weights, or another {here}of.",
                place=("weights",),
            )
        return shares


class MaxModelPredictorAlgorithm(EnsembleAlgorithm):
    """The elementwise maximum of all models' outputs: that of the most confident model.

    Wu et al., Heterogeneous model reuse, https://icml.cc/virtual/2019/poster/4036

    Args:
        of: as in ``SimpleEnsembleAlgorithm``; the default is the logits because the maximum of
            features says nothing about confidence.
    """

    @keeps_arguments
    def __init__(self, of: Of = "logits"):
        super().__init__(of)
