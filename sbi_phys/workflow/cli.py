"""The command line `sbi-phys`: every command works on one project folder and takes a TOML file, flags, or both.

sbi-phys demo --out runs/demo                     inference of cosmic-ray sources from the Auger data
sbi-phys new mysource                             a simulator to start from, with its settings, a test and an observation
sbi-phys train run.toml --out runs/mine           all stages up to the training, with your settings
sbi-phys infer crab.csv vela.csv --out runs/mine  the posteriors of two observations by the same network
sbi-phys train --name wide --set flow.hidden=128 --out runs/mine    another network on the same simulations
sbi-phys report --out runs/mine                   all stages that have not run yet, and the report

torchrun --nproc-per-node 2 -m sbi_phys train run.toml --out runs/mine     training on several processes or GPUs
"""

import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbi_phys.core.errors import SettingError
from sbi_phys.workflow._console import Debug, plain_errors, prepare_process
from sbi_phys.workflow.cli_limits import register as register_limits
from sbi_phys.workflow.cli_project import register as register_project
from sbi_phys.workflow.cli_simulator import register as register_simulator
from sbi_phys.workflow.cli_store import array_job
from sbi_phys.workflow.cli_store import register as register_store
from sbi_phys.workflow.cli_unfold import register as register_unfold

if TYPE_CHECKING:
    from sbi_phys.workflow.settings import Config
    from sbi_phys.workflow.stages import Run

__all__ = ["app", "main"]

_HELP = "Simulation-based inference with calibration tests. A command works on one project folder and takes a TOML file, flags, or both."
app = typer.Typer(help=_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG.toml] [OBSERVATION...]", help="Settings file, default config.toml of the folder; and, with infer "
                   "and report, observations: observed, simulated:SEED, a file, FILE#ROW, FILE#all, or a name used before."),
]  # fmt: skip
Out = Annotated[Path, typer.Option("--out", "-o", help="Project folder; created if missing, continued if it exists.")]
Simulator = Annotated[str | None, typer.Option(help="Simulator as package.module:Class.")]
Number = Annotated[int | None, typer.Option("--n", help="Number of simulations with parameters from the prior; a larger one adds some.")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a setting; may be repeated.")]
Quick = Annotated[bool, typer.Option("--quick", help="All stages at reduced size.")]
Seed = Annotated[int | None, typer.Option(help="Seed of all random numbers.")]
Device = Annotated[str | None, typer.Option(help="Device of the network: auto, cpu, cuda or cuda:N.")]
Workers = Annotated[int | None, typer.Option(help="Worker processes for the simulations; 0: one per core.")]
Scheduler = Annotated[str | None, typer.Option(help="Dask scheduler whose workers run the simulations: tcp://host:port.")]
Cluster = Annotated[str | None, typer.Option(help="TOML file of a batch system (HTCondor, Slurm, ...) whose jobs run the simulations.")]
Shards = Annotated[
    str | None,
    typer.Option(
        "--shards", metavar="START:STOP", help="With simulate: write only these shards (0:64; 3/100); other jobs write the others."
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="With calibrate: exit status 3 if a test fails.")]
Method = Annotated[str | None, typer.Option(help="With train and infer: npe (default), nle or nre.")]
Network = Annotated[str, typer.Option("--name", help="Network of this name; with train, --set changes its settings only.")]
Accept = Annotated[bool, typer.Option("--accept-code-change", help="Keep simulations although the simulator's code has changed.")]
Again = Annotated[bool, typer.Option("--new-simulations", help="Where simulator or settings have changed, keep the old simulations aside.")]


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    changes: Changes = None,
    quick: Quick = False,
    seed: Seed = None,
    device: Device = None,
    workers: Workers = None,
    debug: Debug = False,
) -> None:
    """Infer the properties of the sources of ultra-high-energy cosmic rays from the Auger data."""
    flags = {"run.seed": seed, "run.device": device, "run.workers": workers}
    with plain_errors(debug), resources.as_file(resources.files("sbi_phys.workflow") / "configs" / "demo.toml") as path:
        _run([str(path)], out, flags, changes, quick, "report")


