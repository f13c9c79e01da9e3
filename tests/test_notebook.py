"""The notebook runs from top to bottom, is kept without outputs, and what it computes is right."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
PATH = Path(__file__).parent.parent / "notebooks" / "two_parameters.ipynb"

# run behind the last cell: the refined posterior must be the one on the grid
CHECK = """
shift = np.abs(refined.mean(axis=0) - exact_mean) / exact_sd
ratio = refined.std(axis=0) / exact_sd
assert result.pareto_k < 0.7 and (shift < 0.1).all() and (np.abs(ratio - 1) < 0.1).all(), (result.summary(), shift, ratio)
print("checked")
"""


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


# the kernel's own sockets and event loop, in a process of its own
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_it_runs(tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(PATH, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(PATH.parent.parent)}})
    client.execute()
    assert notebook.cells[-1].outputs[0]["text"] == "checked\n"
