"""OmniFold against expectation maximisation on a grid: acceptance, fakes, background; its errors, and what it refuses."""

import re
import time

import numpy as np
import pytest
import torch
from scipy.stats import norm

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.training.loop import TrainConfig
from sbi_phys.unfold.omnifold_weights import OmniFold, bootstrap_omnifold, omnifold
from sbi_phys.unfold.replicas import WeightReplicas
from tests.unfold import omnifold_oracle as oracle

QUICK = TrainConfig(max_epochs=3, batch_size=128)


def run(events: oracle.Toy, n_iterations: int, **settings: object) -> OmniFold:
    return omnifold(events.truth, events.reco, events.data, n_iterations, events.reco_pass, events.truth_pass, device="cpu", **settings)


@pytest.fixture(scope="module")
def plain() -> OmniFold:
    return run(oracle.toy(12_000, 3), 3, seed=1)


# against the grid


def test_grid_and_gaussian_recursion_agree() -> None:
    mean, sd, total, _ = oracle.exact(4)
    assert (mean, sd) == pytest.approx(oracle.gaussian_recursion(0, 1, 0.2, 0.64, 0.25, 4), abs=1e-5)
    assert (round(mean, 4), round(sd, 4), round(total, 4)) == (0.1993, 0.8075, 1.0)


def test_plain_toy(plain: OmniFold) -> None:
    """Three iterations on 12 000 events; the statistical error of mean and sd is about 0.012."""
    mean, sd, _, _ = oracle.exact(3)
    assert oracle.moments(plain.truth[:, 0], plain.weights) == pytest.approx((mean, sd), abs=0.035)
    assert plain.weights.sum() == pytest.approx(12_000, rel=1e-4)
    assert 0.85 < plain.effective_sample_size / plain.truth_pass.sum() <= 1
    assert oracle.triangular(plain.truth[:, 0], plain.weights) < 3


@pytest.mark.parametrize("efficiency", [oracle.flat, oracle.turn_on])
def test_missed_events(efficiency) -> None:
    events = oracle.toy(8000, 5, efficiency)
    result = run(events, 3, seed=2)
    mean, sd, total, _ = oracle.exact(3, efficiency)
    assert oracle.moments(result.truth[:, 0], result.weights) == pytest.approx((mean, sd), abs=0.04)
    assert result.weights.sum() / 8000 == pytest.approx(total, abs=0.05)
    assert result.smooth == ("(smooth)" in result.summary()) == (efficiency is oracle.turn_on)


def test_the_tolerance_tells_the_biased_treatment_of_missed_events() -> None:
    """The power of the test above: missed events at weight one are off by more than what it allows."""
    right, wrong = (np.array(oracle.exact(4, oracle.turn_on, missed=missed)) for missed in ("mean", "one"))
    assert np.abs(right - wrong)[:2].max() > 0.1
    assert oracle.exact(200, oracle.flat, missed="one")[:2] == pytest.approx((0.174, 0.839), abs=0.002)
    assert oracle.exact(200, oracle.flat)[:2] == pytest.approx((0.2, 0.8), abs=0.002)


@pytest.mark.parametrize("fitted", [False, True])
def test_fakes(fitted: bool) -> None:
    events = oracle.toy(8000, 7, fakes=0.1)
    result = run(events, 2, seed=3, fit_fakes=fitted)
    mean, sd, total, fake_scale = oracle.exact(2, fakes=0.1, fit_fakes=fitted)
    assert oracle.moments(result.truth[:, 0], result.weights) == pytest.approx((mean, sd), abs=0.04)
    assert result.weights.sum() / 8000 == pytest.approx(total, abs=0.03)
    assert (result.weights[~events.truth_pass] == 0).all()
    scale = result.nominal[0] * result.factors[~events.truth_pass]
    assert np.ptp(scale) == 0 and scale[0] == pytest.approx(fake_scale, rel=0.1 if fitted else 1e-6)


def test_fitted_fakes_are_lost_for_good_and_kept_ones_are_not() -> None:
    edges = np.linspace(-1.4, 1.8, 6)
    true = np.diff(norm.cdf(edges, oracle.MEAN, oracle.SD))
    found = {f: oracle.exact_counts(edges, 50, fakes=0.1, background=0.1, fit_fakes=f) / true for f in (False, True)}
    assert np.abs(found[False] - 1).max() < 0.002 and (found[True] > 1.009).all()
    assert oracle.exact(50, fakes=0.1, background=0.1, fit_fakes=True)[3] < 0.85


