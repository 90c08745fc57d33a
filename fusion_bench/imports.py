"""What is done to a library when somebody imports it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Do something to a library: now if it is imported, else once it is.

    Args:
        name: of the package.
        action: may import the package and its parts. While one is due for the package, no other
            is taken.
    """
    if name in sys.modules:
        action()
    elif not any(isinstance(own, _Finder) and own.name == name for own in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Finds the package once, to act when it has been imported."""

    def __init__(self, name: str, action: Callable[[], None]):
        self.name = name
        self._action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the package's spec with our loader."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Acting(spec.loader, self._action)
        return spec


class _Acting(Loader):
    """A package's own loader, and what is done afterwards."""

    def __init__(self, own: Loader, action: Callable[[], None]):
        self._own = own
        self._action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return the package's module, as its own loader makes it."""
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Import the package, then act; it knows of its own loader alone."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        module.__loader__ = self._own
        self._own.exec_module(module)
        self._action()
