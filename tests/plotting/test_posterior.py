import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from sbi_phys import plotting as figures
from sbi_phys.calibration import reliability
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.plotting import PairRatios, methods_figure, ratios_figure
from sbi_phys.plotting.style import COLOURS
from sbi_phys.priors import Parameter
from tests.report.demo_data import PARAMETERS, PUBLISHED, draws, history

TWO = [Parameter("a", latex=r"\alpha"), Parameter("b")]
RNG = np.random.default_rng(0)
EXACT = RNG.standard_normal((1000, 2))


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    return {"flow": draws(2000, rng), "exact MCMC": draws(2000, rng)}


def texts(legend):
    return [t.get_text() for t in legend.get_texts()]


def finite(fig):
    return all(np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all() for ax in fig.axes)


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


def legend_of(ax):
    return texts(ax.get_legend())


def test_contours_over_the_exact_ones():
    figure = methods_figure({"NPE": EXACT + 1, "NLE": EXACT * 1.1}, TWO, ("exact", EXACT), truth=[0.0, 0.5])
    plane, top, right, legend = figure.axes
    assert legend_of(legend) == ["exact", "NPE", "NLE", "truth"]
    assert (plane.get_xlabel(), plane.get_ylabel()) == (TWO[0].label, TWO[1].label)
    assert plane.get_xlim() == top.get_xlim() and plane.get_ylim() == right.get_ylim()
    assert len(plane.collections) == 3  # one filled, two of lines
    (peak,) = (line for line in top.lines if line.get_color() == "#0072B2")
    assert abs(peak.get_xdata()[np.argmax(peak.get_ydata())] - 1) < 0.35  # moved by 1


def test_a_distant_mode_is_outside_the_axes_and_in_the_legend():
    far = np.concatenate([EXACT[:250], EXACT[:750] + 40])
    plane, *_, legend = methods_figure({"NPE": far, "NLE": EXACT + 1}, TWO, ("exact", EXACT)).axes
    assert plane.get_xlim()[1] < 12 and legend_of(legend)[1:] == ["NPE\n(75 % outside the axes)", "NLE"]
    assert len(plane.collections) == 2  # most of the first is outside the axes


def test_where_nothing_lies_near_the_exact_draws_all_is_in_view():
    plane, *_, legend = methods_figure({"NPE": EXACT + 40}, TWO, ("exact", EXACT)).axes
    assert plane.get_xlim()[1] > 40 and plane.get_xlim()[0] < 0
    assert legend_of(legend) == ["exact", "NPE"] and len(plane.collections) == 2


def test_one_parameter_and_too_many_sets():
    figure = methods_figure({"NPE": EXACT[:, :1]}, TWO[:1])
    assert len(figure.axes) == 1 and legend_of(figure.axes[0]) == ["NPE"]
    with pytest.raises(SettingError, match="5 sets; expected at most 4"):
        methods_figure({str(i): EXACT for i in range(5)}, TWO)
    with pytest.raises(ShapeError, match="NPE"):
        methods_figure({"NPE": EXACT[:, :1]}, TWO)


def test_ratios_on_the_diagonal_with_what_is_out_of_view_said():
    exact = RNG.normal(3, 1, 60)
    curve = reliability(RNG.normal(1, 1, 200), RNG.normal(-1, 1, 200), n_bins=5)
    pairs = PairRatios(exact, exact + 0.5, np.append(exact - 4, -1e4), np.append(exact - 4, -1e4), curve)
    assert pairs.rms == pytest.approx(0.5)
    figure = ratios_figure({"NRE": pairs, "NLE": PairRatios(exact, exact, np.zeros(0), np.zeros(0))})
    first, second, last = figure.axes
    assert "rms 0.50 nats" in legend_of(first)[1] and "of 61 within the axes" in legend_of(first)[0] and first.get_xlim()[0] > -20
    assert "rms 0.00 nats" in legend_of(second)[0] and "NRE: p = " in legend_of(last)[0]
    one_off = exact.copy()
    one_off[0] = -80
    (ax,) = ratios_figure({"NLE": PairRatios(exact, one_off, np.zeros(0), np.zeros(0))}).axes
    assert ax.get_ylim()[0] > -5 and legend_of(ax)[-1] == "1 outside the axes"
    with pytest.raises(DataError, match="found is empty"):
        ratios_figure({})
