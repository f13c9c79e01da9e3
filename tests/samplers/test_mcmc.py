import numpy as np
import pytest

from sbi_phys.errors import ConvergenceError, DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.samplers.mcmc import run_emcee, spread_start


def normal(u):
    return -0.5 * (u**2).sum(axis=1)


def test_correlated_gaussian_in_eight_dimensions():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((8, 8))
    cov, mean = a @ a.T + 0.1 * np.eye(8), np.arange(8.0)
    precision = np.linalg.inv(cov)
    start = spread_start(
        lambda u: -0.5 * np.einsum("ni,ij,nj->n", u - mean, precision, u - mean), 10 * rng.standard_normal((1000, 8)), 36, rng
    )
    result = run_emcee(lambda u: -0.5 * np.einsum("ni,ij,nj->n", u - mean, precision, u - mean), start, n_samples=1500, n_groups=2, seed=1)
    assert result.converged
    assert result.samples.shape == (1500, 8)
    assert np.all(result.r_hat < 1.01)
    assert result.chains.shape[1] > 50 * result.autocorr_time.max()
    assert result.n_effective == pytest.approx(36 * result.chains.shape[1] / result.autocorr_time.max())
    white = (result.chains - mean) @ np.linalg.cholesky(precision)
    np.testing.assert_allclose(white.mean(axis=(0, 1)), 0, atol=5 / np.sqrt(result.n_effective))
    np.testing.assert_allclose((white**2).mean(axis=(0, 1)), 1, atol=5 * np.sqrt(2 / result.n_effective))
    # thinned draws: independent, so their scatter about the truth is that of as many independent ones
    z = (result.samples - mean) @ np.linalg.cholesky(precision)
    assert np.abs(z.mean(axis=0)).max() < 4.5 / np.sqrt(1500)
    np.testing.assert_allclose(result.log_prob, -0.5 * (z**2).sum(axis=1), rtol=1e-9)
    assert "converged" in result.summary()


def test_two_modes_have_their_weights():
    def bimodal(u):  # weights 0.2 and 0.8, sd 0.5 and 1, 8 apart in each of two dimensions
        narrow = -0.5 * ((u - 4) ** 2).sum(axis=1) / 0.25 - 2 * np.log(0.5)
        wide = -0.5 * ((u + 4) ** 2).sum(axis=1)
        return np.logaddexp(np.log(0.2) + narrow, np.log(0.8) + wide)

    rng = np.random.default_rng(1)
    start = spread_start(bimodal, rng.uniform(-10, 10, (1000, 2)), 32, rng)
    assert 3 < (start[:, 0] > 0).sum() < 29
    result = run_emcee(bimodal, start, n_samples=800, n_groups=2, seed=2)
    assert result.converged
    share = (result.chains[:, :, 0] > 0).mean()
    assert share == pytest.approx(0.2, abs=4.5 * np.sqrt(0.16 / result.n_effective))


def test_banana_has_its_moments():
    def banana(u):  # u0 ~ N(0, 1), u1 - u0^2 ~ N(0, 0.5^2)
        return -0.5 * u[:, 0] ** 2 - 2 * (u[:, 1] - u[:, 0] ** 2) ** 2

    rng = np.random.default_rng(2)
    result = run_emcee(banana, spread_start(banana, 2 * rng.standard_normal((500, 2)), 32, rng), n_samples=800, n_groups=2, seed=3)
    n = result.n_effective
    u0, u1 = result.chains[..., 0], result.chains[..., 1]
    assert u0.mean() == pytest.approx(0, abs=5 / np.sqrt(n))
    assert u0.var() == pytest.approx(1, abs=5 * np.sqrt(2 / n))
    assert u1.mean() == pytest.approx(1, abs=5 * np.sqrt(2.25 / n))
    assert (u1 - u0**2).var() == pytest.approx(0.25, abs=5 * 0.25 * np.sqrt(2 / n))


def test_walkers_that_never_travel_between_modes_are_no_convergence():
    import emcee

    def far(u):
        return np.logaddexp(-0.5 * ((u - 100) ** 2).sum(axis=1), -0.5 * ((u + 100) ** 2).sum(axis=1))

    rng = np.random.default_rng(3)
    start = rng.standard_normal((32, 1)) + 100 * rng.choice([-1, 1], (32, 1))
    stay = [(emcee.moves.GaussianMove(1.0), 1.0)]
    with pytest.raises(ConvergenceError, match=r"R-hat .* between walkers"):
        run_emcee(far, start, n_samples=100, moves=stay, max_steps=2000, seed=4)
    result = run_emcee(far, start, n_samples=100, moves=stay, max_steps=2000, seed=4, raise_on_failure=False)
    assert not result.converged
    assert "NOT converged" in result.summary()
    assert result.r_hat_walkers.max() > 1.5


