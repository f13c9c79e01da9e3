"""The command `unfold`: files whole, numbers right on a spectrum whose truth is known, resumed, refusing what does not belong."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from sbi_phys.core.errors import RunFolderError, SettingError
from sbi_phys.core.rng import rng_for
from sbi_phys.report.arviz import attributes, group, read_netcdf
from sbi_phys.unfold.measurement import load_measurement
from sbi_phys.workflow import run as run_module
from sbi_phys.workflow.cli import app
from sbi_phys.workflow.cli_unfold import unfold_settings
from sbi_phys.workflow.settings import UnfoldSettings
from sbi_phys.workflow.unfold import unfold_spectrum
from sbi_phys.workflow.unfold_methods import METHODS, Task, _from_weights, require_methods, simulate_pairs, starting_values
from sbi_phys.workflow.unfold_run import COLUMNS, UnfoldRun, deviations
from tests.report.browser import check_report, missing_browser
from tests.unfold.sketches import sketch
from tests.unfold.toy_problem import LG_J0, TRUTH, true_counts

TOY = "tests.unfold.toy_problem:Toy"
SMALL = UnfoldSettings(
    n_toys=60, validate_toys=20, n_simulated=4000, omnifold_iterations=2, omnifold_replicas=2, flow_replicas=2, bayes_samples=400
)
BINNED = ("folding", "ibu", "tikhonov")
DRAWING = "sbi_phys.workflow.run"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def toy():
    return load_measurement(TOY)


@pytest.fixture(scope="module")
def done(toy, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        real = run_module.save_figure
        sketch(patch, DRAWING)
        blank = run_module.save_figure
        # the figures of the toys have tests of their own
        patch.setattr(run_module, "save_figure", lambda figure, folder, name: (blank if "validate" in name else real)(figure, folder, name))
        return unfold_spectrum(toy, tmp_path_factory.mktemp("unfold") / "run", SMALL, BINNED)


def test_every_file_is_there_and_nothing_is_left_half_written(done):
    names = {str(p.relative_to(done.folder)) for p in done.folder.rglob("*") if p.is_file()}
    assert {"settings.json", "spectrum.csv", "unfolding.json", "unfolding.nc", "report.html", "validation.json"} <= names
    for name in ("flux", "corrections", "refolded", "correlations", "ibu_stopping", "tikhonov_scan", "folding_fit"):
        assert {f"figures/{name}.png", f"figures/{name}.pdf"} <= names
    assert {f"methods/{name}.{kind}" for name in BINNED for kind in ("npz", "json")} <= names
    assert not [name for name in names if ".tmp" in name]


@pytest.mark.parametrize("name", BINNED)
def test_the_truth_is_found_within_its_errors(done, name):
    found = done.found[name]
    truth = true_counts(done.measurement.reco_edges)
    pull = (found.counts - truth) / np.sqrt(np.diag(found.covariance))
    assert np.abs(pull).max() < 4 and np.sqrt(np.mean(pull**2)) < 1.6
    assert (np.abs(found.counts - truth) < 0.5 * truth).all()
    assert found.record["chi2"] < 30


def test_constants_of_the_detector_are_a_systematic_error_on_the_page(done):
    moved = done.found["folding"].arrays["variations"]
    np.testing.assert_allclose(moved, np.full((1, 10), 1 / 0.9 - 1), rtol=1e-3)
    page = done.path("report.html").read_text()
    assert "changes the unfolded flux by 11.1 % in the first bin" in page and "nine of ten are seen" in page


def test_the_table_holds_every_method_bin_by_bin(done):
    rows = list(csv.DictReader(done.path("spectrum.csv").read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 3 * 10
    second = [row for row in rows if row["method"] == "ibu"]
    np.testing.assert_allclose([float(row["unfolded"]) for row in second], done.found["ibu"].counts)
    m = done.measurement
    np.testing.assert_allclose([float(row["flux"]) for row in second], done.found["ibu"].counts / m.exposure / np.diff(10.0**m.reco_edges))
    np.testing.assert_allclose([float(r["correction"]) * float(r["counts"]) for r in second], [float(r["unfolded"]) for r in second])


def test_the_summary_holds_seeds_versions_and_what_the_target_asks(done):
    found = json.loads(done.path("unfolding.json").read_text())
    assert found["seed"] == 0 and "numpy" in found["versions"] and found["seconds"]["total"] > 0
    assert set(found["methods"]) == set(BINNED)
    away = deviations(done)
    assert found["corrections_against_published"]["folding"]["worst"] == pytest.approx(away["folding"]["worst"])
    assert away["folding"]["worst"] < 0.02  # the published ones are the truth's
    assert len(found["validation"]["rows"]) > 5 and found["validation"]["n_toys"] == 20


def test_the_spectra_as_an_arviz_file(done):
    data = read_netcdf(done.path("unfolding.nc"))
    # no method has draws here: the first one's Gaussian stands in, and the file says so
    assert attributes(data)["gaussian"] == ["folding"]
    draws = group(data, "posterior")["flux_folding"]
    assert draws.shape[0] == 1 and draws.shape[2] == 10
    np.testing.assert_allclose(draws[0].mean(axis=0), done.flux(done.found["folding"].counts), rtol=0.05)
    np.testing.assert_allclose(group(data, "constant_data")["covariance_ibu"], done.found["ibu"].covariance)
    np.testing.assert_allclose(group(data, "observed_data")["counts"], done.measurement.counts)


@pytest.mark.browser
@pytest.mark.skipif(bool(missing_browser()), reason=missing_browser() or "-")
def test_the_page_is_whole(done):
    found = check_report(done.path("report.html"))
    assert found.problems == [] and found.sections == 6 and found.images >= 8


def test_a_second_run_repeats_nothing_and_other_settings_are_refused(done, toy, monkeypatch):
    sketch(monkeypatch, DRAWING)
    stamps = {p: p.stat().st_mtime_ns for p in done.path("methods").iterdir()}
    before = done.path("spectrum.csv").read_text()
    again = unfold_spectrum(toy, done.folder, SMALL, ("ibu",))
    assert {p: p.stat().st_mtime_ns for p in done.path("methods").iterdir()} == stamps
    assert set(again.found) == set(BINNED) and done.path("spectrum.csv").read_text() == before
    with pytest.raises(RunFolderError, match="other settings: seed is 0 there, expected 5"):
        unfold_spectrum(toy, done.folder, replace(SMALL, seed=5), ("ibu",))
    other = load_measurement(TOY, {"seed": 3})
    with pytest.raises(RunFolderError, match="other settings: counts"):
        UnfoldRun(done.folder, other, SMALL, {"problem": toy.name})


def test_a_folder_of_something_else_is_left_alone(tmp_path, toy):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="holds thesis.tex and no settings.json"):
        unfold_spectrum(toy, tmp_path, SMALL, BINNED)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_equal_seeds_give_equal_numbers(done, toy):
    theta = done.found["folding"].arrays["parameters"]
    task = Task(measurement=toy, settings=SMALL, spectrum=done.spectrum(), prior=done.spectrum("power_law"), theta=theta)
    again, other = METHODS["ibu"](task), METHODS["ibu"](replace(task, settings=replace(SMALL, seed=1)))
    np.testing.assert_array_equal(again.counts, done.found["ibu"].counts)
    np.testing.assert_array_equal(again.covariance, done.found["ibu"].covariance)
    assert again.numbers["coverage_worst"] == done.found["ibu"].record["numbers"]["coverage_worst"] != other.numbers["coverage_worst"]


def test_simulated_pairs_are_the_spectrum_seen_through_the_response(toy):
    s = true_counts(toy.fine_edges)
    pairs = simulate_pairs(toy, s, 2**15, rng_for(0, "pairs"))
    found = toy.coarse(np.histogram(pairs.truth, toy.fine_edges, weights=pairs.weights)[0])
    np.testing.assert_allclose(found[toy.inner], true_counts(TRUTH)[toy.inner], rtol=0.01)
    seen = np.histogram(pairs.reco[pairs.reco_pass], toy.reco_edges, weights=pairs.weights[pairs.reco_pass])[0]
    np.testing.assert_allclose(seen, toy.fine.fold(s), rtol=0.01)
    assert set(np.round(pairs.reco[pairs.reco_pass], 6)) <= set(np.round(toy.centres, 6))


def test_replicas_of_the_data_have_a_fit_of_their_own(toy):
    s = true_counts(toy.fine_edges)
    pairs = simulate_pairs(toy, s, 2**14, rng_for(0, "pairs"))
    task = Task(measurement=toy, settings=SMALL, spectrum=s, prior=s, theta=np.array([LG_J0, 3.0]))
    # a method that returns the simulation it was given: what moves is the fitted flux, in level and index
    answer = _from_weights(task, pairs, lambda counts, weights, seed: weights, 30, "given")
    np.testing.assert_allclose(answer.counts, true_counts(toy.reco_edges), rtol=0.02)
    np.testing.assert_allclose(answer.refolded, toy.fine.fold(s), rtol=0.02)
    relative = np.sqrt(np.diag(answer.covariance)) / answer.counts
    assert 0.4 < relative[0] * np.sqrt(toy.counts[0]) < 1.6 and relative[-1] > 2 * relative[0]
    assert np.linalg.matrix_rank(answer.covariance, tol=1e-3 * np.trace(answer.covariance)) <= 2
    fixed = _from_weights(replace(task, theta=np.zeros(0)), pairs, lambda counts, weights, seed: weights, 3, "given")
    assert np.abs(fixed.covariance).max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["omnifold", "flow"])
def test_learned_methods_agree_with_the_truth(toy, name):
    s = true_counts(toy.fine_edges)
    task = Task(measurement=toy, settings=SMALL, spectrum=s, prior=s * 10.0 ** (0.3 * (toy.fine_edges[:-1] - 18.4)))
    answer = METHODS[name](task)
    truth = true_counts(toy.reco_edges)
    far = np.abs(answer.counts / truth - 1)
    # the simulation starts 0.3 off in the index: a factor of 2 over the range
    assert far[:6].max() < 0.12 and far.max() < 0.6
    assert answer.covariance.shape == (10, 10) and (np.diag(answer.covariance) > 0).all()


def test_bayes_has_draws_of_the_spectrum(toy):
    answer = METHODS["bayes"](
        Task(measurement=toy, settings=SMALL, spectrum=true_counts(toy.fine_edges), prior=true_counts(toy.fine_edges))
    )
    assert answer.samples is not None and answer.samples.shape[1] == 10 and len(answer.samples) >= 400
    pull = (answer.counts - true_counts(toy.reco_edges)) / answer.samples.std(axis=0)
    assert np.abs(pull).max() < 4


def test_breaks_start_evenly_spaced_where_the_problem_has_none(toy):
    assert starting_values(toy, -1) == (0, None)
    n, start = starting_values(toy, 2)
    assert n == 2 and start is not None and start.size == 6
    np.testing.assert_allclose(start[1:4], 3.0, atol=0.2)
    np.testing.assert_allclose(np.diff(start[4:]), 1.0 / 3, atol=0.01)


def test_methods_come_in_their_order_with_folding_first():
    assert require_methods(("tikhonov", "ibu")) == ("folding", "ibu", "tikhonov")
    with pytest.raises(SettingError, match="method is 'ibuu'.*did you mean 'ibu'"):
        require_methods(("ibuu",))


def test_quick_then_set_then_flags():
    made = unfold_settings(True, {"n_toys": None, "seed": 7}, ["bayes_samples=900", "problem.detector=resolution"])
    assert (made.validate_toys, made.seed, made.bayes_samples) == (UnfoldSettings.QUICK["validate_toys"], 7, 900)
    with pytest.raises(SettingError, match="unknown key 'n_toy'.*did you mean 'n_toys'"):
        unfold_settings(False, {}, ["n_toy=900"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["unfold"], "SettingError: problem is None and --input is None"),
        (["unfold", "augr"], "SettingError: unfolding problem 'augr' is not known.*did you mean 'auger'"),
        (["unfold", "auger", "--input", "x.csv"], "SettingError: problem is 'auger' and --input is 'x.csv'"),
        (["unfold", "auger", "--resolution", "0.1"], "SettingError: --resolution and --exposure were given with problem"),
        (["unfold", "--input", "none.csv", "--resolution", "0.1"], "DataError: none.csv cannot be read: No such file"),
        (["unfold", "--input", "none.csv"], "SettingError: --input was given without --resolution"),
        (["unfold", "auger", "--methods", "ibu,omnifald"], "SettingError: method is 'omnifald'.*did you mean 'omnifold'"),
        (["unfold", "auger", "--set", "omnifold_replicas=1"], "SettingError: omnifold_replicas is 1"),
        (["unfold", "auger", "--set", "problem.detector=perfect"], "SettingError: auger cannot be built .*detector is 'perfect'"),
        (["unfold", "auger", "--seed", "-1"], "SettingError: seed is -1"),
        (["unfold", "auger", "--toys", "3"], "SettingError: n_toys is 3"),
        (["unfold", "tests.unfold.toy_problem:Negative"], "DataError: counts is -"),
        (["unfold", "tests.unfold.toy_problem:Fractions"], "DataError: counts is .*expected whole numbers"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(tmp_path, words, complaint):
    result = run(*words, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert re.fullmatch(f"sbi-phys: {complaint}.*\n", result.stderr)
    assert not (tmp_path / "run").exists()  # found before any work


def test_the_command_on_a_file_of_counts(tmp_path, toy, monkeypatch):
    sketch(monkeypatch, DRAWING)
    lines = ["lg_e_low,lg_e_high,counts"]
    lines += [f"{a},{b},{n:.0f}" for a, b, n in zip(toy.reco_edges[:-1], toy.reco_edges[1:], toy.counts, strict=True)]
    path = tmp_path / "counts.csv"
    path.write_text("\n".join(lines) + "\n")
    out = tmp_path / "run"
    words = ["--resolution", "0.115", "--methods", "ibu", "--set", "validate_toys=0", "--toys", "60", "--out", out]
    result = run("unfold", "--input", path, *words)
    assert result.exit_code == 0, result.output
    assert "iterative Bayes" in result.stdout and "report.html; table: " in result.stdout
    rows = list(csv.DictReader((out / "spectrum.csv").read_text().splitlines()))
    assert {row["method"] for row in rows} == {"folding", "ibu"} and rows[0]["published_flux"] == ""


@pytest.mark.slow
def test_auger_by_every_method(tmp_path):
    result = run("unfold", "auger", "--quick", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run" / "unfolding.json").read_text())
    assert set(found["methods"]) == set(METHODS) and not found["failed"]
    for name, row in found["methods"].items():
        flux, published = np.array(row["flux"]), np.array(found["published"]["flux"])
        assert np.abs(flux[1:10] / published[1:10] - 1).max() < 0.06, name
    away = {name: row["worst"] for name, row in found["corrections_against_published"].items()}
    assert away["folding"] < 0.025
