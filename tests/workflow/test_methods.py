"""Likelihood and ratio beside the posterior in a run folder, their comparison, the page; and confidence sets of the run's parameters."""

import csv
import importlib
import json
import re
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from sbi_phys.core.errors import ConvergenceError
from sbi_phys.estimators.density_sampling import PosteriorDraws
from sbi_phys.plotting.posterior import PairRatios
from sbi_phys.store.store import Store
from sbi_phys.workflow.cli import app
from sbi_phys.workflow.methods import require_converged
from sbi_phys.workflow.run import Run
from sbi_phys.workflow.settings import Config
from sbi_phys.workflow.stages import DEFAULT, STAGES, outdated, run_stages
from tests.toys import LinearGaussian

TINY = {
    "simulator.spec": "tests.toys:LinearGaussian",
    "run.workers": 1,
    "run.device": "cpu",
    "simulate.n": 600,
    "train.max_epochs": 5,
    "train.batch_size": 64,
    "flow.n_layers": 0,
    "flow.hidden": 16,
    "embedding.hidden": 16,
    "infer.observation": "simulated",
    "infer.n_draws": 120,
    "infer.n_refine": 3_000,
    "reference.method": "none",
    "calibrate.n": 50,
    "calibrate.n_draws": 20,
    "check.n": 50,
    "methods.nle_layers": 0,
    "methods.n_pairs": 40,
}


def config(**changes) -> Config:
    return Config().override(TINY | {key.replace("__", "."): value for key, value in changes.items()})


def sbi_phys(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def seen() -> dict[str, PairRatios]:
    """The pairs of which the run's figure of ratios was drawn."""
    return {}


@pytest.fixture(scope="module")
def made(tmp_path_factory, seen) -> Run:
    """Posterior, likelihood and ratio in one folder."""
    folder = tmp_path_factory.mktemp("methods") / "run"
    module = importlib.import_module("sbi_phys.workflow.methods")  # the package has a stage of that name
    draw = module.ratios_figure

    def keep(pairs, **named):
        seen.update(pairs)
        return draw(pairs, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_C2ST_DRAWS", 60)  # its classifier takes seconds otherwise
        patch.setattr(module, "ratios_figure", keep)
        run_stages(config(), folder, ["infer", "infer_nle"])
        result = sbi_phys("infer", "--method", "nre", "--out", folder)
    assert result.exit_code == 0, result.stderr
    assert "posterior_nre.nc; sbi-phys report compares" in result.stdout
    return Run(folder, config())


def test_every_method_leaves_draws_with_the_numbers_they_are_judged_by(made):
    mean, covariance = LinearGaussian().posterior(made.observation)
    sd = np.sqrt(np.diag(covariance))
    for method in ("nle", "nre"):
        draws = made.read_draws(f"posterior_{method}.nc")
        assert draws.flat.shape == (120, 2)
        assert np.all(np.abs(draws.flat.mean(axis=0) - mean) < 1.0 * sd)  # 600 simulations teach little, but not nothing
        assert max(draws.notes["r_hat"]) < 1.1 and draws.notes["n_effective"] >= 120
    exact = made.read_draws("posterior_exact.nc").flat
    assert np.all(np.abs(exact.mean(axis=0) - mean) < 0.4 * sd) and np.all(np.abs(exact.std(axis=0) / sd - 1) < 0.3)


def test_they_are_compared_with_the_grid_and_ratios_with_exact_ones(made):
    found = made.numbers("methods")
    assert found["exact"] == "grid"
    for method in ("npe", "nle", "nre"):
        assert 0.3 < found[method]["c2st"] < 0.95 and found[method]["train_seconds"] > 0
        assert set(found[method]["posterior"]["t0"]) == {"median", "sd"}
    for method in ("nle", "nre"):
        assert found["ratios"][method]["rms"] < found["ratios"][method]["exact_sd"]
        assert "Reliability, 80 events" in found["ratios"][method]["words"]
    for name in ("methods", "ratios"):
        assert (made.folder / "figures" / f"{name}.png").stat().st_size > 5000


def test_the_evidence_under_the_ratios_is_the_exact_one(made, seen):
    simulator = LinearGaussian()
    theta, x = (rows[: made.config.methods.n_pairs] for rows in Store(made.path("held_out")).read())
    spread = simulator.matrix @ simulator.matrix.T + simulator.noise**2 * np.eye(2)
    evidence = -0.5 * (np.einsum("ni,ij,nj->n", x, np.linalg.inv(spread), x) + np.linalg.slogdet(2 * np.pi * spread)[1])
    exact = simulator.log_likelihood(x, theta) - evidence
    assert np.abs(seen["NRE, ratio"].exact - exact).max() < 0.01


def test_a_second_call_does_nothing_and_a_lost_file_is_made_again(tmp_path, made):
    folder = tmp_path / "copy"
    shutil.copytree(made.folder, folder)
    before = (folder / "model_nle.pt").stat().st_mtime_ns
    assert sbi_phys("infer", "--method", "nle", "--out", folder).exit_code == 0
    assert (folder / "stages" / "methods.json").read_bytes() == (made.folder / "stages" / "methods.json").read_bytes()
    (folder / "posterior_nle.nc").unlink()
    run = run_stages(config(), folder, ["infer_nle"])
    assert (folder / "model_nle.pt").stat().st_mtime_ns == before
    assert np.array_equal(run.read_draws("posterior_nle.nc").chains, made.read_draws("posterior_nle.nc").chains)
    # the file is what it was, so that nothing else has to run
    assert all(outdated(run, name) == [] for name in set(STAGES) - set(DEFAULT))


def test_the_default_row_knows_nothing_of_them(tmp_path):
    run = run_stages(config(), tmp_path / "run", ["train"])
    assert not any(run.record(name) for name in set(STAGES) - set(DEFAULT))
    assert not list(run.folder.glob("model_*.pt"))


def test_bad_convergence_is_refused():
    rng = np.random.default_rng(0)
    good = {
        "theta": rng.standard_normal((400, 2)), "log_prob": np.zeros(400), "method": "hmc", "r_hat": np.array([1.001, 1.004]),
        "n_effective": 400.0, "evaluations": 1, "pareto_k": float("nan"), "log_evidence": float("nan"), "message": "said the sampler",
    }  # fmt: skip
    assert require_converged("NLE", PosteriorDraws(**good))["n_effective"] == 400
    for change in ({"r_hat": np.array([1.0, 1.3])}, {"n_effective": 20.0}):
        with pytest.raises(ConvergenceError, match="the posterior by NLE is not reliable: split R-hat .*said the sampler"):
            require_converged("NLE", PosteriorDraws(**good | change))
    independent = require_converged("NLE", PosteriorDraws(**good | {"r_hat": np.array([np.nan, np.nan])}))
    assert np.max(independent["r_hat"]) < 1.05


def test_a_sampler_that_fails_is_one_clear_line(tmp_path, made, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(made.folder, folder)
    (folder / "posterior_nre.nc").unlink()

    def fail(self, *args, **named):
        raise ConvergenceError("the chains have not met")

    monkeypatch.setattr("sbi_phys.estimators.nre.NRE.posterior", fail)
    result = sbi_phys("infer", "--method", "nre", "--out", folder)
    assert result.exit_code == 1
    assert "ConvergenceError: the posterior by NRE was not sampled: the chains have not met; try --set methods.sampler=hmc" in result.stderr
    assert not (folder / "posterior_nre.nc").exists()  # and so it is done again


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["infer", "--method", "nle2"], "--method is 'nle2'; expected one of npe, nle, nre"),
        (["calibrate", "--method", "nle"], "--method nle was given to calibrate; expected it with train or infer"),
    ],
)
def test_a_wrong_method_is_named(tmp_path, words, complaint):
    result = sbi_phys(*words, "--simulator", "tests.toys:LinearGaussian", "--out", tmp_path / "run")
    assert result.exit_code == 1 and complaint in result.stderr


