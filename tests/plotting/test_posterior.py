import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from sbi_phys import plotting as figures
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.plotting.style import COLOURS
from tests.report.demo_data import PARAMETERS, PUBLISHED, draws, history


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    return {"flow": draws(2000, rng), "exact MCMC": draws(2000, rng)}


def texts(legend):
    return [t.get_text() for t in legend.get_texts()]


def finite(fig):
    return all(np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all() for ax in fig.axes)


def test_loss_marks_the_best_epoch_of_every_member():
    runs = history(3, 40, np.random.default_rng(1))
    fig = figures.loss_figure(runs)
    assert len(fig.axes) == 2 and fig.axes[0].get_ylabel() == "loss per simulation [nats]" and fig.axes[1].get_xlabel() == "epoch"
    marks = [line for line in fig.axes[0].lines if line.get_marker() == "o"]
    for member, mark in zip(runs, marks, strict=True):
        best = min(member, key=lambda r: r["valid"])
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (best["epoch"], best["valid"])
    assert len(texts(fig.axes[0].get_legend())) == 5 and finite(fig)
    low, high = fig.axes[0].get_ylim()
    assert all(low < r["valid"] < high for member in runs for r in member[10:])  # the plateau is in the frame


def test_loss_without_rates_or_with_a_failed_epoch():
    run = [{"epoch": k, "train": 1.0 / (k + 1), "valid": np.nan if k == 3 else 1.1 / (k + 1)} for k in range(8)]
    fig = figures.loss_figure([run])
    assert len(fig.axes) == 1 and finite(fig)
    with pytest.raises(DataError, match="no finite loss"):
        figures.loss_figure([[{"epoch": 0, "train": np.nan, "valid": np.nan}]])


@pytest.mark.parametrize("bad", [[], [[]], [[{"epoch": 1}]], history(1, 2, np.random.default_rng(0))[0]])
def test_a_history_of_another_form_is_refused(bad):
    with pytest.raises(DataError, match="history"):
        figures.loss_figure(bad)


def test_step_time_starts_at_zero_and_shows_the_median():
    runs = history(1, 30, np.random.default_rng(2))
    fig = figures.step_time_figure(runs)
    ax = fig.axes[0]
    assert ax.get_ylim()[0] == 0 and ax.lines[1].get_ydata()[0] == pytest.approx(np.median([r["seconds"] for r in runs[0]]))
    with pytest.raises(DataError, match="no 'seconds'"):
        figures.step_time_figure([[{"epoch": 0, "train": 1.0, "valid": 1.0}]])


def test_marginals_show_each_parameter_with_its_intervals(sets):
    fig = figures.marginals_figure(sets, PARAMETERS, truth={"gamma": -1.0}, prior=draws(500, np.random.default_rng(9), 3.0))
    assert [ax.get_xlabel() for ax in fig.axes] == [p.label for p in PARAMETERS]
    assert texts(fig.legends[0]) == ["prior", "flow", "exact MCMC", "truth"]
    bars = [line.get_xdata() for line in fig.axes[0].lines if line.get_linewidth() == 3.0]
    for theta, bar in zip(sets.values(), bars, strict=True):
        assert bar == pytest.approx(np.quantile(theta[:, 0], [0.16, 0.84]))
    assert finite(fig)


def test_weights_figure_states_the_effective_sample_size():
    logs = np.random.default_rng(3).normal(size=5000)
    weights = np.exp(logs) / np.exp(logs).sum()
    fig = figures.weights_figure(logs + 1e4, pareto_k=0.9)  # a constant in the logarithm changes nothing
    note = fig.axes[1].texts[0].get_text()
    assert f"ESS = {1 / np.sum(weights**2):.0f} " in note and "Pareto k = 0.90 (NOT reliable)" in note
    assert sum(p.get_height() for p in fig.axes[0].patches) == 5000
    assert "(reliable)" in figures.weights_figure(logs, pareto_k=0.3).axes[1].texts[0].get_text()
    assert "Pareto" not in figures.weights_figure(logs).axes[1].texts[0].get_text()


def test_weights_of_zero_are_counted_and_nan_is_refused():
    logs = np.concatenate([np.zeros(50), np.full(50, -np.inf)])
    assert "ESS = 50 (50.0 %)" in figures.weights_figure(logs).axes[1].texts[0].get_text()
    for bad in ([np.nan, 0.0], [np.inf, 0.0], [-np.inf] * 3, []):
        with pytest.raises(DataError, match="log_weights"):
            figures.weights_figure(bad)


def test_comparison_has_a_row_for_every_set_and_fit(sets):
    fig = figures.comparison_figure(sets, PARAMETERS, PUBLISHED, truth={"gamma": -1.0})
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert labels == ["flow", "exact MCMC", "CTG 1st", "far away"]
    assert [ax.get_xlabel() for ax in fig.axes] == [p.label for p in PARAMETERS]
    marks = [line.get_xdata()[0] for line in fig.axes[1].lines if line.get_color() == COLOURS["published"]]
    assert marks == [18.21, 19.9]
    assert not [line for line in fig.axes[8].lines if line.get_color() == COLOURS["published"]]  # no fit gives nu_xmax
    assert len(fig.axes[0].containers) == 1 and finite(fig)  # the one error bar given


def test_misfit_says_how_many_lie_further_out():
    distances = np.arange(1.0, 100.0)
    assert texts(figures.misfit_figure(distances, 98.5).legends[0]) == ["99 simulations", "observation: 2 % lie further out"]
    far = figures.misfit_figure(distances, 1000.0, label="distance in the embedding")
    assert far.axes[0].get_xlim()[1] > 1000 and far.axes[0].get_xlabel() == "distance in the embedding"
    assert sum(p.get_height() for p in far.axes[0].patches) == 99
    for bad, error in ((distances[:3], DataError), (np.full(20, np.nan), NonFiniteError), (distances[None], ShapeError)):
        with pytest.raises(error):
            figures.misfit_figure(bad, 1.0)
    with pytest.raises(SettingError, match="d_obs"):
        figures.misfit_figure(distances, np.nan)


def test_panels_let_results_draw_themselves():
    class Result:
        def plot(self, ax=None):
            ax.plot([0, 1], [0, 1], label="x")
            return ax

    fig = figures.panels_figure({"ranks": Result(), "coverage": Result(), "more": Result()})
    assert [ax.get_title() for ax in fig.axes] == ["ranks", "coverage", "more"]
    assert all(len(ax.lines) == 1 for ax in fig.axes)
    with pytest.raises(DataError, match="panels is empty"):
        figures.panels_figure({})


def test_nothing_global_changes(sets):
    before = dict(matplotlib.rcParams)
    figures.marginals_figure(sets, PARAMETERS)
    figures.loss_figure(history(1, 5, np.random.default_rng(0)))
    assert dict(matplotlib.rcParams) == before


def test_figures_need_neither_pyplot_nor_torch_nor_arviz(tmp_path):
    script = (
        "import sys, numpy as np\n"
        "import sbi_phys.plotting as f, sbi_phys.report.tables, sbi_phys.report.html, sbi_phys.report.arviz\n"
        "assert not {'matplotlib', 'torch', 'arviz', 'jinja2'} & set(sys.modules), 'import is not light'\n"
        "from tests.report.demo_data import *\n"
        f"f.save_figure(f.corner_figure({{'a': draws(500, np.random.default_rng(0))[:, :2]}}, PARAMETERS[:2]), {str(tmp_path)!r}, 'c')\n"
        "print(sorted({'matplotlib.pyplot', 'torch', 'arviz'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert (tmp_path / "c.png").is_file()
