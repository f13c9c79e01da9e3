import numpy as np
import pytest
from scipy.stats import norm

from sbi_phys.confidence import coverage_map
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.rng import rng_for


def wilks_at_a_bound(n, seed):
    """Inclusion by q <= z^2 at 68.3 % for x ~ N(mu, 1), mu in [0, 5]: .841 at 0, .683 from about 1."""
    rng = rng_for(seed, "wilks")
    mu = rng.uniform(0, 5, n)
    x = rng.normal(mu, 1)
    q = (x - mu) ** 2 - np.minimum(x, 0) ** 2
    return mu, q <= norm.ppf(0.8415) ** 2


def test_size():
    rejected = {1: 0, 2: 0, 3: 0}
    for dim in rejected:
        for seed in range(80):
            rng = rng_for(seed, "size", dim)
            theta = rng.uniform(0, 1, (1000, dim))
            rejected[dim] += coverage_map(theta, rng.uniform(size=1000) < 0.9, 0.9).pvalue <= 0.05
    # Binomial(80, .05): 11 or more has probability .3 %
    assert max(rejected.values()) <= 10


@pytest.mark.parametrize(
    ("coverage", "least"),
    [
        (lambda t: np.full(len(t), 0.86), 18),
        (lambda t: np.where(t[:, 0] < 0.2, 0.78, 0.9), 18),
        (lambda t: 0.9 + 0.06 * np.sign(t[:, 0] - 0.5), 18),
    ],
)
def test_power(coverage, least):
    found = 0
    for seed in range(20):
        rng = rng_for(seed, "power")
        theta = rng.uniform(0, 1, (2000, 2))
        found += coverage_map(theta, rng.uniform(size=2000) < coverage(theta), 0.9).pvalue <= 0.05
    assert found >= least


def test_the_bound_is_found_and_named():
    mu, inside = wilks_at_a_bound(6000, 0)
    found = coverage_map(mu, inside, 0.683, names=["mu"])
    assert not found.covers
    assert found.worst.box["mu"][1] < 1.0
    assert found.worst.coverage > 0.75
    assert "NOT" in found.summary() and "mu in [" in found.summary()
    c, error = found.at([0.05, 3.0])
    assert abs(c[0] - 0.83) < 0.05 and abs(c[1] - 0.683) < 0.03
    assert (error < 0.04).all()


def test_errors_of_the_smooth_map_are_right():
    pulls = []
    for seed in range(100):
        rng = rng_for(seed, "errors")
        theta = rng.uniform(0, 1, 1500)
        found = coverage_map(theta, rng.uniform(size=1500) < 0.8 + 0.15 * theta, 0.9, degree=3)
        c, error = found.at([0.1, 0.5, 0.9])
        pulls.append((c - (0.8 + 0.15 * np.array([0.1, 0.5, 0.9]))) / error)
    assert np.abs(np.mean(pulls, axis=0)).max() < 0.4
    assert np.abs(np.std(pulls, axis=0) - 1).max() < 0.25


def test_always_inside_has_a_finite_answer():
    theta = rng_for(0, "all").uniform(0, 1, 500)
    found = coverage_map(theta, np.ones(500), 0.9)
    assert found.pvalue < 1e-6
    c, error = found.at([0.5])
    assert 0.97 < c[0] < 1 and np.isfinite(error).all()


def test_bins_hold_all_simulations():
    rng = rng_for(0, "bins")
    for dim in (1, 2, 3):
        theta = rng.uniform(0, 1, (1000, dim))
        found = coverage_map(theta, rng.uniform(size=1000) < 0.9, 0.9)
        assert sum(b.n for b in found.bins) == 1000 * (dim if dim > 2 else 1)


def test_pictures():
    mu, inside = wilks_at_a_bound(2000, 0)
    ax = coverage_map(mu, inside, 0.683, names=["mu"]).plot()
    assert ax.get_ylabel() == "coverage"
    theta = np.column_stack([mu, rng_for(0, "nu").uniform(size=2000)])
    plane = coverage_map(theta, inside, 0.683, names=["mu", "nu"])
    assert plane.plot().get_ylabel() == "nu"
    assert plane.plot(name="nu").get_xlabel() == "nu"


@pytest.mark.parametrize(
    ("theta", "inside", "settings", "error", "words"),
    [
        (np.arange(200.0), np.ones(199), {}, ShapeError, "rows differ"),
        (np.arange(200.0), np.ones((200, 1)), {}, ShapeError, "inside has shape"),
        (np.arange(200.0), np.full(200, 0.5), {}, DataError, "other than 0 and 1"),
        (np.arange(50.0), np.ones(50), {}, DataError, "50 rows"),
        (np.zeros(200), np.ones(200), {}, DataError, "single value"),
        (np.full(200, np.nan), np.ones(200), {}, NonFiniteError, "theta"),
        (np.arange(200.0), np.ones(200), {"degree": 30}, SettingError, "degree"),
        (np.random.default_rng(0).uniform(size=(200, 3)), np.ones(200), {"degree": 4}, SettingError, "10 simulations per term"),
    ],
)
def test_bad_input(theta, inside, settings, error, words):
    with pytest.raises(error) as raised:
        coverage_map(theta, inside, 0.9, **settings)
    assert words in str(raised.value)


def test_nothing_is_extrapolated():
    mu, inside = wilks_at_a_bound(500, 0)
    with pytest.raises(SupportError, match="beyond"):
        coverage_map(mu, inside, 0.683).at([5.5])
