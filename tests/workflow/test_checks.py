"""The report of any simulator: an image with dead pixels and rows that fail, and a trace with counts; neither has a likelihood."""

import json
import re
from typing import ClassVar

import numpy as np
import pytest

from sbi_phys.priors import BoxPrior, LogUniformPrior, Observable, Parameter, ProductPrior
from sbi_phys.report.html import Verdict
from sbi_phys.simulation.protocol import RowsFailedError
from sbi_phys.workflow.checks import _check_posterior, _figure_names, _pulls
from sbi_phys.workflow.inference import log_names, news
from sbi_phys.workflow.inference_page import _own_figures
from sbi_phys.workflow.run import Run
from sbi_phys.workflow.settings import Config
from sbi_phys.workflow.stages import run_stages
from tests.report.browser import check_report, missing_browser

SMALL = {
    "run.workers": 1,
    "run.device": "cpu",
    "simulate.n": 300,
    "train.max_epochs": 2,
    "flow.n_layers": 1,
    "flow.hidden": 8,
    "embedding.hidden": 8,
    "embedding.n_features": 8,
    "infer.observation": "simulated",
    "infer.n_draws": 300,
    "calibrate.n": 0,
    "check.n": 80,
}
DEAD = [3, 40]


class Camera:
    """A spot on a camera of 8 x 8 pixels with two dead ones; some rows fail."""

    settings: ClassVar[dict] = {}
    prior = ProductPrior([LogUniformPrior([Parameter("light", 10.0, 1000.0, "p.e.")]), BoxPrior([Parameter("x0", -1.0, 1.0, "deg")])])
    parameters = prior.parameters
    observables = (Observable("camera", shape=(8, 8), unit="p.e."),)

    def simulate(self, theta, rng):
        at = np.linspace(-1.5, 1.5, 8)
        light, x0 = theta.T[:, :, None, None]
        x = light * np.exp(-2 * ((at[None, None, :] - x0) ** 2 + at[None, :, None] ** 2)) + rng.normal(size=(len(theta), 8, 8))
        x = x.reshape(len(theta), 64)
        x[:, DEAD] = 0.0
        failed = np.flatnonzero(rng.random(len(theta)) < 0.1)
        if failed.size and len(theta) > 1:
            raise RowsFailedError(x, {int(i): "too dark" for i in failed})
        return x


class Pulse:
    """A pulse in two channels, and the number of hits in bins, with figures of its own."""

    settings: ClassVar[dict] = {}
    prior = BoxPrior([Parameter("time", 20.0, 60.0, "ns"), Parameter("height", 5.0, 50.0, "mV")])
    parameters = prior.parameters
    observables = (
        Observable("adc", shape=(2, 64), unit="mV"),
        Observable("hits", 5, kind="counts", edges=(0, 1, 2, 3, 4, 5), edges_unit="m"),
    )

    def simulate(self, theta, rng):
        time, height = theta.T[:, :, None, None]
        x = height * np.exp(-0.5 * ((np.arange(64.0) - time) / 4) ** 2) + rng.normal(size=(len(theta), 2, 64))
        return np.concatenate([x.reshape(len(theta), 128), rng.poisson(theta[:, 1:] / 5, (len(theta), 5))], axis=1)

    def figures(self, theta, x_obs, *, seed, draws="posterior"):
        from sbi_phys.plotting import new_axes

        ax = new_axes(width=3, height=2)
        ax.plot(theta[:, 0], theta[:, 1], ".")
        return [(f"cloud_{draws}", "A cloud", f"Draws of the {draws}.", ax.figure)]


class Broken(Pulse):
    """As `Pulse`, with figures that raise."""

    def figures(self, theta, x_obs, *, seed):
        raise RuntimeError("no style file")


def config(name: str) -> Config:
    return Config().override(SMALL | {"simulator.spec": f"tests.workflow.test_checks:{name}"})


@pytest.fixture(scope="module")
def camera(tmp_path_factory) -> Run:
    with pytest.warns(RuntimeWarning, match="of 300 simulations failed and are left out of the training"):
        return run_stages(config("Camera"), tmp_path_factory.mktemp("runs") / "camera")


@pytest.fixture(scope="module")
def pulse(tmp_path_factory) -> Run:
    return run_stages(config("Pulse"), tmp_path_factory.mktemp("runs") / "pulse")


