"""What the base gives to every estimator: settings, files, checkpoints, weights, stores larger than memory, online data, errors."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sbi_phys as sp
from sbi_phys.core.errors import DataError, ModelFileError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.base import FILE
from sbi_phys.nets.classifier import ClassifierConfig
from sbi_phys.nets.embedding_set_likelihood import LikelihoodSet
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.training.checkpoint import read_file, write_file
from sbi_phys.training.sources import InMemory, Rows
from tests.toys import LinearGaussian

SIM = LinearGaussian(dim=2, n_columns=4)
SMALL = EmbeddingConfig(hidden=16, n_blocks=1, n_features=8)
NETWORK = ClassifierConfig(hidden=16, n_features=8, rank=8)
FLOW = sp.FlowConfig(n_layers=1, hidden=16)
QUICK = sp.TrainConfig(max_epochs=3, batch_size=50)
N = 300

THETA = SIM.prior.sample(N, rng_for(0, "theta"))
X = SIM.simulate(THETA, rng_for(0, "x"))
OTHER = THETA[::-1].copy()
Y = np.arange(N) % 2
LOG_R = SIM.log_likelihood(X, np.where(Y[:, None] == 1, THETA, OTHER)) - SIM.log_likelihood(X, np.where(Y[:, None] == 1, OTHER, THETA))
EVENTS = SIM.simulate(np.where(Y[:, None] == 1, THETA, OTHER), rng_for(1))


@dataclass(frozen=True)
class Case:
    """How to make one, train it on N rows, and ask it; `over_prior`: whether it is an `Estimator`."""

    kind: Callable[..., Any]
    own: dict[str, Any]
    fit: Callable[..., Any]
    ask: Callable[[Any], np.ndarray]
    over_prior: bool = True

    def make(self, **settings: Any) -> Any:
        given = {"config": QUICK, "device": "cpu", "seed": 3, "embedding": SMALL} | self.own | settings
        return self.kind(SIM.prior, **given) if self.over_prior else self.kind(**given)


def _scores() -> LikelihoodSet:
    """Any scores: two events of one column and its mask are the four columns of x, which is enough to be trained on."""
    torch.manual_seed(0)
    return LikelihoodSet(1, 2, hidden=8, rank=4, config=SMALL).eval()


def _sets(x: np.ndarray) -> np.ndarray:
    return np.stack([x[:, 0], np.ones(len(x)), x[:, 1], np.ones(len(x))], axis=1)


class SetSimulator(LinearGaussian):
    """Two events and their mask as columns."""

    def simulate(self, theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _sets(super().simulate(theta, rng))


SETS = SetSimulator(dim=2, n_columns=4)
CASES = {
    "NPE": Case(sp.NPE, {"flow": FLOW}, lambda m, **k: m.fit(THETA, X, **k), lambda m: m.log_prob(THETA[:9], X[:9])),
    "NLE": Case(sp.NLE, {"flow": FLOW}, lambda m, **k: m.fit(THETA, X, **k), lambda m: m.log_likelihood(X[:9], THETA[:9])),
    "NRE": Case(sp.NRE, {"network": NETWORK}, lambda m, **k: m.fit(THETA, X, **k), lambda m: m.log_ratio(X[:9], THETA[:9])),
    "SetNPE": Case(
        sp.SetNPE,
        {"flow": FLOW, "embedding": _scores()},
        lambda m, **k: m.fit(THETA, _sets(X), **k),
        lambda m: m.log_prob(THETA[:9], _sets(X[:9])),
    ),
    "TwoHypotheses": Case(
        sp.TwoHypotheses,
        {"network": NETWORK},
        lambda m, weights=None, **k: m.fit(THETA, X, OTHER, X[::-1], weights=None if weights is None else (weights, weights), **k),
        lambda m: m.log_ratio(X[:9], THETA[:9], OTHER[:9]),
        over_prior=False,
    ),
    "MinedRatio": Case(
        sp.MinedRatio,
        {"network": NETWORK},
        lambda m, **k: m.fit(THETA, OTHER, EVENTS, Y, LOG_R, **k),
        lambda m: m.log_ratio(X[:9], THETA[:9], OTHER[:9]),
        over_prior=False,
    ),
    "SALLY": Case(sp.SALLY, {}, lambda m, **k: m.fit(X, THETA, **k), lambda m: m.score(X[:9]), over_prior=False),
}
OVER_PRIOR = [name for name, case in CASES.items() if case.over_prior]
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
over_prior = pytest.mark.parametrize("name", OVER_PRIOR)
from_pairs = pytest.mark.parametrize("name", [*OVER_PRIOR, "TwoHypotheses"])  # rows (theta, x)


def simulator_of(name: str) -> LinearGaussian:
    return SETS if name == "SetNPE" else SIM


@each
def test_settings_rebuild_an_untrained_estimator(case: Case) -> None:
    model = case.make(n_ensemble=2, x_transform="real")
    again = type(model)(**model.settings)
    assert (again.settings, repr(again)) == (model.settings, repr(model))
    assert "n_ensemble=2" in repr(model) and repr(model).endswith(": not trained")
    with pytest.raises(TypeError, match="n_ensembles"):
        case.make(n_ensembles=2)


@each
def test_a_file_gives_the_same_answers(case: Case, tmp_path: Path) -> None:
    model = case.fit(case.make(n_ensemble=2, simulator=SIM))
    model.save(tmp_path / "model.pt")
    own = {"embedding": _scores()} if case.kind is sp.SetNPE else {}
    again = sp.load(tmp_path / "model.pt", simulator=SIM, device="cpu", **own)
    assert type(again) is case.kind
    np.testing.assert_array_equal(case.ask(again), case.ask(model))
    assert (again.history, again.identity, again.observables) == (model.history, model.identity, model.observables)
    assert repr(again).endswith(": 2 trained networks")
    other = sp.NLE if case.kind is not sp.NLE else sp.NPE
    with pytest.raises(ModelFileError, match=f"expected one of {other.__name__}"):
        other.load(tmp_path / "model.pt", **own)


class _Breaks:
    """Progress that fails in the second epoch of the second member."""

    def __init__(self) -> None:
        self.members = 0

    def task(self, description: str, total: float | None) -> "_Breaks":
        self.members += description.startswith("train")
        self.left = 2
        return self

    def __enter__(self) -> "_Breaks":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def advance(self, n: float = 1, text: str = "") -> None:
        self.left -= 1
        if self.members == 2 and not self.left:
            raise KeyboardInterrupt


@each
def test_an_interrupted_training_continues_from_its_checkpoint(case: Case, tmp_path: Path) -> None:
    whole = case.fit(case.make(n_ensemble=2), checkpoint=tmp_path / "whole")
    broken = case.make(n_ensemble=2)
    with pytest.raises(KeyboardInterrupt):
        case.fit(broken, checkpoint=tmp_path / "broken", progress=_Breaks())
    assert not broken.history and sorted(p.name for p in tmp_path.iterdir()) == ["broken.0", "broken.1", "whole.0", "whole.1"]
    np.testing.assert_array_equal(case.ask(case.fit(case.make(n_ensemble=2), checkpoint=tmp_path / "broken")), case.ask(whole))


@each
def test_weights_count(case: Case) -> None:
    plain, equal = case.ask(case.fit(case.make())), case.ask(case.fit(case.make(), weights=np.full(N, 7.0)))
    np.testing.assert_allclose(equal, plain, rtol=1e-4, atol=1e-5)
    other = case.ask(case.fit(case.make(), weights=rng_for(5).exponential(size=N) + 0.01))
    assert np.isfinite(other).all() and np.abs(other - plain).max() > 1e-3


@each
def test_weights_that_are_none_are_refused(case: Case) -> None:
    bad = np.ones(N)
    bad[17] = 0.0
    with pytest.raises(DataError, match=r"weights has 1 of 300 values that are not > 0, the first is 0 in row 17"):
        case.fit(case.make(), weights=bad)
    bad[17] = np.nan
    with pytest.raises(NonFiniteError, match="weights has NaN"):
        case.fit(case.make(), weights=bad)
    with pytest.raises(ShapeError, match=r"weights has shape \(299,\); expected \(300,\)"):
        case.fit(case.make(), weights=np.ones(N - 1))


def test_the_loss_is_the_weighted_mean() -> None:
    weights = rng_for(5).exponential(size=N) + 0.01
    config = sp.TrainConfig(max_epochs=1, batch_size=50, ema_decay=0.0)
    model = CASES["NPE"].make(config=config).fit(THETA, X, weights=weights)
    u = torch.from_numpy(SIM.prior.to_unbounded(THETA).astype(np.float32))
    rows = (u, model._scaler.apply(X), torch.from_numpy(weights))
    batches, _ = InMemory(rows, model._scaler, config, seed=3, device="cpu").member(0)
    u, x, w = batches.validation
    with torch.no_grad():
        loss = model.row_loss(model._nets[0], u, x).double()
    assert model.history[0][0]["valid"] == pytest.approx(float((w * loss).sum() / w.sum()), rel=1e-5)


@from_pairs
@pytest.mark.parametrize("weighted", [False, True])
def test_a_store_larger_than_memory_is_streamed(name: str, weighted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, sim = CASES[name], simulator_of(name)
    store = sp.simulate(sim, 1000, tmp_path / "store", seed=0, workers=1, shard_size=250)
    weights = np.ones(1000) if weighted else None
    seen: list[Rows] = []
    train = sp.estimators.BaseEstimator._train

    def spy(self: Any, rows: Rows, *args: Any) -> None:
        seen.append(rows)
        train(self, rows, *args)

    monkeypatch.setattr(sp.estimators.BaseEstimator, "_train", spy)
    monkeypatch.setattr("sbi_phys.estimators.set_npe._SUMMARISED", 50)  # sets at a time, which the memory must hold
    held, streamed = case.make().fit(store, weights=weights), case.make().fit(store, memory=60_000, weights=weights)
    assert [isinstance(rows, InMemory) for rows in seen] == [True, False]
    assert [rows.weighted for rows in seen] == [weighted, weighted]
    # of other training rows: one in ten is held out
    np.testing.assert_allclose(streamed._scaler.mean, held._scaler.mean, atol=0.1)
    np.testing.assert_allclose(streamed._scaler.scale, held._scaler.scale, rtol=0.1)
    assert streamed._scaler.shape == held._scaler.shape
    assert np.isfinite(case.ask(streamed)).all()
    losses = [model.history[0][-1]["valid"] for model in (held, streamed)]
    assert losses[1] == pytest.approx(losses[0], abs=0.5)


def test_streamed_weights_belong_to_their_rows(tmp_path: Path) -> None:
    store = sp.simulate(SIM, 600, tmp_path / "store", seed=0, workers=1, shard_size=200)
    theta, _ = store.read()
    weights = np.exp(theta[:, 0])
    with sp.Stream(store, SIM.prior, memory=60_000, weights=weights) as stream:
        rows = [*stream.epoch(0, 20), *stream.epoch(1, 15), stream.validation]
        for u, _, w in rows:
            np.testing.assert_allclose(w, torch.exp(u[:, 0]) / weights.mean(), rtol=1e-5)
        with sp.Stream(store, SIM.prior, memory=60_000, weights=np.ones(600)) as other:
            assert stream.fingerprint() != other.fingerprint()
    with pytest.raises(SettingError, match="labels=True and weights"):
        sp.Stream(store, SIM.prior, weights=weights, labels=True)
    with pytest.raises(ShapeError, match="weights has shape"):
        sp.Stream(store, SIM.prior, weights=weights[1:])


@from_pairs
def test_online_data(name: str) -> None:
    case, sim = CASES[name], simulator_of(name)
    model = case.make(n_ensemble=2).fit(simulator=sim, online=True, n=500, workers=0)
    assert np.isfinite(case.ask(model)).all()
    assert model.identity is not None and model.identity["class"].endswith(type(sim).__name__)
    assert [len(member) for member in model.history] == [3, 3]
    with pytest.raises(DataError, match="weights were given together with a simulator"):
        case.make().fit(simulator=sim, online=True, n=500, weights=np.ones(500))
    for half in ({"simulator": sim}, {"online": True}):
        with pytest.raises(SettingError, match="takes both simulator=... and online=True"):
            case.make().fit(**half)
    with pytest.raises(DataError, match="theta or x was given together with a simulator"):
        case.make().fit(THETA, X, simulator=sim, online=True)


@pytest.mark.parametrize("name", ["MinedRatio", "SALLY"])
def test_joint_scores_and_ratios_are_arrays(name: str, tmp_path: Path) -> None:
    fit = CASES[name].make().fit
    store = sp.simulate(SIM, 30, tmp_path / "store", seed=0, workers=1)
    for given, settings in (((store,), {}), ((tmp_path / "store",), {}), ((), {"simulator": SIM, "online": True}), ((), {"online": True})):
        with pytest.raises(SettingError, match=f"{name} learns from joint .*expected arrays in memory: simulate x, compute"):
            fit(*given, **settings)
    with pytest.raises(DataError, match=r"missing; expected fit\("):
        fit(THETA)


@over_prior
def test_half_of_the_data_and_what_is_no_prior(name: str) -> None:
    case = CASES[name]
    with pytest.raises(SettingError, match="prior is a list; expected a prior"):
        case.kind([0, 1])
    for given, missing in (((THETA, None), "x"), ((None, X), "theta")):
        with pytest.raises(DataError, match=f"{missing} is missing; expected fit"):
            case.make().fit(*given)


@each
def test_asked_before_training_and_with_other_columns(case: Case, tmp_path: Path) -> None:
    fresh = case.make()
    with pytest.raises(SettingError, match=f"this {type(fresh).__name__} is not trained"):
        fresh.save(tmp_path / "model.pt")
    with pytest.raises(SettingError, match="is not trained"):
        case.ask(fresh)
    model = case.fit(case.make())
    theta = (THETA[:3], X[:3, :3])
    asked: dict[str, Callable[[], Any]] = {
        "log_prob": lambda: model.log_prob(*theta),
        "log_likelihood": lambda: model.log_likelihood(*theta[::-1]),
        "log_ratio": lambda: model.log_ratio(X[:3, :3], *[THETA[:3]] * (1 if case.over_prior else 2)),
        "score": lambda: model.score(X[:3, :3]),
    }
    for name, ask in asked.items():
        if hasattr(model, name):
            with pytest.raises(ShapeError, match=r"x has shape \(3, 3\); expected \(4,\)"):
                ask()


def test_a_store_tells_what_made_it(tmp_path: Path) -> None:
    store = sp.simulate(SIM, 30, tmp_path / "store", seed=0, workers=1)
    model = sp.NRE(SIM.prior, config=sp.TrainConfig(max_epochs=1))
    with pytest.raises(DataError, match="x was given together with a store"):
        model.fit(store, np.zeros((30, 4)))
    assert model.identity is None
    model.fit(tmp_path / "store")
    assert model.identity == store.identity
    assert model.observables == tuple(store.observables)


def test_a_simulator_is_an_object() -> None:
    model = sp.NPE(SIM.prior, simulator=SIM)
    assert model.identity == {"class": "tests.toys:LinearGaussian", "settings": SIM.settings}
    assert model.observables == SIM.observables
    with pytest.raises(sp.SbiPhysError, match="has no attribute 'prior'"):
        sp.NPE(SIM.prior, simulator={"class": "tests.toys:LinearGaussian", "settings": {}})


def test_classes_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="called NPE, as one of sbi_phys is"):
        type("NPE", (sp.Estimator,), {})
    CASES["NPE"].fit(CASES["NPE"].make()).save(tmp_path / "npe.pt")
    content = read_file(tmp_path / "npe.pt", *FILE)
    write_file(tmp_path / "mine.pt", *FILE, content | {"estimator": "Mine"})
    with pytest.raises(ModelFileError, match="of an estimator 'Mine'; expected one of .*NPE.*import its module before"):
        sp.load(tmp_path / "mine.pt")


class Unfinished(sp.Estimator):
    """A network and no loss; a setting that no file can hold."""

    def build(self, scaler: Any, seed: int) -> nn.Module:
        return nn.Linear(scaler.shape[0], 1)


def test_what_a_subclass_has_forgotten_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="Unfinished has no row_loss"):
        Unfinished(SIM.prior, config=QUICK).fit(THETA, X)
    model = CASES["NPE"].fit(CASES["NPE"].make())
    model.flow = object()
    with pytest.raises(ModelFileError, match="setting flow is a object"):
        model.save(tmp_path / "npe.pt")


def test_a_misspelt_setting_is_named_with_the_nearest_one():
    with pytest.raises(TypeError, match="NPE has no setting 'flwo'; did you mean 'flow'.*expected prior, "):
        sp.NPE(sp.BoxPrior([sp.Parameter("a", 0, 1)]), flwo="maf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["settings"]["flow"]["values"].update(hidden=2_000), "its settings describe|expected a network of that size"),
        (lambda c: c["settings"]["flow"]["values"].update(n_layers=10**9), "expected a network of that size"),
        (lambda c: c["settings"].update(n_ensemble=10**12), "expected a network of that size"),
        (lambda c: c["settings"].update(seed=-1), "does not describe a model"),
        (lambda c: c["settings"].update(seed="0"), "does not describe a model"),
        (lambda c: c.update(settings=[]), "does not describe a model"),
        (lambda c: c.update(weights=[]), "holds no trained network"),
        (lambda c: c.update(weights=[{}]), "does not describe a model"),
        (lambda c: c.update(identity="{"), "does not describe a model"),
        (lambda c: c.update(scaler={"kind": "other"}), "does not describe a model"),
        (lambda c: c["settings"].update(prior={"prior": "{}"}), "prior description {} is not one of"),
        (lambda c: c.update(estimator=["NPE"]), "estimator"),
        (lambda c: c.update(estimator="Path"), "is the file of an estimator 'Path'"),
    ],
)
def test_a_file_whose_content_was_changed_with_valid_checksums(tmp_path, change, message):
    prior = sp.NormalPrior([sp.Parameter("mu")])
    theta = prior.sample(60, np.random.default_rng(0))
    sp.NPE(prior, config=sp.TrainConfig(max_epochs=1)).fit(theta, theta).save(tmp_path / "m.pt")
    content = read_file(tmp_path / "m.pt", *FILE)
    change(content)
    write_file(tmp_path / "m.pt", *FILE, content)
    with pytest.raises(ModelFileError, match=message):
        sp.load(tmp_path / "m.pt")
