"""The run judged in words: whether the answer is right, what the network got wrong, and whether the data are like the simulations."""

from typing import Any

from sbi_phys.calibration.calibrate import AT_THE_OBSERVATION
from sbi_phys.report.html import Verdict

__all__ = ["verdicts"]

# A posterior is called right where a classifier hardly tells it from the exact one, and no median is off by more.
_C2ST, _SHIFT = 0.55, 0.1
_PARETO = 0.7  # arXiv:1507.02646


def verdicts(found: dict[str, Any]) -> list[Verdict]:
    """Judge the numbers of `summary`; what was not run is said, not left out."""
    return [_answer(found), *_refinement(found), _calibration(found), _prediction(found), _familiarity(found)]


def _answer(found: dict[str, Any]) -> Verdict:
    c2st, shift = found["c2st_final"], found["max_median_shift_sd"]
    if shift is None:
        return Verdict(
            "warn", "The posterior was not compared with an exact answer.", "No reference was run, or the likelihood is not tractable."
        )
    detail = (
        f"C2ST {_number(c2st)} (0.5 is no difference), largest shift of a median {shift:.3f} sd; "
        f"before rounds and refinement C2ST {_number(found['c2st_amortised'])}."
    )
    if c2st is None:
        return Verdict("bad", "The final posterior has too few distinct draws to be compared with exact Markov chains.", detail)
    if not found["mcmc"]["converged"]:
        return Verdict("warn", "The exact Markov chains have not converged: the comparison says little.", detail)
    if c2st <= _C2ST and shift <= _SHIFT:
        return Verdict("good", "The final posterior agrees with exact Markov chains.", detail)
    return Verdict("bad", "The final posterior differs from exact Markov chains.", detail)


def _refinement(found: dict[str, Any]) -> list[Verdict]:
    share, k = found["importance_ess_fraction"], found["importance_pareto_k"]
    if share is None:
        return [Verdict("warn", "The network's draws were not refined with an exact likelihood.")]
    detail = f"Effective sample {found['importance_ess']:.0f}, {100 * share:.2g} % of the proposals; Pareto k {_number(k)}."
    if not found["refined"]:
        return [Verdict("bad", "Refinement failed: the network is too far from the exact posterior, and its own draws are shown.", detail)]
    if k is not None and k < _PARETO and found["importance_ess"] >= 1000:
        return [Verdict("good", "Weighted with the exact likelihood, the draws carry the answer.", detail)]
    return [Verdict("warn", "Few draws carry most of the weight: the refined posterior may miss mass.", detail)]


def _calibration(found: dict[str, Any]) -> Verdict:
    tests = found["calibration"]
    if tests["adjusted"] is None:
        return Verdict("warn", "The network was not calibrated on held-out simulations.")
    if tests["passed"]:
        return Verdict("good", "The amortised network is calibrated on held-out simulations.", tests["verdict"])
    if set(tests["failed"]) <= AT_THE_OBSERVATION:
        head = "The amortised network is calibrated on average, but not for data like the observed; refinement mends that for them."
        return Verdict("warn", head, tests["verdict"])
    level, words = ("warn", "slightly off") if min(tests["adjusted"].values()) >= 1e-3 else ("bad", "not calibrated")
    head = f"The amortised network is {words} on held-out simulations; refinement mends that for this observation alone."
    return Verdict(level, head, tests["verdict"])


def _prediction(found: dict[str, Any]) -> Verdict:
    p = found["predictive_pvalue"]
    if p is None:
        return Verdict("warn", "The model was not checked against the data.")
    detail = f"Posterior predictive p = {p:.3g}, statistic: {found['predictive_statistic']}."
    if p < 0.05:
        level = "warn" if p >= 1e-3 else "bad"
        return Verdict(
            level,
            "The data are more extreme than the model makes them, even at its best parameters: the model is not the whole story.",
            detail,
        )
    return Verdict("good", "The data look like data of the model at its posterior.", detail)


def _familiarity(found: dict[str, Any]) -> Verdict:
    """The stranger of two: its distance in the network's features, and the tests on the observation itself (`misspecification`)."""
    quantile, p = found["misspecification"]["quantile"], found["misspecification"].get("pvalue")
    if quantile is None and p is None:
        return Verdict("warn", "It was not checked whether the observation is like the simulations.")
    details = []
    if quantile is not None:
        details.append(f"It lies further out than {100 * quantile:.1f} % of the simulations, in the features that the network has learnt.")
    if p is not None:
        details.append(f"Tests on the observation itself: p = {p:.3g}.")
    usual = min(1.0 if quantile is None else 1 - quantile, 1.0 if p is None else p)
    detail = " ".join(details)
    if usual >= 0.05:
        return Verdict("good", "The observation lies within what the network was trained on.", detail)
    words = "at the edge of" if usual >= 0.01 else "outside"
    return Verdict(
        "warn" if usual >= 0.01 else "bad",
        f"The observation lies {words} what the network was trained on: it extrapolates there.",
        detail,
    )


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"
