"""Where models come from: names to weights, names to modules, modules to disk."""

from fusion_bench.modelpool.causal_lm import CausalLMPool
from fusion_bench.modelpool.clip_vision import CLIPVisionModelPool
from fusion_bench.modelpool.huggingface import HFModelPool

__all__ = ["CLIPVisionModelPool", "CausalLMPool", "HFModelPool"]
