"""The whole row of stages on a simulator whose posterior is known: right, resumable, and refusing what does not belong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, RunFolderError, SettingError, SimulatorMismatchError
from sbi_phys.estimators.base import load
from sbi_phys.simulation.inspection import Inspection
from sbi_phys.store.store import Store
from sbi_phys.workflow.inference_page import seconds, verdicts
from sbi_phys.workflow.run import Run, null_safe
from sbi_phys.workflow.settings import Config
from sbi_phys.workflow.stages import DEFAULT, ConcurrentStages, run_stages
from tests.report.browser import check_report, missing_browser
from tests.toys import LinearGaussian

ROOT = Path(__file__).parents[2]
TINY = {
    "simulator.spec": "tests.toys:LinearGaussian",
    "run.workers": 1,
    "run.device": "cpu",
    "simulate.n": 600,
    "simulate.shard_size": 300,
    "train.max_epochs": 6,
    "train.batch_size": 64,
    "flow.n_layers": 1,
    "flow.hidden": 16,
    "embedding.hidden": 16,
    "infer.observation": "simulated",
    "infer.n_draws": 1000,
    "infer.n_refine": 20_000,
    "reference.n_walkers": 24,
    "reference.n_draws": 1000,
    "calibrate.n": 50,
    "calibrate.n_draws": 50,
    "check.n": 200,
}
NEEDED = {
    "posterior",
    "reference",
    "c2st_amortised",
    "c2st_final",
    "importance_ess_fraction",
    "predictive_pvalue",
    "coverage",
    "sbc_pvalues",
    "seconds",
    "n_simulations",
    "versions",
}


def tiny(**changes) -> Config:
    return Config().override(TINY | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    return run_stages(tiny(), tmp_path_factory.mktemp("runs") / "whole")


def test_the_answer_is_the_exact_posterior(whole):
    simulator = LinearGaussian()
    mean, covariance = simulator.posterior(whole.observation)
    sd = np.sqrt(np.diag(covariance))
    for file in ("posterior.nc", "reference.nc"):
        theta = whole.read_draws(file).flat
        assert theta.shape == (1000, 2)
        assert np.all(np.abs(theta.mean(axis=0) - mean) < 0.15 * sd)
        assert np.all(np.abs(theta.std(axis=0) / sd - 1) < 0.1)
    found = json.loads((whole.folder / "summary.json").read_text())
    # the evidence of a linear Gaussian: x ~ N(0, A A^T + noise^2 I)
    spread = simulator.matrix @ simulator.matrix.T + simulator.noise**2 * np.eye(2)
    exact = -0.5 * (whole.observation @ np.linalg.solve(spread, whole.observation) + np.linalg.slogdet(2 * np.pi * spread)[1])
    assert abs(found["log_evidence"] - exact) < 5 * max(found["log_evidence_err"], 0.01)
    assert found["c2st_final"] < 0.56 and found["mcmc"]["converged"] is True
    assert found["truth"] == dict(zip(["t0", "t1"], whole.truth, strict=True))


def test_summary_has_what_others_rely_on(whole):
    found = json.loads((whole.folder / "summary.json").read_text())
    assert set(found) >= NEEDED
    for name in ("posterior", "reference"):
        assert set(found[name]["t0"]) == {"mean", "sd", "q05", "q16", "q50", "q84", "q95"}
    assert set(found["coverage"]) >= {"level", "observed"}
    assert found["n_simulations"] == 600
    assert set(found["seconds"]) == {*DEFAULT, "total"} - {"report"}
    assert 0 < found["predictive_pvalue"] <= 1 and 0 < found["importance_ess_fraction"] <= 1


def test_the_observations_distance_is_that_of_the_networks_features(whole):
    npe = load(whole.path("model.pt"), device="cpu")
    features, observed = npe.embed(Store(whole.path("simulations")).read()[1]), npe.embed(whole.observation)
    first, second = np.array_split(features, 2)
    unit, away = ((x - first.mean(axis=0)) / first.std(axis=0) for x in (first, np.vstack([observed, second])))
    # the least coefficients a with a . rows = x have a norm of distance / sqrt(number of rows)
    distances = np.sqrt(len(unit) * (np.linalg.lstsq(unit.T, away.T, rcond=1e-6)[0] ** 2).sum(axis=0))
    found = json.loads(whole.path("stages", "check.json").read_text())["numbers"]
    assert found["distance"] == pytest.approx(distances[0], rel=1e-3)
    assert found["distance_quantile"] == pytest.approx((distances[1:] < distances[0]).mean(), abs=0.005)


def test_every_file_is_there(whole):
    for name in ("config.toml", "model.pt", "calibration.json", "report.html", "posterior.csv", *(f"stages/{s}.json" for s in DEFAULT)):
        assert (whole.folder / name).stat().st_size > 0, name
    pictures = {p.stem for p in whole.folder.glob("figures/*.png")}
    assert pictures >= {"corner", "loss", "calibration", "misfit", "predictive", "weights"}
    assert pictures == {p.stem for p in whole.folder.glob("figures/*.pdf")}
    assert not list(whole.folder.rglob("*.tmp*"))
    assert Config.read(whole.folder / "config.toml") == whole.config


def files_of(folder) -> dict[str, int]:
    """Time of the last change of every file but the lock."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def copy_of(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole.folder, tmp_path / "copy"))


