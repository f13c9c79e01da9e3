import numpy as np
import pytest

from sbi_phys.confidence import LRT, Waldo, coverage_map, feldman_cousins_gaussian, lf2i
from sbi_phys.core.errors import DataError, SettingError, SupportError
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
    return lf2i(theta, BOUNDED(x, theta), BOUNDED, 0.9, names=["mu"], bounds=[(0, None)], pvalues=True)


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
        lf2i(theta, BOUNDED(x, theta), BOUNDED, model="constant").pvalue(x[:1], 1.0)


def test_waldo_covers_whatever_the_prior():
    # posterior of x ~ N(theta, 1) with a prior N(0, 1) that pulls the mean by half: badly centred, and calibrated all the same
    statistic = Waldo(moments=lambda x: (0.5 * np.asarray(x)[:, None], np.full((len(x), 1, 1), 0.5)))
    rng = rng_for(1, "waldo")
    theta = rng.uniform(-4, 4, (6000, 1))
    found = lf2i(theta, statistic(rng.normal(theta[:, 0], 1), theta), statistic, 0.683, model="splines-6")
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
        statistic(data, theta[:, :1]),
        statistic,
        interest=1,
        profile=toy.nu_hat,
        names=["mu", "nu"],
        model="splines-3",
        bounds=[(0, None), (0, None)],
    )
    inside = found.contains(toy.simulate((2.0, 1.0), 3000, rng), 2.0)
    assert abs(inside.mean() - 0.9) < 0.03
    with pytest.raises(SettingError, match="psi by psi"):
        found.contains_each(data, theta)
    assert len(found.plot().get_legend_handles_labels()[1]) == 4


def test_words_and_picture(bounded):
    assert "90 % critical values from 6000 simulations" in bounded.summary()
    assert bounded.plot().get_xlabel() == "mu"


def test_bad_settings():
    theta, x = sample(300, "bad")
    q = BOUNDED(x, theta)
    with pytest.raises(SettingError, match="expected interest < 1"):
        lf2i(theta, q, BOUNDED, profile=lambda data, psi: data)
    with pytest.raises(DataError, match="leave 3 beyond"):
        lf2i(theta, q, BOUNDED, 0.99)
    with pytest.raises(SettingError, match="level is 2"):
        lf2i(theta, q, BOUNDED, 2.0)
