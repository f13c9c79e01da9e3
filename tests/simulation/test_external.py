import json
import sys
import time

import numpy as np
import pytest

from sbi_phys.core.errors import SettingError
from sbi_phys.core.rng import rng_for
from sbi_phys.priors import NormalPrior, Observable, Parameter
from sbi_phys.simulation.campaign import simulate
from sbi_phys.simulation.external import CommandSimulator, FunctionSimulator
from sbi_phys.simulation.protocol import RowsFailedError, check_simulator, load_simulator
from tests.store.helpers import digests

PRIOR = NormalPrior([Parameter("t0"), Parameter("t1")])
THREE = [Observable("signal", 3)]
PROGRAM = """
import sys, time, pathlib
t0, t1, seed = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
if t0 > 1.5:
    print("table not found", file=sys.stderr)
    sys.exit(3)
if t1 > 1.5:
    time.sleep(3600)
print(t0, t1, seed, sep=", ")
"""


def command(text=PROGRAM, **settings):
    return CommandSimulator([sys.executable, "-c", text, "{t0}", "{t1:.17g}", "{seed}"], PRIOR, THREE, **settings)


def test_a_function_of_one_event_fits_the_protocol():
    simulator = FunctionSimulator("tests.toys:one_event", PRIOR, THREE)
    check_simulator(simulator, n_simulations=0)
    theta = np.array([[0.1, 0.2], [0.3, 0.4]])
    x = simulator.simulate(theta, rng_for(1))
    np.testing.assert_array_equal(x[:, :2], theta)
    assert x[0, 2] != x[1, 2]
    again = load_simulator("sbi_phys.simulation.external:FunctionSimulator", json.loads(json.dumps(simulator.settings)))
    np.testing.assert_array_equal(x, again.simulate(theta, rng_for(1)))


def test_events_that_fail_are_flagged_and_the_others_are_not_simulated_twice(tmp_path):
    simulator = FunctionSimulator("tests.toys:one_event", PRIOR, THREE)
    with pytest.raises(RowsFailedError, match="1 of 2 rows failed, first row 1: ArithmeticError: no shower at 2.000"):
        simulator.simulate(np.array([[0.0, 0.0], [2.0, 0.0]]), rng_for(0))
    stores = [simulate(simulator, 60, tmp_path / str(workers), shard_size=20, workers=workers) for workers in (1, 2)]
    theta, x = stores[0].read()
    np.testing.assert_allclose(x[:, :2], theta, rtol=1e-6)
    assert 1 <= stores[0].n_failed == 60 - len(theta)
    assert all(failure.reason.startswith("ArithmeticError: no shower at") for failure in stores[0].failures())
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_a_program_gets_the_parameters_and_a_seed():
    simulator = command()
    theta = np.array([[0.25, -1.0], [0.1, 0.2]])
    x = simulator.simulate(theta, rng_for(5))
    np.testing.assert_array_equal(x[:, :2], theta)
    assert len(set(x[:, 2])) == 2 and (x[:, 2] < 2**31).all()
    again = load_simulator("sbi_phys.simulation.external:CommandSimulator", json.loads(json.dumps(simulator.settings)))
    np.testing.assert_array_equal(x, again.simulate(theta, rng_for(5)))


def test_exit_status_and_hanging_are_reasons():
    begin = time.monotonic()
    with pytest.raises(RowsFailedError) as found:
        command(timeout=0.5).simulate(np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), rng_for(0))
    assert time.monotonic() - begin < 10
    assert sorted(found.value.reasons) == [0, 1]
    assert found.value.reasons[0].endswith("ended with status 3: table not found")
    assert "did not end within the timeout of 0.5 s" in found.value.reasons[1]
    assert np.isfinite(found.value.x[2]).all()


def test_files_go_in_and_come_out():
    text = "import pathlib; pathlib.Path('out.csv').write_text(pathlib.Path('card.txt').read_text())"
    simulator = CommandSimulator([sys.executable, "-c", text], PRIOR, THREE, output="out.csv", files={"card.txt": "{t0:.3f} {t1:.3f}\n7"})
    np.testing.assert_array_equal(simulator.simulate(np.array([[0.5, 0.25]]), rng_for(0)), [[0.5, 0.25, 7.0]])


def test_a_program_that_fails_now_and_then_is_run_again(tmp_path):
    text = (
        f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'mark')!r}); new = not p.exists(); p.touch(); print(1, 2, 3); sys.exit(new)"
    )
    x = command(f"{text}; sys.exit(new)", retries=1).simulate(np.zeros((1, 2)), rng_for(0))
    np.testing.assert_array_equal(x, [[1, 2, 3]])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("print(1, 2)", "2 values; expected 3: signal (3)"),
        ("print('a b c')", "is not a number"),
        ("pass", "0 values; expected 3"),
        ("import os; os.kill(os.getpid(), 11)", "ended with signal 11"),
    ],
)
def test_wrong_output_is_a_reason(text, reason):
    with pytest.raises(RowsFailedError) as found:
        command(text).simulate(np.zeros((1, 2)), rng_for(0))
    assert reason in found.value.reasons[0]


def test_a_missing_output_file_is_a_reason():
    with pytest.raises(RowsFailedError, match=r"left no out.npy: nothing on stderr"):
        command("pass", output="out.npy").simulate(np.zeros((1, 2)), rng_for(0))


def test_wrong_settings_are_named():
    with pytest.raises(SettingError, match=r"\{energy\} in '\{energy\}' is not a parameter; expected one of folder, seed, t0, t1"):
        CommandSimulator(["sim", "{energy}"], PRIOR, THREE)
    with pytest.raises(SettingError, match="expected a list of strings"):
        CommandSimulator("sim --energy 1", PRIOR, THREE)
    with pytest.raises(SettingError, match="timeout"):
        command(timeout=0)
    with pytest.raises(SettingError, match="expected 'package.module:name'"):
        FunctionSimulator("one_event", PRIOR, THREE)
    with pytest.raises(SettingError, match="cannot be found"):
        FunctionSimulator("tests.toys:none", PRIOR, THREE)
    with pytest.raises(SettingError, match="observables is empty"):
        FunctionSimulator("tests.toys:one_event", PRIOR, [])
