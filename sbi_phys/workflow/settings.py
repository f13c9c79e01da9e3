"""Settings of inference, unfolding and limits: frozen dataclasses, read from TOML; an unknown key is an error that suggests the right one.

An inference run (`Config`) has one dataclass per table of its TOML file:

    [run] title seed device workers          [rounds]    truncated sequential rounds
    [simulator] spec settings                [infer]     observation, draws, importance refinement
    [simulate] n shard_size                  [reference] exact MCMC
    [estimator] ensemble, scaling            [calibrate] held-out simulations
    [flow] [embedding] [train]               [check]     posterior predictive
                                             [methods]   learned likelihood and ratio

The tables [flow], [embedding] and [train] are the dataclasses that the networks and the training loop take. An embedding of your own:

    [embedding]                              [embedding.settings]
    spec = "my_module:MyCNN"                 channels = 8
"""

import dataclasses
import json
import math
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import tomli_w

from sbi_phys.core.checks import check_levels, require_choice, require_int, require_known, require_number
from sbi_phys.core.errors import SettingError
from sbi_phys.estimators.density_sampling import METHODS as SAMPLERS
from sbi_phys.estimators.nre import LOSSES
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.store.layout import Layout
from sbi_phys.training.loop import TrainConfig
from sbi_phys.workflow.observations import parse_source

__all__ = [
    "NETWORK_TABLES", "STATISTICS", "CalibrateSettings", "CheckSettings", "Config", "EstimatorSettings", "InferSettings",
    "LimitsSettings", "MethodsSettings", "ReferenceSettings", "RoundsSettings", "RunSettings", "Settings", "SimulateSettings",
    "SimulatorSettings", "UnfoldSettings", "describe", "parse_override",
]  # fmt: skip


