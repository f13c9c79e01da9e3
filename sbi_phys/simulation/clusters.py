r"""Executors on clusters: a running Dask scheduler, or workers that dask-jobqueue starts on HTCondor, Slurm and other batch systems.

    with cluster_executor(scheduler="tcp://head:8786") as (executor, n_workers):
        sp.simulate(simulator, 10**7, "/shared/spectra", executor=executor, workers=n_workers)

The workers import the simulator's module. Workers with access to the store's folder, under the same path, write the shards themselves;
the others send them back. Workers that start later, as jobs of a batch system do, receive work when they start.

A cluster file is TOML with `kind`, the number of `jobs`, and the settings of dask-jobqueue's class for that kind.

    kind = "slurm"
    jobs = 50
    [settings]
    queue = "long"
    cores = 8
    memory = "16 GB"
    walltime = "12:00:00"

**Who may connect.** A Dask scheduler runs any code that a client sends it. The scheduler that a cluster file starts accepts TLS connections
alone, from holders of a certificate that is made for this campaign: other users of the network can neither submit work, read or change
what is sent, nor join as workers. Key and certificate lie in a folder of mode 0700 in `shared_temp_directory` (default: the working
directory), where the jobs read them, until the campaign ends: whoever can read the user's files, as an administrator can, is not kept
out. The dashboard listens on 127.0.0.1 alone. `encrypted = false` in the cluster file means plain TCP on all addresses without a
password. For a scheduler that runs already, given by its address, its own configuration applies (distributed.comm.tls of Dask,
tls://host:port).

**What enters the job script.** Values of `[settings]` that would be more than one line, and characters that a shell interprets in values
that become the worker's command line, are refused. `job_script_prologue` is a list of shell commands by definition: use cluster files of
people whom you would let run commands.
"""

import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sbi_phys.core.checks import require_choice, require_int, require_known
from sbi_phys.core.errors import SbiPhysError, SettingError

__all__ = ["KINDS", "ClusterFile", "cluster_executor"]

# the class of dask-jobqueue for each kind
KINDS = {
    "htcondor": "HTCondorCluster",
    "lsf": "LSFCluster",
    "oar": "OARCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "slurm": "SLURMCluster",
}
_PATIENCE_S = 60.0
_DASHBOARD = "127.0.0.1:0"  # any free port, so that several campaigns can run on one head node
# Settings that become words of the worker's command line, which a shell reads; environment variables are allowed, as in $TMPDIR.
_WORDS = (
    "death_timeout",
    "interface",
    "local_directory",
    "protocol",
    "python",
    "shared_temp_directory",
    "worker_command",
    "worker_extra_args",
)
_WORD = re.compile(r"(?:[\w@%+=:,./~-]|\$\w+|\$\{\w+\})*")
_ROLES = ("client", "scheduler", "worker")
_CODE = ("env_extra", "job_script_prologue")
_INTERNAL = ("asynchronous", "job_cls", "loop", "scheduler_cls", "security")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFile:
    r"""Workers on a batch system: kind, number of jobs, and settings of dask-jobqueue's class.   Raises: SettingError.

    Args: encrypted: whether the scheduler accepts TLS connections with the certificate of this campaign alone.

    >>> from pathlib import Path
    >>> from sbi_phys.simulation import ClusterFile
    >>> _ = Path("slurm.toml").write_text("kind = 'slurm'\njobs = 50\n[settings]\nqueue = 'long'")
    >>> ClusterFile.read("slurm.toml")
    ClusterFile(kind='slurm', jobs=50, settings={'queue': 'long'}, encrypted=True)
    """

    kind: str
    jobs: int
    settings: dict[str, Any] = field(default_factory=dict)
    encrypted: bool = True

    def __post_init__(self) -> None:
        """Check names, ranges, and what would enter the job script."""
        require_choice("kind", self.kind, KINDS)
        require_int("jobs", self.jobs, low=1)
        if not isinstance(self.encrypted, bool):
            raise SettingError(f"encrypted is {self.encrypted!r}; expected true or false")
        if not isinstance(self.settings, dict):
            raise SettingError(f"settings is {self.settings!r}; expected a table of dask-jobqueue's settings")
        for name, value in self.settings.items():
            if name in _INTERNAL:
                raise SettingError(f"settings has {name}, which a cluster file cannot set; expected settings of the batch system")
            if name not in _CODE:
                _check_text(f"settings.{name}", value, name in _WORDS)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a TOML file.   Raises: SettingError (missing, malformed, unknown or missing setting)."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as err:
            raise SettingError(f"{path} cannot be read: {err.strerror}; expected a TOML file that describes a cluster") from err
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
            raise SettingError(f"{path} is not TOML: {err}") from err
        require_known(str(path), values, ["kind", "jobs", "settings", "encrypted"])
        for name in ("kind", "jobs"):
            if name not in values:
                raise SettingError(f"{path} has no {name}; expected kind = one of {', '.join(KINDS)}, jobs = a number, and [settings]")
        return cls(**values)

    @contextmanager
    def start(self) -> Iterator[Any]:
        """Run dask-jobqueue's scheduler in this process; no job is submitted yet.   Raises: SettingError, SbiPhysError (no package)."""
        try:
            import dask_jobqueue
        except ImportError as err:
            raise SbiPhysError("a cluster file needs dask-jobqueue; expected `pip install sbi_phys[cluster]`") from err
        options: dict[str, Any] = {**self.settings}
        options["scheduler_options"] = {"dashboard_address": _DASHBOARD, **options.get("scheduler_options", {})}
        with _certificate(options.get("shared_temp_directory", ".")) if self.encrypted else nullcontext() as security:
            if security is not None:
                options["security"] = security
            try:
                cluster = getattr(dask_jobqueue, KINDS[self.kind])(**options)
            except (TypeError, ValueError, OSError) as err:
                raise SettingError(f"dask-jobqueue's {KINDS[self.kind]} does not take settings {self.settings}: {err}") from err
            with cluster:
                yield cluster

    def job_script(self) -> str:
        """Return the script that is submitted for each job."""
        with self.start() as cluster:
            return str(cluster.job_script())


