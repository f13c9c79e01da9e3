"""Stage `report`: summary.json with all numbers, the verdicts on them, the figures, and the HTML page."""

import json
from pathlib import Path
from typing import Any

import torch

from sbi_phys.calibration.calibrate import AT_THE_OBSERVATION, TITLES
from sbi_phys.core.numbers import format_interval
from sbi_phys.estimators.base import load
from sbi_phys.plotting.corner import corner_figure
from sbi_phys.plotting.posterior import comparison_figure, weights_figure
from sbi_phys.plotting.style import house_style, new_figure
from sbi_phys.plotting.training import loss_figure, step_time_figure
from sbi_phys.report.html import Block, Code, Details, KeyValues, Section, Text, Verdict, render_report
from sbi_phys.report.tables import Table, comparison_table, posterior_table, rows_to_csv, rows_to_table, shift_table, summarise
from sbi_phys.workflow.methods import TITLES as METHOD_TITLES
from sbi_phys.workflow.run import Run, versions

__all__ = ["method_sections", "report", "seconds", "summary", "verdicts"]

Numbers = dict[str, Any]

_STAGES = (
    "simulate", "train", "infer", "rounds", "refine", "reference", "compare", "calibrate", "check",
    "train_nle", "infer_nle", "train_nre", "infer_nre", "methods",
)  # fmt: skip
# Largest C2ST and largest shift of a median, in sd, of a posterior that agrees with the exact one.
_C2ST, _SHIFT = 0.55, 0.1
_PARETO = 0.7  # arXiv:1507.02646


def report(run: Run, numbers: Numbers) -> None:
    """Write summary.json, the figures and report.html."""
    found = summary(run)
    posterior = _posterior(run, found)  # before _physics, which reads the figure `corner`
    sections = [
        Section("Data and prior", _data_and_prior(run)),
        Section("Posterior", posterior),
        *([Section("Data and model", physics)] if (physics := _physics(run)) else []),
        Section("Calibration and model checks", _checks(run, found)),
        *method_sections(run),
        Section("Training", _training(run)),
        *([Section("Published fits", _published_fits(run, found))] if published(run) else []),
        Section("Settings and versions", _settings(run, found)),
    ]
    run.write_json("summary.json", found)
    total = found["seconds"]["total"]
    render_report(
        run.path("report.html"),
        run.config.run.title,
        f"{found['n_simulations']} simulations, {total:.0f} s, seed {run.config.run.seed}",
        sections,
        verdicts=verdicts(found),
        footer=f"sbi_phys {found['versions']['sbi_phys']}, seed {run.config.run.seed}",
    )
    numbers["sections"] = [section.title for section in sections]


def _data_and_prior(run: Run) -> list[Block]:
    simulator, prior = run.simulator, run.simulator.prior
    blocks = getattr(prior, "blocks", (prior,))
    rows = [
        (f"${p.latex}$" if p.latex else p.name, p.name, type(block).__name__.removesuffix("Prior"), _range(p), p.unit or "–")
        for block in blocks
        for p in block.parameters
    ]
    data = [
        (o.name, str(o.size), o.kind, f"{o.edges[0]:g} to {o.edges[-1]:g} {o.edges_unit}" if o.edges else "–")
        for o in simulator.observables
    ]
    source = run.config.infer.observation
    words = {
        "observed": "the measured data that the simulator provides",
        "simulated": "one simulation with parameters drawn from the prior",
    }
    about = (type(simulator).__doc__ or "").strip().split("\n")[0]
    return [
        Text(
            f"{about}\n\nThe parameters are inferred from {words.get(source, f'the data in `{source}`')}. The simulator is "
            f"`{run.config.simulator.spec}`; its settings are listed at the end of this page."
        ),
        Table(("Parameter", "Name", "Prior", "Range", "Unit"), tuple(rows), "Parameters and their priors"),
        Details("Blocks of the observation", [Table(("Block", "Columns", "Kind", "Bins"), tuple(data))]),
    ]


