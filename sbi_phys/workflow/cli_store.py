"""The commands `sbi-phys store ...`: inspect, check, repair and merge simulation stores.

sbi-phys store info runs/spectra --watch        progress of a running campaign
sbi-phys store verify runs/spectra              checks all files; exit status 1 for an error
sbi-phys store repair runs/spectra              moves damaged files away; simulate writes them again
sbi-phys store merge runs/a runs/b --out runs/ab

This module also has `sbi-phys simulate --shards 0:64`, one of several array jobs that write to the same folder.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbi_phys.core.errors import RunFolderError, SettingError
from sbi_phys.workflow._console import Debug, plain_errors

if TYPE_CHECKING:
    from sbi_phys.store.info import Info
    from sbi_phys.workflow.settings import Config
    from sbi_phys.workflow.stages import Run

__all__ = ["array_job", "register"]

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
Folders = Annotated[list[Path], typer.Argument(metavar="STORE STORE...", help="At least two stores.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the new store; must not exist.")]
Rows = Annotated[int | None, typer.Option("--shard-size", help="Rows per shard of the new store; default: that of the first store.")]
Watch = Annotated[bool, typer.Option("--watch", help="Repeat until the store is complete.")]
Interval = Annotated[float, typer.Option("--interval", min=0.05, help="Seconds between updates.")]
Accept = Annotated[bool, typer.Option("--accept-code-change", help="Merge rows of different code of the simulator.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def array_job(config: "Config", out: Path, shards: str, until: str) -> None:
    """Write some shards of a run's store while other jobs write others; print the numbers of written and missing shards.

    The store is that of `simulate` with these settings; later stages use it when no shard is missing.
    Raises: SettingError with another command, or for an invalid range; RunFolderError; StoreError.
    """
    from sbi_phys.core.progress import RichProgress
    from sbi_phys.simulation.campaign import simulate
    from sbi_phys.store.check import ranges_text
    from sbi_phys.store.manifest import shard_range
    from sbi_phys.store.store import Store

    where = config.run
    if until != "simulate" or where.scheduler or where.cluster:
        raise SettingError(f"--shards {shards} was given to {until}; expected it with simulate, and neither --scheduler nor --cluster")
    run = _join_run(config, out)
    settings, folder = config.simulate, run.path("simulations")
    before = set(Store(folder).missing) if (folder / "store.json").exists() else None
    store = simulate(
        run.simulator,
        settings.n,
        folder,
        seed=run.seed("simulate"),
        workers=where.workers or None,
        shard_size=settings.shard_size,
        dtype=settings.dtype,
        layout=settings.layout(),
        shards=shards,
        progress=RichProgress(),
    )
    mine, missing = shard_range(shards, store.n_shards), store.missing
    made = [i for i in mine if before is None or i in before]
    typer.echo(f"shards {mine.start}:{mine.stop} are complete: {len(made)} of {len(mine)} written by this job")
    left = f"missing of all {store.n_shards}: {ranges_text(missing)}" if missing else f"all {store.n_shards} shards are complete"
    typer.echo(f"{left}; store {folder}")


def _join_run(config: "Config", out: Path) -> "Run":
    """The run folder, created by this job or by another that started at the same time.   Raises: RunFolderError."""
    from sbi_phys.workflow.stages import Run

    for left in reversed(range(40)):
        begun = (out / "config.toml").exists()
        try:
            run = Run(out, config)
            run.begin()
            return run
        except RunFolderError:
            # another job has created the folder and is writing config.toml
            if begun or not left or not (out / "stages").is_dir():
                raise
            time.sleep(0.05)
    raise AssertionError("the last try returns or raises")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    store = typer.Typer(
        help="Inspect, check, repair and merge simulation stores.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
    )

    @store.command()
    def info(folder: Folder, watch: Watch = False, interval: Interval = 2.0, as_json: Json = False, debug: Debug = False) -> None:
        """Print rows, missing shards, failures by reason, size, rate and remaining time; also while another process writes."""
        with plain_errors(debug):
            from sbi_phys.store.info import store_info, watch_store

            if not watch:
                _show(store_info(folder), as_json)
                return
            for state in watch_store(folder, interval_s=interval):
                typer.echo(json.dumps(dataclasses.asdict(state)) if as_json else state.line())
                sys.stdout.flush()

    @store.command()
    def verify(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
        """Read all files and compare their checksums; exit status 1 if a file is missing, damaged or foreign."""
        with plain_errors(debug):
            from sbi_phys.core.progress import RichProgress
            from sbi_phys.store.check import check_store

            found = check_store(folder, progress=RichProgress())
            typer.echo(json.dumps(dataclasses.asdict(found)) if as_json else found.summary())
            if not found.ok:
                raise typer.Exit(1)

    _register_changes(store)
    app.add_typer(store, name="store")


def _register_changes(store: typer.Typer) -> None:
    """Add the commands that write."""

    @store.command()
    def repair(folder: Folder, debug: Debug = False) -> None:
        """Move damaged files into the folder `broken`; the same simulate command writes these shards again."""
        with plain_errors(debug):
            from sbi_phys.core.progress import RichProgress
            from sbi_phys.store.check import ranges_text, repair_store

            done = repair_store(folder, progress=RichProgress())
            for line in (*done.notes, *(f"moved to {name}" for name in done.moved)):
                typer.echo(line)
            left = f"shards to simulate: {ranges_text(done.to_make)}; run simulate again" if done.to_make else "the store is complete"
            typer.echo(left)

    @store.command()
    def merge(folders: Folders, out: Out, shard_size: Rows = None, accept_code_change: Accept = False, debug: Debug = False) -> None:
        """Merge stores of the same simulator and prior into a new one."""
        with plain_errors(debug):
            from sbi_phys.core.progress import RichProgress
            from sbi_phys.store.info import store_info
            from sbi_phys.store.merge import merge_stores

            merged = merge_stores(folders, out, shard_size=shard_size, accept_code_change=accept_code_change, progress=RichProgress())
            _show(store_info(merged), False)


def _show(state: "Info", as_json: bool) -> None:
    typer.echo(json.dumps(dataclasses.asdict(state), indent=1) if as_json else state.summary())
