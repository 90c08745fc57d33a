"""Fusion methods, one a file."""

from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm

__all__ = ["SimpleAverageAlgorithm", "TaskArithmeticAlgorithm", "TensorwiseAlgorithm"]
