import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sbi_phys.core.errors import StoreError
from sbi_phys.core.files import AsideFile
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.manifest import list_shards
from sbi_phys.store.shards import shard_name
from sbi_phys.store.store import Store
from tests.store.helpers import digests
from tests.toys import Flaky, LinearGaussian, Misbehaving, Slow

ROOT = Path(__file__).parents[2]
FLAKY = Flaky(1.8, -1.8)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Digests of an undisturbed run of 650 rows by one worker."""
    path = tmp_path_factory.mktemp("reference") / "store"
    simulate(FLAKY, 650, path, seed=7, shard_size=100, workers=1)
    return digests(path)


RUN = """
import sys
from sbi_phys.simulation.campaign import simulate
from tests.toys import Slow
if __name__ == "__main__":
    simulate(Slow(0.06), 300, sys.argv[1], seed=7, shard_size=10, workers=int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def slow_reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("slow") / "store"
    simulate(Slow(0.0), 300, path, seed=7, shard_size=10, workers=1)
    # same rows as Slow(0.06), another header: theta and x are what is compared beside the files
    return Store(path).read()


@contextlib.contextmanager
def running(folder, script, n_workers):
    """A run in its own process group, given once it has finished some shards but not all."""
    script.write_text(RUN)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    # a shell that runs the tests in the background has them ignore Ctrl-C, and so their children
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(n_workers)],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 30
        while not folder.is_dir() or len(list_shards(folder)) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.01)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


def children(pid):
    found = [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    return found + [grandchild for p in found for grandchild in children(p)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids):
    deadline = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.02)


def finish_and_compare(folder, tmp_path, slow_reference, undisturbed={}):  # noqa: B006
    """Resume in this process and compare the whole folder with that of an undisturbed run, made once."""
    store = simulate(Slow(0.06), 300, folder, seed=7, workers=1)
    if not undisturbed:
        with ThreadPoolExecutor(30) as threads:
            simulate(Slow(0.06), 300, tmp_path / "undisturbed", seed=7, shard_size=10, executor=threads)
        undisturbed.update(digests(tmp_path / "undisturbed"))
    assert digests(folder) == undisturbed
    for got, want in zip(store.read(), slow_reference, strict=True):
        np.testing.assert_array_equal(got, want)


def test_kill_9_in_the_middle_and_resume(tmp_path, slow_reference):
    folder = tmp_path / "store"
    with running(folder, tmp_path / "run.py", 2) as process:
        workers_of_it = children(process.pid)
        assert len(workers_of_it) >= 2
        process.kill()
        process.wait()
        wait_until_gone(workers_of_it)
    assert 3 <= len(list_shards(folder)) < 30
    (folder / f".{shard_name(9)}.123.tmp").write_bytes(b"half a shard")  # what a kill during a write leaves
    finish_and_compare(folder, tmp_path, slow_reference)


def test_ctrl_c_stops_cleanly_and_a_second_run_continues(tmp_path, slow_reference):
    folder = tmp_path / "store"
    with running(folder, tmp_path / "run.py", 2) as process:
        workers_of_it = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, err = process.communicate(timeout=10)
        assert process.returncode != 0
        wait_until_gone(workers_of_it)
    assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt")
    done = list_shards(folder)
    assert 3 <= len(done) < 30
    assert sorted(os.listdir(folder)) == sorted([".lock", "store.json", *map(shard_name, done)])
    finish_and_compare(folder, tmp_path, slow_reference)


def test_ctrl_c_without_workers(tmp_path):
    class Interrupted(LinearGaussian):
        calls = 0

        def simulate(self, theta, rng):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().simulate(theta, rng)

    simulator = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        simulate(simulator, 50, tmp_path, shard_size=10, workers=1)
    assert sorted(os.listdir(tmp_path)) == [".lock", shard_name(0), shard_name(1), "store.json"]
    assert simulate(simulator, 50, tmp_path, workers=1).complete


def test_growth_that_is_interrupted_leaves_no_short_shard(tmp_path):
    simulate(FLAKY, 150, tmp_path, seed=7, shard_size=100, workers=1)

    class Stop(Executor):
        def submit(self, fn, /, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(FLAKY, 180, tmp_path, seed=7, executor=Stop())
    store = Store(tmp_path)
    assert (store.n_requested, store.n_rows, store.missing) == (180, 100, (1,))
    store = simulate(FLAKY, 150, tmp_path, seed=7, workers=1)  # the old size is as good
    assert (store.n_rows, store.complete) == (150, True)


def test_an_executor_of_the_caller_that_breaks(tmp_path):
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        pytest.raises(StoreError, match=r"a worker process died while shards 0, 1, 2 of .* 0 of 3 shards are finished"),
    ):
        simulate(Misbehaving("dies"), 30, tmp_path, shard_size=10, executor=pool, workers=2)


def test_a_worker_that_dies_costs_only_its_retry(tmp_path):
    simulator = Misbehaving("dies once", str(tmp_path))
    store = simulate(simulator, 60, tmp_path / "two", shard_size=10, workers=2)
    assert (tmp_path / "died").exists()
    store.verify()
    simulate(simulator, 60, tmp_path / "one", shard_size=10, workers=1)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_simulator_that_kills_every_worker_ends_the_run(tmp_path):
    with pytest.raises(StoreError, match=r"exit status 13, \d+ times in a row; expected a simulator that succeeds for some rows"):
        simulate(Misbehaving("dies"), 20, tmp_path, shard_size=10, workers=1 + 1)
    assert sorted(os.listdir(tmp_path)) == [".lock", "store.json"]


def test_the_disk_fills_up_half_way(tmp_path, reference, monkeypatch):
    room = 20_000

    def send(self, view):
        nonlocal room
        if len(view) > room:
            raise OSError(28, "No space left on device")
        room -= len(view)
        return io.FileIO.write(self, view)

    with monkeypatch.context() as patch:
        patch.setattr(AsideFile, "_send", send)
        with pytest.raises(StoreError, match=r"shard-0000\d.h5 could not be written: No space left on device.*the same call continues"):
            simulate(FLAKY, 650, tmp_path, seed=7, shard_size=100, workers=1)
    done = list_shards(tmp_path)
    assert 1 <= len(done) < 7
    assert {k: v for k, v in digests(tmp_path).items() if k.startswith("shard")} == {shard_name(i): reference[shard_name(i)] for i in done}
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    simulate(FLAKY, 650, tmp_path, seed=7, workers=1)
    assert digests(tmp_path) == reference


def test_a_damaged_shard_is_named_and_not_written_over(tmp_path):
    simulate(FLAKY, 300, tmp_path, seed=7, shard_size=100, workers=1)
    bad = tmp_path / shard_name(1)
    bad.write_bytes(bad.read_bytes()[:2000])
    with pytest.raises(StoreError, match=f"{shard_name(1)} cannot be read .*Delete it and run the same simulate call"):
        simulate(FLAKY, 300, tmp_path, seed=7, workers=1)
    bad.unlink()
    simulate(FLAKY, 300, tmp_path, seed=7, workers=1).verify()
