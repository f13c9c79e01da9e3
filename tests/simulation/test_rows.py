"""Rows that fail: kept as NaN with their reason, wherever a simulator is called outside of a campaign."""

import pickle
from typing import ClassVar

import numpy as np
import pytest

import sbi_phys as sp
from sbi_phys.core.errors import DataError, SbiPhysError, SimulatorMismatchError
from sbi_phys.priors import BoxPrior, Observable, Parameter
from sbi_phys.simulation.external import FunctionSimulator
from sbi_phys.simulation.protocol import RowsFailedError
from sbi_phys.simulation.rows import simulate_rows
from tests.toys import Flaky, LinearGaussian

PRIOR = BoxPrior([Parameter("a", 0.0, 10.0)])


class Toy:
    """x = a + N(0, 1); raises for a batch with a > 8, and gives NaN for a < 1."""

    settings: ClassVar[dict] = {}
    prior = PRIOR
    parameters = PRIOR.parameters
    observables = (Observable("x", 1), Observable("y", shape=(1, 1), missing=True))
    calls = 0

    def simulate(self, theta, rng):
        self.calls += 1
        if (theta > 8).any():
            raise ValueError(f"a is {theta.max():.0f} at 0xdeadbeef0")
        x = theta + rng.standard_normal(theta.shape)
        theta[:] = -1  # in place: the caller's array must not change
        return np.hstack([np.where(x < -90, np.nan, x), np.full_like(x, np.nan)])


def one_event(theta, rng):
    if theta["a"] > 8:
        raise ValueError("no convergence")
    return [theta["a"]]


def test_rows_that_raise_are_found_and_the_others_kept():
    theta = np.linspace(0.05, 9.95, 100)[:, None]
    given, toy = theta.copy(), Toy()
    x, reasons = simulate_rows(toy, theta, np.random.default_rng(1))
    np.testing.assert_array_equal(theta, given)
    assert sorted(reasons) == np.flatnonzero(theta[:, 0] > 8).tolist() == list(reasons)
    assert reasons[99] == "ValueError: a is 10 at 0x..."
    good = theta[:, 0] < 8
    assert np.isnan(x[~good]).all() and np.isfinite(x[good, 0]).all() and np.isnan(x[:, 1]).all()  # y is never measured
    assert np.abs(x[good, 0] - theta[good, 0]).max() < 6
    again, _ = simulate_rows(Toy(), theta, np.random.default_rng(1))
    np.testing.assert_array_equal(again, x)
    assert toy.calls < 60


def test_without_failures_the_rows_are_those_of_simulate():
    toy = LinearGaussian()
    theta = toy.prior.sample(20, np.random.default_rng(0))
    x, reasons = simulate_rows(toy, theta, np.random.default_rng(2))
    np.testing.assert_array_equal(x, toy.simulate(theta, np.random.default_rng(2)))
    assert reasons == {}


def test_a_simulator_that_knows_its_failures_is_called_once():
    simulator = FunctionSimulator(f"{__name__}:one_event", PRIOR, [Observable("x", 1)])
    x, reasons = simulate_rows(simulator, np.array([[1.0], [9.0], [3.0]]), np.random.default_rng(0))
    np.testing.assert_array_equal(x, [[1.0], [np.nan], [3.0]])
    assert reasons == {1: "ValueError: no convergence"}


def test_non_finite_rows_have_a_reason():
    toy = Flaky(9.0, 0.0)  # NaN in x[1] below 0
    theta = np.array([[-1.0, 0.0], [1.0, 0.0]])
    x, reasons = simulate_rows(toy, theta, np.random.default_rng(0))
    assert reasons == {0: "non-finite x in 1 of 2 columns, first nan in x[1]"}
    assert np.isnan(x[0]).all() and np.isfinite(x[1]).all()


def test_what_ends_the_call():
    with pytest.raises(DataError, match=r"all 2 rows of tests.simulation.test_rows:Toy.simulate failed, row 0: ValueError: a is 9"):
        simulate_rows(Toy(), np.full((2, 1), 9.0), np.random.default_rng(0))
    toy = Toy()
    toy.simulate = lambda theta, rng: np.zeros((1, 7))
    with pytest.raises(SimulatorMismatchError, match=r"returned shape \(1, 7\)"):
        simulate_rows(toy, np.ones((3, 1)), np.random.default_rng(0))

    def no_memory(theta, rng):
        raise MemoryError

    toy.simulate = no_memory
    with pytest.raises(MemoryError):
        simulate_rows(toy, np.ones((3, 1)), np.random.default_rng(0))


def test_the_error_is_one_of_the_projects_and_short():
    err = RowsFailedError(np.zeros((3, 2)), {1: "x" * 5000})
    assert isinstance(err, SbiPhysError) and len(str(err)) < 260 and str(err).startswith("1 of 3 rows failed, first row 1: xxx")
    back = pickle.loads(pickle.dumps(err))
    assert back.reasons == err.reasons and back.x.shape == (3, 2)


def test_calibration_survives_failing_rows():
    class Exact:
        prior = PRIOR

        def sample(self, x, n, *, seed):
            return np.random.default_rng(seed).normal(x[:, None, :], 1.0, (len(x), n, 1))

    simulator = FunctionSimulator(f"{__name__}:one_event", PRIOR, [Observable("x", 1)])
    with pytest.warns(
        RuntimeWarning, match=r"of 200 simulations of .*FunctionSimulator failed and are left out.*ValueError: no convergence"
    ):
        found = sp.calibrate(Exact(), simulator, n=200, n_draws=20)
    assert 130 < found.n < 185
