"""The Simulator protocol: what a physicist's class must offer, how it is named in files and rebuilt from its name.

A simulator is any object with the attributes of `Simulator`; it inherits from nothing. Its identity,
`{"class": "package.module:Class", "settings": {...}}`, is what stores and models keep: JSON, no pickled code.
"""

import importlib
import inspect
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sbi_phys.core.checks import did_you_mean, require_int, require_known
from sbi_phys.core.errors import SettingError, SimulatorMismatchError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import AnyArray, Array
from sbi_phys.priors import Observable, Parameter, Prior
from sbi_phys.store.identity import class_path, simulator_identity

__all__ = [
    "RowsFailedError",
    "Simulator",
    "check_output",
    "check_simulator",
    "load_simulator",
]


class RowsFailedError(Exception):
    """Some rows of a call of `simulate` failed, and the simulator says which and why; the others are good.

    x: (n, k), whatever it holds in the failed rows. reasons: {row: text}.
    """

    def __init__(self, x: AnyArray, reasons: dict[int, str]) -> None:
        super().__init__(x, reasons)
        self.x, self.reasons = x, reasons

    def __str__(self) -> str:
        """Say the first reason."""
        row, text = next(iter(self.reasons.items()), (0, "no reason"))
        return f"{len(self.reasons)} of {len(self.x)} rows failed, first row {row}: {text}"


_ATTRIBUTES = {"prior": Prior, "parameters": tuple, "observables": tuple, "settings": dict}


@runtime_checkable
class Simulator(Protocol):
    r"""A simulator x ~ p(x | theta), theta in R^d with units, x in R^k laid out in named blocks of columns.

    prior: p(theta). parameters: the columns of theta, those of the prior. observables: blocks of columns of x, in order,
    whose sizes sum to k. settings: JSON-able keyword arguments, `type(s)(**s.settings)` is the same simulator.
    Optional methods that other layers use where they are there: log_likelihood, expected, deviance, observed.
    """

    @property
    def prior(self) -> Prior:
        """Prior over theta."""
        ...

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Columns of theta."""
        ...

    @property
    def observables(self) -> tuple[Observable, ...]:
        """Blocks of columns of x."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments that rebuild the simulator."""
        ...

    def simulate(self, theta: Array, rng: np.random.Generator) -> AnyArray:
        """Draw x (n, k) for theta (n, d); all randomness from `rng`; a failed row may be NaN."""
        ...


def check_simulator(simulator: Simulator, *, n_trial: int = 0, seed: int = 0) -> None:
    """Check that an object is a Simulator; with n_trial > 0 also run it twice on that many prior draws.

    The trial finds what attributes do not show: a wrong shape, and numbers that do not follow from the generator passed
    in (numpy's or torch's global one), which would differ from one worker to the next.

    Args: n_trial >= 0, rows of the trial; seed of its draws.   Raises: SimulatorMismatchError, SettingError.
    """
    if isinstance(simulator, type):
        raise SimulatorMismatchError(f"simulator is the class {simulator.__name__}; expected an object: {simulator.__name__}(...)")
    where = class_path(simulator)
    for name, kind in _ATTRIBUTES.items():
        if not hasattr(simulator, name):
            raise SimulatorMismatchError(f"{where} has no attribute {name!r}; expected {', '.join(_ATTRIBUTES)} and simulate(theta, rng)")
        value = getattr(simulator, name)
        if not isinstance(value, kind):
            raise SimulatorMismatchError(f"{where}.{name} is {value!r} ({type(value).__name__}); expected a {kind.__name__}")
    if not callable(getattr(simulator, "simulate", None)):
        raise SimulatorMismatchError(f"{where} has no method simulate(theta, rng) -> x")
    if simulator.parameters != simulator.prior.parameters:
        names = tuple(getattr(p, "name", p) for p in simulator.parameters)
        raise SimulatorMismatchError(f"{where}.parameters are {names}; expected those of its prior, {simulator.prior.names}")
    observables: tuple[Any, ...] = simulator.observables  # what a user wrote, whatever the annotation says
    if not observables or not all(isinstance(o, Observable) for o in observables):
        raise SimulatorMismatchError(f"{where}.observables are {observables!r}; expected at least one Observable(name, size)")
    if len({o.name for o in observables}) < len(observables):
        raise SimulatorMismatchError(f"{where}.observables repeat a name: {tuple(o.name for o in observables)}")
    simulator_identity(simulator)
    if require_int("n_trial", n_trial, low=0):
        _trial(simulator, n_trial, seed)


