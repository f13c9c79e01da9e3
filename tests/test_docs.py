"""The pages of docs/ and CONTRIBUTING.md: their code runs, results agree with exact answers, and commands, names, links and paths exist."""

import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import sbi_phys as sp
from benchmarks.campaigns import PARTS
from benchmarks.scheduler_load import tables
from benchmarks.suite.table import fill, table
from sbi_phys.core.rng import rng_for
from sbi_phys.simulation.clusters import ClusterFile
from sbi_phys.workflow.cli import app
from tests import oracles
from tests.toys import LinearGaussian, rejection_rate

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in FILES}


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def run(page: str, namespace: dict[str, Any], *, replace: tuple[tuple[str, str], ...] = (), part: slice = slice(None)) -> dict[str, Any]:
    """Execute the Python blocks of a page one after another, with the given replacements, each of which must occur."""
    code = "\n".join(blocks(page, "python")[part])
    for old, new in replace:
        assert old in code, old
        code = code.replace(old, new)
    exec(compile(code, page, "exec"), namespace)
    return namespace


def test_every_page_with_code_is_run():
    assert {page for page in PAGES if blocks(page, "python")} == {
        "README.md",  # tests/test_readme.py
        "own_simulator.md",  # tests/journeys/test_own_simulator.py
        *("calibration.md", "comparison.md", "confidence.md", "data.md", "likelihoods.md", "priors.md", "reports.md", "unfolding.md"),
        "CONTRIBUTING.md",
    }


def test_priors_and_networks_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_physics.py").write_text(blocks("priors.md", "python")[0])
    quick = (("seed=0)", "seed=0, config=sp.TrainConfig(max_epochs=3))"), ("2_000", "600"))
    found = run("priors.md", {}, replace=quick, part=slice(1, 2))
    np.testing.assert_array_equal(found["again"].sample(found["x"][0], 5), found["npe"].sample(found["x"][0], 5))
    assert found["again"].prior == found["prior"]
    found = run("priors.md", found, replace=quick, part=slice(2, 3))
    assert found["found"].theta.shape == (500, 1) and found["found"].n_effective >= 500


def test_data_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = "config=sp.TrainConfig(max_epochs=2), seed=0"
    found = run(
        "data.md",
        {},
        replace=(
            ("2_000", "300"),
            ("simulator=simulator, seed=0", f"simulator=simulator, {config}"),
            ("n_columns=1), seed=0", f"n_columns=1), {config}"),
        ),
    )
    assert found["blocks"]["image"].shape == (300, 4, 5)
    assert 0.1 < np.isnan(found["blocks"]["image"]).mean() < 0.3
    assert found["npe"].sample(found["x_obs"], 5).shape == (5, 1)


def calibration_inputs() -> dict[str, Any]:
    """Exact posteriors of 200 simulations under the names that docs/calibration.md uses."""
    names = {"names": ["a", "b"], "np": np, "sp": sp}
    for suffix, seed in (("", 0), ("_new", 1)):
        pairs = oracles.ORACLES["Gaussian, d = 2"](rng_for(seed), n=200, n_draws=50)
        shift = np.array([0.0, 19.0])
        names |= {f"theta{suffix}": 0.2 * pairs.theta + shift, f"draws{suffix}": 0.2 * pairs.draws + shift, f"x{suffix}": pairs.x}
        log_q = ("log_q_theta", "log_q_draws") if not suffix else ("log_q_new", "log_q_draws_new")
        names |= dict(zip(log_q, (pairs.log_prob_theta, pairs.log_prob_draws), strict=True))
    return names


def test_calibration_repairs():
    found = run("calibration.md", calibration_inputs(), part=slice(0, 2))
    assert found["draws_new"].shape == (200, 50, 2)
    # the posterior is exact: 90 % regions hold 0.9 of the true values, and no widening is needed
    inside = found["regions"].contains(found["log_q_new"], found["log_q_draws_new"], found["x_new"])
    assert abs(np.mean(inside) - 0.9) < 4 * np.sqrt(0.09 * 2 / 200)
    assert abs(found["width"].factor - 1) < 0.2


