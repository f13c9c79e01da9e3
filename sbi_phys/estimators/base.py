r"""The base of all estimators: settings, training, ensembles, model files.

A new estimator is one class with a network and a loss (CONTRIBUTING.md, "Add an estimator"):

    class MDN(Estimator):
        def build(self, scaler, seed):          # the network of one member of the ensemble
            return MixtureNet(self.prior.free_dim, scaler.shape)

        def row_loss(self, net, u, x):          # one value per row; the mean over the rows is minimised
            return -net.log_prob(u, x)

u = prior.to_unbounded(theta) are the parameters in the prior's whitened space, x the observations, scaled. The base trains on arrays,
on stores (streamed from disk where they exceed the memory) and on a simulator that runs during the training; it takes weights, writes
checkpoints, shares the work under torchrun, and gives `save`, `load` and a representation. With weights w_i > 0 it minimises

    sum_i w_i L_i / sum_i w_i.

A file holds settings, scaling and weights and never code: `load` finds the class by its name, among those of this package and those
that have been imported. Embeddings, flows and priors of the user's own are in the file by name, arguments and weights; their modules
are imported only with `allow_import=True`, and their classes are checked before they are called (`core.classes`).
"""

import importlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict, Unpack, cast

import numpy as np
import torch
from torch import Tensor, nn

from sbi_phys.core.checks import as_matrix, did_you_mean, require_choice, require_int
from sbi_phys.core.classes import find_class
from sbi_phys.core.device import require_float32, require_gradients, resolve_device
from sbi_phys.core.errors import DataError, ModelFileError, SbiPhysError, SettingError, SimulatorMismatchError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for, seed_for, torch_rng_for, torch_seeded
from sbi_phys.core.types import AnyArray, Array, ArrayLike, Integers
from sbi_phys.core.version import __version__
from sbi_phys.estimators.other_priors import Density, MixedPriors, as_theta, prior_weights, warn_unlike_prior
from sbi_phys.nets.classifier import ClassifierConfig
from sbi_phys.nets.embedding_set import event_columns, padded, take_scaling
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.posterior import sample_net
from sbi_phys.nets.spline import arithmetic
from sbi_phys.priors import Observable, Prior, prior_from_dict
from sbi_phys.priors.product import require_rebuilt, same_prior
from sbi_phys.simulation.protocol import Simulator, check_simulator
from sbi_phys.store.identity import simulator_identity
from sbi_phys.store.store import Store
from sbi_phys.training.batches import Batches
from sbi_phys.training.checkpoint import read_file, write_file
from sbi_phys.training.loop import Loss, TrainConfig, fit
from sbi_phys.training.reach import Reach, warn_far
from sbi_phys.training.scaling import STANDARDISE, XScaler
from sbi_phys.training.sources import Rows, Scaling, Settings, checked_weights, from_arrays, from_simulator, from_stores, stores_of

__all__ = ["FILE", "BaseEstimator", "Estimator", "History", "Shared", "load"]

History = list[dict[str, Any]]  # of one training, a dictionary per epoch

FILE = ("estimator", 2)
# estimators of this package, so that `load` can import the one that a file names; only the file's request imports a folder above
_MODULES = {
    "NPE": "sbi_phys.estimators.npe",
    "NLE": "sbi_phys.estimators.nle",
    "NRE": "sbi_phys.estimators.nre",
    "TwoHypotheses": "sbi_phys.estimators.hypotheses",
    "MinedRatio": "sbi_phys.estimators.mined",
    "SALLY": "sbi_phys.estimators.mined",
    "SetNPE": "sbi_phys.estimators.set_npe",
    "FlowUnfolder": "sbi_phys.unfold.flow",
    "ForwardUnfolder": "sbi_phys.unfold.forward",
}
_CLASSES: "dict[str, type[BaseEstimator]]" = {}  # every subclass that has been imported
_CONFIGS = {c.__name__: c for c in (ClassifierConfig, EmbeddingConfig, FlowConfig, TrainConfig)}
_NOT_SETTINGS = ("device", "simulator")  # of the machine, and kept as an identity
_WAYS = "fit(theta, x), fit(store) or fit(simulator=..., online=True, n=...)"


