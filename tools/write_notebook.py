"""Run the notebook of the documentation, and write its page with what it shows.

python tools/write_notebook.py          # run examples/notebook.ipynb, keep its outputs
python tools/write_notebook.py --page   # only write docs/notebook.md again
"""

import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
PAGE = ROOT / "docs" / "notebook.md"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SOURCE = "<!-- Written by tools/write_notebook.py from examples/notebook.ipynb. -->"


def executed(notebook: Any, folder: Path) -> Any:
    """Return the notebook with the outputs of a kernel that runs it in ``folder``.

    Raises:
        CellExecutionError: a cell that fails.
    """
    # Libraries ask for widgets, which the notebook does without.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    for cell in notebook.cells:  # of no use to a reader, and another in each run
        cell.metadata.pop("execution", None)
    return notebook


def page(notebook: Any) -> str:
    """Return a notebook as a page: its texts, its code, and what that shows."""
    return (
        "\n\n".join([_SOURCE, *(text for cell in notebook.cells for text in _shown(cell))]) + "\n"
    )


def _shown(cell: Any) -> list[str]:
    if cell.cell_type == "markdown":
        return [cell.source]
    # another word than python, for a cell does not run alone
    return [f"``` {{.python .cell}}\n{cell.source}\n```", *filter(None, map(_output, cell.outputs))]


def _output(output: Any) -> str:
    if output.output_type == "stream":
        return _text(output.text)
    data = output.get("data", {})
    if html := data.get("text/html"):
        lines = (line.rstrip() for line in html.splitlines())
        return "\n".join(['<div class="output">', *filter(None, lines), "</div>"])
    if png := data.get("image/png"):
        encoded = "".join(png.split())
        return f'<img alt="A plot of the figures above" src="data:image/png;base64,{encoded}">'
    return _text(data.get("text/plain", ""))


def _text(text: str) -> str:
    lines = (line.rpartition("\r")[2].rstrip() for line in _ESCAPES.sub("", text).splitlines())
    shown = "\n".join(filter(None, lines))
    return f"``` text\n{shown}\n```" if shown else ""


def main() -> None:
    """Run the notebook and write both files."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if sys.argv[1:] != ["--page"]:
        with TemporaryDirectory() as folder:
            executed(notebook, Path(folder))
        nbformat.write(notebook, NOTEBOOK)
    PAGE.write_text(page(notebook), encoding="utf-8")


if __name__ == "__main__":
    main()
