"""Run folders: whose folder it is, records, files of each kind, the observation, and draws that come back."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, RunFolderError, SettingError
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.version import __version__
from sbi_phys.nets.spline import arithmetic
from sbi_phys.workflow.run import Draws, Run, RunFolder, null_safe, versions
from sbi_phys.workflow.settings import Config
from tests.toys import LinearGaussian

PLAIN = {"simulator.spec": "tests.toys:LinearGaussian", "infer.observation": "simulated"}


def settings(**changes) -> Config:
    return Config().override(PLAIN | {key.replace("__", "."): value for key, value in changes.items()})


def begun(folder: Path, **changes) -> Run:
    run = Run(folder, settings(**changes))
    run.begin()
    return run


# ---- the folder


def test_a_folder_is_made_by_begin_alone_and_opens_with_its_settings(tmp_path):
    run = Run(tmp_path / "a" / "b", settings(run__seed=7))
    assert not (tmp_path / "a").exists()
    run.begin()
    assert sorted(p.name for p in run.folder.iterdir()) == ["config.toml", "stages"]
    before = run.path("config.toml").stat().st_mtime_ns
    run.begin()
    assert run.path("config.toml").stat().st_mtime_ns == before
    for folder in (run.folder, str(run.folder)):
        assert Run.open(folder).config == run.config


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="holds thesis.tex and no config.toml"):
        Run(tmp_path, settings())
    with pytest.raises(RunFolderError, match="is a file; expected a folder"):
        Run(tmp_path / "thesis.tex", settings())
    for i in range(6):
        (tmp_path / f"a{i}").write_text("x")
    with pytest.raises(RunFolderError, match=r"holds a0, a1, a2, a3, a4, \.\.\. and no config.toml"):
        Run(tmp_path, settings())
    (tmp_path / "empty").mkdir()
    Run(tmp_path / "empty", settings())


def test_settings_may_change_and_are_written_at_the_next_begin(tmp_path):
    first = Run(tmp_path / "a", settings(run__seed=2))
    first.begin()
    path = first.path("config.toml")
    path.write_text("# my own words\n" + path.read_text())
    Run(tmp_path / "a", settings(run__seed=2, run__workers=3)).begin()  # the results do not depend on the number of workers
    assert path.read_text().startswith("# my own words")
    Run(tmp_path / "a", settings(run__seed=3)).begin()
    assert Config.read(path).run.seed == 3


def test_names_of_networks_and_observations_are_folders(tmp_path):
    config = settings(networks={"wide": {"flow": {"hidden": 128}, "train": {"max_epochs": 9}}}, observations={"crab": "crab.csv"})
    run = Run(tmp_path / "a", config, network="wide", observation_name="crab")
    assert (run.config.flow.hidden, run.config.train.max_epochs, run.config.infer.observation) == (128, 9, "crab.csv")
    where = {
        "simulations": "simulations",
        "stages/simulate.json": "stages/simulate.json",
        "model.pt": "networks/wide/model.pt",
        "training": "networks/wide/training",
        "stages/train.json": "networks/wide/stages/train.json",
        "posterior.nc": "networks/wide/observations/crab/posterior.nc",
        "stages/infer.json": "networks/wide/observations/crab/stages/infer.json",
    }
    assert {name: run.path(name).relative_to(run.folder).as_posix() for name in where} == where
    assert Run(tmp_path / "a", config, observation_name="crab").path("model.pt") == tmp_path / "a" / "model.pt"
    assert run.title.endswith(": crab, network wide")
    with pytest.raises(SettingError, match="network is 'wied'; expected one of wide"):
        Run(tmp_path / "a", config, network="wied")


def test_a_project_is_used_by_one_command_at_a_time(tmp_path):
    run, other = Run(tmp_path / "a", settings()), Run(tmp_path / "a", settings())
    with (
        run.locked(),
        pytest.raises(RunFolderError, match=rf"a is in use by process {os.getpid()} on .*; expected one command at a time"),
        other.locked(),
    ):
        raise AssertionError
    with other.locked():
        pass


def test_a_folder_without_a_run_cannot_be_opened(tmp_path):
    with pytest.raises(RunFolderError, match="has no config.toml; expected the folder of a run, which sbi-phys train --out"):
        Run.open(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="cannot be made: .*; expected a folder to write to"):
        Run(tmp_path / "file" / "run", settings()).begin()


def test_a_kind_of_run_brings_its_settings(tmp_path):
    class Bare(RunFolder):
        SETTINGS_FILE, RECORDS = "settings.json", "records"

    with pytest.raises(NotImplementedError):
        Bare(tmp_path / "a").begin()
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(NotImplementedError):
        Bare(tmp_path)


# ---- records


def test_a_record_is_written_when_the_stage_ends_and_not_on_an_error(tmp_path):
    run = begun(tmp_path / "a")
    assert run.record("train") is None and run.numbers("train") == {}
    with pytest.raises(ZeroDivisionError), run.recording("train") as numbers:
        numbers["loss"] = 1 / 0
    assert run.record("train") is None
    with run.recording("train") as numbers:
        numbers |= {"loss": np.float32(0.5), "bad": np.nan}
        assert run.record("train") is None
    record = run.record("train")
    assert record["stage"] == "train" and record["seconds"] >= 0 and record["versions"] == versions()
    assert run.numbers("train") == {"loss": 0.5, "bad": None}
    same, other = begun(tmp_path / "b"), begun(tmp_path / "c", run__seed=1)
    for another in (same, other):
        with another.recording("train"):
            pass
    run.note("train", {"waited": 2.0, "seconds": 9.0})
    assert run.record("train") == record | {"waited": 2.0, "seconds": 9.0}
    run.forget("train")
    run.forget("train")
    assert run.record("train") is None


def test_a_note_does_not_make_a_stage_finished(tmp_path):
    run = begun(tmp_path / "a")
    with pytest.raises(RunFolderError, match="has no record of the stage 'train'; expected a finished stage"):
        run.note("train", {"waited": 1.0})
    assert run.record("train") is None


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "is not JSON: .*delete it to run the stage again"),
        (b"\xff", "is not JSON"),
        (b"[1]", "holds a list; expected a record of a stage"),
        (b"null", "holds a NoneType; expected a record"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, content, complaint):
    run = begun(tmp_path / "a")
    run.path("stages", "train.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=f"train.json {complaint}"):
        run.numbers("train")


# ---- files


def test_files_of_each_kind_come_back(tmp_path):
    run = begun(tmp_path / "a")
    assert run.write_text("deep/er/note.txt", "a\nb").read_text(encoding="utf-8") == "a\nb"
    run.write_json("numbers.json", {"σ": [1.0, np.inf]})
    assert run.path("numbers.json").read_text(encoding="utf-8").endswith("}\n")
    assert json.loads(run.path("numbers.json").read_text(encoding="utf-8")) == {"σ": [1.0, None]}
    run.write_csv("table.csv", ["a", "b"], ([i, f"x,{i}"] for i in range(2)))
    with run.path("table.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["0", "x,0"], ["1", "x,1"]]
    assert run.path("table.csv").read_bytes().count(b"\r") == 0
    array = np.arange(6.0).reshape(2, 3)
    run.write_array("deep/array.npy", array)
    assert np.array_equal(run.read_array("deep/array.npy"), array)
    assert not list(run.folder.rglob("*.tmp*"))


def test_a_figure_is_written_twice_and_shown_once(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    run = begun(tmp_path / "a")
    figure = pyplot.figure(figsize=(1, 1))
    block = run.draw(figure, "loss", "The loss.", "a curve", 300)
    pyplot.close(figure)
    assert sorted(p.name for p in run.path("figures").iterdir()) == ["loss.pdf", "loss.png"]
    assert (block.caption, block.alt, block.pdf, block.max_width) == ("The loss.", "a curve", "figures/loss.pdf", 300)


def test_null_safe_leaves_nothing_that_json_cannot_hold():
    value = {"a": np.array([1.0, np.nan]), "b": (np.float32(2), float("inf")), 3: [np.int64(4), None, True], "p": Path("x")}
    assert null_safe(value) == {"a": [1.0, None], "b": [2.0, None], "3": [4, None, True], "p": "x"}
    json.dumps(null_safe(value), allow_nan=False)
    assert null_safe([np.array(3), np.bool_(True), np.array([[np.inf]]), "nan", -np.inf]) == [3, True, [[None]], "nan", None]


def test_versions_name_what_is_installed():
    found = versions()
    assert found["sbi_phys"] == __version__ and found["numpy"] == np.__version__ and set(found) >= {"python", "torch", "scipy", "h5py"}


# ---- the observation


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("1,2,3", r"shape \(3,\); expected \(2,\) = x: 2"),
        ("1,nan", "nan in column 1"),
        ("a,b", "no numbers"),
        ("1,2 m", "has '2 m'; expected a number without a unit"),
    ],
)
def test_an_observation_that_does_not_fit(tmp_path, row, complaint):
    (tmp_path / "x.csv").write_text(row)
    with pytest.raises(DataError, match=complaint):
        _ = Run(tmp_path / "run", settings(infer__observation=str(tmp_path / "x.csv"))).observation


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.array(["a", "b"]), "x.npy has dtype <U1; expected real numbers"),
        (np.array([1 + 1j, 2]), "x.npy has dtype complex128; expected real numbers"),  # its imaginary part was dropped
        (np.array([1, None]), "cannot be read: Object arrays cannot be loaded"),
        (np.zeros((2, 2)), r"shape \(2, 2\); expected \(2,\) = x: 2; .*x.npy#1 is its first row, .*x.npy#all every row"),
        (np.array([np.inf, 0.0]), "inf in column 0"),
    ],
)
def test_an_array_that_is_no_observation(tmp_path, array, complaint):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=complaint):
        _ = Run(tmp_path / "run", settings(infer__observation=str(tmp_path / "x.npy"))).observation


def test_an_empty_file_is_no_observation(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"")
    with pytest.raises(
        DataError, match="x.npy' cannot be read: No data left in file; expected a .npy, .npz, .csv or .txt file with one row"
    ):
        _ = Run(tmp_path / "run", settings(infer__observation=str(tmp_path / "x.npy"))).observation


def test_an_observation_from_a_file(tmp_path):
    np.save(tmp_path / "x.npy", np.array([0.5, -0.5]))
    (tmp_path / "x.txt").write_text("0.5, -0.5\n")
    for name in ("x.npy", "x.txt"):
        run = Run(tmp_path / "run", settings(infer__observation=str(tmp_path / name)))
        assert run.observation.tolist() == [0.5, -0.5] and run.truth is None


def test_a_simulated_observation_follows_from_the_seed(tmp_path):
    toy = LinearGaussian()
    run = Run(tmp_path / "a", settings(run__seed=4))
    theta = toy.prior.sample(1, rng_for(4, "observation", "theta"))
    assert np.array_equal(run.truth, theta[0])
    assert np.array_equal(run.observation, toy.simulate(theta, rng_for(4, "observation", "x"))[0])
    assert run.seed("a", 1) == seed_for(4, "a", 1) and run.rng("b").random() == rng_for(4, "b").random()
    assert run.names == ["t0", "t1"]


def test_a_measured_observation_is_that_of_the_simulator(tmp_path, monkeypatch):
    monkeypatch.setattr(LinearGaussian, "observed", lambda self: [1, 2], raising=False)
    run = Run(tmp_path / "a", settings(infer__observation="observed"))
    assert run.observation.tolist() == [1.0, 2.0] and run.truth is None
    monkeypatch.delattr(LinearGaussian, "observed")
    with pytest.raises(SettingError, match=r"infer.observation is 'observed', but tests.toys:LinearGaussian has no observed\(\)"):
        _ = Run(tmp_path / "a", settings(infer__observation="observed")).observation


def test_an_error_of_a_simulator_names_its_settings(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no such tables")

    monkeypatch.setattr("sbi_phys.workflow.run.load_simulator", refuse)
    with pytest.raises(SettingError, match=r"\[simulator.settings\] of tests.toys:LinearGaussian: no such tables"):
        _ = Run(tmp_path / "a", settings()).simulator


# ---- draws


@pytest.mark.parametrize("shape", [(50, 2), (4, 25, 2)])
def test_draws_come_back_in_their_chains_with_notes(tmp_path, shape):
    run = begun(tmp_path / "a", run__seed=2)
    theta = np.random.default_rng(0).standard_normal(shape)
    run.write_draws("posterior.nc", theta, {"method": "exact", "ess": np.nan})
    found = run.read_draws("posterior.nc")
    assert np.array_equal(found.chains, theta if theta.ndim == 3 else theta[None])
    assert np.array_equal(found.flat, theta.reshape(-1, 2))
    assert found.notes["method"] == "exact" and found.notes["seed"] == 2 and found.notes["versions"] == versions()


def test_all_chains_in_one():
    chains = np.arange(12.0).reshape(2, 3, 2)
    assert Draws(chains, {}).flat[3].tolist() == chains[1, 0].tolist()


def test_draws_of_other_parameters_are_named(tmp_path):
    begun(tmp_path / "a").write_draws("posterior.nc", np.zeros((50, 2)), {})
    other = begun(tmp_path / "b", simulator__settings={"dim": 3})
    (tmp_path / "a" / "posterior.nc").rename(other.path("posterior.nc"))
    with pytest.raises(DataError, match=r"has no parameter 't2', it has \['t0', 't1'\]; expected \['t0', 't1', 't2'\]"):
        other.read_draws("posterior.nc")


def test_a_record_or_an_array_with_another_number_is_refused(tmp_path):
    run = begun(tmp_path / "run")
    content = {"stage": "train", "numbers": {"loss": 1.5, "nan": float("nan"), "array": np.arange(3)}}
    run.write_record("train", content)
    assert run.record("train") == {"stage": "train", "numbers": {"loss": 1.5, "nan": None, "array": [0, 1, 2]}}
    path = run.path("stages", "train.json")
    path.write_text(path.read_text().replace("1.5", "1.6"))
    with pytest.raises(RunFolderError, match=r"train\.json is damaged.*delete it to run the stage again"):
        run.record("train")
    path.write_text(json.dumps({"stage": "train"}))
    with pytest.raises(RunFolderError, match=r"train\.json is damaged.*expected one; delete it"):
        run.record("train")
    run.write_array("weights.npy", np.arange(5.0))
    assert np.array_equal(run.read_array("weights.npy"), np.arange(5.0))
    assert np.array_equal(np.load(run.path("weights.npy")), np.arange(5.0))
    whole = bytearray(run.path("weights.npy").read_bytes())
    for at in (20, 130, 150):
        damaged = whole.copy()
        damaged[at] ^= 1
        run.path("weights.npy").write_bytes(damaged)
        with pytest.raises(RunFolderError, match=r"weights\.npy cannot be read: .* is damaged"):
            run.read_array("weights.npy")
    run.path("weights.npy").unlink()
    with pytest.raises(RunFolderError, match="cannot be read"):
        run.read_array("weights.npy")


def test_the_versions_of_a_record_say_what_computed_the_networks():
    assert versions()["layers"] == arithmetic() in ("kernels", "torch")


@pytest.mark.parametrize("left", [(), ("stages",), ("stages", ".config.toml.123456789012345678901234.tmp")])
def test_a_kill_while_the_folder_is_made_leaves_one_that_can_be_used(tmp_path, left):
    for name in left:
        (tmp_path / name).touch() if name.endswith(".tmp") else (tmp_path / name).mkdir()
    run = Run(tmp_path, Config())
    run.begin()
    assert run.path("config.toml").is_file() and run.path("stages").is_dir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(RunFolderError, match=r"holds notes.txt and no config.toml"):
        Run(tmp_path / "other", Config())