def _signature(cls: type) -> inspect.Signature:
    """Signature of `cls(...)` in which **shared stands for the arguments of the class above."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        own = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        found |= {p.name: p for p in own if p.kind is not p.VAR_KEYWORD and p.name not in found}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return inspect.Signature(sorted(found.values(), key=lambda p: p.kind))


class Shared(TypedDict, total=False):
    """Keyword arguments of every estimator, see `BaseEstimator`."""

    seed: int
    embedding: EmbeddingConfig | nn.Module | type[nn.Module] | str | None
    n_ensemble: int
    device: str | torch.device
    x_transform: str
    standardise: str
    observables: Sequence[Observable] | None
    simulator: Simulator | None
    config: TrainConfig | None


class BaseEstimator:
    """What is common to all estimators, with or without a prior: settings, members of the ensemble, files.

    Args:
        seed: of weights, split, order and draws.
        embedding: of the observation: None (the default perceptron), an EmbeddingConfig, or of your own: an nn.Module
            (n, *x_shape) -> (n, k), whose weights are the initial ones of every member; its class, or 'package.module:Class', built with
            the seed of each member (arguments: EmbeddingConfig(spec=..., settings={...})).
        n_ensemble: networks, trained with different seeds and splits.
        device: 'auto' takes CUDA where there is one.
        x_transform: 'auto', 'counts' (Anscombe's root) or 'real'; 'auto' asks `observables`, else looks at the values.
        standardise: what a network receives: x scaled by 'column' or by 'block' (observable), or as it is, 'none'.
        observables: the simulator's blocks of columns; None takes those of the simulator or of the store. With them x may be rows (n, k),
            in the shape of the only observable, or {name: array}, and NaN is a missing value where they say so (`training.scaling`).
        simulator: that the simulations come from; its identity is kept in the model file.
        config: of the training loop.

    Attributes: history: of each member, a dictionary per epoch. identity: of the simulator, {"class": ..., "settings": ...} or None.
    Raises: SettingError, SimulatorMismatchError.

    >>> import sbi_phys as sp
    >>> sally = sp.SALLY(seed=3)
    >>> isinstance(sally, sp.estimators.BaseEstimator), sally.settings["seed"]
    (True, 3)
    >>> sally
    SALLY(seed=3, embedding=EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)): not trained
    """

    scaler_class: ClassVar[Any] = XScaler
    default_embedding: ClassVar[EmbeddingConfig] = EmbeddingConfig()
    config: TrainConfig | None
    _nets: list[Any]

    def __init__(
        self,
        *,
        seed: int = 0,
        embedding: EmbeddingConfig | nn.Module | type[nn.Module] | str | None = None,
        n_ensemble: int = 1,
        device: str | torch.device = "auto",
        x_transform: str = "auto",
        standardise: str = "column",
        observables: Sequence[Observable] | None = None,
        simulator: Simulator | None = None,
        config: TrainConfig | None = None,
    ) -> None:
        if simulator is not None:
            check_simulator(simulator)
            observables = simulator.observables if observables is None else observables
        self.seed = require_int("seed", seed, low=0)
        self.embedding = self.default_embedding if embedding is None else EmbeddingConfig.of(embedding)
        if isinstance(self.embedding, EmbeddingConfig):
            self.embedding.require_class()
        self.n_ensemble = require_int("n_ensemble", n_ensemble, low=1)
        self.device = resolve_device(device)
        self.x_transform = x_transform
        self.standardise = require_choice("standardise", standardise, STANDARDISE)
        if standardise != "column" and event_columns(self.embedding) is not None:
            raise SettingError(f"standardise is {standardise!r} with an embedding of sets, which scales events itself; expected 'column'")
        self.observables = tuple(observables) if observables is not None else None
        self.identity = None if simulator is None else simulator_identity(simulator)
        self.config = config
        self.history: list[History] = []
        self._scaler: Any = None
        self._reach: Reach | None = None
        self._nets = []

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Refuse a setting that the class does not have, by name.   Raises: TypeError."""
        known = inspect.signature(cls).parameters
        for name in settings:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no setting {name!r}{did_you_mean(name, list(known))}; expected {', '.join(known)}")
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class for `load`, and show the shared settings in its signature."""
        super().__init_subclass__(**kwargs)
        known = _MODULES.get(cls.__name__)
        if known is not None and cls.__module__ != known:
            raise SettingError(f"an estimator is called {cls.__name__}, as one of sbi_phys is; expected another name")
        _CLASSES[cls.__name__] = cls
        cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of this estimator: `type(e)(**e.settings)` is an untrained one like it (on this machine's device)."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if name not in _NOT_SETTINGS}

    def __repr__(self) -> str:
        shown = [f"{k}={_short(v)}" for k, v in self.settings.items() if not _is_default(v, inspect.signature(type(self)).parameters[k])]
        state = f"{len(self._nets)} trained network{'s' * (len(self._nets) > 1)}" if self._nets else "not trained"
        return f"{type(self).__name__}({', '.join(shown)}): {state}"

    # ---- what a subclass gives

    def build(self, scaler: Any, seed: int) -> nn.Module:
        """Return the network of one member; torch's global generator is seeded with `seed`.

        Args: scaler: of x; its `shape` is that of one observation.
        """
        raise NotImplementedError(f"{type(self).__name__} has no build(scaler, seed); expected one that returns its network")

    def row_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Loss of each row (n,); an `Estimator` is handed (net, u, x) with u (n, d) and x (n, ...), scaled."""
        raise NotImplementedError(f"{type(self).__name__} has no row_loss(net, u, x); expected one that returns one value per row")

    def start(self, net: Any, rows: Sequence[Tensor], seed: int) -> None:
        """Give a network better initial weights from training rows. Default: leave it."""

    def member_batches(self, net: Any, batches: Batches, config: TrainConfig, seed: int, progress: Progress) -> tuple[Batches, TrainConfig]:
        """Return what a member trains on, and how. Default: the rows as they are."""
        return batches, config

    def finish(self, net: Any, batches: Batches) -> None:
        """Change a trained network, e.g. solve its last layer. Default: leave it."""

    def state(self) -> dict[str, Any]:
        """What `fit` has learned in addition to scaling and weights, as tensors and plain values for the file. Default: nothing."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""

    # ---- training

    def _online_simulator(self, simulator: Any, online: bool, rows: Sequence[Any], weights: Any) -> Simulator:
        """The simulator that runs beside the training, given no `rows` and no weights; its identity and observables are taken."""
        if not online or simulator is None:
            raise SettingError("online training takes both simulator=... and online=True; expected both, or theta and x, or a store")
        if any(row is not None for row in rows):
            raise DataError("theta or x was given together with a simulator; expected fit(simulator=..., online=True, n=...)")
        if weights is not None:
            raise DataError(
                "weights were given together with a simulator, whose rows are fresh; expected weights of theta and x, or of a store"
            )
        check_simulator(simulator)
        self.identity = self.identity or simulator_identity(simulator)
        self.observables = self.observables or tuple(simulator.observables)
        return cast(Simulator, simulator)

    def _train(self, rows: Rows, loss: Loss, checkpoint: str | Path | None, progress: Progress) -> None:
        """Train all members, then keep them: an estimator whose training fails stays as it was."""
        require_gradients()
        nets, histories = [], []
        for k in range(self.n_ensemble):
            net, history = self._train_member(k, rows, _Weighted(loss) if rows.weighted else loss, checkpoint, progress)
            nets.append(net)
            histories.append(history)
        self._scaler, self._nets, self.history, self._reach = rows.scaler, nets, histories, self._reach_of(rows)

    def _reach_of(self, rows: Rows) -> Reach | None:
        """Region of the training observations; None where the rows are not pairs of parameters and observations."""
        return None

    def _train_member(self, k: int, rows: Rows, loss: Loss, checkpoint: str | Path | None, progress: Progress) -> tuple[nn.Module, History]:
        seed = seed_for(self.seed, "member", k)
        batches, start = rows.member(k)
        net = self._new_net(rows.scaler, seed)
        if isinstance(rows.scaler, XScaler):
            take_scaling(net, rows.scaler)
        self.start(net, start, seed)
        batches, config = self.member_batches(net, batches, rows.config, seed, progress)
        path = None if checkpoint is None else Path(f"{checkpoint}.{k}")
        history: History = []
        name = "train" if self.n_ensemble == 1 else f"train {k + 1}/{self.n_ensemble}"
        with progress.task(name, config.for_rows(batches.n)[1]) as task:
            computed = arithmetic(torch.device(self.device), config.precision)
            for record in fit(loss, net, batches, None, config, seed=seed, checkpoint=path, arithmetic=computed):
                history.append(asdict(record))
                task.advance(1, text=f"loss {record.train:.3f} validation {record.valid:.3f}{' *' if record.best else ''}")
        self.finish(net, batches)
        return net, history

    def _new_net(self, scaler: Any, seed: int) -> Any:
        require_float32()
        with torch_seeded(seed):  # torch's global generator stays as it was
            return self.build(scaler, seed).to(self.device)

    def _require_fit(self) -> Any:
        """Return the scaling.   Raises: SettingError before `fit`."""
        if self._scaler is None:
            raise SettingError(f"this {type(self).__name__} is not trained; expected .fit(...) or sp.load(path) first")
        return self._scaler

    def _inputs(self, x: ArrayLike | Tensor) -> tuple[Tensor, bool]:
        """Scaled observations (n, ...) on the device, and whether it is a single one.   Raises: ShapeError, NonFiniteError, DataError.

        Warns: if one lies far outside of the simulations.
        """
        scaler = self._require_fit()
        array, single = scaler.check("x", self._with_slots(x, getattr(scaler, "x_shape", None)))
        inputs = scaler.apply(array)
        warn_far(self._reach, inputs)
        return inputs.to(self.device), single

    def _with_slots(self, x: Any, x_shape: tuple[int, ...] | None = None) -> Any:
        """x, and sets of events that are given as a list of arrays (m_i, k), or as one array, in padded slots.

        Args: x_shape: of one observation in training, whose slots are taken; None: as many slots as the largest set has.
        Raises: DataError (arrays of different lengths without a network of sets; more events than slots), ShapeError, NonFiniteError.
        """
        k = event_columns(self._nets[0] if self._nets else self.embedding)
        if k is None:
            if isinstance(x, list | tuple) and len({len(s) for s in x if isinstance(s, list | tuple | np.ndarray) and np.iterable(s)}) > 1:
                raise DataError(
                    "x is a list of arrays of different lengths; expected one array, or a network of sets: "
                    "embedding=sp.DeepSet(n_columns=...), whose input sp.pad_sets makes of a list"
                )
            return x
        size = math.prod(x_shape) if x_shape else sum(o.size for o in self.observables or ())
        found, single = padded("x", x, k, size // (k + 1) or None)
        if found is x or (x_shape is not None and len(x_shape) > 1) or not size:
            return found
        return found.reshape(-1) if single else found.reshape(len(found), -1)

    def _draw_members(self, inputs: Tensor, n: int, seed: int) -> Array:
        """n draws (b, n, d) of the equal mixture of the members, flows that are conditional on inputs (b, ...)."""
        counts = rng_for(seed, "members").multinomial(n, np.full(len(self._nets), 1 / len(self._nets)))
        parts = [
            sample_net(net, inputs, int(c), torch_rng_for(seed, "draws", k, device=self.device))
            for k, (net, c) in enumerate(zip(self._nets, counts, strict=True))
            if c
        ]
        draws: Array = torch.cat(parts, dim=1).double().numpy()
        # the members' draws are mixed, so that any part of the draws is a sample of the mixture
        return draws if len(parts) == 1 else draws[:, rng_for(seed, "mix").permutation(n)]

    # ---- files

    def save(self, path: str | Path) -> None:
        """Write settings, scaling, weights and history, but no code; `sp.load` reads it.   Raises: ModelFileError, SettingError."""
        content = {
            "estimator": type(self).__name__,
            "version": __version__,
            "settings": {name: _encoded(name, value) for name, value in self.settings.items()},
            "identity": json.dumps(self.identity),
            "scaler": self._require_fit().to_dict(),
            "state": self.state(),
            "reach": {} if self._reach is None else self._reach.to_dict(),
            "history": self.history,
            "weights": [{k: v.cpu() for k, v in net.state_dict().items()} for net in self._nets],
        }
        write_file(path, *FILE, content)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        simulator: Simulator | None = None,
        embedding: nn.Module | str | None = None,
        flow: nn.Module | str | None = None,
        prior: Prior | None = None,
        allow_import: bool = False,
        device: str | torch.device = "auto",
    ) -> Self:
        """Read a model of this class; arguments and errors as `sp.load`."""
        model = load(path, simulator=simulator, embedding=embedding, flow=flow, prior=prior, allow_import=allow_import, device=device)
        if not isinstance(model, cls):
            raise ModelFileError(f"{path} is the file of a {type(model).__name__}; expected one of {cls.__name__}")
        return model

    @classmethod
    def _from_content(cls, path: Path, content: dict[str, Any], given: "_Given", device: str | torch.device) -> Self:
        settings = {name: given.decoded(path, name, value) for name, value in content["settings"].items()}
        for name in ("embedding", "flow"):
            if name in settings:
                settings[name] = given.network(path, name, settings[name])
        if not content["weights"]:
            raise ModelFileError(f"{path} holds no trained network; expected at least one")
        _require_size(path, settings, content["weights"])
        model = cls(**settings, device=device)
        model.identity = json.loads(content["identity"])
        model.history = content["history"]
        model._scaler = cls.scaler_class.from_dict(content["scaler"])
        model.set_state(content["state"])
        model._reach = Reach.from_dict(content["reach"]) if content.get("reach") else None
        for k, weights in enumerate(content["weights"]):
            model._require_same_shapes(path, weights)
            net = model._new_net(model._scaler, seed_for(model.seed, "member", k))
            net.load_state_dict(weights)
            model._nets.append(net.eval())
        return model

    def _require_same_shapes(self, path: Path, weights: dict[str, Tensor]) -> None:
        """Raise ModelFileError where the settings describe larger layers than the file has; no memory is taken for them."""
        try:
            with torch.random.fork_rng([]), torch.device("meta"):
                described = {name: tuple(t.shape) for name, t in self.build(self._scaler, 0).state_dict().items()}
        except Exception:  # a network that needs numbers while it is built: its shapes are compared afterwards
            return
        for name, shape in described.items():
            if name in weights and tuple(weights[name].shape) != shape:
                raise ModelFileError(f"{path} has {name} of shape {tuple(weights[name].shape)}; its settings describe {shape}")


class Estimator(BaseEstimator):
    """Base of estimators over a prior that learn from pairs (theta, x); a subclass gives `build` and `row_loss`.

    Args: prior: over theta; the network sees theta in its whitening map. Others as `BaseEstimator`.   Raises: SettingError.

    Example: the posterior mean, by least squares

    >>> import numpy as np, sbi_phys as sp
    >>> from torch import nn
    >>> class PosteriorMean(sp.Estimator):
    ...     def build(self, scaler, seed):
    ...         return nn.Linear(scaler.shape[0], self.prior.free_dim)
    ...     def row_loss(self, net, u, x):
    ...         return ((net(x) - u) ** 2).sum(dim=1)
    >>> prior = sp.NormalPrior([sp.Parameter("mu")])
    >>> theta = prior.sample(200, np.random.default_rng(0))
    >>> PosteriorMean(prior, config=sp.TrainConfig(max_epochs=2)).fit(theta, theta + 0.1)
    PosteriorMean(prior=NormalPrior(mu), config=TrainConfig(max_epochs=2)): 1 trained network
    """

    config: TrainConfig
    takes: ClassVar[str] = "weighted draws"  # of theta: 'weighted draws', 'draws of the prior' or 'any theta'

    def __init__(self, prior: Prior, **shared: Unpack[Shared]) -> None:
        super().__init__(**shared)
        if not isinstance(prior, Prior):
            raise SettingError(f"prior is a {type(prior).__name__}; expected a prior, e.g. BoxPrior([Parameter(...)])")
        require_rebuilt(prior)
        self.prior = prior
        self.config = self.config or TrainConfig()

    def fit(
        self,
        theta: ArrayLike | Tensor | Store | str | Path | Sequence[Store | str | Path] | None = None,
        x: ArrayLike | Tensor | None = None,
        *,
        weights: ArrayLike | None = None,
        proposal: Density | None = None,
        simulator: Simulator | None = None,
        online: bool = False,
        n: int | None = None,
        memory: int | None = None,
        workers: int | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train on simulations: arrays, stores, or a simulator that runs during the training.

        Args: theta (n, d) in the prior's support and x (n, ...), with an embedding of sets also a list of arrays (m_i, k); or a store
        (or its path, or several) in place of both; or simulator=..., online=True, n=...: n fresh simulations, each used once.
        weights: (n,) > 0, one per row of the arrays or per successful row of the stores: the weighted mean of the losses is minimised.
        proposal: the density that theta were drawn from, where it is not the prior: another prior, or any object with
            log_prob(theta) -> (n,), up to a constant. Weights prior / proposal are made from it. Without it, theta that do not look like
            draws of the prior are warned of, with the number that shows it (`other_priors`); rows of a store that was drawn from
            another prior are weighted by themselves. NLE takes theta from anywhere, NRE draws of its prior alone.
        memory: bytes that the rows of stores may take: more are streamed from disk; default half of the machine's memory.
        workers: processes that simulate online, 0 for a thread; default all cores but one.
        checkpoint: path prefix; an interrupted training continues from there, with the same weights in the end.
        Under torchrun all ranks call this alike and end with the same network.
        Raises: ShapeError, NonFiniteError, SupportError, DataError (empty, too few), TrainingError, StoreError, SettingError.
        """
        progress = or_none(progress)
        if online or simulator is not None:
            simulator = self._online_simulator(simulator, online, (theta, x), weights)
            rows = from_simulator(simulator, n, self._source_settings(), workers)
        else:
            rows = self._stored_rows(theta, x, weights, proposal, memory, progress)
        with rows:
            self._train(rows, self._loss(rows.scaler), checkpoint, progress)
        return self

    def _stored_rows(self, theta: Any, x: Any, weights: Any, proposal: Any, memory: int | None, progress: Progress) -> Rows:
        stores = stores_of(theta, self.prior)
        if stores is None:
            if theta is None or x is None:
                raise DataError(f"{'theta' if theta is None else 'x'} is missing; expected {_WAYS}")
            weights = self._prior_weights(lambda: as_theta(self.prior, theta), weights, proposal)
            return from_arrays(theta, self._with_slots(x), self._source_settings(), weights)
        if x is not None:
            raise DataError(f"x was given together with a store; expected {_WAYS}")
        drawn = [store.theta_kind == "prior" for store in stores]
        if proposal is None and all(drawn) and any(store.prior != self.prior for store in stores):
            proposal = MixedPriors([store.prior for store in stores], [store.n_ok for store in stores])
        if proposal is not None or not all(drawn):
            weights = self._prior_weights(lambda: _theta_of(stores), weights, proposal)
        self.identity = self.identity or stores[0].identity
        self.observables = self.observables or stores[0].observables
        return from_stores(stores, self._source_settings(), memory, progress, weights)

    def _prior_weights(self, read: Callable[[], Array | None], weights: Any, proposal: Any) -> Any:
        """Weights of theta from a proposal, times those given; theta without either are compared with the prior, by a warning."""
        if self.takes == "any theta":
            return weights
        if proposal is not None and self.takes == "draws of the prior":
            raise SettingError(
                f"{type(self).__name__}.fit takes draws of its prior, {self.prior!r}, and theta are from a proposal; expected simulations"
                " from the prior: sp.simulate(..., prior=...)"
            )
        theta = read() if proposal is not None or weights is None else None
        if theta is None:
            return weights
        if proposal is None:
            warn_unlike_prior(self.prior, theta)
            return weights
        found = prior_weights(self.prior, proposal, theta)
        return weights if found is None else found if weights is None else found * checked_weights(weights, len(found))

    def _reach_of(self, rows: Rows) -> Reach | None:
        return Reach.fit(rows.member(0)[1][1])

    def _source_settings(self) -> Settings:
        return Settings(
            self.prior, self.seed, self.config, self.device, self.x_transform, self.observables, self._scaling(), self.standardise
        )

    def _scaling(self) -> Callable[[AnyArray, Integers | slice], Scaling] | None:
        """Function (x, training rows) -> map of x to the network's input; None takes `XScaler`."""
        return None

    def _loss(self, scaler: Any) -> Loss:
        return self.row_loss

    def _u(self, theta: ArrayLike | Tensor) -> Tensor:
        """Network inputs (m, d') of theta (m, d), on the device.   Raises: ShapeError, NonFiniteError, SupportError."""
        u = self.prior.to_network(as_matrix("theta", theta, self.prior.dim, self.prior.names))
        return torch.from_numpy(u.astype(np.float32)).to(self.device)


