import emcee
import numpy as np
import pytest
from scipy import stats

from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.samplers.mcmc import _in_groups, _Independence, _snooker_proposal, default_moves, run_emcee
from sbi_phys.samplers.mixture import Mixture
from sbi_phys.samplers.tempering import spread_start
from tests.samplers.targets import bimodal_cdf, bimodal_draws, bimodal_log_prob, normal


def test_correlated_gaussian_in_five_dimensions():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((5, 5))
    cov, mean = a @ a.T + 0.1 * np.eye(5), np.arange(5.0)
    precision = np.linalg.inv(cov)
    start = spread_start(
        lambda u: -0.5 * np.einsum("ni,ij,nj->n", u - mean, precision, u - mean), 10 * rng.standard_normal((1000, 5)), 24, rng
    )
    result = run_emcee(lambda u: -0.5 * np.einsum("ni,ij,nj->n", u - mean, precision, u - mean), start, n_draws=700, n_groups=2, seed=1)
    assert result.converged
    assert result.samples.shape == (700, 5)
    assert np.all(result.r_hat < 1.01)
    assert result.chains.shape[1] > 50 * result.autocorr_time.max()
    assert result.n_effective == pytest.approx(24 * result.chains.shape[1] / result.autocorr_time.max())
    white = (result.chains - mean) @ np.linalg.cholesky(precision)
    np.testing.assert_allclose(white.mean(axis=(0, 1)), 0, atol=5 / np.sqrt(result.n_effective))
    np.testing.assert_allclose((white**2).mean(axis=(0, 1)), 1, atol=5 * np.sqrt(2 / result.n_effective))
    # thinned draws: independent, so their scatter about the truth is that of as many independent ones
    z = (result.samples - mean) @ np.linalg.cholesky(precision)
    assert np.abs(z.mean(axis=0)).max() < 4.5 / np.sqrt(700)
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
    result = run_emcee(bimodal, start, n_draws=800, n_groups=2, seed=2)
    assert result.converged
    share = (result.chains[:, :, 0] > 0).mean()
    assert share == pytest.approx(0.2, abs=4.5 * np.sqrt(0.16 / result.n_effective))


def test_banana_has_its_moments():
    def banana(u):  # u0 ~ N(0, 1), u1 - u0^2 ~ N(0, 0.5^2)
        return -0.5 * u[:, 0] ** 2 - 2 * (u[:, 1] - u[:, 0] ** 2) ** 2

    rng = np.random.default_rng(2)
    result = run_emcee(banana, spread_start(banana, 2 * rng.standard_normal((500, 2)), 32, rng), n_draws=400, n_groups=2, seed=3)
    n = result.n_effective
    u0, u1 = result.chains[..., 0], result.chains[..., 1]
    assert u0.mean() == pytest.approx(0, abs=5 / np.sqrt(n))
    assert u0.var() == pytest.approx(1, abs=5 * np.sqrt(2 / n))
    assert u1.mean() == pytest.approx(1, abs=5 * np.sqrt(2.25 / n))
    assert (u1 - u0**2).var() == pytest.approx(0.25, abs=5 * 0.25 * np.sqrt(2 / n))


def test_walkers_that_never_travel_between_modes_are_no_convergence():
    def far(u):
        return np.logaddexp(-0.5 * ((u - 100) ** 2).sum(axis=1), -0.5 * ((u + 100) ** 2).sum(axis=1))

    rng = np.random.default_rng(3)
    start = rng.standard_normal((32, 1)) + 100 * rng.choice([-1, 1], (32, 1))
    stay = [(emcee.moves.GaussianMove(1.0), 1.0)]
    with pytest.raises(ConvergenceError, match=r"R-hat .* between walkers"):
        run_emcee(far, start, n_draws=100, moves=stay, max_steps=2000, seed=4)
    result = run_emcee(far, start, n_draws=100, moves=stay, max_steps=2000, seed=4, raise_on_failure=False)
    assert not result.converged
    assert "NOT converged" in result.summary()
    assert result.r_hat_walkers.max() > 1.5