def stages_run_again(folder, until=("report",), **changes) -> list[str]:
    """Stages that run for these settings, by their records; `say` names the same ones."""
    before, said = files_of(folder), []
    network, observation = changes.pop("network", ""), changes.pop("observation_name", "")
    run = run_stages(tiny(**changes), folder, until, network=network, observation_name=observation, say=said.append)
    after = files_of(folder)
    again = [
        name
        for name in DEFAULT
        if (p := str(run.path("stages", f"{name}.json").relative_to(folder))) in after and after[p] != before.get(p)
    ]
    assert {line.split(" runs again: ")[0] for line in said} <= set(again)
    stages_run_again.said = said
    return again


def test_a_second_run_does_nothing(whole):
    before = files_of(whole.folder)
    run_stages(tiny(run__workers=2), whole.folder)  # the number of workers is no part of what a run means
    assert files_of(whole.folder) == before


@pytest.mark.parametrize(
    ("until", "changes", "again", "words"),
    [
        ("report", {"run__title": "Another"}, ["report"], "run.title was"),
        ("report", {"check__n": 150}, ["check", "report"], "check.n was 200 and is 150"),
        ("report", {"infer__n_refine": 15_000}, ["refine", "compare", "check", "report"], "infer.n_refine was 20000 and is 15000"),
        ("calibrate", {"calibrate__n_draws": 60}, ["calibrate"], "calibrate.n_draws was 50 and is 60"),
        ("compare", {"reference__n_draws": 900}, ["reference", "compare"], "reference.n_draws was 1000 and is 900"),
        ("refine", {"infer__observation": "simulated:3"}, ["infer", "rounds", "refine"], "observation was simulated and is simulated:3"),
        ("refine", {"train__max_epochs": 5}, ["train", "infer", "rounds", "refine"], "train.max_epochs was 6 and is 5"),
        ("train", {"simulate__n": 700}, ["simulate", "train"], "simulate.n was 600 and is 700"),
    ],
)  # fmt: skip
def test_what_hangs_on_a_changed_setting_is_made_again_and_nothing_else(tmp_path, whole, until, changes, again, words):
    folder = copy_of(whole, tmp_path)
    assert stages_run_again(folder, (until,), **changes) == again
    assert any(words in line for line in stages_run_again.said), stages_run_again.said
    assert stages_run_again(folder, (until,), **changes) == []
    if "simulate__n" not in changes:
        assert {p.name for p in (folder / "simulations").iterdir()} == {p.name for p in (whole.folder / "simulations").iterdir()}


