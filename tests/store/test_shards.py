import errno
import io
import json
import os
import resource
import time
import warnings
from dataclasses import replace

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sbi_phys.core.errors import StoreError
from sbi_phys.core.files import AsideFile
from sbi_phys.core.provenance import git_commit
from sbi_phys.core.version import __version__
from sbi_phys.estimators.npe import NPE
from sbi_phys.store import shards
from sbi_phys.store._encoding import Label
from sbi_phys.store.layout import Layout
from sbi_phys.store.merge import repack_store
from sbi_phys.store.reweighting import reweight
from sbi_phys.store.shards import Header, open_shard, read_arrays, read_facts, shard_name, verify_shard, write_shard
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.stream import Stream
from tests.store.helpers import HEADER, PRIOR, digests, flaky, rows


def test_a_shard_gives_back_what_was_written(tmp_path):
    path, data = tmp_path / shard_name(7), rows(failed=(0, 5, 39))
    write_shard(path, HEADER, 7, data)
    with open_shard(path) as file:
        header, facts = read_facts(file, path)
        got = read_arrays(file, path)
    assert header == HEADER
    assert {**facts, "checksum": ""} == {"shard": 7, "rows": 40, "n_failed": 3, "package_version": __version__, "checksum": ""}
    np.testing.assert_array_equal(got.theta, data.theta)
    np.testing.assert_array_equal(got.x, data.x)
    assert got.x.dtype == np.float32 and got.theta.dtype == np.float64
    assert got.reasons == data.reasons
    assert os.listdir(tmp_path) == [shard_name(7)]


def test_a_shard_can_be_read_without_this_package(tmp_path):
    path = tmp_path / shard_name(0)
    write_shard(path, HEADER, 0, rows(failed=(2,)))
    with h5py.File(path) as file:
        a = file.attrs
        assert (a["format"], a["schema"], a["seed"], a["complete"]) == (b"sbi_phys simulation store", 2, 3, 1)
        assert [n.decode() for n in a["parameter_names"]] == ["gamma", "lg_rcut", "f_h", "f_fe", "nu"]
        assert [n.decode() for n in a["parameter_units"]] == ["", "lg V", "", "", "é"]
        assert a["parameter_latex"][1] == rb"\lg R"
        assert json.loads(a["simulator"])["settings"] == {"scale": 1.5}
        assert json.loads(a["prior"]) == PRIOR.to_dict()
        assert json.loads(a["observables"])[0]["name"] == "n"
        assert file["reason"][0].decode() == "row 2 ✗" and file["status"][2] == 1


def test_equal_content_gives_equal_bytes_whatever_the_time(tmp_path):
    write_shard(tmp_path / "a.h5", HEADER, 0, rows(failed=(1,)))
    time.sleep(1.05)  # HDF5's own time stamps have a resolution of one second
    write_shard(tmp_path / "b.h5", HEADER, 0, rows(failed=(1,)))
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_a_header_larger_than_hdf5s_compact_attributes_survives(tmp_path):
    big = replace(HEADER, simulator={"class": "a:B", "settings": {"table": list(range(40_000))}})
    write_shard(tmp_path / "a.h5", big, 0, rows())
    verify_shard(tmp_path / "a.h5", big, 0, 40)
    with open_shard(tmp_path / "a.h5") as file:
        assert read_facts(file, tmp_path / "a.h5")[0] == big


def test_long_reasons_are_cut_at_a_character(tmp_path):
    data = replace(rows(failed=(1,)), reasons={1: "é" * 1000})
    write_shard(tmp_path / "a.h5", HEADER, 0, data)
    with open_shard(tmp_path / "a.h5") as file:
        reason = read_arrays(file, tmp_path / "a.h5").reasons[1]
    assert reason == "é" * 118 + " ..."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": np.bytes_(b"corsika")}, "is not a shard: attribute format is 'corsika'"),
        ({"schema": 99, "package_version": np.bytes_(b"9.1")}, r"schema 99; expected 2: it was written by sbi_phys 9\.1, update"),
        ({"schema": 0}, "schema 0; expected 2: it cannot be read"),
        ({"complete": np.uint8(0)}, "not marked complete"),
        ({"seed": 4}, "made with another seed: got 4, expected 3"),
        ({"shard": 1}, "holds shard 1 with 40 rows; expected shard 0 with 40 rows"),
        ({"rows": 41}, "holds shard 0 with 41 rows; expected shard 0 with 40 rows"),
        ({"n_failed": 1}, r"dataset failed_row has shape \(0,\); expected \(1,\)"),
        ({"package_version": np.bytes_(b"0")}, "is damaged: its content has checksum crc32"),
        ({"simulator": np.bytes_(b"{not json")}, "cannot be read"),
    ],
)
def test_a_changed_attribute_is_named(tmp_path, change, message):
    path = tmp_path / shard_name(0)
    write_shard(path, HEADER, 0, rows())
    verify_shard(path, HEADER, 0, 40)
    with h5py.File(path, "r+") as file:
        for name, value in change.items():
            file.attrs[name] = value
    with pytest.raises(StoreError, match=message) as err:
        verify_shard(path, HEADER, 0, 40)
    assert str(path) in str(err.value)


