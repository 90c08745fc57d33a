"""Hydra's insides are replaced where they are known, and another Hydra is refused."""

import hydra
import pytest
from hydra._internal import hydra as hydra_internal

from fusion_bench.problems import EnvironmentProblem
from fusion_bench.scripts import hydra_patches
from fusion_bench.scripts.checked import CheckedConfigLoader


def test_another_hydra_is_refused_before_anything_is_composed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hydra, "__version__", "1.4.0")
    with pytest.raises(EnvironmentProblem, match=r"Hydra 1\.4\.0 .* 'hydra-core==1\.3\.\*'"):
        hydra_patches.set_up_hydra()


def test_the_known_one_composes_with_our_checks() -> None:
    hydra_patches.set_up_hydra()
    assert hydra_internal.ConfigLoaderImpl is CheckedConfigLoader