def _theta_of(stores: Sequence[Store]) -> Array:
    """theta (n, d) of the rows that training uses, in the order of the stores."""
    return np.concatenate([theta for store in stores for theta, _, _ in store.shards(valid_only=True)])


class _Weighted:
    """Row losses times the weight in the last column, whose mean is one."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, net: nn.Module, *rows: Tensor) -> Tensor:
        return rows[-1] * self.loss(net, *rows[:-1])


@dataclass(frozen=True)
class _Given:
    """What the caller of `load` gives for what a file holds by name alone."""

    embedding: nn.Module | str | None = None
    flow: nn.Module | str | None = None
    prior: Prior | None = None
    allow_import: bool = False

    def decoded(self, path: Path, name: str, value: Any) -> Any:
        """A setting from its plain values; a prior that is given replaces that of the file."""
        if isinstance(value, dict) and "prior" in value:
            stored = json.loads(value["prior"])
            return prior_from_dict(stored, allow_import=self.allow_import) if self.prior is None else same_prior(path, stored, self.prior)
        return _decoded(value)

    def network(self, path: Path, name: str, stored: Any) -> Any:
        """The module or the settings to build with.   Raises: ModelFileError if the module is missing, or is one too many."""
        given = getattr(self, name)
        if isinstance(stored, dict):
            if given is None:
                kind = stored["module"]
                raise ModelFileError(f"{path} was trained with an {name} of class {kind}; expected load(path, {name}={kind}(...))")
            return given
        spec = getattr(stored, "spec", "")
        if given is not None and not spec:
            raise ModelFileError(f"{path} was trained with the default {name}; expected load(path) without an {name}")
        if isinstance(given, str):
            return replace(stored, spec=given)
        if given is not None:
            return given
        if spec:
            otherwise = f"load(path, {name}=...) with the module"
            what = f"{path}: {name}"
            find_class(what, spec, nn.Module, allow_import=self.allow_import, error=ModelFileError, otherwise=otherwise)
        return stored


def load(
    path: str | Path,
    *,
    simulator: Simulator | None = None,
    embedding: nn.Module | str | None = None,
    flow: nn.Module | str | None = None,
    prior: Prior | None = None,
    allow_import: bool = False,
    device: str | torch.device = "auto",
) -> Any:
    """Read a model that `save` wrote, of the class that the file names.

    Args: simulator: if given, it must be the one the model was trained with. embedding, flow: the module, where the model was
    trained with an object of the user's own (its weights come from the file), or another name 'module:Class' for the same class.
    prior: the prior, where its class is the user's own and cannot be found; it must describe itself as the file does.
    allow_import: import the modules of the user's own embedding, flow and prior that the file names; without it they must have been
    imported. To import a module is to run it: say True only if you trust the file's author or have looked at the name in the error.
    Raises: ModelFileError (missing, truncated, not ours, a class that has not been imported or is of another kind),
    SimulatorMismatchError.

    >>> import numpy as np, sbi_phys as sp
    >>> prior = sp.NormalPrior([sp.Parameter("mu")])
    >>> theta = prior.sample(100, np.random.default_rng(0))
    >>> npe = sp.NPE(prior, config=sp.TrainConfig(max_epochs=1)).fit(theta, theta + 0.1)
    >>> npe.save("npe.pt")
    >>> bool((sp.load("npe.pt").sample([0.3], 5) == npe.sample([0.3], 5)).all())
    True
    """
    try:
        path = Path(path)
        path.is_file()
    except (TypeError, ValueError, OSError) as err:
        raise ModelFileError(f"path is {str(path)[:80]!r}, a {type(path).__name__}; expected the path of a model file ({err})") from err
    content = read_file(path, *FILE)
    kind = _class_named(path, content)
    try:
        model = kind._from_content(path, content, _Given(embedding, flow, prior, allow_import), device)
    except (ModelFileError, SimulatorMismatchError):
        raise
    except DataError as err:
        raise ModelFileError(f"{path}: {err}") from err
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, SbiPhysError, TypeError, ValueError) as err:
        what = (str(err).splitlines() or [type(err).__name__])[0]
        raise ModelFileError(f"{path} does not describe a model that this version can build: {what}") from err
    if simulator is not None:
        _require_same_simulator(path, model.identity, simulator)
    return model


def _require_size(path: Path, settings: dict[str, Any], weights: Sequence[dict[str, Tensor]]) -> None:
    """Raise ModelFileError for a network with more units, layers or members than the file has numbers."""
    n = max(1000, sum(t.numel() for net in weights for t in net.values()))
    configs = {k: asdict(v) for k, v in settings.items() if type(v).__name__ in _CONFIGS and not isinstance(v, TrainConfig)}
    configs["settings"] = {k: v for k, v in settings.items() if k.startswith("n_")}
    for where, values in configs.items():
        for name, value in values.items():
            if isinstance(value, int) and value > n:
                raise ModelFileError(f"{path} has {where}.{name} = {value!r:.50}, and {n} numbers at most; expected a network of that size")


def _class_named(path: Path, content: dict[str, Any]) -> type[BaseEstimator]:
    name = content.get("estimator")
    if isinstance(name, str) and name in _MODULES:
        importlib.import_module(_MODULES[name])
    if not isinstance(name, str) or name not in _CLASSES:
        known = ", ".join(sorted({*_MODULES, *_CLASSES}))
        raise ModelFileError(f"{path} is the file of an estimator {name!r}; expected one of {known}, or import its module before")
    return _CLASSES[name]


def _require_same_simulator(path: Path, stored: dict[str, Any] | None, simulator: Simulator) -> None:
    """Raise SimulatorMismatchError unless the stored identity is the given simulator's, or that of an emulator of it."""
    got = simulator_identity(simulator)
    if stored is None or json.loads(json.dumps(got)) in (stored, stored.get("settings", {}).get("emulates")):
        return
    raise SimulatorMismatchError(f"{path} was trained with {json.dumps(stored)}; got {json.dumps(got)}")


