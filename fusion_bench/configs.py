"""The config files, and whole configs composed from them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion_bench.errors import FusionBenchError

_PACKAGE = Path(__file__).resolve().parent
#: Inside the package when installed from a wheel, beside it in a checkout.
CONFIG_DIR = next(d for d in (_PACKAGE / "config", _PACKAGE.parent / "config") if d.is_dir())


def composed(*overrides: str) -> dict[str, Any]:
    """Return the default run's config with ``overrides``, as the command line would have it.

    Within a run of the command line, its config directories are searched too.

    Raises:
        FusionBenchError: a config or a key that is not there.
    """
    inside = GlobalHydra.instance().is_initialized()
    try:
        with (
            nullcontext() if inside else initialize_config_dir(str(CONFIG_DIR), version_base="1.3")
        ):
            config = compose("fabric_model_fusion", list(overrides))
        found: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise FusionBenchError(str(error).splitlines()[0]) from error
    return dict(found)
