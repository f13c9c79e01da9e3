"""Stage `report`: summary.json with all numbers, the verdicts on them, the figures, and the HTML page.

The page has a section only for what was done: without a likelihood there is nothing on refinement and Markov chains. A simulator adds
its own figures by the method

    figures(theta, x_obs, *, seed, draws="posterior")  ->  [(name, title, caption, matplotlib Figure), ...]

of which theta (n, d) are draws of the final posterior. If it has the argument `draws`, it is also called with draws of the prior and
draws="prior". Name: letters, digits, '-' and '_', of the files figures/NAME.png and .pdf. An error in it is shown on the page.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbi_phys.calibration.calibrate import TITLES
from sbi_phys.core.numbers import format_interval
from sbi_phys.estimators.base import load
from sbi_phys.plotting.corner import corner_figure
from sbi_phys.plotting.observables import SMALL
from sbi_phys.plotting.posterior import comparison_figure, weights_figure
from sbi_phys.plotting.style import house_style, new_figure
from sbi_phys.plotting.training import loss_figure, step_time_figure
from sbi_phys.report.html import Block, Code, Details, KeyValues, Section, Text, Verdict, render_report
from sbi_phys.report.tables import Table, comparison_table, posterior_table, rows_to_csv, rows_to_table, shift_table, summarise
from sbi_phys.workflow.checks import FIGURES
from sbi_phys.workflow.inference import log_names
from sbi_phys.workflow.methods import TITLES as METHOD_TITLES
from sbi_phys.workflow.run import Run, versions
from sbi_phys.workflow.verdicts import training_state, verdicts

__all__ = ["method_sections", "report", "seconds", "summary", "verdicts"]

Numbers = dict[str, Any]

_STAGES = (
    "simulate", "train", "infer", "rounds", "refine", "reference", "compare", "calibrate", "check",
    "train_nle", "infer_nle", "train_nre", "infer_nre", "methods",
)  # fmt: skip
_OPEN_FIGURES = 3  # prior predictive figures that are shown without a click
_FIGURE_DRAWS = 2000  # draws that a simulator's own figures get


def report(run: Run, numbers: Numbers) -> None:
    """Write summary.json, the figures and report.html."""
    found = summary(run)
    posterior = _posterior(run, found)  # before _physics, which reads the figure `corner`
    parts: list[tuple[str, list[Block]]] = [
        ("Data and prior", _data_and_prior(run, found)),
        ("Observation and simulations", _observation_section(run, found)),
        ("Posterior", posterior),
        ("Data and model", _physics(run, found)),
        ("Calibration and model checks", _checks(run, found)),
    ]
    sections = [
        *(Section(title, body) for title, body in parts if body),
        *method_sections(run),
        Section("Training", _training(run)),
        *([Section("Published fits", _published_fits(run, found))] if published(run) else []),
        Section("Settings and versions", _settings(run, found)),
    ]
    run.write_json("summary.json", found)
    total = found["seconds"]["total"]
    render_report(
        run.path("report.html"),
        run.title,
        f"{found['n_simulations']} simulations, {total:.0f} s, seed {run.config.run.seed}",
        sections,
        verdicts=verdicts(found),
        footer=f"sbi_phys {found['versions']['sbi_phys']}, seed {run.config.run.seed}",
    )
    numbers["sections"] = [section.title for section in sections]


def _data_and_prior(run: Run, found: Numbers) -> list[Block]:
    simulator, prior = run.simulator, run.simulator.prior
    blocks = getattr(prior, "blocks", (prior,))
    rows = [
        (f"${p.latex}$" if p.latex else p.name, p.name, type(block).__name__.removesuffix("Prior"), _range(p), p.unit or "–")
        for block in blocks
        for p in block.parameters
    ]
    kinds = found["blocks"] or {}
    data = [
        (o.name, " × ".join(map(str, o.shape)), _kind_words(o, kinds.get(o.name, {}).get("kind", "")), o.unit or "–", _edges(o))
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
        *([Text(failed)] if (failed := _failed_words(found)) else []),
        Details("Blocks of the observation", [Table(("Block", "Shape", "Kind", "Unit", "Bins"), tuple(data))]),
    ]


def _kind_words(observable: Any, kind: str) -> str:
    words = ", ".join(
        filter(None, (kind, "counts" if observable.kind == "counts" else "", "values may be missing" if observable.missing else ""))
    )
    return words or observable.kind


def _edges(observable: Any) -> str:
    return f"{observable.edges[0]:g} to {observable.edges[-1]:g} {observable.edges_unit}".strip() if observable.edges else "–"


def _failed_words(found: Numbers) -> str:
    n, failed = found["n_simulations"], found["n_failed"]
    if not failed:
        return ""
    return (
        f"{failed} of {n} simulations ({100 * failed / n:.2g} %) failed and are left out of the training. If failures depend on the "
        "parameters, the posterior is that of the simulations that do not fail; `sbi-phys store check` lists the reasons."
    )


def _observation_section(run: Run, found: Numbers) -> list[Block]:
    """The prior predictive of each block, and what the network receives."""
    prior, out = found["prior_predictive"], found["misspecification"]
    blocks: list[Block] = []
    if prior is not None:
        words = f"The observation is compared with {prior['n']} simulations at parameters drawn from the prior."
        if prior.get("pvalue") is not None:
            words += f" Prior predictive p-value: {prior['pvalue']:.3g}, of all columns, blocks and their sum together."
        count = (
            f"{prior['n_outside']} of {prior['n_columns']} columns are outside all of them; {prior['n_expected']:.2g} expected by chance"
        )
        named = ", ".join(f"`{name}`" for name in prior["outside"]) + (", ..." if prior["n_outside"] > len(prior["outside"]) else "")
        blocks.append(Text(f"{words} {count}" + (f": {named}." if named else ".")))
    drawn = _block_figures(run, found, "prior")
    # many blocks would hide the posterior
    blocks += drawn if len(drawn) <= _OPEN_FIGURES else [Details("Every block of the observation and its prior predictive", drawn)]
    blocks += _own_figures(run, "prior")
    caption = (
        "What the network receives, and the features that its embedding makes of it, relative to the simulations. Red: outside all of "
        "them, where the network extrapolates."
    )
    blocks += _if_drawn(run, "features", caption, "inputs and features of the network", 860)
    if out["quantile"] is not None:
        caption = "Distance from the mean of the simulations in the network's features: simulations (histogram) and observation (line)."
        blocks += _if_drawn(run, "misfit", caption, "histogram of distances with the observation marked", 720)
    return blocks


def _if_drawn(run: Run, name: str, caption: str, alt: str, width: int | None = None) -> list[Block]:
    return [run.figure_block(name, caption, alt, width)] if run.path("figures", f"{name}.png").exists() else []


def _block_figures(run: Run, found: Numbers, what: str) -> list[Block]:
    """The figures of stage `check`, one for each block of observables."""
    words_of = {
        "prior": ("the prior predictive", "the median of the simulations, and the fraction of them below the data in each pixel"),
        "predictive": ("the posterior predictive", "the mean of the replicas, and the pulls (data − mean) / sd"),
    }
    below = {"prior": "below, the fraction of simulations below the data", "predictive": "below, the pulls (data − mean) / sd"}[what]
    predicted, pictures = words_of[what]
    captions = {
        "image": f"Data, {pictures}.",
        "set": f"Histogram of each column over all events, and the number of events: data and central 68 and 95 % of {predicted}.",
    }
    out: list[Block] = []
    for name, block in (found["blocks"] or {}).items():
        caption = captions.get(block["kind"], f"Data and central 68 and 95 % of {predicted}; {below}.")
        if block["kind"] == "vector" and block["size"] <= SMALL:
            caption = f"Data, and the distribution of each column in {predicted} with its central 68 and 95 %."
        words = f"**{name}.** {caption}" if len(found["blocks"]) > 1 else caption
        width = {"image": 980, "set": 900, "vector": 800}.get(block["kind"], 760)
        out += _if_drawn(run, f"{what}_{block['figure']}", words, f"{name}: observation and {what} predictive simulations", width)
    rest = len(run.simulator.observables) - FIGURES
    return [*out, Text(f"{rest} further blocks are not drawn.")] if out and rest > 0 else out


def _range(p: Any) -> str:
    return f"{p.low:g} to {p.high:g}".replace("-", "−") if abs(p.low) < float("inf") and abs(p.high) < float("inf") else "unbounded"


def _posterior(run: Run, found: Numbers) -> list[Block]:
    sets, parameters = _sample_sets(run, found), run.simulator.parameters
    final, log = next(iter(sets.values())), log_names(run.simulator.prior)
    rows = posterior_table(final, parameters)
    run.write_text("posterior.csv", rows_to_csv(rows))
    sentences = ["One- and two-dimensional marginals with 68 and 95 % regions."]
    if len(sets) > 1:
        lines = iter(("Black lines", "Dashed"))
        sentences.append(f"Filled: the final posterior ({found['method']}).")
        sentences += [f"{next(lines)}: {_SET_WORDS[label]}." for label in sets if label in _SET_WORDS]
    if log:
        sentences.append("On logarithmic axes the densities are those of the logarithm.")
    corner = run.draw(
        corner_figure(sets, parameters, truth=run.truth, published=published(run), log=log),
        "corner",
        " ".join(sentences),
        "corner plot of the posterior",
    )
    evidence = found["log_evidence"]
    log_evidence = f"The log evidence, $\\ln p(x)$, is {_text(evidence)} ± {found['log_evidence_err']:.2f}." if evidence is not None else ""
    return [
        rows_to_table(rows, "Median with 68 % interval; 95 % interval; mean and standard deviation"),
        *([Text(log_evidence)] if log_evidence else []),
        corner,
    ]


_SET_WORDS = {"exact MCMC": "MCMC with the exact likelihood", "amortised network": "the amortised network before rounds and refinement"}


def _sample_sets(run: Run, found: Numbers) -> dict[str, Any]:
    """Draws by label; the amortised network's are shown where the final ones are others."""
    files = {"final posterior": "posterior.nc", "exact MCMC": "reference.nc", "amortised network": "posterior_amortised.nc"}
    if not found["differs_from_amortised"]:
        files = {"posterior" if label == "final posterior" else label: file for label, file in list(files.items())[:2]}
    return {label: run.read_draws(file).flat for label, file in files.items() if run.path(file).exists()}


