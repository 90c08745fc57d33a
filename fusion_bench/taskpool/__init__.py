"""How a model is evaluated."""

from fusion_bench.patch_head import PatchHead
from fusion_bench.taskpool.dense.depth import DepthTask
from fusion_bench.taskpool.dense.normals import NormalsTask
from fusion_bench.taskpool.dense.segmentation import SegmentationTask
from fusion_bench.taskpool.images.clip_vision import CLIPVisionModelTaskPool
from fusion_bench.taskpool.images.image_classification import ImageClassificationTaskPool
from fusion_bench.taskpool.images.tuning import TuningImages
from fusion_bench.taskpool.language.choices import MultipleChoiceTask
from fusion_bench.taskpool.language.classification import SequenceClassificationTask
from fusion_bench.taskpool.language.generation import GenerationTask
from fusion_bench.taskpool.language.harness.pool import LMEvalHarnessTaskPool
from fusion_bench.taskpool.language.perplexity import PerplexityTask
from fusion_bench.taskpool.language.similarity import SimilarityTask
from fusion_bench.taskpool.language.text_labels import TextLabelTask
from fusion_bench.taskpool.pool import TaskPool
from fusion_bench.taskpool.task import LearningData, Task, TaskDescription

__all__ = [
    "CLIPVisionModelTaskPool",
    "DepthTask",
    "GenerationTask",
    "ImageClassificationTaskPool",
    "LMEvalHarnessTaskPool",
    "LearningData",
    "MultipleChoiceTask",
    "NormalsTask",
    "PatchHead",
    "PerplexityTask",
    "SegmentationTask",
    "SequenceClassificationTask",
    "SimilarityTask",
    "Task",
    "TaskDescription",
    "TaskPool",
    "TextLabelTask",
    "TuningImages",
]