def test_walkers_stuck_in_a_negligible_mode_are_put_back_during_burn_in():
    import emcee

    def with_trap(u):  # the trap at 50 holds e^-100 of the mass
        return np.logaddexp(-0.5 * (u**2).sum(axis=1), -100 - 0.5 * ((u - 50) ** 2).sum(axis=1))

    rng = np.random.default_rng(5)
    start = rng.standard_normal((16, 2))
    start[[1, 6, 11]] += 50
    result = run_emcee(with_trap, start, n_samples=300, n_groups=2, moves=[(emcee.moves.GaussianMove(1.0), 1.0)], seed=6)
    assert result.n_reset == 3
    assert result.converged
    assert np.abs(result.chains).max() < 10


def test_same_seed_same_chain_and_global_generator_untouched():
    start = np.random.default_rng(7).standard_normal((16, 1))
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    one, two, other = (run_emcee(normal, start, n_samples=50, n_groups=2, seed=s) for s in (8, 8, 9))
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    np.testing.assert_array_equal(one.chains, two.chains)
    np.testing.assert_array_equal(one.samples, two.samples)
    assert np.any(one.chains != other.chains)
    assert one.n_evaluations == two.n_evaluations > 0


def test_progress_reaches_its_end():
    class Recorder:
        def __init__(self):
            self.seen = []

        def task(self, description, total):
            self.total = total
            return self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def advance(self, n=1, text=""):
            self.seen.append(self.seen[-1] + n)

        def update(self, completed, text=""):
            self.seen.append(completed)

    recorder = Recorder()
    run_emcee(normal, np.random.default_rng(10).standard_normal((8, 1)), n_samples=20, seed=0, progress=recorder)
    assert recorder.seen[-1] == recorder.total == 1.0
    assert max(recorder.seen) <= 1.0


def test_spread_start_populates_a_mode_that_lies_lower_and_repeats_no_point():
    def lower(u):
        return np.logaddexp(-0.5 * ((u - 5) ** 2).sum(axis=1) / 0.01, -40 - 0.5 * ((u + 5) ** 2).sum(axis=1) / 0.01)

    rng = np.random.default_rng(11)
    candidates = rng.uniform(-8, 8, (4000, 2))
    start = spread_start(lower, candidates, 64, rng)
    assert np.unique(start, axis=0).shape == (64, 2)
    assert (np.abs(start + 5).max(axis=1) < 1).sum() >= 2
    assert (np.abs(start - 5).max(axis=1) < 1).sum() >= 5
    again = spread_start(lower, candidates, 64, np.random.default_rng(1))
    np.testing.assert_array_equal(again, spread_start(lower, candidates, 64, np.random.default_rng(1)))
    one_mode = spread_start(normal, rng.standard_normal((5000, 2)), 64, rng, random_share=0.0)
    assert np.abs(one_mode).max() < 4


def test_bad_input():
    rng = np.random.default_rng(12)
    start = rng.standard_normal((24, 2))
    with pytest.raises(NonFiniteError, match=r"log_prob is nan at u = \["):
        run_emcee(lambda u: np.where(u[:, 0] > 1.5, np.nan, normal(u)), np.clip(start, -1, 1), seed=0, n_samples=100)
    with pytest.raises(NonFiniteError, match="log_prob is inf"):
        run_emcee(lambda u: np.full(len(u), np.inf), start)
    with pytest.raises(DataError, match="-inf at walker"):
        run_emcee(lambda u: np.where(u[:, 0] > 0, -np.inf, normal(u)), start)
    with pytest.raises(ShapeError, match="log_prob"):
        run_emcee(lambda u: u, start)
    with pytest.raises(ShapeError, match="5 walkers"):
        run_emcee(normal, start[:5])
    with pytest.raises(ShapeError, match="for 8 groups"):
        run_emcee(normal, start, n_groups=8)
    with pytest.raises(DataError, match="fewer than 2 dimensions"):
        run_emcee(normal, np.repeat(start[:, :1], 2, axis=1))
    with pytest.raises(NonFiniteError, match="start"):
        run_emcee(normal, start * np.nan)
    with pytest.raises(SettingError, match="max_steps"):
        run_emcee(normal, start, max_steps=10)
    with pytest.raises(SettingError, match="n_samples"):
        run_emcee(normal, start, n_samples=0)
    with pytest.raises(DataError, match="different points of positive density"):
        spread_start(normal, start[:3], 5, rng)
    with pytest.raises(SettingError, match="rng"):
        spread_start(normal, start, 5, 0)
    with pytest.raises(SettingError, match="random_share"):
        spread_start(normal, start, 5, rng, random_share=2.0)


def test_a_short_run_says_how_far_it_is_from_convergence():
    start = np.random.default_rng(13).standard_normal((24, 2))
    with pytest.raises(ConvergenceError, match=r"50 tau wanted.*100000 wanted"):
        run_emcee(normal, start, n_samples=100_000, max_steps=500)
    result = run_emcee(normal, start, n_samples=100_000, max_steps=500, raise_on_failure=False)
    assert not result.converged
    assert result.samples.shape[0] <= 100_000
    np.testing.assert_allclose(normal(result.samples), result.log_prob)
