"""The map of x to the flow's space: whole numbers come back, Jacobians are exact, what says nothing is left out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sbi_phys as sp
from sbi_phys.core.errors import DataError
from sbi_phys.core.rng import rng_for
from sbi_phys.nets.likelihood import XColumns, noise_points


@given(counts=st.lists(st.integers(0, 10**6), min_size=3, max_size=3), v=st.floats(0.01, 0.99))
def test_counts_survive_the_map(counts: list[int], v: float) -> None:
    """z of a count with any noise leads back to the count."""
    data = rng_for(0).poisson([1.0, 30.0, 1000.0], (50, 3)).astype(float)
    columns = XColumns.fit(data, "auto", "auto", None, data)
    z, _ = columns.to_z(np.array([counts], dtype=float), np.full((1, 3), v))
    assert columns.from_z(z)[0].tolist() == counts


def test_the_jacobian_against_differences() -> None:
    rng = rng_for(0)
    data = np.column_stack([rng.poisson(5.0, 300), rng.lognormal(0, 4, 300), rng.normal(3, 2, 300)]).astype(float)
    observables = [sp.Observable("n", 1, kind="counts"), sp.Observable("e", 1), sp.Observable("y", 1)]
    columns = XColumns.fit(data, "auto", "auto", observables, data)
    assert columns.kind.tolist() == [1, 2, 0] and columns.noisy.tolist() == [True, False, False]
    x, v, h = data[:20], np.full(3, 0.4), 1e-6
    total = np.zeros(20)
    for k in range(3):
        step = h * (np.abs(x[:, k]) if k == 1 else np.maximum(np.abs(x[:, k]), 1.0))
        move = np.zeros((20, 3))
        move[:, k] = step
        total += np.log((columns.to_z(x + move, v)[0] - columns.to_z(x - move, v)[0])[:, k] / (2 * step))
    np.testing.assert_allclose(columns.to_z(x, v)[1], total, atol=1e-4)
    np.testing.assert_allclose(columns.from_z(columns.to_z(x, v)[0]), x, rtol=1e-9, atol=1e-9)
    again = XColumns.from_dict(columns.to_dict())
    assert (again.to_z(x, v)[0] == columns.to_z(x, v)[0]).all() and again.ties == columns.ties


def test_noise_points_fill_the_cube() -> None:
    data = rng_for(0).poisson(5.0, (50, 3)).astype(float)
    columns = XColumns.fit(data, "auto", "auto", None, data)
    points = noise_points(columns, 8, seed=0)
    assert points.shape == (8, 3)
    np.testing.assert_allclose(np.sort(points, axis=0)[:, 0], (np.arange(8) + 0.5) / 8)
    plain = XColumns.fit(data + 0.5, "real", "auto", None, data + 0.5)
    assert noise_points(plain, 8, seed=0).shape == (1, 3)


def test_only_what_varies_freely_is_kept() -> None:
    """Two blocks of counts, one with a constant total, and a constant column."""
    rng = rng_for(0)
    tied, free = rng.multinomial(30, [0.1, 0.6, 0.3], 200), rng.poisson(5.0, (200, 2))
    x = np.column_stack([tied, free, np.full(200, 7.0)]).astype(float)
    blocks = [sp.Observable("tied", 3, kind="counts"), sp.Observable("free", 2, kind="counts"), sp.Observable("c", 1)]
    columns = XColumns.fit(x, "auto", "auto", blocks, x)
    assert columns.kept.tolist() == [0, 2, 3, 4]
    assert columns.ties == (((0, 1, 2), 30.0, 1),) and columns.constant == ((5, 7.0),)
    z, _ = columns.to_z(x[:, columns.kept], np.full(4, 0.5))
    assert (columns.from_z(z) == x).all()
    with pytest.raises(DataError, match="sums to 31 .* row 1"):
        columns.check("x", [x[0], x[0] + [1, 0, 0, 0, 0, 0]])
    # without the blocks, the total over all columns varies: nothing is tied
    assert XColumns.fit(x[:, :5], "auto", "auto", None, x[:, :5]).ties == ()
