"""How a model is evaluated."""

from fusion_bench.patch_head import PatchHead
from fusion_bench.taskpool.dense.depth import DepthTask
from fusion_bench.taskpool.dense.normals import NormalsTask
from fusion_bench.taskpool.dense.segmentation import SegmentationTask
from fusion_bench.taskpool.images.clip_vision import CLIPVisionModelTaskPool
from fusion_bench.taskpool.images.image_classification import ImageClassificationTaskPool
from fusion_bench.taskpool.images.tuning import TuningImages
from fusion_bench.taskpool.pool import TaskPool
from fusion_bench.taskpool.task import LearningData, Task, TaskDescription

__all__ = [
    "CLIPVisionModelTaskPool",
    "DepthTask",
    "ImageClassificationTaskPool",
    "LearningData",
    "NormalsTask",
    "PatchHead",
    "SegmentationTask",
    "Task",
    "TaskDescription",
    "TaskPool",
    "TuningImages",
]
