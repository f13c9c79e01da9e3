"""Figures of a training: loss and time of each epoch."""

import numpy as np
import pytest

from sbi_phys import plotting as figures
from sbi_phys.core.errors import DataError
from tests.report.demo_data import history


def texts(legend):
    return [t.get_text() for t in legend.get_texts()]


def finite(fig):
    return all(np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all() for ax in fig.axes)


def test_loss_marks_the_best_epoch_of_every_member():
    runs = history(3, 40, np.random.default_rng(1))
    fig = figures.loss_figure(runs)
    assert len(fig.axes) == 2 and fig.axes[0].get_ylabel() == "loss per simulation [nats]" and fig.axes[1].get_xlabel() == "epoch"
    marks = [line for line in fig.axes[0].lines if line.get_marker() == "o"]
    for member, mark in zip(runs, marks, strict=True):
        best = min(member, key=lambda r: r["valid"])
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (best["epoch"], best["valid"])
    assert len(texts(fig.axes[0].get_legend())) == 5 and finite(fig)
    low, high = fig.axes[0].get_ylim()
    assert all(low < r["valid"] < high for member in runs for r in member[10:])  # the plateau is in the frame


def test_loss_without_rates_or_with_a_failed_epoch():
    run = [{"epoch": k, "train": 1.0 / (k + 1), "valid": np.nan if k == 3 else 1.1 / (k + 1)} for k in range(8)]
    fig = figures.loss_figure([run])
    assert len(fig.axes) == 1 and finite(fig)
    with pytest.raises(DataError, match="no finite loss"):
        figures.loss_figure([[{"epoch": 0, "train": np.nan, "valid": np.nan}]])


@pytest.mark.parametrize("bad", [[], [[]], [[{"epoch": 1}]], history(1, 2, np.random.default_rng(0))[0]])
def test_a_history_of_another_form_is_refused(bad):
    with pytest.raises(DataError, match="history"):
        figures.loss_figure(bad)


def test_step_time_starts_at_zero_and_shows_the_median():
    runs = history(1, 30, np.random.default_rng(2))
    fig = figures.step_time_figure(runs)
    ax = fig.axes[0]
    assert ax.get_ylim()[0] == 0 and ax.lines[1].get_ydata()[0] == pytest.approx(np.median([r["seconds"] for r in runs[0]]))
    with pytest.raises(DataError, match="no 'seconds'"):
        figures.step_time_figure([[{"epoch": 0, "train": 1.0, "valid": 1.0}]])
