"""Networks compared by their log score, with Gaussian posteriors whose scores and KL divergences are known."""

import numpy as np
import pytest

import sbi_phys as sp
from sbi_phys.comparison import compare_networks
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, StoreError
from sbi_phys.core.rng import rng_for
from tests.toys import LinearGaussian, rejection_rate, training_set

SIMULATOR = LinearGaussian(dim=2, noise=0.5)
COVARIANCE = SIMULATOR.posterior(np.zeros(2))[1]
ENTROPY = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * COVARIANCE)[1]


class Posterior:
    """The exact posterior, moved by `shift` sd along the first axis of its Cholesky factor: the KL divergence is shift^2 / 2."""

    def __init__(self, shift: float = 0.0):
        self.shift = shift * np.linalg.cholesky(COVARIANCE)[:, 0]

    def log_prob(self, theta, x):
        return SIMULATOR.exact_log_posterior(theta - self.shift, x)

    def sample(self, x, n, *, seed):
        return SIMULATOR.posterior_sample(x, n, rng_for(seed)) + self.shift

    def log_prob_draws(self, draws, x):
        return np.stack([self.log_prob(d, row) for d, row in zip(draws, x, strict=True)])


def test_scores_are_minus_the_entropy_and_differences_the_divergence():
    found = compare_networks({"shifted": Posterior(0.5), "exact": Posterior()}, training_set(SIMULATOR, 2000), 2000, n_draws=99)
    k = found.names.index("exact")
    assert found.best == "exact" and found.n == 2000
    assert abs(found.score[k] + ENTROPY) < 4 * found.score_err[k]
    # the variance of log q at its own draws is d / 2
    assert found.score_err[k] == pytest.approx(np.sqrt(1 / 2000), rel=0.15)
    # D = -KL = -shift^2 / 2; each row's difference has the variance shift^2
    assert found.difference_err[1 - k] == pytest.approx(0.5 / np.sqrt(2000), rel=0.1)
    assert abs(found.difference[1 - k] + 0.125) < 4 * found.difference_err[1 - k]
    assert found.difference[k] == 0 and found.pvalues["exact"] == 1
    assert found.pvalues["shifted"] < 1e-6 and found.as_good == ("exact",)
    assert found.pvalues_sbc["shifted"] < 1e-6 < 1e-3 < found.pvalues_sbc["exact"]
    assert found.pvalues_coverage["exact"] > 1e-3
    assert "best exact" in found.summary().splitlines()[0] and found.summary().splitlines()[1].startswith("  exact")
    assert found.rows().column("difference")[1 - k] == found.difference[1 - k] and found.rows().units["score"] == "nats"


def test_equal_networks_are_found_different_at_the_stated_rate():
    """Shifted by as much to either side, both have the same expected score, but different scores in every row."""

    def pvalue(rng, seed):
        pair = {"up": Posterior(0.3), "down": Posterior(-0.3)}
        found = compare_networks(pair, training_set(SIMULATOR, 100, seed=seed), n_draws=0)
        return min(found.pvalues.values())

    rate = rejection_rate(pvalue, 400, seed=1)
    assert abs(rate - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 400)


def test_of_three_equal_networks_none_is_found_worse_too_often():
    def pvalue(rng, seed):
        networks = {"up": Posterior(0.3), "down": Posterior(-0.3), "up again": Posterior(0.3)}
        found = compare_networks(networks, training_set(SIMULATOR, 100, seed=seed), n_draws=0)
        return min(found.pvalues.values())

    assert rejection_rate(pvalue, 200, seed=1) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_the_same_network_twice():
    found = compare_networks({"a": Posterior(), "b": Posterior()}, training_set(SIMULATOR, 100), n_draws=0)
    assert found.difference.tolist() == [0, 0] and found.as_good == ("a", "b")
    assert found.pvalues_sbc == {} and "pvalue_sbc" not in found.rows().columns and "as good within errors: b" in found.summary()


