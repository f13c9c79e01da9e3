"""The notebooks run from top to bottom, are kept without outputs, and what they compute is right."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
FOLDER = Path(__file__).parent.parent / "notebooks"

# run behind the last cell of each
CHECKS = {
    # the refined posterior must be the one on the grid
    "two_parameters": """
shift = np.abs(refined.mean(axis=0) - exact_mean) / exact_sd
ratio = refined.std(axis=0) / exact_sd
assert result.pareto_k < 0.7 and (shift < 0.1).all() and (np.abs(ratio - 1) < 0.1).all(), (result.summary(), shift, ratio)
""",
    # corrections are the published ones, the rule passes every test and four iterations do not, the posterior holds the true index
    "unfold_a_spectrum": """
assert np.abs(fit.correction / auger.published["correction"] - 1).max() < 0.006
assert validation.methods["by the rule"].passed and "closure" in validation.methods["4 iterations"].failed
assert abs(index(wide).mean() - index(truth)) < 4 * index(wide).std()
""",
    # the learned posterior is the exact one within half an sd; sets cover within 4 errors of their toys and of the check
    "likelihoods_and_limits": """
assert (np.abs(draws.theta.mean(axis=0) - exact_mean) < 0.5 * exact_sd).all()
assert np.abs(np.array(check["this construction"]) - 0.9).max() < 4 * np.hypot(0.0067, 0.0067)
assert min(check["Wilks"]) < 0.87
""",
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) if name == "likelihoods_and_limits" else name for name in CHECKS]


def test_each_has_a_check():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_it_is_kept_without_outputs(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


# the kernel's own sockets and event loop, in a process of its own
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SLOW)
def test_it_runs(name):
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[name] + 'print("checked")'))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER.parent)}})
    client.execute()
    assert notebook.cells[-1].outputs[0]["text"] == "checked\n"
