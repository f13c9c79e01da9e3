import errno
import os
import signal
import subprocess
import sys

import pytest

from sbi_phys.core.errors import StoreError
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.locks import StoreLock, writers
from tests.toys import LinearGaussian


def test_the_lock_is_exclusive_and_names_its_holder(tmp_path):
    with StoreLock(tmp_path):
        with (
            pytest.raises(StoreError, match=rf"is being written by another simulate call \(process {os.getpid()} on "),
            StoreLock(tmp_path),
        ):
            pytest.fail("locked twice")
        with pytest.raises(StoreError, match="another simulate call"):
            simulate(LinearGaussian(), 10, tmp_path, workers=1)
    with StoreLock(tmp_path):
        pass
    assert (tmp_path / ".lock").read_bytes() == b""


def test_a_dead_process_holds_no_lock(tmp_path):
    code = f"""
from pathlib import Path; import sys, time
from sbi_phys.store.locks import StoreLock, writers
with StoreLock(Path({str(tmp_path)!r})):
    print("locked", flush=True); time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(StoreError, match=f"process {holder.pid} on "), StoreLock(tmp_path):
            pytest.fail("locked twice")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with StoreLock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root, who runs tests in containers, may write everywhere
    with pytest.raises(StoreError, match=r"\.lock cannot be opened for writing: Permission denied"), StoreLock(tmp_path):
        pytest.fail("locked")


def test_a_link_in_place_of_a_lock_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(StoreError, match=r"\.lock cannot be opened for writing"), StoreLock(tmp_path / "store"):
        pytest.fail("locked")
    assert (tmp_path / "precious").read_text() == "x" and writers(tmp_path / "store") == ""
    (tmp_path / "store" / ".lock").unlink()
    os.mkfifo(tmp_path / "store" / ".lock")
    assert writers(tmp_path / "store") == ""  # at once: a pipe is not waited for
