import os
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.campaign_toys import CRASHES, HANGS, NANS, Events
from sbi_phys.core.errors import StoreError
from sbi_phys.core.progress import NoProgress
from sbi_phys.priors import Observable
from sbi_phys.simulation._dispatch import Campaign, complete
from sbi_phys.simulation.campaign import simulate
from sbi_phys.simulation.external import FunctionSimulator
from sbi_phys.simulation.workers import name_disk
from sbi_phys.store.shards import shard_name
from tests.store.helpers import digests
from tests.toys import Flaky, LinearGaussian, Poison

ROOT = Path(__file__).parents[2]
FLAKY = Flaky(1.8, -1.8)


class Threads(ThreadPoolExecutor):
    """Threads that get each task as `change` makes it, and keep what they gave."""

    def __init__(self, change=lambda task: task):
        super().__init__(2)
        self.change, self.given = change, []

    def submit(self, fn, task):
        future = super().submit(fn, self.change(task))
        self.given.append(future)
        return future


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "store"
    simulate(FLAKY, 250, path, seed=7, shard_size=50, workers=1)
    return digests(path)


# ---- results that are sent back


def test_workers_that_see_the_folder_write_the_shards_themselves(tmp_path, reference):
    with Threads() as threads:
        simulate(FLAKY, 250, tmp_path, seed=7, shard_size=50, executor=threads)
    assert [f.result().file for f in threads.given] == [None] * 5
    assert digests(tmp_path) == reference  # the token is gone too


@pytest.mark.parametrize("there", [False, True])
def test_workers_that_do_not_see_the_folder_send_the_shards_back(tmp_path, reference, there):
    elsewhere = tmp_path / "elsewhere"  # a folder of another machine, under the same path or not there
    if there:
        elsewhere.mkdir()
    with Threads(lambda task: replace(task, folder=str(elsewhere))) as threads:
        store = simulate(FLAKY, 250, tmp_path / "store", seed=7, shard_size=50, executor=threads)
    assert store.n_failed > 0
    assert all(f.result().file for f in threads.given)
    assert digests(tmp_path / "store") == reference
    assert not there or not any(elsewhere.iterdir())


def test_a_full_disk_is_named_where_shards_are_sent_back(tmp_path, monkeypatch):
    sync, left = os.fsync, 3

    def fsync(handle):
        nonlocal left
        left -= str(tmp_path) in os.readlink(f"/proc/self/fd/{handle}")
        if left < 0:
            raise OSError(28, "No space left on device")
        sync(handle)

    with Threads(lambda task: replace(task, send_back=True)) as threads, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StoreError, match=r"the disk mounted at / is full, [\d.]+ of [\d.]+ MB free: .*shard-0000\d.h5 could not be"):
            simulate(FLAKY, 250, tmp_path, seed=7, shard_size=50, executor=threads)
    assert 1 <= len(digests(tmp_path)) - 2 <= 3
    assert simulate(FLAKY, 250, tmp_path, seed=7, workers=1).complete


def test_other_errors_stay_as_they_are(tmp_path):
    for cause in (None, PermissionError(13, "no"), ValueError("no")):
        err = StoreError("could not be written")
        err.__cause__ = cause
        assert name_disk(err, tmp_path / "a") is err


# ---- back-pressure


class Client:
    def __init__(self, threads):
        self.threads = threads

    def nthreads(self, callback_timeout):
        if self.threads is None:
            raise OSError("away")
        return {"tcp://a": 1, "tcp://b": self.threads - 1}