def test_walkers_stuck_in_a_negligible_mode_are_put_back_during_burn_in():
    def with_trap(u):  # the trap at 50 holds e^-100 of the mass
        return np.logaddexp(-0.5 * (u**2).sum(axis=1), -100 - 0.5 * ((u - 50) ** 2).sum(axis=1))

    rng = np.random.default_rng(5)
    start = rng.standard_normal((16, 2))
    start[[1, 6, 11]] += 50
    result = run_emcee(with_trap, start, n_draws=300, n_groups=2, moves=[(emcee.moves.GaussianMove(1.0), 1.0)], seed=6)
    assert result.n_reset == 3
    assert result.converged
    assert np.abs(result.chains).max() < 10


def test_same_seed_same_chain_and_global_generator_untouched():
    start = np.random.default_rng(7).standard_normal((16, 1))
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    short = {"n_draws": 50, "n_groups": 2, "max_steps": 300, "raise_on_failure": False}
    one, two, other = (run_emcee(normal, start, seed=s, **short) for s in (8, 8, 9))
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
    run_emcee(normal, np.random.default_rng(10).standard_normal((8, 1)), n_draws=20, max_steps=1000, seed=0, progress=recorder)
    assert recorder.seen[-1] == recorder.total == 1.0
    assert max(recorder.seen) <= 1.0


def test_bad_input():
    rng = np.random.default_rng(12)
    start = rng.standard_normal((24, 2))
    with pytest.raises(NonFiniteError, match=r"log_prob is nan at u = \["):
        run_emcee(lambda u: np.where(u[:, 0] > 1.5, np.nan, normal(u)), np.clip(start, -1, 1), seed=0, n_draws=100)
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
    with pytest.raises(SettingError, match="n_draws"):
        run_emcee(normal, start, n_draws=0)


def test_a_short_run_says_how_far_it_is_from_convergence():
    start = np.random.default_rng(13).standard_normal((24, 2))
    with pytest.raises(ConvergenceError, match=r"50 tau wanted.*100000 wanted"):
        run_emcee(normal, start, n_draws=100_000, max_steps=500)
    result = run_emcee(normal, start, n_draws=100_000, max_steps=500, raise_on_failure=False)
    assert not result.converged
    assert result.samples.shape[0] <= 100_000
    np.testing.assert_allclose(normal(result.samples), result.log_prob)


def curved(u):  # u0 ~ N(0, 1); u1 - u0^2 ~ N(0, 0.2^2), u2 + u0^2 / 2 ~ N(0, 0.2^2)
    return -0.5 * u[:, 0] ** 2 - 12.5 * (u[:, 1] - u[:, 0] ** 2) ** 2 - 12.5 * (u[:, 2] + u[:, 0] ** 2 / 2) ** 2


@pytest.mark.slow
def test_independent_draws_cut_the_autocorrelation_of_a_thin_curved_target():
    start = spread_start(curved, np.random.default_rng(14).standard_normal((2000, 3)), 64, np.random.default_rng(15))
    with_it = run_emcee(curved, start, n_draws=3000, seed=16)
    without = run_emcee(curved, start, n_draws=3000, seed=16, independence=False, max_steps=5000, raise_on_failure=False)
    assert with_it.converged
    assert with_it.n_components > 1
    assert 0.2 < with_it.acceptance_independence <= 1
    assert without.n_components == 0
    assert np.isnan(without.acceptance_independence)
    assert without.autocorr_time.max() > 10 * with_it.autocorr_time.max()
    assert "from a mixture of" in with_it.summary()
    for result in (with_it, without):  # one answer, the right one
        n = result.n_effective
        u0, u1, u2 = np.moveaxis(result.chains, 2, 0)
        assert u0.mean() == pytest.approx(0, abs=5 / np.sqrt(n))
        assert u0.var() == pytest.approx(1, abs=5 * np.sqrt(2 / n))
        assert u1.mean() == pytest.approx(1, abs=5 * np.sqrt(2.04 / n))
        assert (u2 + u0**2 / 2).std() == pytest.approx(0.2, rel=5 / np.sqrt(2 * n))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["funnel", "heavy"])
