import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest

from sbi_phys.core.errors import SimulatorMismatchError, StoreError
from sbi_phys.core.rng import rng_for
from sbi_phys.priors import Observable
from sbi_phys.simulation import _sandbox
from sbi_phys.simulation._sandbox import RowTimeoutError, Sandbox, SandboxDiedError
from sbi_phys.simulation.campaign import simulate
from sbi_phys.simulation.external import FunctionSimulator
from sbi_phys.simulation.processes import pickle_simulator
from sbi_phys.simulation.protocol import RowsFailedError
from tests.store.helpers import digests
from tests.toys import Events, LinearGaussian, Misbehaving, Poison, SlowStart

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
    with pytest.raises(StoreError, match=r"exit status 13, \d+ times in a row; expected a simulator that succeeds for some rows"):
        simulate(Misbehaving("dies"), 12, tmp_path, workers=1, isolate=True)


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


# ---- one event at a time


def events(how):
    return FunctionSimulator(f"tests.toys:event_that_{how}", LinearGaussian().prior, [Observable("x", 3)])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("exits", "SandboxDiedError: the simulating process died: exit status 13"),
        ("segfaults", "SandboxDiedError: the simulating process died: signal 11 (SIGSEGV)"),
        ("hangs", "RowTimeoutError: no answer within the timeout of 0.2 s"),
        ("raises", "ValueError: no shower"),
    ],
)
def test_a_bad_event_costs_itself_alone(how, reason):
    simulator, theta = events(how), np.zeros((40, 2))
    theta[[7, 8, 39], 0] = 2.0
    good = np.delete(np.arange(40), [7, 8, 39])
    with Sandbox(pickle_simulator(simulator), 0.2 if how == "hangs" else None) as box, pytest.raises(RowsFailedError) as found:
        box.simulate(theta, rng_for(1, "x"))
    assert found.value.reasons == dict.fromkeys([7, 8, 39], reason)
    # those of a run in which nothing is bad
    np.testing.assert_array_equal(found.value.x[good], simulator.simulate(np.zeros((40, 2)), rng_for(1, "x"))[good])


def test_events_that_raise_leave_the_same_bytes_with_and_without_a_sandbox(tmp_path):
    for isolate in (False, True):
        simulate(events("raises"), 60, tmp_path / str(isolate), seed=2, shard_size=20, workers=1, isolate=isolate)
    assert digests(tmp_path / "True") == digests(tmp_path / "False")


def test_an_event_of_another_shape_ends_the_call():
    simulator = Events()
    with Sandbox(pickle_simulator(simulator)) as box:
        np.testing.assert_array_equal(box.simulate(GOOD, rng_for(1)), simulator.simulate(GOOD, rng_for(1)))
        with pytest.raises(SimulatorMismatchError, match=r"one_event returned shape \(1,\); expected \(2,\)"):
            box.simulate(BAD, rng_for(1))
        with pytest.raises(MemoryError):
            box.simulate(BAD + 1, rng_for(1))


def test_an_unlucky_kill_of_one_event_leaves_no_trace(tmp_path):
    theta = np.array([[0.0, 0.0], [-2.0, 0.0], [0.1, 0.0]])
    simulator = Events(str(tmp_path / "died"))
    with Sandbox(pickle_simulator(simulator)) as box:
        got = box.simulate(theta, rng_for(3))
    assert (tmp_path / "died").exists()
    np.testing.assert_array_equal(got, simulator.simulate(theta, rng_for(3)))


# ---- the server


def test_a_death_costs_milliseconds_not_another_start():
    with Sandbox(pickle_simulator(SlowStart())) as box:
        box.simulate(GOOD, rng_for(1))
        begin = time.perf_counter()
        for _ in range(3):
            with pytest.raises(SandboxDiedError):
                box.simulate(BAD, rng_for(1))
        assert time.perf_counter() - begin < 0.5  # SlowStart takes that long to rebuild


ASKS = """
import os, sys
from sbi_phys.priors import NormalPrior, Observable, Parameter
from sbi_phys.simulation.external import CommandSimulator
from sbi_phys.simulation.processes import pickle_simulator
from sbi_phys.core.rng import rng_for
from sbi_phys.simulation._sandbox import Sandbox
import numpy as np

if __name__ == "__main__":
    program = [sys.executable, "-c", "import os; print(len(os.environ.get('OMP_NUM_THREADS', '')), 1)"]
    with Sandbox(pickle_simulator(CommandSimulator(program, NormalPrior([Parameter("a")]), [Observable("x", 2)]))) as box:
        print(box.simulate(np.zeros((1, 1)), rng_for(1)).tolist(), box._child._forks, os.environ.get("OMP_NUM_THREADS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks of a server")
def test_it_forks_whatever_the_environment_and_programs_see_that_unchanged(tmp_path):
    (tmp_path / "asks.py").write_text(ASKS)
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")} | {"PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, tmp_path / "asks.py"], env=env, capture_output=True, text=True, check=True)
    assert found.stdout == "[[0.0, 1.0]] True None\n"


def test_a_server_that_is_killed_is_replaced():
    with Sandbox(pickle_simulator(LinearGaussian())) as box:
        for _ in range(3):
            np.testing.assert_array_equal(box.simulate(GOOD, rng_for(1)), LinearGaussian().simulate(GOOD, rng_for(1)))
            box._child._server.kill()
            box._child._server.join()


def test_the_server_that_starts_nurseries_may_be_killed_too():
    with Sandbox(pickle_simulator(LinearGaussian())) as box:
        for _ in range(2):
            np.testing.assert_array_equal(box.simulate(GOOD, rng_for(1)), LinearGaussian().simulate(GOOD, rng_for(1)))
            os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
            box._child._server.kill()


def test_without_forks_it_works_as_well(monkeypatch):
    monkeypatch.setattr(_sandbox, "_context", lambda: multiprocessing.get_context("fork"))
    monkeypatch.setattr(_sandbox, "_may_fork", lambda: False)
    with Sandbox(pickle_simulator(Poison("exits"))) as box:
        for _ in range(2):
            with pytest.raises(SandboxDiedError, match="exit status 13"):
                box.simulate(BAD, rng_for(1))
            assert box.simulate(GOOD, rng_for(1)).shape == (4, 2)


def test_no_process_is_left_behind():
    box = Sandbox(pickle_simulator(LinearGaussian()))
    box.simulate(GOOD, rng_for(1))
    server = box._child._server.pid
    (simulating,) = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    box.close()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{simulating}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
