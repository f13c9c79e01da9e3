"""Checks of ratios: size on exact ones, power on wrong ones, numbers by hand; the recalibration on ratios bent in known ways."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from sbi_phys.calibration.ratios import _weighted_auc, check_ratio, mean_ratio, recalibrate_ratio, reliability, reweighting_auc
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError


def events(rng, n1=1000, n0=1000, shift=1.0, k=1):
    """x of N(shift, I_k) and of N(0, I_k), and their exact log ratios."""
    one, zero = shift + rng.standard_normal((n1, k)), rng.standard_normal((n0, k))
    return one, zero, *(shift * x.sum(axis=1) - k * shift**2 / 2 for x in (one, zero))


def share(pvalues, level=0.05):
    return np.mean(np.array(pvalues) < level)


# size


@pytest.mark.parametrize(("shift", "n1"), [(0.5, 1000), (1.0, 300)])
def test_size_of_the_mean_ratio(shift, n1):
    rng = np.random.default_rng(1)
    results = [mean_ratio(*events(rng, n1=n1, shift=shift)[2:]) for _ in range(400)]
    for quantity in results[0].each:
        assert abs(share([r.each[quantity][0] for r in results]) - 0.05) < 0.035, quantity
    assert share([r.pvalue for r in results]) < 0.05 + 0.03


@pytest.mark.parametrize("shift", [1.5, 2.0, 2.5, 3.0, 4.0])
def test_size_of_the_mean_ratio_where_few_events_carry_a_mean(shift):
    """From 50 effective events, where Hall's p-value takes over, to one: the sample mean of r is then far below 1."""
    rng = np.random.default_rng(17)
    results = [mean_ratio(*events(rng, n1=1000, n0=1000, shift=shift)[2:]) for _ in range(200)]
    for quantity in results[0].each:
        assert share([r.each[quantity][0] for r in results]) < 0.05 + 0.05, quantity
    if shift == 4:
        assert np.median([r.mean["E_ref[r]"][0] for r in results]) < 0.5


def test_a_mean_of_few_events_that_is_too_large_is_seen():
    rng = np.random.default_rng(18)
    log_one, log_zero = events(rng, n1=1000, n0=1000, shift=4.0)[2:]
    result = mean_ratio(log_one, log_zero + 14)
    assert result.n_effective[0, 0] < 50
    assert result.each["E_ref[r]"][0] == pytest.approx(2 / result.mean["E_ref[r]"][0]) and result.each["E_ref[r]"][0] < 1e-3
    assert mean_ratio(log_one - 14, log_zero).each["E_num[1/r]"][0] < 1e-3


def test_size_of_the_reliability_curve():
    rng = np.random.default_rng(2)
    assert share([reliability(*events(rng, n1=400)[2:]).pvalue for _ in range(300)]) < 0.05 + 0.03
    # bins and band agree
    result = reliability(*events(rng)[2:])
    outside = (result.observed < result.band[:, 0]) | (result.observed > result.band[:, 1])
    assert outside.any() == (result.pvalue < 0.05)


def test_size_of_the_reweighting_auc():
    rng = np.random.default_rng(3)
    p = []
    for i in range(16):
        one, zero, _, log_r = events(rng, n1=300, n0=400, shift=0.7, k=2)
        p.append(reweighting_auc(one, zero, log_r, seed=i).pvalue)
    assert share(p, 0.2) < 0.2 + 3 * np.sqrt(0.2 * 0.8 / 16)
    assert 0.3 < np.mean(p) < 0.7


@pytest.mark.slow
def test_sizes_with_more_repetitions():
    rng = np.random.default_rng(4)
    areas, means, curves = [], [], []
    for i in range(300):
        one, zero, log_one, log_zero = events(rng, n1=800, n0=1000, shift=0.7, k=2)
        areas.append(reweighting_auc(one, zero, log_zero, seed=i).pvalue)
        means.append(mean_ratio(log_one, log_zero).pvalue)
        curves.append(reliability(log_one, log_zero).pvalue)
    assert abs(share(areas) - 0.05) < 0.04
    assert share(means) < 0.05 + 0.035
    assert share(curves) < 0.05 + 0.035


# power


@pytest.mark.parametrize(
    "wrong", [lambda f: f + 0.2, lambda f: 1.3 * f, lambda f: 0.7 * f], ids=["shifted", "overconfident", "underconfident"]
)
def test_power_on_wrong_ratios(wrong):
    rng = np.random.default_rng(5)
    samples = [events(rng, n1=4000, n0=4000)[2:] for _ in range(30)]
    assert share([mean_ratio(*map(wrong, s)).pvalue for s in samples]) > 0.9
    assert share([reliability(*map(wrong, s)).pvalue for s in samples]) > 0.6


