"""The methods of mergekit and their parameters, and what is the same here.

The one table that both directions use: recipes become configs, and configs recipes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fusion_bench.recipes.document import Scalar

#: What the base model is to a method: the ``origin`` that the others are compared with, required or
#: ``optional``; the first of two ``ends``; a ``model`` like the others; or the ``donor`` alone of
#: config and tokenizer.
Base = Literal["origin", "optional", "end", "model", "donor"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of mergekit's.

    Attributes:
        option: our option; None where it decides nothing.
        kind: what its values are.
        default: mergekit's; None where it wants a value.
        of_model: each model may have its own.
        complement: ours is 1 minus theirs.
        share: larger values than 1 mean 1.
        limits: the least and the largest value.
        values: ours for true and for false.
    """

    option: str | None
    kind: Literal["number", "whole number", "truth"] = "number"
    default: Scalar | None = None
    of_model: bool = False
    complement: bool = False
    share: bool = False
    limits: tuple[float, float] | None = None
    values: Mapping[bool, Scalar] = field(default_factory=dict)

    @property
    def required(self) -> bool:
        """Whether mergekit wants a value."""
        return self.default is None


@dataclass(frozen=True)
class Method:
    """A method of mergekit's.

    Attributes:
        target: our class.
        parameters: by mergekit's names.
        base: what the base model is to it.
        models: the least and the largest number of models beside an origin or end.
        fixed: our options that make it mergekit's variant.
    """

    target: str
    parameters: Mapping[str, Parameter]
    base: Base = "origin"
    models: tuple[int, int | None] = (1, None)
    fixed: Mapping[str, Scalar] = field(default_factory=dict)

    def wrong_number(self, name: str, count: int) -> str | None:
        """Return what to say of a number of models that it cannot merge; None for another."""
        least, most = self.models
        if least <= count and (most is None or count <= most):
            return None
        beside = " beside the base" if self.base in ("origin", "end", "optional") else ""
        wanted = f"exactly {least}" if least == most else f"at least {least}"
        models = "model" if least == 1 else "models"
        return f"{name} merges {wanted} {models}{beside}, and there are {count}."


_ANY = {True: True, False: False}
_WEIGHT = Parameter("weights", of_model=True)
_LAMBDA = Parameter("scaling_factor", default=1.0)
_DENSITY = Parameter("density", default=1.0, of_model=True, share=True)
_NO_DENSITY = Parameter(None, default=1.0, of_model=True)
_SPARSITY = Parameter("sparsity_ratio", default=1.0, of_model=True, complement=True, share=True)
_THRESHOLD = Parameter("threshold", default=1.0, of_model=True, share=True)
_GAMMA = Parameter("gamma", default=0.01, of_model=True, limits=(0, 1))
_EPSILON = Parameter("epsilon", default=0.15, of_model=True, limits=(0, 1))


def _truth(option: str, default: bool, values: Mapping[bool, Scalar]) -> Parameter:
    return Parameter(option, "truth", default, values=values)


_MEAN_OR_SUM = {True: "mean", False: "sum"}
_L1 = {True: "l1", False: "none"}

