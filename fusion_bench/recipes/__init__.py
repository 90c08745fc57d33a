"""Recipes of mergekit: read as data, and translated to configs and back."""

from fusion_bench.recipes.methods import decided_options
from fusion_bench.recipes.names import named_after
from fusion_bench.recipes.places import told_in_recipe
from fusion_bench.recipes.text import is_recipe, read_text
from fusion_bench.recipes.translate import models_of, translate
from fusion_bench.recipes.translation import Translated

__all__ = [
    "Translated",
    "decided_options",
    "is_recipe",
    "models_of",
    "named_after",
    "read_text",
    "told_in_recipe",
    "translate",
]