def test_background_is_taken_off() -> None:
    events = oracle.toy(7000, 8, background=0.1)
    half = np.full(len(events.background), 0.5)
    with_it = run(events, 2, seed=3, background=events.background, background_weights=half)
    mean, sd, total, _ = oracle.exact(2, background=0.1)
    assert oracle.moments(with_it.truth[:, 0], with_it.weights) == pytest.approx((mean, sd), abs=0.04)
    assert with_it.weights.sum() / 7000 == pytest.approx(total, abs=0.03)
    without = run(events, 1, seed=3)
    assert oracle.moments(without.truth[:, 0], without.weights)[0] > mean + 0.045


def test_two_dimensions_with_correlated_smearing() -> None:
    rng = rng_for(0, "two")
    smear = np.array([[0.3, 0.0], [0.2, 0.25]])
    n, target = 10_000, np.array([[0.9, 0.0], [0.45, 0.7]])
    truth = rng.standard_normal((n, 2))
    other = np.array([0.3, -0.2]) + rng.standard_normal((n, 2)) @ target.T
    reco, data = (t + rng.standard_normal((n, 2)) @ smear.T for t in (truth, other))
    result = omnifold(truth, reco, data, 3, seed=0, device="cpu")
    got = np.cov(truth.T, aweights=result.weights)
    assert np.average(truth, axis=0, weights=result.weights) == pytest.approx([0.3, -0.2], abs=0.05)
    assert np.sqrt(np.diag(got)) == pytest.approx(np.sqrt(np.diag(target @ target.T)), abs=0.05)
    assert got[0, 1] / np.sqrt(got[0, 0] * got[1, 1]) == pytest.approx(0.45 * 0.9 / (0.9 * np.hypot(0.45, 0.7)), abs=0.06)


def test_closure_leaves_the_simulation_as_it_is() -> None:
    events = oracle.toy(8000, 9)
    rng = rng_for(1)
    data = rng.standard_normal(8000) + oracle.SMEAR * rng.standard_normal(8000)
    result = omnifold(events.truth, events.reco, data, 2, device="cpu")
    assert np.sqrt(np.mean((result.factors - 1) ** 2)) < 0.12
    assert result.history[0].separation_reco < 0.005


# weights, seeds, words


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(oracle.toy(400, 0), 1, config=QUICK)
    assert torch.equal(torch.rand(3), expected)


def test_a_common_factor_of_the_nominal_weights_cancels() -> None:
    events = oracle.toy(600, 1)
    one, two = (run(events, 1, weights=np.full(600, w), config=QUICK) for w in (1.0, 4.0))
    np.testing.assert_allclose(one.weights, two.weights, rtol=1e-12)
    assert two.nominal.sum() == pytest.approx(600)


def test_data_weights_count_as_events() -> None:
    events = oracle.toy(600, 1)
    result = run(events, 1, data_weights=np.full(600, 2.5), config=QUICK)
    assert result.weights.sum() == pytest.approx(1500, rel=1e-4)


