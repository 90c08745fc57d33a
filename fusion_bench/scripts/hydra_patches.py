"""Patches of Hydra; import it after ``check_hydra``.

Hydra has no hooks to check a config before it is used and to report errors in one line. So
internals are replaced, of the versions that are known.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import yaml
from hydra._internal import defaults_list as defaults_internal
from hydra._internal import hydra as hydra_internal
from hydra._internal.sources_registry import SourcesRegistry
from hydra.conf import HydraConf, JobConf
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import InputDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig
from omegaconf import _utils as omegaconf_internal

from fusion_bench.configs import CONFIG_DIR, register
from fusion_bench.scripts.arguments import arguments_parser
from fusion_bench.scripts.bounds import FileConfigSource
from fusion_bench.scripts.checked import CheckedConfigLoader, launchers
from fusion_bench.trust import config_folders

_omegaconf_loader = omegaconf_internal.get_yaml_loader
_interpolation_map = defaults_internal._create_interpolation_map


class PackagedConfigs(SearchPathPlugin):
    """Makes our config groups, and those beside the user's own code, available to all configs."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append our config directory if it is not the primary one, and the user's after it."""
        there = {str(entry.path).removeprefix("file://") for entry in search_path.get_path()}
        if str(CONFIG_DIR) not in there:
            search_path.append("fusion_bench", f"file://{CONFIG_DIR}")
        for folder in config_folders():
            search_path.append("user", f"file://{folder}")


def set_up_hydra() -> None:
    """Set up Hydra with our config groups, sweeps, launchers and checks."""
    hydra_internal.ConfigLoaderImpl = CheckedConfigLoader  # type: ignore[misc]
    hydra_internal.Hydra.get_mode = _mode  # type: ignore[assignment, method-assign]
    defaults_internal._create_interpolation_map = _choices
    omegaconf_internal.get_yaml_loader = _yaml_loader
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
    # A run's log is named after the job.
    conf = HydraConf(defaults, job=JobConf(name="cli"))
    store("config", conf, "hydra", provider="fusion_bench")
    # A YAML under hydra/launcher would only be merged into the plugin's settings of the same name.
    for name, launcher in launchers().items():
        store(name, launcher, "hydra/launcher", provider="fusion_bench")


@contextmanager
def checked_composition() -> Iterator[None]:
    """Let Hydra compose configs as on the command line; afterwards it is as it was before.

    For Python, where a process may use Hydra for something else.
    """
    known = PackagedConfigs in Plugins.instance().discover(SearchPathPlugin)
    types = SourcesRegistry.instance().types  # which the plugins fill
    before = hydra_internal.ConfigLoaderImpl, omegaconf_internal.get_yaml_loader, types["file"]
    theirs = GlobalHydra.instance().hydra
    try:
        GlobalHydra.instance().clear()
        hydra_internal.ConfigLoaderImpl = CheckedConfigLoader  # type: ignore[misc]
        omegaconf_internal.get_yaml_loader = _yaml_loader
        types["file"] = FileConfigSource
        if not known:
            Plugins.instance().register(PackagedConfigs)
        register()
        yield
    finally:
        loader, omegaconf_internal.get_yaml_loader, types["file"] = before
        hydra_internal.ConfigLoaderImpl = loader  # type: ignore[misc]
        GlobalHydra.instance().clear()
        if theirs is not None:
            GlobalHydra.instance().initialize(theirs)


def _mode(hydra: hydra_internal.Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Return the mode of a run; ``None`` where none is set, or the config is found wrong later."""
    try:
        return cast(CheckedConfigLoader, hydra.config_loader).mode(config_name, overrides)
    except Exception:  # as in Hydra; the run composes it again, and tells
        return None


def _choices(
    overrides: defaults_internal.Overrides, defaults_list: list[InputDefault], self_added: bool
) -> DictConfig:
    """Return what the entries of a defaults list may refer to, where one of them refers to any.

    Hydra makes it for each file, which is a tenth of composing.
    """
    if any(each.is_interpolation() for each in defaults_list):
        return _interpolation_map(overrides, defaults_list, self_added)
    return DictConfig({})


@cache
def _yaml_loader() -> Any:
    """Return OmegaConf's loader of YAML files, with the parser in C, which is ten times as fast."""
    loader = _omegaconf_loader()
    if not yaml.__with_libyaml__:
        return loader

    class Loader(yaml.CSafeLoader, loader):  # type: ignore[misc, valid-type]
        def __init__(self, stream: Any) -> None:
            self._stream = stream
            super().__init__(stream)

        def get_single_data(self) -> Any:
            try:
                return super().get_single_data()
            except yaml.YAMLError:  # of which the parser in Python says more
                self._stream.seek(0)
                return loader(self._stream).get_single_data()

    return Loader