def test_an_edited_observation_file_is_another_observation(tmp_path, whole):
    folder, file = copy_of(whole, tmp_path), tmp_path / "crab.csv"
    file.write_text("0.5,-0.2")
    where = {"infer__observation": str(file), "reference__method": "none", "calibrate__n": 0}
    first = run_stages(tiny(**where), folder, ["refine"]).read_draws("posterior.nc").flat
    assert not (folder / "report.html").exists()  # it showed the former observation
    file.write_text("0.5, -0.2\n\n")  # the same numbers
    assert stages_run_again(folder, ("refine",), **where) == []
    file.write_text("0.9,-0.2")
    assert stages_run_again(folder, ("refine",), **where) == ["infer", "rounds", "refine"]
    assert all(f"the observation {file} has other values than before" in line for line in stages_run_again.said)
    second = Run(folder, tiny(**where)).read_draws("posterior.nc").flat
    exact = [LinearGaussian().posterior(np.array([value, -0.2]))[0] for value in (0.5, 0.9)]
    np.testing.assert_allclose(second.mean(axis=0) - first.mean(axis=0), exact[1] - exact[0], atol=0.1)


def test_a_replaced_or_damaged_file_is_made_again(tmp_path, whole):
    folder = copy_of(whole, tmp_path)
    shutil.copy(folder / "posterior_amortised.nc", folder / "posterior.nc")
    assert stages_run_again(folder, ("refine",)) == ["refine"]
    assert "refine runs again: posterior.nc is not as it was written" in stages_run_again.said
    assert np.array_equal(Run(folder, tiny()).read_draws("posterior.nc").chains, whole.read_draws("posterior.nc").chains)


def test_simulations_of_other_settings_are_refused_then_kept_aside(tmp_path, whole):
    folder = copy_of(whole, tmp_path)
    before = files_of(folder)
    with pytest.raises(RunFolderError, match="run.seed was 0 and is 5. Expected the same; --new-simulations keeps the old ones"):
        run_stages(tiny(run__seed=5), folder, ["train"])
    assert files_of(folder) == before and Config.read(folder / "config.toml").run.seed == 0
    run = run_stages(tiny(run__seed=5), folder, ["simulate"], new_simulations=True)
    assert Store(folder / "simulations").seed == run.seed("simulate")
    assert Store(folder / "simulations-old-1").seed == whole.seed("simulate") and (folder / "held_out-old-1").is_dir()


def test_a_named_network_and_a_named_observation_use_the_same_simulations(tmp_path, whole):
    folder, file = copy_of(whole, tmp_path), tmp_path / "crab.csv"
    file.write_text("0.5,-0.2")
    before = files_of(folder)
    named = {"networks": {"half": {"estimator": {"n_simulations": 300}}}, "observations": {"crab": str(file)}}
    run = run_stages(tiny(**named), folder, ["refine"], observation_name="crab")
    assert run.path("posterior.nc") == folder / "observations" / "crab" / "posterior.nc" and run.path("posterior.nc").is_file()
    other = run_stages(tiny(**named), folder, ["refine"], network="half", observation_name="crab")
    assert other.path("posterior.nc") == folder / "networks" / "half" / "observations" / "crab" / "posterior.nc"
    after = files_of(folder)
    assert {name for name in before if after.get(name) != before[name]} == {"config.toml"}
    exact, covariance = LinearGaussian().posterior(np.array([0.5, -0.2]))
    for found in (run, other):
        assert np.all(np.abs(found.read_draws("posterior.nc").flat.mean(axis=0) - exact) < 0.15 * np.sqrt(np.diag(covariance)))
    assert stages_run_again(folder, ("refine",), network="half", observation_name="crab", **named) == []
    # more simulations: the network on the first 300 rows is what it was
    assert stages_run_again(folder, ("train",), simulate__n=1200, network="half", **named) == ["simulate"]


def test_a_lost_file_is_made_again_and_nothing_else_if_it_is_the_same(tmp_path, whole):
    folder = copy_of(whole, tmp_path)
    (folder / "posterior.nc").unlink()
    assert stages_run_again(folder) == ["refine"]
    assert np.array_equal(Run(folder, tiny()).read_draws("posterior.nc").chains, whole.read_draws("posterior.nc").chains)


