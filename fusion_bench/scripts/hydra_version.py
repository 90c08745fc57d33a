"""The versions of Hydra whose insides are known."""

import hydra

from fusion_bench.problems import EnvironmentProblem

KNOWN = "1.3"


def check_hydra() -> None:
    """Refuse another Hydra; called before any of its insides are imported.

    Raises:
        EnvironmentProblem: the checks of untrusted configs could be skipped silently.
    """
    if not hydra.__version__.startswith(f"{KNOWN}."):
        raise EnvironmentProblem(
            f"Hydra {hydra.__version__} is not supported: the checks of untrusted configs depend "
            "on its internals.",
            f"Install the tested version: pip install 'hydra-core=={KNOWN}.*'.",
        )