def test_calibration_of_the_observation_and_in_one_call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    simulator = LinearGaussian(dim=2)
    theta = simulator.prior.sample(300, rng_for(0))
    x = simulator.simulate(theta, rng_for(1))
    npe = sp.NPE(simulator.prior, device="cpu", config=sp.TrainConfig(max_epochs=2)).fit(theta, x)
    namespace = {"npe": npe, "simulator": simulator, "x_prior": x, "x_rep": x, "x_obs": x[0], "names": ["x_0", "x_1"], "sp": sp}
    replace = (("range(30)", "range(2)"), ("n=1000", "n=50"))
    found = run("calibration.md", namespace, replace=replace, part=slice(2, 4))["found"]
    assert (tmp_path / "calibration.json").stat().st_size > 1000
    assert len(found.results) >= 8 and found.verdict in capsys.readouterr().out


def test_reports_figures_of_a_simulator():
    simulator = run("reports.md", {})["Decay"]()
    sp.check_simulator(simulator, n_simulations=10)
    theta = simulator.prior.sample(100, rng_for(0))
    x_obs = simulator.simulate(np.array([[2.0]]), rng_for(1))[0]
    for draws in ("posterior", "prior"):
        ((name, _, caption, figure),) = simulator.figures(theta, x_obs, seed=0, draws=draws)
        assert name == f"survival_{draws}" and draws in caption
        low, high = np.quantile(np.exp(-x_obs.max() / theta[:, 0]), [0.16, 0.84])
        ends = figure.axes[0].collections[0].get_paths()[0].vertices
        assert {round(float(y), 6) for x, y in ends if x == x_obs.max()} >= {round(low, 6), round(high, 6)}


class ExactPosterior:
    """The posterior of the example with sbi, N(0.8 x, 0.2), behind the methods that the example calls."""

    def __init__(self, prior):
        pass

    def append_simulations(self, theta, x):
        return self

    def train(self):
        return self

    def build_posterior(self):
        return self

    def sample_batched(self, shape, x, show_progress_bars):
        import torch

        return 0.8 * x + np.sqrt(0.2) * torch.randn(*shape, *x.shape)


def test_calibration_of_other_tools(monkeypatch, capsys):
    sbi, inference = ModuleType("sbi"), ModuleType("sbi.inference")
    inference.NPE = ExactPosterior  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sbi", sbi)
    monkeypatch.setitem(sys.modules, "sbi.inference", inference)
    found = run("calibration.md", {}, replace=(("prior.sample((500,))", "prior.sample((200,))"),), part=slice(4, 5))
    assert found["found"].passed and found["draws"].shape == (200, 200, 2)


def test_calibration_of_arrays_from_elsewhere():
    given = calibration_inputs()
    draws = given["draws"]
    entries = {name: draws[..., [i]] for i, name in enumerate(given["names"])}
    given |= {"workflow": SimpleNamespace(sample=lambda conditions, num_samples: entries), "d": 2, "thin": 2}
    given |= {"chains": np.repeat(draws[:, None], 2, axis=2)}
    found = run(
        "calibration.md",
        given,
        replace=(("sp.calibrate(inference_data, (theta, x), names=names)", "callable(sp.calibrate)"),),
        part=slice(5, 6),
    )
    np.testing.assert_array_equal(found["draws"], draws)


def test_unfolding():
    found = run("unfolding.md", {})["found"]
    assert found.counts.shape == (24,) and found.covariance.shape == (24, 24)


SHORT = (
    *(("20_000", "1_500"), ("2_000", "500"), ("1_000", "250"), ("(200, 1)", "(40, 1)"), ("75 *", "15 *")),
    *(("seed=0).fit", "seed=0, config=SHORT).fit"), ('"log").fit', '"log", flow=AFFINE, config=SHORT).fit')),
)


