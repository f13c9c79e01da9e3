"""summary.json: every number of the run that another program may want, from the stages' records and the posterior files."""

from typing import Any

import torch

from sbi_phys.report.tables import comparison_table, summarise
from sbi_phys.workflow.methods_page import limits_of, methods_of
from sbi_phys.workflow.run import Run, versions

__all__ = ["summary"]


def summary(run: Run) -> dict[str, Any]:
    """Collect the numbers; what has not been run, or is not finite, is None."""
    get = {
        name: run.numbers(name) for name in ("simulate", "train", "infer", "rounds", "refine", "reference", "compare", "calibrate", "check")
    }
    final = run.read_draws("posterior.nc").flat
    compare = get["compare"]
    shifts = compare.get("final", {}).get("median_shift_sd")
    return {
        "title": run.config.run.title,
        "simulator": {"class": run.config.simulator.spec, "settings": run.simulator.settings},
        "seed": run.config.run.seed,
        "parameters": {p.name: {"unit": p.unit, "latex": p.latex} for p in run.simulator.parameters},
        "posterior": summarise(final, run.names),
        "posterior_amortised": summarise(run.read_draws("posterior_amortised.nc").flat, run.names),
        "reference": summarise(run.read_draws("reference.nc").flat, run.names) if run.path("reference.nc").exists() else None,
        "method": get["refine"].get("method"),
        "c2st_amortised": compare.get("amortised", {}).get("c2st"),
        "c2st_rounds": compare.get("rounds", {}).get("c2st"),
        "c2st_final": compare.get("final", {}).get("c2st"),
        "c2st_draws": compare.get("final", {}).get("c2st_n"),
        "median_shift_sd": shifts,
        "max_median_shift_sd": max(map(abs, shifts.values())) if shifts else None,
        "refined": get["refine"].get("refined", False),
        "importance_ess": get["refine"].get("ess"),
        "importance_ess_fraction": get["refine"].get("ess_fraction"),
        "importance_pareto_k": get["refine"].get("pareto_k"),
        "log_evidence": get["refine"].get("log_evidence"),
        "log_evidence_err": get["refine"].get("log_evidence_err"),
        "mcmc": {
            key: get["reference"].get(key)
            for key in ("converged", "words", "autocorr_time", "n_effective", "r_hat", "r_hat_walkers", "acceptance")
        },
        "rounds": get["rounds"],
        "predictive_pvalue": get["check"].get("pvalue"),
        "predictive_statistic": get["check"].get("statistic"),
        "pulls": get["check"].get("pulls"),
        "misspecification": {
            "distance": get["check"].get("distance"),
            "quantile": get["check"].get("distance_quantile"),
            "pvalue": get["calibrate"].get("misspecification_pvalue"),
        },
        "coverage": get["calibrate"].get("coverage"),
        "coverage_pvalue": get["calibrate"].get("coverage_pvalue"),
        "sbc_pvalues": get["calibrate"].get("sbc_pvalues"),
        "sbc_pvalue": get["calibrate"].get("sbc_pvalue"),
        "calibration": {key: get["calibrate"].get(key) for key in ("verdict", "passed", "failed", "pvalues", "adjusted", "likeness")},
        "published": _published(run, final),
        "methods": methods_of(run),
        "limits": limits_of(run),
        "truth": None if run.truth is None else dict(zip(run.names, run.truth.tolist(), strict=True)),
        "validation_loss": get["train"].get("validation_loss"),
        "epochs": get["train"].get("epochs"),
        "device": get["train"].get("device"),
        "threads": torch.get_num_threads(),
        "n_simulations": get["simulate"].get("n_simulations", 0) + get["rounds"].get("n_simulations", 0),
        "n_failed": get["simulate"].get("n_failed", 0) + get["rounds"].get("n_failed", 0),
        "seconds": seconds(run),
        "versions": versions(),
    }


def seconds(run: Run) -> dict[str, float]:
    """Seconds of every finished stage, and of all: of a stage that ran beside others, only the time waited for it counts there."""
    records = {name: record for name in _STAGES if (record := run.record(name)) is not None}
    total = sum(record.get("waited", record["seconds"]) for record in records.values())
    return {**{name: record["seconds"] for name, record in records.items()}, "total": round(total, 3)}


_STAGES = (
    "simulate", "train", "infer", "rounds", "refine", "reference", "compare", "calibrate", "check",
    "train_nle", "infer_nle", "train_nre", "infer_nre", "methods",
)  # fmt: skip


def published(run: Run) -> list[dict[str, Any]]:
    """Published fits that the simulator knows."""
    return list(run.simulator.published()) if hasattr(run.simulator, "published") else []


def _published(run: Run, theta: Any) -> list[dict[str, Any]]:
    rows = comparison_table(theta, run.simulator.parameters, published(run))
    return [
        {
            **fit,
            "offset_sd": {row.name: row.offset for row in rows if row.fit == fit["label"]},
            "posterior_mass_below": {row.name: row.below for row in rows if row.fit == fit["label"]},
        }
        for fit in published(run)
    ]
