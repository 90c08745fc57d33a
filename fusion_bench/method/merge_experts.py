r"""Fewer experts: similar experts of a mixture become their mean, layer by layer.

Experts are grouped by the cosine of their routers' rows or of their weights, with average linkage;
a group's expert is $\sum_e a_e\, \theta_e$ with equal $a_e$, or in proportion to how often the
router chooses them, and its row is the mean of the rows.
Li et al., Merge, Then Compress, https://arxiv.org/abs/2310.01334
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fusion_bench.method.base import run
from fusion_bench.method.contract import Data, ModelPool, Needs, Ran
from fusion_bench.method.expert_entries import ExpertBlock, blocks_of
from fusion_bench.method.expert_layouts import LAYOUTS
from fusion_bench.method.pools import located
from fusion_bench.method.prompts import refuse_without_tokenizer, tokenizer_of, tokens_of, usage
from fusion_bench.problems import FusionBenchError, check_choice
from fusion_bench.weights import Averaged, Config, Model, Share, Stacked, Sums, Weights, changed

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Grouping = Literal["router", "weights", "consecutive"]
Average = Literal["equal", "usage"]

#: Elements of all experts that are compared at once.
_PIECE = 2**24


@dataclass(eq=False)
class MergeExperts:
    """A mixture of experts with fewer experts in each layer.

    Args:
        num_experts: how many experts a layer keeps.
        grouping: which experts become one: those with similar rows in the ``router``, those with
            similar ``weights``, or ``consecutive`` ones.
        average: whether experts of a group count alike, ``equal``, or by their ``usage``, how often
            the router chooses them in the prompts.
        prompts: texts for ``usage``.
    """

    needs_pretrained = False

    num_experts: int
    grouping: Grouping = "router"
    average: Average = "equal"
    prompts: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_choice("grouping", self.grouping, Grouping)
        check_choice("average", self.average, Average)
        if type(self.num_experts) is not int or self.num_experts < 1:
            raise FusionBenchError(
                f"{self.num_experts!r} is not a number of experts.", place=("num_experts",)
            )
        texts = self.prompts
        if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
            raise FusionBenchError(f"{texts!r} is no list of texts.", place=("prompts",))
        if self.average == "usage" and not texts:
            raise FusionBenchError(
                "there are none, by which the experts' usage is counted.",
                "Give some, or choose {here}average=equal.",
                place=("prompts",),
            )

    @property
    def needs(self) -> Needs:
        """Nothing; the one model is the only one that is looked at."""
        return Needs(weights=False)

    def check_pool(self, pool: ModelPool) -> None:
        """Refuse another number of models than one, and one without so many experts.

        Raises:
            FusionBenchError: as said.
        """
        if len(pool.model_names) != 1:
            with located(pool):
                raise FusionBenchError(
                    f"there are {len(pool.model_names)} models, and MergeExperts takes one.",
                    "Name a single model.",
                    place=("models",),
                )
        (name,) = pool.model_names
        model = pool.model(name)
        if not model.weights:
            return  # nothing but the name is known
        with located(pool, name):
            _config(model)
            blocks = blocks_of(model.weights)
        fewest = min(block.count for block in blocks)
        if self.num_experts > fewest:
            raise FusionBenchError(
                f"{self.num_experts} are more than the {fewest} experts of '{name}'.",
                "Choose fewer.",
                place=("num_experts",),
            )
        if self.average == "usage":
            with located(pool):
                refuse_without_tokenizer(pool)

    def fuse(
        self, pool: ModelPool, fabric: "Fabric | None" = None, data: Data | None = None
    ) -> Model:
        """Return the smaller mixture, whose experts are computed when they are read.

        Args:
            pool: the model.
            fabric: on whose device the model reads the prompts.
            data: ignored.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        self.check_pool(pool)
        (name,) = pool.model_names
        weights = pool.weights(name)
        blocks = blocks_of(weights)
        device = torch.device("cpu") if fabric is None else fabric.device
        counts = self._usage(pool, blocks, device) if self.average == "usage" else None
        groups = [self._groups(weights, block) for block in blocks]
        return self._model(pool, groups, counts)

    def outline(self, pool: ModelPool) -> Model:
        """Return the smaller mixture; which experts are alike is only found when it is merged.

        Raises:
            FusionBenchError: as ``check_pool``.
        """
        self.check_pool(pool)
        blocks = blocks_of(pool.weights(pool.model_names[0]))
        groups = [
            consecutive(own.count, self.num_experts)
            if self.grouping == "consecutive"
            else [range(own.count)] * self.num_experts
            for own in blocks
        ]
        return self._model(pool, groups, None)

    def _model(
        self, pool: ModelPool, groups: Sequence[Sequence[Sequence[int]]], counts: Tensor | None
    ) -> Model:
        """Return the mixture with each layer's groups merged, by the experts' counts."""
        (name,) = pool.model_names
        model, policy = pool.model(name), pool.policy
        blocks = blocks_of(model.weights)
        entries: dict[str, Sums] = {}
        for index, (block, own) in enumerate(zip(blocks, groups, strict=True)):
            equal = torch.ones(block.count, dtype=torch.float64)
            entries |= _merged(block, own, equal, equal if counts is None else counts[index])
        averaged = Averaged(model.weights, entries, policy.torch_dtype)
        kept, gone = changed(name, model.weights, policy), {k for b in blocks for k in b.keys}
        parts: dict[str, tuple[Weights, str]] = {}
        for key in model.weights:
            if key in entries:
                parts[key] = averaged, key
            elif key not in gone:
                parts[key] = kept, key
        return replace(model, weights=Stacked(parts), config=self._smaller(_config(model)))

    def run(
        self,
        modelpool: ModelPool | Mapping[str, nn.Module],
        fabric: "Fabric | None" = None,
        data: Data | None = None,
    ) -> Ran:
        """Merge the experts of a pool's model, or of a dict's module into a state dict."""
        return run(self, modelpool, fabric, data)

    def _groups(self, weights: Weights, block: ExpertBlock) -> list[list[int]]:
        """Return the experts of each group, in ascending order."""
        count = self.num_experts
        if self.grouping == "consecutive":
            return consecutive(block.count, count)
        if self.grouping == "router":
            rows = normalize(weights[block.router].double(), dim=1)
            return grouped(rows @ rows.T, count)
        products = _products(weights, block)
        norms = products.diagonal().sqrt()
        return grouped(products / norms / norms[:, None], count)

    def _usage(
        self, pool: ModelPool, blocks: Sequence[ExpertBlock], device: torch.device
    ) -> Tensor:
        """Return how often the prompts' tokens choose each expert, a row a layer."""
        (name,) = pool.model_names
        tokenizer, module = tokenizer_of(pool), pool.load_model(name).to(device)
        names = [own for own, _ in module.named_modules()]
        routers = [
            next(own for own in names if own.startswith(block.layer) and own.endswith(".gate"))
            for block in blocks
        ]
        prompts = [tokens_of(tokenizer, prompt) for prompt in self.prompts]
        return usage(module, routers, prompts, _chosen(_config(pool.model(name))), device)

    def _smaller(self, config: Config) -> dict[str, object]:
        """Return the config.json with the new number of experts."""
        layout = LAYOUTS[config["model_type"]]
        names = [name for name in ("num_experts", "num_local_experts") if name in config]
        return {
            **config,
            **dict.fromkeys(names or [layout.count], self.num_experts),
            "num_experts_per_tok": min(_chosen(config), self.num_experts),
        }


