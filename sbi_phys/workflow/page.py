"""Stage `report`: figures as PNG and PDF, summary.json, and one HTML page that says what was asked, the answer, and its proof."""

from pathlib import Path
from typing import Any

from sbi_phys.calibration.calibrate import TITLES
from sbi_phys.estimators.base import load
from sbi_phys.plotting.figures import comparison_figure, corner_figure, loss_figure, save_figure, step_time_figure, weights_figure
from sbi_phys.plotting.style import house_style, new_figure
from sbi_phys.report.html import Block, Code, Details, FigureBlock, KeyValues, Section, Text, Verdict, render_report
from sbi_phys.report.tables import Table, comparison_table, posterior_table, rows_to_csv, rows_to_table, shift_table
from sbi_phys.workflow.methods_page import sections as further
from sbi_phys.workflow.run import Run
from sbi_phys.workflow.summary import published, seconds, summary
from sbi_phys.workflow.verdicts import verdicts

__all__ = ["report"]

Numbers = dict[str, Any]


def report(run: Run, numbers: Numbers) -> None:
    """Draw, summarise and write the page."""
    found = summary(run)
    answer = _answer(run, found)
    sections = [
        Section("What was asked", _question(run)),
        Section("The answer", answer),
        *([Section("The data and the model", physics)] if (physics := _physics(run)) else []),
        Section("How good is it", _proof(run, found)),
        *further(run),
        Section("Training", _training(run)),
        *([Section("Published fits", _literature(run, found))] if published(run) else []),
        Section("How it was made", _making(run, found)),
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


def _figure(run: Run, name: str, caption: str, alt: str, width: int | None = None) -> FigureBlock:
    return FigureBlock(run.path("figures", f"{name}.png"), caption, alt, pdf=f"figures/{name}.pdf", max_width=width)


def _draw(run: Run, figure: Any, name: str, caption: str, alt: str, width: int | None = None) -> FigureBlock:
    save_figure(figure, run.path("figures"), name)
    return _figure(run, name, caption, alt, width)


def _question(run: Run) -> list[Block]:
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
    words = {"observed": "the real data that the simulator ships", "simulated": "one simulation with parameters drawn from the prior"}
    about = (type(simulator).__doc__ or "").strip().split("\n")[0]
    return [
        Text(
            f"{about}\n\nWhich parameters describe {words.get(source, f'the data in `{source}`')}? The simulator is "
            f"`{run.config.simulator.spec}`; its settings stand at the end of this page."
        ),
        Table(("Parameter", "Name", "Prior", "Range", "Unit"), tuple(rows), "What is inferred, and what was believed before"),
        Details("The observation, block by block", [Table(("Block", "Columns", "Kind", "Bins"), tuple(data))]),
    ]


def _range(p: Any) -> str:
    return f"{p.low:g} to {p.high:g}".replace("-", "−") if abs(p.low) < float("inf") and abs(p.high) < float("inf") else "unbounded"


def _answer(run: Run, found: Numbers) -> list[Block]:
    sets, parameters = _sample_sets(run), run.simulator.parameters
    final = next(iter(sets.values()))
    rows = posterior_table(final, parameters)
    run.write_text("posterior.csv", rows_to_csv(rows))
    corner = _draw(
        run,
        corner_figure(sets, parameters, truth=run.truth, published=published(run)),
        "corner",
        f"Every one- and two-dimensional marginal, with regions of 68 and 95 %. Filled: the final posterior ({found['method']})."
        + (" Black lines: Markov chains on the exact likelihood." if len(sets) > 2 else "")
        + " Dashed: the amortised network before any refinement.",
        "corner plot of the posterior",
    )
    evidence = found["log_evidence"]
    said = (
        f"The logarithm of the evidence, $\\ln p(x)$, is {_text(evidence)} ± {found['log_evidence_err']:.2f}."
        if evidence is not None
        else ""
    )
    return [
        rows_to_table(rows, "Median with 68 % interval; 95 % interval; mean and standard deviation"),
        *([Text(said)] if said else []),
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
    blocks: list[Block] = [_draw(run, figure, name, caption, title) for name, title, caption, figure in made]
    save_figure(_side_by_side([run.path("figures", f"{name}.png") for name in ("corner", made[0][0])]), run.path("figures"), "overview")
    return blocks


def _side_by_side(paths: list[Path], height: float = 7.0) -> Any:
    """Pictures in one row, equally high: the run at a glance, for a README or a talk."""
    from matplotlib.image import imread

    pictures = [imread(path) for path in paths]
    widths = [height * p.shape[1] / p.shape[0] for p in pictures]
    with house_style():
        figure = new_figure(sum(widths), height)
        for ax, picture in zip(figure.subplots(1, len(pictures), width_ratios=widths), pictures, strict=True):
            ax.imshow(picture)
            ax.axis("off")
    return figure


def _proof(run: Run, found: Numbers) -> list[Block]:
    out: list[Block] = []
    if run.config.rounds.n_rounds and "skipped" in found["rounds"]:
        out.append(Verdict("warn", "The truncated rounds were left out.", found["rounds"]["skipped"]))
    if found["reference"] is not None:
        final, exact = run.read_draws("posterior.nc").flat, run.read_draws("reference.nc").flat
        out += [
            Text(
                "**Against exact Markov chains.** A classifier tells the amortised posterior from the exact one with accuracy "
                f"{_text(found['c2st_amortised'])}, and the final one with {_text(found['c2st_final'])}: 0.5 is no difference at all."
            ),
            rows_to_table(shift_table(final, exact, run.simulator.parameters), "The final posterior against the chains"),
            Text(found["mcmc"]["words"] + "."),
            KeyValues(_per_parameter(found["mcmc"]), "Convergence of the chains, by free parameter"),
        ]
    if run.path("weights.npy").exists():
        weights = run.read_array("weights.npy")
        figure = weights_figure(weights, pareto_k=found["importance_pareto_k"])
        caption = "Importance weights of the network's draws under the exact likelihood; a network without error has equal weights."
        out.append(_draw(run, figure, "weights", caption, "histogram and cumulative share of the importance weights"))
    if run.path("figures", "calibration.png").exists():
        out += _calibration(run)
    out.append(
        _figure(run, "predictive", f"Posterior predictive check, statistic: {found['predictive_statistic']}.", "predictive check", 560)
    )
    caption = "The observation among the simulations that the network has learnt from, in the network's own features."
    out.append(_figure(run, "misfit", caption, "histogram of distances with the observation marked", 720))
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
    caption = "Amortised network on held-out simulations: curves within the grey bands are those of a calibrated posterior."
    figures = [
        block
        for name, words in found["words"].items()
        for block in (_figure(run, f"calibration_{name}", TITLES[name], TITLES[name], 620), Code(words))
    ]
    left_out = (
        [Text("Left out: " + "; ".join(f"`{name}`, {why}" for name, why in found["skipped"].items()) + ".")] if found["skipped"] else []
    )
    return [
        Text(f"**Calibration of the network**, {found['n']} held-out simulations, {found['n_draws']} draws each. {found['verdict']}"),
        _figure(run, "calibration", caption, "ranks and coverage with simultaneous bands"),
        Table(header, tuple(rows), "Every test of calibration; corrected for their number (Holm)"),
        *([Text(found["likeness"])] if found["likeness"] else []),
        *left_out,
        Details("Each test: figure and words", [*figures, _figure(run, "sbc_histograms", "Ranks", "rank histograms")]),
    ]


def _per_parameter(mcmc: Numbers) -> dict[str, str]:
    names = {"autocorr_time": "autocorrelation time [steps]", "r_hat": "R-hat between groups", "r_hat_walkers": "R-hat between walkers"}
    return {words: _text(mcmc[key]) for key, words in names.items()}


def _training(run: Run) -> list[Block]:
    history = load(run.path("model.pt"), device="cpu").history
    steps = _draw(
        run, step_time_figure(history), "epoch_seconds", "Seconds per epoch: a level line is what it should be.", "seconds per epoch", 720
    )
    caption = "Loss per simulation, in nats: minus the mean log density that the network gives to the true parameters."
    return [_draw(run, loss_figure(history), "loss", caption, "training and validation loss against epoch", 820), Details("Time", [steps])]


def _literature(run: Run, found: Numbers) -> list[Block]:
    final, parameters, fits = run.read_draws("posterior.nc").flat, run.simulator.parameters, published(run)
    caption = f"Published values beside this posterior. Sources: {', '.join(dict.fromkeys(fit['source'] for fit in fits))}."
    return [
        _draw(run, comparison_figure(_sample_sets(run), parameters, fits, truth=run.truth), "published", caption, "published fits"),
        Details("Table", [rows_to_table(comparison_table(final, parameters, fits))]),
    ]


def _making(run: Run, found: Numbers) -> list[Block]:
    spent = {name: f"{value:.1f} s" for name, value in seconds(run).items()}
    return [
        KeyValues({"seed": run.config.run.seed, "device": found["device"], "threads": found["threads"], **found["versions"]}, "Versions"),
        KeyValues(spent, "Time of each stage"),
        Details("All settings", [Code(run.config.to_toml(), "config.toml: the same file gives the same numbers")]),
    ]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "not known" if value is None else f"{value:.5g}".replace("-", "−") if isinstance(value, float) else str(value)
