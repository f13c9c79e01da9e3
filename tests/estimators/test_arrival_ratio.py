"""The learned test statistic of arrival directions beside the exact one: a small version of benchmarks/arrival_directions.py."""

import numpy as np

from benchmarks.arrival_directions import DELTAS, FRACTIONS, SIM, features, joined, learn, profile, statistic
from sbi_phys.core.rng import rng_for

BLUR = 15.0


def test_the_learned_statistic_follows_the_exact_one():
    ratio = learn(10_000, epochs=5, hidden=32)
    n_toys, n = 30, SIM.n_events
    theta = np.tile([0.1, BLUR], (n_toys, 1))
    theta[: n_toys // 2, 0] = 0.0

    def excess(events):
        log_r = ratio.log_ratio(features(events[:, :3]), [[1.0, BLUR]], [[0.0, DELTAS.mean()]])
        return np.exp(log_r)

    isotropic = SIM.sample_events(np.tile([0.0, BLUR], (10_000, 1)), rng_for(1))
    a = SIM.relative_exposure([BLUR])[0]
    scale = a / excess(isotropic).mean()
    x = SIM.simulate(theta, rng_for(2)).reshape(n_toys, n, 5)
    r = (scale * excess(x.reshape(-1, 5)) - 1).reshape(n_toys, n)
    f = FRACTIONS[:, None, None]
    learned = 2 * (np.log1p(f * r).sum(axis=2) - n * np.log1p(f[:, 0] * (a - 1))).max(axis=0)
    exact = np.array([SIM.scan(row, FRACTIONS, [BLUR]).max() for row in x])
    assert exact.std() > 3
    assert np.corrcoef(learned, exact)[0, 1] > 0.95
    assert abs((learned - exact).mean()) < 0.3 * exact.std()


def test_the_statistic_is_zero_at_the_best_fraction_and_profiles_the_blurring():
    """Log Lambda at the tested f is 4, the largest, for the third blurring in one data set, and 1 of 3 for the seventh in another."""
    top, rows = np.array([4.0, 3.0]), np.zeros((2, DELTAS.size))
    rows[0, 2], rows[1, 6] = 4.0, 1.0
    data = joined(top, rows)
    np.testing.assert_allclose(statistic(np.array([0.05]), data), [0.0, 4.0])
    np.testing.assert_array_equal(profile(np.array([0.05]), data), DELTAS[[2, 6]])
    assert profile(np.array([0.0]), data).tolist() == [15.0, 15.0]