@pytest.mark.parametrize(("client", "most"), [(None, 6), (Client(6), 12), (Client(None), 6)])
def test_no_more_shards_are_in_flight_than_twice_the_workers(tmp_path, client, most):
    class Late(Executor):
        """Answers only once it has as many as it should get."""

        def __init__(self):
            self._client, self.waiting, self.seen = client, [], []

        def submit(self, fn, /, *args, **kwargs):
            future = Future()
            self.waiting.append((future, fn, args))
            self.seen.append(len(self.waiting))
            if len(self.waiting) == most:
                for waiting, call, given in self.waiting:
                    waiting.set_result(call(*given))
                self.waiting = []
            return future

    executor = Late()
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(simulate, LinearGaussian(), 24, tmp_path, shard_size=1, executor=executor, workers=3)
        assert done.result(timeout=20).complete
    assert executor.seen == [*range(1, most + 1)] * (24 // most)


def test_a_lost_scheduler_is_an_error_that_says_how_to_go_on(tmp_path):
    class Lost(Executor):
        def submit(self, fn, /, *args, **kwargs):
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(StoreError, match=r"cancelled the shards of .* or stopped; 0 of 5 shards are finished; the same call") as found:
        simulate(FLAKY, 250, tmp_path, seed=7, shard_size=50, executor=Lost())
    assert isinstance(found.value.__cause__, CancelledError)
    assert simulate(FLAKY, 250, tmp_path, seed=7, workers=1).complete


def test_the_display_is_about_the_shards_of_this_call(tmp_path):
    store = simulate(LinearGaussian(), 50, tmp_path, shard_size=10, workers=1)
    (tmp_path / shard_name(3)).unlink()
    seen = []

    class Display(NoProgress):
        def task(self, description, total):
            task = super().task(description, total)
            task.advance = lambda n, text="": seen.append(n)
            task.update = lambda done, text="": seen.append((done, total))
            return task

    for shards in (range(2, 4), None):
        run = Campaign(tmp_path, store._manifest, LinearGaussian(), None, deque([3]), shards=shards)
        complete(run, 1, None, Display())
    assert seen == [(10, 20), 10, (40, 50), 10]


# ---- deaths


def test_a_simulator_that_crashes_in_every_shard_ends_well_without_being_asked(tmp_path):
    simulator = FunctionSimulator("tests.toys:event_that_exits", LinearGaussian().prior, [Observable("x", 3)])
    two = simulate(simulator, 120, tmp_path / "two", seed=3, shard_size=12, workers=2)
    one = simulate(simulator, 120, tmp_path / "one", seed=3, shard_size=12, workers=1, isolate=True)
    assert digests(one.path) == digests(two.path)
    theta, _ = two.read(valid_only=False)
    assert [f.row for f in two.failures()] == (theta[:, 0] > 1.5).nonzero()[0].tolist()
    assert len({f.row // 12 for f in two.failures()}) > 3


def test_threads_have_a_sandbox_each(tmp_path):
    with ThreadPoolExecutor(3) as threads:
        simulate(Poison("exits"), 36, tmp_path / "threads", seed=3, shard_size=6, executor=threads, isolate=True)
    simulate(Poison("exits"), 36, tmp_path / "one", seed=3, shard_size=6, workers=1, isolate=True)
    assert digests(tmp_path / "threads") == digests(tmp_path / "one")


HOLDS = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from sbi_phys.simulation.processes import start_pool_worker

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start_pool_worker, initargs=(os.getpid(),))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(exec, "import ctypes; ctypes.PyDLL(None).sleep(60)")
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_worker_in_compiled_code_ends_with_its_parent(tmp_path):
    (tmp_path / "run.py").write_text(HOLDS)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, tmp_path / "run.py"], env=env, stdout=subprocess.PIPE, text=True) as process:
        worker = Path(f"/proc/{int(process.stdout.readline())}")
        time.sleep(0.3)  # until it sleeps in C, with Python's lock in its hand
        assert worker.exists()
        process.kill()
    deadline = time.monotonic() + 5
    while worker.exists() and worker.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_rows_that_crash_hang_or_are_nan_are_flagged_and_the_others_are_those_of_a_clean_run(tmp_path):
    n, kind = 400, {"SandboxDiedError": (0, CRASHES), "non-finite": (CRASHES, NANS), "RowTimeoutError": (NANS, HANGS)}
    clean = simulate(Events(0.0), n, tmp_path / "clean", seed=12, shard_size=100, workers=1)
    store = simulate(Events(0.0, bad=True), n, tmp_path / "bad", seed=12, shard_size=100, workers=1, timeout=0.3)
    theta, x = clean.read()
    found = {name: [f.row for f in store.failures() if f.reason.startswith(name)] for name in kind}
    assert found == {name: ((theta[:, 0] >= a) & (theta[:, 0] < b)).nonzero()[0].tolist() for name, (a, b) in kind.items()}
    assert all(found.values())
    good = store.status() == 0
    np.testing.assert_array_equal(store.read()[1], x[good])
