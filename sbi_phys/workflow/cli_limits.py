"""The command `sbi-phys limits`: confidence sets with frequentist coverage, for counts and for a trained run.

sbi-phys limits counting --n 3 --background 1.2 --level 0.9          Feldman-Cousins, Wilks and CLs
sbi-phys limits counting --n 12 --off 20 --tau 4                     background from off-source counts
sbi-phys limits runs/mine --parameter gamma                          WALDO with the posterior of the run
sbi-phys limits runs/mine --parameter gamma --statistic nre          the learned ratio; also nle, exact
sbi-phys limits runs/mine --parameter gamma --parameter lg_rcut      joint confidence set
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sbi_phys.core.errors import SettingError
from sbi_phys.workflow._console import Debug, plain_errors, prepare_process

__all__ = ["counting", "register"]

What = Annotated[str, typer.Argument(metavar="counting|RUN", help="counting, or the folder of a trained run (RUN).")]
Levels = Annotated[
    list[float] | None, typer.Option("--level", help="Confidence level; may be repeated. Default: 0.9 for counting, 0.683 and 0.9 for RUN.")
]
Kind = Annotated[str | None, typer.Option(help="interval (default), upper or lower.")]
Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")]
Number = Annotated[
    int | None, typer.Option("--n", help="counting: counts on source. RUN: simulations for critical values and coverage (default 5000).")
]
Background = Annotated[float | None, typer.Option(help="counting: known background.")]
Off = Annotated[int | None, typer.Option(help="counting: counts off source, in place of --background.")]
Tau = Annotated[float | None, typer.Option(help="counting: exposure off source over exposure on source.")]
Parameters = Annotated[list[str] | None, typer.Option("--parameter", help="RUN: parameter of interest; twice for a joint set.")]
Statistic = Annotated[str | None, typer.Option(help="RUN: waldo (default), nre, nle or exact.")]
Value = Annotated[float | None, typer.Option(help="RUN: also compute the p-value of this parameter value.")]
Physical = Annotated[str | None, typer.Option(help="RUN: ends of the range that are physical bounds: none, low, high or both.")]
Open = Annotated[bool, typer.Option("--open", help="RUN: an end of the set at an end of the simulated range becomes infinite.")]
Critical = Annotated[str | None, typer.Option(help="RUN: regression model of the critical values: auto, splines-6, boosting, ...")]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def limits(
        what: What,
        n: Number = None,
        levels: Levels = None,
        kind: Kind = None,
        background: Background = None,
        off: Off = None,
        tau: Tau = None,
        parameters: Parameters = None,
        statistic: Statistic = None,
        value: Value = None,
        physical: Physical = None,
        open_ends: Open = False,
        critical: Critical = None,
        as_json: Json = False,
        debug: Debug = False,
    ) -> None:
        """Compute limits and intervals with frequentist coverage for a counting experiment or the parameters of a run."""
        with plain_errors(debug):
            of_counts = {"--background": background, "--off": off, "--tau": tau}
            of_a_run = {"--parameter": parameters, "--statistic": statistic, "--value": value, "--physical": physical}
            of_a_run |= {"--open": open_ends or None, "--critical": critical}
            _refuse(what, of_a_run if what == "counting" else of_counts)
            if what == "counting":
                rows = counting(n, levels or [0.9], kind or "interval", background, off, tau)
                typer.echo(json.dumps(rows) if as_json else _counting_text(rows))
                return
            _of_a_run(
                Path(what),
                {
                    "parameters": tuple(parameters or ()), "statistic": statistic, "levels": tuple(levels) if levels else None,
                    "kind": kind, "n": n, "physical": physical, "open_ends": open_ends or None, "value": value, "critical": critical,
                },
                as_json,
            )  # fmt: skip


def _refuse(what: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            belongs = "the folder of a run" if what == "counting" else "limits counting"
            raise SettingError(f"{name} was given with {what}; expected it with {belongs}")


def counting(n: int | None, levels: list[float], kind: str, background: float | None, off: int | None, tau: float | None) -> dict[str, Any]:
    """Intervals of a counting experiment by all methods that apply, as JSON values.   Raises: SettingError, DataError."""
    from sbi_phys.core.checks import require_choice

    require_choice("--kind", kind, ("interval", "upper", "lower"))
    if n is None:
        raise SettingError("--n is not given; expected the counts on source")
    if (background is None) == (off is None) or (off is None) != (tau is None):
        raise SettingError("expected --background for a known background, or --off and --tau for one from off-source counts")
    asked = {"n": n} | ({"background": background} if off is None else {"off": off, "tau": tau})
    intervals = []
    for level in levels:
        found = _known(n, float(background or 0.0), level, kind) if off is None else _counted(n, off, float(tau or 0.0), level, kind)
        intervals += [{"level": level, "method": method, "low": low, "high": high} for method, (low, high) in found.items()]
    out: dict[str, Any] = asked | {"kind": kind, "intervals": [_plain(row) for row in intervals]}
    if off is not None:
        from sbi_phys.confidence import li_ma

        out["significance"] = li_ma(n, off, float(tau or 0.0))
    elif background is not None:
        out["sensitivity"] = [{"level": level, "high": _sensitivity(background, level)} for level in levels]
    return out


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value == float("inf") else value for key, value in row.items()}


def _known(n: int, background: float, level: float, kind: str) -> dict[str, tuple[float, float]]:
    from sbi_phys.confidence import counting_cls, counting_wilks, feldman_cousins

    low, high = feldman_cousins(n, background, level)
    ends = float(low), float(high)
    if kind == "upper":
        cls = {"CLs": (0.0, counting_cls(n, background, level))}
        return {"Feldman-Cousins, upper end": (0.0, ends[1]), **cls, "Wilks": counting_wilks(n, background, level, kind="upper")}
    if kind == "lower":
        return {"Feldman-Cousins, lower end": (ends[0], float("inf")), "Wilks": counting_wilks(n, background, level, kind="lower")}
    return {"Feldman-Cousins": ends, "Wilks": counting_wilks(n, background, level)}


def _counted(n: int, off: int, tau: float, level: float, kind: str) -> dict[str, tuple[float, float]]:
    from sbi_phys.confidence import on_off, on_off_wilks

    return {"profile construction": on_off(n, off, tau, level, kind=kind), "Wilks": on_off_wilks(n, off, tau, level, kind=kind)}


def _sensitivity(background: float, level: float) -> float:
    """Mean upper end without signal, as Feldman and Cousins define it."""
    import numpy as np
    from scipy.stats import poisson

    from sbi_phys.confidence import feldman_cousins

    k = np.arange(int(poisson.ppf(1 - 1e-6, background)) + 2)
    # without the correction for monotone ends, which takes seconds and changes the mean by less than a per cent
    return float(poisson.pmf(k, background) @ np.asarray(feldman_cousins(k, background, level, monotone=False)[1]))


def _counting_text(found: dict[str, Any]) -> str:
    where = f"b = {found['background']:g}" if "background" in found else f"n_off = {found['off']}, tau = {found['tau']:g}"
    lines = [f"n = {found['n']}, {where}: {found['kind']} for the signal counts"]
    for row in found["intervals"]:
        low, high = f"{row['low']:.3f}", "inf" if row["high"] is None else f"{row['high']:.3f}"
        lines.append(f"  {100 * row['level']:>5.4g} %  {row['method']:<27} [{low}, {high}]")
    if "significance" in found:
        lines.append(f"  Li-Ma significance {found['significance']:.2f} sd")
    for row in found.get("sensitivity", ()):
        lines.append(f"  sensitivity: mean {100 * row['level']:.4g} % upper end without signal {row['high']:.3f}")
    return "\n".join(lines)


def _of_a_run(folder: Path, asked: dict[str, Any], as_json: bool) -> None:
    prepare_process()
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    from sbi_phys.core.progress import RichProgress
    from sbi_phys.workflow.limits import find_limits
    from sbi_phys.workflow.run import Run, null_safe
    from sbi_phys.workflow.settings import LimitsSettings

    run = Run.open(folder, RichProgress())
    if not asked["parameters"]:
        raise SettingError(f"--parameter is not given; expected one of {', '.join(run.names)}")
    settings = LimitsSettings(**{key: value for key, value in asked.items() if value is not None})
    with threadpool_limits(limits=1, user_api="blas"):
        found = find_limits(run, settings).numbers
    typer.echo(json.dumps(null_safe(found)) if as_json else _run_text(found))
    if not as_json:
        typer.echo(f"\ntable: {run.path('limits.csv')}; figure: {run.path('figures', f'limits_{settings.name}.png')}")


def _run_text(found: dict[str, Any]) -> str:
    lines = [f"{', '.join(found['parameters'])}: {found['title']}, {found['kind']}, {found['n_simulations']} simulations"]
    if found["nuisances"] != "none":
        lines[0] += f", the other parameters {found['nuisances']}"
    for row in found["levels"]:
        for name in found["parameters"]:
            own, wilks = (_ends(row[key][name]) for key in ("set", "wilks"))
            lines.append(f"  {100 * row['level']:>5.4g} %  {name:<12} {own:<24} Wilks {wilks}")
        spread = f"{100 * row['coverage']:.1f} +- {100 * row['coverage_error']:.1f} %"
        lines.append(f"         coverage {spread} (p = {row['coverage_pvalue']:.2g}), Wilks {100 * row['wilks_coverage']:.1f} %")
    if "value" in found:
        lines.append(f"  p-value of {found['parameters'][0]} = {found['value']['at']:g}: {found['value']['pvalue']:.3g}")
    return "\n".join(lines)


def _ends(ends: list[float] | None) -> str:
    return "empty" if ends is None else f"[{ends[0]:.4g}, {ends[1]:.4g}]"