def _range(p: Any) -> str:
    return f"{p.low:g} to {p.high:g}".replace("-", "−") if abs(p.low) < float("inf") and abs(p.high) < float("inf") else "unbounded"


def _posterior(run: Run, found: Numbers) -> list[Block]:
    sets, parameters = _sample_sets(run), run.simulator.parameters
    final = next(iter(sets.values()))
    rows = posterior_table(final, parameters)
    run.write_text("posterior.csv", rows_to_csv(rows))
    corner = run.draw(
        corner_figure(sets, parameters, truth=run.truth, published=published(run)),
        "corner",
        f"One- and two-dimensional marginals with 68 and 95 % regions. Filled: the final posterior ({found['method']})."
        + (" Black lines: MCMC with the exact likelihood." if len(sets) > 2 else "")
        + " Dashed: the amortised network before refinement.",
        "corner plot of the posterior",
    )
    evidence = found["log_evidence"]
    log_evidence = f"The log evidence, $\\ln p(x)$, is {_text(evidence)} ± {found['log_evidence_err']:.2f}." if evidence is not None else ""
    return [
        rows_to_table(rows, "Median with 68 % interval; 95 % interval; mean and standard deviation"),
        *([Text(log_evidence)] if log_evidence else []),
        corner,
    ]


def _sample_sets(run: Run) -> dict[str, Any]:
    files = {"final posterior": "posterior.nc", "exact MCMC": "reference.nc", "amortised network": "posterior_amortised.nc"}
    return {label: run.read_draws(file).flat for label, file in files.items() if run.path(file).exists()}


def _physics(run: Run) -> list[Block]:
    if not hasattr(run.simulator, "figures"):
        return []
    theta = run.read_draws("posterior.nc").flat[:2000]
    made = run.simulator.figures(theta, run.observation, seed=run.seed("figures") % 2**31)
    blocks: list[Block] = [run.draw(figure, name, caption, title) for name, title, caption, figure in made]
    run.save_figure(_side_by_side([run.path("figures", f"{name}.png") for name in ("corner", made[0][0])]), "overview")
    return blocks


def _side_by_side(paths: list[Path], height: float = 7.0) -> Any:
    """The PNG files in one row at equal height, in inches: an overview for a README or a talk."""
    from matplotlib.image import imread

    pictures = [imread(path) for path in paths]
    widths = [height * p.shape[1] / p.shape[0] for p in pictures]
    with house_style():
        figure = new_figure(sum(widths), height)
        for ax, picture in zip(figure.subplots(1, len(pictures), width_ratios=widths), pictures, strict=True):
            ax.imshow(picture)
            ax.axis("off")
    return figure


def _checks(run: Run, found: Numbers) -> list[Block]:
    out: list[Block] = []
    if run.config.rounds.n_rounds and "skipped" in found["rounds"]:
        out.append(Verdict("warn", "The truncated rounds were skipped.", found["rounds"]["skipped"]))
    if found["reference"] is not None:
        final, exact = run.read_draws("posterior.nc").flat, run.read_draws("reference.nc").flat
        out += [
            Text(
                "**Comparison with exact MCMC.** The accuracy of a classifier between posterior and MCMC draws (C2ST) is "
                f"{_text(found['c2st_amortised'])} for the amortised posterior and {_text(found['c2st_final'])} for the final one; "
                "0.5 means that no difference was found."
            ),
            rows_to_table(shift_table(final, exact, run.simulator.parameters), "The final posterior compared with exact MCMC"),
            Text(found["mcmc"]["words"] + "."),
            KeyValues(_per_parameter(found["mcmc"]), "Convergence of the chains, by free parameter"),
        ]
    if run.path("weights.npy").exists():
        weights = run.read_array("weights.npy")
        figure = weights_figure(weights, pareto_k=found["importance_pareto_k"])
        caption = "Importance weights of the network's draws with the exact likelihood; they are equal if the network is exact."
        out.append(run.draw(figure, "weights", caption, "histogram and cumulative share of the importance weights"))
    if run.path("figures", "calibration.png").exists():
        out += _calibration(run)
    out.append(
        run.figure_block(
            "predictive", f"Posterior predictive check, statistic: {found['predictive_statistic']}.", "posterior predictive check", 560
        )
    )
    caption = (
        "Distance from the mean of the training simulations in the network's features: simulations (histogram) and observation (line)."
    )
    out.append(run.figure_block("misfit", caption, "histogram of distances with the observation marked", 720))
    worst = sorted(((abs(v), v, name, i) for name, row in found["pulls"].items() for i, v in enumerate(row)), reverse=True)[:8]
    rows = [(name, str(i), f"{v:+.2f}".replace("-", "−")) for _, v, name, i in worst]
    out.append(Details("Largest pulls of the data", [Table(("Block", "Bin", "(data − predicted) / sd"), tuple(rows))]))
    return out


