"""The learned unfolders as estimators: settings, files that give the same answers, and a training that fails."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sbi_phys as sp
from sbi_phys.core.errors import ModelFileError, SettingError, TrainingError
from sbi_phys.core.rng import rng_for
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.training.loop import TrainConfig, fit
from sbi_phys.unfold import FlowUnfolder, ForwardUnfolder

RNG = rng_for(0, "pairs")
TRUTH = RNG.standard_normal((300, 2)) * [1.0, 3.0] + [0.0, 5.0]
SEEN = TRUTH[:, 0] > -1
RECO = np.where(SEEN[:, None], TRUTH + 0.5 * RNG.standard_normal((300, 2)), np.nan)
DATA = RECO[SEEN][:150]
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "seed": 3,
    "n_ensemble": 2,
    "flow": FlowConfig(kind="affine", n_layers=1, hidden=16),
    "config": TrainConfig(max_epochs=2, batch_size=50),
}


@dataclass(frozen=True)
class Case:
    """How to train one, and its answers."""

    kind: type[FlowUnfolder] | type[ForwardUnfolder]
    fit: Callable[..., Any]
    ask: Callable[[Any], list[np.ndarray]]


def _forward(u: ForwardUnfolder) -> list[np.ndarray]:
    found = u.unfold(DATA, support=64, n_iterations=2, n_replicas=2, seed=1)
    return [u.sample(TRUTH[:5], 4, seed=1), u.log_likelihood(DATA[:5], TRUTH[:5]), u.efficiency(TRUTH), found.weights, found.replicas]


CASES = {
    "FlowUnfolder": Case(
        FlowUnfolder,
        lambda u, reco=RECO, **k: u.fit(TRUTH, reco, DATA, 2, reco_pass=SEEN, **k),
        lambda u: [u.sample(DATA[:5], 4, seed=1), u.log_prob(TRUTH[:5], DATA[:5]), u.weights, u.data_weights],
    ),
    "ForwardUnfolder": Case(ForwardUnfolder, lambda u, reco=RECO, **k: u.fit(TRUTH, reco, SEEN, **k), _forward),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return {name: case.fit(case.kind(**SETTINGS)) for name, case in CASES.items()}


@each
def test_settings_rebuild_an_untrained_one(case: Case) -> None:
    unfolder = case.kind(**SETTINGS)
    again = case.kind(**unfolder.settings)
    assert set(again.settings) == {"flow", "embedding", "n_ensemble", "config", "seed"}
    assert (again.settings, repr(again)) == (unfolder.settings, repr(unfolder))
    assert "n_ensemble=2" in repr(again) and repr(again).endswith(": not trained")
    with pytest.raises(TypeError, match=rf"{case.kind.__name__} has no setting 'n_ensembles'.*n_ensemble"):
        case.kind(n_ensembles=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="has no setting 'x_transform'"):  # truth and reco are standardised, and nothing else
        case.kind(x_transform="counts")  # type: ignore[call-arg]


@each
def test_a_file_gives_the_same_answers(case: Case, trained: dict[str, Any], tmp_path: Path) -> None:
    unfolder = trained[case.kind.__name__]
    unfolder.save(tmp_path / "unfolder.pt")
    again = sp.load(tmp_path / "unfolder.pt", device="cpu")
    assert type(again) is case.kind and (again.settings, again.history) == (unfolder.settings, unfolder.history)
    assert repr(again).endswith(": 2 trained networks")
    for got, expected in zip(case.ask(again), case.ask(unfolder), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert np.ptp(case.ask(again)[0][0, :, 0]) > 0
    with pytest.raises(ModelFileError, match=f"is the file of a {case.kind.__name__}; expected one of NPE"):
        sp.NPE.load(tmp_path / "unfolder.pt")
    with pytest.raises(SettingError, match=f"this {case.kind.__name__} is not trained"):
        case.kind(device="cpu").save(tmp_path / "other.pt")


def test_history_is_by_network_and_iterations_by_iteration(trained: dict[str, Any], tmp_path: Path) -> None:
    flow, forward = trained["FlowUnfolder"], trained["ForwardUnfolder"]
    assert [len(member) for member in flow.history] == [4, 4]  # two epochs in each of two iterations
    best = [[min(r["valid"] for r in member[2 * k : 2 * k + 2]) for member in flow.history] for k in range(2)]
    assert [record.loss for record in flow.iterations] == [float(np.mean(losses)) for losses in best]
    assert [len(member) for member in forward.history] == [2, 2]
    assert forward.losses == tuple(min(r["valid"] for r in member) for member in forward.history)
    flow.save(tmp_path / "flow.pt")
    for got, expected in zip(FlowUnfolder.load(tmp_path / "flow.pt").iterations, flow.iterations, strict=True):
        np.testing.assert_array_equal([*got.mean, *got.sd, got.separation], [*expected.mean, *expected.sd, expected.separation])
        assert (got.iteration, got.loss, got.effective_sample_size) == (expected.iteration, expected.loss, expected.effective_sample_size)


def test_all_truths_seen_and_a_matrix_after_loading(tmp_path: Path) -> None:
    """Without missed events there is no classifier to keep; the matrix needs the truths of the training."""
    one = ForwardUnfolder(**SETTINGS).fit(TRUTH[:, 0], TRUTH[:, 0] + 0.3 * rng_for(1).standard_normal(300))
    one.save(tmp_path / "one.pt")
    again = ForwardUnfolder.load(tmp_path / "one.pt", device="cpu")
    np.testing.assert_array_equal(again.efficiency([0.0, 1.0]), 1)
    first, second = (u.response([-1, 0, 1], [-2, 0, 2]) for u in (one, again))
    np.testing.assert_array_equal(first.matrix, second.matrix)
    np.testing.assert_array_equal(first.n_simulated, second.n_simulated)


@each
def test_an_embedding_of_the_users_own(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unfolder = case.fit(case.kind(**SETTINGS | {"embedding": nn.Sequential(nn.Linear(2, 4), nn.Tanh())}))
    unfolder.save(tmp_path / "own.pt")
    with pytest.raises(ModelFileError, match="was trained with an embedding of class Sequential"):
        sp.load(tmp_path / "own.pt")
    again = sp.load(tmp_path / "own.pt", embedding=nn.Sequential(nn.Linear(2, 4), nn.Tanh()), device="cpu")
    np.testing.assert_array_equal(case.ask(again)[0], case.ask(unfolder)[0])


@each
def test_an_interrupted_training_continues_from_its_checkpoint(
    case: Case, trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        """Stops in the first epoch of the second network."""
        for record in fit(*args, **kwargs):
            yield record
            seconds.append(record.seconds)
            if len(seconds) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr("sbi_phys.unfold._learned.fit", interrupted)
    unfolder = case.kind(**SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        case.fit(unfolder, checkpoint=tmp_path / "half")
    assert repr(unfolder).endswith(": not trained") and len(list(tmp_path.iterdir())) == 2
    case.fit(unfolder, checkpoint=tmp_path / "half")
    first, second = unfolder.history
    assert [first[0]["seconds"], first[1]["seconds"], second[0]["seconds"]] == seconds[:3]  # of the epochs before, not trained again
    for got, expected in zip(case.ask(unfolder), case.ask(trained[case.kind.__name__]), strict=True):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(ModelFileError, match="half.0"):
        case.fit(case.kind(**SETTINGS | {"seed": 4}), checkpoint=tmp_path / "half")


@each
def test_a_training_that_fails_leaves_it_as_it_was(case: Case, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    unfolder = trained[case.kind.__name__]
    before, history = case.ask(unfolder), unfolder.history
    calls = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise TrainingError("the loss is not finite")
        return train(*args, **kwargs)

    train = case.kind._train_further
    monkeypatch.setattr(case.kind, "_train_further", fails)
    for target in (unfolder, fresh := case.kind(**SETTINGS)):
        calls.clear()
        with pytest.raises(TrainingError):
            case.fit(target, 2 * RECO)
        assert len(calls) == 2
    assert unfolder.history is history and repr(fresh).endswith(": not trained")
    for got, expected in zip(case.ask(unfolder), before, strict=True):
        np.testing.assert_array_equal(got, expected)
