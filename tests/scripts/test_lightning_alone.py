"""Fabric comes without the trainer and the compiler, which come when they are asked for."""

import subprocess
import sys

import pytest

FABRIC = """
import sys
from fusion_bench.scripts.lightning_alone import import_fabric_alone
import_fabric_alone()
import lightning.fabric
assert not {"torchmetrics", "lightning.pytorch", "torch._dynamo"} & set(sys.modules)
import lightning
from lightning.fabric.utilities import imports
assert lightning.Fabric is lightning.fabric.Fabric
assert imports._TORCHMETRICS_GREATER_EQUAL_1_0_0
assert not hasattr(lightning, "__nothing__")
"""
COMPILED = """
import torch
from lightning.fabric.wrappers import _FabricModule, _unwrap_objects
fabric = lightning.Fabric(accelerator="cpu")
plain = torch.nn.Linear(2, 2)
assert _unwrap_objects([plain]) == [plain]
assert "torch._dynamo" not in sys.modules
compiled = torch.compile(plain)
assert type(compiled) is not torch.nn.Linear
assert type(fabric.setup_module(compiled)._forward_module._orig_mod) is torch.nn.Linear
assert _unwrap_objects([fabric.setup_module(compiled)]) == [plain]
"""
TRAINER = """
assert lightning.__version__
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
import torchmetrics
assert torchmetrics.Metric and lightning.Fabric is lightning.fabric.Fabric
"""


@pytest.mark.cold  # in a process that has imported nothing yet
def test_fabric_is_imported_without_the_trainer_and_the_compiler() -> None:
    subprocess.run([sys.executable, "-c", FABRIC + COMPILED + TRAINER], check=True, timeout=120)