def test_the_reference_runs_beside_the_rounds_and_is_the_same(tmp_path, whole):
    folder = copy_of(whole, tmp_path)
    for name in ("rounds", "reference"):
        (folder / "stages" / f"{name}.json").unlink()
    (folder / "reference.nc").unlink()
    run = run_stages(tiny(run__workers=2), folder, ["compare"])
    assert np.array_equal(run.read_draws("reference.nc").chains, whole.read_draws("reference.nc").chains)
    assert run.numbers("compare")["final"] == whole.numbers("compare")["final"]
    assert run.record("reference")["waited"] >= 0
    assert seconds(run)["total"] < sum(v for k, v in seconds(run).items() if k != "total") + run.record("reference")["waited"]


def test_a_stage_that_dies_beside_is_an_error_and_nothing_is_left_running(tmp_path, whole):
    run = Run(tmp_path / "a", tiny(run__workers=2))
    with pytest.raises(RunFolderError, match="expected an empty folder"), ConcurrentStages(run) as beside:
        run.folder.mkdir()
        (run.folder / "foreign.txt").write_text("x")
        beside.begin("reference")
        beside.begin("reference")  # it is at work already
        assert "reference" in beside
        beside.wait("reference")
    with ConcurrentStages(Run(tmp_path / "b", tiny(run__workers=1))) as alone:
        alone.begin("reference")  # no core for it
        assert "reference" not in alone


def test_killed_in_training_it_ends_like_an_undisturbed_run(tmp_path, whole):
    folder = tmp_path / "killed"
    toml = tmp_path / "tiny.toml"
    toml.write_text(tiny().to_toml())
    words = [sys.executable, "-m", "sbi_phys", "train", str(toml), "--out", str(folder)]

    def kill_in_training() -> None:
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            end = time.monotonic() + 60
            while not (folder / "training").is_dir() or not os.listdir(folder / "training"):
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()

    kill_in_training()
    assert not (folder / "stages" / "train.json").exists()
    run = run_stages(tiny(), folder, ["refine"])
    for stage in ("simulate", "train", "infer", "refine"):  # the later ones see nothing of the training but through these
        assert null_safe(run.numbers(stage)) == null_safe(whole.numbers(stage)), stage
    assert np.array_equal(run.read_draws("posterior.nc").flat, whole.read_draws("posterior.nc").flat)


def test_checkpoints_of_other_settings_are_removed_before_the_training(tmp_path, whole):
    folder = tmp_path / "other"
    run_stages(tiny(train__learning_rate=1e-3), folder, ["train"])
    (folder / "stages" / "train.json").rename(folder / "stages" / "train.begun.json")  # as if it had been killed at the end
    assert os.listdir(folder / "training")
    run = run_stages(tiny(), folder, ["train"])
    assert null_safe(run.numbers("train")) == null_safe(whole.numbers("train"))