FAST = ["--n", "800", "--critical", "splines-3"]
CONSTANT = ["--n", "800", "--critical", "constant", "--json"]  # as they are for a Gaussian


def test_limits_of_a_run_cover_and_stand_beside_wilks(made):
    result = sbi_phys("limits", made.folder, "--parameter", "t1", "--statistic", "exact", "--value", "-0.5", "--open", *CONSTANT)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    matrix = LinearGaussian().matrix
    mean, covariance = np.linalg.solve(matrix, made.observation), 0.25 * np.linalg.inv(matrix.T @ matrix)
    for row, z in zip(found["levels"], (1.0, 1.645), strict=True):
        ends = mean[1] + np.array([-1, 1]) * z * np.sqrt(covariance[1, 1])
        assert np.allclose(row["wilks"]["t1"], ends, atol=0.03)  # the profile likelihood of a Gaussian: Wilks is exact
        assert np.allclose([v for v in row["set"]["t1"] if v is not None], ends, atol=0.2)
        assert abs(row["coverage"] - row["level"]) < 4 * row["coverage_error"]
        assert row["coverage_pvalue"] > 1e-3
    assert 0 < found["value"]["pvalue"] <= 1 and found["nuisances"] == "profiled"
    rows = list(csv.DictReader((made.folder / "limits.csv").read_text().splitlines()))
    assert [row["level"] for row in rows] == ["0.683", "0.9"] and float(rows[0]["coverage"]) == found["levels"][0]["coverage"]
    for name in ("limits_t1_exact", "coverage_t1_exact"):
        assert (made.folder / "figures" / f"{name}.png").stat().st_size > 5000


