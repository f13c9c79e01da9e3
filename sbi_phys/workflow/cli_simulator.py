"""The command `sbi-phys check`: what would make the simulations of a simulator wrong, not reproducible, lossy or slow.

sbi-phys check my_module:MySimulator
sbi-phys check my_module:MySimulator --set tau=2.5 --n 5000 --json
"""

import json
from typing import Annotated, Any

import typer

from sbi_phys.workflow._console import Debug, plain_errors, prepare_process

__all__ = ["register"]

Spec = Annotated[str, typer.Argument(metavar="MODULE:CLASS", help="Simulator as package.module:Class.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of the simulator; may be repeated.")]
Number = Annotated[int, typer.Option("--n", min=2, help="Rows of a run.")]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Seconds = Annotated[float, typer.Option("--seconds", help="After this time no further test begins.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def check(
        spec: Spec,
        changes: Settings = None,
        n: Number = 1000,
        seed: Seed = 0,
        seconds: Seconds = 60.0,
        as_json: Json = False,
        debug: Debug = False,
    ) -> None:
        """Run a simulator on draws of its prior and report faults; exit status 1 if there are errors."""
        with plain_errors(debug):
            prepare_process()
            from sbi_phys.simulation.inspection import inspect_simulator
            from sbi_phys.simulation.protocol import load_simulator
            from sbi_phys.workflow.settings import parse_override

            settings: dict[str, Any] = dict(parse_override(change) for change in changes or ())
            found = inspect_simulator(load_simulator(spec, settings), n=n, seed=seed, max_seconds=seconds)
            typer.echo(json.dumps(found.to_dict()) if as_json else found.summary())
            if not found.ok:
                raise typer.Exit(1)
