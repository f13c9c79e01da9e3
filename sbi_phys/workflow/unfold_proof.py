"""Tests of the binned methods on toys with a known truth: the fitted spectrum, folded with the response of the real data.

The settings that the data chose (iterations, strength) are kept for the toys, and so is the prior's share of the covariance, scaled with
the counts: choosing anew for every toy would take minutes and hide what the choice of this run is worth.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sbi_phys.core.progress import Progress
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array
from sbi_phys.plotting.figures import save_figure
from sbi_phys.plotting.style import house_style
from sbi_phys.unfold import ibu, tikhonov
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.validation import validate

if TYPE_CHECKING:
    from sbi_phys.workflow.unfold import Found, UnfoldRun

__all__ = ["prove"]

Unfold = Callable[[Array, Response], Any]


class _Result(NamedTuple):
    """What a test wants of a method."""

    counts: Array
    covariance: Array


def prove(run: "UnfoldRun", names: list[str], progress: Progress | None) -> dict[str, Any]:
    """Test the methods by name -> verdict, rows and words, with the figures saved as validate_<name>."""
    m = run.measurement
    response, truth = m.within(run.spectrum()), m.coarse(run.spectrum())[m.inner]
    prior = m.coarse(run.spectrum("power_law"))[m.inner]
    found = validate(
        {run.found[name].title: _MAKERS[name](run.found[name], prior) for name in names},
        response,
        truth,
        counts=m.counts,
        n_toys=run.settings.validate_toys,
        seed=seed_for(run.settings.seed, "unfold", "validate"),
        progress=progress,
    )
    with house_style():
        figures = found.figures()
    for name, figure in figures.items():
        save_figure(figure, run.path("figures"), f"validate_{name}")
    return {
        "methods": names,
        "n_toys": run.settings.validate_toys,
        "verdict": found.verdict,
        "passed": found.passed,
        "failed": list(found.failed),
        "summary": found.summary(),
        "rows": [
            {"name": r.name, "value": r.value, "criterion": r.criterion, "passed": r.passed, "words": r.words, "pvalue": r.pvalue}
            for r in found.table()
        ],
        "figures": [f"validate_{name}" for name in figures],
    }


def _ibu(found: "Found", prior: Array) -> Unfold:
    k = int(found.record["numbers"]["n_iterations"])
    relative = found.arrays["covariance_prior"] / np.outer(found.counts, found.counts)

    def unfold(counts: Array, response: Response) -> _Result:
        answer = ibu(counts, response, k, prior, errors="expected")
        return _Result(answer.counts, answer.covariance + relative * np.outer(answer.counts, answer.counts))

    return unfold


def _tikhonov(found: "Found", prior: Array) -> Unfold:
    strength = float(found.record["numbers"]["strength"])

    def unfold(counts: Array, response: Response) -> _Result:
        answer = tikhonov(counts, response, strength, prior)
        return _Result(answer.counts, answer.covariance)

    return unfold


_MAKERS: dict[str, Callable[["Found", Array], Unfold]] = {"ibu": _ibu, "tikhonov": _tikhonov}
