"""Fusion methods, one a file."""

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.dare import DareSimpleAverage, DareTaskArithmetic, DareTiesMerging
from fusion_bench.method.expo import ExPOAlgorithm
from fusion_bench.method.karcher import KarcherMeanAlgorithm
from fusion_bench.method.linear_interpolation import LinearInterpolationAlgorithm
from fusion_bench.method.magmax import MagMaxAlgorithm
from fusion_bench.method.model_stock import ModelStock
from fusion_bench.method.multi_slerp import MultiSlerpAlgorithm
from fusion_bench.method.sce import SCEAlgorithm
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.slerp import SlerpMergeAlgorithm
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.weighted_average import WeightedAverageAlgorithm

__all__ = [
    "DareSimpleAverage",
    "DareTaskArithmetic",
    "DareTiesMerging",
    "ExPOAlgorithm",
    "KarcherMeanAlgorithm",
    "LinearInterpolationAlgorithm",
    "MagMaxAlgorithm",
    "ModelStock",
    "MultiSlerpAlgorithm",
    "SCEAlgorithm",
    "SimpleAverageAlgorithm",
    "SlerpMergeAlgorithm",
    "TaskArithmeticAlgorithm",
    "TensorwiseAlgorithm",
    "TiesMergingAlgorithm",
    "WeightedAverageAlgorithm",
]