def test_targets_that_the_mixture_fits_badly_have_their_moments(name):
    def funnel(u):  # u0 ~ N(0, 1.5^2), u1 ~ N(0, exp(u0 / 2)^2)
        return -0.5 * (u[:, 0] / 1.5) ** 2 - 0.5 * u[:, 1] ** 2 * np.exp(-u[:, 0]) - 0.5 * u[:, 0]

    def heavy(u):  # Student t with 3 degrees of freedom in each coordinate
        return -2 * np.log1p(u**2 / 3).sum(axis=1)

    target = funnel if name == "funnel" else heavy
    rng = np.random.default_rng(17)
    result = run_emcee(target, spread_start(target, 3 * rng.standard_normal((1500, 2)), 48, rng), n_draws=3000, seed=18)
    assert result.converged
    tail = stats.norm if name == "funnel" else stats.t(3)
    scale = 1.5 if name == "funnel" else 1.0
    for p in (0.02, 0.16, 0.5, 0.84, 0.98):
        share = (result.chains[..., 0] < scale * tail.ppf(p)).mean()
        assert share == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / result.n_effective))
    if name == "funnel":  # given u0, u1 exp(-u0 / 2) is standard normal, in the neck and in the mouth
        z = result.chains[..., 1] * np.exp(-result.chains[..., 0] / 2)
        for part in (result.chains[..., 0] < -2, result.chains[..., 0] > 2):
            assert (z[part] ** 2).mean() == pytest.approx(1, abs=5 * np.sqrt(2 / (part.mean() * result.n_effective)))


def test_two_far_modes_get_their_weights_from_independent_draws():
    def far(u):  # weights 0.3 and 0.7, 40 sd apart, of different shape: no local move connects them
        left = np.log(0.3) - 0.5 * ((u + 20) ** 2).sum(axis=1)
        right = np.log(0.7) - 0.5 * ((u - 20) ** 2).sum(axis=1) / 0.04 - 2 * np.log(0.2)
        return np.logaddexp(left, right)

    rng = np.random.default_rng(19)
    start = np.concatenate([rng.standard_normal((16, 2)) - 20, 20 + 0.2 * rng.standard_normal((16, 2))])[rng.permutation(32)]
    result = run_emcee(far, start, n_draws=1000, n_groups=2, seed=20)
    n = result.n_effective
    left = result.chains[..., 0] < 0
    assert left.mean() == pytest.approx(0.3, abs=4.5 * np.sqrt(0.21 / n))
    assert stats.kstest(result.samples[result.samples[:, 0] > 0, 0], "norm", args=(20, 0.2)).pvalue > 1e-3
    assert stats.kstest(result.samples[result.samples[:, 0] < 0, 0], "norm", args=(-20, 1)).pvalue > 1e-3
    assert result.converged


@pytest.mark.parametrize("d", [1, 3, 8])
def test_one_snooker_step_leaves_a_normal_distribution_as_it_is(d):
    random = np.random.RandomState(d)
    n = 100_000
    x, others = random.standard_normal((n, d)), random.standard_normal((40, d))
    moved, factor = _snooker_proposal(x, others, random)
    log_ratio = factor - 0.5 * ((moved**2).sum(axis=1) - (x**2).sum(axis=1))
    accept = np.log(random.rand(n)) < log_ratio
    after = np.where(accept[:, None], moved, x)
    assert 0.1 < accept.mean() < 0.9
    # the change of the mean square, whose error is smaller than that of the mean square itself
    change = (after**2 - x**2).mean(axis=1)
    assert abs(change.mean()) < 4 * change.std() / np.sqrt(n)


def test_snooker_helpers_are_three_different_walkers():
    random = np.random.RandomState(0)
    x = random.standard_normal((500, 2))
    moved, factor = _snooker_proposal(x, random.standard_normal((3, 2)), random)
    assert np.isfinite(factor).all()
    assert np.all(np.abs(moved - x).max(axis=1) > 0)


def test_default_moves_are_emcee_moves_with_weights_of_one():
    moves = default_moves()
    assert sum(w for _, w in moves) == pytest.approx(1)
    assert all(isinstance(m, emcee.moves.RedBlueMove) for m, _ in moves)


def poor_mixture():
    """Far from the target on purpose: wrong weights, places and widths."""
    return Mixture(weights=np.array([0.6, 0.4]), means=np.array([[-2.0], [2.5]]), factors=np.array([[[1.5]], [[1.0]]]), n_tails=1)


class OneModel:
    """What emcee hands to a move."""

    def __init__(self, log_prob, seed):
        self.log_prob, self.random = log_prob, np.random.RandomState(seed)

    def compute_log_prob_fn(self, u):
        return self.log_prob(u), None


