"""Recipes of mergekit: read as data, and translated to configs and back."""

from fusion_bench.recipes.names import named_after
from fusion_bench.recipes.reading import read_text
from fusion_bench.recipes.translate import Translated, first_model, translate

__all__ = ["Translated", "first_model", "named_after", "read_text", "translate"]
