"""What calibration tests share: checked pairs and names, ranks with ties at random, draws of other tools."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sbi_phys.calibration.inputs import (
    check_log_probs,
    check_names,
    check_pairs,
    check_quantities,
    count_below,
    draws_from_arviz,
    require_varying,
    wrong_order,
)
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.priors import Parameter

THETA, DRAWS = np.arange(20.0).reshape(10, 2), np.arange(60.0).reshape(10, 3, 2)


def spoilt(array: np.ndarray, value: float) -> np.ndarray:
    out = array.copy()
    out.flat[-1] = value
    return out


def test_pairs_become_float64_with_a_column_per_parameter() -> None:
    theta, draws = check_pairs(np.arange(10), np.arange(30, dtype=np.float32).reshape(10, 3))
    assert theta.shape == (10, 1) and draws.shape == (10, 3, 1) and theta.dtype == draws.dtype == np.float64
    assert draws[4, 2, 0] == 14
    for got, given in zip(check_pairs(THETA.tolist(), DRAWS), (THETA, DRAWS), strict=True):
        assert np.array_equal(got, given)


@pytest.mark.parametrize(
    ("theta", "draws", "error", "words"),
    [
        (THETA[0], DRAWS, ShapeError, r"theta has shape \(2,\); expected \(n, d\)"),
        (THETA, DRAWS[:, :, :1], ShapeError, r"draws has shape \(10, 3, 1\); expected \(n, l, d\) = \(10, l, 2\)"),
        (THETA, DRAWS[:9], ShapeError, r"draws has shape \(9, 3, 2\)"),
        (THETA, DRAWS[..., 0], ShapeError, r"draws has shape \(10, 3\)"),
        (THETA[:, :0], DRAWS[..., :0], ShapeError, "at least one parameter"),
        (THETA[:9], DRAWS[:9], DataError, "theta has 9 rows; expected at least 10"),
        (THETA, DRAWS[:, :1], DataError, "draws has 1 draws per simulation; expected at least 2"),
        (spoilt(THETA, np.nan), DRAWS, NonFiniteError, "theta has NaN"),
        (THETA, spoilt(DRAWS, np.inf), NonFiniteError, "draws has NaN or Inf"),
        (THETA + 0j, DRAWS, DataError, "theta has dtype complex128"),
    ],
)
def test_bad_pairs(theta: Any, draws: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_pairs(theta, draws)


def test_names_and_labels() -> None:
    assert check_names(None, 2) == (("theta_0", "theta_1"), (r"$\theta_{0}$", r"$\theta_{1}$"))
    mass = Parameter("mass", latex="m_0")
    assert check_names([mass, "width"], 2) == (("mass", "width"), ("$m_0$", "width"))
    assert check_names("mass", 1) == (("mass",), ("mass",)) and check_names(Parameter("x"), 1) == (("x",), ("x",))


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["a"], ShapeError, r"names has 1 entries \('a',\); expected 2, one per column"),
        ("ab", ShapeError, r"names has 1 entries \('ab',\)"),
        (["a", "a"], SettingError, r"names repeat: \('a', 'a'\)"),
        ([Parameter("a"), "a"], SettingError, "names repeat"),
        (["a", 1], SettingError, "expected text or Parameter for each column"),
    ],
)
def test_bad_names(names: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_names(names, 2)


def test_quantities_may_be_infinite() -> None:
    assert check_quantities(None, 2, 3) == {} == check_quantities({}, 2, 3)
    values, draws = check_quantities({"log_prob": ([-np.inf, 1], np.zeros((2, 3), dtype=int))}, 2, 3)["log_prob"]
    assert values.tolist() == [-np.inf, 1] and draws.dtype == np.float64


@pytest.mark.parametrize(
    ("pair", "error", "words"),
    [
        (np.zeros(2), SettingError, r"quantity 'q' is ndarray; expected \(values \(n,\), draw_values \(n, l\)\)"),
        ((np.zeros(2),), SettingError, "quantity 'q' is tuple"),
        ((np.zeros(3), np.zeros((2, 3))), ShapeError, r"values of quantity 'q' has shape \(3,\); expected \(2,\)"),
        ((np.zeros(2), np.zeros((3, 2))), ShapeError, r"draw values of quantity 'q' has shape \(3, 2\); expected \(2, 3\)"),
        ((np.array([0, np.nan]), np.zeros((2, 3))), NonFiniteError, "quantity 'q' has NaN"),
        ((np.zeros(2), np.full((2, 3), np.nan)), NonFiniteError, "quantity 'q' has NaN"),
    ],
)
def test_bad_quantities(pair: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_quantities({"q": pair}, 2, 3)


def test_log_probs_may_be_minus_infinity() -> None:
    assert check_log_probs(None, None, 2, 3) is None
    found = check_log_probs([0.0, -np.inf], np.zeros((2, 3)), 2, 3)
    assert found is not None and found[0].tolist() == [0, -np.inf]


@pytest.mark.parametrize(
    ("theta", "draws", "error", "words"),
    [
        (None, np.zeros((2, 3)), SettingError, "log_prob_theta is None; expected both"),
        (np.zeros(2), None, SettingError, "log_prob_draws is None; expected both"),
        (np.zeros(2), np.zeros((2, 2)), ShapeError, r"log_prob_draws has shape \(2, 2\); expected \(2, 3\)"),
        (np.array([0.0, np.inf]), np.zeros((2, 3)), NonFiniteError, r"log_prob_theta has NaN or \+Inf, first in row 1"),
        (np.zeros(2), spoilt(np.zeros((2, 3)), np.nan), NonFiniteError, "log_prob_draws has NaN .*first in row 1"),
        (np.full(2, 1.5), np.full((2, 3), 1.5), DataError, r"are constant \(1.5\)"),
        (np.full(2, -np.inf), np.full((2, 3), -np.inf), DataError, r"are constant \(-inf\)"),
    ],
)
def test_bad_log_probs(theta: Any, draws: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_log_probs(theta, draws, 2, 3)


def test_a_constant_parameter_is_named() -> None:
    require_varying("a", np.ones(2), np.array([[1.0, 1.0], [1.0, 2.0]]))
    require_varying("a", np.array([1.0, 2.0]), np.ones((2, 2)))
    with pytest.raises(DataError, match=r"parameter 'a' is constant \(1\)"):
        require_varying("a", np.ones(2), np.ones((2, 2)))


def test_ranks_count_the_draws_below() -> None:
    draws = np.tile([1.0, 2.0, 3.0, 4.0], (5, 1))
    values = np.array([0.0, 1.5, 2.5, 9.0, -np.inf])
    assert count_below(values, draws, np.random.default_rng(0)).tolist() == [0, 1, 2, 4, 0]


def test_a_tie_takes_each_of_its_positions_equally_often() -> None:
    n = 30_000
    draws = np.tile([0.0, 1.0, 1.0, 2.0, -np.inf], (n, 1))
    found = np.bincount(count_below(np.ones(n), draws, np.random.default_rng(1)), minlength=6)
    # two below, two equal: positions 2, 3, 4
    assert found[[0, 1, 5]].tolist() == [0, 0, 0]
    assert np.abs(found[2:5] - n / 3).max() < 5 * (n * 2 / 9) ** 0.5
    infinite = count_below(np.full(1000, -np.inf), draws[:1000], np.random.default_rng(2))
    assert set(infinite.tolist()) == {0, 1}


def test_draws_of_an_arviz_object_with_chains_joined() -> None:
    xarray = pytest.importorskip("xarray")
    chains = np.arange(48.0).reshape(2, 3, 4, 2)  # chain, draw, simulation, parameter
    group = xarray.Dataset({name: (("chain", "draw", "s"), chains[..., j]) for j, name in enumerate("ab")})
    expected = np.stack([chains[:, :, s].reshape(6, 2) for s in range(4)])
    assert np.array_equal(draws_from_arviz({"posterior": group}), expected)
    assert np.array_equal(draws_from_arviz({"posterior": group}, [Parameter("b"), "a"]), expected[..., ::-1])
    assert np.array_equal(draws_from_arviz({"posterior": group.transpose("s", "draw", "chain")}), expected)
    one = draws_from_arviz({"posterior": group.isel(chain=1)}, ["a"])  # no axis of chains
    assert np.array_equal(one[..., 0], chains[1, :, :, 0].T)


@pytest.mark.parametrize(
    ("change", "names", "error", "words"),
    [
        (lambda g: g, ["c"], SettingError, r"no variable 'c'; expected \['c'\], it has \['a', 'b'\]"),
        (lambda g: g.isel(s=0), ["a"], ShapeError, r"variable 'a' has dimensions \('chain', 'draw'\); expected \(chain, draw, one"),
        (lambda g: g.isel(draw=0), ["a"], ShapeError, "variable 'a' has dimensions"),
        (
            lambda g: g.assign(b=g["b"].isel(s=slice(3)).rename(s="t")),
            None,
            ShapeError,
            r"\{'a': \(4, 6\), 'b': \(3, 6\)\}; expected the same",
        ),
    ],
)
def test_bad_arviz_objects(change: Any, names: Any, error: type[Exception], words: str) -> None:
    xarray = pytest.importorskip("xarray")
    group = xarray.Dataset({name: (("chain", "draw", "s"), np.zeros((2, 3, 4))) for name in "ab"})
    with pytest.raises(error, match=words):
        draws_from_arviz(SimpleHolder(change(group)), names)


class SimpleHolder(SimpleNamespace):
    def __init__(self, posterior: Any) -> None:
        super().__init__(posterior=posterior)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@pytest.mark.parametrize("d", [1, 3])
def test_axes_in_another_order_are_said(d: int) -> None:
    """As many draws as simulations: shapes cannot tell, but the means of the right axis follow theta."""
    n, rng = 120, np.random.default_rng(d)
    theta = rng.normal(size=(n, d))
    draws = theta[:, None] + 0.8 * rng.normal(size=(n, 1, d)) + 0.8 * rng.normal(size=(n, n, d))
    assert wrong_order(theta, draws) == "" == wrong_order(theta, rng.normal(size=(n, n, d)))  # the second is the prior: right axes
    check_pairs(theta, draws)
    with pytest.warns(UserWarning, match=r"axes seem to be \(draws, simulations, d\).*draws.transpose\(1, 0, 2\)"):
        check_pairs(theta, draws.transpose(1, 0, 2))
    with pytest.raises(ShapeError, match=r"the axes seem to be \(l, n, d\)"):
        check_pairs(theta, draws[:, :50].transpose(1, 0, 2))
