"""The tool that runs the notebook of the documentation, which lies outside of any package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_TOOL = Path(__file__).parents[1] / "tools" / "write_notebook.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_notebook", _TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_tool = _load()
NOTEBOOK, PAGE, executed, page = _tool.NOTEBOOK, _tool.PAGE, _tool.executed, _tool.page