def _physics(run: Run, found: Numbers) -> list[Block]:
    """The simulator's own figures, the posterior predictive of each block, and the tests of the model."""
    own = _own_figures(run, "posterior")
    blocks = _block_figures(run, found, "predictive")
    if own and blocks:
        blocks = [Details("Every block of the observation and its posterior predictive", blocks)]
    return [*own, *blocks, *_predictive_tests(run, found)]


def _own_figures(run: Run, draws: str) -> list[Block]:
    """What the simulator's method `figures` draws; an error in it does not end the report."""
    method = getattr(run.simulator, "figures", None)
    if method is None:
        return []
    options: dict[str, Any] = {"seed": run.seed("figures") % 2**31}
    if "draws" in inspect.signature(method).parameters:
        options["draws"] = draws
    elif draws == "prior":
        return []
    if draws == "prior":
        theta = run.simulator.prior.sample(_FIGURE_DRAWS, run.rng("figures", "prior"))
    else:
        theta = run.read_draws("posterior.nc").flat[:_FIGURE_DRAWS]
    try:
        made = list(method(theta, run.observation, **options))
        blocks: list[Block] = [run.draw(figure, name, caption, title) for name, title, caption, figure in made]
    except Exception as err:  # code of the user: the other sections do not depend on it
        where = f"figures() of {run.config.simulator.spec} failed with draws of the {draws}."
        return [Verdict("warn", where, f"{type(err).__name__}: {err}. Expected a list of (name, title, caption, Figure).")]
    if made and draws == "posterior":
        run.save_figure(_side_by_side([run.path("figures", f"{name}.png") for name in ("corner", made[0][0])]), "overview")
    return blocks


