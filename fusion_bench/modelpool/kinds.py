"""Which pool suits models, as far as their config tells."""

from collections.abc import Mapping

from torch import nn

from fusion_bench.modelpool.sources import Sources
from fusion_bench.problems import Problem, Problems
from fusion_bench.weights import Config

_VISION = ("clip", "clip_vision_model")


def pool_node(models: Mapping[str, object], *, heads: bool) -> dict[str, object]:
    """Return the config node of a pool for models, without the models.

    The config of the pretrained model, or else of the first, decides; of it no more is read. Where
    it cannot be read, the next one does, so that the plan tells of all that are missing.

    Args:
        models: as in ``HFModelPool``.
        heads: whether classifiers of texts have their heads, or a task pool puts them on.

    Raises:
        FusionBenchError: no model can be read; the places begin with ``models``.
    """
    node, config = _first_known(models)
    named = config.get("architectures") or [""]
    architecture = type(node).__name__ if isinstance(node, nn.Module) and config else str(named[0])
    pool, arguments = "HFModelPool", {}
    if config.get("model_type") in _VISION:
        pool = "CLIPVisionModelPool"
    elif architecture.endswith(("ForCausalLM", "LMHeadModel")):
        pool = "CausalLMPool"
    elif config.get("is_encoder_decoder"):
        pool = "Seq2SeqLMPool"
    elif architecture.endswith("ForSequenceClassification") and not heads:
        pool = "SequenceClassificationModelPool"
    elif architecture:
        arguments = {"model_class": architecture}
    return {"_target_": f"fusion_bench.modelpool.{pool}", **arguments}


def _first_known(models: Mapping[str, object]) -> tuple[object, Config]:
    """Return the first model whose config can be read, and the config."""
    problems = Problems()
    for name in sorted(models, key=lambda name: name != "_pretrained_"):
        with problems.collect("models", name):
            return models[name], Sources(models, "AutoModel")[name].config() or {}
    told: dict[str, Problem] = {}
    for problem in problems:  # others need the pretrained model, and tell that it is missing
        told.setdefault(problem.reason, problem)
    Problems(told.values()).raise_all()
    raise AssertionError("no models")
