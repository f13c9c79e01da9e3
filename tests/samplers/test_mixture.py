import emcee
import numpy as np
import pytest
from scipy import stats

from sbi_phys.core.errors import SettingError
from sbi_phys.samplers.moves import Independence, Mixture, default_moves, fit_mixture, in_groups, snooker_proposal


@pytest.mark.parametrize("d", [1, 3, 8])
def test_one_snooker_step_leaves_a_normal_distribution_as_it_is(d):
    random = np.random.RandomState(d)
    n = 100_000
    x, others = random.standard_normal((n, d)), random.standard_normal((40, d))
    moved, factor = snooker_proposal(x, others, random)
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
    moved, factor = snooker_proposal(x, random.standard_normal((3, 2)), random)
    assert np.isfinite(factor).all()
    assert np.all(np.abs(moved - x).max(axis=1) > 0)


def test_default_moves_are_emcee_moves_with_weights_of_one():
    moves = default_moves()
    assert sum(w for _, w in moves) == pytest.approx(1)
    assert all(isinstance(m, emcee.moves.RedBlueMove) for m, _ in moves)


def bimodal_log_prob(u):
    """Weights 0.3 and 0.7 at -3 and 3, sd 1 and 0.5, one dimension."""
    left = np.log(0.3) - 0.5 * (u[:, 0] + 3) ** 2
    right = np.log(0.7) - 0.5 * ((u[:, 0] - 3) / 0.5) ** 2 - np.log(0.5)
    return np.logaddexp(left, right) - 0.5 * np.log(2 * np.pi)


def bimodal_cdf(x):
    return 0.3 * stats.norm.cdf(x, -3, 1) + 0.7 * stats.norm.cdf(x, 3, 0.5)


def bimodal_draws(n, rng):
    left = rng.random(n) < 0.3
    return np.where(left, rng.normal(-3, 1, n), rng.normal(3, 0.5, n))[:, None]


def poor_mixture():
    """Far from the target on purpose: wrong weights, places and widths."""
    return Mixture(weights=np.array([0.6, 0.4]), means=np.array([[-2.0], [2.5]]), factors=np.array([[[1.5]], [[1.0]]]), n_components=1)


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
    move, model = Independence(poor_mixture()), OneModel(bimodal_log_prob, 1)
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
    moved, factor = Independence(mixture).proposal(x, np.random.RandomState(0))
    np.testing.assert_allclose(factor, mixture.log_prob(x) - mixture.log_prob(moved), rtol=1e-12, atol=1e-12)


def test_mixture_density_is_that_of_scipy_and_of_its_draws():
    rng = np.random.default_rng(4)
    factors = np.tril(rng.standard_normal((3, 2, 2))) * 0.3 + np.eye(2)
    mixture = Mixture(weights=np.array([0.5, 0.3, 0.2]), means=3 * rng.standard_normal((3, 2)), factors=factors, n_components=2)
    u = 3 * rng.standard_normal((200, 2))
    cov = factors @ factors.transpose(0, 2, 1)
    parts = [stats.multivariate_normal(mixture.means[k], cov[k]).pdf(u) for k in (0, 1)]
    parts.append(stats.multivariate_t(mixture.means[2], cov[2], df=5).pdf(u))
    np.testing.assert_allclose(mixture.log_prob(u), np.log(mixture.weights @ np.array(parts)), rtol=1e-9)
    # E_q[h / q] = 1 for a density h that q covers
    draws = mixture.sample(40_000, np.random.RandomState(5))
    h = stats.multivariate_normal(mixture.means[0], 0.5 * cov[0])
    weights = h.pdf(draws) / np.exp(mixture.log_prob(draws))
    assert weights.mean() == pytest.approx(1, abs=4.5 * weights.std() / 200)


def test_fit_finds_two_gaussians_and_covers_them():
    rng = np.random.default_rng(6)
    parts = [bimodal_draws(1500, rng) for _ in range(4)]
    mixture = fit_mixture(parts, np.random.default_rng(7))
    assert mixture.n_components >= 2
    assert mixture.weights.sum() == pytest.approx(1)
    x = bimodal_draws(4000, rng)
    ratio = bimodal_log_prob(x) - mixture.log_prob(x)
    assert ratio.mean() < 0.5  # Kullback-Leibler divergence
    assert ratio.max() < 3  # nowhere much below
    again = fit_mixture(parts, np.random.default_rng(7))
    np.testing.assert_array_equal(mixture.means, again.means)


def test_fit_to_hardly_any_or_degenerate_draws_is_still_a_density():
    rng = np.random.default_rng(8)
    few = fit_mixture([rng.standard_normal((3, 2)), rng.standard_normal((3, 2))], rng)
    line = rng.standard_normal((500, 1)) * np.array([1.0, 2.0])
    for mixture in (few, fit_mixture([line, line], rng), fit_mixture([np.ones((50, 2))], rng)):
        assert np.isfinite(mixture.log_prob(rng.standard_normal((20, 2)))).all()
        assert np.isfinite(mixture.sample(20, np.random.RandomState(0))).all()


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
    after, accepted = in_groups(Spy(), group).propose(model, state)
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
    for move in [in_groups(move, group) for move, _ in default_moves()] * 3:
        state, accepted = move.propose(model, state)
        shares.append(accepted.mean())
    assert min(shares) > 0.1
    change = (state.coords**2 - x**2).mean(axis=1)
    assert abs(change.mean()) < 4 * change.std() / np.sqrt(n)
    assert stats.kstest(state.coords[:, 0], "norm").pvalue > 1e-3


def test_in_groups_keeps_moves_without_helpers_and_refuses_strangers():
    gaussian = emcee.moves.GaussianMove(1.0)
    assert in_groups(gaussian, np.zeros(8, dtype=int)) is gaussian
    with pytest.raises(SettingError, match="RedBlueMove or MHMove"):
        in_groups("stretch", np.zeros(8, dtype=int))


def test_fit_covers_the_places_farther_out_that_it_is_told_of():
    rng = np.random.default_rng(12)
    x = rng.standard_normal((4000, 4))
    far = 2 * rng.standard_normal((4000, 4))
    near, wide = fit_mixture([x[:2000], x[2000:]], rng), fit_mixture([x[:2000], x[2000:]], rng, far)
    edge = np.array([[6.0, 0, 0, 0], [0, -6.0, 0, 0]])
    assert np.all(wide.log_prob(edge) > near.log_prob(edge) + 1)
    assert np.all(wide.log_prob(x) > stats.multivariate_normal(np.zeros(4)).logpdf(x) - 3)
