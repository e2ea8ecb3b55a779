"""The notebook in examples/ runs as it stands, in a kernel of its own."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


# The kernel's own: it warns that its loopback sockets are not encrypted, and closes some late.
@pytest.mark.filterwarnings("ignore")
def test_the_quickstart_runs_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]), prepend=":")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # It is committed as it was executed: each cell but the first, which imports, has an output.
    assert [bool(cell.outputs) for cell in cells] == [number > 0 for number in range(len(cells))]
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