@pytest.mark.parametrize("name", ["theta", "x", "status", "failed_row", "reason"])
def test_a_missing_or_changed_dataset_is_found(tmp_path, name):
    path = tmp_path / shard_name(0)
    write_shard(path, HEADER, 0, rows(failed=(3,)))
    with h5py.File(path, "r+") as file:
        raw = file[name][0].tobytes() if name == "reason" else np.asarray(file[name][0]).tobytes()
        file[name][0] = np.frombuffer(bytes([raw[0] ^ 1]) + raw[1:], dtype=file[name].dtype).reshape(file[name].shape[1:])
    with pytest.raises(StoreError, match="damaged"):
        verify_shard(path, HEADER, 0, 40)
    with h5py.File(path, "r+") as file:
        del file[name]
    with pytest.raises(StoreError, match="cannot be read"):
        verify_shard(path, HEADER, 0, 40)


@pytest.fixture(scope="module")
def shard_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "shard"
    write_shard(path, HEADER, 0, rows(failed=(3, 30)))
    return path.read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_a_truncated_shard_is_refused_wherever_it_ends(tmp_path, shard_bytes, fraction):
    path = tmp_path / shard_name(0)
    path.write_bytes(shard_bytes[: int(fraction * len(shard_bytes))])
    with pytest.raises(StoreError, match="cannot be read .*truncated, damaged or no HDF5 file"), open_shard(path):
        pytest.fail("opened a truncated file")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_is_found_or_changes_nothing(tmp_path, shard_bytes, where, flip):
    path, at = tmp_path / shard_name(0), int(where * len(shard_bytes))
    path.write_bytes(shard_bytes[:at] + bytes([shard_bytes[at] ^ flip]) + shard_bytes[at + 1 :])
    try:
        verify_shard(path, HEADER, 0, 40)
    except StoreError as err:
        assert str(path) in str(err)
        return
    want = rows(failed=(3, 30))  # a byte that HDF5 leaves unused
    with open_shard(path) as file:
        got = read_arrays(file, path)
    np.testing.assert_array_equal(got.theta, want.theta)
    np.testing.assert_array_equal(got.x, want.x)
    assert got.reasons == want.reasons


def test_every_flipped_byte_of_the_data_is_found(tmp_path, shard_bytes):
    path, want = tmp_path / shard_name(0), rows(failed=(3, 30))
    for array in (want.theta, want.x, want.status):
        start = shard_bytes.index(array.tobytes())
        for at in range(start, start + array.nbytes, 97):
            path.write_bytes(shard_bytes[:at] + bytes([shard_bytes[at] ^ 4]) + shard_bytes[at + 1 :])
            with pytest.raises(StoreError, match="damaged"):
                verify_shard(path, HEADER, 0, 40)


@pytest.mark.parametrize("room", [0, 1, 100, 1000, 3000])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, room):
    left = room

    def send(self, view):
        nonlocal left
        if len(view) > left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(view)
        return io.FileIO.write(self, view)

    write_shard(tmp_path / "old.h5", HEADER, 0, rows())
    before = digests(tmp_path)
    monkeypatch.setattr(AsideFile, "_send", send)
    for name in ("new.h5", "old.h5"):
        with pytest.raises(StoreError, match=f"{name} could not be written: No space left on device; shards that are finished are intact"):
            write_shard(tmp_path / name, HEADER, 0, rows(seed=1))
    assert digests(tmp_path) == before


def test_a_write_that_the_system_refuses_half_way(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # a real limit: the kernel takes part of a write, then none
        with pytest.raises(StoreError, match="could not be written: File too large"):
            write_shard(tmp_path / "a.h5", replace(HEADER, shard_size=2000), 0, rows(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.listdir(tmp_path)))
    write_shard(tmp_path / "a.h5", HEADER, 0, rows())
    assert [[name.endswith(".tmp") for name in names] for names in seen] == [[True]]  # written and synced under another name
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StoreError, match="could not be written: Input/output error"):
        write_shard(tmp_path / "b.h5", HEADER, 0, rows())
    assert os.listdir(tmp_path) == ["a.h5"]


def test_files_say_which_code_made_them(tmp_path):
    write_shard(tmp_path / shard_name(0), HEADER, 0, rows())
    with h5py.File(tmp_path / shard_name(0)) as file:
        assert file.attrs["package_version"].decode() == __version__
        assert file.attrs["git"].decode() == git_commit()


# ---- reading


@pytest.fixture
def store(tmp_path):
    return flaky(tmp_path / "store")


def flip(path, at, bit=1, keep_times=False):
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)
    if keep_times:
        os.utime(path, ns=times)


def place(path, name, row=3):
    """Position of a value of a dataset within the file."""
    with h5py.File(path) as file:
        return file[name].id.get_offset() + row * file[name].dtype.itemsize * int(np.prod(file[name].shape[1:]))