class Settings:
    """Base of all settings: a frozen dataclass whose fields are values, or tables that are dataclasses themselves.

    A subclass sets QUICK, the largest value of a setting in a run with --quick, and FREE, settings that may differ when a run is
    continued because the results do not depend on them.
    """

    QUICK: ClassVar[Mapping[str, Any]] = {}
    FREE: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values and nested tables, as TOML gives them.   Raises: SettingError."""
        return _build(cls, "", values)

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values and nested tables; None is left out, because TOML cannot represent it."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def to_toml(self) -> str:
        """The TOML text that `read` turns back into these settings."""
        return tomli_w.dumps(self.to_dict())

    def override(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with other values, e.g. `{"train.batch_size": 256}`.   Raises: SettingError."""
        known, values = typing.get_type_hints(type(self)), self.to_dict()
        for key, value in changes.items():
            *parents, last = key.split(".")
            if not parents and last not in known and any(dataclasses.is_dataclass(kind) for kind in known.values()):
                raise SettingError(f"setting {key!r} names no table; expected table.key, such as train.batch_size")
            require_known("the configuration", [(*parents, last)[0]], _fields(type(self)))
            target = values
            for parent in parents:
                target = target.setdefault(parent, {})
            target[last] = value
        return type(self).from_dict(values)

    def quick(self) -> Self:
        """Return a copy for a run of the same stages at reduced size; a setting that is smaller already stays."""
        now = self.flat()
        # max_epochs = 0 leaves the number to the training loop; every other 0 switches something off and stays
        return self.override({k: cap for k, cap in self.QUICK.items() if now[k] > cap or (k.endswith("max_epochs") and now[k] == 0)})

    def flat(self) -> dict[str, Any]:
        """One level: {"train.batch_size": 512, ...}."""
        out: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            is_table = dataclasses.is_dataclass(getattr(self, name))
            out |= {f"{name}.{key}": inner for key, inner in value.items()} if is_table else {name: value}
        return out

    def first_difference(self, other: "Settings") -> tuple[str, Any, Any] | None:
        """Return (key, mine, theirs) of the first setting that makes the two runs different, or None."""
        mine, theirs = self.flat(), other.flat()
        for key in dict.fromkeys([*mine, *theirs]):
            if key not in self.FREE and mine.get(key) != theirs.get(key):
                return key, mine.get(key), theirs.get(key)
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Settings of the whole run.

    Args: title: of the report. seed: determines every random number of the run. device: 'auto', 'cpu', 'cuda', ...
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
    standardise: what the network receives, x scaled by 'column' or by 'block' (observable), or as it is, 'none'.
    n_simulations: rows of the store to train on, the first ones, 0 for all.
    """

    n_ensemble: int = 1
    x_transform: str = "auto"
    standardise: str = "column"
    n_simulations: int = 0

    def __post_init__(self) -> None:
        """Check names and ranges."""
        require_int("estimator.n_ensemble", self.n_ensemble, low=1)
        require_int("estimator.n_simulations", self.n_simulations, low=0)
        require_choice("estimator.x_transform", self.x_transform, ("auto", "counts", "real"))
        require_choice("estimator.standardise", self.standardise, ("column", "block", "none"))


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

    Args: observation: 'observed' (the simulator's real data), 'simulated' or 'simulated:SEED' (one draw from the prior predictive), or the
    path of a .npy, .npz, .csv or .txt file with one observation; FILE#3 is row 3 of a file with several. n_draws: posterior draws
    kept. n_refine: most proposals of the importance refinement with the exact likelihood, 0 for none. target_ess: effective draws at
    which the refinement stops.   Raises: SettingError.
    """

    observation: str = "observed"
    n_draws: int = 10_000
    n_refine: int = 200_000
    target_ess: int = 50_000

    def __post_init__(self) -> None:
        """Check ranges."""
        parse_source(self.observation)
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

    Args: n: held-out simulations, 0 for none, else at least 50. n_draws: posterior draws for each.   Raises: SettingError.
    """

    n: int = 500
    n_draws: int = 1_000

    def __post_init__(self) -> None:
        """Check ranges."""
        if require_int("calibrate.n", self.n, low=0) in range(1, 50):
            raise SettingError(f"calibrate.n is {self.n}; expected 0 for none, or at least 50")
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
    'nre-c' or 'bnre'. sampler: 'auto', 'importance', 'emcee', 'hmc' or 'grid'. n_pairs: most held-out pairs at which ratios are compared
    with exact ones.   Raises: SettingError.
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


NETWORK_TABLES = ("estimator", "flow", "embedding", "train", "methods")  # what a named network may set for itself
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """All settings of a project: one dataclass per table of the TOML file, and the named networks and observations.

    A project has the network and the observation of its tables, and any number of named ones: [networks.NAME.flow] holds the settings in
    which network NAME differs, and [observations] maps names to sources, as infer.observation takes them.

    Raises: SettingError for an unknown table or key, a value of the wrong type or outside its range.

    >>> import sbi_phys as sp
    >>> config = sp.workflow.Config().override({"simulate.n": 500, "run.seed": 3})
    >>> config.simulate.n, config.run.seed
    (500, 3)
    >>> config.first_difference(sp.workflow.Config())[0]
    'run.seed'
    """

    QUICK: ClassVar[Mapping[str, Any]] = {
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
    FREE: ClassVar[tuple[str, ...]] = ("run.device", "run.workers", "run.memory", "run.scheduler", "run.cluster")

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
    networks: dict[str, Any] = field(default_factory=dict)
    observations: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names, and that the settings of each named network are valid."""
        for kind, names in (("networks", self.networks), ("observations", self.observations)):
            for name in names:
                if not _NAME.match(name):
                    raise SettingError(f"{kind} has the name {name!r}; expected letters, digits and . _ -, no space and no slash")
        for name, tables in self.networks.items():
            if not isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables.values()):
                raise SettingError(f"networks.{name} is {tables!r}; expected tables such as [networks.{name}.flow]")
            require_known(f"[networks.{name}]", tables, NETWORK_TABLES)
            self.view(name)
        for name, source in self.observations.items():
            if not isinstance(source, str):
                raise SettingError(f"observations.{name} is {source!r}; expected text: observed, simulated:SEED or the name of a file")
            parse_source(source)

    def view(self, network: str = "", observation_name: str = "") -> Self:
        """The settings of one network and one observation, '' for those of the tables themselves.   Raises: SettingError."""
        changes: dict[str, Any] = {}
        if network:
            require_choice("network", network, sorted(self.networks))
            changes = {f"{table}.{key}": v for table, values in self.networks[network].items() for key, v in values.items()}
        if observation_name:
            require_choice("observation", observation_name, sorted(self.observations))
            changes["infer.observation"] = self.observations[observation_name]
        if not changes:
            return self
        try:
            return dataclasses.replace(self, networks={}, observations={}).override(changes)
        except SettingError as err:
            raise SettingError(f"networks.{network}: {err}") from err