def page(run: Run) -> str:
    """The words of the page: without style sheet, pictures and tags."""
    text = run.path("report.html").read_text(encoding="utf-8")
    text = re.sub(r"<style>.*?</style>|data:image/png;base64,[A-Za-z0-9+/=]+", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


def pictures(run: Run) -> set[str]:
    return {p.stem for p in run.path("figures").glob("*.png")}


def test_every_block_has_its_pictures(camera, pulse):
    assert {"prior_camera", "predictive_camera", "features", "misfit", "predictive", "corner", "loss"} <= pictures(camera)
    assert {"prior_adc", "predictive_adc", "prior_hits", "predictive_hits", "cloud_prior", "cloud_posterior", "overview"} <= pictures(pulse)
    assert {name: block["kind"] for name, block in pulse.numbers("check")["blocks"].items()} == {"adc": "trace", "hits": "histogram"}
    assert camera.numbers("check")["blocks"]["camera"]["kind"] == "image"


def test_without_a_likelihood_there_is_no_word_of_refinement_or_chains(camera, pulse):
    for run in (camera, pulse):
        text = page(run).lower()
        for word in ("refine", "mcmc", "emcee [", "markov", "importance", "likelihood is", "exact posterior", "amortised network before"):
            assert word not in text.replace("the settings of stages that need a likelihood", ""), word
        assert "Observation and simulations" in page(run) and "Data and model" in page(run)
    assert not json.loads(camera.path("summary.json").read_text())["differs_from_amortised"]


def test_rows_that_fail_are_counted_and_said(camera):
    found = camera.numbers("check")
    assert found["n"] + found["n_failed"] == 80 and 1 <= found["n_failed"] < 40
    assert found["failures"] == {"too dark": found["n_failed"]}
    assert f"{found['n_failed']} of 80 predictive simulations failed" in page(camera)
    failed = camera.numbers("simulate")["n_failed"]
    assert f"{failed} of 300 simulations" in page(camera) and failed > 5
    assert "Find out why simulations fail." in page(camera)


def test_the_numbers_of_the_check_are_those_of_their_definitions(pulse):
    found, x = pulse.numbers("check"), pulse.observation
    from sbi_phys.store.store import Store

    rows = Store(pulse.path("simulations")).read()[1]
    outside = ((rows < x).all(axis=0)) | ((rows > x).all(axis=0))
    prior = found["prior_predictive"]
    assert (prior["n"], prior["n_columns"], prior["n_outside"]) == (300, 133, int(outside.sum()))
    assert prior["n_expected"] == pytest.approx(2 * 133 / 301)
    assert len(found["pulls"]["adc"]) == 128 and len(found["pulls"]["hits"]) == 5
    assert set(found["statistics"]) == {"total", "max |pull|", "chi2", "longest run", "neighbours alike"}


@pytest.mark.browser
@pytest.mark.skipif(bool(missing_browser()), reason=missing_browser() or "-")
def test_both_reports_open_in_a_browser(camera, pulse):
    for run, least in ((camera, 7), (pulse, 11)):
        found = check_report(run.path("report.html"))
        assert found.problems == []
        assert found.images >= least and found.sections >= 6


def test_figures_of_the_simulator_that_raise_are_a_caution_on_the_page(pulse):
    run = Run(pulse.folder, pulse.config)
    run.simulator = Broken()
    (verdict,) = _own_figures(run, "posterior")
    assert isinstance(verdict, Verdict) and verdict.level == "warn" and "RuntimeError: no style file" in verdict.detail
    assert _own_figures(run, "prior") == []  # without an argument `draws` it is for the posterior alone


def test_a_posterior_whose_simulations_all_fail_has_no_predictive_check(pulse):
    class Never(Pulse):
        def simulate(self, theta, rng):
            raise ValueError("diverges")

    run, numbers = Run(pulse.folder, pulse.config), {}
    run.simulator = Never()
    _check_posterior(run, numbers, pulse.observation, {})
    assert numbers["n"] == 0 and "ValueError: diverges" in numbers["skipped"] and "pvalue" not in numbers


def test_pulls_know_constant_columns_and_missing_values():
    replicas = np.column_stack([np.arange(5.0), np.full(5, 2.0), np.full(5, 2.0), np.full(5, np.nan)])
    pulls, constant = _pulls(np.array([4.0, 2.0, 3.0, 1.0]), replicas)
    np.testing.assert_allclose(pulls, [np.sqrt(2), 0.0, np.nan, np.nan])
    assert constant.tolist() == [False, False, True, False]


def test_figures_have_distinct_names():
    blocks = [Observable("a b", 1), Observable("a-b", 1), Observable("ü", 1), Observable("n", 1)]
    assert _figure_names(blocks) == {"a b": "a_b_0", "a-b": "a_b_1", "ü": "block", "n": "n"}


def test_log_uniform_parameters_are_found_in_products():
    assert log_names(Camera.prior) == ["light"]
    assert log_names(Pulse.prior) == []


@pytest.mark.parametrize(
    ("stage", "numbers", "words"),
    [
        ("simulate", {"n_simulations": 2000, "n_failed": 3}, "2000 rows, 3 failed"),
        ("simulate", {"n_simulations": 2000, "n_failed": 0}, "2000 rows"),
        ("train", {"epochs": [12], "validation_loss": [1.25]}, "12 epochs, validation loss 1.250"),
        ("infer", {"n_draws": 500}, "500 draws"),
        ("reference", {"skipped": "no exact likelihood"}, "skipped: no exact likelihood"),
        ("compare", {"final": {"c2st": 0.512}}, "final C2ST 0.512"),
        ("calibrate", {"skipped": {"lc2st": "no x_obs"}, "failed": ["sbc"], "pvalues": {"sbc": 0.01, "tarp": 0.5}}, "1 of 2 tests fail"),
        ("check", {"pvalue": 0.25, "n": 80, "n_failed": 4}, "predictive p = 0.25 from 80 replicas, 4 failed"),
    ],
)
def test_a_stage_says_what_it_found(stage, numbers, words):
    assert news(stage, numbers) == words
