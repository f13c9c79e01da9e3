"""Extended likelihood against closed forms; sets of any sizes; learned numbers of events; what must be refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sbi_phys as sp
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.extended_likelihood import EventSets, ExtendedLikelihood, fit_expected_counts
from sbi_phys.estimators.nle import NLE
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig

# theta = (rate, decay constant): n ~ Poisson(rate), x_e ~ Exp(lambda); log L = n log(rate lambda) - rate - lambda sum x
PRIOR = sp.BoxPrior([sp.Parameter("rate", 1.0, 200.0), sp.Parameter("decay", 0.2, 5.0)])


def log_density(x, theta):
    return np.where(x[:, 0] >= 0, np.log(theta[:, 1]) - theta[:, 1] * x[:, 0], -np.inf)


def expected(theta):
    return theta[:, 0]


def exact(events, theta, exposure=1.0):
    n, total = len(events), events.sum()
    return n * np.log(exposure * theta[:, 0] * theta[:, 1]) - exposure * theta[:, 0] - theta[:, 1] * total


LIKELIHOOD = ExtendedLikelihood(log_density, expected)


def test_closed_form_for_any_number_of_events(monkeypatch):
    theta = PRIOR.sample(30, rng_for(0))
    for n in (0, 1, 500):
        events = rng_for(n).exponential(1.0, (n, 1))
        np.testing.assert_allclose(LIKELIHOOD.log_likelihood(events, theta), exact(events, theta), rtol=1e-12)
        monkeypatch.setattr("sbi_phys.estimators.extended_likelihood._PAIRS", 137)  # in chunks of events and theta
        np.testing.assert_allclose(LIKELIHOOD.log_likelihood(events, theta), exact(events, theta), rtol=1e-12)
        monkeypatch.undo()


def test_an_empty_set_is_data():
    theta = PRIOR.sample(5, rng_for(0))
    for empty in ([], np.zeros((0, 1))):
        np.testing.assert_allclose(LIKELIHOOD.log_likelihood(empty, theta), -theta[:, 0])
    nothing = ExtendedLikelihood(log_density, lambda t: np.zeros(len(t)))
    assert nothing.log_likelihood([], theta).tolist() == [0.0] * 5
    assert (nothing.log_likelihood([[1.0]], theta) == -np.inf).all()


def test_exposure_multiplies_the_number():
    theta, events = PRIOR.sample(5, rng_for(0)), np.array([[0.5], [1.5]])
    twice = ExtendedLikelihood(log_density, expected, exposure=2.0)
    np.testing.assert_allclose(twice.log_likelihood(events, theta), exact(events, theta, 2.0))
    np.testing.assert_allclose(twice.expected_counts(theta), 2 * theta[:, 0])
    many = LIKELIHOOD.log_likelihood_sets([events, events[:1]], theta[:2], exposure=[2.0, 3.0])
    np.testing.assert_allclose(many, [exact(events, theta[:1], 2.0)[0], exact(events[:1], theta[1:2], 3.0)[0]])


@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6), width=st.integers(1, 3))
def test_three_ways_to_hand_over_sets(sizes, width):
    """A list, ends to end with offsets, and a padded batch are the same sets."""
    arrays = [rng_for(7, i).random((n, width)) for i, n in enumerate(sizes)]
    sets = EventSets.of(arrays)
    if not sum(sizes):
        assert len(sets.flat) == 0
        return
    again = EventSets.from_padded(*sets.padded())
    pair = EventSets.of((np.concatenate(arrays), sets.offsets))
    for other in (again, pair, EventSets.of(sets)):
        assert (other.flat == sets.flat).all() and (other.offsets == sets.offsets).all()
    assert sets.sizes.tolist() == sizes
    assert [len(a) for a in arrays] == np.bincount(sets.owner, minlength=len(sizes)).tolist()


def test_a_batch_of_sets_is_each_set_on_its_own():
    sizes = rng_for(1).poisson(20, 50)
    sizes[7] = 0
    sets = [rng_for(2, i).exponential(1.0, (n, 1)) for i, n in enumerate(sizes)]
    theta = PRIOR.sample(50, rng_for(3))
    found = LIKELIHOOD.log_likelihood_sets(sets, theta)
    single = [LIKELIHOOD.log_likelihood(s, t[None])[0] for s, t in zip(sets, theta, strict=True)]
    np.testing.assert_allclose(found, single, rtol=1e-12)
    at_one = LIKELIHOOD.log_likelihood_sets(sets, theta[0])
    np.testing.assert_allclose(at_one, [LIKELIHOOD.log_likelihood(s, theta[:1])[0] for s in sets], rtol=1e-12)


def test_the_posterior_is_a_product_of_gammas():
    """Flat priors: rate ~ Gamma(n + 1, 1), decay ~ Gamma(n + 1, sum x), wide of the box's edges."""
    events = rng_for(4).exponential(0.7, (60, 1))
    found = LIKELIHOOD.posterior(events, 3000, prior=PRIOR, seed=0)
    shape, total = len(events) + 1, events.sum()
    for column, scale in ((0, 1.0), (1, 1 / total)):
        mean, sd = shape * scale, math.sqrt(shape) * scale
        assert found.theta[:, column].mean() == pytest.approx(mean, abs=5 * sd / math.sqrt(3000))
        assert found.theta[:, column].std() == pytest.approx(sd, rel=5 / math.sqrt(6000))


