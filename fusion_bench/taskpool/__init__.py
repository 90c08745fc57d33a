"""How a model is evaluated."""

from fusion_bench.taskpool.images.clip_vision import CLIPVisionModelTaskPool
from fusion_bench.taskpool.images.image_classification import ImageClassificationTaskPool
from fusion_bench.taskpool.images.tuning import TuningImages
from fusion_bench.taskpool.pool import TaskPool
from fusion_bench.taskpool.task import LearningData, Task, TaskDescription

__all__ = [
    "CLIPVisionModelTaskPool",
    "ImageClassificationTaskPool",
    "LearningData",
    "Task",
    "TaskDescription",
    "TaskPool",
    "TuningImages",
]
