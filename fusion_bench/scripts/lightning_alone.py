"""Imports of lightning without what only its trainer, or compiled models, need."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from types import ModuleType

_NAME = "lightning"
_COMPILER = "torch._dynamo"


def import_fabric_alone() -> None:
    """Let ``lightning.fabric`` be imported without ``lightning.pytorch`` and what compiles models.

    The package's own ``__init__`` imports the trainer, and with it torchmetrics, scipy's signals
    and matplotlib: two seconds of a processor that few commands need. Here it runs when somebody
    asks the package for more than Fabric. And Fabric imports torchmetrics to read its version,
    which its metadata tell as well; and torch's compiler, which takes another second, to know
    compiled modules when it sees them.

    It is for a process that is ours alone. A package that is imported already stays as it is.
    """
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the package once, for its own loader to be put off."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the package's spec with our loader."""
        if name != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)
        return spec


class _Later(Loader):
    """Imports Fabric at first, and runs the package's ``__init__`` when that is not enough."""

    def __init__(self, own: Loader):
        self.own = own

    def exec_module(self, module: ModuleType) -> None:
        """Make the module the package with nothing but Fabric."""
        module.__class__ = _Package
        torchmetrics, compiler = ModuleType("torchmetrics"), ModuleType(_COMPILER)
        torchmetrics.__version__ = version("torchmetrics")  # type: ignore[attr-defined]
        compiler.OptimizedModule = _Compiled  # type: ignore[attr-defined]
        with _in_place_of(torchmetrics), _in_place_of(compiler):
            from lightning.fabric import Fabric
        module.Fabric = Fabric  # type: ignore[attr-defined]


@contextmanager
def _in_place_of(stand_in: ModuleType) -> Iterator[None]:
    """Let an import find this instead of the module of its name, unless that is imported."""
    name = stand_in.__name__
    if name in sys.modules:
        yield
        return
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]


class _LikeCompiled(type):
    """Knows the modules that torch's compiler has made; before it is imported there are none."""

    def __instancecheck__(cls, instance: object) -> bool:
        compiler = sys.modules.get(_COMPILER)
        return compiler is not None and isinstance(instance, compiler.OptimizedModule)


class _Compiled(metaclass=_LikeCompiled):
    """Stands for torch's ``OptimizedModule`` where it is looked for."""


class _Package(ModuleType):
    """The package before its ``__init__`` has run."""

    def __getattr__(self, name: str) -> object:
        begun = f"{_NAME}.{name}" in sys.modules  # import looks there if we have nothing
        loader = self.__spec__ and self.__spec__.loader
        if begun or name.startswith("__") or not isinstance(loader, _Later):
            raise AttributeError(f"module '{_NAME}' has no attribute '{name}'")
        self.__class__ = ModuleType  # type: ignore[assignment]  # ask once
        loader.own.exec_module(self)
        return getattr(self, name)
