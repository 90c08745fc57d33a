"""Fabric comes without the trainer, which comes when it is asked for."""

import subprocess
import sys

import pytest

FABRIC = """
import sys
from fusion_bench.scripts.lightning_alone import import_fabric_alone
import_fabric_alone()
import lightning.fabric
assert not {"torchmetrics", "lightning.pytorch"} & set(sys.modules)
import lightning
from lightning.fabric.utilities import imports
assert lightning.Fabric is lightning.fabric.Fabric
assert imports._TORCHMETRICS_GREATER_EQUAL_1_0_0
assert not hasattr(lightning, "__nothing__")
"""
TRAINER = """
assert lightning.__version__
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
import torchmetrics
assert torchmetrics.Metric and lightning.Fabric is lightning.fabric.Fabric
"""


@pytest.mark.cold  # in a process that has imported nothing yet
def test_fabric_is_imported_without_the_trainer() -> None:
    subprocess.run([sys.executable, "-c", FABRIC + TRAINER], check=True, timeout=120)