def test_power_of_the_reweighting_auc_on_a_ratio_that_misses_a_column():
    """r of the first column alone is calibrated, so that only the check that sees x can tell."""
    rng = np.random.default_rng(6)
    one, zero, *_ = events(rng, n1=3000, n0=3000, shift=0.6, k=2)
    log_one, log_zero = (0.6 * x[:, 0] - 0.18 for x in (one, zero))
    assert mean_ratio(log_one, log_zero).pvalue > 0.01
    assert reliability(log_one, log_zero).pvalue > 0.01
    result = reweighting_auc(one, zero, log_zero)
    assert result.pvalue < 1e-6
    assert 0.55 < result.auc < result.before
    right = reweighting_auc(one, zero, 0.6 * zero.sum(axis=1) - 0.36)
    assert right.pvalue > 0.01 and right.auc < 0.53


def test_verdicts():
    rng = np.random.default_rng(7)
    log_r = events(rng, n1=8000, n0=8000)[2:]
    assert reliability(*log_r).verdict == "calibrated"
    assert reliability(*(1.6 * f for f in log_r)).verdict == "overconfident"
    assert reliability(*(0.5 * f for f in log_r)).verdict == "underconfident"
    assert reliability(*(f + 0.5 for f in log_r)).verdict == "biased"


# numbers


def test_means_by_hand_for_several_theta():
    rng = np.random.default_rng(8)
    one, zero = rng.normal(size=(2, 3, 50))
    result = mean_ratio(one, zero, names=["a", "b", "c"])
    np.testing.assert_allclose(result.mean["E_ref[r]"], np.exp(zero).mean(axis=1))
    np.testing.assert_allclose(result.error["E_num[1/r]"], np.exp(-one).std(axis=1, ddof=1) / np.sqrt(50))
    d = 1 / (1 + np.exp(-one)), 1 / (1 + np.exp(-zero))
    np.testing.assert_allclose(result.mean["E_num[d] + E_ref[d]"], d[0].mean(axis=1) + d[1].mean(axis=1))
    np.testing.assert_allclose(result.n_effective[:, 0], np.exp(zero).sum(axis=1) ** 2 / np.exp(2 * zero).sum(axis=1))
    assert result.pvalues["E_ref[r]"] == pytest.approx(min(1, 3 * result.each["E_ref[r]"].min()))
    assert result.pvalue == pytest.approx(min(1, 3 * min(result.pvalues.values())))
    for i, name in enumerate("abc"):
        alone = mean_ratio(one[i], zero[i])
        assert alone.mean["E_ref[r]"][0] == result.mean["E_ref[r]"][i]
        assert name in result.summary()


def test_a_ratio_of_one_is_right_for_equal_samples_and_impossible_events_have_ratio_zero():
    result = mean_ratio(np.zeros(50), np.zeros(50))
    assert result.pvalue == 1
    assert mean_ratio(np.full(50, 0.5), np.full(50, 0.5)).pvalue == 0
    half = mean_ratio(np.full(50, np.log(2)), np.where(np.arange(50) % 2, np.log(2), -np.inf))
    assert half.mean["E_ref[r]"][0] == pytest.approx(1)
    assert half.mean["E_num[1/r]"][0] == pytest.approx(0.5)


def test_reliability_by_hand():
    rng = np.random.default_rng(9)
    one, zero = rng.normal(0.5, 1, 300), rng.normal(-0.5, 1, 500)
    result = reliability(one, zero, n_bins=4)
    p = 1 / (1 + np.exp(-np.concatenate([one, zero]) - np.log(300 / 500)))
    label = np.repeat([1, 0], [300, 500])
    order = np.argsort(p)
    for b, rows in enumerate(np.split(order, 4)):
        assert result.count[b] == 200
        assert result.predicted[b] == pytest.approx(p[rows].mean())
        assert result.observed[b] == pytest.approx(label[rows].mean())
        low, high = binom.ppf(0.05 / 8, 200, p[rows].mean()), binom.isf(0.05 / 8, 200, p[rows].mean())
        np.testing.assert_allclose(result.band[b] * 200, [low, high])
    assert result.error == pytest.approx(np.abs(result.observed - result.predicted).mean())


def test_reliability_of_outputs_with_few_values():
    one, zero = np.repeat([0.0, 1.0], [20, 30]), np.repeat([0.0, 1.0], [30, 11])
    result = reliability(one, zero)
    assert result.count.tolist() == [50, 41]
    assert result.observed.tolist() == [20 / 50, 30 / 41]


