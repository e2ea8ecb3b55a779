"""The notebook in examples/ runs as it stands, in a kernel of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def code_cells(notebook: Any) -> list[Any]:
    """Return a notebook's cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_quickstart_is_committed_as_it_was_executed() -> None:
    """Each cell but the first, which imports, has an output."""
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [bool(cell.outputs) for cell in cells] == [number > 0 for number in range(len(cells))]


@pytest.mark.slow
# The kernel's own: it warns that its loopback sockets are not encrypted, and closes some late.
@pytest.mark.filterwarnings("ignore")
def test_the_quickstart_runs_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]), prepend=":")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = code_cells(notebook)
    for cell in cells:
        cell.outputs = []
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    texts = [output.get("data", {}).get("text/plain", "") for output in outputs]
    (share,) = [text for text in texts if "are recognised" in text]
    # Ten classes: a network that learned nothing recognises a tenth.
    assert float(share.strip("'").partition("%")[0]) > 60
