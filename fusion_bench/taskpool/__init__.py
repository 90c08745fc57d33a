"""How a model is judged."""

from fusion_bench.taskpool.clip_vision import CLIPVisionModelTaskPool
from fusion_bench.taskpool.evaluate import Score

__all__ = ["CLIPVisionModelTaskPool", "Score"]
