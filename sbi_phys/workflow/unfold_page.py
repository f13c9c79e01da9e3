"""The report page of an unfolding: data and response, unfolded spectrum, corrections, goodness of fit, toys, settings and versions."""

import numpy as np
from scipy.special import chdtrc

from sbi_phys.core.numbers import MINUS
from sbi_phys.core.types import Array
from sbi_phys.plotting.unfolding import corrections_figure, correlations_figure, flux_figure, refolded_figure
from sbi_phys.report.html import Block, Code, Details, KeyValues, Section, Table, Text, Verdict, render_report
from sbi_phys.workflow.unfold_methods import TITLES
from sbi_phys.workflow.unfold_run import UnfoldRun, deviations

__all__ = ["verdicts", "write_page"]


def write_page(run: UnfoldRun) -> None:
    """Draw the figures and write report.html."""
    m = run.measurement
    sections = [
        Section("Data and response", _data_and_response(run)),
        Section("Unfolded spectrum", _spectrum(run)),
        Section("Correction factors", _corrections(run)),
        Section("Goodness of fit and correlations", _quality(run)),
        *([Section("Tests on toys", _tests(run))] if run.validation else []),
        Section("Settings and versions", _settings(run)),
    ]
    total = sum(run.seconds.values())
    render_report(
        run.path("report.html"),
        f"{m.title}, unfolded",
        f"{int(m.counts.sum())} events in {m.counts.size} bins, {len(run.found)} methods, {total:.0f} s, seed {run.settings.seed}",
        sections,
        verdicts=verdicts(run),
        footer=f"sbi_phys {run.found['folding'].record['versions']['sbi_phys']}, seed {run.settings.seed}",
    )


def verdicts(run: UnfoldRun) -> list[Verdict]:
    """Verdicts on corrections, fit, stopping rule, agreement of the methods and tests, and methods without a result."""
    out = []
    m, away = run.measurement, deviations(run)
    if away and m.target is not None:
        low, high, tolerance = m.target
        worst, at = away["folding"]["worst"], away["folding"]["at"]
        words = (
            f"The corrections of forward folding are within {100 * worst:.2g} % of the published ones for lg(E/eV) from {low:g} to {high:g}"
        )
        detail = f"Tolerance {100 * tolerance:g} %; largest difference at lg(E/eV) = {at:.2f}."
        out.append(Verdict("good" if worst <= tolerance else "warn", words + ".", detail))
    fit = run.found["folding"].record
    p = float(chdtrc(fit["ndf"], fit["chi2"])) if fit["ndf"] > 0 else float("nan")
    words = f"The refolded flux fits the counts with chi2 = {fit['chi2']:.1f} for {fit['ndf']:.0f} degrees of freedom"
    out.append(Verdict("bad" if p < 1e-4 else "warn" if p < 0.01 else "good", f"{words}, p = {p:.2g}."))
    if "ibu" in run.found:
        n = run.found["ibu"].record["numbers"]
        words = (
            f"Iterative Bayes stopped after {n['n_iterations']} iterations. Over toys the coverage of the worst bin is "
            f"{n['coverage_worst']:.2f} (nominal 0.683), and the largest mean pull is {n['mean_pull_worst']:.2f}."
        )
        detail = (
            f"The fitted flux as prior, instead of a power law, changes a bin by at most {n['prior_spread_sigma']:.2f} standard errors."
        )
        out.append(Verdict("good" if n["rule_met"] else "warn", words, detail))
    if len(run.found) > 1:
        name, far, where = _apart(run)
        words = f"The largest difference from forward folding is {far:.1f} of the larger error ({TITLES[name]}, lg(E/eV) = {where:.2f})."
        out.append(Verdict("good" if far <= 2 else "warn", words))
    if run.validation:
        level = "good" if run.validation["passed"] else "warn"
        out.append(Verdict(level, run.validation["verdict"], f"{run.validation['n_toys']} toys of the fitted spectrum."))
    out += [Verdict("bad", f"{TITLES[name]} has no result.", words) for name, words in run.failed.items()]
    return out


