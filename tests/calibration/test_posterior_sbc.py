import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy.stats import kstest

from sbi_phys.calibration.posterior_sbc import posterior_sbc
from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError

NOISE, X_OBS = 0.5, 0.8
GAIN = 1 / (1 + NOISE**2)
SD = NOISE * np.sqrt(GAIN)


def replicated(rng, *, n=200, m=400, width=1.0, shift=0.0, picked=True):
    """Conjugate Gaussian theta ~ N(0, 1), x ~ N(theta, NOISE^2); q(. | x) exact, or of another width or shifted (in sd)."""
    draws = GAIN * X_OBS + SD * rng.standard_normal((m, 1))
    theta = draws[rng.integers(m, size=n)] if picked else GAIN * X_OBS + SD * rng.standard_normal((n, 1))
    x = theta + NOISE * rng.standard_normal((n, 1))
    sd = width * SD
    log_q = -(((draws[:, 0] - GAIN * x - shift * SD) / sd) ** 2) / 2 - np.log(sd)
    return theta, draws, log_q + draws[:, 0] ** 2 / 2


@pytest.mark.parametrize("repetitions", [80, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("m", [20, 400])
def test_size_is_exact_at_any_effective_sample_size(repetitions, m):
    rng = np.random.default_rng(1)
    results = [posterior_sbc(*replicated(rng, n=150, m=m), seed=i) for i in range(repetitions)]
    assert abs(np.mean([r.pvalue < 0.05 for r in results]) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / repetitions)
    assert all(r.exact for r in results)


def test_ranks_are_uniform_even_where_one_draw_has_the_weight():
    rng = np.random.default_rng(2)
    draws = rng.standard_normal((300, 1))
    index = rng.integers(300, size=2000)
    x = draws[index] + 0.001 * rng.standard_normal((2000, 1))
    result = posterior_sbc(draws[index], draws, -(((draws[:, 0] - x) / 0.001) ** 2) / 2)
    assert np.median(result.ess) < 1.5
    assert kstest(result.pit[:, 0], "uniform").pvalue > 1e-3
    assert "effective sample size is 1" in result.warning
    assert "WARNING" in result.summary()


@pytest.mark.parametrize("wrong", [{"width": 0.6}, {"width": 1.8}, {"shift": 0.6}])
def test_power_on_wrong_posteriors(wrong):
    rng = np.random.default_rng(3)
    assert np.mean([posterior_sbc(*replicated(rng, n=500, m=1000, **wrong)).pvalue < 0.05 for _ in range(12)]) >= 0.9


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({}, "calibrated"), ({"width": 0.5}, "overconfident"), ({"width": 2.0}, "underconfident"), ({"shift": 0.8}, "biased high")],
)
def test_words(wrong, word):
    result = posterior_sbc(*replicated(np.random.default_rng(4), n=800, m=2000, **wrong), ["gamma"])
    assert word in result.verdicts["gamma"]
    assert word in result.summary()
    assert result.warning == ""


def test_fresh_truths_are_marked_as_approximate():
    rng = np.random.default_rng(5)
    few = posterior_sbc(*replicated(rng, n=100, m=500, picked=False))
    many = posterior_sbc(*replicated(rng, n=20, m=4000, picked=False))
    assert not few.exact and "choose the true values from the draws" in few.warning
    assert not many.exact and many.warning == ""
    assert posterior_sbc(*replicated(rng)).exact


def test_rank_and_effective_sample_size_by_hand():
    draws = np.array([[0.0, 5.0], [1.0, 4.0], [2.0, 3.0]])
    logs = np.log(np.tile([1.0, 2.0, 5.0], (10, 1))) + 700 * np.arange(10)[:, None]
    result = posterior_sbc(np.tile([[0.5, 10.0]], (10, 1)), draws, logs)
    np.testing.assert_allclose(result.pit, np.tile([1 / 8, 1.0], (10, 1)))
    np.testing.assert_allclose(result.ess, 64 / 30)
    tied = posterior_sbc(np.tile([[1.0, 4.0]], (10, 1)), draws, logs).pit
    assert np.all((tied[:, 0] >= 1 / 8) & (tied[:, 0] <= 3 / 8))
    assert np.all((tied[:, 1] >= 5 / 8) & (tied[:, 1] <= 7 / 8))
    assert np.unique(tied[:, 0]).size == 10


def test_weights_of_zero_are_legal():
    theta, draws, logs = replicated(np.random.default_rng(7), n=20, m=50)
    logs[:, 10:] = -np.inf
    result = posterior_sbc(theta, draws, logs)
    assert result.ess.max() <= 10
    assert 0 < result.pvalue <= 1


def test_plot():
    result = posterior_sbc(*replicated(np.random.default_rng(8)))
    ax = result.plot()
    assert isinstance(ax, Axes)
    assert "ECDF" in ax.get_ylabel()
    assert result.plot(ax) is ax


def test_bad_input():
    theta, draws, logs = replicated(np.random.default_rng(9), n=20, m=50)
    with pytest.raises(NonFiniteError, match="log_ratio has NaN or"):
        posterior_sbc(theta, draws, logs * np.nan)
    with pytest.raises(DataError, match="-Inf for every draw in 20 rows"):
        posterior_sbc(theta, draws, np.full_like(logs, -np.inf))
    with pytest.raises(NonFiniteError, match="draws_obs"):
        posterior_sbc(theta, draws * np.inf, logs)
    with pytest.raises(NonFiniteError, match="theta"):
        posterior_sbc(theta * np.nan, draws, logs)
    with pytest.raises(ShapeError, match="log_ratio has shape"):
        posterior_sbc(theta, draws, logs.T)
    with pytest.raises(ShapeError, match="theta has 19 rows"):
        posterior_sbc(theta[:19], draws, logs)
    with pytest.raises(ShapeError, match="theta has shape"):
        posterior_sbc(np.hstack([theta, theta]), draws, logs)
    with pytest.raises(ShapeError, match="draws_obs has shape"):
        posterior_sbc(theta, draws[:, 0], logs)
    with pytest.raises(DataError, match="9 rows"):
        posterior_sbc(theta[:9], draws, logs[:9])
    with pytest.raises(DataError, match="1 draws"):
        posterior_sbc(theta, draws[:1], logs[:, :1])
    with pytest.raises(DataError, match="constant"):
        posterior_sbc(theta, draws * 0, logs)
    with pytest.raises(DataError, match="complex"):
        posterior_sbc(theta, draws * 1j, logs)