def test_weighted_area_is_scikit_learns():
    rng = np.random.default_rng(10)
    one, zero = rng.integers(0, 12, 200) / 4, rng.integers(0, 10, 300) / 4
    weight = rng.exponential(size=300)
    area, error = _weighted_auc(one, zero, weight)
    label = np.repeat([1, 0], [200, 300])
    assert area == pytest.approx(roc_auc_score(label, np.concatenate([one, zero]), sample_weight=np.concatenate([np.ones(200), weight])))
    repeats = []
    for _ in range(300):
        i, j = rng.integers(0, 200, 200), rng.integers(0, 300, 300)
        repeats.append(_weighted_auc(one[i], zero[j], weight[j])[0])
    assert error == pytest.approx(np.std(repeats), rel=0.15)


def test_an_area_that_few_events_carry_is_not_judged():
    """The exact ratio of samples far apart: a handful of events cannot look like the numerator."""
    rng = np.random.default_rng(20)
    one, zero, _, log_r = events(rng, n1=300, n0=300, shift=4.0)
    result = reweighting_auc(one, zero, log_r)
    assert result.n_effective < 10 and result.auc - 0.5 > 3 * result.error
    assert result.pvalue == 1
    assert "not tested; only" in result.summary()


def test_the_area_depends_on_the_seed_alone_and_not_on_the_scale_of_weights():
    rng = np.random.default_rng(11)
    one, zero, _, log_r = events(rng, n1=200, n0=200)
    a, b, c = (reweighting_auc(one, zero, log_r + shift, seed=3) for shift in (0, 0, 50))
    assert a == b
    assert c.auc == pytest.approx(a.auc, abs=1e-3)
    assert float(a) == a.auc


# repair


BENT = {"shifted": lambda f: f + 0.7, "overconfident": lambda f: 1.8 * f, "curved": lambda f: f + 0.8 * np.tanh(f)}


@pytest.mark.parametrize("bent", BENT.values(), ids=BENT)
def test_a_bent_ratio_is_straightened(bent):
    rng = np.random.default_rng(12)
    repair = recalibrate_ratio(*map(bent, events(rng, n1=20_000, n0=20_000)[2:]))
    assert repair.pvalue < 1e-6
    fresh = events(rng, n1=20_000, n0=20_000)[2:]
    mended = [repair.apply(bent(f)) for f in fresh]
    bulk = np.abs(fresh[1]) < 2
    assert np.abs(mended[1] - fresh[1])[bulk].mean() < 0.06
    assert reliability(*mended).error < 0.015
    assert np.exp(mended[1]).mean() == pytest.approx(1, abs=0.05)
    assert abs(np.exp(bent(fresh[1])).mean() - 1) > 0.1


def test_a_right_ratio_stays_nearly_as_it_is_where_the_samples_lie_far_apart():
    """Exponent of variance 3.2: a few per cent of the numerator lie beyond all reference events."""
    rng = np.random.default_rng(13)
    repair = recalibrate_ratio(*events(rng, n1=20_000, n0=20_000, shift=np.sqrt(3.2))[2:])
    assert repair.pvalue > 1e-3
    fresh = events(rng, n1=10, n0=400_000, shift=np.sqrt(3.2))[3]
    assert np.exp(repair.apply(fresh)).mean() == pytest.approx(1, abs=0.1)


def test_blocks_are_as_small_as_the_ratio_needs():
    """One block for a right ratio, which small blocks would spoil where samples lie far apart; several for a bent one."""
    rng = np.random.default_rng(19)
    log_one, log_zero = events(rng, n1=10_000, n0=10_000, shift=np.sqrt(3.2))[2:]
    right, small = recalibrate_ratio(log_one - 0.5, log_zero - 0.5), recalibrate_ratio(log_one - 0.5, log_zero - 0.5, min_events=25)
    bent = recalibrate_ratio(log_one + 0.8 * np.tanh(log_one), log_zero + 0.8 * np.tanh(log_zero))
    assert right.score.size == 1 < 4 < bent.score.size < small.score.size
    fresh = np.linspace(-4, 4, 50)
    np.testing.assert_allclose(right.apply(fresh - 0.5), fresh, atol=0.15)
    assert (small.apply(fresh - 0.5) - fresh).std() > 0.03 > (right.apply(fresh - 0.5) - fresh).std()


