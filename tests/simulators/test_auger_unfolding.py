import numpy as np
import pytest

from simulators import auger_unfolding as module
from simulators.auger_unfolding import Auger2020, trigger_bias, trigger_efficiency
from simulators.detector import AUGER_SD, auger_flux
from simulators.errors import SimulatorSettingError


def test_the_published_correction_is_flux_over_raw_counts():
    a = Auger2020()
    from_flux = a.published["flux"] * a.exposure * np.diff(10.0**a.reco_edges) / a.counts
    np.testing.assert_allclose(from_flux, a.published["correction"], atol=6e-4)  # rounded to three digits
    assert a.counts.sum() == 215030


def test_true_bins_reach_beyond_the_measured_ones():
    a = Auger2020(lg_below=0.4, lg_above=0.1)
    assert a.truth_edges[0] == pytest.approx(18.0) and a.truth_edges[-1] == pytest.approx(20.3)
    assert np.isin(np.round(a.reco_edges, 6), np.round(a.truth_edges, 6)).all()


def test_the_response_is_that_of_events_drawn_one_by_one():
    a, n = Auger2020("resolution"), 400_000
    edges = np.array([18.30, 18.32, 19.00, 19.02])
    columns = a.response(edges)
    for k in (0, 2):
        lg = np.random.default_rng(k).uniform(edges[k], edges[k + 1], n)
        found = np.histogram(AUGER_SD.sample(lg, np.random.default_rng(k + 9)), a.reco_edges)[0]
        expected = n * columns[:, k]
        assert ((found - expected) ** 2 / np.maximum(expected, 1))[expected > 5].sum() < 30


def test_the_trigger_lets_nearly_everything_through_above_threshold_and_less_below():
    assert trigger_efficiency(18.4, np.sqrt(np.linspace(0.25, 1, 50))).mean() > 0.95
    assert trigger_efficiency(18.0, 0.8) < 0.75 and trigger_efficiency(19.0, 0.8) > 0.9999
    assert trigger_bias(18.4, 0.9) == 0 and trigger_bias(19.5, 0.9) == 0
    assert 0 < trigger_bias(18.2, 0.9) < trigger_bias(18.2, 0.55) < 0.2


def test_with_the_trigger_columns_sum_to_its_efficiency_far_from_the_edges():
    a = Auger2020()
    edges = np.array([18.70, 18.71])
    # 3.5 sigma inside: what is lost there is lost by the trigger, and there is hardly any
    share = a.response(edges).sum()
    expected = trigger_efficiency(18.705, np.sqrt(np.linspace(0.25, 1, 400))).mean()
    assert share == pytest.approx(expected, abs=2e-3)
    assert a.response(np.array([18.0, 18.02])).sum() < Auger2020("resolution").response(np.array([18.3, 18.32])).sum()


def corrections(problem):
    """Unfolded over folded for the published flux."""
    edges = np.round(np.arange(17.8, 20.601, 0.01), 6)
    middle = (edges[1:] + edges[:-1]) / 2
    true = auger_flux(middle) * np.diff(10.0**edges)
    inside = np.histogram(middle, problem.reco_edges, weights=true)[0]
    return inside / (problem.response(edges) @ true)


def test_efficiency_and_bias_together_give_the_published_corrections_and_neither_does_alone(monkeypatch):
    published, low = Auger2020().published["correction"], slice(0, 3)
    assert np.abs(corrections(Auger2020()) / published - 1).max() < 0.01
    assert np.abs(corrections(Auger2020()) / published - 1)[low].max() < 0.005
    assert np.abs(corrections(Auger2020("resolution")) / published - 1)[low].max() > 0.014
    monkeypatch.setattr(module, "trigger_bias", lambda lg, cos: 0 * (np.asarray(lg) + cos))
    assert np.abs(corrections(Auger2020()) / published - 1)[low].max() > 0.04
    monkeypatch.undo()
    monkeypatch.setattr(module, "trigger_efficiency", lambda lg, cos, *_: 1 + 0 * (np.asarray(lg) + cos))
    assert np.abs(corrections(Auger2020()) / published - 1)[low].max() > 0.04


def test_variations_change_one_constant_each_and_by_more_than_the_published_corrections_allow():
    a = Auger2020()
    own, published = corrections(a)[0], a.published["correction"][0]
    for settings in a.variations.values():
        other = Auger2020(**settings)
        assert other.variations == {} and other.alternatives == {}
        moved = abs(corrections(other)[0] / own - 1)
        assert abs(own / published - 1) < moved < 0.02
    assert Auger2020("resolution").variations == {}
    assert trigger_efficiency(18.3, 0.8, 0.05) == pytest.approx(trigger_efficiency(18.25, 0.8))


@pytest.mark.parametrize(
    "settings",
    [
        {"later": 0.5},
        {"wider": 0},
        {"bias": np.nan},
        {"bias": 1.2, "detector": "resolution"},
        {"detector": "none"},
        {"lg_below": 0.05},
        {"lg_above": 0.33},
        {"lg_below": True},
    ],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(SimulatorSettingError, match=next(iter(settings))):
        Auger2020(**settings)
