import nbformat
from fixtures_notebook import NOTEBOOK, PAGE, page


def test_the_page_shows_the_notebook() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert PAGE.read_text(encoding="utf-8") == page(notebook), "run tools/write_notebook.py --page"


def test_the_outputs_were_produced() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