def test_likelihoods(capsys):
    settings = {"SHORT": sp.TrainConfig(max_epochs=4), "AFFINE": sp.FlowConfig(kind="affine", n_layers=1, hidden=16)}
    found = run("likelihoods.md", dict(settings), replace=SHORT)
    printed = capsys.readouterr().out
    for words in ("draws by importance", "Mean ratio, 500 numerator", "Reliability, 1000 events", "Isotonic calibration"):
        assert words in printed
    # the number of events, with exposure 30, doubles the information: Gamma posterior of shape 2 n and rate sum(t) + 30
    n, total = len(found["events"]), found["events"].sum()
    mean, sd = 2 * n / (total + 30), np.sqrt(2 * n) / (total + 30)
    assert abs(found["draws"].theta.mean() - mean) < 3 * sd


def test_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = (("simulate(4000,", "simulate(1600,"), ("sizes=[250, 500, 1000, 2000]", "sizes=[150, 300, 600]"))
    quick = (("hidden=16))", "hidden=16), config=SHORT)"), ("sp.NPE(prior)", "sp.NPE(prior, flow=AFFINE, config=LONG)"))
    settings = {
        "SHORT": sp.TrainConfig(max_epochs=3),
        "LONG": sp.TrainConfig(max_epochs=40),
        "AFFINE": sp.FlowConfig(kind="affine", n_layers=1, hidden=16),
    }
    quick = (*short, *quick, ("sp.NPE(prior, seed=seed)", "sp.NPE(prior, seed=seed, flow=AFFINE, config=SHORT)"))
    found = run("comparison.md", settings, replace=quick)
    printed = capsys.readouterr().out
    for words in ("Log score of 1000 held-out simulations", "Would more simulations help?", "largest shift", r"\label{tab:networks}"):
        assert words in printed
    entropy = 0.5 * np.log(np.pi * np.e)
    assert (found["found"].score < -entropy + 4 * found["found"].score_err).all()
    # medians 0.1 and 1.2, variance 1/2 each
    assert abs(found["shifts"].shift[1, 0, 0] - 1.1) < 0.25
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"curve", "shifts.csv", "crab.nc", "crab.pdf"}


def test_confidence(capsys):
    sets = run("confidence.md", {})["sets"]
    printed = capsys.readouterr().out
    assert "90 % interval on mu" in printed and "expected 90 % upper limit on mu without signal" in printed
    (low,), (high,) = (getattr(sets.interval(np.array([[145, 70]])), side) for side in ("low", "high"))
    # mu_hat = 5 with a standard error of sqrt(145 + 70) / 15 = 0.98
    assert abs(low - (5 - 1.645 * 0.98)) < 0.35 and abs(high - (5 + 1.645 * 0.98)) < 0.35


def test_contributing_calibration_test():
    """The example of a power test, for SBC; tests/estimators/test_recipe.py runs the example of an estimator."""
    pvalue = {"ORACLES": oracles.ORACLES, "WRONG": oracles.WRONG, "rejection_rate": rejection_rate, "my_test": my_test}
    replace = (("n=500", "n=200"), ("100, seed=1", "10, seed=1"))
    found = run("CONTRIBUTING.md", pvalue, replace=replace, part=slice(1, 2))  # asserts the power
    exact = oracles.ORACLES["Gaussian, d = 2"](rng_for(3), n=200, n_draws=100, **oracles.WRONG["exact"])
    assert found["pvalue"](rng_for(3), 3) < 0.01 < my_test(exact.theta, exact.draws, seed=3).pvalue


def my_test(theta, draws, *, seed=0):
    return sp.calibration.sbc(theta, draws, seed=seed)


def commands() -> list[list[str]]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "sbi-phys"]


