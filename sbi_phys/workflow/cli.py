"""The command line `sbi-phys`: every command works on one run folder and takes a TOML file, flags, or both.

sbi-phys demo --out runs/demo              inference of cosmic-ray sources from the Auger data
sbi-phys train run.toml --out runs/mine    all stages up to the training, with your settings
sbi-phys report --out runs/mine            all stages that have not run yet, and the report

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
from sbi_phys.workflow.cli_simulator import register as register_simulator
from sbi_phys.workflow.cli_store import array_job
from sbi_phys.workflow.cli_store import register as register_store
from sbi_phys.workflow.cli_unfold import register as register_unfold

if TYPE_CHECKING:
    from sbi_phys.workflow.settings import Config
    from sbi_phys.workflow.stages import Run

__all__ = ["app", "main"]

_HELP = "Simulation-based inference with calibration tests. Every command works on one run folder and takes a TOML file, flags, or both."
app = typer.Typer(help=_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Settings file; default: config.toml of the run folder.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder; created if missing, continued if it exists.")]
Simulator = Annotated[str | None, typer.Option(help="Simulator as package.module:Class.")]
Number = Annotated[int | None, typer.Option("--n", help="Number of simulations with parameters from the prior.")]
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
        _run(path, out, flags, changes, quick, "report")


# command -> the stage it runs up to, and its help; all take the same file and flags
_COMMANDS = {
    "simulate": ("simulate", "Simulate with parameters drawn from the prior; write the store of the run folder."),
    "train": ("train", "Train the amortised network, after missing simulations."),
    "infer": ("compare", "Infer the parameters from the observation: amortised, in rounds, refined, and by exact MCMC."),
    "calibrate": ("calibrate", "Run all calibration tests of the amortised network on held-out simulations."),
    "report": ("report", "Run the missing stages and write summary.json and report.html."),
}


def _stage_command(
    context: typer.Context,
    config: ConfigFile = None,
    out: Out = Path("runs/run"),
    simulator: Simulator = None,
    n: Number = None,
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
    debug: Debug = False,
) -> None:
    flags = {"simulator.spec": simulator, "simulate.n": n, "run.seed": seed, "run.device": device, "run.workers": workers}
    flags |= {"run.scheduler": scheduler, "run.cluster": cluster}
    until, _ = _COMMANDS[str(context.info_name)]
    with plain_errors(debug):
        until = _by_method(str(context.info_name), until, method)
        _run(config, out, flags, changes, quick, until, shards)
        if until == "calibrate":
            _report_calibration(out, strict)
        elif strict:
            raise SettingError(f"--strict was given to {until}; expected it only with calibrate")


def _by_method(command: str, until: str, method: str | None) -> str:
    """The stage up to which a command runs with --method; nle and nre have separate stages.   Raises: SettingError."""
    from sbi_phys.core.checks import require_choice

    if method is None or require_choice("--method", method, ("npe", "nle", "nre")) == "npe":
        return until
    if command not in ("train", "infer"):
        raise SettingError(f"--method {method} was given to {command}; expected it with train or infer")
    return f"{command}_{method}"


def _report_calibration(out: Path, strict: bool) -> None:
    """Print the result of the tests; with --strict, exit with status 3 if one of them fails."""
    import json

    found = json.loads((out / "calibration.json").read_text(encoding="utf-8")) if (out / "calibration.json").is_file() else None
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
    path: Path | None, out: Path, flags: dict[str, Any], changes: list[str] | None, quick: bool, until: str, shards: str | None = None
) -> None:
    prepare_process()
    # heavy imports are delayed, so that --help and errors of the command line are immediate
    from sbi_phys.core.progress import RichProgress
    from sbi_phys.training.ranks import started_by_torchrun
    from sbi_phys.workflow.stages import run_stages, train_distributed

    config = settings(path, out, flags, changes, quick)
    if shards is not None:
        array_job(config, out, shards, until)
        return
    if started_by_torchrun():
        train_distributed(config, out, until, progress=RichProgress())
        return
    # a learned likelihood or ratio is compared with the other posteriors of the folder
    stages = [until, "methods"] if until in ("infer_nle", "infer_nre") else [until]
    _print_result(run_stages(config, out, stages, progress=RichProgress()), until)


def settings(path: Path | None, out: Path, flags: dict[str, Any], changes: list[str] | None, quick: bool) -> "Config":
    """The settings of a command: the file or that of the run folder, reduced by --quick, changed by --set, then by the other flags.

    Raises: SettingError.
    """
    from sbi_phys.workflow.settings import Config, parse_override

    own = out / "config.toml"
    if path is not None:
        config = Config.read(path)
    elif own.is_file():
        config = Config.read(own)
    elif flags.get("simulator.spec"):
        config = Config()
    else:
        raise SettingError(f"no settings: {out} is not a run folder; expected a CONFIG.toml or --simulator package.module:Class")
    config = config.quick() if quick else config
    config = config.override(dict(parse_override(text) for text in changes or ()))
    return config.override({key: value for key, value in flags.items() if value is not None})


def _print_result(run: "Run", until: str) -> None:
    if until in ("infer_nle", "infer_nre"):
        typer.echo(run.numbers(until)["words"])
        typer.echo(f"draws: {run.path(f'posterior_{until[-3:]}.nc')}; sbi-phys report compares them with the other methods")
        return
    if until != "report":
        typer.echo(f"done: {run.folder}")
        return
    import json

    from sbi_phys.workflow.inference_page import verdicts

    found = json.loads(run.path("summary.json").read_text(encoding="utf-8"))
    for verdict in verdicts(found):
        typer.echo(f"{verdict.sign} {verdict.words} {verdict.detail}")
    typer.echo(f"\nreport: {run.path('report.html')}; numbers: {run.path('summary.json')}; total time {found['seconds']['total']:.0f} s")


register_limits(app)
register_unfold(app)
register_store(app)
register_simulator(app)

if __name__ == "__main__":
    main()