def _is_default(value: Any, parameter: inspect.Parameter) -> bool:
    """Whether a setting needs no mention: its default, or a configuration all of whose values are defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        return not _changed(value)
    return value is parameter.default or (isinstance(value, int | float | str | bool) and value == parameter.default)


def _short(value: Any) -> str:
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}(...)"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({', '.join(f'{k}={v!r}' for k, v in _changed(value))})"
    if isinstance(value, tuple) and value and all(isinstance(v, Observable) for v in value):
        return f"[{', '.join(v.name for v in value)}]"
    return repr(value)


def _changed(config: Any) -> list[tuple[str, Any]]:
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
    return [(name, getattr(config, name)) for name, default in defaults.items() if getattr(config, name) != default]


def _encoded(name: str, value: Any) -> Any:
    """A setting as plain values: what `_decoded` reads.   Raises: ModelFileError for what no file can hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Prior):
        return {"prior": json.dumps(value.to_dict())}
    if isinstance(value, nn.Module):
        return {"module": type(value).__qualname__}
    if type(value).__name__ in _CONFIGS:
        return {"config": type(value).__name__, "values": asdict(value)}
    if isinstance(value, tuple | list) and all(isinstance(v, Observable) for v in value):
        return {"observables": json.dumps([asdict(o) for o in value])}
    if isinstance(value, tuple | list):
        return [_encoded(name, v) for v in value]
    raise ModelFileError(f"setting {name} is a {type(value).__name__}; expected a number, text, a prior, a module or {', '.join(_CONFIGS)}")


def _decoded(value: Any) -> Any:
    """Inverse of `_encoded`; a module stays {"module": class name}."""
    if not isinstance(value, dict):
        return [_decoded(v) for v in value] if isinstance(value, list) else value
    if "prior" in value:
        return prior_from_dict(json.loads(value["prior"]))
    if "config" in value:
        return _CONFIGS[value["config"]](**value["values"])
    if "observables" in value:
        return [Observable(**o) for o in json.loads(value["observables"])]
    return value
