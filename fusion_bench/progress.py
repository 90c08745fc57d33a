"""Progress bars that are silent without a terminal."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(
    items: Iterable[T], description: str, *, total: int | None = None, unit: str = "it"
) -> "tqdm[T]":
    """Iterate over ``items`` with a bar on stderr; silent without a terminal."""
    return tqdm(
        items, desc=description, total=total, unit=unit, disable=None, leave=False, delay=0.3
    )


@contextmanager
def byte_bar(description: str, total: int, *, show: bool) -> Iterator[Callable[[float], object]]:
    """Show bytes done and bytes a second on stderr; yields what to call with each new number."""
    disable = None if show else True
    with tqdm(
        desc=description, total=total, unit="B", unit_scale=True, disable=disable, leave=False
    ) as shown:
        yield shown.update


def watched() -> bool:
    """Return whether to show progress: in a terminal, in the first process."""
    return sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"


def quiet_libraries() -> None:
    """Silence the libraries' bars without a terminal, and their advice always."""
    import datasets
    import huggingface_hub.utils
    import transformers

    if not watched():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    for name in ("httpx2", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