# command -> the stage it runs up to, and its help; all take the same file and flags
_COMMANDS = {
    "simulate": ("simulate", "Simulate with parameters drawn from the prior; write the store of the run folder."),
    "train": ("train", "Train the amortised network, after missing simulations."),
    "infer": ("compare", "Infer the parameters: of the observation of the settings also by exact MCMC, of those named refined only."),
    "calibrate": ("calibrate", "Run all calibration tests of the amortised network on held-out simulations."),
    "report": ("report", "Run the missing stages and write summary.json and report.html."),
}


def _stage_command(
    context: typer.Context,
    words: Words = None,
    out: Out = Path("runs/run"),
    simulator: Simulator = None,
    n: Number = None,
    network: Network = "",
    changes: Changes = None,
    quick: Quick = False,
    seed: Seed = None,
    device: Device = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    shards: Shards = None,
    strict: Strict = False,
    method: Method = None,
    accept_code_change: Accept = False,
    new_simulations: Again = False,
    debug: Debug = False,
) -> None:
    flags = {"simulator.spec": simulator, "simulate.n": n, "run.seed": seed, "run.device": device, "run.workers": workers}
    flags |= {"run.scheduler": scheduler, "run.cluster": cluster}
    command = str(context.info_name)
    until, _ = _COMMANDS[command]
    with plain_errors(debug):
        until = _by_method(command, until, method)
        again = {"accept_code_change": accept_code_change, "new_simulations": new_simulations}
        _run(words or [], out, flags, changes, quick, until, shards, network, again, strict)


def _by_method(command: str, until: str, method: str | None) -> str:
    """The stage up to which a command runs with --method; nle and nre have separate stages.   Raises: SettingError."""
    from sbi_phys.core.checks import require_choice

    if method is None or require_choice("--method", method, ("npe", "nle", "nre")) == "npe":
        return until
    if command not in ("train", "infer"):
        raise SettingError(f"--method {method} was given to {command}; expected it with train or infer")
    return f"{command}_{method}"


def _report_calibration(run: "Run", strict: bool) -> None:
    """Print the result of the tests; with --strict, exit with status 3 if one of them fails."""
    import json

    path = run.path("calibration.json")
    found = json.loads(path.read_text(encoding="utf-8")) if run.config.calibrate.n and path.is_file() else None
    if found is None:
        typer.echo("the calibration of the network was not tested: calibrate.n = 0")
        raise typer.Exit(3 if strict else 0)
    typer.echo(found["verdict"])
    for name in found["failed"]:
        typer.echo(found["words"][name])
    if strict and not found["passed"]:
        raise typer.Exit(3)


for _name, (_, _help) in _COMMANDS.items():
    app.command(_name, help=_help)(_stage_command)


@app.command()
def info() -> None:
    """Print versions, devices and threads."""
    import torch

    from sbi_phys.workflow.run import versions

    for name, version in versions().items():
        typer.echo(f"{name:<14} {version}")
    cuda = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else "none"
    typer.echo(f"{'cuda':<14} {cuda}")
    typer.echo(f"{'cores':<14} {os.cpu_count()}")
    typer.echo(f"{'torch threads':<14} {torch.get_num_threads()}")


def main() -> None:
    """Entry point of the script `sbi-phys`."""
    app()


