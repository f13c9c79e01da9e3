import numpy as np
import pytest

from sbi_phys.calibration.pvalues import chunks, smallest_pvalue


def test_one_statistic_is_the_usual_monte_carlo_pvalue():
    simulated = np.arange(9.0)[:, None]
    assert smallest_pvalue(np.array([8.5]), simulated) == pytest.approx(1 / 10)
    assert smallest_pvalue(np.array([4.0]), simulated) == pytest.approx(6 / 10)
    assert smallest_pvalue(np.array([-1.0]), simulated) == 1.0


def test_size_is_exact_for_several_dependent_statistics():
    rng = np.random.default_rng(1)
    p = []
    for _ in range(1000):
        z = rng.standard_normal((100, 1)) + 0.5 * rng.standard_normal((100, 4))
        z[:, 3] = z[:, 2]  # a copy costs nothing
        p.append(smallest_pvalue(z[0], z[1:]))
    for alpha in (0.05, 0.2, 0.5):
        assert abs(np.mean(np.array(p) <= alpha) - alpha) < 3 * np.sqrt(alpha * (1 - alpha) / 1000)


def test_ties_can_only_raise_the_pvalue():
    assert smallest_pvalue(np.zeros(2), np.zeros((99, 2))) == 1.0


def test_the_tail_takes_over_where_no_simulation_reaches_alone():
    simulated = np.random.default_rng(2).random((999, 3))
    beyond, within = np.array([0.5, 2.0, 0.5]), np.array([0.5, np.sort(simulated[:, 1])[-2], 0.5])
    assert 0.001 <= smallest_pvalue(beyond, simulated) <= 0.003
    assert smallest_pvalue(beyond, simulated, 1e-9) == 1e-9
    assert smallest_pvalue(beyond, simulated, 0.3) == smallest_pvalue(beyond, simulated)
    assert smallest_pvalue(beyond, simulated, 0.0) > 0
    assert smallest_pvalue(within, simulated, 1e-9) >= 0.003


def test_chunks_add_up():
    assert chunks(1999, 500) == [1999]
    assert sum(chunks(1999, 30_000)) == 1999
    assert chunks(3, 10**8) == [1, 1, 1]
