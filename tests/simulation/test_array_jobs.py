import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sbi_phys.core.errors import SettingError, StoreError
from sbi_phys.core.rng import rng_for
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.check import check_store
from sbi_phys.store.info import store_info
from sbi_phys.store.locks import ArrayLock, StoreLock
from sbi_phys.store.manifest import Manifest, list_shards, write_manifest
from sbi_phys.store.shards import shard_name, write_shard
from sbi_phys.store.store import Store
from tests.store.helpers import HEADER, digests, rows
from tests.toys import Flaky, LinearGaussian

ROOT = Path(__file__).parent.parent.parent
FLAKY = Flaky(1.8, -1.8)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Digests of an undivided run of 650 rows in 7 shards."""
    path = tmp_path_factory.mktemp("reference") / "store"
    simulate(FLAKY, 650, path, seed=7, shard_size=100, workers=1)
    return digests(path)


def job(path, shards, n=650, **changes):
    return simulate(FLAKY, n, path, **{"seed": 7, "shard_size": 100, "workers": 1, "shards": shards, **changes})


def files(path):
    """Digests of what a reader sees."""
    return {name: digest for name, digest in digests(path).items() if not name.startswith(".")}


def test_jobs_one_after_the_other_make_the_undivided_store(tmp_path, reference):
    assert job(tmp_path, range(3, 5)).missing == (0, 1, 2, 5, 6)
    assert job(tmp_path, "0:3").missing == (5, 6)
    assert job(tmp_path, 6).missing == (5,)
    store = job(tmp_path, "5")
    assert store.complete and files(tmp_path) == {k: v for k, v in reference.items() if not k.startswith(".")}
    assert check_store(tmp_path).ok and check_store(tmp_path).strays == ()
    simulate(FLAKY, 650, tmp_path, seed=7, workers=1)  # a call for all of it clears the locks away
    assert digests(tmp_path) == reference


def test_parts_cover_every_shard_once(tmp_path, reference):
    for part in range(3):
        job(tmp_path, f"{part}/3")
    assert files(tmp_path) == {k: v for k, v in reference.items() if not k.startswith(".")}


RUN = """
import sys, time
from pathlib import Path
from sbi_phys.simulation.campaign import simulate
from tests.toys import Flaky
if __name__ == "__main__":
    folder, shards, mate = sys.argv[1:]
    class Waiting(Flaky):
        begun = False
        def simulate(self, theta, rng):
            deadline = time.monotonic() + 20  # until the other has begun: both are at work at once
            while not self.begun and not Path(folder, mate).exists() and time.monotonic() < deadline:
                time.sleep(0.002)
            self.begun = True
            return super().simulate(theta, rng)
    Waiting.__module__, Waiting.__qualname__ = "tests.toys", "Flaky"
    simulate(Waiting(1.8, -1.8), 650, folder, seed=7, shard_size=100, workers=1, shards=shards)
"""


@contextlib.contextmanager
def started(script, *arguments):
    script.write_text(RUN)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), *map(str, arguments)], env=env, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_processes_at_once_write_the_bytes_of_the_undivided_run(tmp_path, reference):
    folder, script = tmp_path / "store", tmp_path / "run.py"
    folder.mkdir()
    with started(script, folder, "0:3", ".shards-3-7.lock") as one, started(script, folder, "3:7", ".shards-0-3.lock") as two:
        for process in (one, two):
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
    assert files(folder) == {k: v for k, v in reference.items() if not k.startswith(".")}
    Store(folder).verify()


def test_a_killed_job_holds_nothing_and_the_next_one_goes_on(tmp_path, reference):
    folder = tmp_path / "store"
    folder.mkdir()
    with started(tmp_path / "run.py", folder, "0:4", "never") as process:
        deadline = time.monotonic() + 30
        while not (folder / ".shards-0-4.lock").exists() or not (folder / ".shards-0-4.lock").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        assert store_info(folder).writer == f"process {process.pid} on {os.uname().nodename} (shards 0:4)"
        with pytest.raises(StoreError, match=rf"shards 2:5 of .* overlap shards 0:4, which process {process.pid} on .* is writing"):
            job(folder, "2:5")
        with pytest.raises(
            StoreError, match=rf"is being written by array jobs: process {process.pid} on .* \(shards 0:4\); expected them to end"
        ):
            simulate(FLAKY, 650, folder, seed=7, workers=1)
    (folder / f".{shard_name(2)}.123.tmp").write_bytes(b"half a shard")
    assert store_info(folder).writer == ""
    assert job(folder, "2:5").missing == (0, 1, 5, 6)
    assert sorted(name for name in os.listdir(folder) if name.startswith(".")) == [".lock", ".plan.lock"]
    simulate(FLAKY, 650, folder, seed=7, workers=1)
    assert digests(folder) == reference


def test_other_jobs_unfinished_files_are_left_alone(tmp_path):
    litter = [f".{shard_name(i)}.77.tmp" for i in (0, 3)] + [".store.json.77.tmp", "..index.json.77.tmp"]
    for name in litter:
        (tmp_path / name).write_bytes(b"at work")
    job(tmp_path, "0:2")
    assert [name for name in litter if (tmp_path / name).exists()] == litter[1:]
    simulate(FLAKY, 650, tmp_path, seed=7, workers=1)  # alone: all of it is litter
    assert not any((tmp_path / name).exists() for name in litter)


def test_a_campaign_at_work_refuses_array_jobs(tmp_path):
    write_manifest(tmp_path, Manifest(HEADER, 400))
    with StoreLock(tmp_path), pytest.raises(StoreError, match=rf"written by another simulate call \(process {os.getpid()} on "):
        job(tmp_path, "0:2")
    with ArrayLock(tmp_path) as lock:
        with lock.planning():
            lock.claim(range(2, 4))
        with pytest.raises(StoreError, match=r"array jobs: process .* \(shards 2:4\)"), StoreLock(tmp_path):
            pass
        with ArrayLock(tmp_path) as other, other.planning():
            other.claim(range(4, 5))
            assert "(shards 2:4)" in store_info(tmp_path).writer and "(shards 4:5)" in store_info(tmp_path).writer
            with pytest.raises(StoreError, match="shards 1:3 of .* overlap shards 2:4"), ArrayLock(tmp_path) as third:
                third.claim(range(1, 3))
    with StoreLock(tmp_path):
        pass


@pytest.mark.parametrize("lock", [StoreLock, ArrayLock])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, lock):
    def refuse(handle, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(StoreError, match=r"\.lock cannot be locked: No locks available; expected a file system whose locks work"),
        lock(tmp_path),
    ):
        pass


def test_who_plans_waits_for_who_plans(tmp_path):
    handle = os.open(tmp_path / ".plan.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    script = """