def test_the_correction_is_monotone_and_its_blocks_have_both_samples():
    rng = np.random.default_rng(14)
    log_one, log_zero = events(rng, n1=3000, n0=2000)[2:]
    repair = recalibrate_ratio(log_one, log_zero, min_events=40)
    assert (repair.count >= 40).all()
    assert repair.count.sum(axis=0).tolist() == [3000, 2000]
    assert (np.diff(repair.score) > 0).all() and (np.diff(repair.value) >= 0).all()
    line = np.linspace(-8, 8, 500)
    assert (np.diff(repair.apply(line)) >= -1e-12).all()
    assert repair.apply(line.reshape(50, 10)).shape == (50, 10)
    np.testing.assert_allclose(repair.value, np.log(repair.count[:, 0] / 3000) - np.log(repair.count[:, 1] / 2000))
    # beyond the blocks the correction stays
    far = repair.apply([100.0, -100.0]) - [100.0, -100.0]
    np.testing.assert_allclose(far, (repair.value - repair.score)[[-1, 0]])


def test_samples_that_do_not_overlap_make_one_block():
    repair = recalibrate_ratio(np.linspace(1, 2, 50), np.linspace(-2, -1, 50))
    assert repair.count.tolist() == [[50, 50]]
    assert repair.value[0] == 0


# the whole, figures, refusals


def test_check_holds_all_three():
    rng = np.random.default_rng(15)
    one, zero, log_one, log_zero = events(rng, n1=500, n0=600, k=2, shift=0.5)
    result = check_ratio(log_one, log_zero, one, zero, seed=2)
    assert result.auc == reweighting_auc(one, zero, log_zero, seed=2)
    parts = result.mean.pvalue, result.reliability.pvalue, result.auc.pvalue
    assert result.pvalue == min(1, 3 * min(parts)) and result.pvalue > 0.01
    assert len(result.summary().splitlines()) == 4
    figure = result.figure()
    assert isinstance(figure, Figure) and len(figure.axes) == 3
    assert check_ratio(2 * log_one, 2 * log_zero, one, zero).pvalue < 1e-3


def test_figures_and_words():
    rng = np.random.default_rng(16)
    one, zero, log_one, log_zero = events(rng, n1=500, n0=600)
    wrong = (2 * log_one, 2 * log_zero)
    repair = recalibrate_ratio(*wrong)
    results = (
        mean_ratio(np.stack(wrong[:1] * 8), np.stack(wrong[1:] * 8)),
        reliability(*wrong),
        reweighting_auc(one, zero, log_zero),
        repair,
    )
    for result in results:
        ax = result.plot()
        assert isinstance(ax, Axes) and result.plot(ax) is ax
        assert "p = " in result.summary()
    assert "NOT 1" in results[0].summary()
    assert "overconfident" in results[1].summary() and "overconfident" in repair.summary()
    few = mean_ratio(log_one, np.append(log_zero, 12.0))
    assert "only 1 events dominate a mean" in few.summary()


def test_bad_input_is_refused():
    good = np.zeros(30)
    with pytest.raises(NonFiniteError, match=r"log_r_reference is inf at \(0, 4\)"):
        mean_ratio(good, np.where(np.arange(30) == 4, np.inf, 0))
    with pytest.raises(NonFiniteError, match="log_r_numerator is -inf"):
        mean_ratio(np.full(30, -np.inf), good)
    with pytest.raises(ShapeError, match="log_r_numerator has 2 rows, log_r_reference 1"):
        mean_ratio(np.zeros((2, 30)), good)
    with pytest.raises(ShapeError, match="names has 2 entries"):
        mean_ratio(good, good, names=["a", "b"])
    with pytest.raises(DataError, match="log_r_numerator has 5 events; expected at least 20"):
        mean_ratio(np.zeros(5), good)
    with pytest.raises(ShapeError, match="one ratio at a time"):
        reliability(np.zeros((2, 30)), good)
    with pytest.raises(SettingError, match="n_bins is 1"):
        reliability(good, good, 1)
    with pytest.raises(ShapeError, match="expected the same number of columns"):
        reweighting_auc(np.zeros((30, 1)), np.zeros((30, 2)), good)
    with pytest.raises(ShapeError, match="log_r_reference has 30 values; expected 40"):
        reweighting_auc(np.zeros((30, 1)), np.zeros((40, 1)), good)
    with pytest.raises(DataError, match="0 of the reference have weight"):
        reweighting_auc(np.zeros((30, 1)), np.zeros((30, 1)), np.full(30, -np.inf))
    with pytest.raises(DataError, match="expected at least min_events = 25"):
        recalibrate_ratio(np.zeros(20), good)
    with pytest.raises(NonFiniteError):
        recalibrate_ratio(good, good).apply([np.nan])