@pytest.mark.parametrize("name", ["theta", "x", "status", "failed_row", "reason"])
def test_every_read_of_a_damaged_shard_is_refused(store, tmp_path, name):
    if name in ("theta", "x"):  # what was checked once is checked again after a change, even one that keeps size and time
        store.read()
    path = store.path / shard_name(1)
    flip(path, place(path, name, 0 if name in ("failed_row", "reason") else 3), keep_times=True)
    reads = [
        store.read, store.status, store.failures, lambda: list(store.shards()), lambda: store.observable(store.observables[0].name),
        lambda: store.subset(tmp_path / "a", rows=range(350)), lambda: store.split([tmp_path / "a", tmp_path / "b"], [0.5, 0.5]),
        lambda: repack_store(store.path, tmp_path / "a", Layout(compression="lzf")),
        lambda: NPE(store.prior, config=TrainConfig(max_epochs=1)).fit(store),
        lambda: reweight(store, store.prior),
        lambda: Stream(store, store.prior, cache=None), lambda: Stream(store, store.prior),
    ]  # fmt: skip
    for read in reads:
        with warnings.catch_warnings(), pytest.raises(StoreError, match=r"shard-00001\.h5 is damaged"):
            warnings.simplefilter("ignore", RuntimeWarning)  # the failed rows of this store, where fit comes to them before the damage
            read()
    assert not (tmp_path / "a").exists()


def test_a_shard_is_checked_once_for_each_file_and_process(store, monkeypatch):
    calls = []
    monkeypatch.setattr(shards, "verify_shard", lambda path, *rest: calls.append(path.name))
    for _ in range(3):
        store.read()
        store.status()
    assert calls == [shard_name(i) for i in range(4)]
    (store.path / shard_name(2)).touch()
    store.read()
    assert calls[4:] == [shard_name(2)]


def crafted(path, change):
    """A shard that `change` edits and whose label agrees with every byte again: made so, not damaged."""
    with h5py.File(path, "r+") as file:
        change(file)
    label = Label.decode(path.read_bytes()[:4096])
    with open(path, "rb+", buffering=0) as file:
        label = replace(label, ranges=()).with_rest(file)
        file.seek(0)
        file.write(label.encode())


def external(file):
    secret = file.filename + ".secret"
    np.full(300, 7.0, dtype="<f4").tofile(secret)
    shape, dtype = file["x"].shape, file["x"].dtype
    del file["x"]
    file.create_dataset("x", shape, dtype, external=[(secret, 0, 4 * int(np.prod(shape)))])


def linked(file):
    other = file.filename + ".other"
    with h5py.File(other, "w") as target:
        target["x"] = file["x"][:]
    del file["x"]
    file["x"] = h5py.ExternalLink(other, "x")


def soft(file):
    file.move("x", "y")
    file["x"] = h5py.SoftLink("/y")


def virtual(file):
    other = file.filename + ".other"
    with h5py.File(other, "w") as target:
        target["x"] = file["x"][:]
    layout = h5py.VirtualLayout(file["x"].shape, file["x"].dtype)
    layout[:] = h5py.VirtualSource(other, "x", file["x"].shape)
    del file["x"]
    file.create_virtual_dataset("x", layout)


def huge(file):
    shape = file["x"].shape
    del file["x"]
    file.create_dataset("x", (10**7, 10**6), "<f4", chunks=(1000, 100))
    assert shape


def objects(file):
    shape = file["x"].shape
    del file["x"]
    file.create_dataset("x", shape, h5py.vlen_dtype(np.float32))


def group(file):
    del file["x"]
    file.create_group("x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external, "the values of x lie in another file"),
        (linked, "x is no array in this file"),
        (soft, "x is no array in this file"),
        (virtual, r"the values of x lie in \['.*other'\]; expected all of them in this one"),
        (huge, r"the values of x have shape \(10000000, 1000000\) and 0 bytes in the file"),
        (objects, "x is no array in this file"),
        (group, "x is no array in this file"),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_values_outside_of_the_shard_are_not_read(store, change, message, labelled):
    path = store.path / shard_name(0)
    if labelled:
        crafted(path, change)
    else:
        with h5py.File(path, "r+") as file:
            change(file)
    with pytest.raises(StoreError, match=message):
        store.read()


def test_a_crafted_copy_without_a_fault_is_read(store):
    before = store.read()
    crafted(store.path / shard_name(0), lambda file: None)
    assert np.array_equal(store.read()[1], before[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", "3"), ("seed", 10**400), ("seed", True), ("shard_size", 0), ("shard_size", 1.5), ("dtype", "O"), ("dtype", "float99"),
     ("observables", {}), ("observables", [{"name": 3, "size": 1}]), ("observables", [{"name": "n", "size": -1}]), ("observables", [3]),
     ("prior", []), ("prior", {}), ("prior", {"blocks": [3]}), ("simulator", "x"), ("theta", 3), ("layout", [])],
)  # fmt: skip
def test_a_header_of_other_types_is_refused(field, value):
    with pytest.raises(StoreError, match="store"):
        Header.from_plain(HEADER.plain() | {field: value}, "store.json")
