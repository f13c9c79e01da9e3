"""Verdicts on the numbers of an inference run, and what to do next.

Each verdict is good, a caution or a problem. The next steps follow from the numbers together: an observation outside the simulations is
checked first, since no training helps there; a network that tests find wrong is trained longer where its validation loss still falls, gets
more simulations where it over-fits, rounds where it is wrong at the observation alone, and more weights otherwise; the model is in question
where the network is right and its predictions are not.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sbi_phys.calibration.calibrate import AT_THE_OBSERVATION
from sbi_phys.report.html import Verdict

__all__ = ["next_steps", "training_state", "verdicts"]

Numbers = dict[str, Any]
Step = tuple[str, str]  # what to do, and why

# Largest C2ST and largest shift of a median, in sd, of a posterior that agrees with the exact one.
_C2ST, _SHIFT = 0.55, 0.1
_PARETO = 0.7  # arXiv:1507.02646
_GAP = 0.2  # nats between validation and training loss that more simulations would reduce
_FALLING = 0.01  # nats that the validation loss still falls in each of the last epochs of a training that is too short


def verdicts(found: dict[str, Any]) -> list[Verdict]:
    """Verdicts on the numbers of `summary`, one also for each stage that was not run but could be, and what to do next."""
    exact = [_judge_posterior(found), *_judge_refinement(found)] if found.get("likelihood", True) else []
    judged = [*exact, _judge_calibration(found), _judge_prediction(found), _judge_observation(found)]
    return [*judged, *next_steps(found)]


def training_state(history: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Whether the training of the worst member of an ensemble was too short, or over-fitted.

    Returns: {"n_epochs", "falling", "gap"}: nats by which the validation loss fell in each of the last epochs, 0 unless the last is the
    best; validation minus training loss at the best epoch, nats.
    """
    falling, gap = [], []
    for member in history:
        valid = [float(record["valid"]) for record in member]
        best = int(np.nanargmin(valid)) if np.isfinite(valid).any() else len(valid) - 1
        back = min(len(valid) - 1, max(1, len(valid) // 5))
        falling.append(max(0.0, (valid[-1 - back] - valid[-1]) / back) if back and best == len(valid) - 1 else 0.0)
        gap.append(valid[best] - float(member[best]["train"]))
    return {"n_epochs": max(map(len, history)), "falling": max(falling), "gap": max(gap)} if history else {}


def next_steps(found: dict[str, Any]) -> list[Verdict]:
    """What to do next, in order, from the numbers of `summary`: check the data, train longer, simulate more, rounds, or another network."""
    steps = [*_repair_inputs(found), *_improve_network(found), *_question_model(found)]
    if steps:
        return [Verdict("next", *step) for step in steps]
    return []


def _is_outside(found: Numbers) -> bool:
    quantile, p = found["misspecification"]["quantile"], found["misspecification"].get("pvalue")
    prior = found.get("prior_predictive") or {}
    many = prior.get("n_outside", 0) > 3 + 3 * prior.get("n_expected", 0.0)
    return many or min(1.0 if quantile is None else 1 - quantile, 1.0 if p is None else p) < 0.01


def _repair_inputs(found: Numbers) -> list[Step]:
    steps = []
    if _is_outside(found):
        prior = found.get("prior_predictive") or {}
        columns = f" Outside all simulations: {', '.join(prior['outside'][:5])}." if prior.get("outside") else ""
        steps.append((
            "Check the observation: its units, the order of its columns, values that are saturated; then the simulator, and whether "
            "the prior is wide enough.",
            "Hardly any simulation is like it: more training, rounds and recalibration do not help." + columns,
        ))  # fmt: skip
    n, failed = found.get("n_simulations", 0), found.get("n_failed", 0)
    if n and failed > 0.01 * n:
        detail = (
            f"{failed} of {n} failed: where failures depend on the parameters, the posterior is biased towards parameters that succeed."
        )
        steps.append(("Find out why simulations fail.", detail))
    return steps


def _network_faults(found: Numbers) -> tuple[bool, bool]:
    """Whether the network is found wrong, and whether only at the observation."""
    tests = found["calibration"]
    failed = set(tests.get("failed") or ()) if tests.get("adjusted") is not None and not tests.get("passed") else set()
    share, k = found["importance_ess_fraction"], found["importance_pareto_k"]
    poor = share is not None and (not found["refined"] or share < 0.01 or (k is not None and k >= _PARETO))
    c2st, shift = found["c2st_final"], found["max_median_shift_sd"]
    differs = shift is not None and (c2st is None or c2st > _C2ST or shift > _SHIFT)
    local = bool(poor or differs) or bool(failed)
    return local, local and failed <= AT_THE_OBSERVATION


def _improve_network(found: Numbers) -> list[Step]:
    wrong, only_here = _network_faults(found)
    training, refined = found.get("training") or {}, found["refined"]
    falling, gap = training.get("falling", 0.0), training.get("gap", 0.0)
    steps: list[Step] = []
    if falling > _FALLING and (wrong or not refined):
        detail = f"The validation loss still fell by {falling:.2g} nats per epoch at the end of {training['n_epochs']} epochs."
        steps.append(("Train longer: a larger `train.max_epochs`, or 0 for the default.", detail))
    if gap > _GAP and (wrong or not refined):
        detail = f"The validation loss is {gap:.2g} nats above the training loss: the network over-fits its simulations."
        steps.append((f"Simulate more: `simulate.n`, now {found.get('n_simulations', 0)}, four times as large.", detail))
    if wrong and only_here and not found["rounds"].get("n_rounds") and not _is_outside(found):
        steps.append((
            "Add simulations near the observation: `rounds.n_rounds = 1`.",
            "The network is right on average over the prior and wrong at the observation.",
        ))  # fmt: skip
    if wrong and not steps and not _is_outside(found):
        steps.append((
            "Take a larger network, `flow.hidden` and `embedding.hidden` twice as large, or an embedding made for these data.",
            "The training has converged without over-fitting. If this does not help, recalibrate the posterior (docs/calibration.md).",
        ))  # fmt: skip
    if found["calibration"]["adjusted"] is None:
        steps.append(("Test the calibration of the network: `calibrate.n = 500`.", ""))
    if found["max_median_shift_sd"] is not None and not found["mcmc"]["converged"]:
        steps.append(("Run the exact MCMC longer: a larger `reference.max_steps`.", ""))
    return steps


def _question_model(found: Numbers) -> list[Step]:
    p = found["predictive_pvalue"]
    if p is None or p >= 0.05 or _is_outside(found):
        return []
    if _network_faults(found)[0]:
        return [("Repeat the predictive check afterwards.", "A posterior that is wrong also predicts data that differ.")]
    pulls = [(abs(v), name, i) for name, row in (found.get("pulls") or {}).items() for i, v in enumerate(row) if v is not None]
    where = "; ".join(f"{name}, column {i} ({size:.1f} sd)" for size, name, i in sorted(pulls, reverse=True)[:3])
    return [
        ("Check the model: it does not describe the data, and the network is not the reason.", f"Largest pulls: {where}." if where else "")
    ]


def _judge_posterior(found: dict[str, Any]) -> Verdict:
    c2st, shift = found["c2st_final"], found["max_median_shift_sd"]
    if shift is None:
        return Verdict(
            "warn",
            "The posterior was not compared with an exact posterior.",
            "Stage reference was not run.",
        )
    detail = (
        f"C2ST {_number(c2st)} (0.5: no difference found), largest shift of a median {shift:.3f} sd; "
        f"C2ST before rounds and refinement {_number(found['c2st_amortised'])}."
    )
    if c2st is None:
        return Verdict("bad", "The final posterior has too few distinct draws for a comparison with exact MCMC.", detail)
    if not found["mcmc"]["converged"]:
        return Verdict("warn", "The exact MCMC has not converged: the comparison is not conclusive.", detail)
    if c2st <= _C2ST and shift <= _SHIFT:
        return Verdict("good", "The final posterior agrees with exact MCMC.", detail)
    return Verdict("bad", "The final posterior differs from exact MCMC.", detail)


def _judge_refinement(found: dict[str, Any]) -> list[Verdict]:
    share, k = found["importance_ess_fraction"], found["importance_pareto_k"]
    if share is None:
        return [Verdict("warn", "The network's draws were not refined with the exact likelihood.")]
    detail = f"Effective sample size {found['importance_ess']:.0f}, {100 * share:.2g} % of the proposals; Pareto k {_number(k)}."
    if not found["refined"]:
        return [
            Verdict("bad", "Refinement failed: the network is too far from the exact posterior; the unrefined draws are shown.", detail)
        ]
    if k is not None and k < _PARETO and found["importance_ess"] >= 1000:
        return [Verdict("good", "Importance sampling with the exact likelihood is reliable.", detail)]
    return [
        Verdict(
            "warn",
            "Importance sampling may be unreliable: few draws have most of the weight, and the refined posterior may miss mass.",
            detail,
        )
    ]


def _judge_calibration(found: dict[str, Any]) -> Verdict:
    tests = found["calibration"]
    if tests["adjusted"] is None:
        return Verdict("warn", "The calibration of the network was not tested.")
    if tests["passed"]:
        return Verdict("good", "The amortised network is calibrated on held-out simulations.", tests["verdict"])
    if set(tests["failed"]) <= AT_THE_OBSERVATION:
        corrects = "; refinement corrects the posterior" if found["refined"] else ""
        head = f"The amortised network is calibrated on average, but not near the observation{corrects}."
        return Verdict("warn", head, tests["verdict"])
    level, words = ("warn", "slightly miscalibrated") if min(tests["adjusted"].values()) >= 1e-3 else ("bad", "not calibrated")
    corrects = "; refinement corrects the posterior of this observation only" if found["refined"] else ""
    head = f"The amortised network is {words} on held-out simulations{corrects}."
    return Verdict(level, head, tests["verdict"])


def _judge_prediction(found: dict[str, Any]) -> Verdict:
    p = found["predictive_pvalue"]
    if p is None:
        return Verdict("warn", "No posterior predictive check was run.", found.get("predictive_skipped") or "")
    detail = f"Posterior predictive p = {p:.3g}, statistic: {found['predictive_statistic']}."
    if p < 0.05:
        level = "warn" if p >= 1e-3 else "bad"
        return Verdict(
            level,
            "The data are more extreme than posterior predictive simulations: the model does not describe them fully.",
            detail,
        )
    return Verdict("good", "The data agree with posterior predictive simulations.", detail)


def _judge_observation(found: dict[str, Any]) -> Verdict:
    """The more extreme of two out-of-distribution scores: the distance in the network's features, and the tests of `misspecification`."""
    quantile, p = found["misspecification"]["quantile"], found["misspecification"].get("pvalue")
    if quantile is None and p is None:
        return Verdict("warn", "The observation was not compared with the training simulations.")
    details = []
    if quantile is not None:
        details.append(f"Its distance in the network's features is larger than that of {100 * quantile:.1f} % of the simulations.")
    if p is not None:
        details.append(f"Misspecification tests of the observation: p = {p:.3g}.")
    pvalue = min(1.0 if quantile is None else 1 - quantile, 1.0 if p is None else p)
    prior = found.get("prior_predictive")
    if prior is not None and prior["n_outside"]:
        expected = f"{prior['n_expected']:.2g} expected by chance"
        details.append(f"{prior['n_outside']} of {prior['n_columns']} columns lie outside all {prior['n']} simulations ({expected}).")
        pvalue = 0.0 if _is_outside(found) else pvalue
    detail = " ".join(details)
    if pvalue >= 0.05:
        return Verdict("good", "The observation lies within the training distribution.", detail)
    words = "at the edge of" if pvalue >= 0.01 else "outside"
    return Verdict(
        "warn" if pvalue >= 0.01 else "bad",
        f"The observation lies {words} the training distribution, where the network extrapolates.",
        detail,
    )


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"
