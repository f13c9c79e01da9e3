import errno
import io
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from sbi_phys.core import files
from sbi_phys.core.errors import ModelFileError, SbiPhysError, WriteError
from sbi_phys.core.files import AsideFile, open_aside, write_aside

ROOT = Path(__file__).parents[2]


def test_text_and_bytes_are_written_whole(tmp_path):
    assert write_aside(tmp_path / "a.txt", "E \u2265 1 EeV").read_text(encoding="utf-8") == "E \u2265 1 EeV"
    assert write_aside(tmp_path / "a.bin", b"\0\1").read_bytes() == b"\0\1"
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.txt"]


def test_libraries_write_into_the_open_file(tmp_path):
    values = np.arange(12.0).reshape(3, 4)
    with open_aside(tmp_path / "a.npy") as file:
        np.save(file, values)
    with open_aside(tmp_path / "a.npz") as file:
        np.savez(file, values=values)
    with open_aside(tmp_path / "a.h5") as file, h5py.File(file, "w") as h5:
        h5["values"] = values
    assert (np.load(tmp_path / "a.npy") == values).all() and (np.load(tmp_path / "a.npz")["values"] == values).all()
    with h5py.File(tmp_path / "a.h5") as h5:
        assert (h5["values"][:] == values).all()


def test_the_name_appears_when_the_file_is_complete(tmp_path):
    write_aside(tmp_path / "a", "old")
    with open_aside(tmp_path / "a", sync=True) as file:
        file.write(b"new")
        assert (tmp_path / "a").read_text() == "old" and len(os.listdir(tmp_path)) == 2
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("where", ["write", "sync", "rename"])
def test_a_failed_write_names_the_file_and_leaves_the_former_one(tmp_path, monkeypatch, where):
    write_aside(tmp_path / "a", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target, name = {"write": (AsideFile, "_send"), "sync": (os, "fsync"), "rename": (os, "replace")}[where]
    monkeypatch.setattr(target, name, full)
    with pytest.raises(WriteError, match=r"/a could not be written: No space left on device; the former file.*unchanged") as found:
        write_aside(tmp_path / "a", "new", sync=True)
    assert isinstance(found.value, OSError) and isinstance(found.value, SbiPhysError) and found.value.errno == errno.ENOSPC
    with pytest.raises(ModelFileError, match=r"/a could not be written: No space left on device; clear some"):
        write_aside(tmp_path / "a", "new", sync=True, error=ModelFileError, advice="clear some")
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_full_disk_does_not_disturb_hdf5(tmp_path, monkeypatch):
    room = 1000

    def send(self, view):
        nonlocal room
        if len(view) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= len(view)
        return io.FileIO.write(self, view)

    monkeypatch.setattr(AsideFile, "_send", send)
    with pytest.raises(WriteError, match="No space left"), open_aside(tmp_path / "a.h5") as file, h5py.File(file, "w") as h5:
        h5["values"] = np.zeros(10_000)
    assert os.listdir(tmp_path) == []


def test_an_error_of_the_caller_passes(tmp_path):
    with pytest.raises(ValueError, match="bad content"), open_aside(tmp_path / "a"):
        raise ValueError("bad content")
    assert os.listdir(tmp_path) == []


def test_missing_folders_are_made_only_when_asked(tmp_path):
    with pytest.raises(WriteError, match="No such file or directory"):
        write_aside(tmp_path / "b" / "a", "text")
    assert write_aside(tmp_path / "b" / "a", "text", make_folder=True).read_text() == "text"


def test_a_process_ends_well_after_a_full_disk(tmp_path):
    code = """
import resource, sys, h5py, numpy as np
from sbi_phys.core.files import open_aside
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    with open_aside(sys.argv[1]) as file, h5py.File(file, "w") as h5:
        h5["values"] = np.zeros(10_000)
except OSError as err:
    print(err)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.h5")], capture_output=True, text=True)
    assert done.returncode == 0 and "a.h5 could not be written: File too large" in done.stdout and not done.stderr


def test_a_temporary_file_is_new_and_no_link(tmp_path, monkeypatch):
    monkeypatch.setattr("sbi_phys.core.files.uuid4", lambda: SimpleNamespace(int=7, hex="7"))  # as if the name could be guessed
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".a.7.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(WriteError, match="File exists"):
        write_aside(tmp_path / "a", "text")
    assert (tmp_path / "precious").read_text() == "x"


WRITER = """
import sys, time
from sbi_phys.core.files import open_aside
with open_aside(sys.argv[1]) as file:
    file.write(b"half")
    print("open", flush=True)
    time.sleep(60)
"""


def test_files_of_killed_processes_go_and_those_of_running_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_NEW_S", 0.0)
    (tmp_path / "below").mkdir()
    (tmp_path / ".note.tmp").touch()  # a name of somebody else's
    command = [sys.executable, "-c", WRITER, str(tmp_path / "below" / "model.pt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout.readline() == b"open\n"
        (left,) = (tmp_path / "below").iterdir()
        files.remove_unfinished(tmp_path)
        assert left.exists()
        writer.kill()
    with files.open_aside(tmp_path / "own.txt") as own:
        time.sleep(0.01)
        files.remove_unfinished(tmp_path)
        own.write(b"whole")
    assert not left.exists() and (tmp_path / "own.txt").read_bytes() == b"whole" and (tmp_path / ".note.tmp").exists()


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        path = files.write_aside(tmp_path / "a.txt", "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
