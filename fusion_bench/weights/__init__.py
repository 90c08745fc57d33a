"""Parameters as data: read, merged and written without knowing what model they belong to."""

from fusion_bench.weights.digest import sha256
from fusion_bench.weights.mapping import ModuleWeights, TensorSpec, Weights, is_special
from fusion_bench.weights.merge import check_alike, merge

__all__ = ["ModuleWeights", "TensorSpec", "Weights", "check_alike", "is_special", "merge", "sha256"]