@pytest.mark.slow
def test_an_upper_limit_by_waldo_from_the_posterior(made):
    result = sbi_phys("limits", made.folder, "--parameter", "t0", "--kind", "upper", "--open", *FAST)
    assert result.exit_code == 0, result.stderr
    rows = json.loads((made.folder / "limits" / "t0_waldo_upper.json").read_text())["levels"]
    ends = [row["set"]["t0"] for row in rows]
    assert all(low is None for low, _ in ends) and ends[0][1] < ends[1][1]  # 68 % below 90 %
    assert all(abs(row["coverage"] - row["level"]) < 4 * row["coverage_error"] for row in rows)


@pytest.mark.slow
def test_joint_set_by_waldo_from_the_posterior(made):
    words = ["--parameter", "t0", "--parameter", "t1", "--open", "--level", "0.9"]
    result = sbi_phys("limits", made.folder, *words, *FAST)
    assert result.exit_code == 0, result.stderr
    assert "t0, t1: WALDO from the posterior, interval, 800 simulations" in result.stdout and "coverage" in result.stdout
    (row,) = json.loads((made.folder / "limits" / "t0_t1_waldo.json").read_text())["levels"]
    assert abs(row["coverage"] - 0.9) < 4 * row["coverage_error"]
    assert all(row["set"][name][0] < row["set"][name][1] for name in ("t0", "t1"))


def test_the_page_shows_what_was_run(made):
    from sbi_phys.report.html import render_report
    from sbi_phys.workflow.inference_page import method_sections

    run = Run(made.folder, made.config)
    assert method_sections(run)[0].title == "Comparison of NPE, NLE and NRE"
    render_report(made.folder / "further.html", "title", "subtitle", method_sections(run), verdicts=[], footer="")
    text = (made.folder / "further.html").read_text(encoding="utf-8")
    assert "NLE, likelihood" in text and "exact (grid)" in text


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--parameter", "t2"], "there is no parameter 't2'; expected one of t0, t1"),
        ([], "--parameter is not given; expected one of t0, t1"),
        (["--parameter", "t0", "--statistic", "waldi"], "--statistic is 'waldi'.*did you mean 'waldo'"),
        (["--parameter", "t0", "--parameter", "t1", "--kind", "upper"], "--kind is 'upper'; expected 'interval' with two parameters"),
        (["--parameter", "t0", "--physical", "low"], "t0 has no bound there"),
        (["--parameter", "t0", "--background", "3"], "--background was given with .*; expected it with limits counting"),
        (["--parameter", "t1", "--value", "9", "--open", *FAST], "SupportError: .*t1 = 9 lies beyond what was simulated"),
        (["--parameter", "t0", "--level", "1.5"], "level is 1.5"),
    ],
)
def test_what_limits_cannot_answer_is_named(made, words, complaint):
    result = sbi_phys("limits", made.folder, *words)
    assert result.exit_code == 1 and re.search(complaint, result.stderr), result.stderr


def test_a_folder_without_a_run_or_model_is_named(tmp_path, made):
    assert "has no config.toml; expected the folder of a run" in sbi_phys("limits", tmp_path, "--parameter", "t0").stderr
    folder = tmp_path / "copy"
    shutil.copytree(made.folder, folder)
    (folder / "model_nre.pt").unlink()
    result = sbi_phys("limits", folder, "--parameter", "t0", "--statistic", "nre")
    assert "sbi-phys train --method nre --out" in result.stderr


def test_more_parameters_have_differences_instead_of_a_grid(tmp_path):
    run = run_stages(config(simulator__settings={"dim": 3}), tmp_path / "run", ["infer_nle", "methods"])
    found = run.numbers("methods")
    assert found["exact"].startswith("no exact MCMC yet") and found["exact_posterior"] is None and "npe" not in found
    assert found["ratios"]["what"] == "difference of ln L" and found["ratios"]["nle"]["rms"] < found["ratios"]["nle"]["exact_sd"]
    assert not run.path("posterior_exact.nc").exists() and (run.folder / "figures" / "ratios.png").exists()


@pytest.mark.slow
def test_many_parameters_are_averaged_over_and_profiled(tmp_path):
    run = run_stages(config(simulator__settings={"dim": 4}, simulate__n=4000, train__max_epochs=20), tmp_path / "run", ["train"])
    simulator, words = LinearGaussian(dim=4), ["--parameter", "t2", "--open", "--n", "2000", "--json"]
    mean = np.linalg.solve(simulator.matrix, run.observation)
    sd = 0.5 * np.sqrt(np.linalg.inv(simulator.matrix.T @ simulator.matrix)[2, 2])
    for statistic in ("waldo", "exact"):
        result = sbi_phys("limits", run.folder, "--statistic", statistic, *words)
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["nuisances"] == "averaged over their prior"
        assert all(abs(row["coverage"] - row["level"]) < 4 * row["coverage_error"] for row in found["levels"])
    for row, z in zip(found["levels"], (1.0, 1.645), strict=True):  # the profile likelihood of a Gaussian: Wilks is exact
        np.testing.assert_allclose(row["wilks"]["t2"], mean[2] + np.array([-z, z]) * sd, atol=0.05 * sd)