def _calibration(run: Run) -> list[Block]:
    found = run.numbers("calibrate")
    rows = [
        (TITLES[name], f"{p:.3g}", f"{found['adjusted'][name]:.3g}", "fails" if name in found["failed"] else "passes")
        for name, p in found["pvalues"].items()
    ]
    header = ("Test", "$p$", "$p$, corrected", "At 5 %")
    caption = "Amortised network on held-out simulations. A calibrated posterior has its curves within the grey bands."
    figures = [
        block
        for name, words in found["words"].items()
        for block in (run.figure_block(f"calibration_{name}", TITLES[name], TITLES[name], 620), Code(words))
    ]
    not_run = (
        [Text("Tests not run: " + "; ".join(f"`{name}`, {why}" for name, why in found["skipped"].items()) + ".")]
        if found["skipped"]
        else []
    )
    return [
        Text(f"**Calibration of the network**, {found['n']} held-out simulations, {found['n_draws']} draws each. {found['verdict']}"),
        run.figure_block("calibration", caption, "ranks and coverage with simultaneous bands"),
        Table(header, tuple(rows), "Calibration tests; p-values corrected for their number (Holm)"),
        *([Text(found["likeness"])] if found["likeness"] else []),
        *not_run,
        Details(
            "Figure and summary of each test", [*figures, run.figure_block("sbc_histograms", "Rank histograms (SBC)", "rank histograms")]
        ),
    ]


def _per_parameter(mcmc: Numbers) -> dict[str, str]:
    names = {"autocorr_time": "autocorrelation time [steps]", "r_hat": "R-hat between groups", "r_hat_walkers": "R-hat between walkers"}
    return {words: _text(mcmc[key]) for key, words in names.items()}


def _training(run: Run) -> list[Block]:
    history = load(run.path("model.pt"), device="cpu").history
    steps = run.draw(step_time_figure(history), "epoch_seconds", "Seconds per epoch; expected to be constant.", "seconds per epoch", 720)
    caption = "Loss per simulation, in nats: the negative mean log density of the true parameters under the network."
    return [run.draw(loss_figure(history), "loss", caption, "training and validation loss against epoch", 820), Details("Time", [steps])]


def _published_fits(run: Run, found: Numbers) -> list[Block]:
    final, parameters, fits = run.read_draws("posterior.nc").flat, run.simulator.parameters, published(run)
    caption = f"Published values and this posterior. Sources: {', '.join(dict.fromkeys(fit['source'] for fit in fits))}."
    return [
        run.draw(comparison_figure(_sample_sets(run), parameters, fits, truth=run.truth), "published", caption, "published fits"),
        Details("Table", [rows_to_table(comparison_table(final, parameters, fits))]),
    ]


