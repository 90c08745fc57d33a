"""Where models come from: names to weights, names to modules, modules to disk."""

from fusion_bench.modelpool.adapter_pool import AdapterPool
from fusion_bench.modelpool.causal_lm import CausalLMPool
from fusion_bench.modelpool.clip_vision import CLIPVisionModelPool
from fusion_bench.modelpool.huggingface import HFModelPool
from fusion_bench.modelpool.seq2seq_lm import Seq2SeqLMPool
from fusion_bench.modelpool.sequence_classification import SequenceClassificationModelPool
from fusion_bench.modelpool.sources.merged import MergedModel

__all__ = [
    "AdapterPool",
    "CLIPVisionModelPool",
    "CausalLMPool",
    "HFModelPool",
    "MergedModel",
    "Seq2SeqLMPool",
    "SequenceClassificationModelPool",
]
