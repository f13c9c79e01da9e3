"""Shared by the commands of `sbi-phys`: errors as one line, and the setup of the process before heavy imports."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from sbi_phys.core.errors import SbiPhysError

__all__ = ["Debug", "plain_errors", "prepare_process"]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Print an error of this package as one line with exit status 1, a warning as one line, and a hint after Ctrl-C with status 130."""
    former = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"sbi-phys: warning: {message}\n"
    try:
        yield
    except SbiPhysError as err:
        if debug:
            raise
        typer.echo(f"sbi-phys: {type(err).__name__}: {err}", err=True)
        raise typer.Exit(1) from None
    except OSError as err:  # e.g. a full or read-only disk, in a library that writes by itself
        if debug or err.filename is None:
            raise
        typer.echo(f"sbi-phys: {err.filename}: {err.strerror}; finished stages are kept, and the same command continues", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        command = " ".join(["sbi-phys", *sys.argv[1:]])
        typer.echo(f"\nstopped; finished stages are kept, and the same command continues the run:\n  {command}", err=True)
        raise typer.Exit(130) from None
    finally:
        warnings.formatwarning = former


def prepare_process() -> None:
    """Set OMP_WAIT_POLICY before torch is imported, and make modules of the working directory importable."""
    # waiting threads sleep: busy waiting slows down a training step by a factor of 30 on a machine with other load
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # a console script does not search the working directory, where the user's simulator is; last, so that a file numpy.py or
    # json.py there does not take the place of an installed module
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