@dataclass(frozen=True, kw_only=True)
class UnfoldSettings(Settings):
    """Settings of `sbi-phys unfold`.

    Args: seed. n_toys, coverage: toys per prior of the stopping rule of iterative Bayes, and the coverage that it requires in the worst
    bin. n_breaks: breaks of the fitted flux, -1 for the number of the problem. n_simulated: events of the learned methods, with
    omnifold_iterations, flow_iterations and omnifold_replicas, flow_replicas (replicas of the data, for their covariance).
    bayes_samples: posterior draws of the spectrum. bayes_smoothness: 1/sigma of the curvature of log n, 0 to learn it from the data.
    validate_toys: toys on which the binned methods are tested, 0 for none.   Raises: SettingError.

    >>> import sbi_phys as sp
    >>> sp.workflow.UnfoldSettings().quick().omnifold_replicas
    2
    """

    QUICK: ClassVar[Mapping[str, Any]] = {
        "n_simulated": 8_192,
        "omnifold_replicas": 2,
        "flow_iterations": 1,
        "flow_replicas": 2,
        "bayes_samples": 1_000,
        "validate_toys": 40,
    }

    seed: int = 0
    n_toys: int = 300
    coverage: float = 0.60
    n_breaks: int = -1
    n_simulated: int = 16_384
    omnifold_iterations: int = 4
    omnifold_replicas: int = 10
    flow_iterations: int = 2
    flow_replicas: int = 4
    bayes_samples: int = 4_000
    bayes_smoothness: float = 0.0
    validate_toys: int = 100

    def __post_init__(self) -> None:
        """Check ranges."""
        lowest = {"seed": 0, "n_toys": 50, "n_breaks": -1, "n_simulated": 1000, "bayes_samples": 100, "validate_toys": 0}
        for name, low in lowest.items():
            require_int(name, getattr(self, name), low=low)
        for name in ("omnifold_iterations", "flow_iterations"):
            require_int(name, getattr(self, name), low=1)
        for name in ("omnifold_replicas", "flow_replicas"):
            require_int(name, getattr(self, name), low=2)
        require_number("coverage", self.coverage, low=0, high=0.68, open_low=True)
        require_number("bayes_smoothness", self.bayes_smoothness, low=0)
        if 0 < self.validate_toys < 20:
            raise SettingError(f"validate_toys is {self.validate_toys}; expected 0 for none, or at least 20")


STATISTICS = {"waldo": "WALDO from the posterior", "nre": "learned ratio", "nle": "learned likelihood", "exact": "exact likelihood ratio"}


@dataclass(frozen=True, kw_only=True)
class LimitsSettings(Settings):
    """Settings of one call of `sbi-phys limits RUN`.

    Args: parameters: one name, or two for a joint set. statistic: 'waldo', 'nre', 'nle' or 'exact'. levels. kind: 'interval', 'upper'
    or 'lower', the last two for one parameter. n: simulations. physical: 'none', 'low', 'high' or 'both': ends of the first parameter's
    range that are physical bounds, where a set may stop. open_ends: an end that reaches the simulated range becomes infinite instead
    of an error. value: of the parameter, to get its p-value. critical: regression of the critical values, as in
    `learn_critical_values`.   Raises: SettingError.

    >>> import sbi_phys as sp
    >>> sp.workflow.LimitsSettings(parameters=("gamma",), kind="upper").name
    'gamma_waldo_upper'
    """

    parameters: tuple[str, ...]
    statistic: str = "waldo"
    levels: tuple[float, ...] = (0.683, 0.9)
    kind: str = "interval"
    n: int = 5_000
    physical: str = "none"
    open_ends: bool = False
    value: float | None = None
    critical: str = "auto"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if len(self.parameters) not in (1, 2) or len(set(self.parameters)) != len(self.parameters):
            raise SettingError(f"parameters are {', '.join(self.parameters) or 'none'}; expected one name, or two different ones")
        require_choice("--statistic", self.statistic, STATISTICS)
        object.__setattr__(self, "levels", check_levels(self.levels))
        require_choice("--kind", self.kind, ("interval", "upper", "lower"))
        require_choice("--physical", self.physical, ("none", "low", "high", "both"))
        if self.kind != "interval" and len(self.parameters) > 1:
            raise SettingError(f"--kind is {self.kind!r}; expected 'interval' with two parameters")
        if self.kind != "interval" and min(self.levels) <= 0.5:
            raise SettingError(f"--level is {min(self.levels):g}; expected more than 0.5 for a one-sided limit")
        require_int("--n", self.n, low=400)
        if self.value is not None:
            require_number("--value", self.value)
            if len(self.parameters) > 1:
                raise SettingError("--value was given with two parameters; expected it with one")

    @property
    def name(self) -> str:
        """Name of the files of this call."""
        return "_".join((*self.parameters, self.statistic, *(() if self.kind == "interval" else (self.kind,))))


