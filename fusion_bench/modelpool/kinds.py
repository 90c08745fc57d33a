"""Which pool suits models, as far as their config tells."""

from collections.abc import Mapping

from torch import nn

from fusion_bench.modelpool.sources import Sources
from fusion_bench.problems import within

_VISION = ("clip", "clip_vision_model")


def pool_node(models: Mapping[str, object], *, heads: bool) -> dict[str, object]:
    """Return the config node of a pool for models, without the models.

    The config of the pretrained model, or else of the first, decides; of it no more is read.

    Args:
        models: as in ``HFModelPool``.
        heads: whether classifiers of texts have their heads, or a task pool puts them on.

    Raises:
        FusionBenchError: a model that is not there; the place begins with ``models``.
    """
    name = "_pretrained_" if "_pretrained_" in models else next(iter(models))
    with within("models", name):
        config = Sources(models, "AutoModel")[name].config() or {}
    node = models[name]
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