METHODS: Mapping[str, Method] = {
    "linear": Method(
        "WeightedAverageAlgorithm",
        {"weight": _WEIGHT, "normalize": _truth("normalize", True, _ANY)},
        "model",
    ),
    "slerp": Method("SlerpMergeAlgorithm", {"t": Parameter("t")}, "end", (1, 1)),
    "nuslerp": Method(
        "NuSlerpAlgorithm",
        {
            "weight": _WEIGHT,
            "nuslerp_flatten": Parameter("axis", "truth", True),
            "nuslerp_row_wise": Parameter("axis", "truth", False),
        },
        "optional",
        (2, 2),
    ),
    "multislerp": Method(
        "MultiSlerpAlgorithm",
        {
            "weight": _WEIGHT,
            "normalize_weights": _truth("normalize_weights", True, _ANY),
            "eps": Parameter("eps", default=1e-8),
        },
        "optional",
        (2, None),
    ),
    "karcher": Method(
        "KarcherMeanAlgorithm",
        {
            "max_iter": Parameter("max_iter", "whole number", 10),
            "tol": Parameter("tol", default=1e-5),
        },
        "model",
    ),
    "task_arithmetic": Method(
        "TaskArithmeticAlgorithm",
        {
            "weight": _WEIGHT,
            "density": _NO_DENSITY,
            "lambda": _LAMBDA,
            "normalize": _truth("normalize", False, _ANY),
            "rescale": Parameter(None, "truth", False),
        },
    ),
    "ties": Method(
        "TiesMergingAlgorithm",
        {
            "weight": _WEIGHT,
            "density": _THRESHOLD,
            "lambda": _LAMBDA,
            "normalize": _truth("merge_func", True, _MEAN_OR_SUM),
            "rescale": _truth("rescale", False, _L1),
        },
        fixed={"scope": "tensor", "zero_sign": "positive", "keep": "at_least_one"},
    ),
    "dare_linear": Method(
        "DareTaskArithmetic",
        {
            "weight": _WEIGHT,
            "density": _SPARSITY,
            "lambda": _LAMBDA,
            "normalize": _truth("normalize", False, _ANY),
            "rescale": _truth("rescale", True, _L1),
        },
    ),
    "dare_ties": Method(
        "DareTiesMerging",
        {
            "weight": _WEIGHT,
            "density": _SPARSITY,
            "lambda": _LAMBDA,
            "normalize": _truth("merge_func", False, _MEAN_OR_SUM),
            "rescale": _truth("rescale", True, _L1),
        },
        fixed={"threshold": 1, "zero_sign": "positive"},
    ),
    "breadcrumbs": Method(
        "ModelBreadcrumbs",
        {
            "weight": _WEIGHT,
            "density": _DENSITY,
            "gamma": _GAMMA,
            "lambda": _LAMBDA,
            "normalize": _truth("merge_func", False, _MEAN_OR_SUM),
            "rescale": _truth("rescale", False, _L1),
        },
        fixed={"gives_way": "gamma", "merge": "linear"},
    ),
    "breadcrumbs_ties": Method(
        "ModelBreadcrumbs",
        {
            "weight": _WEIGHT,
            "density": _DENSITY,
            "gamma": _GAMMA,
            "lambda": _LAMBDA,
            "normalize": _truth("merge_func", False, _MEAN_OR_SUM),
            "rescale": _truth("rescale", False, _L1),
        },
        fixed={"gives_way": "gamma", "merge": "elect", "zero_sign": "positive"},
    ),
    "della": Method(
        "DellaMerging",
        {
            "weight": _WEIGHT,
            "density": _DENSITY,
            "epsilon": _EPSILON,
            "lambda": _LAMBDA,
            "normalize": _truth("merge_func", True, _MEAN_OR_SUM),
            "rescale": _truth("rescale", True, _L1),
        },
        fixed={"window": "half", "merge": "elect", "zero_sign": "positive"},
    ),
    "della_linear": Method(
        "DellaMerging",
        {
            "weight": _WEIGHT,
            "density": _DENSITY,
            "epsilon": _EPSILON,
            "lambda": _LAMBDA,
            "normalize": _truth("merge_func", False, _MEAN_OR_SUM),
            "rescale": _truth("rescale", True, _L1),
        },
        fixed={"window": "half", "merge": "linear"},
    ),
    "model_stock": Method(
        "ModelStock",
        {"filter_wise": _truth("filter_wise", False, _ANY)},
        models=(2, None),
    ),
    "nearswap": Method("NearSwapAlgorithm", {"t": Parameter("t")}, "end", (1, 1)),
    "arcee_fusion": Method("ArceeFusionAlgorithm", {}, "end", (1, 1)),
    "sce": Method("SCEAlgorithm", {"select_topk": Parameter("select_topk", default=1.0)}),
    "passthrough": Method(
        "PassthroughAlgorithm",
        {"scale": Parameter("scale", default=1.0, of_model=True)},
        "donor",
        (1, 1),
    ),
    "ram": Method("RAMAlgorithm", {"epsilon": Parameter("epsilon", default=1e-5)}),
    "ramplus_tl": Method(
        "RAMPlusAlgorithm",
        {
            "epsilon": Parameter("epsilon", default=1e-5),
            "r": Parameter("r", default=0.1),
            "alpha": Parameter("alpha", default=0.2),
        },
    ),
}


def decided_options(target: str) -> frozenset[str] | None:
    """Return the options of a class of ours that recipes decide; None where they decide all."""
    methods = [own for own in METHODS.values() if f"fusion_bench.method.{own.target}" == target]
    if not methods:
        return None
    found = {"_target_", "where"}.union(*(own.fixed for own in methods))
    return frozenset(found).union(
        own.option for method in methods for own in method.parameters.values() if own.option
    )


#: What the names of tensors begin with in modules that are not called as they are.
MODULES: Mapping[str, tuple[str, ...]] = {
    "shared": ("shared", "lm_head"),
    "text_decoder": (
        *("language_model", "model.language_model"),
        *("model.embed_tokens", "model.layers", "model.norm", "lm_head"),
    ),
    "multi_modal_projector": (
        *("multi_modal_projector", "model.multi_modal_projector"),
        *("visual.merger", "model.visual.merger", "model.visual.deepstack_merger_list"),
    ),
    "vision_tower": (
        *("vision_tower", "model.vision_tower"),
        *("visual.blocks", "visual.patch_embed"),
        *("model.visual.blocks", "model.visual.patch_embed", "model.visual.pos_embed"),
    ),
    "default": ("",),
}

#: Of a mask's type, which changes no result.
IGNORED = ("int8_mask",)
#: The names of all parameters.
PARAMETERS = frozenset(IGNORED).union(*(method.parameters for method in METHODS.values()))
