"""The config files of a sweep, which are read and composed once for all of its jobs."""

from copy import copy, deepcopy

from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.config_source import ConfigResult


class SharedRepository(ConfigRepository):
    """The config repository; Hydra copies it for each listed group, some 300 times.

    All copies share what was read. So each job of a sweep has what the first one had, also where a
    file is edited meanwhile.
    """

    def __init__(self, config_search_path: ConfigSearchPath):
        self._read: dict[tuple[str, ...], ConfigResult] = {}
        super().__init__(config_search_path)

    def __deepcopy__(self, memo: dict[int, object]) -> "SharedRepository":
        twin = copy(self)  # only the list of places is ever changed, not what is in them
        twin.sources = list(self.sources)
        return twin

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Return a config of its own, for it is changed when it becomes a part of another."""
        key = (*(source.path for source in self.sources), config_path)
        if key not in self._read:
            found = super().load_config(config_path)
            if found is None:
                return None
            self._read[key] = found
        return deepcopy(self._read[key])