def test_the_independence_move_leaves_its_target_as_it_is():
    n = 20_000
    x = bimodal_draws(n, np.random.default_rng(0))
    assert stats.kstest(x[:, 0], bimodal_cdf).pvalue > 1e-3
    move, model = _Independence(poor_mixture()), OneModel(bimodal_log_prob, 1)
    state = emcee.State(x, log_prob=bimodal_log_prob(x), random_state=model.random.get_state())
    share = []
    for _ in range(5):
        state, accepted = move.propose(model, state)
        share.append(accepted.mean())
    after = state.coords[:, 0]
    np.testing.assert_allclose(state.log_prob, bimodal_log_prob(state.coords))
    assert 0.2 < np.mean(share) < 0.9
    assert np.mean(share) == pytest.approx(move.n_accepted / move.n_tried)
    assert move.n_tried == 5 * n
    assert stats.kstest(after, bimodal_cdf).pvalue > 1e-3
    assert (after < 0).mean() == pytest.approx(0.3, abs=4.5 * np.sqrt(0.21 / n))
    assert after.mean() == pytest.approx(1.2, abs=4.5 * np.sqrt(8.0 / n))
    # the test has power: without the factor of Hastings the same steps leave another distribution behind
    wrong, _ = move.proposal(x, np.random.RandomState(2))
    plain = np.log(np.random.RandomState(3).rand(n)) < bimodal_log_prob(wrong) - bimodal_log_prob(x)
    assert stats.kstest(np.where(plain, wrong[:, 0], x[:, 0]), bimodal_cdf).pvalue < 1e-6


def test_the_factor_is_the_ratio_of_proposal_densities():
    mixture = poor_mixture()
    x = np.linspace(-4, 4, 50)[:, None]
    moved, factor = _Independence(mixture).proposal(x, np.random.RandomState(0))
    np.testing.assert_allclose(factor, mixture.log_prob(x) - mixture.log_prob(moved), rtol=1e-12, atol=1e-12)


def test_moves_in_groups_use_helpers_of_their_own_group_only():
    group = np.repeat([0, 1], 12)
    seen = []

    class Spy(emcee.moves.StretchMove):
        def get_proposal(self, s, c, random):
            seen.append((s.copy(), np.concatenate(c)))
            return super().get_proposal(s, c, random)

    x = np.random.default_rng(9).standard_normal((24, 2)) + 1000 * group[:, None]
    model = OneModel(lambda u: -0.5 * (u**2).sum(axis=1) * 1e-9, 0)
    state = emcee.State(x.copy(), log_prob=model.log_prob(x), random_state=model.random.get_state())
    after, accepted = _in_groups(Spy(), group).propose(model, state)
    assert len(seen) == 4
    for s, c in seen:
        assert s.shape == c.shape == (6, 2)
        assert np.unique(np.concatenate([s, c])[:, 0] > 500).size == 1
    assert accepted.any()
    np.testing.assert_array_equal((after.coords != x).any(axis=1), accepted)
    np.testing.assert_allclose(after.log_prob, model.log_prob(after.coords))


def test_moves_in_groups_leave_a_normal_distribution_as_it_is():
    n, d = 4000, 3
    group = np.arange(n) % 4
    x = np.random.default_rng(10).standard_normal((n, d))
    model = OneModel(lambda u: -0.5 * (u**2).sum(axis=1), 11)
    state = emcee.State(x.copy(), log_prob=model.log_prob(x), random_state=model.random.get_state())
    shares = []
    for move in [_in_groups(move, group) for move, _ in default_moves()] * 3:
        state, accepted = move.propose(model, state)
        shares.append(accepted.mean())
    assert min(shares) > 0.1
    change = (state.coords**2 - x**2).mean(axis=1)
    assert abs(change.mean()) < 4 * change.std() / np.sqrt(n)
    assert stats.kstest(state.coords[:, 0], "norm").pvalue > 1e-3


def test_in_groups_keeps_moves_without_helpers_and_refuses_strangers():
    gaussian = emcee.moves.GaussianMove(1.0)
    assert _in_groups(gaussian, np.zeros(8, dtype=int)) is gaussian
    with pytest.raises(SettingError, match="RedBlueMove or MHMove"):
        _in_groups("stretch", np.zeros(8, dtype=int))