def _config(model: Model) -> Config:
    """Return the config.json of a mixture.

    Raises:
        FusionBenchError: it has none, or is of another type.
    """
    family = (model.config or {}).get("model_type")
    if model.config is None or family not in LAYOUTS:
        reason = "it has no config.json." if model.config is None else f"it is a '{family}'."
        raise FusionBenchError(
            reason, f"Experts are merged in models of the types: {', '.join(LAYOUTS)}."
        )
    return model.config


def _chosen(config: Config) -> int:
    """Return how many experts a token has."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    return int(made.num_experts_per_tok)


def consecutive(experts: int, count: int) -> list[list[int]]:
    """Return ``count`` groups of neighbours, as equal in size as can be."""
    ends = [experts * i // count for i in range(count + 1)]
    return [list(range(*pair)) for pair in pairwise(ends)]


def grouped(similarities: Tensor, count: int) -> list[list[int]]:
    """Return ``count`` groups of what is similar, by average linkage.

    Args:
        similarities: a symmetric matrix.
        count: the number of groups.

    Returns:
        The members of each group in ascending order, the group with the first one first.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    if len(similarities) <= count:
        return [[index] for index in range(len(similarities))]
    distances = (1 - similarities.double()).clamp(min=0).fill_diagonal_(0)
    tree = linkage(squareform(distances.numpy(), checks=False), "average")
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(cut_tree(tree, n_clusters=count).ravel()):
        groups.setdefault(int(label), []).append(index)
    return list(groups.values())


def _products(weights: Weights, block: ExpertBlock) -> Tensor:
    """Return the inner products of all experts, in float64."""
    total = torch.zeros(block.count, block.count, dtype=torch.float64)
    for part in block.parts:
        step = max(1, _PIECE // block.count)
        for start in range(0, part.size, step):
            stop = min(start + step, part.size)
            rows = torch.stack(
                [weights.read(key, at + start, at + stop).float() for key, at in part.places]
            )
            total += (rows @ rows.T).double()
    return total


def _merged(
    block: ExpertBlock, groups: Sequence[Sequence[int]], equal: Tensor, used: Tensor
) -> dict[str, Sums]:
    """Return the entries of a layer's fewer experts, and their router."""
    found: dict[str, Sums] = {}
    for part in [*block.parts, block.rows]:
        counts = equal if part is block.rows else used
        sums = []
        for group in groups:
            own = counts[list(group)].double()
            own = own / own.sum() if own.sum() > 0 else torch.full_like(own, 1 / len(own))
            places = [part.places[index] for index in group]
            sums.append(
                tuple(Share(key, at, float(a)) for (key, at), a in zip(places, own, strict=True))
            )
        if part.stacked:
            found[part.places[0][0]] = Sums((len(groups), *part.shape), tuple(sums))
        else:
            for index, own_sum in enumerate(sums):
                found[part.places[index][0]] = Sums(part.shape, (own_sum,))
    return found
