"""The result's schema, and its tables."""

from fusion_bench.report.schema import (
    ModelResult,
    Report,
    Run,
    Seconds,
    TaskInfo,
    TaskResult,
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
    "comparison",
    "markdown",
    "print_comparison",
    "summarise",
]
