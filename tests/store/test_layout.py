import os
import shutil
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest

from sbi_phys.core.errors import DataError, SettingError, ShapeError, StoreError
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store._writer import StoreWriter, take_rows
from sbi_phys.store.check import check_store
from sbi_phys.store.layout import Layout, Ragged, split_x
from sbi_phys.store.merge import repack_store
from sbi_phys.store.shards import ShardData, open_shard, read_arrays, shard_name, verify_shard, write_shard
from sbi_phys.store.store import Store
from tests.store.helpers import HEADER, digests, flaky, rows
from tests.toys import LinearGaussian

OBSERVABLES = [
    {"name": name, "size": size, "unit": "", "latex": "", "kind": "real", "edges": [], "edges_unit": ""}
    for name, size in (("image", 12), ("xmax", 1), ("tank", 4))
]
LAYOUT = Layout(
    compression="gzip:4",
    dtypes={"image": "float16", "tank": "float32"},
    shapes={"image": (3, 4), "tank": (2, 1, 2)},
    sets={"hits": ("t", "charge")},
)
WIDE = replace(HEADER, observables=OBSERVABLES, dtype="float64", layout=LAYOUT.plain(), shard_size=500)


def data(n=1200, seed=0):
    rng = np.random.default_rng(seed)
    plain = rows(n, failed=(2, n - 1), seed=seed)
    x = rng.standard_normal((n, 17))
    x[2] = np.nan
    x[n - 1] = np.nan
    lengths = rng.integers(0, 5, n)
    hits = Ragged(rng.standard_normal((lengths.sum(), 2)).astype("f4"), np.concatenate([[0], np.cumsum(lengths)]))
    return ShardData(plain.theta, x, plain.status, plain.reasons, {"hits": hits})


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide") / "store"
    with StoreWriter(path, WIDE) as writer:
        writer.add(data())
    return Store(path)


def test_own_dtypes_shapes_and_sets_come_back(wide):
    want = data()
    ok = want.status == 0
    theta, x = wide.read(valid_only=False)
    np.testing.assert_array_equal(theta, want.theta)
    assert x.dtype == np.float64
    np.testing.assert_array_equal(x[:, :12], want.x[:, :12].astype("f2"))
    np.testing.assert_array_equal(x[:, 12], want.x[:, 12])
    np.testing.assert_array_equal(x[:, 13:], want.x[:, 13:].astype("f4"))
    image, tank = wide.observable("image"), wide.observable("tank", valid_only=False)
    assert image.dtype == np.float16 and image.shape == (1198, 3, 4) and tank.shape == (1200, 2, 1, 2) and tank.dtype == np.float32
    np.testing.assert_array_equal(image.reshape(-1, 12), want.x[ok, :12].astype("f2"))
    hits = wide.sets("hits", valid_only=False)
    for i in (0, 3, 499, 500, 1199):
        np.testing.assert_array_equal(hits.row(i), want.sets["hits"].row(i))
    good = wide.sets("hits")
    assert len(good) == 1198
    np.testing.assert_array_equal(good.row(2), want.sets["hits"].row(3))
    wide.verify()
    with pytest.raises(SettingError, match="unknown key 'hit'; .*did you mean 'hits'"):
        wide.sets("hit")


def test_the_file_holds_the_narrow_types_and_x_reads_as_ever(wide):
    x = wide.read(valid_only=False)[1]
    with h5py.File(wide.path / shard_name(0), locking=False) as file:
        assert [file[f"x_{i}"].dtype for i in range(3)] == [np.float16, np.float64, np.float32]
        assert file["x"].is_virtual and file["x"].dtype == np.float64 and file["x"].shape == (500, 17)
        assert file["x_0"].compression == "gzip" and file["x_0"].chunks[1] == 12
        np.testing.assert_array_equal(file["x"][37:41], x[37:41])


@pytest.mark.parametrize("name", ["x_0", "x_2", "set_0", "set_0_offsets", "theta"])
def test_damage_in_any_dataset_is_named(wide, tmp_path, name):
    path = tmp_path / shard_name(0)
    shutil.copy(wide.path / shard_name(0), path)
    with h5py.File(path, "r+") as file:
        if name == "set_0_offsets":  # still rising, but other rows
            row = int(np.flatnonzero(np.diff(file[name][1:]))[0]) + 1
            file[name][row] = file[name][row + 1]
        else:
            index = (250, *[0] * (file[name].ndim - 1))
            file[name][index] += 1
    with pytest.raises(StoreError, match=f"dataset {name} has checksum"):
        verify_shard(path, WIDE, 0, 500)


