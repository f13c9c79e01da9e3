import numpy as np
import pytest
from scipy.stats import multivariate_normal

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.samplers.importance import effective_size, importance_sample, pareto_smooth, resample_indices


class Normal:
    """N(mean, sd^2 I) in d dimensions as a proposal."""

    def __init__(self, d, sd=1.0, mean=0.0):
        self.d, self.sd, self.mean = d, sd, mean

    def sample(self, n, rng):
        return self.mean + self.sd * rng.standard_normal((n, self.d))

    def log_prob(self, u):
        return -0.5 * (((u - self.mean) / self.sd) ** 2).sum(axis=1) - self.d * np.log(self.sd * np.sqrt(2 * np.pi))


def conjugate(d=3, noise=0.5):
    """Prior N(0, I), x ~ N(u, noise^2 I): log target, evidence, posterior mean and sd in closed form."""
    x = np.linspace(-1, 1, d)
    prior, like = Normal(d), Normal(d, noise)

    def log_target(u):
        return prior.log_prob(u) + like.log_prob(x - u)

    evidence = multivariate_normal(np.zeros(d), (1 + noise**2) * np.eye(d)).logpdf(x)
    return log_target, evidence, x / (1 + noise**2), np.sqrt(noise**2 / (1 + noise**2))


def test_evidence_and_moments_of_a_conjugate_gaussian():
    log_target, evidence, mean, sd = conjugate()
    result = importance_sample(log_target, Normal(3, 0.9), 40_000, seed=1, chunk=3000)
    assert result.log_evidence == pytest.approx(evidence, abs=4 * result.log_evidence_err)
    assert result.log_evidence_err < 0.02
    np.testing.assert_allclose(result.weights @ result.samples, mean, atol=5 * sd / np.sqrt(result.ess))
    assert result.reliable
    assert "reliable" in result.summary()
    assert "NOT" not in result.summary()


def test_evidence_error_is_the_scatter_over_seeds():
    log_target, evidence, _, _ = conjugate()
    results = [importance_sample(log_target, Normal(3), 1000, seed=i) for i in range(200)]
    pulls = np.array([(r.log_evidence - evidence) / r.log_evidence_err for r in results])
    assert abs(pulls.mean()) < 0.3
    assert pulls.std() == pytest.approx(1, abs=0.2)


def test_ess_fraction_of_two_gaussians():
    # proposal of sd s for a target of sd 1: ESS / n = (s sqrt(2 - 1/s^2) / s^2)^d = (sqrt(2 s^2 - 1) / s^2)^d
    for s in (1.0, 1.3, 2.0):
        result = importance_sample(lambda u: -0.5 * (u**2).sum(axis=1), Normal(2, s), 40_000, seed=2)
        assert result.ess_fraction == pytest.approx((np.sqrt(2 * s**2 - 1) / s**2) ** 2, rel=0.02)
        assert result.reliable


def test_perfect_proposal():
    proposal = Normal(2)
    result = importance_sample(lambda u: proposal.log_prob(u) + 3.0, proposal, 500, seed=0)
    assert result.ess_fraction == pytest.approx(1)
    assert result.log_evidence == pytest.approx(3.0)
    assert result.log_evidence_err < 1e-6
    assert result.pareto_k == 0.0


def test_wrong_proposal_is_flagged():
    for proposal in (Normal(4, 0.3), Normal(4, 1.0, mean=4.0)):
        result = importance_sample(lambda u: -0.5 * (u**2).sum(axis=1), proposal, 20_000, seed=3)
        assert result.pareto_k > 0.7
        assert not result.reliable
        assert "NOT reliable" in result.summary()


def test_pareto_k_recovers_a_known_tail():
    # weights from a Pareto distribution of shape k have tail index k; w = U^-k
    rng = np.random.default_rng(4)
    for k in (0.3, 0.6, 0.9):
        estimates = [pareto_smooth(-k * np.log(rng.random(10_000)))[1] for _ in range(30)]
        assert np.mean(estimates) == pytest.approx(k, abs=0.06)


