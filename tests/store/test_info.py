import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sbi_phys.core.errors import StoreError
from sbi_phys.store import info as info_module
from sbi_phys.store.info import Index, reason_kind, store_info, watch_store
from sbi_phys.store.locks import StoreLock
from sbi_phys.store.manifest import Manifest, write_manifest
from sbi_phys.store.shards import shard_name, write_shard
from sbi_phys.store.store import Store
from tests.store.helpers import HEADER, flaky, rows

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def opened(monkeypatch):
    """Names of the shards that the index opens."""
    seen, read = [], info_module._read
    monkeypatch.setattr(info_module, "_read", lambda path, stat: (seen.append(path.name), read(path, stat))[1])
    return seen


def test_the_index_spares_opening_files_and_sees_every_change(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(info_module, "_MANY", 3)
    store = flaky(tmp_path, 350)
    n = int(np.count_nonzero(store.status()))
    opened.clear()
    assert Store(tmp_path).n_failed == n and len(opened) == 4
    assert (tmp_path / ".index.json").exists()
    opened.clear()
    assert Store(tmp_path).n_failed == n and opened == []
    # another file of the same size under the same name, with the old time put back: the inode tells
    path = tmp_path / shard_name(1)
    stat = path.stat()
    shutil.copy(path, tmp_path / "aside")
    os.utime(tmp_path / "aside", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(tmp_path / "aside", path)
    assert Store(tmp_path).n_failed == n and opened == [shard_name(1)]
    path.unlink()
    assert Store(tmp_path).n_rows == 250 and Store(tmp_path).n_failed < n


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 1, "shards": {"0": [1]}}', '{"version": 9}'])
def test_a_broken_index_is_made_anew(tmp_path, text):
    store = flaky(tmp_path, 350)
    n = store.n_failed
    (tmp_path / ".index.json").write_text(text)
    assert Store(tmp_path).n_failed == n


def test_a_false_entry_is_not_believed_once_the_file_differs(tmp_path):
    n = flaky(tmp_path, 100).n_failed
    (tmp_path / ".index.json").write_text(json.dumps({"version": 1, "shards": {"0": [1, 2, 3, 77, {}]}}))
    assert Store(tmp_path).n_failed == n != 77


def test_small_stores_get_no_index_file(tmp_path):
    assert flaky(tmp_path, 350).n_failed > 0
    assert not (tmp_path / ".index.json").exists()


def test_a_folder_that_may_not_be_written_does_without(tmp_path, monkeypatch):
    flaky(tmp_path, 100)

    def refuse(path, fill):
        raise StoreError("no")

    monkeypatch.setattr(info_module, "write_file", refuse)
    index = Index(tmp_path)
    assert index.n_failed([0]) == Store(tmp_path).n_failed
    index.save()
    assert not (tmp_path / ".index.json").exists()


def test_reasons_of_a_kind_count_together(tmp_path):
    store = flaky(tmp_path, 350)
    info = store_info(tmp_path)
    failures = store.failures()
    assert sum(info.reasons.values()) == info.n_failed == len(failures)
    raised = sum(f.status == 2 for f in failures)
    assert info.reasons == {
        "ArithmeticError: shower did not converge at t# = # <object object at #x...>": raised,
        "non-finite x in # of # columns, first nan in x[#]": len(failures) - raised,
    }
    assert reason_kind("E = 1.5e-3 GeV at -7") == "E = # GeV at #"


def test_info_of_a_finished_store(tmp_path):
    store = flaky(tmp_path, 350)
    info = store_info(tmp_path)
    assert (info.n_rows, info.n_requested, info.n_present, info.n_shards, info.missing) == (350, 350, 4, 4, ())
    assert info.complete and info.rate is None and info.writer == "" and info.n_failed == store.n_failed
    assert info.n_bytes == sum(p.stat().st_size for p in tmp_path.glob("shard-*"))
    assert info.code == (store.code[0]["sha256"],) and f"code       {info.code[0][:12]}\n" in info.summary()
    assert "state      complete" in info.summary() and info.line().startswith("350/350 rows (100 %), 4/4 shards, ")


def test_rate_and_time_left_follow_from_the_newest_shards(tmp_path):
    write_manifest(tmp_path, Manifest(HEADER, 400))
    for i, at in enumerate((1000.0, 1010.0, 1020.0, 1030.0)):
        write_shard(tmp_path / shard_name(i), HEADER, i, rows(seed=i))
        os.utime(tmp_path / shard_name(i), (at, at))
    assert store_info(tmp_path, now=1030.0).rate is None  # nobody writes
    with StoreLock(tmp_path):
        info = store_info(tmp_path, now=1031.0)
        assert info.rate == pytest.approx(4.0) and info.seconds_left == pytest.approx(240 / 4.0)
        assert info.writer.startswith(f"process {os.getpid()} on ") and "written by process" in info.summary()
        assert store_info(tmp_path, now=1090.0).rate == pytest.approx(120 / 90)  # silent for long: slower
    assert info.missing == (4, 5, 6, 7, 8, 9) and "missing    4-9" in info.summary()
    (tmp_path / ".lock").write_text(f"process 99999999 on {os.uname().nodename}")
    assert store_info(tmp_path).writer == ""  # a dead process writes nothing


RUN = """
import sys
from sbi_phys.simulation.campaign import simulate
from tests.toys import Slow
simulate(Slow(0.03), 300, sys.argv[1], seed=7, shard_size=10, workers=1)
"""


def test_watching_and_reading_while_another_process_writes(tmp_path):
    folder = tmp_path / "store"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", RUN, str(folder)], env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not (folder / shard_name(2)).exists():
                assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
                time.sleep(0.01)
            states = []
            for info in watch_store(folder, interval_s=0.05):
                states.append(info)
                x = Store(folder).read(partial=True)[1]
                assert len(x) >= info.n_rows and np.isfinite(x).all()
            assert process.wait(30) == 0
        finally:
            process.kill()
    shards = [s.n_present for s in states]
    assert shards == sorted(shards) and shards[0] < 30 and shards[-1] == 30 and len(states) > 2
    assert states[0].writer.startswith(f"process {process.pid} on ")
    middle = next(s for s in states if s.rate is not None)
    assert middle.rate > 0 and middle.seconds_left > 0
