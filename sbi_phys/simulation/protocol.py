"""The Simulator protocol: the attributes and methods that a simulator needs, their checks, and loading a simulator by its name.

A simulator is any object with the attributes of `Simulator`; it needs no base class. Stores and models keep its identity,
`{"class": "package.module:Class", "settings": {...}}`, as JSON; they never keep pickled code.
"""

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sbi_phys.core.checks import did_you_mean, require_int, require_known, require_plain, shortened
from sbi_phys.core.errors import DataError, SettingError, SimulatorMismatchError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import AnyArray, Array
from sbi_phys.priors import Observable, Parameter, Prior
from sbi_phys.priors.blocks import column_name, failed_rows, fractional
from sbi_phys.store.identity import class_path, simulator_identity

__all__ = [
    "RowsFailedError",
    "Simulator",
    "check_output",
    "check_simulator",
    "event_reason",
    "load_simulator",
    "require_foreign",
]


class RowsFailedError(DataError):
    """Raised by a simulator when some rows of a call failed; it carries the other rows, which are kept.

    Args: x (n, k), with any values in the failed rows. reasons: {row: text}.
    """

    def __init__(self, x: AnyArray, reasons: dict[int, str]) -> None:
        super().__init__(x, reasons)
        self.x, self.reasons = x, reasons

    def __str__(self) -> str:
        """Return the number of failed rows and the first reason."""
        row, text = next(iter(self.reasons.items()), (0, "no reason"))
        return f"{len(self.reasons)} of {len(self.x)} rows failed, first row {row}: {shortened(text)}"


def event_reason(err: BaseException) -> str:
    """Reason of a failed event, as it is written to the store."""
    return f"{type(err).__name__.lstrip('_')}: {err}"


_ATTRIBUTES = {"prior": Prior, "parameters": tuple | list, "observables": tuple | list, "settings": dict}


