"""The result's schema, and its tables."""

from fusion_bench.report.answers import Answers, TaskAnswers
from fusion_bench.report.schema import (
    Average,
    Candidate,
    Comparison,
    Contender,
    ModelResult,
    Report,
    Run,
    Search,
    Seconds,
    Similarity,
    TaskInfo,
    TaskResult,
    Tuning,
    TuningTask,
    summarise,
)
from fusion_bench.report.statistics import compare_contenders
from fusion_bench.report.table import comparison, markdown, print_comparison

__all__ = [
    "Answers",
    "Average",
    "Candidate",
    "Comparison",
    "Contender",
    "ModelResult",
    "Report",
    "Run",
    "Search",
    "Seconds",
    "Similarity",
    "TaskAnswers",
    "TaskInfo",
    "TaskResult",
    "Tuning",
    "TuningTask",
    "compare_contenders",
    "comparison",
    "markdown",
    "print_comparison",
    "summarise",
]
