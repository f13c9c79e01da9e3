"""Embeddings of sets: the order, the padding and the other sets of a batch do not matter; size does."""

import numpy as np
import pytest
import torch

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.npe import NPE
from sbi_phys.nets.embedding_set import DeepSet, SetAttention, event_columns, pad_sets, padded, take_scaling
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.priors import NormalPrior, Observable, Parameter
from sbi_phys.store.layout import Ragged
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.scaling import XScaler

SMALL = EmbeddingConfig(hidden=16, n_blocks=1, n_features=5)
KINDS = {"deep set": lambda: DeepSet(2, hidden=16, n_pooled=8, config=SMALL), "attention": lambda: SetAttention(2, hidden=16, config=SMALL)}


@pytest.fixture(params=KINDS)
def net(request):
    return KINDS[request.param]().eval()


def sets(sizes, seed=0):
    rng = rng_for(seed)
    return [rng.standard_normal((m, 2)) for m in sizes]


def run(net, x):
    with torch.no_grad():
        return net(torch.from_numpy(np.asarray(x, dtype=np.float32))).numpy()


def test_order_and_padding_do_not_matter(net):
    data = sets([0, 1, 2, 7, 300, 1000])
    want = run(net, pad_sets(data))
    assert want.shape == (6, 5)
    rng = rng_for(1)
    np.testing.assert_allclose(run(net, pad_sets([rng.permutation(s) for s in data])), want, atol=1e-6)
    np.testing.assert_allclose(run(net, pad_sets(data, n_max=1500)), want, atol=1e-6)
    flat = pad_sets(data, n_max=1500)
    np.testing.assert_allclose(run(net, flat.reshape(6, -1)), want, atol=1e-6)
    # numbers in empty slots are not looked at
    flat[:, :, :2] = np.where(flat[:, :, 2:] == 0, 99.0, flat[:, :, :2])
    np.testing.assert_allclose(run(net, flat), want, atol=1e-6)


def test_a_set_does_not_see_the_others_of_its_batch(net, monkeypatch):
    data = sets([3, 0, 20, 5])
    want = run(net, pad_sets(data))
    np.testing.assert_allclose([run(net, pad_sets([s], 20))[0] for s in data], want, atol=1e-6)
    monkeypatch.setattr("sbi_phys.nets.embedding_set._EVENTS", 25)  # one set at a time
    np.testing.assert_allclose(run(net, pad_sets(data)), want, atol=1e-6)


def test_events_and_their_number_do_matter(net):
    (events,) = sets([6])
    want = run(net, pad_sets([events]))
    assert np.abs(run(net, pad_sets([events + 0.5])) - want).max() > 1e-3
    twice = run(net, pad_sets([np.concatenate([events, events])]))  # the same mean, another size
    assert np.abs(twice - want).max() > 1e-3


def test_gradients_reach_every_weight_and_are_finite(net):
    x = torch.from_numpy(pad_sets(sets([0, 4, 9])).astype(np.float32))
    net.train()
    net(x).square().sum().backward()
    for name, weight in net.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name
        # a bias common to all keys drops out of a softmax; the block's perceptron begins as the identity
        if "key.bias" not in name and "rho" not in name:
            assert weight.grad.abs().sum() > 0, name


def test_the_scaling_by_columns_is_undone(net):
    """Flat rows of a store, standardised column by column: the same features as sets scaled as a whole."""
    data = pad_sets([*sets(rng_for(3).integers(0, 12, 300)), rng_for(4).standard_normal((12, 2))]) * [5.0, 0.1, 1.0]
    flat = data.reshape(301, -1)
    by_column = XScaler.fit(flat, np.zeros(flat.shape[1], dtype=bool))
    take_scaling(net, by_column)
    got = run(net, by_column.apply(flat))
    # loading brings the buffers along, whose length only the training knew
    again = type(net)(2, **({"hidden": 16, "n_pooled": 8} if isinstance(net, DeepSet) else {"hidden": 16}), config=SMALL).eval()
    again.load_state_dict(net.state_dict())
    np.testing.assert_array_equal(run(again, by_column.apply(flat)), got)
    as_sets = XScaler.fit(data, np.zeros(data.shape[1:], dtype=bool))
    take_scaling(net, as_sets)
    np.testing.assert_allclose(run(net, as_sets.apply(data)), got, atol=2e-5)


