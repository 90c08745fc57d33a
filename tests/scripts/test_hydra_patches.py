"""Hydra's insides are replaced where they are known, and another Hydra is refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal import hydra as hydra_internal

from fusion_bench.scripts import hydra_patches
from fusion_bench.scripts.checked import CheckedConfigLoader


@pytest.mark.cold
def test_another_hydra_is_refused_before_its_insides_are_imported(tmp_path: Path) -> None:
    code = """
import sys
import hydra

hydra.__version__ = "1.4.0"
before = {*sys.modules}
from fusion_bench.scripts import cli

try:
    cli.main()
finally:
    ours = {"arguments", "bounds", "checked", "hydra_patches"}
    print({name for name in ours if f"fusion_bench.scripts.{name}" in sys.modules}, flush=True)
    insides = ("hydra._internal", "hydra_plugins")
    print({name for name in {*sys.modules} - before if name.startswith(insides)})
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout == "set()\nset()\n"
    assert re.fullmatch(
        r"fusion_bench: Hydra 1\.4\.0 is not supported.* 'hydra-core==1\.3\.\*'\.\n", done.stderr
    )


def test_the_known_one_composes_with_our_checks() -> None:
    hydra_patches.set_up_hydra()
    assert hydra_internal.ConfigLoaderImpl is CheckedConfigLoader
