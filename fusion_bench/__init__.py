"""Merge fine-tuned neural networks into one model and show what the merge gained and lost."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion_bench.api import evaluate, load_report, merge, run

    __version__: str

__all__ = ["__version__", "evaluate", "load_report", "merge", "run"]


def __getattr__(name: str) -> object:
    """Return what is imported when it is first asked for: the functions need torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("fusion_bench")
    if name in __all__:
        from fusion_bench import api

        return getattr(api, name)
    raise AttributeError(f"module 'fusion_bench' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