def _apart(run: UnfoldRun) -> tuple[str, float, float]:
    """The method, size in errors and place of the largest difference from forward folding."""
    first = run.found["folding"]
    found = []
    for name, other in run.found.items():
        if name != "folding":
            # forward folding keeps the fluctuations of the counts, which other methods smooth: the larger error includes them
            sd = np.sqrt(np.maximum(np.diag(other.covariance), np.diag(first.covariance)))
            away = np.divide(np.abs(other.counts - first.counts), sd, out=np.zeros_like(sd), where=sd > 0)
            found.append((name, float(away.max()), float(run.measurement.centres[int(away.argmax())])))
    return max(found, key=lambda row: row[1])


def _data_and_response(run: UnfoldRun) -> list[Block]:
    m = run.measurement
    low, high = m.reco_edges[0], m.reco_edges[-1]
    out: list[Block] = [
        Text(
            f"{int(m.counts.sum())} events were measured in {m.counts.size} bins of lg(E/eV) from {low:g} to {high:g}"
            + (f" ({m.source})" if m.source else "")
            + ". The true spectrum is unfolded from them with the detector's energy resolution and efficiency.\n\n"
            f"**Migration from outside.** The true bins reach from {m.truth_edges[0]:g} to {m.truth_edges[-1]:g}, beyond the measured "
            "range on both sides. Forward folding, the Bayesian posterior, OmniFold and the flow also fit the outer bins. Iterative Bayes "
            "and Tikhonov unfold into the measured bins only; the fraction of each bin that migrates from outside is taken from the fitted "
            "flux.\n\n"
            "**Binned events.** OmniFold and the flow work on events, but the data are binned: every measured or simulated event is placed "
            "at the centre of its bin. The simulation is drawn from the response and the fitted flux."
        )
    ]
    if "ibu" in run.found:
        n, moved = run.found["ibu"].record["numbers"], run.found["ibu"].arrays["steeper_below"]
        out.append(
            Text(
                f"In the first bin {100 * n['migration_below']:.1f} % of the measured events migrate from outside the measured range. A "
                f"spectral index steeper by {n['index_below']:g} below the first bin changes the first three bins by "
                f"{_signed(100 * moved[0], 2)}, {_signed(100 * moved[1], 2)} and {_signed(100 * moved[2], 3)} %."
            )
        )
        caption = "Response matrix of the measured bins, logarithmic: probability of a measured bin given a true one; line: efficiency."
        out.append(run.figure_block("ibu_response", caption, "response matrix: a diagonal band, narrower at high energies", 560))
    return out


def _spectrum(run: UnfoldRun) -> list[Block]:
    m = run.measurement
    flux = {found.title: (run.flux(found.counts), run.flux(found.errors)) for found in run.found.values()}
    published = None
    if "flux" in m.published:
        low, high = (m.published.get(f"flux_error_{side}", np.zeros(m.counts.size)) for side in ("low", "high"))
        published = (m.published["flux"], np.stack([low, high]))
    caption = (
        "Unfolded flux times $E^3$. Below: ratio to "
        + ("the published flux (grey: its statistical errors)" if published else "forward folding")
        + "; arrows: outside the range. Errors: central 68 % of the draws for the Bayesian posterior, one standard error for the others."
    )
    figure = flux_figure(m.reco_edges, flux, published, unit=m.unit)
    return [
        run.draw(figure, "flux", caption, "flux times E cubed by method, and its ratio to the reference"),
        _flux_table(run),
        Text(
            "`spectrum.csv` has the spectrum by method and bin, `unfolding.json` all numbers and the covariances, `unfolding.nc` the draws."
        ),
    ]


def _flux_table(run: UnfoldRun) -> Table:
    m = run.measurement
    header = ["lgE", "Counts", *(found.title[0].upper() + found.title[1:] for found in run.found.values())]
    known = m.published.get("flux")
    rows = []
    for j in range(m.counts.size):
        cells = [f"{m.reco_edges[j]:.2f} to {m.reco_edges[j + 1]:.2f}", f"{m.counts[j]:.0f}"]
        for found in run.found.values():
            cells.append(_pair(found.counts[j], float(np.sqrt(found.covariance[j, j]))))
        if known is not None:
            cells.append(f"{known[j] * m.per_flux[j]:.1f}")
        rows.append(tuple(cells))
    if known is not None:
        header.append("Published")
    return Table(tuple(header), tuple(rows), "Unfolded events in each bin with standard errors (full covariance in unfolding.json)")


