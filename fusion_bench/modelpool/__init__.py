"""Where models come from: names to weights, names to modules, modules to disk."""

from fusion_bench.modelpool.clip_vision import CLIPVisionModelPool

__all__ = ["CLIPVisionModelPool"]
