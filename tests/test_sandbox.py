import numpy as np
import pytest

from sbi_phys.errors import StoreError
from sbi_phys.processes import pickle_simulator
from sbi_phys.rng import rng_for
from sbi_phys.sandbox import RowTimeoutError, Sandbox, SandboxDiedError
from sbi_phys.simulate import simulate
from tests.shard_helpers import digests
from tests.toys import LinearGaussian, Misbehaving, Poison

GOOD, BAD = np.zeros((4, 2)), np.array([[0.0, 0.0], [2.0, 0.0]])


def test_the_numbers_are_those_of_a_call_in_this_process():
    with Sandbox(pickle_simulator(LinearGaussian())) as box:
        for _ in range(2):
            got = box.simulate(GOOD, rng_for(1, "x"))
            np.testing.assert_array_equal(got, LinearGaussian().simulate(GOOD, rng_for(1, "x")))


@pytest.mark.parametrize(("how", "words"), [("dies", r"signal 9 \(SIGKILL\)"), ("exits", "exit status 13")])
def test_a_death_is_an_exception_and_the_next_call_works(how, words):
    with Sandbox(pickle_simulator(Poison(how))) as box:
        with pytest.raises(SandboxDiedError, match=words):
            box.simulate(BAD, rng_for(1))
        assert box.simulate(GOOD, rng_for(1)).shape == (4, 2)


def test_a_call_that_hangs_ends_and_the_next_one_works():
    with Sandbox(pickle_simulator(Poison("hangs")), timeout=0.3) as box:
        with pytest.raises(RowTimeoutError, match=r"no answer within the timeout of 0\.3 s"):
            box.simulate(BAD, rng_for(1))
        assert box.simulate(GOOD, rng_for(1)).shape == (4, 2)


def test_an_error_of_the_simulator_is_raised_as_it_is():
    with Sandbox(pickle_simulator(Poison("raises"))) as box, pytest.raises(ValueError, match="no shower at 2"):
        box.simulate(BAD, rng_for(1))


def test_a_single_unlucky_kill_leaves_no_trace(tmp_path):
    simulator = Misbehaving("dies once", str(tmp_path))
    with Sandbox(pickle_simulator(simulator)) as box:
        got = box.simulate(GOOD, rng_for(3))
    assert (tmp_path / "died").exists()
    np.testing.assert_array_equal(got, simulator.simulate(GOOD, rng_for(3)))


def test_what_a_simulator_prints_does_not_reach_our_output(capfd):
    with Sandbox(pickle_simulator(Poison("prints"))) as box:
        box.simulate(BAD, rng_for(1))
    assert "progress" not in capfd.readouterr().out


def test_a_simulator_that_always_dies_is_an_error(tmp_path):
    with pytest.raises(StoreError, match=r"exit status 13, \d+ times in a row; expected a simulator that works for some rows"):
        simulate(Misbehaving("dies"), 4, tmp_path, workers=1, isolate=True)


@pytest.mark.parametrize(
    ("how", "timeout", "reason"),
    [("dies", None, "SandboxDiedError: the simulating process died: signal 9 (SIGKILL)"), ("hangs", 0.25, "RowTimeoutError: no answer")],
)
def test_rows_at_fault_are_flagged_and_the_others_are_there(tmp_path, how, timeout, reason):
    simulator = Poison(how)
    store = simulate(simulator, 24, tmp_path / "one", seed=3, shard_size=12, workers=1, isolate=True, timeout=timeout)
    theta, x = store.read()
    drawn = np.concatenate([simulator.prior.sample(12, rng_for(3, "theta", i)) for i in range(2)])
    bad = int((drawn[:, 0] > 1.5).sum())
    assert 1 <= bad == store.n_failed == 24 - len(theta)
    assert np.isfinite(x).all() and (theta[:, 0] <= 1.5).all()
    assert all(reason in failure.reason for failure in store.failures())


def test_a_row_that_kills_its_worker_is_found_without_being_asked(tmp_path):
    simulator = Poison("dies")
    store = simulate(simulator, 24, tmp_path / "two", seed=3, shard_size=12, workers=2)
    assert store.complete and store.n_failed >= 1
    simulate(simulator, 24, tmp_path / "one", seed=3, shard_size=12, workers=1, isolate=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