@runtime_checkable
class Simulator(Protocol):
    r"""A simulator x ~ p(x | theta), theta in R^d with units, x in R^k laid out in named blocks of columns.

    prior: p(theta). parameters: the columns of theta, equal to those of the prior. observables: blocks of columns of x, in
    order; their sizes sum to k. Both are a tuple or a list. settings: keyword arguments that JSON can hold;
    `type(s)(**s.settings)` is the same simulator.
    Optional methods, used where a simulator has them: log_likelihood, expected, deviance, observed, published, and
    figures(theta, x_obs, *, seed, draws="posterior") -> [(name, title, caption, Figure), ...], its own figures for the report of
    a run, from draws theta (n, d) of the posterior or, with draws="prior", of the prior (docs/reports.md).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> class Decay:
    ...     settings = {}
    ...     prior = sp.BoxPrior([sp.Parameter("lifetime", 0.5, 5.0, unit="us")])
    ...     parameters = prior.parameters
    ...     observables = (sp.Observable("time", 3, unit="us"),)
    ...     def simulate(self, theta, rng):
    ...         return rng.exponential(theta, size=(len(theta), 3))
    >>> isinstance(Decay(), sp.Simulator)
    True
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
        """Draw x (n, k) for theta (n, d), with all random numbers from `rng`; NaN marks a failed row.

        x may also be (n, *shape) if there is one observable, or a dictionary {name: (n, *shape)} of all observables. In an observable
        with `missing=True`, NaN marks a value that was not measured.
        """
        ...


def check_simulator(simulator: Simulator, *, n_simulations: int = 0, seed: int = 0) -> None:
    """Check that an object is a Simulator; with n_simulations > 0 also run it twice on that many prior draws.

    The runs find what attributes do not show: a wrong shape, and random numbers that do not come from the generator passed
    in but from a global one, which would differ between workers.

    Args: n_simulations >= 0, rows of a run; seed of the draws.   Raises: SimulatorMismatchError, SettingError.

    >>> import sbi_phys as sp
    >>> from simulators import OnOff
    >>> sp.check_simulator(OnOff(), n_simulations=10)
    >>> sp.check_simulator(OnOff)
    Traceback (most recent call last):
    ...
    sbi_phys.core.errors.SimulatorMismatchError: simulator is the class OnOff; expected an object: OnOff(...)
    """
    if isinstance(simulator, type):
        raise SimulatorMismatchError(f"simulator is the class {simulator.__name__}; expected an object: {simulator.__name__}(...)")
    where = class_path(simulator)
    for name, kind in _ATTRIBUTES.items():
        if not hasattr(simulator, name):
            raise SimulatorMismatchError(f"{where} has no attribute {name!r}; expected {', '.join(_ATTRIBUTES)} and simulate(theta, rng)")
        value = getattr(simulator, name)
        if not isinstance(value, kind):
            wanted = getattr(kind, "__name__", "tuple or a list")
            raise SimulatorMismatchError(f"{where}.{name} is {shortened(repr(value))} ({type(value).__name__}); expected a {wanted}")
    if not callable(getattr(simulator, "simulate", None)):
        raise SimulatorMismatchError(f"{where} has no method simulate(theta, rng) -> x")
    if tuple(simulator.parameters) != simulator.prior.parameters:
        names = tuple(getattr(p, "name", p) for p in simulator.parameters)
        raise SimulatorMismatchError(f"{where}.parameters are {names}; expected those of its prior, {simulator.prior.names}")
    observables: Sequence[Any] = simulator.observables  # what a user wrote, whatever the annotation says
    if not observables or not all(isinstance(o, Observable) for o in observables):
        raise SimulatorMismatchError(
            f"{where}.observables are {shortened(repr(observables))}; expected at least one Observable(name, size)"
        )
    if len({o.name for o in observables}) < len(observables):
        raise SimulatorMismatchError(f"{where}.observables repeat a name: {tuple(o.name for o in observables)}")
    simulator_identity(simulator)
    if require_int("n_simulations", n_simulations, low=0):
        _trial(simulator, n_simulations, seed)


def check_output(simulator: Simulator, x: Any, n: int) -> AnyArray:
    """Return the output of `simulate` as rows (n, k), k being the sum of the observables' sizes.

    Args: x: (n, k); (n, *shape) of a single observable; or {name: (n, *shape)}, one array for each observable. n: rows of theta.
    Raises: SimulatorMismatchError.
    """
    where = f"{class_path(simulator)}.simulate"
    if isinstance(x, Mapping):
        known = [o.name for o in simulator.observables]
        if sorted(map(str, x)) != sorted(known):
            raise SimulatorMismatchError(f"{where} returned the blocks {list(x)}; expected the observables {known}")
        parts = [_block(f"{where}[{o.name!r}]", x[o.name], n, (o,)) for o in simulator.observables]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    return _block(where, x, n, simulator.observables)


def _block(where: str, x: Any, n: int, observables: Sequence[Observable]) -> AnyArray:
    """Rows (n, k) of the array of some observables, (n, k) or, of one, (n, *shape)."""
    sizes = {o.name: o.size for o in observables}
    expected = (n, sum(sizes.values()))
    if not isinstance(x, np.ndarray):
        # not converted: a simulator written in torch has most likely drawn from torch's global generator
        hint = "; return x.detach().cpu().numpy(), and draw from the generator that is passed in" if hasattr(x, "detach") else ""
        raise SimulatorMismatchError(f"{where} returned a {type(x).__module__}.{type(x).__name__}; expected a numpy array {expected}{hint}")
    if type(x) is not np.ndarray:
        try:
            require_plain(f"the output of {where}", x)
        except DataError as err:
            raise SimulatorMismatchError(str(err)) from err
        x = np.asarray(x)
    if x.dtype.kind not in "fiub":
        raise SimulatorMismatchError(f"{where} returned dtype {x.dtype}; expected real numbers")
    if len(observables) == 1 and x.shape == (n, *observables[0].shape):
        return x.reshape(expected)
    if x.shape != expected:
        raise SimulatorMismatchError(f"{where} returned shape {x.shape} for {n} rows of theta; expected {expected}, columns {sizes}")
    return x


def load_simulator(spec: str, settings: dict[str, Any] | None = None) -> Simulator:
    """Build the simulator named 'package.module:Class' with the given settings, and check it; or take the object 'package.module:name'.

    The name may come from a file, so nothing is called before it is known to be a simulator: a class with simulate(theta, rng),
    not of Python's standard library. Importing its module runs the module's code.
    Raises: SettingError for an unknown module, class or setting (with the nearest name), SimulatorMismatchError.

    >>> from sbi_phys.simulation import load_simulator
    >>> load_simulator("simulators.on_off:OnOff", {"tau": 2.0}).parameters[0].name
    'mu'
    """
    module_name, colon, class_name = str(spec).partition(":")
    if not colon or not module_name or not class_name:
        raise SettingError(f"simulator is {spec!r}; expected 'package.module:Class', e.g. 'simulators.source_spectrum:SourceSpectrum'")
    require_foreign(f"simulator {spec!r}", module_name)
    module = _import(module_name)
    kind = getattr(module, class_name, None)
    if kind is not None and not isinstance(kind, type) and isinstance(kind, Simulator):
        if settings:
            raise SettingError(
                f"{spec} is an object that the module has made, and settings {settings} were given; expected none, or its class"
            )
        check_simulator(kind)
        return kind
    if not isinstance(kind, type):
        classes = [name for name, value in vars(module).items() if isinstance(value, type) and hasattr(value, "simulate")]
        has = ", ".join(classes) or "no simulators"
        raise SettingError(f"module {module_name} has no class {class_name!r}; it has {has}{did_you_mean(class_name, classes)}")
    _require_simulator_class(spec, kind)
    settings = dict(settings or {})
    accepted = inspect.signature(kind).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in accepted):
        require_known(f"settings of {spec}", settings, [p.name for p in accepted])
    try:
        simulator = kind(**settings)
    except TypeError as err:
        raise SettingError(f"{spec} cannot be built with settings {settings}: {err}") from err
    check_simulator(simulator)
    return simulator


def require_foreign(what: str, module_name: str) -> None:
    """Raise SettingError for a module of Python's standard library, whose functions a file must not name."""
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise SettingError(f"{what} is of Python's standard library; expected a module of yours or of an installed package")


