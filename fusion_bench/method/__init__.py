"""Fusion methods, one per file."""

from fusion_bench.method.adamerging import AdaMergingAlgorithm
from fusion_bench.method.adapter_merging import AdapterMerging
from fusion_bench.method.arcee_fusion import ArceeFusionAlgorithm
from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.breadcrumbs import ModelBreadcrumbs
from fusion_bench.method.dare import DareSimpleAverage, DareTaskArithmetic, DareTiesMerging
from fusion_bench.method.della import DellaMerging
from fusion_bench.method.emr_merging import EMRMerging
from fusion_bench.method.ensemble import (
    MaxModelPredictorAlgorithm,
    SimpleEnsembleAlgorithm,
    WeightedEnsembleAlgorithm,
)
from fusion_bench.method.expo import ExPOAlgorithm
from fusion_bench.method.extract_lora import ExtractLora
from fusion_bench.method.family import Family
from fusion_bench.method.fisher_merging import FisherMergingAlgorithm
from fusion_bench.method.isotropic_merging import ISO_C_Merge, ISO_CTS_Merge
from fusion_bench.method.karcher import KarcherMeanAlgorithm
from fusion_bench.method.knots import KnOTSMerging
from fusion_bench.method.linear_interpolation import LinearInterpolationAlgorithm
from fusion_bench.method.lines import LiNeSAlgorithm
from fusion_bench.method.localize_and_stitch import LocalizeAndStitch
from fusion_bench.method.magmax import MagMaxAlgorithm
from fusion_bench.method.merge_experts import MergeExperts
from fusion_bench.method.mixture_of_experts import MixtureOfExperts
from fusion_bench.method.model_soup import GreedySoupAlgorithm, LearnedSoupAlgorithm
from fusion_bench.method.model_stock import ModelStock
from fusion_bench.method.multi_slerp import MultiSlerpAlgorithm
from fusion_bench.method.nearswap import NearSwapAlgorithm
from fusion_bench.method.nuslerp import NuSlerpAlgorithm
from fusion_bench.method.opcm import OPCM, OPCMForCLIP
from fusion_bench.method.passthrough import PassthroughAlgorithm
from fusion_bench.method.pcb_merging import PCBMerging
from fusion_bench.method.ram import RAMAlgorithm, RAMPlusAlgorithm
from fusion_bench.method.regmean import RegMeanAlgorithm
from fusion_bench.method.regmean_plusplus import RegMeanAlgorithmPlusPlus
from fusion_bench.method.sce import SCEAlgorithm
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.slerp import SlerpMergeAlgorithm
from fusion_bench.method.stacked_layers import StackedLayers
from fusion_bench.method.tall_mask import ConsensusTaskArithmetic, TallMaskTaskArithmeticAlgorithm
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
from fusion_bench.method.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.weighted_average import WeightedAverageAlgorithm
from fusion_bench.method.wudi import WUDIMerging

# The names that FusionBench's configs have for them.
FisherMergingForCLIPVisionModel = FisherMergingAlgorithm
RegMeanAlgorithmForCLIP = RegMeanAlgorithm
RegMeanAlgorithmForCLIPPlusPlus = RegMeanAlgorithmPlusPlus

__all__ = [
    "OPCM",
    "AdaMergingAlgorithm",
    "AdapterMerging",
    "ArceeFusionAlgorithm",
    "ConsensusTaskArithmetic",
    "DareSimpleAverage",
    "DareTaskArithmetic",
    "DareTiesMerging",
    "DellaMerging",
    "EMRMerging",
    "ExPOAlgorithm",
    "ExtractLora",
    "Family",
    "FisherMergingAlgorithm",
    "FisherMergingForCLIPVisionModel",
    "GreedySoupAlgorithm",
    "ISO_CTS_Merge",
    "ISO_C_Merge",
    "KarcherMeanAlgorithm",
    "KnOTSMerging",
    "LearnedSoupAlgorithm",
    "LiNeSAlgorithm",
    "LinearInterpolationAlgorithm",
    "LocalizeAndStitch",
    "MagMaxAlgorithm",
    "MaxModelPredictorAlgorithm",
    "MergeExperts",
    "MixtureOfExperts",
    "ModelBreadcrumbs",
    "ModelStock",
    "MultiSlerpAlgorithm",
    "NearSwapAlgorithm",
    "NuSlerpAlgorithm",
    "OPCMForCLIP",
    "PCBMerging",
    "PassthroughAlgorithm",
    "RAMAlgorithm",
    "RAMPlusAlgorithm",
    "RegMeanAlgorithm",
    "RegMeanAlgorithmForCLIP",
    "RegMeanAlgorithmForCLIPPlusPlus",
    "RegMeanAlgorithmPlusPlus",
    "SCEAlgorithm",
    "SimpleAverageAlgorithm",
    "SimpleEnsembleAlgorithm",
    "SlerpMergeAlgorithm",
    "StackedLayers",
    "TallMaskTaskArithmeticAlgorithm",
    "TaskArithmeticAlgorithm",
    "TaskSingularVectorMerging",
    "TensorwiseAlgorithm",
    "TiesMergingAlgorithm",
    "WUDIMerging",
    "WeightedAverageAlgorithm",
    "WeightedEnsembleAlgorithm",
]