@pytest.mark.browser
@pytest.mark.skipif(bool(missing_browser()), reason=missing_browser())
def test_the_report_opens_in_a_browser(whole):
    found = check_report(whole.folder / "report.html")
    assert found.problems == []
    assert found.sections >= 5 and found.images >= 6


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"simulator__spec": "tests.toys:LinearGausian"}, SettingError, "did you mean 'LinearGaussian'"),
        ({"simulator__spec": ""}, SettingError, "simulator.spec is empty"),
        ({"simulator__settings": {"dmi": 3}}, SettingError, "did you mean 'dim'"),
        ({"run__device": "cuda:99"}, SettingError, "device is 'cuda:99'"),
        ({"infer__observation": "observed"}, SettingError, r"has no observed\(\)"),
        ({"infer__observation": "absent.npy"}, DataError, "'absent.npy' cannot be read"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tmp_path, changes, error, complaint):
    with pytest.raises(error, match=complaint):
        run_stages(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_stage_is_named(tmp_path):
    with pytest.raises(SettingError, match="did you mean 'train'"):
        run_stages(tiny(), tmp_path / "run", ["trian"])


class Liar(LinearGaussian):
    """LinearGaussian whose likelihood is that of other, very precise data: no network can have learned it."""

    def log_likelihood(self, x, theta):
        return 1e6 * super().log_likelihood(x, theta)


def test_a_refinement_that_leaves_nothing_keeps_the_network_and_says_so(tmp_path, monkeypatch):
    config = tiny(simulator__spec="tests.workflow.test_stages:Liar", infer__n_refine=500, reference__method="none", calibrate__n=0)
    with pytest.raises(SimulatorMismatchError, match="Liar cannot be used: draws do not belong to log_likelihood"):
        run_stages(config, tmp_path / "run", ["simulate"])
    monkeypatch.setattr("sbi_phys.workflow.inference.quick_check", lambda *_, **__: Inspection("Liar", 0, ()))
    run = run_stages(config, tmp_path / "run", ["refine"])
    numbers = run.numbers("refine")
    assert numbers["ess"] < 100 and numbers["refined"] is False and numbers["log_evidence"] is None
    assert len(np.unique(run.read_draws("posterior.nc").flat, axis=0)) == 1000


def judged(**changes) -> list[str]:
    found = {
        "c2st_final": 0.51,
        "c2st_amortised": 0.7,
        "max_median_shift_sd": 0.02,
        "mcmc": {"converged": True},
        "refined": True,
        "importance_ess_fraction": 0.4,
        "importance_ess": 40_000.0,
        "importance_pareto_k": 0.3,
        "calibration": {"adjusted": {"sbc": 0.5, "tarp": 0.7}, "passed": True, "verdict": "fine"},
        "predictive_pvalue": 0.4,
        "predictive_statistic": "deviance",
        "misspecification": {"quantile": 0.5, "pvalue": 0.4},
        "rounds": {},
    }
    return [verdict.level for verdict in verdicts(found | changes) if verdict.level != "next"]


@pytest.mark.parametrize(
    ("changes", "levels"),
    [
        ({}, ["good"] * 5),
        ({"c2st_final": 0.6}, ["bad", *["good"] * 4]),
        ({"max_median_shift_sd": 0.2}, ["bad", *["good"] * 4]),
        ({"mcmc": {"converged": False}}, ["warn", *["good"] * 4]),
        ({"c2st_final": None, "max_median_shift_sd": None}, ["warn", *["good"] * 4]),
        ({"c2st_final": None}, ["bad", *["good"] * 4]),
        ({"importance_pareto_k": 0.9}, ["good", "warn", *["good"] * 3]),
        ({"refined": False}, ["good", "bad", *["good"] * 3]),
        ({"importance_ess_fraction": None}, ["good", "warn", *["good"] * 3]),
        (
            {"calibration": {"adjusted": {"sbc": 1e-5}, "failed": ["sbc"], "passed": False, "verdict": "no"}},
            ["good", "good", "bad", "good", "good"],
        ),
        (
            {"calibration": {"adjusted": {"sbc": 0.01}, "failed": ["sbc"], "passed": False, "verdict": "no"}},
            ["good", "good", "warn", "good", "good"],
        ),
        (
            {"calibration": {"adjusted": {"sbc": 0.5, "lc2st": 1e-9}, "failed": ["lc2st"], "passed": False, "verdict": "no"}},
            ["good", "good", "warn", "good", "good"],
        ),
        ({"calibration": {"adjusted": None}}, ["good", "good", "warn", "good", "good"]),
        ({"predictive_pvalue": 1e-4}, ["good", "good", "good", "bad", "good"]),
        ({"misspecification": {"quantile": 0.97, "pvalue": 0.4}}, ["good", "good", "good", "good", "warn"]),
        ({"misspecification": {"quantile": 1.0, "pvalue": None}}, ["good", "good", "good", "good", "bad"]),
        ({"misspecification": {"quantile": 0.5, "pvalue": 0.003}}, ["good", "good", "good", "good", "bad"]),
        ({"misspecification": {"quantile": None, "pvalue": None}}, ["good", "good", "good", "good", "warn"]),
    ],
)
def test_verdicts_say_what_the_numbers_mean(changes, levels):
    assert judged(**changes) == levels