def test_what_cannot_be_a_set(net):
    with pytest.raises(ShapeError, match="7 columns; expected a multiple of 3"):
        net(torch.zeros(2, 7))
    take_scaling(net, XScaler.fit(np.arange(12.0).reshape(2, 6), np.zeros(6, dtype=bool)))
    with pytest.raises(ShapeError, match="9 columns; expected 6"):
        net(torch.zeros(2, 9))
    with pytest.raises(SettingError, match="x_transform='real'"):
        take_scaling(net, XScaler.fit(np.ones((4, 6)), np.ones(6, dtype=bool)))
    with pytest.raises(ShapeError, match="multiple of 3"):
        take_scaling(net, XScaler.fit(np.ones((4, 5)), np.zeros(5, dtype=bool)))
    with pytest.raises(SettingError, match="number of heads"):
        SetAttention(1, hidden=10, n_heads=4)
    with pytest.raises(SettingError, match="n_columns"):
        DeepSet(0)


def test_padding():
    x = pad_sets([np.array([1.0, 2.0]), np.zeros(0), [[5.0]]])
    np.testing.assert_array_equal(x, [[[1, 1], [2, 1]], [[0, 0], [0, 0]], [[5, 1], [0, 0]]])
    assert pad_sets([np.zeros((0, 3))]).shape == (1, 1, 4)
    for bad, error, words in [
        ([], DataError, "sets is empty"),
        ([np.ones((2, 2)), np.ones((2, 3))], ShapeError, r"set 1 has shape \(2, 3\); expected \(m, 2\)"),
        ([np.ones((2, 2, 2))], ShapeError, "set 0"),
        ([np.array([1.0, np.nan])], NonFiniteError, "set 0"),
    ]:
        with pytest.raises(error, match=words):
            pad_sets(bad)
    with pytest.raises(DataError, match="3 events; expected at most n_max = 2"):
        pad_sets([np.ones(3)], n_max=2)


def test_the_posterior_of_a_mean_from_sets_of_any_size():
    """theta ~ N(0, 1), m events ~ N(theta, 1): the posterior is N(sum / (1 + m), 1 / (1 + m))."""
    rng = rng_for(5)
    theta = rng.standard_normal((4000, 1))
    sizes = rng.integers(0, 21, 4000)
    x = pad_sets([t + rng.standard_normal(m) for t, m in zip(theta[:, 0], sizes, strict=True)], n_max=20)
    config = TrainConfig(max_epochs=15, patience=15)
    npe = NPE(NormalPrior([Parameter("t")]), embedding=DeepSet(1, hidden=32, n_pooled=32, config=SMALL), config=config, device="cpu")
    npe.fit(theta, x)
    for m in (0, 3, 20):
        events = 0.7 + rng_for(6).standard_normal(m)
        draws = npe.sample(pad_sets([events], n_max=20)[0], 4000)
        mean, sd = events.sum() / (1 + m), (1 + m) ** -0.5
        assert abs(draws.mean() - mean) < 0.25 * sd
        assert draws.std() / sd == pytest.approx(1, abs=0.15)


def test_sets_without_a_mask_are_never_read_in_another_shape(net):
    rows = rng_for(0).standard_normal((4, 60, 2))
    with pytest.raises(ShapeError, match=r"x has shape \(4, 60, 2\); expected \(n, n_max, 3\): 2 columns of an event and a mask"):
        run(net, rows)
    with pytest.raises(DataError, match="the mask of slot 0 of row 0 of x is .*; expected 1 for an event and 0 for an empty slot"):
        run(net, rows.reshape(4, 120))
    scaled = XScaler.fit(rows.reshape(4, 120), np.zeros(120, dtype=bool))
    take_scaling(net, scaled)
    with pytest.raises(DataError, match="expected 1 for an event"):
        run(net, scaled.apply(rows.reshape(4, 120)))


