"""Worker processes: what is sent to them and comes back, their threads and signals, and their end with the parent."""

import os
import pickle
import subprocess
import sys
import time
from multiprocessing.spawn import get_preparation_data

import pytest

from sbi_phys.core.errors import SettingError
from sbi_phys.simulation import processes
from sbi_phys.simulation.processes import available_cores, limit_threads, main_hidden, pickle_simulator, unpickle_simulator, worker_context
from tests.toys import LinearGaussian, Misbehaving

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="prctl is a call of Linux")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_a_simulator_comes_back_and_is_rebuilt_once() -> None:
    data = pickle_simulator(LinearGaussian(dim=3, noise=0.25))
    found = unpickle_simulator(data)
    assert type(found) is LinearGaussian and found.settings == LinearGaussian(dim=3, noise=0.25).settings
    assert unpickle_simulator(data) is found
    assert unpickle_simulator(pickle_simulator(LinearGaussian(dim=2))) is not found


def test_a_class_in_a_function_is_sent_by_its_code() -> None:
    class Local(LinearGaussian):
        pass

    found = unpickle_simulator(pickle_simulator(Local(dim=3)))
    assert type(found).__name__ == "Local" and found.settings == Local(dim=3).settings


def test_a_simulator_that_holds_an_open_file_cannot_be_sent(tmp_path) -> None:
    simulator = LinearGaussian()
    with (
        (tmp_path / "log").open("w") as simulator.log,
        pytest.raises(SettingError, match="PicklingError: Cannot pickle files .*open files"),
    ):
        pickle_simulator(simulator)


def test_workers_do_not_import_the_script_and_the_module_is_as_before(monkeypatch) -> None:
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", "script.py", raising=False)
    before = dict(vars(main))
    with main_hidden():
        assert "__file__" not in vars(main) and main.__spec__ is None
        assert not {"init_main_from_path", "init_main_from_name"} & set(get_preparation_data("worker"))
    assert dict(vars(main)) == before
    assert worker_context().get_start_method() == "spawn"


def test_a_pickle_that_a_worker_cannot_read_is_explained() -> None:
    data = pickle.dumps(LinearGaussian()).replace(b"LinearGaussian", b"LinearGauzzian")
    with pytest.raises(SettingError, match="cannot be rebuilt in a worker process: AttributeError: .*LinearGauzzian"):
        unpickle_simulator(data)
    with pytest.raises(SettingError, match="cannot be rebuilt in a worker process: UnpicklingError"):
        unpickle_simulator(pickle_simulator(Misbehaving())[:-5] + b"xxxxx")


def test_the_cores_are_those_that_this_process_may_use(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5} if pid == 0 else {0}, raising=False)
    assert available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1


def test_threads_are_limited_within_the_block_alone() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(limits=2):
        before = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
        with limit_threads():
            assert {pool["num_threads"] for pool in threadpoolctl.threadpool_info()} == {1}
        assert [pool["num_threads"] for pool in threadpoolctl.threadpool_info()] == before
    assert processes.limit_threads_for_good.cache_info().maxsize is None  # the limit of a worker is set once and kept


def test_a_worker_ignores_ctrl_c_and_has_one_thread() -> None:
    code = """
import numpy, os, signal
from sbi_phys.simulation.processes import start_worker
from threadpoolctl import threadpool_info
start_worker()
os.kill(os.getpid(), signal.SIGINT)
print({pool["num_threads"] for pool in threadpool_info()})
"""
    found = python(code)
    assert (found.returncode, found.stdout.strip()) == (0, "{1}"), found.stderr


@LINUX
def test_a_worker_whose_parent_ended_before_it_asked_ends() -> None:
    call = "import os; from sbi_phys.simulation.processes import die_with_parent; die_with_parent({}); print('alive')"
    orphan, child = python(call.format("os.getppid() + 1")), python(call.format("os.getppid()"))
    assert (orphan.returncode, orphan.stdout) == (1, "")
    assert (child.returncode, child.stdout) == (0, "alive\n"), child.stderr


@LINUX
def test_a_worker_ends_with_a_parent_that_is_killed() -> None:
    child = (
        "import os, time; from sbi_phys.simulation.processes import start_pool_worker; "
        "start_pool_worker(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        # the pipe closes when the last process that writes to it has ended
        begin = time.monotonic()
        assert process.stdout.read() == ""
        assert time.monotonic() - begin < 30
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until the system has removed it
            os.kill(pid, 0)
            time.sleep(0.1)
            if _state(pid) == "Z":
                raise ProcessLookupError


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"
