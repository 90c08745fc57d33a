"""Fuse fine-tuned neural networks into one, and learn what that gained and lost."""

from importlib.metadata import version

__version__ = version("fusion_bench")