def _corrections(run: UnfoldRun) -> list[Block]:
    m, folded = run.measurement, run.found["folding"].arrays
    given = m.published.get("correction")
    others = {words: folded[f"correction_alternative_{i}"] for i, words in enumerate(m.alternatives)}
    figure = corrections_figure(
        m.reco_edges,
        {found.title: run.correction(name) for name, found in run.found.items()},
        given,
        others={f"forward folding {words}": value for words, value in others.items()},
        target=m.target,
    )
    caption = "Unfolded over measured counts. Above lg(E/eV) of about 19.5, methods without a parametric flux follow the fluctuations."
    out: list[Block] = [
        run.draw(figure, "corrections", caption, "correction factors against energy, and their differences from published ones")
    ]
    out += _constants(run)
    away = deviations(run)
    if given is None or m.target is None or not away:
        return out
    low, high, tolerance = m.target
    rows = [(TITLES[name], f"{100 * a['worst']:.2f} %", f"{a['at']:.2f}") for name, a in away.items()]
    out.append(
        Table(
            ("Method", "Largest difference", "At lgE"), tuple(rows), f"Differences from the published corrections, lgE {low:g} to {high:g}"
        )
    )
    out += _explained(run, given, others, tolerance)
    return out


def _constants(run: UnfoldRun) -> list[Block]:
    """Effect of the detector's constants: forward folding repeated with each of them changed in turn."""
    m, moved = run.measurement, run.found["folding"].arrays.get("variations")
    if moved is None:
        return []
    total = np.sqrt((moved**2).sum(axis=0))
    rows = [(words, *(f"{_signed(100 * v, 2)} %" for v in row[:4])) for words, row in zip(m.variations, moved, strict=True)]
    rows.append(("all, in quadrature", *(f"{100 * v:.2f} %" for v in total[:4])))
    return [
        Text(
            f"**Systematic uncertainty of the detector's constants.** Changing them by their uncertainties changes the unfolded flux by "
            f"{100 * total[0]:.1f} % in the first bin and by {100 * total[4:].max(initial=0):.2f} % at most from the fifth bin on. The "
            "errors on this page do not include it."
        ),
        Table(
            ("Variation", *(f"lgE {x:.2f}" for x in m.centres[:4])), tuple(rows), "Change of the flux by forward folding in the first bins"
        ),
    ]


def _explained(run: UnfoldRun, given: Array, others: dict[str, Array], tolerance: float) -> list[Block]:
    """Corrections in each bin by the fit, the published flux and alternative detector models."""
    m, folded = run.measurement, run.found["folding"].arrays
    columns = {"Published": given, "Fitted flux": run.correction("folding")}
    if "correction_at_start" in folded:
        columns["Published flux, folded"] = folded["correction_at_start"]
    for i, (words, value) in enumerate(others.items()):
        columns[f"Fitted flux, {words}"] = value
        if f"correction_at_start_alternative_{i}" in folded:
            columns[f"Published flux, {words}"] = folded[f"correction_at_start_alternative_{i}"]
    rows = []
    for j, x in enumerate(m.centres):
        rows.append(
            (
                f"{x:.2f}",
                *(f"{v[j]:.3f}" + ("" if v is given else f" ({_signed(100 * (v[j] / given[j] - 1), 1)} %)") for v in columns.values()),
            )
        )
    low, high, _ = m.target if m.target is not None else (-np.inf, np.inf, 0)
    inside = (m.centres > low) & (m.centres < high)
    far = {words: np.where(inside, np.abs(value / given - 1), 0.0) for words, value in others.items()}
    alternatives = "".join(
        f" Forward folding {words} differs by {100 * away.max():.2f} % at most, at lgE {m.centres[int(away.argmax())]:.2f}."
        for words, away in far.items()
    )
    off = np.abs(run.correction("folding")[inside] / given[inside] - 1) > tolerance
    return [
        Text(
            f"With forward folding, the method of the publication, {int(off.sum())} of the {int(inside.sum())} bins in this range differ "
            f"by more than {100 * tolerance:g} %.{alternatives} {m.note}".strip()
        ),
        Details("Corrections by bin", [Table(("lgE", *columns), tuple(rows), "In parentheses: difference from the published correction")]),
    ]


