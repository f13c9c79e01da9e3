"""Learned critical values and p-values, and the sets made with them."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import chi2

from sbi_phys.confidence import LRT, Waldo, coverage_map, feldman_cousins_gaussian, learn_critical_values, learn_pvalues, lf2i
from sbi_phys.confidence.lf2i import _linear_quantile, _programme, pinball
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.rng import rng_for
from tests.confidence import on_off_toy as toy


def bounded_maximum(data):
    best = np.maximum(np.asarray(data), 0.0)
    return best[:, None], -0.5 * (np.asarray(data) - best) ** 2


BOUNDED = LRT(log_likelihood=lambda theta, data: -0.5 * (np.asarray(data)[:, None] - theta[None, :, 0]) ** 2, maximum=bounded_maximum)


def sample(n, key):
    rng = rng_for(0, "bounded", key)
    theta = (8 if key == "train" else 7.9) * rng.uniform(0, 1, (n, 1)) ** 2  # more of them near the bound, where critical values change
    return theta, rng.normal(theta[:, 0], 1.0)


@pytest.fixture(scope="module")
def bounded():
    theta, x = sample(6000, "train")
    return lf2i(theta, BOUNDED(theta, x), BOUNDED, 0.9, names=["mu"], bounds=[(0, None)], pvalues=True)


def test_learned_sets_cover_everywhere(bounded):
    theta, x = sample(5000, "check")
    inside = bounded.contains_each(x, theta)
    assert abs(inside.mean() - 0.9) < 0.015
    assert coverage_map(theta, inside, 0.9).pvalue > 1e-3
    for mu in (0.0, 0.4, 2.0, 7.0):
        there = rng_for(2, "at", int(10 * mu)).normal(mu, 1.0, 4000)
        assert abs(bounded.contains(there, mu).mean() - 0.9) < 0.03


def test_intervals_are_near_those_of_feldman_and_cousins(bounded):
    x = np.array([-0.5, 1.0, 3.0])
    found = bounded.interval(x)
    low, high = feldman_cousins_gaussian(x)
    assert np.abs(found.low - low).max() < 0.2 and np.abs(found.high - high).max() < 0.2
    with pytest.raises(SupportError, match="reaches the end"):
        bounded.interval([7.5])


def test_pvalues_belong_to_the_sets(bounded):
    theta, x = sample(2000, "p")
    p = np.array([bounded.pvalue(x[i : i + 1], theta[i])[0] for i in range(200)])
    assert np.abs([np.mean(p <= a) - a for a in (0.1, 0.32, 0.5)]).max() < 0.08
    with pytest.raises(SettingError, match="not learned"):
        lf2i(theta, BOUNDED(theta, x), BOUNDED, model="constant").pvalue(x[:1], 1.0)


def test_waldo_covers_whatever_the_prior():
    # posterior of x ~ N(theta, 1) with a prior N(0, 1) that pulls the mean by half: badly centred, and calibrated all the same
    statistic = Waldo(moments=lambda x: (0.5 * np.asarray(x)[:, None], np.full((len(x), 1, 1), 0.5)))
    rng = rng_for(1, "waldo")
    theta = rng.uniform(-4, 4, (6000, 1))
    found = lf2i(theta, statistic(theta, rng.normal(theta[:, 0], 1)), statistic, 0.683, model="splines-6")
    check = rng.uniform(-4, 4, (4000, 1))
    inside = found.contains_each(rng.normal(check[:, 0], 1), check)
    assert abs(inside.mean() - 0.683) < 0.03
    at_three = found.contains(rng.normal(3.0, 1, 4000), 3.0)
    assert abs(at_three.mean() - 0.683) < 0.04
    # credible regions of the same posterior do not cover there
    assert np.mean(np.abs(0.5 * rng.normal(3.0, 1, 4000) - 3.0) < np.sqrt(0.5)) < 0.3


def test_nuisances_by_profiling():
    statistic = LRT(log_likelihood=toy.profiled, maximum=toy.maximum)
    rng = rng_for(4, "on off")
    theta = np.column_stack([rng.uniform(0, 7, 3000), rng.uniform(0.5, 1.6, 3000)])
    data = np.concatenate([toy.simulate(t, 1, rng) for t in theta])
    found = lf2i(
        theta,
        statistic(theta[:, :1], data),
        statistic,
        interest=1,
        profile=toy.nu_hat,
        names=["mu", "nu"],
        model="splines-3",
        bounds=[(0, None), (0, None)],
    )
    inside = found.contains(toy.simulate((2.0, 1.0), 3000, rng), 2.0)
    assert abs(inside.mean() - 0.9) < 0.03
    with pytest.raises(SettingError, match="does not support profiled nuisances"):
        found.contains_each(data, theta)
    assert len(found.plot().get_legend_handles_labels()[1]) == 4


def test_words_and_picture(bounded):
    assert "90 % critical values from 6000 simulations" in bounded.summary()
    assert bounded.plot().get_xlabel() == "mu"


def test_bad_settings():
    theta, x = sample(300, "bad")
    q = BOUNDED(theta, x)
    with pytest.raises(SettingError, match="expected interest < 1"):
        lf2i(theta, q, BOUNDED, profile=lambda psi, data: data)
    with pytest.raises(DataError, match="leave 3 beyond"):
        lf2i(theta, q, BOUNDED, 0.99)
    with pytest.raises(SettingError, match="level is 2"):
        lf2i(theta, q, BOUNDED, 2.0)


def scaled(n, seed=0):
    """q = (1 + theta^2) chi2_1: the exact quantile is (1 + theta^2) C."""
    rng = rng_for(seed, "scaled")
    theta = rng.uniform(-1, 1, (n, 1))
    return theta, (1 + theta[:, 0] ** 2) * rng.chisquare(1, n)


def test_linear_programme_minimises_the_pinball_loss():
    rng = rng_for(0, "lp")
    x = np.column_stack([np.ones(200), rng.normal(size=(200, 2))])
    q = x @ [1.0, 0.5, -0.2] + rng.exponential(size=200)
    beta = _linear_quantile(x, q, 0.8)
    best = minimize(lambda b: pinball(q, x @ b, 0.8), beta, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
    assert pinball(q, x @ beta, 0.8) <= best.fun + 1e-9
    # a quantile regression has as many points on it as coefficients, and the right share below
    assert np.sum(np.abs(q - x @ beta) < 1e-7) >= 3
    assert np.mean(q < x @ beta) == pytest.approx(0.8, abs=0.02)


def test_few_rows_give_the_answer_of_all():
    theta, q = scaled(6000)
    x = np.polynomial.legendre.legvander(theta[:, 0], 4)
    assert np.allclose(_linear_quantile(x, q, 0.9), _programme(x, q, 0.9, 0.0), atol=1e-8)


@pytest.mark.parametrize("model", ["splines-3", "splines-6", "boosting"])
def test_known_quantile_is_learned(model):
    theta, q = scaled(6000)
    found = learn_critical_values(theta, q, 0.9, model=model)
    at = np.linspace(-0.95, 0.95, 9)
    exact = (1 + at**2) * chi2.ppf(0.9, 1)
    # in terms of coverage: what the learned cut really holds
    held = chi2.cdf(found.at(at) / (1 + at**2), 1)
    assert np.abs(held - 0.9).max() < (0.02 if model == "splines-3" else 0.04)
    assert np.corrcoef(found.at(at), exact)[0, 1] > (0.9 if model == "boosting" else 0.97)  # trees go in steps


def test_cross_validation_chooses():
    theta, q = scaled(2500)
    curved = learn_critical_values(theta, q, 0.9, names=["mu"])
    assert curved.model.startswith("splines") and curved.losses["constant"] > min(curved.losses.values())
    flat = learn_critical_values(theta, rng_for(1, "flat").chisquare(1, 2500), 0.9)
    assert flat.losses["constant"] <= flat.losses["boosting"]
    assert "pinball loss" in curved.summary()


def test_two_parameters():
    rng = rng_for(3, "two")
    theta = rng.uniform(0, 1, (8000, 2))
    scale = 1 + theta[:, 0] + 2 * theta[:, 0] * theta[:, 1]
    found = learn_critical_values(theta, scale * rng.chisquare(1, 8000), 0.9, names=["mu", "nu"], model="splines-3")
    at = np.array([[0.1, 0.1], [0.9, 0.1], [0.9, 0.9], [0.5, 0.5]])
    held = chi2.cdf(found.at(at) / (1 + at[:, 0] + 2 * at[:, 0] * at[:, 1]), 1)
    assert np.abs(held - 0.9).max() < 0.03


def test_pvalues_are_the_exact_ones_and_fall():
    theta, q = scaled(8000)
    found = learn_pvalues(theta, q)
    for at in (-0.6, 0.0, 0.8):
        cuts = (1 + at**2) * chi2.ppf([0.3, 0.6, 0.9, 0.95], 1)
        assert np.abs(found.at(cuts, at) - [0.7, 0.4, 0.1, 0.05]).max() < 0.04
        many = found.at(np.linspace(0, 30, 300), at)
        assert (np.diff(many) <= 0).all()
        assert many[0] == 1.0 and many[-1] >= 1 / 8001
    assert found.at(np.inf, 0.0)[0] <= found.at(20.0, 0.0)[0]


def test_pvalues_are_uniform_on_another_sample():
    found = learn_pvalues(*scaled(8000))
    theta, q = scaled(3000, seed=1)
    p = found.at(q, theta)
    assert np.abs([np.mean(p <= a) - a for a in (0.05, 0.1, 0.32, 0.5)]).max() < 0.03


def test_the_box_reaches_a_bound_that_the_sample_nearly_reaches():
    theta, q = scaled(2000)
    near = learn_critical_values(theta, q, model="constant", bounds=[(-1.0, 2.0)])
    assert near.low[0] == -1.0 and near.high[0] == theta.max()
    assert near.at(-1.0).shape == (1,)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda t, q: learn_critical_values(t, q, model="constant").at(1.5), SupportError, "theta_0 = 1.5 lies beyond"),
        (lambda t, q: learn_pvalues(t, q).at([1.0], 1.5), SupportError, "not extrapolated"),
        (lambda t, q: learn_critical_values(t, q[:-1]), ShapeError, "rows differ"),
        (lambda t, q: learn_critical_values(t, np.where(q > 3, np.inf, q)), NonFiniteError, "infinite"),
        (lambda t, q: learn_critical_values(t, np.where(q > 3, np.nan, q)), NonFiniteError, "is nan"),
        (lambda t, q: learn_critical_values(t, q, 0.99), DataError, "leave 4 beyond the 0.99 quantile"),
        (lambda t, q: learn_critical_values(t, q, model="forest"), SettingError, "model is 'forest'"),
        (lambda t, q: learn_critical_values(np.zeros(400), q), DataError, "a single value"),
        (lambda t, q: learn_critical_values(t, q, bounds=[(0.0, None)]), SettingError, "expected a grid within"),
        (lambda t, q: learn_pvalues(t[:100], q[:100]), DataError, "200 or more"),
        (lambda t, q: learn_pvalues(t, q).at([np.nan], 0.0), NonFiniteError, "is nan"),
        (lambda t, q: learn_pvalues(t, q).at([1.0, 2.0], [0.0, 0.1, 0.2]), ShapeError, "rows differ"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call(*scaled(400))
    assert words in str(raised.value)


def test_same_seed_same_answer():
    theta, q = scaled(1500)
    one, two = (learn_critical_values(theta, q, model="boosting", seed=s).at([0.3]) for s in (0, 0))
    assert np.array_equal(one, two)
