"""The harness as it is used here: quiet, and with templates that reach nothing."""

import logging
import os
import random
import sys
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
from fusion_bench.trust import TRUST_REMOTE_CODE, trusts_remote_code

#: It sets them for the whole process when it is imported.
_VARIABLES = ("HF_XET_HIGH_PERFORMANCE", "HF_HUB_ENABLE_HF_TRANSFER")
#: The package that runs scripts of metrics.
_SCRIPTS = "evaluate"
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
    """Let the harness render templates in a sandbox, run no scripts, draw the same, and be quiet.

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
        with torch.random.fork_rng(devices=[]), _no_scripts():
            torch.manual_seed(_OTHER_SEED)
            yield
    finally:
        utils.env, task.tqdm = before[:2]
        logger.setLevel(before[2])
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])


def failure(what: str, error: Exception) -> FusionBenchError:
    """Return what to raise where the harness, or code or a template of a task, has failed."""
    if isinstance(error, ModuleNotFoundError) and error.name == _SCRIPTS:
        return _refused_script()
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return FusionBenchError(f"{what}: {said.rstrip('.')}.")


@contextmanager
def _no_scripts() -> Iterator[None]:
    """Let no metric be run from a folder or the Hub, as the package ``evaluate`` does."""
    if trusts_remote_code():
        yield
        return
    if (known := sys.modules.get(_SCRIPTS)) is None:
        sys.modules[_SCRIPTS] = None  # type: ignore[assignment]  # so it cannot be imported
        try:
            yield
        finally:
            del sys.modules[_SCRIPTS]
        return
    loading: Any = known.loading
    before, loading.evaluation_module_factory = loading.evaluation_module_factory, _refuse_script
    try:
        yield
    finally:
        loading.evaluation_module_factory = before


def _refuse_script(*arguments: Any, **options: Any) -> None:
    raise _refused_script()


def _refused_script() -> FusionBenchError:
    return FusionBenchError(
        "a metric of the task would be run from a folder or the Hub.",
        "If you trust it, allow it outside the config: --trust-remote-code, or "
        f"{TRUST_REMOTE_CODE}=1 in the environment.",
    )


def _sandbox(environment: Any) -> ImmutableSandboxedEnvironment:
    found = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    found.filters.update(environment.filters)
    return found


def _no_bar(items: Iterable[Any], **options: Any) -> Iterable[Any]:
    return items