def _quality(run: UnfoldRun) -> list[Block]:
    m = run.measurement
    chi2 = {f.title: f"{f.record['chi2']:.1f} / {f.record['ndf']:.1f}" for f in run.found.values()}
    refolded = {found.title: found.arrays["refolded"] for found in run.found.values()}
    rows = []
    for found in run.found.values():
        used = "not known" if found.record["effective"] is None else f"{found.record['effective']:.1f}"
        ratio = found.record["chi2"] / found.record["ndf"] if found.record["ndf"] > 0 else float("nan")
        error = np.median(np.sqrt(np.diag(found.covariance)) / np.maximum(found.counts, 1e-9))
        rows.append(
            (found.title, f"{found.record['chi2']:.2f}", used, f"{found.record['ndf']:.1f}", f"{ratio:.2f}", f"{100 * error:.1f} %")
        )
    header = ("Method", "Refolded chi2", "Effective parameters", "ndf", "chi2 / ndf", "Median error")
    out: list[Block] = [
        run.draw(
            refolded_figure(m.reco_edges, m.counts, refolded, chi2),
            "refolded",
            "Pulls of the measured counts from each refolded spectrum; legend: Poisson deviance / degrees of freedom.",
            "pulls of the measured counts from the refolded ones",
        ),
        Table(header, tuple(rows), "Degrees of freedom (ndf): number of bins minus the effective number of parameters, where known"),
        run.draw(
            correlations_figure(m.reco_edges, {found.title: found.correlation for found in run.found.values()}),
            "correlations",
            "Correlation of the unfolded bins. For OmniFold and the flow it is estimated from few replicas of the data and is noisy.",
            "correlation matrices of all methods",
        ),
    ]
    captions = {
        "ibu_stopping": (
            "Iterative Bayes: coverage and mean pull of the worst bin over toys, against the number of iterations.",
            "stopping rule",
        ),
        "tikhonov_scan": (
            "Tikhonov: curvature against chi-square by regularisation strength; marked: smallest mean global correlation.",
            "scan",
        ),
        "folding_fit": ("Forward folding: fitted flux with its error, and the corrected data.", "fit"),
    }
    shown = [run.figure_block(name, *captions[name], 520) for f in run.found.values() for name in f.record["figures"] if name in captions]
    summaries: list[Block] = [Code(found.record["words"], found.title) for found in run.found.values() if found.record["words"]]
    warned = [f"- {found.title}: {text}" for found in run.found.values() for text in found.record["warnings"]]
    if warned:
        summaries.append(Text("**Warnings.**\n\n" + "\n".join(warned)))
    return [*out, Details("Regularisation and summary of each method", [*shown, *summaries])]


def _tests(run: UnfoldRun) -> list[Block]:
    found = run.validation
    rows = [
        (
            row["name"],
            f"{row['value']:.3g}" if isinstance(row["value"], float) else str(row["value"]),
            row["criterion"],
            {True: "passes", False: "fails", None: "–"}[row["passed"]],
        )
        for row in found["rows"]
    ]
    figures = [run.figure_block(name, name.removeprefix("validate_"), name.replace("_", " "), 760) for name in found["figures"]]
    return [
        Text(
            f"{found['n_toys']} toys of the fitted spectrum are folded with the response of the data and unfolded with the settings chosen "
            f"on the data. {found['verdict']}"
        ),
        Table(("Test", "Value", "Criterion", "Result"), tuple(rows), "All tests"),
        Details("Figures", figures),
        Details("Summary", [Code(found["summary"])]),
    ]


def _settings(run: UnfoldRun) -> list[Block]:
    settings = {key: value for key, value in run.identity.items() if key not in ("counts", "reco_edges", "truth_edges")}
    spent = {TITLES.get(name, name): f"{value:.1f} s" for name, value in run.seconds.items()}
    fit = run.found["folding"].record
    return [
        KeyValues({key: str(value) for key, value in settings.items()}, "Settings; the same settings reproduce the same numbers"),
        KeyValues(spent, "Time of each method"),
        KeyValues(fit["versions"], "Versions"),
    ]


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def _pair(value: float, error: float) -> str:
    digits = 1 if error < 10 else 0
    return f"{value:.{digits}f} ± {error:.{digits}f}".replace("-", MINUS)