def _require_simulator_class(spec: str, kind: type) -> None:
    """Raise SettingError unless a class has simulate(theta, rng), before it is called."""
    require_foreign(f"simulator {spec!r}", kind.__module__)  # imported there from the standard library
    simulate = getattr(kind, "simulate", None)
    if not inspect.isroutine(simulate):
        raise SettingError(f"{spec} has no method simulate(theta, rng); expected the class of a simulator")
    try:
        inspect.signature(simulate).bind(None, "theta", "rng")
    except ValueError:
        return  # a compiled method without a signature
    except TypeError as err:
        raise SettingError(f"{spec} has simulate{inspect.signature(simulate)}; expected simulate(self, theta, rng)") from err


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
        raise SettingError(f"simulator module {module_name!r} cannot be imported: {err}") from err


def _trial(simulator: Simulator, n: int, seed: int) -> None:
    theta = simulator.prior.sample(n, rng_for(seed, "trial theta"))
    first, second = (check_output(simulator, simulator.simulate(theta.copy(), rng_for(seed, "trial x")), n) for _ in range(2))
    good = ~failed_rows(first, simulator.observables)
    found = fractional(first[good], simulator.observables)
    if found is not None:
        raise SimulatorMismatchError(
            f"{class_path(simulator)}.simulate gave {first[good][found]:g} in {column_name(simulator.observables, found[1])}, of kind "
            "'counts'; expected whole numbers, or kind='real'"
        )
    if not np.array_equal(first, second, equal_nan=first.dtype.kind == "f"):
        columns = np.flatnonzero((first != second).any(axis=0)).tolist()
        raise SimulatorMismatchError(
            f"{class_path(simulator)}.simulate gave different numbers in columns {columns[:8]} for the same theta and seed; "
            "expected all random numbers from the generator that is passed in"
        )
