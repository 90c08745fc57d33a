"""The programs: what a run does, step by step."""

from fusion_bench.programs.compare import CompareProgram
from fusion_bench.programs.evolution import EvolutionSearch
from fusion_bench.programs.fabric_model_fusion import FabricModelFusionProgram
from fusion_bench.programs.race import RaceSearch
from fusion_bench.programs.repeat import RepeatProgram
from fusion_bench.programs.reproduce import ReproduceProgram
from fusion_bench.programs.scaling_study import ScalingStudy
from fusion_bench.programs.search import GridSearch
from fusion_bench.programs.search_winner import SearchWinner, SweptSearch

__all__ = [
    "CompareProgram",
    "EvolutionSearch",
    "FabricModelFusionProgram",
    "GridSearch",
    "RaceSearch",
    "RepeatProgram",
    "ReproduceProgram",
    "ScalingStudy",
    "SearchWinner",
    "SweptSearch",
]
