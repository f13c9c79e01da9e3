"""Event-wise unfolding against conjugate Gaussians: event posteriors, their ranks, the iterations' recursion, and bad input."""

import time

import numpy as np
import pytest
from scipy.stats import kstest, norm, wasserstein_distance

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.training.loop import TrainConfig
from sbi_phys.unfold.flow import FlowUnfolder, bootstrap_flow
from tests.unfold.omnifold_oracle import gaussian_recursion, moments

# the IcINN toy: simulation N(4, 4), data N(10, 3.8), reco = truth + N(-6, 3)
BIAS, SMEAR = -6.0, 3.0
QUICK = TrainConfig(max_epochs=2, batch_size=64)
SMALL = FlowConfig(kind="affine", n_layers=1, hidden=16)


def pairs(n: int, mean: float, sd: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = rng_for(seed, "pairs")
    truth = mean + sd * rng.standard_normal(n)
    return truth, truth + BIAS + SMEAR * rng.standard_normal(n)


def posterior(y: np.ndarray, mean: float, sd: float) -> tuple[np.ndarray, float]:
    """Exact p(truth | y): mean and sd."""
    v, s2 = sd**2, SMEAR**2
    return (s2 * mean + v * (y - BIAS)) / (v + s2), float(np.sqrt(v * s2 / (v + s2)))


@pytest.fixture(scope="module")
def trained() -> FlowUnfolder:
    return FlowUnfolder(seed=0, device="cpu").fit(*pairs(8000, 4, 4, 0))


def test_event_posteriors_are_exact(trained: FlowUnfolder) -> None:
    y = np.array([-8.0, -2.0, 3.0])
    draws = trained.sample(y, 4000, seed=1)
    assert draws.shape == (3, 4000, 1)
    mean, sd = posterior(y, 4, 4)
    quantiles = norm.ppf((np.arange(4000) + 0.5) / 4000)
    for drawn, centre in zip(draws[:, :, 0], mean, strict=True):
        assert wasserstein_distance(drawn, centre + sd * quantiles) < 0.25


def test_event_wise_pit_is_uniform_and_sees_a_shift(trained: FlowUnfolder) -> None:
    """Ranks of truths moved by a third of the posterior's width are far from uniform."""
    truth, reco = pairs(1500, 4, 4, 5)
    draws = trained.sample(reco, 199, seed=2)[:, :, 0]
    pit = ((draws < truth[:, None]).sum(axis=1) + 0.5) / 200
    assert kstest(pit, "uniform").pvalue > 1e-3
    shifted = ((draws < truth[:, None] + 0.8).sum(axis=1) + 0.5) / 200
    assert kstest(shifted, "uniform").pvalue < 1e-6


def test_density_is_normalised_in_the_truths_units(trained: FlowUnfolder) -> None:
    truth, reco = pairs(2000, 4, 4, 6)
    mean, sd = posterior(reco, 4, 4)
    assert abs(np.mean(norm.logpdf(truth, mean, sd) - trained.log_prob(truth, reco))) < 0.03
    grid = np.linspace(-20, 28, 2001)
    density = np.exp(trained.log_prob(grid, np.full(2001, 1.0)))
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=2e-3)


def test_iterations_follow_the_recursion() -> None:
    """Two iterations on 8000 events; one leaves the mean at 7.84, two at 9.19."""
    truth, reco = pairs(8000, 4, 4, 1)
    data = pairs(8000, 10, 3.8, 2)[1]
    unfolder = FlowUnfolder(seed=0, device="cpu", flow=SMALL).fit(truth, reco, data, n_iterations=2)
    for k, record in enumerate(unfolder.iterations):
        mean, sd = gaussian_recursion(4, 16, 10, 3.8**2, 9, k + 1)
        assert record.iteration == k + 1
        assert record.mean[0] == pytest.approx(mean, abs=0.3) and record.sd[0] == pytest.approx(sd, abs=0.3)
    assert unfolder.iterations[0].separation > 0.05 and unfolder.iterations[1].effective_sample_size < 0.6 * len(unfolder.weights)
    assert moments(truth, unfolder.weights) == pytest.approx((unfolder.iterations[1].mean[0], unfolder.iterations[1].sd[0]), abs=0.4)


def test_the_recursion_is_the_published_one() -> None:
    found = [gaussian_recursion(4, 16, 10, 3.8**2, 9, k) for k in (1, 3, 5)]
    assert np.round(found, 3).tolist() == [[7.84, 3.919], [9.701, 3.844], [9.957, 3.817]]


