import sys

import h5py
import numpy as np
import pytest

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, StoreError, SupportError
from sbi_phys.priors import BoxPrior, Observable, Parameter
from sbi_phys.store.imports import import_store, read_chunks
from sbi_phys.store.layout import Layout
from sbi_phys.store.reweighting import reweight
from sbi_phys.store.store import Store

PRIOR = BoxPrior([Parameter("lg_e", 17, 20, unit="lg eV"), Parameter("zenith", 0, 60, unit="deg")])
OBSERVABLES = [Observable("xmax", 1, unit="g/cm2"), Observable("signal", 3)]
RNG = np.random.default_rng(0)
N = 50
LG_E, ZENITH = RNG.uniform(17, 20, N), RNG.uniform(0, 60, N)
XMAX, SIGNAL = RNG.normal(700, 50, N), RNG.normal(size=(N, 3))
XMAX[7] = np.nan
OK = np.isfinite(XMAX)


def write(path):
    """The same table in the format that the suffix names, and the mapping to read it with."""
    if path.suffix == ".npz":
        np.savez(path, E=LG_E, zenith=ZENITH, xmax=XMAX, s=SIGNAL)
        return {"lg_e": "E", "signal": "s"}
    if path.name == "named.npy":
        array = np.zeros(N, dtype=[("E", "f8"), ("zenith", "f4"), ("xmax", "f8"), ("s", "f8", 3)])
        array["E"], array["zenith"], array["xmax"], array["s"] = LG_E, ZENITH, XMAX, SIGNAL
        np.save(path, array)
        return {"lg_e": "E", "signal": "s"}
    if path.suffix == ".npy":
        np.save(path, np.column_stack([LG_E, ZENITH, XMAX, SIGNAL]))
        return {"lg_e": "0", "zenith": "1", "xmax": "2", "signal": ["3", "4", "5"]}
    if path.suffix == ".csv":
        lines = ["# made by hand", "E, zenith,xmax,s0,s1,s2"]
        for row in zip(LG_E, ZENITH, XMAX, *SIGNAL.T, strict=True):
            lines.append(",".join("" if np.isnan(v) else repr(float(v)) for v in row))
        path.write_text("\n".join(lines) + "\n\n")
        return {"lg_e": "E", "signal": ["s0", "s1", "s2"]}
    with h5py.File(path, "w") as file:
        file["shower/E"], file["shower/z"], file["reco/xmax"], file["reco/s"] = LG_E, ZENITH, XMAX, SIGNAL
    return {"lg_e": "shower/E", "zenith": "shower/z", "xmax": "reco/xmax", "signal": "/reco/s"}


@pytest.mark.parametrize("name", ["t.npz", "named.npy", "plain.npy", "t.csv", "t.h5", "t.hdf5"])
def test_a_table_becomes_a_store(tmp_path, name):
    columns = write(tmp_path / name)
    path = import_store(
        tmp_path / name,
        tmp_path / "s",
        prior=PRIOR,
        observables=OBSERVABLES,
        columns=columns,
        dtype="float64",
        shard_size=20,
        name="corsika",
    )
    store = Store(path)
    theta, x = store.read(valid_only=False)
    np.testing.assert_allclose(theta, np.column_stack([LG_E, ZENITH]), rtol=1e-6 if name == "named.npy" else 0)
    np.testing.assert_array_equal(x, np.column_stack([XMAX, SIGNAL]))
    assert [(f.row, f.status, f.reason) for f in store.failures()] == [(7, 1, "non-finite x in 1 of 4 columns")]
    assert store.identity == {"class": "corsika", "settings": {}} and store.n_shards == 3 and store.observables == tuple(OBSERVABLES)
    assert store.theta_kind == "imported" and store.origin["files"] == [name]
    store.verify()


