import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from sbi_phys.calibration import predictive_pvalue
from sbi_phys.calibration.predictive import _longest_run, predictive_checks, prior_predictive_check
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError


def test_number_by_hand_and_its_error():
    result = predictive_pvalue(np.arange(1.0, 100.0), 80.0)
    assert result.pvalue == pytest.approx((1 + 20) / 100)
    assert result.error == pytest.approx(np.sqrt(0.21 * 0.79 / 100))
    assert result.n == 99


def test_agrees_with_the_exact_tail_of_chi_square():
    t = np.random.default_rng(0).chisquare(10, 20_000)
    result = predictive_pvalue(t, 15.0)
    assert result.pvalue == pytest.approx(chi2.sf(15, 10), abs=4 * result.error)


def test_is_uniform_for_data_from_the_same_distribution():
    rng = np.random.default_rng(1)
    p = np.array([predictive_pvalue(rng.standard_normal(99), rng.standard_normal()).pvalue for _ in range(1000)])
    assert abs(np.mean(p <= 0.05) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 1000)


def test_pairs_are_compared_row_by_row():
    t_rep, t_obs = np.arange(10.0), np.arange(10.0)[::-1]
    assert predictive_pvalue(t_rep, t_obs).pvalue == pytest.approx(6 / 11)


@pytest.mark.parametrize(("observed", "word"), [(1e9, "does not describe"), (-1e9, "overstated"), (0.0, "look like")])
def test_words_and_plots(observed, word):
    t = np.random.default_rng(2).standard_normal(500)
    for t_obs in (observed, np.full(500, observed)):
        result = predictive_pvalue(t, t_obs)
        assert word in result.summary()
        ax = result.plot()
        assert ax.get_xlabel()
        assert result.plot(ax) is ax
    assert 0 < result.pvalue <= 1


def test_bad_input():
    with pytest.raises(DataError, match="at least 10"):
        predictive_pvalue([1.0, 2.0], 1.0)
    with pytest.raises(ShapeError, match="t_obs"):
        predictive_pvalue(np.ones(20), np.ones(19))
    with pytest.raises(ShapeError, match="t_rep"):
        predictive_pvalue(np.ones((20, 2)), 1.0)
    with pytest.raises(NonFiniteError, match="t_rep"):
        predictive_pvalue(np.full(20, np.nan), 1.0)
    with pytest.raises(NonFiniteError, match="t_obs"):
        predictive_pvalue(np.ones(20), np.inf)


def brute_longest_run(signs):
    best = run = last = 0
    for s in signs:
        run = 0 if s == 0 else run + 1 if s == last else 1
        best, last = max(best, run), s
    return best


@given(st.lists(st.sampled_from([-1.0, 0.0, 2.5]), min_size=1, max_size=12))
def test_longest_run_is_that_of_the_definition(pulls):
    assert _longest_run(np.array([pulls]))[0] == brute_longest_run(np.sign(pulls))


def test_size_of_every_default_statistic_is_exact():
    rng = np.random.default_rng(0)
    results = [predictive_checks(x[1:], x[0]) for x in rng.standard_normal((400, 100, 8))]
    for name in results[0].pvalues:
        p = np.array([r.pvalues[name] for r in results])
        high = 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
        assert np.mean(p <= 0.05) < high
        if name != "longest run":  # whole numbers with many ties are conservative
            assert np.mean(p <= 0.05) > 0.04 - 3 * np.sqrt(0.05 * 0.95 / 400)  # 2 (1 + #) / 100 <= 0.05: two ranks at each end
    assert np.mean([r.pvalue <= 0.05 for r in results]) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize(
    ("change", "caught", "verdict"),
    [
        (lambda x: x + 1.0, "total", "higher in the data"),
        (lambda x: x + 9.0 * (np.arange(30) == 7), "max |pull|", "higher in the data"),
        (lambda x: 2.0 * x, "chi2", "higher in the data"),
        (lambda x: 0.3 * x, "chi2", "lower in the data"),
        (lambda x: x + 1.5 * np.sign(np.arange(30) - 14.5), "neighbours alike", "higher in the data"),
        (lambda x: np.abs(x), "longest run", "higher in the data"),
    ],
)
def test_power_of_each_default_statistic(change, caught, verdict):
    rng = np.random.default_rng(1)
    result = predictive_checks(rng.standard_normal((2000, 30)), change(rng.standard_normal(30)))
    assert result.verdicts[caught] == verdict
    assert result.pvalue < 0.05
    assert verdict in result.summary()


def test_chi2_has_its_exact_tail():
    rng = np.random.default_rng(2)
    x_obs = np.full(10, 1.3)
    result = predictive_checks(rng.standard_normal((20_000, 10)), x_obs)
    assert result.checks["chi2"].pvalue == pytest.approx(chi2.sf(10 * 1.3**2, 10), abs=0.01)
    assert result.pvalues["chi2"] == pytest.approx(2 * result.checks["chi2"].pvalue)