def test_a_million_events():
    events = rng_for(5).exponential(1.0, (10**6, 1))
    theta = np.array([[100.0, 1.0], [50.0, 1.001]])
    np.testing.assert_allclose(LIKELIHOOD.log_likelihood(events, theta), exact(events, theta), rtol=1e-12)


@pytest.fixture(scope="module")
def learned():
    theta = PRIOR.sample(4000, rng_for(0, "theta"))
    x = rng_for(0, "x").exponential(1 / theta[:, 1])[:, None]
    settings = {"flow": FlowConfig(n_layers=3, hidden=32), "embedding": EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)}
    return NLE(PRIOR, seed=1, device="cpu", x_transform="log", config=sp.TrainConfig(max_epochs=8, batch_size=128), **settings).fit(
        theta, x
    )


def test_a_learned_density_of_events(learned):
    """Close to the exact one per event; the same for a set, for a batch of sets, and by hand."""
    theta = PRIOR.sample(6, rng_for(8))
    sets = [rng_for(9, i).exponential(1 / t[1], (n, 1)) for i, (t, n) in enumerate(zip(theta, (0, 3, 50, 1, 7, 20), strict=True))]
    with_net = ExtendedLikelihood(learned, expected)
    found = with_net.log_likelihood_sets(sets, theta)
    by_hand = [
        n * np.log(t[0]) - t[0] + (learned.log_likelihood(s, t, event_set=True)[0] if n else 0)
        for s, t, n in zip(sets, theta, map(len, sets), strict=True)
    ]
    np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(
        found, [with_net.log_likelihood(s, t[None])[0] for s, t in zip(sets, theta, strict=True)], rtol=1e-5, atol=1e-3
    )
    error = found - np.array([exact(s, t[None])[0] for s, t in zip(sets, theta, strict=True)])
    assert np.abs(error / np.sqrt(np.maximum(1, [len(s) for s in sets]))).max() < 1.0
    with pytest.raises(SupportError):
        with_net.log_likelihood(sets[1], [[300.0, 1.0]])
    with pytest.raises(DataError, match="expected values > 0"):
        with_net.log_likelihood([[-1.0]], theta)


class Ratio:
    """Has the interface of a ratio estimator: log p(x | theta) - log p(x) with p(x) = Exp(1)."""

    def log_ratio(self, x, theta, *, event_set=False):
        x, theta = np.asarray(x), np.asarray(theta)
        if not event_set:
            return log_density(x, theta) + x[:, 0]
        return np.array([(log_density(x, np.tile(t, (len(x), 1))) + x[:, 0]).sum() for t in theta])


def test_a_ratio_gives_the_same_up_to_a_constant():
    theta = PRIOR.sample(6, rng_for(8))
    sets = [rng_for(9, i).exponential(1.0, (5, 1)) for i in range(6)]
    ratio = ExtendedLikelihood(Ratio(), expected)
    one = ratio.log_likelihood(sets[0], theta) - LIKELIHOOD.log_likelihood(sets[0], theta)
    np.testing.assert_allclose(one, sets[0].sum())
    many = ratio.log_likelihood_sets(sets, theta) - LIKELIHOOD.log_likelihood_sets(sets, theta)
    np.testing.assert_allclose(many, [s.sum() for s in sets])


