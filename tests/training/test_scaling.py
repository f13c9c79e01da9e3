"""Scaling and splitting: numbers against numpy, counts against the variance they should have."""

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.priors import BoxPrior, NormalPrior, Observable, Parameter
from sbi_phys.training.scaling import XScaler, count_columns, prepare_simulations, require_counts, split_rows

PRIOR = BoxPrior([Parameter("a", 0, 1), Parameter("b", 0, 1)])


def test_scaler_matches_numpy_over_chunks_and_large_offsets() -> None:
    x = rng_for(0).normal(1e6, 2.0, (1000, 3))
    scaler = XScaler.fit(x, np.zeros(3, dtype=bool), chunk=64)
    np.testing.assert_allclose(scaler.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(scaler.scale, x.std(axis=0), rtol=1e-6)
    z = scaler.apply(x)
    assert z.dtype.is_floating_point
    np.testing.assert_allclose(z.std(dim=0, correction=0), 1, rtol=1e-4)


def test_poisson_noise_has_unit_width_over_decades() -> None:
    """Anscombe's root: within 3 % from a mean of 10 on; and a nearly empty bin is not blown up."""
    mean = np.array([1e-3, 10.0, 1e2, 1e4])
    x = rng_for(1).poisson(mean, (40_000, 4)).astype(float)
    z = XScaler.fit(x, np.ones(4, dtype=bool)).apply(x).numpy()
    np.testing.assert_allclose(z[:, 1:].std(axis=0), 1, rtol=0.03)
    assert np.abs(z[:, 0]).max() < 3


def test_constant_columns_stay_finite() -> None:
    z = XScaler.fit(np.full((10, 2), 7.0), np.zeros(2, dtype=bool)).apply(np.full((1, 2), 7.0))
    assert z.tolist() == [[0.0, 0.0]]


def test_counts_are_recognised() -> None:
    counts = rng_for(0).poisson(3.0, (50, 2))
    assert count_columns(counts, "auto", None).all()
    assert not count_columns(counts + 0.5, "auto", None).any()
    assert not count_columns(counts, "real", None).any()
    blocks = [Observable("n", 1, kind="counts"), Observable("y", 1)]
    assert count_columns(counts, "auto", blocks).tolist() == [True, False]
    with pytest.raises(ShapeError, match=r"expected \(1,\)"):
        count_columns(counts, "auto", blocks[:1])
    with pytest.raises(SettingError, match="x_transform"):
        count_columns(counts, "log", None)


def test_split_is_seeded_complete_and_disjoint() -> None:
    train, valid = split_rows(103, 0.1, seed=4)
    assert sorted([*train, *valid]) == list(range(103))
    assert len(valid) == 10
    assert (split_rows(103, 0.1, seed=4)[1] == valid).all()
    assert (split_rows(103, 0.1, seed=5)[1] != valid).any()
    with pytest.raises(DataError, match="at least 2"):
        split_rows(1, 0.1, seed=0)


def test_what_a_training_set_must_be() -> None:
    theta, x = PRIOR.sample(10, rng_for(0)), np.ones((10, 3))
    u, _ = prepare_simulations(PRIOR, theta, x)
    assert u.shape == (10, 2)
    for bad_theta, bad_x, error, words in [
        (theta[:, :1], x, ShapeError, "theta has shape"),
        (theta, x[:9], ShapeError, "theta has 10, x has 9"),
        (theta[:0], x[:0], DataError, "no rows"),
        (theta, np.where(np.arange(3) == 1, np.nan, x), NonFiniteError, "x has NaN"),
        (theta + 5, x, SupportError, "outside the prior"),
        (theta, np.ones((10, 0)), ShapeError, "at least one value"),
    ]:
        with pytest.raises(error, match=words):
            prepare_simulations(PRIOR, bad_theta, bad_x)


def test_an_observation_must_fit() -> None:
    scaler = XScaler.fit(np.arange(12.0).reshape(4, 3), np.array([True, False, False]))
    assert scaler.check("x", [1, 2, 3])[1]
    assert not scaler.check("x", [[1, 2, 3]])[1]
    with pytest.raises(ShapeError, match=r"x has shape \(4,\); expected \(3,\)"):
        scaler.check("x", np.ones(4))
    with pytest.raises(DataError, match="negative"):
        scaler.check("x", [-1, 2, 3])
    with pytest.raises(NonFiniteError):
        scaler.check("x", [1, np.inf, 3])


def test_slots_of_a_padded_set_share_one_scale_and_the_mask_stays() -> None:
    rng = rng_for(2)
    mask = (np.arange(5) < rng.integers(0, 6, 400)[:, None]).astype(float)
    events = rng.normal([3.0, 1e4], [0.5, 20.0], (400, 5, 2))
    x = np.concatenate([events * mask[..., None], mask[..., None]], axis=2)
    scaler = XScaler.fit(x, np.zeros((5, 3), dtype=bool), chunk=64)
    real = events[mask == 1]
    np.testing.assert_allclose(scaler.mean, np.tile([*real.mean(axis=0), 0], (5, 1)), rtol=1e-9)
    np.testing.assert_allclose(scaler.scale, np.tile([*real.std(axis=0), 1], (5, 1)), rtol=1e-5)
    z = scaler.apply(x).numpy()
    np.testing.assert_array_equal(z[..., 2], mask)
    np.testing.assert_allclose(z[..., :2][mask == 1].std(axis=0), 1, rtol=1e-4)
    # anything else of three axes is scaled column by column: no mask, a gap between events, numbers in an empty slot
    for other in (events, np.flip(x, axis=1), x + np.array([1.0, 0, 0])):
        scale = XScaler.fit(other, np.zeros(other.shape[1:], dtype=bool)).scale
        assert np.ptp(scale[:, 0]) > 0


IMAGE, TRACE, SPECTRUM = Observable("image", shape=(2, 3), missing=True), Observable("trace", 4), Observable("n", 2, kind="counts")
NONE = np.zeros(6, dtype=bool)


def gappy(n: int = 400, seed: int = 0) -> np.ndarray:
    """Images (n, 6) with mean 100 + 10 column and sd 1 + column, a third of the values missing, and one pixel that is never there."""
    rng = rng_for(seed)
    x = rng.normal(100 + 10 * np.arange(6), 1 + np.arange(6), (n, 6))
    x[rng.random(x.shape) < 1 / 3] = np.nan
    x[:, 4] = np.nan
    return x


@pytest.mark.parametrize("chunk", [64, 10_000])
def test_mean_and_width_come_from_the_values_that_are_present(chunk: int) -> None:
    x = gappy()
    scaler = XScaler.fit(x, NONE, observables=[IMAGE], chunk=chunk)
    seen = [0, 1, 2, 3, 5]
    np.testing.assert_allclose(scaler.mean[seen], np.nanmean(x[:, seen], axis=0), rtol=1e-12)
    np.testing.assert_allclose(scaler.scale[seen], np.nanstd(x[:, seen], axis=0), rtol=1e-9)
    assert (scaler.mean[4], scaler.scale[4]) == (0, 1)


def test_a_missing_value_is_zero_beside_an_indicator() -> None:
    x, gone = gappy(), np.isnan(gappy())
    single = XScaler.fit(x, NONE, observables=[IMAGE])
    z = single.apply(x).numpy()
    assert single.shape == (2, 2, 3)
    assert z.shape == (400, 2, 2, 3)
    np.testing.assert_array_equal(z[:, 1].reshape(400, 6), ~gone)
    np.testing.assert_array_equal(z[:, 0].reshape(400, 6)[gone], 0.0)
    np.testing.assert_allclose(z[:, 0].reshape(400, 6)[~gone], ((x - single.mean) / single.scale)[~gone], atol=1e-4)
    both = np.hstack([rng_for(1).normal(5, 2, (400, 4)), x])
    mixed = XScaler.fit(both, np.zeros(10, dtype=bool), observables=[TRACE, IMAGE])
    z = mixed.apply(both).numpy()
    assert mixed.shape == (16,)
    np.testing.assert_allclose(z[:, :4].std(axis=0), 1, rtol=1e-4)
    np.testing.assert_array_equal(z[:, 10:], ~gone)
    assert XScaler.fit(both[:, :4], np.zeros(4, dtype=bool), observables=[TRACE]).shape == (4,)


def test_a_scaler_with_observables_goes_to_a_file_and_back() -> None:
    scaler = XScaler.fit(gappy(), NONE, observables=[IMAGE])
    again = XScaler.from_dict(scaler.to_dict())
    assert (again.observables, again.shape) == ((IMAGE,), (2, 2, 3))
    np.testing.assert_array_equal(again.apply(gappy(seed=1)), scaler.apply(gappy(seed=1)))


def test_a_block_keeps_the_relative_sizes_within_it() -> None:
    both = np.hstack([rng_for(1).normal(5, [1.0, 2.0, 3.0, 4.0], (400, 4)), gappy()])
    scaler = XScaler.fit(both, np.zeros(10, dtype=bool), observables=[TRACE, IMAGE], standardise="block")
    np.testing.assert_allclose(scaler.mean, np.repeat([np.nanmean(both[:, :4]), np.nanmean(both[:, 4:])], [4, 6]), rtol=1e-10)
    np.testing.assert_allclose(scaler.scale, np.repeat([np.nanstd(both[:, :4]), np.nanstd(both[:, 4:])], [4, 6]), rtol=1e-9)
    images = rng_for(2).normal(3.0, np.arange(1, 7).reshape(2, 3), (300, 2, 3))
    whole = XScaler.fit(images, np.zeros((2, 3), dtype=bool), standardise="block")
    np.testing.assert_allclose(whole.scale, np.full((2, 3), images.std()), rtol=1e-9)
    counts = XScaler.fit(np.full((50, 2), 3.0), np.ones(2, dtype=bool), observables=[SPECTRUM], standardise="block")
    np.testing.assert_array_equal(counts.scale, 1.0)  # Poisson noise has unit width


def test_none_leaves_the_values_and_another_word_is_refused() -> None:
    x = rng_for(0).normal(50, 9, (30, 2, 3))
    np.testing.assert_array_equal(XScaler.fit(x, np.zeros((2, 3), dtype=bool), standardise="none").apply(x), x.astype(np.float32))
    with pytest.raises(SettingError, match="standardise is 'colunm'; expected one of column, block, none; did you mean 'column'"):
        XScaler.fit(x, np.zeros((2, 3), dtype=bool), standardise="colunm")


def test_observations_come_in_every_form_and_in_no_other() -> None:
    scaler = XScaler.fit(gappy(), NONE, observables=[IMAGE])
    x = gappy(3, seed=5)
    for form in (x, x.reshape(3, 2, 3), {"image": x.reshape(3, 2, 3)}):
        rows, single = scaler.check("x", form)
        np.testing.assert_array_equal(rows, x)
        assert not single
    assert scaler.check("x", x[0].reshape(2, 3))[1]
    for shape in ((2, 3, 3), (3, 2), (12,), (5,)):
        with pytest.raises(ShapeError, match=r"expected \(6,\) for one observation, \(n, 6\) for several, \(2, 3\), \(n, 2, 3\)"):
            scaler.check("x", np.zeros(shape))
    plain = XScaler.fit(np.random.default_rng(0).normal(size=(9, 2)), np.zeros(2, dtype=bool))
    with pytest.raises(DataError, match="observables are not known"):
        plain.check("x", {"image": np.zeros(2)})


def test_nan_inf_and_fractions_are_named_where_they_are_no_missing_values() -> None:
    x = np.hstack([gappy(), rng_for(0).poisson(3.0, (400, 2))])
    counts = np.repeat([False, True], [6, 2])
    scaler = XScaler.fit(x, counts, observables=[IMAGE, SPECTRUM])
    for column, value, message in (
        (1, np.inf, r"first inf at index \(2, 1\), image\[0, 1\]"),
        (
            6,
            np.nan,
            r"first nan at index \(2, 6\), n\[0\]; expected finite values, and NaN only where Observable",
        ),
        (slice(None), np.nan, r"first nan at index \(2, 6\)"),
    ):
        bad = x[:5].copy()
        bad[2, column] = value
        with pytest.raises(NonFiniteError, match=message):
            scaler.check("x", bad)
    with pytest.raises(NonFiniteError, match="no value in 1 of 2 rows, first in row 1"):
        XScaler.fit(gappy(), NONE, observables=[IMAGE]).check("x", np.array([[1.0, *[np.nan] * 5], [np.nan] * 6]))
    bad = x[:5].copy()
    bad[3, 7] = 2.5
    with pytest.raises(DataError, match=r"x has 2.5 in n\[1\] of row 3, of kind 'counts'; expected whole numbers, or kind='real'"):
        scaler.check("x", bad)
    with pytest.raises(DataError, match="negative"):
        require_counts("x", -x, counts, [IMAGE, SPECTRUM])
    with pytest.raises(DataError, match=r"x has 2.5 in n\[1\]"):
        require_counts("x", bad, counts, [IMAGE, SPECTRUM])
    require_counts("x", bad, np.zeros(8, dtype=bool), [IMAGE, SPECTRUM])  # x_transform='real': no counts


def test_a_parameter_with_one_value_in_all_rows_is_refused() -> None:
    prior = BoxPrior([Parameter("mass", 0.0, 5.0), Parameter("spin", -1.0, 1.0)])
    theta = prior.sample(60, np.random.default_rng(0))
    theta[:, 1] = 0.25
    with pytest.raises(DataError, match=r"theta has spin = 0.25 in all 60 rows; expected draws of the prior, or a prior without spin"):
        prepare_simulations(prior, theta, theta)


def test_a_grid_with_points_on_the_edges_stays_within_the_prior() -> None:
    """21 points from edge to edge: an edge has the outermost 1/21 of the prior, whose median is at Phi^-1(1/42) = -1.98."""
    prior = BoxPrior([Parameter("mass", 0.0, 5.0)])
    theta = np.repeat(np.linspace(0.0, 5.0, 21), 20)[:, None]
    with pytest.warns(UserWarning, match="theta has 4.76 % of the rows on the .* edge of mass: simulations on a grid"):
        u, _ = prepare_simulations(prior, theta, theta)
    assert u.min() == pytest.approx(-1.9808, abs=1e-3) and u.max() == pytest.approx(1.9808, abs=1e-3)
    inside, _ = prepare_simulations(prior, theta[20:-20], theta[20:-20])
    np.testing.assert_array_equal(inside, prior.to_unbounded(theta[20:-20]))


def test_rows_in_the_tail_of_the_prior_are_not_on_an_edge() -> None:
    prior = NormalPrior([Parameter("a")], mean=[0.0], sd=[1.0])
    theta = np.random.default_rng(0).normal(0, 2, size=(2000, 1))  # from a broader proposal
    u, _ = prepare_simulations(prior, theta, theta)
    assert (np.abs(theta) > 5).sum() > 10 and np.abs(theta).max() < 8
    np.testing.assert_allclose(u, prior.to_unbounded(theta))
