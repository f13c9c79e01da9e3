"""The commands `sbi-phys store ...`: what is in a store, whether it is whole, how it is mended, merged and brought up to date.

sbi-phys store info runs/spectra --watch        how far a campaign is, from another terminal
sbi-phys store verify runs/spectra              reads everything; status 1 if anything is wrong
sbi-phys store repair runs/spectra              moves broken files aside, for simulate to make them again
sbi-phys store merge runs/a runs/b --out runs/ab
sbi-phys store upgrade runs/old
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sbi_phys.storage.info import Info

__all__ = ["register"]

Guard = Callable[[bool], AbstractContextManager[None]]

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
Folders = Annotated[list[Path], typer.Argument(metavar="STORE STORE...", help="Two stores or more.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the new store; must not be there yet.")]
Rows = Annotated[int | None, typer.Option("--shard-size", help="Rows of a shard of the new store; that of the first.")]
Watch = Annotated[bool, typer.Option("--watch", help="Again and again, until the store is complete.")]
Interval = Annotated[float, typer.Option("--interval", min=0.05, help="Seconds between looks.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def register(app: typer.Typer, guard: Guard) -> None:
    """Add the commands to the application; `guard(debug)` turns errors into one line."""
    store = typer.Typer(help="Look after simulation stores.", no_args_is_help=True, add_completion=False, rich_markup_mode=None)

    @store.command()
    def info(folder: Folder, watch: Watch = False, interval: Interval = 2.0, as_json: Json = False, debug: Debug = False) -> None:
        """Print rows, gaps, failures by reason, bytes, rate and time left; works while another process writes."""
        with guard(debug):
            from sbi_phys.storage.info import store_info, watch_store

            if not watch:
                _show(store_info(folder), as_json)
                return
            for state in watch_store(folder, interval_s=interval):
                typer.echo(json.dumps(dataclasses.asdict(state)) if as_json else state.line())
                sys.stdout.flush()

    @store.command()
    def verify(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
        """Read everything and compare it with the checksums; status 1 if a file is missing, damaged or foreign."""
        with guard(debug):
            from sbi_phys.progress import RichProgress
            from sbi_phys.storage.check import check_store

            found = check_store(folder, progress=RichProgress())
            typer.echo(json.dumps(dataclasses.asdict(found)) if as_json else found.text())
            if not found.ok:
                raise typer.Exit(1)

    @store.command()
    def repair(folder: Folder, debug: Debug = False) -> None:
        """Move broken files into the folder `broken`; the same simulate call makes these shards again."""
        with guard(debug):
            from sbi_phys.progress import RichProgress
            from sbi_phys.storage.check import ranges_text, repair_store

            done = repair_store(folder, progress=RichProgress())
            for line in (*done.notes, *(f"moved to {name}" for name in done.moved)):
                typer.echo(line)
            left = f"shards to make: {ranges_text(done.to_make)}; run simulate again" if done.to_make else "the store is complete"
            typer.echo(left)

    @store.command()
    def merge(folders: Folders, out: Out, shard_size: Rows = None, debug: Debug = False) -> None:
        """Make one store of several of the same simulator and prior."""
        with guard(debug):
            from sbi_phys.progress import RichProgress
            from sbi_phys.storage.info import store_info
            from sbi_phys.storage.merge import merge_stores

            _show(store_info(merge_stores(folders, out, shard_size=shard_size, progress=RichProgress())), False)

    @store.command()
    def upgrade(folder: Folder, debug: Debug = False) -> None:
        """Bring shards of an older schema to the present one, in place."""
        with guard(debug):
            from sbi_phys.progress import RichProgress
            from sbi_phys.storage.upgrade import upgrade_store

            typer.echo(f"{upgrade_store(folder, progress=RichProgress())} shards upgraded")

    app.add_typer(store, name="store")


def _show(state: "Info", as_json: bool) -> None:
    typer.echo(json.dumps(dataclasses.asdict(state), indent=1) if as_json else state.text())
