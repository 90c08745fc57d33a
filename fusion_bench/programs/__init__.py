"""What one run does, step by step."""

from fusion_bench.programs.compare import CompareProgram
from fusion_bench.programs.fabric_model_fusion import FabricModelFusionProgram

__all__ = ["CompareProgram", "FabricModelFusionProgram"]