def test_two_dimensions_and_an_extra_column_of_reco() -> None:
    """Smearing that depends on a third measured quantity: the posterior's width follows it."""
    rng = rng_for(3)
    truth = rng.standard_normal((6000, 2))
    quality = rng.uniform(0.2, 1.5, 6000)
    reco = np.column_stack([truth + quality[:, None] * rng.standard_normal((6000, 2)), quality])
    unfolder = FlowUnfolder(seed=0, device="cpu", flow=FlowConfig(kind="affine", n_layers=2, hidden=16)).fit(truth, reco)
    draws = unfolder.sample([[0.5, -0.5, 0.3], [0.5, -0.5, 1.4]], 2000)
    for k, s in enumerate((0.3, 1.4)):
        assert draws[k].std(axis=0) == pytest.approx(np.full(2, s / np.hypot(1, s)), rel=0.15)
        assert draws[k].mean(axis=0) == pytest.approx(np.array([0.5, -0.5]) / (1 + s**2), abs=0.12)


def test_missed_events_are_left_out_and_weighted_in() -> None:
    truth, reco = pairs(3000, 4, 4, 1)
    seen = truth > 2
    data = reco[seen][:900]
    unfolder = FlowUnfolder(seed=0, device="cpu", config=QUICK, flow=SMALL)
    unfolder.fit(truth, np.where(seen, reco, np.nan), data, reco_pass=seen)
    assert unfolder.weights.shape == (3000,) and np.isfinite(unfolder.weights).all() and (unfolder.weights > 0).all()
    assert unfolder.weights[seen].sum() == pytest.approx(900, rel=0.01)


def test_equal_seeds_give_equal_draws() -> None:
    truth, reco = pairs(400, 4, 4, 1)
    first, again, other = (
        FlowUnfolder(seed=s, device="cpu", config=QUICK, flow=SMALL, n_ensemble=2).fit(truth, reco).sample(reco[:5], 3, seed=1)
        for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert first.shape == (5, 3, 1) and np.abs(first - other).max() > 1e-6


def test_weights_change_the_prior() -> None:
    """Reweighting N(4, 4) to N(6, 4) by hand shifts the event posterior by 9/25 of two units."""
    truth, reco = pairs(8000, 4, 4, 4)
    weights = np.exp((truth - 4) / 8)
    unfolder = FlowUnfolder(seed=0, device="cpu", flow=SMALL).fit(truth, reco, weights=weights)
    mean, _ = posterior(np.array([0.0]), 6, 4)
    assert unfolder.sample([0.0], 4000)[0].mean() == pytest.approx(mean[0], abs=0.25)
    assert posterior(np.array([0.0]), 4, 4)[0][0] < mean[0] - 0.5


def test_background_is_taken_off_by_weights_of_the_data() -> None:
    """A fifth of the data is background at reco 3 +- 1: the weights are the exact signal probability, and the moments those without it."""
    (truth, reco), (_, signal) = pairs(6000, 4, 4, 7), pairs(4000, 5, 3.8, 8)
    rng = rng_for(9, "background")
    data, extra = np.concatenate([signal, 3 + rng.standard_normal(1000)]), 3 + rng.standard_normal(3000)
    quick = TrainConfig(max_epochs=4, batch_size=256)
    with_it, without = (
        FlowUnfolder(seed=0, device="cpu", flow=SMALL, config=quick).fit(truth, reco, data, background=b, background_weights=w)
        for b, w in ((extra, np.full(3000, 1 / 3)), (None, None))
    )
    clean = FlowUnfolder(seed=0, device="cpu", flow=SMALL, config=quick).fit(truth, reco, signal)
    weights = with_it.data_weights
    assert weights.sum() == pytest.approx(4000) and (weights >= 0).all() and (weights <= 1.1).all()
    density = 0.8 * norm.pdf(data, 5 + BIAS, np.hypot(3.8, SMEAR))
    exact = density / (density + 0.2 * norm.pdf(data, 3, 1))
    assert np.abs(weights - exact).mean() < 0.05
    assert with_it.iterations[0].mean[0] == pytest.approx(clean.iterations[0].mean[0], abs=0.15)
    assert without.iterations[0].mean[0] > clean.iterations[0].mean[0] + 0.4  # the test sees what it is for
    assert with_it.weights.sum() == pytest.approx(4000, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"background_weights": np.ones(3)}, DataError, "without background"),
        ({"background": np.zeros(5)}, ShapeError, "background has 5 rows and there are no data"),
        ({"data": np.zeros(300), "background": np.zeros((5, 2))}, ShapeError, "background has 2 columns and data 1"),
        ({"data": np.zeros(300), "background": np.zeros(400)}, DataError, "background adds up to 400 and data to 300"),
        ({"n_iterations": 2}, DataError, "data is None"),
        ({"n_iterations": 0}, SettingError, "n_iterations is 0"),
        ({"reco": np.zeros(3)}, ShapeError, "truth has 300 rows and reco 3"),
        ({"truth": np.full(300, np.nan)}, NonFiniteError, "truth has NaN"),
        ({"data": np.full(300, np.nan)}, NonFiniteError, "data has NaN"),
        ({"data": np.full(300, 500.0)}, DataError, "no overlap in reco column 0"),
        ({"data": np.zeros((300, 2))}, ShapeError, "data has 2 columns and reco 1"),
        ({"data": np.zeros(5)}, DataError, "data has 5 events"),
        ({"weights": -np.ones(300)}, DataError, "below 0"),
        ({"reco_pass": np.zeros(300)}, DataError, "0 of 300 simulated events"),
    ],
)
def test_bad_input_is_named(changes: dict[str, object], error: type[Exception], words: str) -> None:
    truth, reco = pairs(300, 4, 4, 0)
    with pytest.raises(error) as caught:
        FlowUnfolder(seed=0, config=QUICK, flow=SMALL).fit(**({"truth": truth, "reco": reco} | changes))  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_what_is_asked_of_a_trained_one(trained: FlowUnfolder) -> None:
    with pytest.raises(SettingError, match="not trained"):
        FlowUnfolder().sample([1.0])
    with pytest.raises(ShapeError, match="data has 2 columns; expected 1"):
        trained.sample(np.zeros((4, 2)))
    with pytest.raises(NonFiniteError, match="data"):
        trained.sample([np.nan])
    with pytest.raises(ShapeError, match="truth has shape"):
        trained.log_prob(np.zeros(3), np.zeros(4))
    with pytest.raises(SettingError, match="n is 0"):
        trained.sample([1.0], 0)


