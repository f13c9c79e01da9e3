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
"""

import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFile:
    r"""Workers on a batch system: kind, number of jobs, and settings of dask-jobqueue's class.   Raises: SettingError.

    >>> from pathlib import Path
    >>> from sbi_phys.simulation import ClusterFile
    >>> _ = Path("slurm.toml").write_text("kind = 'slurm'\njobs = 50\n[settings]\nqueue = 'long'")
    >>> ClusterFile.read("slurm.toml")
    ClusterFile(kind='slurm', jobs=50, settings={'queue': 'long'})
    """

    kind: str
    jobs: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check names and ranges."""
        require_choice("kind", self.kind, KINDS)
        require_int("jobs", self.jobs, low=1)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a TOML file.   Raises: SettingError (missing, malformed, unknown or missing setting)."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as err:
            raise SettingError(f"{path} cannot be read: {err.strerror}; expected a TOML file that describes a cluster") from err
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
            raise SettingError(f"{path} is not TOML: {err}") from err
        require_known(str(path), values, ["kind", "jobs", "settings"])
        for name in ("kind", "jobs"):
            if name not in values:
                raise SettingError(f"{path} has no {name}; expected kind = one of {', '.join(KINDS)}, jobs = a number, and [settings]")
        return cls(**values)

    def start(self) -> Any:
        """Start dask-jobqueue's scheduler in this process; no job is submitted yet.   Raises: SettingError, SbiPhysError."""
        try:
            import dask_jobqueue
        except ImportError as err:
            raise SbiPhysError("a cluster file needs dask-jobqueue; expected `pip install sbi_phys[cluster]`") from err
        try:
            # any free port for the dashboard, so that several campaigns can run on one head node
            return getattr(dask_jobqueue, KINDS[self.kind])(**{"scheduler_options": {"dashboard_address": ":0"}, **self.settings})
        except (TypeError, ValueError) as err:
            raise SettingError(f"dask-jobqueue's {KINDS[self.kind]} does not take settings {self.settings}: {err}") from err

    def job_script(self) -> str:
        """Return the script that is submitted for each job."""
        with self.start() as cluster:
            return str(cluster.job_script())


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