def _settings(run: Run, found: Numbers) -> list[Block]:
    spent = {name: f"{value:.1f} s" for name, value in seconds(run).items()}
    return [
        KeyValues({"seed": run.config.run.seed, "device": found["device"], "threads": found["threads"], **found["versions"]}, "Versions"),
        KeyValues(spent, "Time of each stage"),
        Details("All settings", [Code(run.config.to_toml(), "config.toml; the same settings reproduce the same numbers")]),
    ]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "not known" if value is None else f"{value:.5g}".replace("-", "−") if isinstance(value, float) else str(value)


def method_sections(run: Run) -> list[Section]:
    """Sections on NLE, NRE and confidence sets, for what was run."""
    out = []
    if found := methods_of(run):
        out.append(Section("Comparison of NPE, NLE and NRE", _methods(run, found)))
    if limits := limits_of(run):
        out.append(Section("Confidence sets", [block for one in limits for block in _limits(run, one)]))
    return out


def methods_of(run: Run) -> dict[str, Any] | None:
    """Numbers of stage `methods`, None if it was not run."""
    return run.numbers("methods") or None


def limits_of(run: Run) -> list[dict[str, Any]]:
    """Results of `sbi-phys limits` in the folder."""
    path = run.path("limits.json")
    return list(json.loads(path.read_text(encoding="utf-8"))["limits"]) if path.is_file() else []


def _methods(run: Run, found: dict[str, Any]) -> list[Block]:
    parameters = run.simulator.parameters
    shown = list(parameters)[:2]  # those of the figure; summary.json has all
    ran = [m for m in METHOD_TITLES if m in found]
    rows = [_row(METHOD_TITLES[m], found[m], shown) for m in ran]
    if found["exact_posterior"] is not None:
        rows.append(_row(f"exact ({found['exact']})", {"posterior": found["exact_posterior"]}, shown))
    header = ("Method", *(p.label for p in shown), "C2ST", "Training [s]", "Draws [s]", "Effective draws")
    over = f"; grey: exact posterior ({found['exact']})" if found["exact_posterior"] is not None else f" ({found['exact']})"
    names = " and ".join(p.label for p in shown)
    blocks: list[Block] = [
        Text(
            "The methods learn the posterior, $p(\\theta | x)$ (NPE), the likelihood, $p(x | \\theta)$ (NLE), and the ratio "
            "$p(x | \\theta) / p(x)$ (NRE) from the same simulations; none is refined here. A C2ST of 0.5 means that no difference from "
            "the exact draws was found."
        ),
        run.figure_block("methods", f"{names}: 68 and 95 % regions{over}.", "contours of the methods over the exact posterior", 640),
        Table(header, tuple(rows), "Posteriors by method: median ± standard deviation"),
    ]
    ratios = found["ratios"]
    if "skipped" in ratios:
        return [*blocks, Text(f"Learned ratios were not compared with exact ones: {ratios['skipped']}.")]
    caption = (
        f"Learned against exact {ratios['what']}, {ratios['n']} held-out simulations. Reliability: fraction of joint pairs against the "
        "classifier output, equal if calibrated; 95 % bands."
    )
    words = [
        f"{METHOD_TITLES[m]}: rms {ratios[m]['rms']:.2f} nats, mean {ratios[m]['mean']:+.2f} nats"
        + (f"\n{w}" if (w := ratios[m].get("words")) else "")
        for m in ran
        if m in ratios
    ]
    return [
        *blocks,
        run.figure_block("ratios", caption, "learned against exact log ratios"),
        Details("Errors of the log ratios", [Code("\n".join(words))]),
    ]


def _row(title: str, one: dict[str, Any], shown: list[Any]) -> tuple[str, ...]:
    moments = [one["posterior"][p.name] for p in shown]
    parts = [format_interval(m["median"], m["median"] - m["sd"], m["median"] + m["sd"]).split(" ") for m in moments]
    words = [f"{central} ± {error.lstrip('+')}" for central, error, _ in parts]
    c2st = "–" if one.get("c2st") is None else f"{one['c2st']:.3f} ± {one['c2st_err']:.3f}"
    seconds = ["–" if one.get(key) is None else f"{one[key]:.1f}" for key in ("train_seconds", "draw_seconds")]
    effective = "–" if one.get("n_effective") is None else f"{one['n_effective']:.0f} ({one['sampler']})"
    return (title, *words, c2st, *seconds, effective)