@pytest.mark.slow
def test_full_size_icinn() -> None:
    begin = time.perf_counter()
    truth, reco = pairs(100_000, 4, 4, 21)
    data_truth, data = pairs(100_000, 10, 3.8, 22)
    unfolder = FlowUnfolder(seed=0, device="cpu").fit(truth, reco, data, n_iterations=5)
    for record in unfolder.iterations:
        print(f"iteration {record.iteration}: mean {record.mean[0]:.3f} sd {record.sd[0]:.3f} ESS {record.effective_sample_size:.0f}")
    mean, sd = gaussian_recursion(4, 16, 10, 3.8**2, 9, 4)  # the prior that the fifth network was trained with
    y = np.quantile(data, [0.05, 0.25, 0.5, 0.75, 0.95])
    centre, width = posterior(y, mean, sd)
    quantiles = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    draws = unfolder.sample(y, 20_000, seed=3)[:, :, 0]
    distances = [wasserstein_distance(d, c + width * quantiles) for d, c in zip(draws, centre, strict=True)]
    ranks = unfolder.sample(data[:1000], 199, seed=4)[:, :, 0]
    pit = ((ranks < data_truth[:1000, None]).sum(axis=1) + 0.5) / 200
    print(f"W1 {np.round(distances, 3)}, PIT p {kstest(pit, 'uniform').pvalue:.3f}, {time.perf_counter() - begin:.0f} s")
    assert unfolder.iterations[-1].mean[0] == pytest.approx(9.957, abs=0.10)
    assert unfolder.iterations[-1].sd[0] == pytest.approx(3.817, abs=0.10)
    assert max(distances) < 0.15


def test_bootstrap_keeps_its_sources_apart() -> None:
    truth, reco = pairs(500, 4, 4, 1)
    data = pairs(400, 5, 3.8, 2)[1]
    replicas = bootstrap_flow(truth, reco, data, n_replicas=3, device="cpu", config=QUICK, flow=SMALL)
    found = replicas.covariance(lambda w: [w.sum(), np.average(truth, weights=w)])
    assert replicas.n_replicas == 3 and replicas.data.shape == replicas.training.shape == (3, 500)
    assert found.values[0] == pytest.approx(400, rel=1e-3)
    # totals follow the data alone: their spread is sqrt(400), known to 50 % from three replicas
    assert 8 < np.sqrt(found.data[0, 0]) < 45
    assert np.sqrt(found.simulation[0, 0]) < 1 and np.sqrt(found.training[0, 0]) < 1
    assert (replicas.simulation == 0).mean() == pytest.approx(np.exp(-1), abs=0.05)
    assert (found.error > 0).all()
