"""Merge fine-tuned neural networks into one model and show what the merge gained and lost."""

from importlib.metadata import version

__version__ = version("fusion_bench")