def test_equal_rows_give_equal_bytes_in_any_layout(wide, tmp_path):
    time.sleep(1.05)  # HDF5's time stamps have a resolution of one second
    with StoreWriter(tmp_path / "again", WIDE) as writer:
        for start in range(0, 1200, 300):
            writer.add(take_rows(data(), np.arange(start, start + 300)))
    assert digests(tmp_path / "again") == digests(wide.path)


@pytest.mark.parametrize("compression", ["", "lzf", "gzip", "gzip:9"])
@pytest.mark.parametrize("chunk_rows", [0, 7, 10_000])
def test_every_compression_gives_the_rows_back(tmp_path, compression, chunk_rows):
    header = replace(HEADER, layout=Layout(compression=compression, chunk_rows=chunk_rows).plain(), shard_size=3000)
    want = rows(3000, failed=(1,))
    write_shard(tmp_path / shard_name(0), header, 0, want)
    verify_shard(tmp_path / shard_name(0), header, 0, 3000)
    with open_shard(tmp_path / shard_name(0)) as file:
        got = read_arrays(file, tmp_path / shard_name(0))
        assert (file["x"].chunks is None) == (not compression and not chunk_rows)
    np.testing.assert_array_equal(got.x, want.x)
    assert got.reasons == want.reasons


def test_repack_changes_the_layout_and_no_row(tmp_path):
    store = flaky(tmp_path / "s", 350)
    new = Store(repack_store(store.path, tmp_path / "small", Layout(compression="lzf", dtypes={"x": "float16"})))
    np.testing.assert_array_equal(new.read()[0], store.read()[0])
    np.testing.assert_array_equal(new.read()[1], store.read()[1].astype("f2"))
    assert [f.reason for f in new.failures()] == [f.reason for f in store.failures()]
    assert check_store(new.path).ok and new.layout.compression == "lzf"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"compression": "zip"}, SettingError, "compression is 'zip'; expected '', 'lzf', 'gzip'"),
        ({"compression": "gzip:0"}, SettingError, "compression"),
        ({"chunk_rows": -1}, SettingError, "chunk_rows is -1"),
        ({"dtypes": {"n": "int8"}}, SettingError, "dtype of n is 'int8'"),
        ({"dtypes": {"m": "float16"}}, SettingError, "dtypes has an unknown key 'm'"),
        ({"dtypes": {"n": "float64"}}, SettingError, "expected none wider than that of the store, float32"),
        ({"shapes": {"n": (2, 2)}}, ShapeError, r"shape of n is \(2, 2\), 4 values; expected 3"),
    ],
)
def test_a_layout_that_does_not_fit(settings, error, message):
    with pytest.raises(error, match=message):
        Layout(**settings).check(HEADER.observables, "float32")


def test_a_number_that_the_narrow_type_cannot_hold_is_refused(tmp_path):
    header = replace(HEADER, layout=Layout(dtypes={"n": "float16"}).plain())
    big = rows(40)
    big.x[3, 1] = 1e6
    with pytest.raises(DataError, match=r"n\[1\] of row 3 is 1e\+06, which float16 cannot hold"):
        write_shard(tmp_path / shard_name(0), header, 0, big)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("offsets", "error"),
    [
        ([0, 2], DataError),
        ([1, 3], DataError),
        ([0, 3, 2, 3], DataError),
        ([], ShapeError),
        ([0.0, 3.0], ShapeError),
        ([[0, 3]], ShapeError),
    ],
)
def test_offsets_that_do_not_fit(offsets, error):
    with pytest.raises(error, match="offsets"):
        Ragged(np.zeros((3, 1)), np.array(offsets))


def test_sets_that_are_missing_are_named(tmp_path):
    with pytest.raises(StoreError, match=r"ragged sets \[\]; expected those of the layout, \['hits'\]"):
        write_shard(tmp_path / shard_name(0), WIDE, 0, replace(data(500), sets={}))


# ---- simulate with a layout

SQUEEZED = Layout(compression="gzip:1", dtypes={"x": "float16"}, chunk_rows=500)