def test_own_statistics_with_and_without_parameters():
    rng = np.random.default_rng(3)
    theta = rng.standard_normal((300, 1))
    x = theta + rng.standard_normal((300, 4))
    plain = predictive_checks(x, np.zeros(4), {"largest": lambda x: x.max(axis=1)})
    assert plain.checks["largest"].pvalue == pytest.approx((1 + (x.max(axis=1) >= 0).sum()) / 301)
    deviance = predictive_checks(x, np.full(4, 9.0), {"deviance": lambda t, x: ((x - t) ** 2).sum(axis=1)}, theta)
    assert deviance.checks["deviance"].t_obs.shape == (300,)
    assert deviance.pvalues["deviance"] == pytest.approx(2 / 301)
    assert deviance.verdicts == {"deviance": "higher in the data"}
    assert predictive_checks(x, np.zeros(4), {"first": lambda t, x: x[:, 0] - t[:, 0]}, theta[:, 0]).n == 300


def test_constant_columns_ties_and_few_columns():
    x = np.zeros((50, 3))
    x[:, 0] = np.arange(50) % 2
    result = predictive_checks(x, [1.0, 0.0, 0.0])
    assert set(result.pvalues) == {"total", "max |pull|", "chi2"}
    assert result.pvalue == 1
    assert predictive_checks(x, [1.0, 0.0, 5.0]).pvalues["max |pull|"] < 0.05


def test_prior_check_by_hand():
    x = np.arange(1.0, 100.0)[:, None] * [1.0, -1.0]
    result = prior_predictive_check(x, [98.5, -50.0], ["a", "b"])
    assert result.pvalues == pytest.approx({"a": 2 * 2 / 100, "b": 1.0})
    assert result.outside == ()
    assert prior_predictive_check(x, [101.0, -50.0]).outside == ("x_0",)
    np.testing.assert_allclose(result.quantiles[0], np.quantile(x[:, 0], [0.025, 0.16, 0.5, 0.84, 0.975]))


@pytest.mark.parametrize("k", [3, 20])  # whitened, and by sd alone
def test_size_of_the_prior_check(k):
    rng = np.random.default_rng(4)
    results = [prior_predictive_check(x[1:], x[0], blocks={"first": [0, 1]}) for x in rng.standard_normal((400, 100, k))]
    for p in (np.array([r.joint for r in results]), np.array([r.blocks["first"] for r in results])):
        assert abs(np.mean(p <= 0.05) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 400)
    assert np.mean([r.pvalue <= 0.05 for r in results]) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_prior_check_sees_columns_that_do_not_go_together():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((1000, 1)) + 0.1 * rng.standard_normal((1000, 3))
    result = prior_predictive_check(x, [0.8, -0.8, 0.0], blocks={"ends": [0, 1], "last": np.array([False, False, True])})
    assert min(result.pvalues.values()) > 0.2
    assert result.joint < 0.005
    assert result.blocks["ends"] < 0.005 < result.blocks["last"]
    assert "hardly" in result.summary()
    assert "the prior produces such data" in prior_predictive_check(x, [0.8, 0.8, 0.8]).summary()


@pytest.mark.parametrize("k", [3, 60])
def test_plots(k):
    rng = np.random.default_rng(6)
    x, data = rng.standard_normal((100, k)), np.concatenate([[30.0, -30.0], np.zeros(k - 2)])
    for result in (predictive_checks(x, data), prior_predictive_check(x, data)):
        ax = result.plot()
        assert ax.get_xlim()[0] < ax.get_xlim()[1]
        assert result.plot(ax) is ax
        assert result.summary()


@pytest.mark.parametrize("check", [predictive_checks, prior_predictive_check])
def test_bad_input_of_the_checks(check):
    x = np.random.default_rng(7).standard_normal((50, 3))
    with pytest.raises(ShapeError, match="x_obs"):
        check(x, np.zeros(2))
    with pytest.raises(ShapeError, match="has shape"):
        check(x[:, 0], 0.0)
    with pytest.raises(ShapeError, match="at least one column"):
        check(x[:, :0], np.zeros(0))
    with pytest.raises(DataError, match="at least 20"):
        check(x[:1], np.zeros(3))
    with pytest.raises(NonFiniteError, match="has NaN"):
        check(x * np.nan, np.zeros(3))
    with pytest.raises(NonFiniteError, match="x_obs"):
        check(x, np.full(3, np.nan))
    with pytest.raises(DataError, match="complex"):
        check(x * 1j, np.zeros(3))


def test_bad_statistics_and_blocks():
    x = np.random.default_rng(8).standard_normal((50, 3))
    with pytest.raises(SettingError, match="empty"):
        predictive_checks(x, np.zeros(3), {})
    with pytest.raises(SettingError, match="function"):
        predictive_checks(x, np.zeros(3), {"a": 3})
    with pytest.raises(ShapeError, match="statistic 'a'"):
        predictive_checks(x, np.zeros(3), {"a": lambda x: x})
    with pytest.raises(NonFiniteError, match="statistic 'a'"):
        predictive_checks(x, np.zeros(3), {"a": lambda x: x[:, 0] * np.nan})
    with pytest.raises(ShapeError, match="theta"):
        predictive_checks(x, np.zeros(3), {"a": lambda t, x: x[:, 0]}, np.zeros((49, 1)))
    for block in ([3], [], [0.5], [-1], [True, False]):
        with pytest.raises(SettingError, match="block 'b'"):
            prior_predictive_check(x, np.zeros(3), blocks={"b": block})
    with pytest.raises(ShapeError, match="names"):
        prior_predictive_check(x, np.zeros(3), ["a"])
