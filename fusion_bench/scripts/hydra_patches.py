"""All patches of Hydra.

Hydra has no hooks to check a config before it is used, to report errors in one line, and to protect
other runs' folders. So internals of the versions in ``KNOWN`` are replaced. Other versions are
refused because the checks of untrusted configs could be skipped silently.
"""

import sys

import hydra
from hydra._internal import hydra as hydra_internal
from hydra._internal.sources_registry import SourcesRegistry
from hydra.conf import HydraConf
from hydra.core import utils
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from fusion_bench.configs import CONFIG_DIR, register
from fusion_bench.problems import EnvironmentProblem
from fusion_bench.scripts.arguments import arguments_parser
from fusion_bench.scripts.bounds import FileConfigSource
from fusion_bench.scripts.checked import CheckedConfigLoader
from fusion_bench.scripts.folder import configure_log

#: The versions whose insides are known.
KNOWN = "1.3"

# At once: where a job runs in another process, this module comes along.
utils.configure_log = configure_log


class PackagedConfigs(SearchPathPlugin):
    """Makes our config groups available to configs in the user's own directory."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append our config directory if it is not the primary one already."""
        there = {str(entry.path).removeprefix("file://") for entry in search_path.get_path()}
        if str(CONFIG_DIR) not in there:
            search_path.append("fusion_bench", f"file://{CONFIG_DIR}")


def set_up_hydra() -> None:
    """Set up Hydra with our config groups, sweeps, launchers and checks.

    Raises:
        EnvironmentProblem: a Hydra whose insides are not known.
    """
    _refuse_other(hydra.__version__)
    hydra_internal.ConfigLoaderImpl = CheckedConfigLoader  # type: ignore[misc]
    sys.modules["hydra.main"].get_args_parser = arguments_parser  # type: ignore[attr-defined]
    Plugins.instance().register(PackagedConfigs)
    register()
    SourcesRegistry.instance().types["file"] = FileConfigSource
    store = ConfigStore.instance().store
    ours = {"output": "by_name", "callbacks": "leaderboard", "sweeper": "grid"}
    defaults = [
        {group: ours.get(group, choice) for group, choice in entry.items()}
        for entry in HydraConf().defaults
    ]
    store("config", HydraConf(defaults), "hydra", provider="fusion_bench")
    # A YAML under hydra/launcher would only be merged into the plugin's settings of the same name.
    for file in (CONFIG_DIR / "launcher").glob("*.yaml"):
        store(file.stem, OmegaConf.load(file), "hydra/launcher", provider="fusion_bench")


def _refuse_other(version: str) -> None:
    if not version.startswith(f"{KNOWN}."):
        raise EnvironmentProblem(
            f"Hydra {version} is not supported: the checks of untrusted configs depend on its "
            "internals.",
            f"Install the tested version: pip install 'hydra-core=={KNOWN}.*'.",
        )
