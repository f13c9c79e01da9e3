"""Commands around a project: begin one, print its settings.

sbi-phys new mysource                                       a simulator, its settings, a test and an observation to start from
sbi-phys config --out runs/mine                             every setting with its meaning
"""

from pathlib import Path
from typing import Annotated

import typer

from sbi_phys.workflow._console import Debug, plain_errors

__all__ = ["register"]

Out = Annotated[Path, typer.Option("--out", "-o", help="Project folder.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""

    @app.command()
    def new(
        name: Annotated[str, typer.Argument(help="Name of the folder and of the module, such as my_source.")], debug: Debug = False
    ) -> None:
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
