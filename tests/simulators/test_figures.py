import io
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import poisson

from simulators import SourceSpectrum
from simulators.figures import poisson_interval, xmax_moments

THETA = np.array([[1.4, 18.69, 0.18, 0.11, 0.48, 0.21, 0.02, 0.3, 1.2], [1.3, 18.66, 0.1, 0.2, 0.48, 0.2, 0.02, 0.1, 1.0]])


@pytest.mark.parametrize(
    ("settings", "theta", "names"),
    [
        ({}, THETA, ["spectrum", "xmax_moments", "xmax_histograms"]),
        ({"composition": "fixed"}, np.array([[-1.0, 18.2], [-1.1, 18.22]]), ["spectrum"]),
    ],
)
def test_figures_have_names_captions_and_units(settings, theta, names):
    sim = SourceSpectrum(**settings)
    figures = sim.figures(np.repeat(theta, 20, axis=0), sim.observed(), seed=0)
    assert [f[0] for f in figures] == names
    for _, title, caption, figure in figures:
        assert title
        assert len(caption) > 100
        labels = [ax.get_xlabel() for ax in figure.axes] + [ax.get_ylabel() for ax in figure.axes]
        labels += [figure.get_supxlabel(), figure.get_supylabel()]
        assert any("eV" in label or "g/cm" in label for label in labels)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=50)
        assert buffer.getvalue().startswith(b"\x89PNG")


def test_same_seed_same_figure():
    sim = SourceSpectrum(composition="fixed")
    theta = np.repeat([[-1.0, 18.2]], 50, axis=0)
    bands = [sim.figures(theta, sim.observed(), seed=seed)[0][3].axes[1].lines[1].get_ydata() for seed in (1, 1, 2)]
    np.testing.assert_array_equal(bands[0], bands[1])
    assert np.abs(bands[0] - bands[2]).max() > 0


def test_poisson_interval_inverts_the_tails():
    low, high = poisson_interval(np.array([0.0, 1.0, 6.0, 1000.0]))
    assert low[0] == 0
    np.testing.assert_allclose(poisson.cdf([0, 1, 6, 1000], high), 0.15865, atol=1e-6)
    np.testing.assert_allclose(poisson.sf([0, 5, 999], low[1:]), 0.15865, atol=1e-6)


def test_xmax_moments_are_those_of_the_expanded_sample():
    edges = np.array([600.0, 620, 640, 660])
    counts = np.array([3.0, 5, 2])
    sample = np.repeat([610.0, 630, 650], [3, 5, 2])
    mean, sd, mean_error, sd_error = xmax_moments(counts, edges)
    assert mean == pytest.approx(sample.mean())
    assert sd == pytest.approx(sample.std())
    assert mean_error == pytest.approx(sample.std() / np.sqrt(10))
    assert sd_error > 0


def test_figures_touch_no_global_state():
    code = (
        "import matplotlib; before = dict(dict.items(matplotlib.rcParams));"
        "from simulators import SourceSpectrum; s = SourceSpectrum(composition='fixed');"
        "s.figures([[-1.0, 18.2]] * 5, s.observed(), seed=0);"
        "import sys; print('matplotlib.pyplot' in sys.modules, dict(dict.items(matplotlib.rcParams)) == before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]