def test_every_command_and_option_exists():
    assert len(commands()) >= 20
    for words in commands():
        path = (
            words[1:3] if words[1] in ("store", "limits") and words[2] in ("counting", "info", "verify", "merge", "import") else words[1:2]
        )
        result = CliRunner().invoke(app, [*path, "--help"])
        assert result.exit_code == 0, words
        assert all(option in result.stdout for option in words[2:] if option.startswith("--")), words


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package_exist(page):
    for name in re.findall(r"\bsp\.((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)", PAGES[page]):
        value: Any = sp
        for part in name.split("."):
            value = getattr(value, part)
    if page == "confidence.md":
        import sbi_phys.confidence as confidence

        for name in re.findall(r"`([A-Za-z_0-9]+)\(", PAGES[page]):
            assert hasattr(confidence, name) or hasattr(confidence.Fit, name) or hasattr(confidence.Neyman, name), name


WRITTEN_BY_A_RUN = {"calibration.json", "summary.json", "spectrum.csv", "unfolding.json", "limits.json", "limits.csv", "counts.csv"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_links_and_paths_exist(path):
    text = re.sub(r"^ *```.*?^ *```", "", PAGES[path.name], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert link.startswith("https://") or link == "docs/images/demo.png" or (path.parent / link).exists(), link
    tracked = {p.name for folder in ("sbi_phys", "simulators", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.*")}
    for name in re.findall(r"`(?:python )?([\w.-]*(?:/[\w.-]*)*)(?: --[^`]*)?`", text):
        if re.match(r"(sbi_phys|simulators|tests|notebooks|benchmarks|scripts|docs)/", name):
            assert (ROOT / name).exists(), name
        elif name.endswith((".py", ".json", ".csv", ".toml", ".md")) and "/" not in name and name not in WRITTEN_BY_A_RUN:
            assert name in tracked or (ROOT / name).exists(), name


def test_guides_are_linked():
    for page in ("calibration.md", "comparison.md", "confidence.md", "likelihoods.md", "unfolding.md", "scaling.md"):
        assert page in PAGES["README.md"] and page in PAGES["map.md"], page


def test_scaling_cluster_file():
    (text,) = blocks("scaling.md", "toml")
    assert ClusterFile(**tomllib.loads(text)).jobs == 200


def test_scaling_options_exist():
    source = "".join(p.read_text(encoding="utf-8") for p in [*ROOT.glob("sbi_phys/workflow/cli*.py"), *ROOT.glob("benchmarks/*.py")])
    named = set(re.findall(r"--(?:scheduler|cluster|shards|watch|page|workers|out)\b", PAGES["scaling.md"]))
    assert len(named) == 7
    assert all(f'"{option}"' in source or f"{option[2:]}: " in source for option in named)


def test_scaling_tables_are_written_between_their_marks(tmp_path, capsys):
    page, guide = tmp_path / "page.md", PAGES["scaling.md"]
    page.write_text(guide, encoding="utf-8")
    row = {"name": "killed workers: kills", "value": 8.0, "asked": ">= 3", "met": False}
    fill(page, "campaigns", table([row]))
    fill(page, "campaigns", table([row]))
    text = page.read_text(encoding="utf-8")
    assert text.count("| killed workers: kills | 8 | >= 3 **missed** |") == 1
    marked = r"(?s)<!-- campaigns: begin.*campaigns: end -->"
    assert re.sub(marked, "", text) == re.sub(marked, "", guide)
    assert capsys.readouterr().out.count("killed workers") == 2


def test_scaling_tables_hold_what_was_measured():
    text = tables({"folder of 9 shards: s to list": 0.5, "Dask: ms a shard, two workers": 4.25, "Dask: shards": 9.0})
    assert "| 9 shards: s to list | 0.5 |" in text
    assert "| Dask | 9 | 4.25 |" in text
    assert set(PARTS) == {"kills", "parents", "disk", "failures", "batches", "dask", "pool"}