import sys
from pathlib import Path
from sbi_phys.store.locks import ArrayLock
with ArrayLock(Path(sys.argv[1])) as lock:
    print("ready", flush=True)
    with lock.planning():
        print("alone", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        os.set_blocking(process.stdout.fileno(), False)
        time.sleep(0.2)
        assert process.stdout.readline() == ""
        os.close(handle)
        os.set_blocking(process.stdout.fileno(), True)
        assert process.stdout.readline() == "alone\n"


def test_a_store_grows_once_nobody_else_is_at_work(tmp_path, reference):
    job(tmp_path, "0:2", n=250)
    job(tmp_path, "2:3", n=250)
    with ArrayLock(tmp_path) as lock:
        with lock.planning():
            lock.claim(range(0, 1))
        with pytest.raises(
            StoreError, match=r"has 250 rows to make, and array jobs are running .*expected the same n in all of them, got 650"
        ):
            job(tmp_path, "5:7")
        assert job(tmp_path, "1:2", n=250).n_requested == 250
    store = job(tmp_path, "5:7")
    assert (store.n_requested, store.missing) == (650, (2, 3, 4))  # the short one is made again
    assert job(tmp_path, "0/7", n=100).n_requested == 650  # less than there is: as it is
    job(tmp_path, "2:5")
    assert files(tmp_path) == {k: v for k, v in reference.items() if not k.startswith(".")}


def test_given_theta_is_the_same_in_every_job(tmp_path):
    toy = LinearGaussian()
    theta = toy.prior.sample(50, rng_for(9))
    one = simulate(toy, None, tmp_path / "one", theta=theta, shard_size=10, workers=1)
    for part in (1, 0):
        simulate(toy, None, tmp_path / "two", theta=theta, shard_size=10, workers=1, shards=f"{part}/2")
    assert files(one.path) == files(tmp_path / "two")
    with pytest.raises(StoreError, match="made at other theta; expected the same theta in every array job"):
        simulate(toy, None, tmp_path / "two", theta=theta[::-1], shard_size=10, workers=1, shards="0:1")


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("", "shards is ''; expected a range, 'START:STOP'"),
        ("a:b", "shards is 'a:b'"),
        ("1:2:3", "shards is '1:2:3'"),
        ("-1:3", "shards is '-1:3'"),
        ("3:", "shards is '3:'"),
        (True, "shards is True"),
        (1.5, "shards is 1.5"),
        (range(0, 6, 2), r"shards is range\(0, 6, 2\)"),
        ("3:3", "'3:3' names none of the 7 shards"),
        ("5:2", "'5:2' names none"),
        (range(0), "names none"),
        ("5:8", "'5:8' runs past the end; expected within 0:7"),
        ("7", "'7' runs past the end"),
        (-1, "-1 runs past the end"),
        ("4/4", "'4/4'; expected parts that count from 0, below 4"),
        ("0/0", "'0/0'; expected parts"),
        ("3/8", None),
        ("0/8", "'0/8' names none of the 7 shards; expected START below STOP, or fewer parts"),
    ],
)
def test_bad_ranges_are_named_and_leave_no_store(tmp_path, shards, message):
    with contextlib.nullcontext() if message is None else pytest.raises(SettingError, match=message):
        job(tmp_path, shards)
    assert (tmp_path / "store.json").exists() == (message is None)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".shards")]


def test_a_shard_of_another_store_in_the_range_is_refused(tmp_path):
    job(tmp_path, "0:2")
    write_shard(tmp_path / shard_name(3), HEADER, 3, rows())
    assert job(tmp_path, "4:5").missing == (2, 5, 6)  # not his to look at
    with pytest.raises(StoreError, match=f"{shard_name(3)} was made with another simulator"):
        job(tmp_path, "2:4")
    with pytest.raises(StoreError, match="made with another seed"):
        job(tmp_path, "5:6", seed=8)
    assert list_shards(tmp_path) == [0, 1, 3, 4]