def _limits(run: Run, one: dict[str, Any]) -> list[Block]:
    name = "_".join((*one["parameters"], one["statistic"], *(() if one["kind"] == "interval" else (one["kind"],))))
    labels = {p.name: p.label for p in run.simulator.parameters}
    rows = [
        (f"{100 * row['level']:.4g} %", labels[p], _ends(row["set"][p]), _ends(row["wilks"][p]),
         f"{100 * row['coverage']:.1f} ± {100 * row['coverage_error']:.1f} %", f"{100 * row['wilks_coverage']:.1f} %")
        for row in one["levels"] for p in one["parameters"]
    ]  # fmt: skip
    rest = "" if one["nuisances"] == "none" else f" Other parameters: {one['nuisances']}."
    head = f"**{one['title']}**, {one['kind']}, {one['n_simulations']} new simulations (critical values 3/4, coverage 1/4)."
    value = f" The p-value of {one['value']['at']:g} is {one['value']['pvalue']:.3g}." if "value" in one else ""
    return [
        Text(head + rest + value),
        Table(("Level", "Parameter", "Set", "Wilks", "Coverage", "Coverage, Wilks"), tuple(rows), "Confidence sets of the observation"),
        run.figure_block(
            f"limits_{name}",
            "Test statistic of the observation and critical values; the set is where the statistic is at most the critical value.",
            "confidence sets",
            620,
        ),
        run.figure_block(
            f"coverage_{name}",
            "Coverage against the true parameters, of these sets and of those by Wilks' theorem.",
            "coverage maps with their error",
        ),
    ]


def _ends(ends: list[float | None] | None) -> str:
    if ends is None:
        return "empty"
    low, high = ("−∞" if ends[0] is None else f"{ends[0]:.4g}", "∞" if ends[1] is None else f"{ends[1]:.4g}")
    return f"{low} to {high}".replace("-", "−")


def summary(run: Run) -> dict[str, Any]:
    """All numbers of the run; None where a stage was not run or a value is not finite."""
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
    """Seconds of each finished stage and in total; for a concurrent stage the total includes only the time spent waiting for it."""
    records = {name: record for name in _STAGES if (record := run.record(name)) is not None}
    total = sum(record.get("waited", record["seconds"]) for record in records.values())
    return {**{name: record["seconds"] for name, record in records.items()}, "total": round(total, 3)}


def published(run: Run) -> list[dict[str, Any]]:
    """Published fits that the simulator provides."""
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


def verdicts(found: dict[str, Any]) -> list[Verdict]:
    """Verdicts on the numbers of `summary`, one also for each stage that was not run."""
    return [
        _judge_posterior(found),
        *_judge_refinement(found),
        _judge_calibration(found),
        _judge_prediction(found),
        _judge_observation(found),
    ]


def _judge_posterior(found: dict[str, Any]) -> Verdict:
    c2st, shift = found["c2st_final"], found["max_median_shift_sd"]
    if shift is None:
        return Verdict(
            "warn",
            "The posterior was not compared with an exact posterior.",
            "Stage reference was not run, or the likelihood is not tractable.",
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
        head = "The amortised network is calibrated on average, but not near the observation; refinement corrects the posterior."
        return Verdict("warn", head, tests["verdict"])
    level, words = ("warn", "slightly miscalibrated") if min(tests["adjusted"].values()) >= 1e-3 else ("bad", "not calibrated")
    head = f"The amortised network is {words} on held-out simulations; refinement corrects the posterior of this observation only."
    return Verdict(level, head, tests["verdict"])


def _judge_prediction(found: dict[str, Any]) -> Verdict:
    p = found["predictive_pvalue"]
    if p is None:
        return Verdict("warn", "No posterior predictive check was run.")
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
