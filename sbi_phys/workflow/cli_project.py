"""Commands around a project: begin one, print its settings, compare networks and observations, export results.

sbi-phys new mysource                                       a simulator, its settings, a test and an observation to start from
sbi-phys config --out runs/mine                             every setting with its meaning
sbi-phys compare --out runs/mine                            networks by held-out score and calibration, observations by posterior
sbi-phys learning-curve --out runs/mine                     would more simulations help?
sbi-phys export crab --out runs/mine --format csv,corner    draws, tables and figures for other programs
sbi-phys systematics --out runs/mine                        shifts of the posterior under the simulator's variants
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbi_phys.core.errors import SettingError
from sbi_phys.workflow._console import Debug, plain_errors, prepare_process

if TYPE_CHECKING:
    from sbi_phys.workflow.settings import Config

__all__ = ["register"]

Name = Annotated[str, typer.Argument(help="Name of the folder and of the module, such as my_source.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Project folder.")]
Network = Annotated[str, typer.Option("--name", help="Network of this name; default: that of the settings' own tables.")]
Observations = Annotated[list[str] | None, typer.Argument(metavar="[OBSERVATION...]", help="As with infer; default: the settings' own.")]
Number = Annotated[int, typer.Option("--n", min=100, help="Held-out simulations.")]
Sets = Annotated[int, typer.Option("--n", min=10, help="Data sets of each variant.")]
Sizes = Annotated[str, typer.Option("--sizes", help="Numbers of simulations, as 1000,2000,4000; default: five up to all.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Trainings for each number, with other seeds.")]
Formats = Annotated[str, typer.Option("--format", help="Any of csv, npz, npy, netcdf, latex, corner, separated by commas.")]
To = Annotated[Path | None, typer.Option("--to", help="Folder of the exported files; default: export/ beside the posterior.")]
_SUFFIX = {"csv": ".csv", "npz": ".npz", "npy": ".npy", "netcdf": ".nc", "latex": ".tex", "corner": ".pdf"}


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""

    @app.command()
    def new(name: Name, debug: Debug = False) -> None:
        """Make a folder with a working simulator, its settings, a test and an observation."""
        with plain_errors(debug):
            from sbi_phys.workflow.start import new_project

            made = new_project(name)
            for path in made:
                typer.echo(f"written: {path}")
            kind = "".join(part.capitalize() for part in name.split("_"))
            typer.echo(f"\nnext:\n  cd {name}\n  sbi-phys check {name}:{kind}\n  sbi-phys report {name}.toml --out run")

    @app.command()
    def config(out: Out = Path("runs/run"), debug: Debug = False) -> None:
        """Print every setting with its meaning and its value: those of the project folder if there is one, else the defaults."""
        with plain_errors(debug):
            from sbi_phys.workflow.settings import Config, describe

            own = out / "config.toml"
            typer.echo(describe(Config.read(own) if own.is_file() else Config()), nl=False)

    _register_comparisons(app)
    _register_results(app)


def _register_comparisons(app: typer.Typer) -> None:
    @app.command()
    def compare(out: Out = Path("runs/run"), n: Number = 1000, debug: Debug = False) -> None:
        """Compare the networks by held-out log score, calibration and C2ST, and the observations by their posteriors."""
        with plain_errors(debug):
            prepare_process()
            from sbi_phys.core.progress import RichProgress
            from sbi_phys.workflow.project import compare_project

            for text in compare_project(_config(out), out, n, progress=RichProgress()):
                typer.echo(text)

    @app.command("learning-curve")
    def learning_curve(
        out: Out = Path("runs/run"), network: Network = "", sizes: Sizes = "", repeats: Repeats = 1, n: Number = 1000, debug: Debug = False
    ) -> None:
        """Train on growing parts of the simulations; say whether more simulations would help."""
        with plain_errors(debug):
            prepare_process()
            from sbi_phys.core.progress import RichProgress
            from sbi_phys.workflow.project import project_learning_curve

            try:
                numbers = [int(size) for size in sizes.split(",")] if sizes else None
            except ValueError as err:
                raise SettingError(f"--sizes is {sizes!r}; expected numbers separated by commas, as 1000,2000,4000") from err
            typer.echo(project_learning_curve(_config(out), out, network, numbers, repeats, n, progress=RichProgress()))


def _register_results(app: typer.Typer) -> None:
    @app.command()
    def export(
        observations: Observations = None,
        out: Out = Path("runs/run"),
        network: Network = "",
        formats: Formats = "csv,latex,corner",
        to: To = None,
        debug: Debug = False,
    ) -> None:
        """Write the posterior draws as CSV, NumPy or ArviZ file, the summary as LaTeX table, and the corner plot."""
        with plain_errors(debug):
            prepare_process()
            from sbi_phys.core.checks import require_choice
            from sbi_phys.core.progress import RichProgress
            from sbi_phys.workflow.observations import with_observations
            from sbi_phys.workflow.project import export_results

            kinds = [require_choice("--format", kind.strip(), tuple(_SUFFIX)) for kind in formats.split(",")]
            config, names = with_observations(_config(out), observations or [])
            for name in names or [""]:
                suffixes = {kind: _SUFFIX[kind] for kind in kinds}
                for path in export_results(config, out, network, name, suffixes, to, progress=RichProgress()):
                    typer.echo(f"written: {path}")

    @app.command()
    def systematics(
        observations: Observations = None, out: Out = Path("runs/run"), network: Network = "", n: Sets = 500, debug: Debug = False
    ) -> None:
        """Shift and widening of the posterior for data of each variant that the simulator names."""
        with plain_errors(debug):
            prepare_process()
            from sbi_phys.core.progress import RichProgress
            from sbi_phys.workflow.observations import with_observations
            from sbi_phys.workflow.project import systematic_shifts

            config, names = with_observations(_config(out), observations or [])
            for name in names or [""]:
                typer.echo(systematic_shifts(config, out, network, name, n, progress=RichProgress()))


def _config(out: Path) -> "Config":
    """The settings of a project folder.   Raises: RunFolderError."""
    from sbi_phys.workflow.run import Run

    return Run.open(out).project
