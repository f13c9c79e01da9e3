"""Settings of a run: one TOML file, one frozen dataclass per table; an unknown key is an error that suggests the right one.

    [run] title seed device workers          [rounds]    truncated sequential rounds
    [simulator] spec settings                [infer]     observation, draws, importance refinement
    [simulate] n shard_size                  [reference] exact MCMC
    [estimator] ensemble, scaling            [calibrate] held-out simulations
    [flow] [embedding] [train]               [check]     posterior predictive
                                             [methods]   learned likelihood and ratio beside the posterior

The tables [flow], [embedding] and [train] *are* the dataclasses that the networks and the training loop take.
"""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import tomli_w

from sbi_phys.core.checks import require_choice, require_int, require_known, require_number
from sbi_phys.core.errors import SettingError
from sbi_phys.estimators.density_sampling import METHODS as SAMPLERS
from sbi_phys.estimators.nre import LOSSES
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.store.layout import Layout
from sbi_phys.training.loop import TrainConfig

__all__ = [
    "CalibrateSettings", "CheckSettings", "Config", "EstimatorSettings", "InferSettings", "MethodsSettings", "ReferenceSettings",
    "RoundsSettings", "RunSettings", "SimulateSettings", "SimulatorSettings", "parse_override",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """What holds for the whole run.

    Args: title of the report. seed: every random number of the run follows from it. device: 'auto', 'cpu', 'cuda', ...
    workers: processes for the simulation, 0 for one per core (the data do not depend on it).
    memory: bytes that training rows may take, 0 for half of the machine's: more are streamed.
    scheduler: address of a Dask scheduler whose workers simulate. cluster: path of a cluster file (`clusters`) instead.
    Raises: SettingError.
    """

    title: str = "Simulation-based inference"
    seed: int = 0
    device: str = "auto"
    workers: int = 0
    memory: int = 0
    scheduler: str = ""
    cluster: str = ""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_int("run.seed", self.seed, low=0)
        require_int("run.workers", self.workers, low=0)
        require_int("run.memory", self.memory, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatorSettings:
    """Which simulator.

    Args: spec: 'package.module:Class'. settings: its keyword arguments (table [simulator.settings]).
    """

    spec: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the form of the name."""
        module, colon, name = self.spec.partition(":")
        if self.spec and not (colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise SettingError(f"simulator.spec is {self.spec!r}; expected 'package.module:Class'")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateSettings:
    """The simulations to learn from.

    Args: n: number of prior draws. shard_size: rows per file, the unit of resuming and seeding. dtype: of x on disk. dtypes: of single
    observables, by name. compression: '', 'gzip:1' to 'gzip:9' or 'lzf'.   Raises: SettingError.
    """

    n: int = 20_000
    shard_size: int = 5_000
    dtype: str = "float32"
    dtypes: dict[str, str] = field(default_factory=dict)
    compression: str = ""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_int("simulate.n", self.n, low=1)
        require_int("simulate.shard_size", self.shard_size, low=1)
        require_choice("simulate.dtype", self.dtype, ("float32", "float64"))
        self.layout()

    def layout(self) -> Layout:
        """How the rows lie in their files."""
        return Layout(compression=self.compression, dtypes=self.dtypes)


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatorSettings:
    """The neural posterior estimator.

    Args: n_ensemble: networks whose equal mixture is the density. x_transform: 'auto', 'counts' or 'real'.
    """

    n_ensemble: int = 1
    x_transform: str = "auto"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        require_int("estimator.n_ensemble", self.n_ensemble, low=1)
        require_choice("estimator.x_transform", self.x_transform, ("auto", "counts", "real"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundsSettings:
    """Truncated sequential rounds for the one observation, after the amortised network.

    Args: n_rounds: 0 for none. n: simulations per round. epsilon: probability mass that truncation may cut off.
    max_epochs: of each round's training, 0 for as many as the amortised network has.   Raises: SettingError.
    """

    n_rounds: int = 0
    n: int = 10_000
    epsilon: float = 1e-4
    max_epochs: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        require_int("rounds.n_rounds", self.n_rounds, low=0)
        require_int("rounds.n", self.n, low=20)
        require_int("rounds.max_epochs", self.max_epochs, low=0)
        require_number("rounds.epsilon", self.epsilon, low=0, high=0.1, open_low=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class InferSettings:
    """The observation and the draws from its posterior.

    Args: observation: 'observed' (the simulator's real data), 'simulated' (one draw from the prior predictive), or the
    path of a .npy, .csv or .txt file with one row. n_draws: posterior draws kept. n_refine: most proposals of the importance
    refinement with the exact likelihood, 0 for none; it stops early at an effective sample of target_ess.   Raises: SettingError.
    """

    observation: str = "observed"
    n_draws: int = 10_000
    n_refine: int = 200_000
    target_ess: int = 50_000

    def __post_init__(self) -> None:
        """Check ranges."""
        require_int("infer.n_draws", self.n_draws, low=100)
        require_int("infer.n_refine", self.n_refine, low=0)
        require_int("infer.target_ess", self.target_ess, low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceSettings:
    """The exact answer by Markov chains on the simulator's own likelihood.

    Args: method: 'emcee' or 'none'. n_walkers: at least 2 d + 2 for each of up to four independent groups.
    n_draws: effectively independent draws. max_steps: most steps of a walker.   Raises: SettingError.
    """

    method: str = "emcee"
    n_walkers: int = 64
    n_draws: int = 10_000
    max_steps: int = 50_000

    def __post_init__(self) -> None:
        """Check names and ranges."""
        require_choice("reference.method", self.method, ("emcee", "none"))
        require_int("reference.n_walkers", self.n_walkers, low=4)
        require_int("reference.n_draws", self.n_draws, low=100)
        require_int("reference.max_steps", self.max_steps, low=100)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateSettings:
    """Calibration of the amortised network on simulations that it has not seen.

    Args: n: held-out simulations, 0 for none. n_draws: posterior draws for each.   Raises: SettingError.
    """

    n: int = 500
    n_draws: int = 1_000

    def __post_init__(self) -> None:
        """Check ranges."""
        require_int("calibrate.n", self.n, low=0)
        require_int("calibrate.n_draws", self.n_draws, low=10)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckSettings:
    """Posterior predictive check.

    Args: n: predictive data sets drawn from the final posterior.   Raises: SettingError.
    """

    n: int = 2_000

    def __post_init__(self) -> None:
        """Check ranges."""
        require_int("check.n", self.n, low=10)


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodsSettings:
    """Learned likelihood (`--method nle`) and ratio (`--method nre`), their draws, and how they are compared.

    Args: nle_layers: couplings behind the conditional Gaussian; not given, none for four or more counts, else 3. nre_loss: 'carl',
    'nre-c' or 'bnre'. sampler: 'auto', 'importance', 'emcee', 'hmc' or 'grid'. n_pairs: most held-out pairs at which ratios are held
    against exact ones.   Raises: SettingError.
    """

    nle_layers: int | None = None
    nre_loss: str = "carl"
    sampler: str = "auto"
    n_pairs: int = 100

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if self.nle_layers is not None:
            require_int("methods.nle_layers", self.nle_layers, low=0)
        require_choice("methods.nre_loss", self.nre_loss, LOSSES)
        require_choice("methods.sampler", self.sampler, SAMPLERS)
        require_int("methods.n_pairs", self.n_pairs, low=0)


# What a run is cut down to by --quick: the same stages on less of everything. A smaller setting stays as it is.
_QUICK = {
    "simulate.n": 40_000,
    "estimator.n_ensemble": 1,
    "train.max_epochs": 6,
    "rounds.n_rounds": 1,
    "rounds.n": 12_000,
    "rounds.max_epochs": 12,
    "infer.n_draws": 2_000,
    "infer.n_refine": 40_000,
    "reference.n_draws": 2_000,
    "reference.max_steps": 16_000,
    "calibrate.n": 100,
    "calibrate.n_draws": 200,
    "check.n": 200,
    "methods.n_pairs": 50,
}
# Settings that change where or how fast a run is made, and not what it means: they may differ when a run is taken up again.
_FREE = ("run.device", "run.workers", "run.scheduler", "run.cluster")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run; `Config.read(path)` and `.write(path)` speak TOML.

    Raises: SettingError for an unknown table or key, a value of the wrong type or outside its range.
    """

    run: RunSettings = field(default_factory=RunSettings)
    simulator: SimulatorSettings = field(default_factory=SimulatorSettings)
    simulate: SimulateSettings = field(default_factory=SimulateSettings)
    estimator: EstimatorSettings = field(default_factory=EstimatorSettings)
    flow: FlowConfig = field(default_factory=FlowConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rounds: RoundsSettings = field(default_factory=RoundsSettings)
    infer: InferSettings = field(default_factory=InferSettings)
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    calibrate: CalibrateSettings = field(default_factory=CalibrateSettings)
    check: CheckSettings = field(default_factory=CheckSettings)
    methods: MethodsSettings = field(default_factory=MethodsSettings)

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any]) -> Self:
        """Build from nested tables, as TOML gives them.   Raises: SettingError."""
        kinds = typing.get_type_hints(cls)
        require_known("the configuration", tables, kinds)
        return cls(**{name: _table(name, values, kinds[name]) for name, values in tables.items()})

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a TOML file.   Raises: SettingError if it is missing, not TOML, or has a wrong key or value."""
        try:
            with open(path, "rb") as file:
                tables = tomllib.load(file)
        except OSError as err:
            raise SettingError(f"cannot read the configuration {str(path)!r}: {err.strerror}; expected a TOML file") from err
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
            raise SettingError(f"{path} is not TOML: {err}") from err
        try:
            return cls.from_dict(tables)
        except SettingError as err:
            raise SettingError(f"{path}: {err}") from err

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested tables of plain values; what is None is left out, as TOML has no word for it."""
        return {
            table.name: {k: _plain(v) for k, v in _items(getattr(self, table.name)) if v is not None} for table in dataclasses.fields(self)
        }

    def to_toml(self) -> str:
        """The TOML text that `read` turns back into this configuration."""
        return tomli_w.dumps(self.to_dict())

    def override(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with other values, e.g. `{"train.batch_size": 256}`.   Raises: SettingError."""
        tables = self.to_dict()
        for key, value in changes.items():
            name, dot, rest = key.partition(".")
            if not dot:
                raise SettingError(f"setting {key!r} names no table; expected table.key, such as train.batch_size")
            require_known("the configuration", [name], tables)
            target = tables[name]
            *parents, last = rest.split(".")
            for parent in parents:
                target = target.setdefault(parent, {})
            target[last] = value
        return type(self).from_dict(tables)

    def quick(self) -> Self:
        """Return a copy cut down: the same stages on less of everything."""
        now = self.flat()
        # zero epochs leave the number to the training loop; every other zero switches something off and stays
        return self.override({k: cap for k, cap in _QUICK.items() if now[k] > cap or (k.endswith("max_epochs") and now[k] == 0)})

    def flat(self) -> dict[str, Any]:
        """One level: {"train.batch_size": 512, ...}."""
        return {f"{table}.{key}": value for table, values in self.to_dict().items() for key, value in values.items()}

    def first_difference(self, other: "Config") -> tuple[str, Any, Any] | None:
        """Return (key, mine, theirs) of the first setting that makes the two runs different, or None."""
        mine, theirs = self.flat(), other.flat()
        for key in dict.fromkeys([*mine, *theirs]):
            if key not in _FREE and mine.get(key) != theirs.get(key):
                return key, mine.get(key), theirs.get(key)
        return None


def parse_override(text: str) -> tuple[str, Any]:
    """Parse 'table.key=value'; the value is TOML, or plain text if it is no TOML.   Raises: SettingError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingError(f"setting {text!r} has no '='; expected table.key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _items(table: Any) -> Iterable[tuple[str, Any]]:
    return ((f.name, getattr(table, f.name)) for f in dataclasses.fields(table))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _table(name: str, values: Any, kind: type) -> Any:
    if not isinstance(values, Mapping):
        raise SettingError(f"{name} is {values!r}; expected a table [{name}]")
    hints = typing.get_type_hints(kind)
    require_known(f"[{name}]", values, hints)
    return kind(**{key: _value(f"{name}.{key}", value, hints[key]) for key, value in values.items()})


def _value(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the annotated type, or raise SettingError; whole numbers pass as floats, lists as tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in args if a is not type(None)]
        return _value(name, value, options[0]) if len(options) == 1 else value
    if origin is typing.Literal:
        return require_choice(name, value, args)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SettingError(f"{name} is {value!r}; expected a list")
        return tuple(_value(f"{name}[{i}]", v, args[0]) for i, v in enumerate(value))
    if hint is int:
        return require_int(name, value)
    if hint is float:
        return require_number(name, value) if value != math.inf else math.inf
    wanted = origin or hint
    if isinstance(wanted, type) and not isinstance(value, wanted):
        raise SettingError(f"{name} is {value!r} ({type(value).__name__}); expected {wanted.__name__}")
    return value