def _run(
    words: list[str],
    out: Path,
    flags: dict[str, Any],
    changes: list[str] | None,
    quick: bool,
    until: str,
    shards: str | None = None,
    network: str = "",
    again: dict[str, bool] | None = None,
    strict: bool = False,
) -> None:
    prepare_process()
    # heavy imports are delayed, so that --help and errors of the command line are immediate
    from sbi_phys.core.progress import RichProgress
    from sbi_phys.training.ranks import started_by_torchrun
    from sbi_phys.workflow.observations import with_observations
    from sbi_phys.workflow.stages import run_stages, train_distributed

    if strict and until != "calibrate":
        raise SettingError(f"--strict was given to {until}; expected it only with calibrate")
    files = [word for word in words if word.endswith(".toml")]
    sources = [word for word in words if not word.endswith(".toml")]
    if len(files) > 1:
        raise SettingError(f"{len(files)} settings files were given, {', '.join(files)}; expected one")
    if sources and until not in ("compare", "report", "infer_nle", "infer_nre"):
        raise SettingError(f"the observation {sources[0]!r} was given to {until}; expected it with infer or report")
    config = settings(Path(files[0]) if files else None, out, flags, changes, quick, network)
    config, observations = with_observations(config, sources)
    if shards is not None:
        array_job(config, out, shards, until)
        return
    if started_by_torchrun():
        train_distributed(config, out, until, network=network, progress=RichProgress())
        return
    # a learned likelihood or ratio is compared with the other posteriors of the folder; many observations are inferred without exact MCMC
    stages = [until, "methods"] if until in ("infer_nle", "infer_nre") else ["refine"] if until == "compare" and observations else [until]
    runs = [
        run_stages(config, out, stages, network=network, observation_name=observation, progress=RichProgress(), say=_say, **again or {})
        for observation in observations or [""]
    ]
    if until == "calibrate":
        _report_calibration(runs[0], strict)
        return
    if observations and until == "compare":
        _print_posteriors(runs)
        return
    for run in runs:
        _print_result(run, until)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def settings(path: Path | None, out: Path, flags: dict[str, Any], changes: list[str] | None, quick: bool, network: str = "") -> "Config":
    """The settings of a command: the file or that of the folder, reduced by --quick, changed by --set, then by the other flags.

    With the name of a network, --set changes the settings of this network only where they are a network's.   Raises: SettingError.
    """
    import dataclasses

    from sbi_phys.workflow.settings import NETWORK_TABLES, Config, parse_override

    own = out / "config.toml"
    if path is not None:
        config = Config.read(path)
        if own.is_file():  # named networks and observations that commands have added stay
            kept = Config.read(own)
            config = dataclasses.replace(
                config, networks=kept.networks | config.networks, observations=kept.observations | config.observations
            )
    elif own.is_file():
        config = Config.read(own)
    elif flags.get("simulator.spec"):
        config = Config()
    else:
        raise SettingError(f"no settings: {out} is not a project folder; expected a CONFIG.toml or --simulator package.module:Class")
    config = config.quick() if quick else config
    pairs = dict(parse_override(text) for text in changes or ())
    if network:
        mine = {key: pairs.pop(key) for key in list(pairs) if key.split(".")[0] in NETWORK_TABLES and "." in key}
        tables = {table: dict(values) for table, values in config.networks.get(network, {}).items()}
        for key, value in mine.items():
            table, _, rest = key.partition(".")
            tables.setdefault(table, {})[rest] = value
        config = dataclasses.replace(config, networks=config.networks | {network: tables})
    config = config.override(pairs)
    return config.override({key: value for key, value in flags.items() if value is not None})


def _print_posteriors(runs: "list[Run]") -> None:
    """A table: one row for each observation, median and 68 % interval of each parameter."""
    import numpy as np

    names = runs[0].names
    rows = [["observation", *names]]
    for run in runs:
        low, median, high = np.quantile(run.read_draws("posterior.nc").flat, [0.16, 0.5, 0.84], axis=0)
        cells = [f"{m:.4g} +{h - m:.2g} -{m - lo:.2g}" for lo, m, h in zip(low, median, high, strict=True)]
        rows.append([run.observation_name, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_result(run: "Run", until: str) -> None:
    if until in ("infer_nle", "infer_nre"):
        typer.echo(run.numbers(until)["words"])
        typer.echo(f"draws: {run.path(f'posterior_{until[-3:]}.nc')}; sbi-phys report compares them with the other methods")
        return
    if until != "report":
        typer.echo(f"done: {run.path('stages').parent if until in ('compare', 'calibrate') else run.folder}")
        return
    import json

    from sbi_phys.workflow.inference_page import verdicts

    found = json.loads(run.path("summary.json").read_text(encoding="utf-8"))
    for verdict in verdicts(found):
        typer.echo(f"{verdict.sign} {verdict.words} {verdict.detail}")
    typer.echo(f"\nreport: {run.path('report.html')}; numbers: {run.path('summary.json')}; total time {found['seconds']['total']:.0f} s")


register_project(app)
register_limits(app)
register_unfold(app)
register_store(app)
register_simulator(app)

if __name__ == "__main__":
    main()