def test_equal_seeds_give_equal_weights() -> None:
    events = oracle.toy(600, 1)
    first, again, other = (run(events, 2, seed=seed, config=QUICK, n_ensemble=2).weights for seed in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-6


def test_history_words_and_plain_values(plain: OmniFold) -> None:
    assert [record.iteration for record in plain.history] == [1, 2, 3] and plain.n_iterations == 3
    assert plain.history[0].separation_reco > plain.history[2].separation_reco
    assert plain.history[0].change > plain.history[2].change
    weights = plain.weights
    assert plain.effective_sample_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert plain.history[-1].effective_sample_size == pytest.approx(plain.effective_sample_size)
    assert "3 iterations" in plain.summary()


def test_plot(plain: OmniFold) -> None:
    ax = plain.plot(bins=20)
    steps = [patch.get_data().values for patch in ax.patches]
    assert len(steps) == 2 and steps[1].sum() == pytest.approx(plain.weights.sum(), rel=1e-6)
    with pytest.raises(SettingError, match="column"):
        plain.plot(column=1)


# what it refuses, and says


def call(**changes: object) -> OmniFold:
    events = oracle.toy(300, 2)
    values: dict[str, object] = {"truth": events.truth, "reco": events.reco, "data": events.data, "n_iterations": 1, "config": QUICK}
    return omnifold(**(values | changes))  # type: ignore[arg-type]


def spoilt(n: int, row: int, value: float) -> np.ndarray:
    array = np.linspace(0, 1, n)
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"reco": np.zeros(299)}, ShapeError, "truth has rows (300,), reco has (299,)"),
        ({"truth": spoilt(300, 7, np.nan)}, NonFiniteError, "truth has NaN or Inf in 1 of 300 rows, first nan at index (7, 0)"),
        ({"reco": spoilt(300, 8, np.inf)}, NonFiniteError, "reco has NaN or Inf"),
        ({"data": spoilt(300, 9, np.nan)}, NonFiniteError, "data has NaN or Inf"),
        ({"data": np.zeros((300, 2))}, ShapeError, "data has 2 columns and reco 1"),
        ({"data": np.zeros((3, 3, 3))}, ShapeError, "data has shape (3, 3, 3)"),
        ({"data": np.zeros(20)}, DataError, "data has 20 events; expected at least 100"),
        ({"weights": spoilt(300, 3, -1.0)}, DataError, "weights has 1 of 300 entries below 0, first -1 at row 3"),
        ({"data_weights": spoilt(300, 3, -1.0)}, DataError, "data_weights has 1 of 300 entries below 0"),
        ({"weights": np.zeros(300)}, DataError, "weights is 0 in all 300 rows"),
        ({"weights": np.ones(5)}, ShapeError, "weights has shape (5,); expected (300,)"),
        ({"reco_pass": np.zeros(300)}, DataError, "the efficiency is 0"),
        ({"reco_pass": np.arange(300) < 50}, DataError, "50 of 300 simulated events pass"),
        ({"truth_pass": np.zeros(300)}, DataError, "truth_pass is False"),
        ({"reco_pass": np.full(300, 0.5)}, DataError, "reco_pass is 0.5 at row 0; expected True or False"),
        ({"data": np.linspace(50, 60, 300)}, DataError, "no overlap in reco column 0: data within [50, 60]"),
        ({"background": np.zeros(300)}, DataError, "background adds up to 300 and data to 300"),
        ({"background": np.zeros((30, 2))}, ShapeError, "background has 2 columns"),
        ({"background_weights": np.ones(3)}, DataError, "without background"),
        ({"n_iterations": 0}, SettingError, "n_iterations is 0"),
        ({"n_ensemble": 0}, SettingError, "n_ensemble is 0"),
        ({"fit_fakes": 1}, SettingError, "fit_fakes is 1; expected True or False"),
        ({"smooth": 1}, SettingError, "smooth is 1; expected True, False or None"),
        ({"seed": -1}, SettingError, "seed is -1"),
        ({"config": {"max_epochs": 3}}, SettingError, "config is a dict"),
        ({"device": "tpu0"}, SettingError, "device"),
    ],
)
def test_bad_input_is_named(changes: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call(**changes)
    assert words in str(caught.value)


def test_data_outside_the_simulation_are_located() -> None:
    data = np.concatenate([oracle.toy(300, 2).data, np.full(6, 40.0)])
    with pytest.warns(RuntimeWarning, match="data events lie") as caught:
        call(data=data)
    assert any(re.search(r"6 of 306 data events lie outside .* column 0, within \[40, 40\]", str(w.message)) for w in caught)


def test_a_gap_inside_the_simulation_is_located() -> None:
    """No column's range shows it: the simulation lies on a ring, data also at its centre."""
    rng = rng_for(6)
    angle = rng.uniform(0, 2 * np.pi, 4000)
    ring = np.stack([5 * np.cos(angle), 5 * np.sin(angle)], axis=1) + 0.1 * rng.standard_normal((4000, 2))
    centre = 0.05 * rng.standard_normal((400, 2))
    with pytest.warns(RuntimeWarning, match="denser than the simulation"):
        result = omnifold(ring, ring, np.concatenate([ring[:2000], centre]), 1, device="cpu")
    assert np.isfinite(result.weights).all()


def test_a_stretch_without_efficiency_is_located() -> None:
    events = oracle.toy(4000, 2)
    with pytest.warns(RuntimeWarning, match=r"the efficiency is 0 in truth column 0 within \[-"):
        result = omnifold(events.truth, events.reco, events.data, 1, reco_pass=events.truth > -1.2, config=QUICK, device="cpu")
    assert np.isfinite(result.weights).all()


# errors


@pytest.fixture(scope="module")
def replicas() -> WeightReplicas:
    events = oracle.toy(1000, 4, oracle.flat)
    return bootstrap_omnifold(events.truth, events.reco, events.data, 1, events.reco_pass, n_replicas=6, seed=2, device="cpu", config=QUICK)


def test_bootstrap_keeps_its_sources_apart(replicas: WeightReplicas) -> None:
    total = replicas.covariance(np.sum)
    n = 1000
    assert replicas.n_replicas == 6 and replicas.data.shape == replicas.simulation.shape == replicas.training.shape == (6, n)
    # counts of data fluctuate by sqrt(900), which 1 / 0.9 makes 33; six replicas know that to 32 %
    assert 12 < np.sqrt(total.data[0, 0]) < 70
    assert total.training[0, 0] < 0.2 * total.data[0, 0]
    assert total.total == pytest.approx(total.data + total.simulation)
    assert total.error[0] == pytest.approx(np.sqrt(total.total[0, 0]))
    assert total.values[0] == pytest.approx(replicas.weights.sum())


def test_bootstrap_of_the_simulation_leaves_events_out(replicas: WeightReplicas) -> None:
    left_out = (replicas.simulation == 0).mean()
    assert left_out == pytest.approx(np.exp(-1), abs=0.03)
    assert (replicas.data > 0).all()


def test_histogram_with_covariance(replicas: WeightReplicas) -> None:
    edges = np.linspace(-2, 2, 5)
    found = replicas.histogram(oracle.toy(1000, 4, oracle.flat).truth, edges)
    expected = np.histogram(oracle.toy(1000, 4, oracle.flat).truth, edges, weights=replicas.weights)[0]
    assert found.values == pytest.approx(expected) and found.total.shape == (4, 4)
    assert (np.linalg.eigvalsh(found.total) > -1e-6 * found.total.max()).all()
    assert (found.error > 0).all()


def test_one_replica_is_refused() -> None:
    events = oracle.toy(300, 2)
    with pytest.raises(SettingError, match="n_replicas is 1"):
        bootstrap_omnifold(events.truth, events.reco, events.data, n_replicas=1)


# full size


@pytest.mark.slow
def test_full_size_plain() -> None:
    begin = time.perf_counter()
    events = oracle.toy(100_000, 11)
    result = run(events, 4)
    seconds = time.perf_counter() - begin
    mean, sd = oracle.moments(result.truth[:, 0], result.weights)
    delta = oracle.triangular(result.truth[:, 0], result.weights)
    print(f"plain: mean {mean:.4f} sd {sd:.4f} Delta {delta:.3f}e-3 ESS {result.effective_sample_size:.0f} in {seconds:.0f} s")
    assert mean == pytest.approx(0.1993, abs=0.015) and sd == pytest.approx(0.8075, abs=0.012)
    assert delta < 0.5 and result.effective_sample_size > 0.85 * result.truth_pass.sum() and seconds < 120


@pytest.mark.slow
@pytest.mark.parametrize(("efficiency", "seeds"), [(oracle.flat, (12,)), (oracle.turn_on, (12, 13, 16))])
def test_full_size_missed_events(efficiency, seeds) -> None:
    """With the turn-on the mean of one toy has an error of at least 0.0085, were the form of the truth known: three are averaged.

    Among the three is the one of five (12 to 16) that is farthest off, 12, and the one that iterations without a smoothness prior lose: 16.
    Iterations with the exact response scatter by 0.021 (`benchmarks/unfolding_validation.py --only turn-on`).
    """
    found = []
    for seed in seeds:
        begin = time.perf_counter()
        result = run(oracle.toy(100_000, seed, efficiency), 10, seed=seed)
        found.append(oracle.moments(result.truth[:, 0], result.weights))
        total, seconds = result.weights.sum(), time.perf_counter() - begin
        print(f"{efficiency.__name__} {seed}: mean, sd {found[-1]}, total {total:.0f} in {seconds:.0f} s")
    mean, sd = np.mean(found, axis=0)
    assert mean == pytest.approx(0.20, abs=0.015) and sd == pytest.approx(0.80, abs=0.015)