def test_simulate_with_a_layout(tmp_path):
    toy = LinearGaussian(dim=2, n_columns=3)
    plain = simulate(toy, 3000, tmp_path / "plain", shard_size=2000, workers=1)
    store = simulate(toy, 3000, tmp_path / "small", shard_size=2000, workers=1, layout=SQUEEZED)
    np.testing.assert_array_equal(store.read()[0], plain.read()[0])
    np.testing.assert_array_equal(store.observable("x"), plain.read()[1].astype("f2"))
    assert store.read()[1].dtype == np.float32 and store.layout == SQUEEZED
    with h5py.File(store.path / shard_name(0), locking=False) as file:
        assert (file["x_0"].dtype, file["x_0"].chunks, file["x_0"].compression) == (np.float16, (500, 3), "gzip")
    store.verify()
    # any number of workers, in steps, in array jobs: the same bytes; who says nothing gets the layout that is there
    simulate(toy, 1500, tmp_path / "steps", shard_size=2000, workers=1, layout=SQUEEZED)
    simulate(toy, 3000, tmp_path / "steps", workers=1)
    for part in (1, 0):
        simulate(toy, 3000, tmp_path / "jobs", shard_size=2000, workers=1, layout=SQUEEZED, shards=part)
    for name in ("steps", "jobs"):
        assert {k: v for k, v in digests(tmp_path / name).items() if k[0] != "."} == {
            k: v for k, v in digests(store.path).items() if k[0] != "."
        }
    for layout in (Layout(), Layout(compression="lzf")):
        with pytest.raises(StoreError, match="made with another layout"):
            simulate(toy, 3000, store.path, workers=1, layout=layout)


@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        ({"compression": "gzip"}, SettingError, "layout is {'compression': 'gzip'}; expected a sbi_phys.store.layout.Layout"),
        (Layout(dtypes={"y": "float16"}), SettingError, "unknown key 'y'"),
        (Layout(dtypes={"x": "float64"}), SettingError, "dtype of x is float64; expected none wider than that of the store, float32"),
        (Layout(shapes={"x": (2, 2)}), ShapeError, "shape of x is"),
        (Layout(sets={"hits": ("t",)}), SettingError, r"layout has the ragged sets \['hits'\]; expected none"),
    ],
)
def test_a_layout_that_does_not_fit_the_simulator(tmp_path, layout, error, message):
    with pytest.raises(error, match=message):
        simulate(LinearGaussian(), 10, tmp_path, workers=1, layout=layout)
    assert not (tmp_path / "store.json").exists()


def test_counts_that_float16_would_change_are_refused():
    x = np.array([[2048.0, 1.5], [2049.0, 1.3]], dtype=np.float32)
    kinds = [{"name": "n", "size": 1, "kind": "counts"}, {"name": "r", "size": 1, "kind": "real"}]
    layout = Layout(dtypes={"n": "float16", "r": "float16"})
    with pytest.raises(DataError, match=r"n\[0\] of row 1 is 2049, which float16 cannot hold"):
        split_x(layout, kinds, x)
    assert split_x(layout, kinds, x[:1])["x_0"].tolist() == [[2048.0]]
    assert split_x(Layout(dtypes={"r": "float16"}), kinds, x)["x_1"].dtype == np.float16  # a real number is rounded


def test_a_simulator_that_prints_does_no_harm(tmp_path, capfd):
    class Loud(LinearGaussian):
        def simulate(self, theta, rng):
            print("shower", len(theta))
            os.write(1, b"from C\n")
            return super().simulate(theta, rng)

    loud = simulate(Loud(), 30, tmp_path / "loud", shard_size=20, workers=1)
    assert capfd.readouterr().out.count("shower") >= 2
    for got, want in zip(loud.read(), simulate(LinearGaussian(), 30, tmp_path / "quiet", shard_size=20, workers=1).read(), strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_shape_of_the_layout_is_that_of_the_observable_and_two_shapes_are_refused(wide):
    assert [o.shape for o in wide.observables] == [(3, 4), (1,), (2, 1, 2)]
    assert wide.blocks()[1]["tank"].shape == (1198, 2, 1, 2)
    shaped = [{**OBSERVABLES[0], "shape": [4, 3]}, *OBSERVABLES[1:]]
    with pytest.raises(ShapeError, match=r"shape of image is \(3, 4\); expected \(4, 3\), that of the observable"):
        LAYOUT.check(shaped, "float64")
