"""What the commands of `sbi-phys` share: errors as one line, and the preparation of the process before heavy imports."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from sbi_phys.core.errors import SbiPhysError

__all__ = ["Debug", "plain_errors", "prepare_process"]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Turn an error of this package into one line and status 1, and Ctrl-C into advice and status 130."""
    try:
        yield
    except SbiPhysError as err:
        if debug:
            raise
        typer.echo(f"sbi-phys: {type(err).__name__}: {err}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        command = " ".join(["sbi-phys", *sys.argv[1:]])
        typer.echo(f"\nstopped; finished stages are kept, and the same command continues from there:\n  {command}", err=True)
        raise typer.Exit(130) from None


def prepare_process() -> None:
    """Set what must be set before torch is imported, and make modules of the working directory importable."""
    # threads that wait should sleep: busy waiting slows a training step thirty-fold on a machine that has other work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # a console script does not search the working directory, where the user's simulator is
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
