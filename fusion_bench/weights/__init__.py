"""Parameters as data: read, merged and written without knowing what model they belong to."""

from fusion_bench.weights.adapter import AdapterWeights
from fusion_bench.weights.adapter_config import AdapterConfig
from fusion_bench.weights.align import Aligned, MergePolicy, align, first_of, shortened
from fusion_bench.weights.averaged import Averaged, Share, Sums
from fusion_bench.weights.by_token import ByToken, Row, token_axis
from fusion_bench.weights.checkpoint import open_checkpoint
from fusion_bench.weights.computed import learned
from fusion_bench.weights.config import Config
from fusion_bench.weights.dequantise import dequantised, told_by_values, undecodable
from fusion_bench.weights.digest import sha256
from fusion_bench.weights.formats import quantised
from fusion_bench.weights.gguf import GgufWeights
from fusion_bench.weights.hub import HubWeights, open_repository, weight_files
from fusion_bench.weights.inputs import Cut, Inputs, matches
from fusion_bench.weights.layers import LayerPlace, Layers
from fusion_bench.weights.mapping import (
    Cost,
    Origin,
    TensorSpec,
    TensorWeights,
    Weights,
    is_special,
    zeros_like,
)
from fusion_bench.weights.merge import (
    MergedWeights,
    MergePiece,
    MergeTensor,
    changed,
    merge,
    same_for_all,
)
from fusion_bench.weights.model import Model
from fusion_bench.weights.regrouped import Arrangement, Regrouped, Run, rearranged
from fusion_bench.weights.stream import in_memory, into_module, predicted_peak, stream
from fusion_bench.weights.views import Renamed, Rounded, Stacked, without_prefix
from fusion_bench.weights.write import (
    Checkpoint,
    check_size,
    write_checkpoint,
    write_checkpoints,
)

__all__ = [
    "AdapterConfig",
    "AdapterWeights",
    "Aligned",
    "Arrangement",
    "Averaged",
    "ByToken",
    "Checkpoint",
    "Config",
    "Cost",
    "Cut",
    "GgufWeights",
    "HubWeights",
    "Inputs",
    "LayerPlace",
    "Layers",
    "MergePiece",
    "MergePolicy",
    "MergeTensor",
    "MergedWeights",
    "Model",
    "Origin",
    "Regrouped",
    "Renamed",
    "Rounded",
    "Row",
    "Run",
    "Share",
    "Stacked",
    "Sums",
    "TensorSpec",
    "TensorWeights",
    "Weights",
    "align",
    "changed",
    "check_size",
    "dequantised",
    "first_of",
    "in_memory",
    "into_module",
    "is_special",
    "learned",
    "matches",
    "merge",
    "open_checkpoint",
    "open_repository",
    "predicted_peak",
    "quantised",
    "rearranged",
    "same_for_all",
    "sha256",
    "shortened",
    "stream",
    "token_axis",
    "told_by_values",
    "undecodable",
    "weight_files",
    "without_prefix",
    "write_checkpoint",
    "write_checkpoints",
    "zeros_like",
]
