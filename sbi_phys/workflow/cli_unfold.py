"""The command `sbi-phys unfold`: unfold a measured spectrum by several methods.

sbi-phys unfold auger --out runs/unfold                                  the Auger 2020 spectrum
sbi-phys unfold package.module:Class --out runs/mine                     a measurement of your own
sbi-phys unfold --input counts.csv --resolution 0.15 --out runs/mine     counts in bins of lg(E/eV)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbi_phys.core.errors import SettingError
from sbi_phys.workflow._console import Debug, plain_errors, prepare_process

if TYPE_CHECKING:
    from sbi_phys.unfold.measurement import Measurement
    from sbi_phys.workflow.settings import UnfoldSettings
    from sbi_phys.workflow.unfold_run import UnfoldRun

__all__ = ["register"]

Problem = Annotated[str | None, typer.Argument(metavar="[PROBLEM]", help="auger, or package.module:Class; omitted with --input.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder; created if missing, continued if it exists.")]
Input = Annotated[Path | None, typer.Option("--input", metavar="FILE.csv", help="Columns lg_e_low, lg_e_high, counts.")]
Resolution = Annotated[
    str | None, typer.Option(metavar="NUMBER|FILE.csv", help="With --input: sigma(E)/E, a number or columns lg_e, sigma.")
]
Exposure = Annotated[float | None, typer.Option(help="With --input: exposure in km2 sr yr; default 1.")]
Methods = Annotated[
    str | None, typer.Option(metavar="NAME,NAME", help="Subset of folding, ibu, tikhonov, bayes, omnifold, flow; default: all.")
]
Toys = Annotated[int | None, typer.Option(help="Number of toys for the stopping rule of iterative Bayes.")]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer toys, events and replicas.")]
Seed = Annotated[int | None, typer.Option(help="Seed of all random numbers.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, or problem.KEY of the measurement; may be repeated."),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def unfold(
        problem: Problem = None,
        out: Out = Path("runs/unfold"),
        counts: Input = None,
        resolution: Resolution = None,
        exposure: Exposure = None,
        methods: Methods = None,
        toys: Toys = None,
        quick: Quick = False,
        seed: Seed = None,
        changes: Changes = None,
        debug: Debug = False,
    ) -> None:
        """Unfold a measured spectrum; auger is the 2020 spectrum of the Pierre Auger Observatory."""
        with plain_errors(debug):
            own, source = _measurement(problem, counts, resolution, exposure, changes)
            settings = unfold_settings(quick, {"n_toys": toys, "seed": seed}, changes)
            run = _work(own, out, settings, methods, source)
            _print_result(run)


def _measurement(
    problem: str | None, file: Path | None, resolution: str | None, exposure: float | None, changes: list[str] | None
) -> tuple["Measurement", dict[str, Any]]:
    """The measurement, and the arguments that define it.   Raises: SettingError, DataError, ShapeError."""
    prepare_process()
    from sbi_phys.unfold.measurement import load_measurement, read_measurement

    own = {key.removeprefix("problem."): value for key, value in _parsed(changes) if key.startswith("problem.")}
    if (problem is None) == (file is None):
        raise SettingError(
            f"problem is {problem!r} and --input is {str(file) if file else None!r}; expected one of them, e.g. unfold auger"
        )
    if problem is not None:
        if resolution is not None or exposure is not None:
            raise SettingError(f"--resolution and --exposure were given with problem {problem!r}; expected them only with --input")
        return load_measurement(problem, own), {"problem": problem, "problem_settings": own}
    if own:
        raise SettingError(f"--set problem.{next(iter(own))} was given with --input; expected it with a named problem")
    if resolution is None:
        raise SettingError("--input was given without --resolution; expected sigma(E)/E, a number or a CSV with columns lg_e, sigma")
    area = 1.0 if exposure is None else exposure
    return read_measurement(Path(str(file)), resolution, area), {"input": str(file), "resolution": resolution, "exposure": area}


def unfold_settings(quick: bool, flags: dict[str, Any], changes: list[str] | None) -> "UnfoldSettings":
    """Settings of a command: defaults, reduced by --quick, changed by --set, then by the other flags.   Raises: SettingError."""
    from sbi_phys.workflow.settings import UnfoldSettings

    settings = UnfoldSettings().quick() if quick else UnfoldSettings()
    settings = settings.override({key: value for key, value in _parsed(changes) if not key.startswith("problem.")})
    return settings.override({key: value for key, value in flags.items() if value is not None})


def _parsed(changes: list[str] | None) -> list[tuple[str, Any]]:
    from sbi_phys.workflow.settings import parse_override

    return [parse_override(text) for text in changes or ()]


def _work(measurement: "Measurement", out: Path, settings: "UnfoldSettings", methods: str | None, source: dict[str, Any]) -> "UnfoldRun":
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    from sbi_phys.core.progress import RichProgress
    from sbi_phys.workflow.unfold import unfold_spectrum
    from sbi_phys.workflow.unfold_methods import METHODS

    chosen = tuple(METHODS) if methods is None else tuple(name.strip() for name in methods.split(",") if name.strip())
    # one BLAS thread: the matrices are small, and the numbers must not depend on the number of cores
    with threadpool_limits(limits=1, user_api="blas"):
        return unfold_spectrum(measurement, out, settings, chosen, source=source, progress=RichProgress())


def _print_result(run: "UnfoldRun") -> None:
    """Print a line for each method and the verdicts; exit status 1 if a method has no result."""
    from sbi_phys.workflow.unfold_page import verdicts
    from sbi_phys.workflow.unfold_run import deviations

    away = deviations(run)
    for name, found in run.found.items():
        chi2, ndf = found.record["chi2"], found.record["ndf"]
        far = f", corrections within {100 * away[name]['worst']:.2f} % of the published (at {away[name]['at']:.2f})" if name in away else ""
        typer.echo(f"{found.title:<20} refolded chi2 / ndf = {chi2:.2f} / {ndf:.1f}{far}, {found.record['seconds']:.1f} s")
    for verdict in verdicts(run):
        typer.echo(f"{verdict.sign} {verdict.words} {verdict.detail}".rstrip())
    typer.echo(f"\nreport: {run.path('report.html')}; table: {run.path('spectrum.csv')}; total time {sum(run.seconds.values()):.0f} s")
    if run.failed:
        raise typer.Exit(1)
