"""How a model is evaluated."""

from fusion_bench.taskpool.clip_vision import CLIPVisionModelTaskPool
from fusion_bench.taskpool.image_classification import ImageClassificationTaskPool
from fusion_bench.taskpool.images import LabelledImages
from fusion_bench.taskpool.results import Score
from fusion_bench.taskpool.tuning import TuningImages

__all__ = [
    "CLIPVisionModelTaskPool",
    "ImageClassificationTaskPool",
    "LabelledImages",
    "Score",
    "TuningImages",
]