def _predictive_tests(run: Run, found: Numbers) -> list[Block]:
    blocks: list[Block] = []
    if found["predictive_failed"]:
        reasons = "; ".join(f"{n} × {reason}" for reason, n in found["predictive_failures"].items())
        total = found["predictive_n"] + found["predictive_failed"]
        blocks.append(Text(f"{found['predictive_failed']} of {total} predictive simulations failed and are left out ({reasons})."))
    if found["predictive_pvalue"] is None:
        return blocks
    caption = f"Posterior predictive check, statistic: {found['predictive_statistic']}."
    blocks += _if_drawn(run, "predictive", caption, "posterior predictive check", 560)
    if found["predictive_statistics"]:
        rows = [(_STATISTICS.get(name, name), f"{p:.3g}") for name, p in found["predictive_statistics"].items()]
        blocks.append(Table(("Statistic", "$p$"), tuple(rows), "Two-sided posterior predictive p-values of several statistics"))
    pulls = [(abs(v), v, name, i) for name, row in found["pulls"].items() for i, v in enumerate(row) if v is not None]
    worst = sorted(pulls, reverse=True)[:8]
    shapes = {o.name: o.shape for o in run.simulator.observables}
    largest = [(name, _index(i, shapes[name]), f"{v:+.2f}".replace("-", "−")) for _, v, name, i in worst]
    table: list[Block] = [Table(("Block", "Column", "(data − predicted) / sd"), tuple(largest))]
    if found["predictive_constant"]:
        names = ", ".join(f"`{name}`" for name in found["predictive_constant"])
        blocks.append(Text(f"Constant in the predictive simulations and another value in the data: {names}."))
    return [*blocks, Details("Largest pulls of the data", table)]


