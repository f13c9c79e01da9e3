import numpy as np
import pytest
from scipy.stats import multinomial, poisson

from simulators.counts import CountsBlock, CountsLayout
from simulators.errors import CountsError

LAYOUT = CountsLayout((CountsBlock("a", 0, 3, 10), CountsBlock("b", 3, 2, None)))
EXPECTED = np.array([[2.0, 3.0, 5.0, 4.0, 0.5], [1.0, 1.0, 8.0, 2.0, 2.0]])
X = np.array([[1.0, 4.0, 5.0, 6.0, 0.0], [0.0, 0.0, 10.0, 1.0, 3.0]])


def test_log_likelihood_is_scipys():
    want = [multinomial.logpmf(x[:3], 10, mu[:3] / 10) + poisson.logpmf(x[3:], mu[3:]).sum() for x, mu in zip(X, EXPECTED, strict=True)]
    np.testing.assert_allclose(LAYOUT.log_likelihood(X, EXPECTED), want, rtol=1e-12)


def test_probabilities_sum_to_one():
    layout = CountsLayout((CountsBlock("a", 0, 3, 6),))
    x = np.array([[i, j, 6 - i - j] for i in range(7) for j in range(7 - i)], dtype=float)
    total = np.exp(layout.log_likelihood(x, np.broadcast_to([1.0, 2.0, 3.0], x.shape))).sum()
    assert total == pytest.approx(1, abs=1e-12)


def test_deviance_against_the_saturated_model():
    saturated = X.copy()
    saturated[saturated == 0] = 1e-300
    want = 2 * (LAYOUT.log_likelihood(X, saturated) - LAYOUT.log_likelihood(X, EXPECTED))
    np.testing.assert_allclose(LAYOUT.deviance(X, EXPECTED), want, rtol=1e-9)
    assert LAYOUT.deviance(X, np.maximum(X, 1e-300)).max() < 1e-9


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones(4), r"x has shape \(4,\); expected \(n, 5\) or \(5,\), that is 3 a \+ 2 b"),
        (np.ones((2, 2, 5)), "expected \\(n, 5\\)"),
        (np.array([1, 4, 5, 6.5, 0]), "6.5 in row 0, column 3 \\(b\\[0\\]\\); expected a whole number"),
        (np.array([[1, 4, 5, 6, 0], [1, -4, 13, 6, 0.0]]), "-4 in row 1, column 1 \\(a\\[1\\]\\)"),
        (np.array([1, 4, np.nan, 6, 0]), "nan in row 0, column 2 \\(a\\[2\\]\\)"),
        (np.array([1, 4, 5, np.inf, 0]), "inf in row 0"),
        (np.array([1, 4, 6, 6, 0]), "11 events in a \\(row 0\\); expected 10"),
        (np.array(["a"] * 5), "dtype <U1; expected counts"),
    ],
)
def test_bad_counts(x, message):
    with pytest.raises(CountsError, match=message):
        LAYOUT.check(x)


def test_check_accepts_single_precision_and_integers():
    for dtype in (np.float32, np.int64):
        got = LAYOUT.check(X[0].astype(dtype))
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, X[:1])
