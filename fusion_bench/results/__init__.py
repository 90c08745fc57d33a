"""Metrics, scores of samples, statistics, and the store of results: numbers alone."""

from fusion_bench.results.examples import ANSWERS, Example, array_texts, text_array
from fusion_bench.results.metrics import ACCURACY, LOSS, METRICS, Metric, normalized
from fusion_bench.results.requests import RequestStore
from fusion_bench.results.scores import SampleScores, with_ones
from fusion_bench.results.statistics import Interval, stderr
from fusion_bench.results.store import ResultStore

__all__ = [
    "ACCURACY",
    "ANSWERS",
    "LOSS",
    "METRICS",
    "Example",
    "Interval",
    "Metric",
    "RequestStore",
    "ResultStore",
    "SampleScores",
    "array_texts",
    "normalized",
    "stderr",
    "text_array",
    "with_ones",
]
