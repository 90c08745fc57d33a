"""The result's schema, and its tables."""

from fusion_bench.report.comparing import compare_contenders
from fusion_bench.report.schema import (
    Average,
    Candidate,
    Comparison,
    Contender,
    MetricInfo,
    ModelResult,
    RaceInfo,
    Report,
    Run,
    Search,
    Seconds,
    Similarity,
    TaskInfo,
    TaskResult,
    Tuning,
    TuningTask,
    Value,
    summarise,
)
from fusion_bench.report.scores import Scores, metric_info
from fusion_bench.report.table import comparison, markdown, print_comparison

__all__ = [
    "Average",
    "Candidate",
    "Comparison",
    "Contender",
    "MetricInfo",
    "ModelResult",
    "RaceInfo",
    "Report",
    "Run",
    "Scores",
    "Search",
    "Seconds",
    "Similarity",
    "TaskInfo",
    "TaskResult",
    "Tuning",
    "TuningTask",
    "Value",
    "compare_contenders",
    "comparison",
    "markdown",
    "metric_info",
    "print_comparison",
    "summarise",
]