def test_pareto_smoothing_agrees_with_arviz():
    # values of arviz 0.23.4: psislw(log_weights, normalize=False)
    rng = np.random.default_rng(3)
    for log_weights, k in (
        (rng.standard_normal(1000) * 2, 0.7307010813269456),
        (0.9 * rng.standard_exponential(3000), 0.9456634313871707),
        (np.where(rng.random(500) < 0.3, -np.inf, rng.standard_normal(500)), 0.4136005365590549),
    ):
        smoothed, got = pareto_smooth(log_weights)
        assert got == pytest.approx(k, abs=1e-9)
        assert smoothed.max() <= log_weights.max()
        np.testing.assert_array_equal(np.sort(log_weights)[: log_weights.size // 2], np.sort(smoothed)[: log_weights.size // 2])


def test_smoothing_lowers_the_scatter_of_the_evidence():
    target = Normal(3)

    def evidences(smooth):
        return np.array([importance_sample(target.log_prob, Normal(3, 0.65), 500, seed=i, smooth=smooth).log_evidence for i in range(200)])

    raw, smoothed = evidences(False), evidences(True)
    assert smoothed.std() < 0.9 * raw.std()
    assert abs(smoothed.mean()) < 0.1


def test_short_or_dominated_tails_are_never_called_reliable():
    assert pareto_smooth(np.zeros(10))[1] == np.inf
    assert pareto_smooth(np.append(np.full(99, -1e5), 0.0))[1] == np.inf
    assert pareto_smooth(np.full(100, -np.inf))[1] == np.inf
    assert pareto_smooth(np.zeros(100))[1] == 0.0
    with pytest.raises(NonFiniteError):
        pareto_smooth(np.array([0.0, np.nan]))


def test_reproducible_and_a_longer_run_begins_with_the_same_draws():
    log_target, *_ = conjugate()
    short, long = (importance_sample(log_target, Normal(3), n, seed=5, chunk=100) for n in (200, 400))
    np.testing.assert_array_equal(short.samples, long.samples[:200])
    again = importance_sample(log_target, Normal(3), 200, seed=5, chunk=100)
    np.testing.assert_array_equal(short.log_weights, again.log_weights)


def test_stops_when_enough_effective_draws_are_there():
    log_target, *_ = conjugate()
    result = importance_sample(log_target, Normal(3, 0.9), 100_000, seed=6, chunk=500, target_ess=1000)
    assert 1000 <= result.ess < 1600
    assert result.samples.shape[0] < 10_000
    assert result.n_requested == 100_000


def test_zero_density_is_allowed_and_counts_for_the_evidence():
    # standard normal cut at u > 0: evidence 1/2
    proposal = Normal(1)
    result = importance_sample(lambda u: np.where(u[:, 0] > 0, proposal.log_prob(u), -np.inf), proposal, 20_000, seed=7)
    assert result.log_evidence == pytest.approx(np.log(0.5), abs=4 * result.log_evidence_err)
    assert result.log_evidence_err == pytest.approx(1 / np.sqrt(20_000), rel=0.05)
    assert result.resample(1000, np.random.default_rng(0)).min() > 0


@pytest.mark.parametrize("method", ["systematic", "multinomial"])
def test_resampling_follows_the_weights(method):
    w = np.array([0.1, 0.0, 0.4, 0.5, 0.0])
    index = resample_indices(w, 20_000, np.random.default_rng(8), method=method)
    counts = np.bincount(index, minlength=5)
    np.testing.assert_allclose(counts / 20_000, w, atol=5e-5 if method == "systematic" else 0.015)
    assert np.mean(index[:10_000] == 3) == pytest.approx(0.5, abs=0.025)  # in random order


def test_unique_fraction_is_that_of_multinomial_resampling():
    log_target, *_ = conjugate()
    result = importance_sample(log_target, Normal(3), 3000, seed=9)
    rng = np.random.default_rng(9)
    got = np.mean([np.unique(resample_indices(result.weights, 1000, rng, method="multinomial")).size / 1000 for _ in range(50)])
    assert result.unique_fraction(1000) == pytest.approx(got, abs=0.01)


def test_effective_size():
    assert effective_size(np.log([1.0, 1.0, 2.0])) == pytest.approx(16 / 6)
    assert effective_size(np.array([-1e5, -1e5])) == pytest.approx(2)
    assert effective_size(np.array([-np.inf])) == 0


def test_bad_input():
    log_target, *_ = conjugate()
    q = Normal(3)
    with pytest.raises(NonFiniteError, match=r"log_prob is nan at u = \["):
        importance_sample(lambda u: np.full(len(u), np.nan), q, 10)
    with pytest.raises(NonFiniteError, match="log_prob is inf"):
        importance_sample(lambda u: np.full(len(u), np.inf), q, 10)
    with pytest.raises(DataError, match="all 10 draws"):
        importance_sample(lambda u: np.full(len(u), -np.inf), q, 10)
    with pytest.raises(ShapeError, match="log_prob"):
        importance_sample(lambda u: u, q, 10)
    for n in (1, 2.5, True):
        with pytest.raises(SettingError, match="n is"):
            importance_sample(log_target, q, n)
    with pytest.raises(SettingError, match="target_ess"):
        importance_sample(log_target, q, 10, target_ess=0)
    with pytest.raises(SettingError, match="chunk"):
        importance_sample(log_target, q, 10, chunk=0)

    class Broken(Normal):
        def log_prob(self, u):
            return np.full(len(u), -np.inf)

    with pytest.raises(NonFiniteError, match=r"proposal\.log_prob is -inf"):
        importance_sample(log_target, Broken(3), 10)
    rng = np.random.default_rng(0)
    with pytest.raises(SettingError, match="systematic"):
        resample_indices(np.ones(3), 2, rng, method="sistematic")
    with pytest.raises(SettingError, match="rng"):
        resample_indices(np.ones(3), 2, 0)
    for w in ([0.0, 0.0], [-1.0, 2.0], [np.nan, 1.0]):
        with pytest.raises(DataError, match="weights"):
            resample_indices(np.array(w), 2, rng)
    with pytest.raises(ShapeError, match="weights"):
        resample_indices(np.ones((2, 2)), 2, rng)