_STATISTICS = {
    "total": "sum of all columns",
    "max |pull|": "largest pull",
    "chi2": "sum of squared pulls",
    "longest run": "longest run of pulls of one sign",
    "neighbours alike": "product of neighbouring pulls",
}


def _index(i: int, shape: tuple[int, ...]) -> str:
    return ", ".join(str(int(k)) for k in np.unravel_index(i, shape))


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
        run.draw(
            comparison_figure(_sample_sets(run, found), parameters, fits, truth=run.truth, log=log_names(run.simulator.prior)),
            "published",
            caption,
            "published fits",
        ),
        Details("Table", [rows_to_table(comparison_table(final, parameters, fits))]),
    ]


def _settings(run: Run, found: Numbers) -> list[Block]:
    skipped = {name for name in _STAGES if isinstance(run.numbers(name).get("skipped"), str)}
    spent = {name: f"{value:.1f} s" for name, value in seconds(run).items() if name not in skipped}
    text, caption = run.config.to_toml(), "config.toml; the same settings reproduce the same numbers"
    if not found["likelihood"]:
        text, caption = _without_exact(run), "config.toml, without the settings of stages that need a likelihood"
    return [
        KeyValues({"seed": run.config.run.seed, "device": found["device"], "threads": found["threads"], **found["versions"]}, "Versions"),
        KeyValues(spent, "Time of each stage"),
        Details("All settings", [Code(text, caption)]),
    ]


def _without_exact(run: Run) -> str:
    import tomli_w

    settings = run.config.to_dict()
    settings.pop("reference", None)
    for key in ("n_refine", "target_ess"):
        settings.get("infer", {}).pop(key, None)
    return tomli_w.dumps(settings)


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
        "title": run.title,
        "simulator": {"class": run.config.simulator.spec, "settings": run.simulator.settings},
        "seed": run.config.run.seed,
        "parameters": {p.name: {"unit": p.unit, "latex": p.latex} for p in run.simulator.parameters},
        "posterior": summarise(final, run.names),
        "posterior_amortised": summarise(run.read_draws("posterior_amortised.nc").flat, run.names),
        "reference": summarise(run.read_draws("reference.nc").flat, run.names) if run.path("reference.nc").exists() else None,
        "likelihood": callable(getattr(run.simulator, "log_likelihood", None)),
        "method": get["refine"].get("method"),
        "differs_from_amortised": get["refine"].get("method") not in ("amortised network", "amortised network, refinement failed"),
        "blocks": get["check"].get("blocks"),
        "prior_predictive": get["check"].get("prior_predictive"),
        "training": training_state(load(run.path("model.pt"), device="cpu").history),
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
        "predictive_statistics": get["check"].get("statistics"),
        "predictive_n": get["check"].get("n", 0),
        "predictive_failed": get["check"].get("n_failed", 0),
        "predictive_failures": get["check"].get("failures", {}),
        "predictive_constant": get["check"].get("constant", []),
        "predictive_skipped": get["check"].get("skipped"),
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