def test_a_mask_survives_the_scaling_of_flat_rows(net):
    flat = pad_sets(sets(rng_for(2).integers(0, 9, 500))).reshape(500, -1)
    scaler = XScaler.fit(flat, np.zeros(flat.shape[1], dtype=bool))
    take_scaling(net, scaler)
    assert np.isfinite(run(net, scaler.apply(flat))).all()


def test_a_list_of_arrays_is_padded_and_all_else_is_left(net):
    data = sets([3, 0, 5])
    for form in (data, tuple(data), Ragged.of(data)):
        x, single = padded("x", form, 2)
        np.testing.assert_array_equal(x, pad_sets(data))
        assert not single
    x, single = padded("x", data[2], 2, 7)
    np.testing.assert_array_equal(x, pad_sets([data[2]], 7)[0])
    assert single
    ready = pad_sets(data)
    for form in (ready, list(ready), np.zeros((4, 6)), data[2]):
        assert padded("x", form, 2)[0] is form
    np.testing.assert_array_equal(padded("x", [[0.5, 1.0], [2.0]], 1)[0], pad_sets([[0.5, 1.0], [2.0]]))
    with pytest.raises(ShapeError, match=r"set 1 of x has shape \(3, 5\); expected \(m, 2\)"):
        padded("x", [np.zeros((4, 2)), np.zeros((3, 5))], 2)
    with pytest.raises(DataError, match="a set has 5 events; expected at most n_max = 4"):
        padded("x", data, 2, 4)
    named = EmbeddingConfig(spec="sbi_phys.nets.embedding_set:DeepSet", settings={"n_columns": 3})
    assert [event_columns(e) for e in (net, torch.nn.Sequential(net), named, torch.nn.Linear(2, 2), SMALL)] == [2, 2, 3, None, None]


@pytest.mark.parametrize("flat", [False, True])
def test_estimators_take_lists_of_sets(flat):
    """A Gaussian mean from one to twenty events: the posterior of a list is that of the padded sets."""
    rng = rng_for(5)
    theta = rng.standard_normal((600, 1))
    data = [t + rng.standard_normal((m, 1)) for t, m in zip(theta[:, 0], rng.integers(1, 21, 600), strict=True)]
    data[0] = theta[0, 0] + rng.standard_normal((20, 1))
    blocks = [Observable("events", shape=(20, 2))] if flat else None
    made = {"embedding": DeepSet(1, hidden=16, config=SMALL), "observables": blocks, "config": TrainConfig(max_epochs=2), "device": "cpu"}
    npe = NPE(NormalPrior([Parameter("t")]), **made).fit(theta, data)
    x = pad_sets(data, 20)
    np.testing.assert_array_equal(npe.sample(data[:3], 4), npe.sample(x[:3], 4))
    np.testing.assert_array_equal(npe.sample(data[1], 4), npe.sample(x[1], 4))
    assert npe.sample(data[:1], 4).shape == (1, 4, 1)
    assert npe.log_prob(theta[:3], data[:3]).shape == (3,)
    with pytest.raises(DataError, match="a set has 25 events; expected at most n_max = 20"):
        npe.sample(np.zeros((25, 1)), 4)
    with pytest.raises(ShapeError, match="expected"):
        npe.sample(np.zeros((20, 3)), 4)


def test_lists_without_a_network_of_sets_and_other_scalings_are_refused():
    prior, rng = NormalPrior([Parameter("t")]), rng_for(0)
    theta, data = rng.standard_normal((40, 1)), [rng.standard_normal((m % 5 + 1, 1)) for m in range(40)]
    with pytest.raises(DataError, match=r"list of arrays of different lengths; expected one array, or a network of sets.*pad_sets"):
        NPE(prior).fit(theta, data)
    with pytest.raises(SettingError, match="standardise is 'block' with an embedding of sets"):
        NPE(prior, embedding=DeepSet(1), standardise="block")
    gaps = NPE(prior, embedding=DeepSet(1), observables=[Observable("events", shape=(5, 2), missing=True)])
    with pytest.raises((SettingError, ShapeError), match="expected"):
        gaps.fit(theta, data)
