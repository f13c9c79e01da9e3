"""Learning curves with known laws: scores made by formula, and a Gaussian regression whose asymptote is minus the exact entropy."""

import numpy as np
import pytest

import sbi_phys as sp
from sbi_phys.comparison import learning_curve
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.rng import rng_for
from tests.toys import LinearGaussian, training_set

SIMULATOR = LinearGaussian(dim=2, noise=0.5)
ENTROPY = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * SIMULATOR.posterior(np.zeros(2))[1])[1]


class Regression:
    """theta = B x + c + N(0, S) by least squares: the family of the exact posterior, with an excess of about (p + 3) / n nats."""

    n_fits = 0

    def __init__(self, seed=0):
        self.settings = {"seed": seed}

    def fit(self, theta, x):
        Regression.n_fits += 1
        design = np.column_stack([np.ones(len(x)), x])
        self.coefficients = np.linalg.lstsq(design, theta, rcond=None)[0]
        self.covariance = np.cov(theta - design @ self.coefficients, rowvar=False)
        return self

    def log_prob(self, theta, x):
        delta = theta - np.column_stack([np.ones(len(x)), x]) @ self.coefficients
        _, log_det = np.linalg.slogdet(2 * np.pi * self.covariance)
        return -0.5 * np.einsum("ni,ij,nj->n", delta, np.linalg.inv(self.covariance), delta) - 0.5 * log_det


def test_a_regression_approaches_minus_the_entropy():
    pairs = training_set(SIMULATOR, 6000, seed=1)
    few = learning_curve(Regression, pairs, [20, 40, 80], n_held_out=2000, n_repeats=8)
    assert few.answer == "yes" and few.gain > 0.02
    many = learning_curve(Regression, pairs, [250, 500, 1000, 2000, 4000], n_held_out=2000, n_repeats=2)
    assert many.answer == "no" and abs(many.gain) < 0.01
    assert abs(many.asymptote + ENTROPY) < 4 * many.asymptote_err < 0.15
    assert few.summary().startswith("Would more simulations help? Yes: doubling 80 to 160")
    assert many.summary().startswith("Would more simulations help? No:")
    # the gain that was predicted is that of the next size
    later = learning_curve(Regression, pairs, [40, 80, 160], n_held_out=2000, n_repeats=8)
    assert 0 < later.mean[2] - few.mean[2] < few.gain + 4 * few.gain_err


class Law:
    """Scores by formula: a - b n^-c, a row's own number, the training's scatter and a scatter of each row and training."""

    def __init__(self, seed, a=1.0, b=2.0, c=0.5, scatter=0.0):
        self.seed, self.a, self.b, self.c, self.scatter = seed, a, b, c, scatter

    def fit(self, theta, x):
        self.n = len(theta)
        return self

    def log_prob(self, theta, x):
        rng = rng_for(self.seed, "scatter")
        offset = self.scatter / np.sqrt(self.n) * rng.standard_normal()
        return self.a - self.b * self.n**-self.c + 0.5 * theta[:, 0] + offset + 0.1 * rng.standard_normal(len(theta))


def law(seed, n_repeats=1, **settings):
    theta = rng_for(seed, "theta").standard_normal((5500, 1))
    sizes = [100, 200, 400, 800, 1600, 3200]
    return learning_curve(lambda s: Law(s, **settings), (theta, theta), sizes, n_held_out=2000, n_repeats=n_repeats, seed=seed)


def test_a_power_law_is_found():
    found = law(3)
    exact = 2.0 * (3200**-0.5 - 6400**-0.5)
    assert abs(found.gain - exact) < 3 * found.gain_err and found.gain_err < 0.5 * exact
    assert abs(found.exponent - 0.5) < 3 * found.exponent_err < 0.6
    assert abs(found.asymptote - 1.0) < 4 * found.asymptote_err
    np.testing.assert_allclose(found.fitted(found.sizes), found.mean, atol=0.01)
    assert found.fitted(1e12) == pytest.approx(found.asymptote, abs=1e-3)
    assert found.fitted(6400) - found.fitted(3200) == pytest.approx(found.gain, rel=1e-9)