class Cut(Posterior):
    """No density where the first parameter is above 1."""

    def log_prob(self, theta, x):
        return np.where(theta[:, 0] > 1, -np.inf, super().log_prob(theta, x))


def test_a_network_without_density_at_a_true_value_is_last():
    theta, x = training_set(SIMULATOR, 200)
    found = compare_networks({"cut": Cut(), "exact": Posterior(2.0)}, (theta, x), n_draws=0)
    assert found.best == "exact" and found.n_zero.tolist() == [(theta[:, 0] > 1).sum(), 0]
    assert found.score[0] == found.difference[0] == -np.inf and found.pvalues["cut"] == 0
    assert "NO density at" in found.summary() and found.to_dict()["score"][0] is None
    found.plot()
    with pytest.raises(DataError, match="every network has no density"):
        compare_networks({"a": Cut(), "b": Cut()}, (theta, x), n_draws=0)


def test_c2st_of_joint_draws():
    networks = {"exact": Posterior(), "far": Posterior(3.0)}
    found = compare_networks(networks, training_set(SIMULATOR, 120), n_draws=0, n_c2st=60, seed=2)
    assert np.isnan(np.diag(found.c2st)).all() and found.c2st[0, 1] == found.c2st[1, 0]
    # the best classifier is right with probability Phi(shift / 2) = 0.93
    assert 0.7 < found.c2st[0, 1] < 0.93 + 4 * np.sqrt(0.93 * 0.07 / 120) and "c2st to far" in found.rows().columns


def test_a_store_is_read_as_far_as_needed(tmp_path):
    store = sp.simulate(SIMULATOR, 300, tmp_path / "store", shard_size=100)
    theta, x = store.read()
    found = compare_networks({"a": Posterior(), "b": Posterior(1.0)}, store, 150, n_draws=0)
    same = compare_networks({"a": Posterior(), "b": Posterior(1.0)}, (theta[:150], x[:150]), n_draws=0)
    assert found.n == 150 and found.score.tolist() == same.score.tolist()
    (store.path / "shard-00002.h5").unlink()
    with pytest.raises(StoreError, match="not complete"):
        compare_networks({"a": Posterior(), "b": Posterior(1.0)}, str(store.path), 300, n_draws=0)


def test_bad_input():
    theta, x = training_set(SIMULATOR, 100)
    pair = {"a": Posterior(), "b": Posterior(1.0)}
    with pytest.raises(SettingError, match="expected at least two to compare"):
        compare_networks({"a": Posterior()}, (theta, x))
    with pytest.raises(SettingError, match=r"expected \{name: estimator\}"):
        compare_networks([Posterior(), Posterior()], (theta, x))
    with pytest.raises(SettingError, match="held_out is a ndarray; expected a store"):
        compare_networks(pair, theta)
    with pytest.raises(DataError, match="held_out has 40 rows; expected at least 50"):
        compare_networks(pair, (theta[:40], x[:40]))
    with pytest.raises(DataError, match="n_c2st is 60 for 100 held-out rows"):
        compare_networks(pair, (theta, x), n_c2st=60)
    with pytest.raises(SettingError, match="n_draws is 5"):
        compare_networks(pair, (theta, x), n_draws=5)
    with pytest.raises(SettingError, match="without log_prob"):
        compare_networks(pair | {"c": object()}, (theta, x), n_draws=0)
    with pytest.raises(NonFiniteError, match="theta of held_out"):
        compare_networks(pair, (np.where(theta > 1, np.nan, theta), x))
    with pytest.raises(ShapeError):
        compare_networks(pair, (theta, x[:-1]))
    broken = Posterior()
    broken.log_prob = lambda theta, x: np.full(len(theta), np.nan)
    with pytest.raises(NonFiniteError, match="log_prob of broken is nan in row 0"):
        compare_networks(pair | {"broken": broken}, (theta, x), n_draws=0)
    broken.log_prob = lambda theta, x: np.zeros((len(theta), 1))
    with pytest.raises(ShapeError, match="one value per pair"):
        compare_networks(pair | {"broken": broken}, (theta, x), n_draws=0)
