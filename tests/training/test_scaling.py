"""Scaling and splitting: numbers against numpy, counts against the variance they should have."""

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.priors import BoxPrior, Observable, Parameter
from sbi_phys.training.scaling import XScaler, count_columns, prepare_simulations, split_rows

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