@pytest.mark.parametrize("settings", [{}, {"scatter": 0.2}, {"scatter": 0.2, "n_repeats": 3}, {"c": 1.0, "b": 20.0}, {"b": 0.0}])
def test_the_error_of_the_gain_is_right(settings):
    """Pulls of the gain over repetitions: a bias below one sd, from the prior of the exponent, and no wider than the errors say."""
    values = {"b": 2.0, "c": 0.5} | {k: v for k, v in settings.items() if k in ("b", "c")}
    exact = values["b"] * (3200.0 ** -values["c"] - 6400.0 ** -values["c"])
    pulls = np.array([(f.gain - exact) / f.gain_err for f in (law(k, **settings) for k in range(36))])
    assert abs(pulls.mean()) < 1 and pulls.std() < 1 + 4 / np.sqrt(2 * 36) and np.abs(pulls).max() < 5


def test_a_larger_training_scatter_makes_the_error_larger():
    assert law(1, scatter=3.0).gain_err > 2 * law(1).gain_err
    assert law(1, scatter=3.0).answer == "cannot tell"


def test_finished_trainings_are_kept(tmp_path):
    pairs = training_set(SIMULATOR, 600, seed=1)
    sizes = {"sizes": [50, 100, 200], "n_held_out": 200, "n_repeats": 1, "cache": tmp_path / "cache"}
    Regression.n_fits = 0
    first = learning_curve(Regression, pairs, **sizes)
    assert Regression.n_fits == 3 and len(list((tmp_path / "cache").iterdir())) == 3
    again = learning_curve(Regression, pairs, **sizes)
    assert Regression.n_fits == 3 and again.score.tolist() == first.score.tolist()
    learning_curve(Regression, pairs, **(sizes | {"sizes": [50, 100, 200, 400]}))
    assert Regression.n_fits == 4  # only the new size
    damaged = next((tmp_path / "cache").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert learning_curve(Regression, pairs, **sizes).score.tolist() == first.score.tolist() and Regression.n_fits in (4, 5)
    moved = (pairs[0] + 1e-9, pairs[1])
    learning_curve(Regression, moved, **sizes)
    assert Regression.n_fits >= 7  # other data
    with pytest.raises(SettingError, match="expected, for a cache, `settings` or a repr"):
        learning_curve(lambda s: Law(s), pairs, **sizes)


def test_weights_of_an_embedding_belong_to_the_key(tmp_path):
    import torch

    prior = SIMULATOR.prior
    pairs = training_set(SIMULATOR, 260, seed=1)

    def make(scale):
        module = torch.nn.Linear(2, 4)
        torch.nn.init.constant_(module.weight, scale)
        torch.nn.init.constant_(module.bias, 0.0)
        return lambda seed: sp.NPE(prior, seed=seed, embedding=module, config=sp.TrainConfig(max_epochs=1))

    # the module is trained with the estimator: take the scores of the first call of each
    keys = {learning_curve(make(s), pairs, [40, 80, 160], n_held_out=100, n_repeats=1, cache=tmp_path / str(s)).gain for s in (0.1, 0.2)}
    names = [{p.name for p in (tmp_path / str(s)).iterdir()} for s in (0.1, 0.2)]
    assert len(keys) == 2 and not names[0] & names[1]


def test_default_sizes_double_and_a_store_is_taken(tmp_path):
    store = sp.simulate(SIMULATOR, 740, tmp_path / "store")
    found = learning_curve(Regression, store, n_held_out=100)
    assert found.sizes.tolist() == [20, 40, 80, 160, 320, 640]
    assert learning_curve(Regression, str(store.path), n_held_out=100).gain == found.gain


def test_bad_input():
    theta, x = training_set(SIMULATOR, 300)
    with pytest.raises(SettingError, match="make_estimator is a int"):
        learning_curve(3, (theta, x))
    with pytest.raises(SettingError, match="at least 3 rising numbers"):
        learning_curve(Regression, (theta, x), [50, 20, 100], n_held_out=100)
    with pytest.raises(SettingError, match="at least 3 rising numbers"):
        learning_curve(Regression, (theta, x), [50, 100], n_held_out=100)
    with pytest.raises(DataError, match="sizes ends at 201; expected at most 200"):
        learning_curve(Regression, (theta, x), [50, 100, 201], n_held_out=100)
    with pytest.raises(DataError, match="simulations has 300 rows and n_held_out is 300"):
        learning_curve(Regression, (theta, x), n_held_out=300)
    with pytest.raises(SettingError, match="simulations is a ndarray"):
        learning_curve(Regression, theta)

    class Cut(Regression):
        def log_prob(self, theta, x):
            return np.where(theta[:, 0] > 1, -np.inf, 0.0)

    with pytest.raises(DataError, match="training 0 on 50 simulations has no density at"):
        learning_curve(Cut, (theta, x), [50, 100, 200], n_held_out=100)