def describe(settings: Config) -> str:
    """TOML text with every key, its meaning as a comment, and its value in `settings`.

    >>> import sbi_phys as sp
    >>> from sbi_phys.workflow.settings import describe
    >>> print(describe(sp.workflow.Config()).splitlines()[3])
    title = "Simulation-based inference"
    """
    tables = []
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            summary = (type(value).__doc__ or "").split("\n")[0].split("   Raises")[0]
            tables += ["", f"# {summary}", f"[{f.name}]", *_described(value)]
    for name, what in (("networks", "[networks.NAME.flow] and so on: settings in which the network NAME differs"),
                       ("observations", "[observations] NAME = SOURCE, where SOURCE is as in infer.observation")):  # fmt: skip
        value = getattr(settings, name)
        tables += ["", f"# {what}", *(tomli_w.dumps({name: value}).splitlines() if value else [])]
    return "\n".join(tables).strip() + "\n"


def _described(values: Any) -> list[str]:
    """Lines 'key = value' of a dataclass, each below its meaning."""
    meanings, out = meanings_of(type(values)), []
    for f in dataclasses.fields(values):
        out += textwrap.wrap(meanings[f.name], 110, initial_indent="# ", subsequent_indent="# ")
        value = _plain(getattr(values, f.name))
        out.append(f"# {f.name} is not set" if value is None else f"{f.name} = {_inline(value)}")
    return out


def _inline(value: Any) -> str:
    """A TOML value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_inline(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return tomli_w.dumps({"x": value}).split("=", 1)[1].strip()


def meanings_of(kind: type) -> dict[str, str]:
    """The meaning of each field of a dataclass, from the part of its docstring that begins with 'Args:'.   Raises: SettingError."""
    names = _fields(kind)
    text = " ".join((kind.__doc__ or "").split("Args:")[-1].split("Raises:")[0].split(">>>")[0].split())
    found: dict[str, str] = {}
    entry = re.compile(r"(?:^|(?<=[.;,] )|(?<=\) ))((?:[a-z_]+(?:, | and )?)+): ")
    marks = [m for m in entry.finditer(text) if any(name in names for name in re.split(r", | and ", m[1]))]
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        meaning = text[mark.end() : following.start() if following else len(text)].strip(" ;,")
        found |= dict.fromkeys((name for name in re.split(r", | and ", mark[1]) if name in names), meaning)
    missing = [name for name in names if name not in found]
    if missing:
        raise SettingError(f"the docstring of {kind.__name__} does not describe {missing}")
    return found


def parse_override(text: str) -> tuple[str, Any]:
    """Parse 'table.key=value'; the value is TOML, or plain text if it is no TOML.   Raises: SettingError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingError(f"setting {text!r} has no '='; expected table.key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _fields(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _plain(value: Any) -> Any:
    """Dataclasses and dicts as dicts without None, tuples as lists."""
    if dataclasses.is_dataclass(value):
        value = {name: getattr(value, name) for name in _fields(type(value))}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _build(kind: Any, table: str, values: Any) -> Any:
    """The dataclass `kind` from plain values; `table` is its name in messages, '' for the whole."""
    if not isinstance(values, Mapping):
        raise SettingError(f"{table} is {values!r}; expected a table [{table}]")
    hints = typing.get_type_hints(kind)
    require_known(f"[{table}]" if table else "the configuration", values, _fields(kind))
    return kind(**{key: _value(f"{table}.{key}" if table else key, value, hints[key]) for key, value in values.items()})


def _value(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the annotated type, or raise SettingError; whole numbers pass as floats, lists as tuples."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, name, value)
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
