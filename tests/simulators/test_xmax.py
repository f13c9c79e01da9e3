from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import kstest, norm

from simulators.auger import load_auger
from simulators.errors import SimulatorSettingError
from simulators.xmax import (
    HADRONIC_MODELS,
    acceptance,
    gumbel_cdf,
    gumbel_mean,
    gumbel_parameters,
    gumbel_pdf,
    gumbel_sample,
    gumbel_sd,
    smeared_fraction,
)

CASES = [(model, mass, lg) for model in HADRONIC_MODELS for mass, lg in ((1, 18.7), (4, 19.0), (14, 19.4), (56, 20.0))]


@pytest.mark.parametrize(("model", "mass", "lg"), CASES)
def test_density_distribution_and_moments_agree(model, mass, lg):
    q = gumbel_parameters(lg, mass, model)
    pieces = (300.0, float(q[0]), 1000.0, 3000.0)

    def integral(function):
        return sum(quad(function, a, b, epsabs=1e-12)[0] for a, b in pairwise(pieces))

    assert integral(lambda x: gumbel_pdf(x, *q)) == pytest.approx(1, abs=1e-8)
    mean = integral(lambda x: x * gumbel_pdf(x, *q))
    assert mean == pytest.approx(float(gumbel_mean(*q)), abs=1e-4)
    assert np.sqrt(integral(lambda x: (x - mean) ** 2 * gumbel_pdf(x, *q))) == pytest.approx(float(gumbel_sd(*q)), abs=1e-4)
    for x in (680.0, 760.0, 900.0):
        below = quad(lambda y: gumbel_pdf(y, *q), 300, min(x, float(q[0])))[0] + (
            quad(lambda y: gumbel_pdf(y, *q), q[0], x)[0] if x > q[0] else 0
        )
        assert float(gumbel_cdf(x, *q)) == pytest.approx(below, abs=1e-8)


def test_samples_follow_the_distribution_and_a_shifted_one_is_rejected():
    q = gumbel_parameters(19.0, 4)
    drawn = gumbel_sample(*q, 20_000, np.random.default_rng(5))
    assert kstest(drawn, lambda x: gumbel_cdf(x, *q)).pvalue > 1e-3
    assert kstest(drawn + 2.0, lambda x: gumbel_cdf(x, *q)).pvalue < 1e-3


def test_epos_moments_at_ten_eev():
    # closed-form means and spreads of the parameterisation itself: proton deep and broad, iron shallow and narrow
    means = [float(gumbel_mean(*gumbel_parameters(19.0, a))) for a in (1, 4, 14, 56)]
    spreads = [float(gumbel_sd(*gumbel_parameters(19.0, a))) for a in (1, 4, 14, 56)]
    np.testing.assert_allclose(means, [808, 775, 748, 712], atol=1.0)
    np.testing.assert_allclose(spreads, [59, 38, 28, 17], atol=1.0)


def test_acceptance_is_one_inside_and_falls_exponentially_outside():
    x1, x2, l1, l2 = parameters = load_auger().acceptance[9]
    np.testing.assert_allclose(acceptance(np.array([x1, 750.0, x2]), parameters), 1.0)
    np.testing.assert_allclose(acceptance(np.array([x1 - l1, x2 + l2]), parameters), np.exp(-1))


@pytest.mark.parametrize("mass", [1, 56])
def test_smeared_fraction_against_quadrature(mass):
    data = load_auger()
    row, lg = 10, 18.85
    below, accepted = smeared_fraction(lg, mass, "EPOS-LHC", data.acceptance[row], data.resolution[row], 500, 1100)
    q, (s1, s2, k) = gumbel_parameters(lg, mass), data.resolution[row]
    x = np.arange(250.0, 2300.0, 0.05)
    weight = gumbel_pdf(x, *q) * acceptance(x, data.acceptance[row]) * 0.05
    for edge in (640, 700, 760, 900):
        smear = k * norm.cdf((edge - x) / s1) + (1 - k) * norm.cdf((edge - x) / s2)
        assert below[edge - 500] == pytest.approx(float(weight @ smear), rel=1e-4, abs=1e-9)
    assert accepted == pytest.approx(weight.sum(), rel=1e-5)


def test_unknown_model_suggests_the_right_one():
    with pytest.raises(SimulatorSettingError, match="did you mean 'EPOS-LHC'"):
        gumbel_parameters(19.0, 1, "EPOS_LHC")