def check_output(simulator: Simulator, x: Any, n: int) -> AnyArray:
    """Return what `simulate` gave if it is a real (n, k) array, k the sum of the observables' sizes.

    Raises: SimulatorMismatchError with got and expected.
    """
    where = f"{class_path(simulator)}.simulate"
    sizes = {o.name: o.size for o in simulator.observables}
    expected = (n, sum(sizes.values()))
    if not isinstance(x, np.ndarray):
        # a tensor would be easy to convert, but a simulator in torch has most likely drawn from torch's global generator
        hint = "; return x.detach().cpu().numpy(), and draw from the generator that is passed in" if hasattr(x, "detach") else ""
        raise SimulatorMismatchError(f"{where} returned a {type(x).__module__}.{type(x).__name__}; expected a numpy array {expected}{hint}")
    if x.dtype.kind not in "fiub":
        raise SimulatorMismatchError(f"{where} returned dtype {x.dtype}; expected real numbers")
    if x.shape != expected:
        raise SimulatorMismatchError(f"{where} returned shape {x.shape} for {n} rows of theta; expected {expected}, columns {sizes}")
    return x


def load_simulator(spec: str, settings: dict[str, Any] | None = None) -> Simulator:
    """Build the simulator that 'package.module:Class' names, with the given settings, and check it.

    Raises: SettingError for an unknown module, class or setting (with the nearest name), SimulatorMismatchError.
    """
    module_name, colon, class_name = str(spec).partition(":")
    if not colon or not module_name or not class_name:
        raise SettingError(f"simulator is {spec!r}; expected 'package.module:Class', e.g. 'simulators.source_spectrum:SourceSpectrum'")
    module = _import(module_name)
    kind = getattr(module, class_name, None)
    if not isinstance(kind, type):
        classes = [name for name, value in vars(module).items() if isinstance(value, type) and hasattr(value, "simulate")]
        has = ", ".join(classes) or "no simulators"
        raise SettingError(f"module {module_name} has no class {class_name!r}; it has {has}{did_you_mean(class_name, classes)}")
    settings = dict(settings or {})
    accepted = inspect.signature(kind).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in accepted):
        require_known(f"settings of {spec}", settings, [p.name for p in accepted])
    try:
        simulator = kind(**settings)
    except TypeError as err:
        raise SettingError(f"{spec} can not be built with settings {settings}: {err}") from err
    check_simulator(simulator)
    return simulator


def _import(module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        missing = err.name or ""
        if module_name == missing or module_name.startswith(missing + "."):
            where = "; it must be importable from the working directory or installed"
            raise SettingError(f"simulator module {module_name!r} was not found: no module named {missing!r}{where}") from err
        raise SettingError(f"simulator module {module_name} needs the module {missing!r}, which is not installed") from err
    except (TypeError, ValueError) as err:  # a relative or empty name
        raise SettingError(f"simulator module {module_name!r} can not be imported: {err}") from err


def _trial(simulator: Simulator, n: int, seed: int) -> None:
    theta = simulator.prior.sample(n, rng_for(seed, "trial theta"))
    first, second = (check_output(simulator, simulator.simulate(theta.copy(), rng_for(seed, "trial x")), n) for _ in range(2))
    if not np.array_equal(first, second, equal_nan=first.dtype.kind == "f"):
        columns = np.flatnonzero((first != second).any(axis=0)).tolist()
        raise SimulatorMismatchError(
            f"{class_path(simulator)}.simulate gave other numbers in columns {columns[:8]} for the same theta and an equal generator; "
            "expected all randomness to come from the generator that is passed in"
        )
