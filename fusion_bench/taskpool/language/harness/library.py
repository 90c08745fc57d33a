"""The harness as it is used here: quiet, and with templates that reach nothing."""

import logging
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fusion_bench.problems import FusionBenchError

#: It sets them for the whole process when it is imported.
_VARIABLES = ("HF_XET_HIGH_PERFORMANCE", "HF_HUB_ENABLE_HF_TRANSFER")
#: Its own seeds: of Python, of NumPy and torch, and of what draws the shots.
_PYTHON_SEED = 0
_OTHER_SEED = 1234
SHOTS_SEED = 1234


def require() -> None:
    """Import the harness's package, which reads little, and leave the environment as it is.

    Raises:
        FusionBenchError: it is not installed.
    """
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise FusionBenchError(
            "LMEvalHarnessTaskPool needs the package lm-eval, which is not installed.",
            "Install it: pip install 'fusion_bench[lm-eval]'.",
        ) from error
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)


@cache
def version() -> str:
    """Return the harness's version."""
    return metadata.version("lm_eval")


def tasks_folder() -> Path:
    """Return where the tasks lie that come with the harness."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "tasks"


@contextmanager
def as_ours(verbosity: int = logging.ERROR) -> Iterator[None]:
    """Let the harness render templates in a sandbox, draw the same each time, and be quiet.

    All that is changed for the context is as before after it.

    Args:
        verbosity: from which level on its messages are shown.
    """
    from lm_eval import utils
    from lm_eval.api import task

    logger = logging.getLogger("lm_eval")
    before = utils.env, task.tqdm, logger.level
    drawn = random.getstate(), np.random.get_state()
    utils.env, task.tqdm = _sandbox(utils.env), _no_bar
    logger.setLevel(verbosity)
    random.seed(_PYTHON_SEED)
    np.random.seed(_OTHER_SEED)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_OTHER_SEED)
            yield
    finally:
        utils.env, task.tqdm = before[:2]
        logger.setLevel(before[2])
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])


def _sandbox(environment: Any) -> ImmutableSandboxedEnvironment:
    found = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    found.filters.update(environment.filters)
    return found


def _no_bar(items: Iterable[Any], **options: Any) -> Iterable[Any]:
    return items
