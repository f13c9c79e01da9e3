"""Sections of the page on learned likelihoods and ratios beside the posterior, and on confidence sets; empty where neither was run."""

import json
from typing import Any

from sbi_phys.core.numbers import format_interval
from sbi_phys.report.html import Block, Code, Details, FigureBlock, Section, Text
from sbi_phys.report.tables import Table
from sbi_phys.workflow.likelihoods import TITLES
from sbi_phys.workflow.run import Run

__all__ = ["limits_of", "methods_of", "sections"]


def sections(run: Run) -> list[Section]:
    """Sections for what was run."""
    out = []
    if found := methods_of(run):
        out.append(Section("Posterior, likelihood and ratio", _methods(run, found)))
    if limits := limits_of(run):
        out.append(Section("Confidence sets", [block for one in limits for block in _limits(run, one)]))
    return out


def methods_of(run: Run) -> dict[str, Any] | None:
    """Numbers of stage `methods`, None where it was not run."""
    return run.numbers("methods") or None


def limits_of(run: Run) -> list[dict[str, Any]]:
    """What `sbi-phys limits` has left in the folder."""
    path = run.path("limits.json")
    return list(json.loads(path.read_text(encoding="utf-8"))["limits"]) if path.is_file() else []


def _figure(run: Run, name: str, caption: str, alt: str, width: int | None = None) -> FigureBlock:
    return FigureBlock(run.path("figures", f"{name}.png"), caption, alt, pdf=f"figures/{name}.pdf", max_width=width)


def _methods(run: Run, found: dict[str, Any]) -> list[Block]:
    parameters = run.simulator.parameters
    shown = list(parameters)[:2]  # those of the figure; the others are in summary.json
    ran = [m for m in TITLES if m in found]
    rows = [_row(TITLES[m], found[m], shown) for m in ran]
    if found["exact_posterior"] is not None:
        rows.append(_row(f"exact ({found['exact']})", {"posterior": found["exact_posterior"]}, shown))
    header = ("Method", *(p.label for p in shown), "C2ST", "Training [s]", "Draws [s]", "Effective draws")
    over = f"over the exact ones ({found['exact']})" if found["exact_posterior"] is not None else f"({found['exact']})"
    names = " and ".join(p.label for p in shown)
    blocks: list[Block] = [
        Text(
            "One network learns the posterior, $p(\\theta | x)$, one the likelihood, $p(x | \\theta)$, one the ratio "
            "$p(x | \\theta) / p(x)$, from the same simulations; none is refined here. A C2ST of 0.5 is no difference from the exact draws."
        ),
        _figure(run, "methods", f"{names}: regions of 68 and 95 % {over}.", "contours of the methods over the exact posterior", 640),
        Table(header, tuple(rows), "Posteriors by every method that was run: median ± standard deviation"),
    ]
    ratios = found["ratios"]
    if "skipped" in ratios:
        return [*blocks, Text(f"Learned ratios were not held against exact ones: {ratios['skipped']}.")]
    caption = (
        f"Learned against exact {ratios['what']}, {ratios['n']} held-out simulations. Reliability: among pairs for which the classifier "
        "says p, the share of joint ones should be p; bands hold 95 %."
    )
    words = [
        f"{TITLES[m]}: rms {ratios[m]['rms']:.2f} nats, mean {ratios[m]['mean']:+.2f} nats"
        + (f"\n{w}" if (w := ratios[m].get("words")) else "")
        for m in ran
        if m in ratios
    ]
    return [*blocks, _figure(run, "ratios", caption, "learned against exact log ratios"), Details("In numbers", [Code("\n".join(words))])]


def _row(title: str, one: dict[str, Any], shown: list[Any]) -> tuple[str, ...]:
    moments = [one["posterior"][p.name] for p in shown]
    parts = [format_interval(m["median"], m["median"] - m["sd"], m["median"] + m["sd"]).split(" ") for m in moments]
    words = [f"{central} ± {error.lstrip('+')}" for central, error, _ in parts]
    c2st = "–" if one.get("c2st") is None else f"{one['c2st']:.3f} ± {one['c2st_err']:.3f}"
    seconds = ["–" if one.get(key) is None else f"{one[key]:.1f}" for key in ("train_seconds", "draw_seconds")]
    effective = "–" if one.get("n_effective") is None else f"{one['n_effective']:.0f} ({one['sampler']})"
    return (title, *words, c2st, *seconds, effective)


def _limits(run: Run, one: dict[str, Any]) -> list[Block]:
    name = "_".join((*one["parameters"], one["statistic"], *(() if one["kind"] == "two-sided" else (one["kind"],))))
    labels = {p.name: p.label for p in run.simulator.parameters}
    rows = [
        (f"{100 * row['level']:.4g} %", labels[p], _ends(row["set"][p]), _ends(row["wilks"][p]),
         f"{100 * row['coverage']:.1f} ± {100 * row['coverage_error']:.1f} %", f"{100 * row['wilks_coverage']:.1f} %")
        for row in one["levels"] for p in one["parameters"]
    ]  # fmt: skip
    rest = "" if one["nuisances"] == "none" else f" Other parameters: {one['nuisances']}."
    head = (
        f"**{one['title']}**, {one['kind']}, critical values from {one['n_simulations']} new simulations, a quarter of them for coverage."
    )
    value = f" The p-value of {one['value']['at']:g} is {one['value']['pvalue']:.3g}." if "value" in one else ""
    return [
        Text(head + rest + value),
        Table(("Level", "Parameter", "Set", "Wilks", "Coverage", "Wilks' coverage"), tuple(rows), "Sets of the observation"),
        _figure(run, f"limits_{name}", "Where the statistic lies below its critical value, theta is in the set.", "confidence sets", 620),
        _figure(run, f"coverage_{name}", "Coverage over theta, of these sets and of Wilks'.", "coverage maps with their error"),
    ]


def _ends(ends: list[float | None] | None) -> str:
    if ends is None:
        return "empty"
    low, high = ("−∞" if ends[0] is None else f"{ends[0]:.4g}", "∞" if ends[1] is None else f"{ends[1]:.4g}")
    return f"{low} to {high}".replace("-", "−")
