"""The result's schema, and its tables."""

from fusion_bench.report.schema import (
    ModelResult,
    Report,
    Run,
    Seconds,
    TaskInfo,
    TaskResult,
    Tuning,
    TuningTask,
    summarise,
)
from fusion_bench.report.table import comparison, markdown, print_comparison

__all__ = [
    "ModelResult",
    "Report",
    "Run",
    "Seconds",
    "TaskInfo",
    "TaskResult",
    "Tuning",
    "TuningTask",
    "comparison",
    "markdown",
    "print_comparison",
    "summarise",
]