def test_several_files_and_pieces_are_laid_end_to_end(tmp_path, monkeypatch):
    columns = write(tmp_path / "a.csv")
    shifted = (tmp_path / "a.csv").read_text().replace("# made by hand", "# again")
    (tmp_path / "b.csv").write_text(shifted)
    monkeypatch.setattr("sbi_phys.store.imports.read_chunks", lambda *a, **k: read_chunks(*a, **k, rows=7))
    path = import_store(
        [tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "s", prior=PRIOR, observables=OBSERVABLES, columns=columns, drawn=True
    )
    store = Store(path)
    np.testing.assert_array_equal(store.read(valid_only=False)[0][:, 0], np.tile(LG_E, 2))
    assert [f.row for f in store.failures()] == [7, 57]
    assert reweight(store, PRIOR).ess == pytest.approx(98)


def test_images_keep_their_shape(tmp_path):
    images = np.arange(N * 6, dtype="f4").reshape(N, 2, 3)
    np.savez(tmp_path / "t.npz", lg_e=LG_E, zenith=ZENITH, image=images)
    layout = Layout(shapes={"image": (2, 3)}, dtypes={"image": "float16"}, compression="lzf")
    store = Store(import_store(tmp_path / "t.npz", tmp_path / "s", prior=PRIOR, observables=[Observable("image", 6)], layout=layout))
    np.testing.assert_array_equal(store.observable("image"), images.astype("f2"))


BAD = [
    ("t.txt", {}, SettingError, r"ends in '.txt'; expected one of .npz"),
    ("gone.npz", {}, DataError, "gone.npz is not a file"),
    ("t.npz", {"columns": {"lg_e": "F"}}, SettingError, "has no 'F'; it has E, zenith, xmax, s"),
    ("t.npz", {"columns": {"lg": "E"}}, SettingError, "columns has an unknown key 'lg'"),
    ("t.npz", {"columns": {"lg_e": []}}, SettingError, "is empty"),
    ("t.npz", {"columns": {"lg_e": "E", "signal": "xmax"}}, ShapeError, r"signal has 1 values a row from \['xmax'\]; expected 3"),
    ("t.npz", {"columns": {"lg_e": "s", "signal": "s"}}, ShapeError, "lg_e has 3 values a row"),
    ("t.npz", {"columns": {"lg_e": "xmax", "signal": "s"}}, NonFiniteError, "row 7 has lg_e = nan"),
    ("t.npz", {"columns": {"lg_e": "zenith", "signal": "s"}}, SupportError, "lg_e = .* lg eV, expected within"),
    ("t.npz", {"tree": "events"}, SettingError, "tree is 'events' for .* expected it with a .root file only"),
    ("t.npz", {"dtype": "float16"}, SettingError, "dtype is 'float16'"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, name, change, error, message):
    (tmp_path / "t.txt").write_text("")
    arguments = {"columns": write(tmp_path / "t.npz"), "prior": PRIOR, "observables": OBSERVABLES} | change
    with pytest.raises(error, match=message):
        import_store(tmp_path / name, tmp_path / "s", **arguments)
    assert not (tmp_path / "s").exists() and not (tmp_path / ".s.part").exists()


def test_files_that_are_broken(tmp_path):
    settings = {"prior": PRIOR, "observables": OBSERVABLES}
    for name, content, message in (
        ("t.npz", b"nothing", "t.npz cannot be read"),
        ("t.npy", b"", "t.npy cannot be read"),
        ("t.h5", b"nothing", "t.h5 cannot be read"),
        ("t.csv", b"lg_e,zenith,xmax,signal\n18,3,700\n", "row 1 has 3 values; expected 4"),
        ("u.csv", b"lg_e,zenith,xmax,signal\n18,many,700,1\n", "row 1, column zenith has 'many'; expected a number"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            import_store(tmp_path / name, tmp_path / "s", **settings)
    (tmp_path / "v.csv").write_text("")
    with pytest.raises(SettingError, match="has no 'lg_e'"):
        import_store(tmp_path / "v.csv", tmp_path / "s", **settings)
    np.savez(tmp_path / "w.npz", lg_e=LG_E, zenith=ZENITH[:3], xmax=XMAX, signal=SIGNAL)
    with pytest.raises(DataError, match="columns differ in length"):
        import_store(tmp_path / "w.npz", tmp_path / "s", **settings)
    np.savez(tmp_path / "x.npz", lg_e=LG_E, zenith=ZENITH, xmax=XMAX * 1e40, signal=SIGNAL)
    with pytest.raises(DataError, match='which float32 cannot hold; expected dtype="float64"'):
        import_store(tmp_path / "x.npz", tmp_path / "s", **settings)
    np.savez(tmp_path / "y.npz", lg_e=LG_E[:0], zenith=ZENITH[:0], xmax=XMAX[:0], signal=SIGNAL[:0])
    with pytest.raises(DataError, match="would have no rows"):
        import_store(tmp_path / "y.npz", tmp_path / "s", **settings)
    write(tmp_path / "good.npz")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(StoreError, match="exists already"):
        import_store(tmp_path / "good.npz", tmp_path / "taken", columns={"lg_e": "E", "signal": "s"}, **settings)


def test_a_pickle_in_an_array_file_is_never_run(tmp_path):
    np.savez(tmp_path / "t.npz", lg_e=np.array([{"a": 1}], dtype=object), zenith=ZENITH, xmax=XMAX, signal=SIGNAL)
    with pytest.raises(DataError, match="cannot be read: Object arrays cannot be loaded"):
        import_store(tmp_path / "t.npz", tmp_path / "s", prior=PRIOR, observables=OBSERVABLES)


def test_root_without_uproot_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "t.root").write_bytes(b"root")
    monkeypatch.setitem(sys.modules, "uproot", None)
    with pytest.raises(SettingError, match="ROOT file, and the package uproot is not installed; expected it: pip install uproot"):
        import_store(tmp_path / "t.root", tmp_path / "s", prior=PRIOR, observables=OBSERVABLES)


@pytest.mark.parametrize("kind", ["TTree", "RNTuple"])
def test_a_root_file_with_jagged_branches(tmp_path, kind):
    uproot = pytest.importorskip("uproot")
    ak = pytest.importorskip("awkward")
    counts = RNG.integers(0, 4, N)
    times = ak.unflatten(np.arange(counts.sum(), dtype="f4"), counts)
    values = {"E": LG_E, "zenith": ZENITH, "xmax": XMAX, "s": SIGNAL, "hits": ak.zip({"t": times, "q": 2 * times})}
    with uproot.recreate(tmp_path / "t.root") as file:
        if kind == "TTree":
            file.mktree("events", {name: getattr(v, "type", None) or (v.dtype, v.shape[1:]) for name, v in values.items()})
            file.mktree("other", {"a": np.dtype("i8")}).extend({"a": np.arange(3)})
        else:
            for name, columns in {"events": values, "other": {"a": np.arange(3)}}.items():
                file.mkrntuple(name, columns)
        if kind == "TTree":
            for start in range(0, N, 7):  # several baskets
                file["events"].extend({name: v[start : start + 7] for name, v in values.items()})
    assert uproot.open(tmp_path / "t.root")["events"].num_entries == N
    settings = {"prior": PRIOR, "observables": OBSERVABLES, "layout": Layout(sets={"hits": ("t", "q")})}
    dot = "_" if kind == "TTree" else "."
    columns = {"lg_e": "E", "signal": "s", "hits": [f"hits{dot}t", f"hits{dot}q"]}
    store = Store(import_store(tmp_path / "t.root", tmp_path / "s", tree="events", columns=columns, **settings))
    theta, x = store.read(valid_only=False)
    np.testing.assert_allclose(theta[:, 0], LG_E)
    np.testing.assert_allclose(x[:, -3:], SIGNAL, rtol=1e-6)
    hits = store.sets("hits", valid_only=False)
    np.testing.assert_array_equal(np.diff(hits.offsets), counts)
    np.testing.assert_array_equal(hits.values[:, 1], 2 * np.arange(counts.sum()))
    with pytest.raises(SettingError, match="has the trees events, other; expected tree="):
        import_store(tmp_path / "t.root", tmp_path / "r", columns=columns, **settings)
    with pytest.raises(SettingError, match="has no tree 'event'; .*did you mean 'events'"):
        import_store(tmp_path / "t.root", tmp_path / "r", tree="event", columns=columns, **settings)
    with pytest.raises(ShapeError, match="varying length; expected 1 values a row for xmax"):
        import_store(tmp_path / "t.root", tmp_path / "r", tree="events", columns=columns | {"xmax": f"hits{dot}t"}, **settings)


def test_missing_values_of_a_table_are_kept(tmp_path):
    x = np.random.default_rng(0).standard_normal((30, 2, 3))
    x[4, 1, 1], x[5], x[6, 0, 0] = np.nan, np.nan, np.inf
    np.savez(tmp_path / "events.npz", energy=np.linspace(1, 9, 30), image=x)
    prior = BoxPrior([Parameter("energy", 0, 10)])
    path = import_store(
        tmp_path / "events.npz", tmp_path / "store", prior=prior, observables=[Observable("image", shape=(2, 3), missing=True)]
    )
    store = Store(path)
    assert [f.row for f in store.failures()] == [5, 6]
    np.testing.assert_array_equal(store.observable("image"), np.delete(x, [5, 6], axis=0).astype(np.float32))