def test_learned_numbers_of_events():
    """nu = exposure a e^(b): relative error well below the Poisson error of one data set, deviance about 1."""
    prior = sp.BoxPrior([sp.Parameter("a", 20.0, 200.0), sp.Parameter("b", -1.0, 1.0)])
    theta = prior.sample(4000, rng_for(0))
    exposure = rng_for(1).uniform(0.5, 2.0, 4000)
    n = rng_for(2).poisson(exposure * theta[:, 0] * np.exp(theta[:, 1]))
    nu = fit_expected_counts(theta, n, prior, exposure=exposure, config=sp.TrainConfig(max_epochs=30, batch_size=256))
    assert nu.deviance == pytest.approx(1.0, abs=0.3)
    new = prior.sample(1000, rng_for(3))
    ratio = nu(new) / (new[:, 0] * np.exp(new[:, 1]))
    assert np.sqrt(np.mean((ratio - 1) ** 2)) < 0.03
    with pytest.raises(SupportError):
        nu([[300.0, 0.0]])


def test_a_likelihood_that_is_not_resolved_shows_in_the_deviance():
    """Numbers with twice the Poisson variance are no Poisson numbers."""
    prior = sp.BoxPrior([sp.Parameter("a", 20.0, 200.0)])
    theta = prior.sample(1000, rng_for(0))
    n = rng_for(1).poisson(theta[:, 0] * rng_for(2).gamma(100, 0.01, 1000)) + rng_for(3).poisson(1, 1000) * 30
    assert fit_expected_counts(theta, n, prior, config=sp.TrainConfig(max_epochs=10)).deviance > 3


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ExtendedLikelihood("density", expected), SettingError, "expected an NLE"),
        (lambda: ExtendedLikelihood(log_density, 5.0), SettingError, "expected a function"),
        (lambda: ExtendedLikelihood(log_density, expected, exposure=0.0), SettingError, "exposure"),
        (lambda: LIKELIHOOD.log_likelihood_sets([], [[5.0, 1.0]]), DataError, "no event sets"),
        (lambda: LIKELIHOOD.log_likelihood_sets([np.ones((2, 1)), np.ones((2, 2))], [[5.0, 1.0]]), ShapeError, "set 1 has shape .2, 2."),
        (lambda: LIKELIHOOD.log_likelihood_sets([np.ones((2, 1))] * 3, [[5.0, 1.0]] * 2), ShapeError, "2 rows for 3"),
        (lambda: LIKELIHOOD.log_likelihood_sets((np.ones((3, 1)), [0, 2]), [[5.0, 1.0]]), DataError, "offsets"),
        (lambda: LIKELIHOOD.log_likelihood_sets([[[1.0]]], [[5.0, 1.0]], exposure=[-1.0]), SettingError, "exposure"),
        (lambda: LIKELIHOOD.log_likelihood_sets([[[np.nan]]], [[5.0, 1.0]]), NonFiniteError, "set"),
        (
            lambda: ExtendedLikelihood(lambda x, t: x[:, 0] * np.nan, expected).log_likelihood([[1.0]], [[5.0, 1.0]]),
            NonFiniteError,
            "event 0",
        ),
        (lambda: ExtendedLikelihood(log_density, lambda t: -t[:, 0]).log_likelihood([], [[5.0, 1.0]]), DataError, "a number >= 0"),
        (lambda: fit_expected_counts([[5.0, 1.0]] * 30, [-1.0] * 30, PRIOR), DataError, "numbers >= 0"),
        (lambda: fit_expected_counts([[5.0, 1.0]] * 5, [1.0] * 5, PRIOR), DataError, "at least 20"),
    ],
)
def test_what_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_events_outside_the_support_are_named():
    bounded = ExtendedLikelihood(log_density, expected, support=([0.0], [10.0]))
    with pytest.raises(DataError, match=r"2 of 4 events .* event 1 = \[11.0\]"):
        bounded.log_likelihood([[1.0], [11.0], [2.0], [-1.0]], [[5.0, 1.0]])
    with pytest.raises(DataError, match=r"event 0 of set 1 = \[11.0\]"):
        bounded.log_likelihood_sets([[[1.0]], [[11.0], [2.0]]], [[5.0, 1.0]])
    # without a support, an event of zero density is a likelihood of zero
    assert LIKELIHOOD.log_likelihood([[-1.0]], [[5.0, 1.0]])[0] == -np.inf
    naughty = ExtendedLikelihood(lambda x, t: np.where(x[:, 0] > 2, np.nan, 0.0), expected)
    with pytest.raises(NonFiniteError, match="event 1 of set 1"):
        naughty.log_likelihood_sets([[[1.0]], [[1.0], [3.0]]], [[5.0, 1.0]])
