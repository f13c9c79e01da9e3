"""Images with missing pixels, whose posterior is known: mean and width depend on the number of pixels that are present."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sbi_phys as sp
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from tests.toys import Gaps, training_set

SIM = Gaps(shape=(2, 3))
SMALL = sp.EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)
CONFIG = sp.TrainConfig(max_epochs=15, batch_size=128)
MADE: dict[str, Any] = {"seed": 1, "device": "cpu", "embedding": SMALL, "config": CONFIG}


class Image(nn.Module):
    """A convolution of values and indicators (n, 2, h, w); `seen` are the shapes that it was given."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 8, (1, 1)), nn.SiLU(), nn.Flatten(), nn.Linear(48, 16))
        self.seen: set[tuple[int, ...]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add(tuple(x.shape[1:]))
        return self.layers(x)


@pytest.fixture(scope="module")
def trained() -> sp.NPE:
    return sp.NPE(SIM.prior, flow="affine", simulator=SIM, **MADE).fit(*training_set(SIM, 6000))


def off(npe: sp.NPE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Error of the mean in units of the exact sd, and ratio of the sds less 1, for each row."""
    mean, sd = SIM.posterior(x)
    draws = npe.sample(x, 2000, seed=3)[:, :, 0]
    return (draws.mean(axis=1) - mean) / sd, draws.std(axis=1) / sd - 1


def test_the_posterior_follows_the_number_of_pixels_that_are_present(trained: sp.NPE) -> None:
    _, x = training_set(SIM, 300, seed=9)
    shift, width = off(trained, x)
    assert np.sqrt((shift**2).mean()) < 0.2
    assert np.abs(width).mean() < 0.12
    few, many = (np.full((1, 6), 0.8) for _ in range(2))
    few[0, 1:] = np.nan
    sd = [trained.sample(x, 4000, seed=1)[0].std() for x in (few, many)]
    np.testing.assert_allclose(sd, [2**-0.5, 7**-0.5], rtol=0.15)


def test_a_network_that_takes_zero_for_a_value_is_found_wrong() -> None:
    """The same data with 0 in place of what is missing, and no indicator: sums without the numbers of pixels."""
    theta, x = training_set(SIM, 6000)
    npe = sp.NPE(SIM.prior, flow="affine", **MADE).fit(theta, np.nan_to_num(x, nan=0.0))
    _, rows = training_set(SIM, 300, seed=9)
    mean, sd = SIM.posterior(rows)
    draws = npe.sample(np.nan_to_num(rows, nan=0.0), 2000, seed=3)[:, :, 0]
    assert np.sqrt((((draws.mean(axis=1) - mean) / sd) ** 2).mean()) > 0.25


def test_every_form_of_the_observation_gives_the_same_answer(trained: sp.NPE) -> None:
    theta, x = training_set(SIM, 4, seed=5)
    image = x.reshape(4, 2, 3)
    want, one = trained.sample(x, 5), trained.sample(x[0], 5)
    for form in (image, {"image": image}, {"image": x}):
        np.testing.assert_array_equal(trained.sample(form, 5), want)
        np.testing.assert_array_equal(trained.log_prob(theta, form), trained.log_prob(theta, x))
    for form in (image[0], {"image": image[0]}):
        np.testing.assert_array_equal(trained.sample(form, 5), one)
        assert trained.posterior(form, 5).theta.shape == (5, 1)
    for wrong in (image.transpose(0, 2, 1), x[:, :5], x.reshape(12, 2), x[0, :3]):
        with pytest.raises(ShapeError, match=r"the observables are image: \(2, 3\)"):
            trained.sample(wrong, 5)
    with pytest.raises(DataError, match="no block 'image'"):
        trained.sample({}, 5)
    with pytest.raises(NonFiniteError, match="no value"):
        trained.sample(np.full(6, np.nan), 5)


def test_a_file_keeps_the_observables(trained: sp.NPE, tmp_path: Path) -> None:
    trained.save(tmp_path / "npe.pt")
    again = sp.load(tmp_path / "npe.pt")
    assert again.observables == SIM.observables
    x = training_set(SIM, 3, seed=5)[1]
    np.testing.assert_array_equal(again.sample({"image": x.reshape(3, 2, 3)}, 4), trained.sample(x, 4))


def test_an_embedding_of_images_sees_values_and_indicators() -> None:
    embedding = Image()
    npe = sp.NPE(SIM.prior, flow="affine", simulator=SIM, **(MADE | {"embedding": embedding})).fit(*training_set(SIM, 6000))
    assert npe._nets[0].embedding.seen == {(2, 2, 3)}
    shift, width = off(npe, training_set(SIM, 300, seed=9)[1])
    assert np.sqrt((shift**2).mean()) < 0.25
    assert np.abs(width).mean() < 0.15


def test_without_gaps_an_embedding_sees_the_image_itself() -> None:
    theta, x = training_set(Gaps(gaps=0.0), 200)
    npe = sp.NPE(
        SIM.prior, observables=[sp.Observable("image", shape=(2, 3))], seed=0, embedding=Image3(), config=sp.TrainConfig(max_epochs=1)
    )
    assert npe.fit(theta, x.reshape(200, 2, 3)).sample(x[0], 3).shape == (3, 1)
    assert npe._nets[0].embedding.seen == {(2, 3)}


class Image3(Image):
    """Takes (n, h, w)."""

    def __init__(self) -> None:
        super().__init__(channels=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add(tuple(x.shape[1:]))
        return self.layers(x[:, None])


def test_a_ratio_follows_the_number_of_pixels_too() -> None:
    theta, x = training_set(SIM, 4000)
    nre = sp.NRE(SIM.prior, simulator=SIM, seed=1, device="cpu", embedding=SMALL, config=sp.TrainConfig(max_epochs=10)).fit(theta, x)
    assert nre._nets[0].likelihood is None
    for present in (1, 6):
        row = np.full(6, 0.8)
        row[present:] = np.nan
        mean, sd = SIM.posterior(row[None])
        draws = nre.sample(row.reshape(2, 3), 2000, seed=2, method="grid")[:, 0]
        assert abs(draws.mean() - mean[0]) < 0.4 * sd[0]
        assert abs(draws.std() / sd[0] - 1) < 0.25
    with pytest.raises(SettingError, match="values of x may be missing"):
        sp.NRE(SIM.prior, simulator=SIM, reference="likelihood").fit(theta, x)


def test_a_density_of_x_has_no_missing_values() -> None:
    with pytest.raises(SettingError, match="values of image may be missing, and a density of x has no such values; expected NPE or NRE"):
        sp.NLE(SIM.prior, simulator=SIM).fit(*training_set(SIM, 100))
    with pytest.raises(SettingError, match="standardise is 'block'"):
        sp.NLE(SIM.prior, standardise="block")


def test_a_likelihood_takes_images_and_blocks() -> None:
    whole = sp.Observable("image", shape=(2, 3))
    theta, x = training_set(Gaps(gaps=0.0), 300)
    nle = sp.NLE(SIM.prior, observables=[whole], config=sp.TrainConfig(max_epochs=1)).fit(theta, {"image": x.reshape(300, 2, 3)})
    want = nle.log_likelihood(x[:4], theta[:4])
    np.testing.assert_array_equal(nle.log_likelihood(x[:4].reshape(4, 2, 3), theta[:4]), want)
    np.testing.assert_allclose(nle.log_likelihood({"image": x[0].reshape(2, 3)}, theta[:1]), want[:1], rtol=1e-5)
    with pytest.raises(ShapeError, match="expected"):
        nle.log_likelihood(x[:4].reshape(4, 3, 2), theta[:4])


def test_stores_streams_and_simulators_give_networks_the_same_input(tmp_path: Path) -> None:
    simulator = Gaps(shape=(2, 3), form="blocks", single=False)
    store = sp.simulate(simulator, 400, tmp_path / "s", workers=1, seed=1)
    quick = {"seed": 1, "device": "cpu", "config": sp.TrainConfig(max_epochs=1)}
    held, streamed = (sp.NPE(SIM.prior, **quick).fit(store, memory=m) for m in (None, 60_000))
    online = sp.NPE(SIM.prior, **quick).fit(simulator=simulator, online=True, n=400, workers=0)
    x = store.read()[1][:3]
    for npe in (held, streamed, online):
        assert npe._scaler.shape == (13,)
        assert npe.sample(x, 5).shape == (3, 5, 1)
        assert npe.sample({"image": x[:, :6].reshape(3, 2, 3), "present": x[:, 6:]}, 5).shape == (3, 5, 1)
    np.testing.assert_allclose(streamed._scaler.mean, held._scaler.mean, rtol=0.3, atol=0.3)


@pytest.mark.parametrize("standardise", ["column", "block", "none"])
def test_standardise_is_a_setting_that_files_keep(standardise: str, tmp_path: Path) -> None:
    theta, x = training_set(SIM, 100)
    config = sp.TrainConfig(max_epochs=1)
    npe = sp.NPE(SIM.prior, simulator=SIM, standardise=standardise, config=config).fit(theta, x)
    assert len(set(npe._scaler.scale.tolist())) == (6 if standardise == "column" else 1)
    npe.save(tmp_path / "npe.pt")
    assert sp.load(tmp_path / "npe.pt").settings["standardise"] == standardise
    with pytest.raises(SettingError, match="standardise is 'rows'"):
        sp.NPE(SIM.prior, standardise="rows")


def test_calibration_takes_images_with_gaps(trained: sp.NPE) -> None:
    x_obs = training_set(SIM, 1, seed=3)[1].reshape(2, 3)
    found = sp.calibrate(trained, SIM, 200, n_draws=100, x_obs=x_obs, seed=1)
    assert found.passed
    assert "lc2st" in found.results
    theta, x = training_set(SIM, 100, seed=4)
    again = sp.calibrate(trained, (theta, {"image": x.reshape(-1, 2, 3)}), n_draws=50)
    assert again.n == 100
    with pytest.raises(ShapeError, match="x_obs has shape"):
        sp.calibrate(trained, SIM, 50, x_obs=x_obs.T)
