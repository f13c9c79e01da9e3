"""Programs and the processes that they start end with their event, with its time limit, and with the process that runs them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sbi_phys.core.rng import rng_for
from sbi_phys.priors import BoxPrior, Observable, Parameter
from sbi_phys.simulation import _programs
from sbi_phys.simulation._programs import run_program
from sbi_phys.simulation.campaign import simulate
from sbi_phys.simulation.external import CommandSimulator, FunctionSimulator
from sbi_phys.simulation.protocol import RowsFailedError

ROOT = Path(__file__).parents[2]
PRIOR = BoxPrior([Parameter("a", 0.0, 1.0)])
ONE = [Observable("x", 1)]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
CAMPAIGN = """
import sys
from sbi_phys.priors import BoxPrior, Observable, Parameter
from sbi_phys.simulation.campaign import simulate
from sbi_phys.simulation.external import CommandSimulator
if __name__ == "__main__":
    simulator = CommandSimulator(["sh", "-c", sys.argv[1]], BoxPrior([Parameter("a", 0.0, 1.0)]), [Observable("x", 1)])
    simulate(simulator, 4, sys.argv[2], shard_size=1, workers=int(sys.argv[3]))
"""


def at_work(seconds):
    """Processes `sleep seconds`; the number tells the tests apart."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "cmdline").read_bytes() == b"sleep\0%s\0" % seconds.encode():
                    found.append(int(entry.name))
    return found


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def sleep():
    """A duration that no other process sleeps; its sleepers are killed at the end."""
    seconds = f"{3000 + os.getpid() % 1000}.{time.monotonic_ns() % 10**8:08d}"
    yield seconds
    for process in at_work(seconds):
        os.kill(process, signal.SIGKILL)


def run(text, **settings):
    simulator = CommandSimulator(["sh", "-c", text], PRIOR, ONE, **settings)
    return simulator.simulate(np.full((1, 1), 0.5), rng_for(0))


@LINUX
@pytest.mark.parametrize("how", ["{} & echo 2", "{} > /dev/null 2>&1 & echo 2"])
def test_a_program_that_ends_takes_its_processes_along(sleep, how):
    begin = time.monotonic()
    np.testing.assert_array_equal(run(how.format(f"sleep {sleep}")), [[2]])
    assert time.monotonic() - begin < 10
    assert until(lambda: not at_work(sleep), 5)


@LINUX
@pytest.mark.parametrize("how", ["sleep {}", "sleep {} & wait", "setsid sleep {} & wait", "exec >&- 2>&-; sleep {}"])
def test_the_time_limit_ends_all_processes(sleep, how):
    with pytest.raises(RowsFailedError, match=r"did not end within the timeout of 0.5 s"):
        run(how.format(sleep), timeout=0.5)
    assert until(lambda: not at_work(sleep), 5)


@LINUX
@pytest.mark.parametrize(
    ("number", "workers", "how"),
    [
        (signal.SIGKILL, 1, "sleep {0} & sleep {0}"),
        (signal.SIGKILL, 2, "sleep {0}"),
        (signal.SIGKILL, 1, "setsid sleep {0} & wait"),
        (signal.SIGTERM, 1, "sleep {0}"),
        (signal.SIGINT, 2, "sleep {0}"),
    ],
)
def test_programs_end_with_the_campaign(tmp_path, sleep, number, workers, how):
    """... and the working folders of their events go."""
    (tmp_path / "events").mkdir()
    (tmp_path / "campaign.py").write_text(CAMPAIGN)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "events")}
    command = [sys.executable, str(tmp_path / "campaign.py"), how.format(sleep), str(tmp_path / "store"), str(workers)]
    campaign = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert until(lambda: len(at_work(sleep)) >= min(workers, 2))
    finally:
        campaign.send_signal(number)
        campaign.wait(60)
    assert until(lambda: not at_work(sleep), 10)
    assert until(lambda: not list((tmp_path / "events").glob("sbi_phys_event_*")), 10)


@LINUX
def test_the_time_limit_of_a_row_ends_its_program(tmp_path, sleep):
    simulator = CommandSimulator(["sh", "-c", f"test {{a:.3f}} = 0.500 && sleep {sleep}; echo 1"], PRIOR, ONE)
    store = simulate(simulator, None, tmp_path / "s", theta=[[0.25], [0.5], [0.75]], timeout=1.0, workers=1)
    assert store.n_failed == 1
    assert until(lambda: not at_work(sleep), 10)


@LINUX
def test_the_time_limit_of_a_row_ends_what_a_function_started(tmp_path, sleep):
    (tmp_path / "sleeping_event.py").write_text(
        "import subprocess\ndef event(theta, rng):\n"
        f"    if theta['a'] == 0.5:\n        subprocess.run(['sleep', '{sleep}'])\n    return [1.0]\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        simulator = FunctionSimulator("sleeping_event:event", PRIOR, ONE)
        store = simulate(simulator, None, tmp_path / "s", theta=[[0.25], [0.5], [0.75]], timeout=1.0, workers=1)
    finally:
        sys.path.remove(str(tmp_path))
    assert store.n_failed == 1
    assert until(lambda: not at_work(sleep), 10)


@LINUX
def test_a_watcher_that_was_killed_is_replaced():
    run("echo 1")
    first = _programs._WATCHER._process
    first.kill()
    first.wait()
    np.testing.assert_array_equal(run("echo 3"), [[3]])
    assert _programs._WATCHER._process.poll() is None


def test_output_without_end_is_refused_at_once():
    begin = time.monotonic()
    with pytest.raises(RowsFailedError, match=r"sh wrote more than 1048640 bytes to stdout; expected 1 values"):
        run("exec yes", timeout=60.0)
    assert time.monotonic() - begin < 20


def test_of_what_is_not_read_only_the_end_is_kept(tmp_path):
    text = "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; echo the end >&2"
    done = run_program(["sh", "-c", text], tmp_path, limit=100)
    assert (done.status, done.output, done.too_long) == (0, bytes(100), True)
    assert len(done.errors) <= 2**16 and done.errors.endswith(b"the end\n")
    done = run_program(["sh", "-c", "printf 12345; exit 3"], tmp_path, limit=5)
    assert (done.status, done.output, done.too_long, done.errors) == (3, b"12345", False, b"")


def test_files_that_are_too_large_are_refused(tmp_path):
    with pytest.raises(RowsFailedError, match=r"sh wrote 2000000 bytes to out.txt; expected 1 values, below 1048640"):
        run("head -c 2000000 /dev/zero > out.txt", output="out.txt")
    # an array that claims to have 10^13 values
    np.save(tmp_path / "a.npy", np.zeros(1))
    data = (tmp_path / "a.npy").read_bytes().replace(b"(1,), }" + b" " * 15, b"(10000000000000,), }  ")
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(RowsFailedError, match="row 0: ValueError|row 0: OSError"):
        run(f"cp {tmp_path / 'a.npy'} out.npy", output="out.npy")
    np.save(tmp_path / "b.npy", np.zeros(2))
    with pytest.raises(RowsFailedError, match="an event has 2 values; expected 1"):
        run(f"cp {tmp_path / 'b.npy'} out.npy", output="out.npy")