def _check_text(name: str, value: Any, word: bool) -> None:
    """Refuse text that is more than one line, and, in a word of a command line, characters that a shell interprets."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(name, key, word)
            _check_text(f"{name}.{key}", item, word)
    elif isinstance(value, list):
        for item in value:
            _check_text(name, item, word)
    elif isinstance(value, str):
        if not value.isprintable():
            raise SettingError(f"{name} has {value!r}; expected one line of printable characters, because it enters the job script")
        if word and not _WORD.fullmatch(value):
            raise SettingError(
                f"{name} has {value!r}; expected letters, digits, @ % + = : , . / ~ - _ and variables such as $TMPDIR, because it enters "
                "the command line of the workers"
            )


@contextmanager
def _certificate(shared: str) -> Iterator[Any]:
    """Files of a key and a certificate for one campaign, in a private folder within `shared`.   Raises: SbiPhysError, SettingError."""
    from distributed.security import Security

    try:
        made = Security.temporary()
    except ImportError as err:
        raise SbiPhysError(
            "the certificate of an encrypted cluster needs the package cryptography; expected `pip install sbi_phys[cluster]`, or "
            "encrypted = false in the cluster file, which lets everybody on the network run code in your name"
        ) from err
    where = Path(os.path.expandvars(shared)).expanduser().resolve()
    try:
        folder = tempfile.TemporaryDirectory(prefix=".sbi_phys_tls_", dir=where)  # of mode 0700
    except OSError as err:
        raise SettingError(f"shared_temp_directory {str(where)!r} cannot be used: {err.strerror}; expected a writable folder") from err
    with folder as private:
        key, certificate = Path(private, "key.pem"), Path(private, "certificate.pem")
        for path, text in ((key, made.tls_client_key), (certificate, made.tls_client_cert)):
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(text)
        roles = {f"tls_{role}_{part}": str(path) for role in _ROLES for part, path in (("key", key), ("cert", certificate))}
        yield Security(require_encryption=True, tls_ca_file=str(certificate), **roles)


@contextmanager
def cluster_executor(
    *, scheduler: str = "", cluster: str | Path | ClusterFile = "", say: Callable[[str], object] | None = None
) -> Iterator[tuple[Executor | None, int | None]]:
    """Yield an executor over Dask's workers and their number, or (None, None) if no cluster is given.

    Args: scheduler: address such as tcp://host:8786. cluster: a ClusterFile or its path; its jobs are submitted, and cancelled at the
    end. say: function that receives the dashboard's address.
    Raises: SettingError (both are given, an unreachable scheduler, no worker within a minute), SbiPhysError (Dask is not installed).

    >>> from sbi_phys.simulation import cluster_executor
    >>> with cluster_executor() as (executor, n_workers):  # without a cluster: the defaults of `simulate`
    ...     print(executor, n_workers)
    None None
    """
    if scheduler and cluster:
        raise SettingError(f"scheduler {scheduler!r} and cluster {str(cluster)!r} are both given; expected one of them")
    if not scheduler and not cluster:
        yield None, None
        return
    try:
        from distributed import Client
    except ImportError as err:
        raise SbiPhysError("a Dask scheduler needs dask[distributed]; expected `pip install sbi_phys[cluster]`") from err
    if scheduler:
        try:
            client = Client(scheduler, timeout=_PATIENCE_S / 6, set_as_default=False)
        except (OSError, ValueError, TypeError) as err:
            raise SettingError(f"scheduler {scheduler!r} cannot be reached: {str(err).splitlines()[0]}; expected tcp://host:port") from err
        with client:
            yield _executor(client, say, f"the scheduler {scheduler}")
        return
    file = cluster if isinstance(cluster, ClusterFile) else ClusterFile.read(cluster)
    with file.start() as jobs:
        jobs.scale(jobs=file.jobs)
        with Client(jobs, set_as_default=False) as client:
            yield _executor(client, say, f"{file.kind}, {file.jobs} jobs", patience=3600.0)


def _executor(client: Any, say: Callable[[str], object] | None, where: str, patience: float = _PATIENCE_S) -> tuple[Executor, int]:
    if say is not None:
        say(f"Dask's dashboard: {client.dashboard_link}")
    try:
        client.wait_for_workers(1, timeout=patience)
    except TimeoutError as err:
        raise SettingError(f"{where} has no worker after {patience:g} s; expected at least one") from err
    # pure=False, so that a shard can be submitted again after Dask gave it up
    executor: Executor = client.get_executor(pure=False)
    return executor, sum(client.nthreads().values())
