"""Priors against scipy.stats, their whitening map against its definition, and what they refuse."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.priors import (
    BoxPrior,
    DirichletPrior,
    LogUniformPrior,
    NormalPrior,
    Observable,
    Parameter,
    Prior,
    ProductPrior,
    prior_from_dict,
    standard_normal_log_prob,
)

P = Parameter
BOX = BoxPrior([P("gamma", -3, 2.5), P("lg_rcut", 17.8, 20, "lg V")])
LOG = LogUniformPrior([P("energy", 1e-2, 1e3, "EeV")])
NORMAL = NormalPrior([P("a"), P("b")], mean=[1.0, -2.0], sd=[0.5, 3.0])
FLAT = DirichletPrior([P(f"f{k}") for k in range(5)])
SKEW = DirichletPrior([P(f"g{k}") for k in range(3)], [0.5, 2.0, 3.0])
ALL = ProductPrior([BOX, LOG, NORMAL, FLAT, SKEW])
PRIORS: list[Prior] = [BOX, LOG, NORMAL, FLAT, SKEW, ALL]
IDS = ["box", "log", "normal", "flat simplex", "skew simplex", "product"]


@pytest.mark.parametrize("prior", PRIORS, ids=IDS)
def test_prior_draws_are_standard_normal_in_u(prior: Prior) -> None:
    u = prior.to_unbounded(prior.sample(20_000, rng_for(0)))
    assert u.shape == (20_000, prior.free_dim)
    assert min(stats.kstest(column, "norm").pvalue for column in u.T) > 1e-4
    assert np.abs(np.corrcoef(u.T) - np.eye(prior.free_dim)).max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("prior", PRIORS, ids=IDS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_round_trip(prior: Prior, data: st.DataObject) -> None:
    u = data.draw(hnp.arrays(np.float64, (4, prior.free_dim), elements=st.floats(-5, 5)))
    theta = prior.from_unbounded(u)
    assert prior.contains(theta).all()
    np.testing.assert_allclose(prior.from_unbounded(prior.to_unbounded(theta)), theta, rtol=1e-9, atol=1e-12)
    # within +-4 the map is well conditioned everywhere and u itself comes back
    small = np.clip(u, -4, 4)
    np.testing.assert_allclose(prior.to_unbounded(prior.from_unbounded(small)), small, atol=1e-6)


@pytest.mark.parametrize("prior", [BOX, LOG, NORMAL, ProductPrior([BOX, NORMAL])], ids=["box", "log", "normal", "product"])
def test_density_matches_the_jacobian_of_the_map(prior: Prior) -> None:
    u = rng_for(1).standard_normal((20, prior.dim))
    step = 1e-5
    for row in u:
        columns = [(prior.from_unbounded(row + step * e) - prior.from_unbounded(row - step * e))[0] / (2 * step) for e in np.eye(prior.dim)]
        _, log_det = np.linalg.slogdet(np.array(columns).T)
        want = standard_normal_log_prob(row[None])[0] - log_det
        assert prior.log_prob(prior.from_unbounded(row))[0] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("prior", [FLAT, SKEW], ids=["flat", "skew"])
def test_dirichlet_against_scipy_and_its_jacobian(prior: DirichletPrior) -> None:
    theta = prior.sample(50, rng_for(2))
    np.testing.assert_allclose(prior.log_prob(theta), stats.dirichlet(prior.concentration).logpdf(theta.T), atol=1e-9)
    u, step, k = prior.to_unbounded(theta), 1e-5, prior.free_dim
    for row, log_p in zip(u, prior.log_prob(theta), strict=True):
        columns = [(prior.from_unbounded(row + step * e) - prior.from_unbounded(row - step * e))[0, :k] / (2 * step) for e in np.eye(k)]
        _, log_det = np.linalg.slogdet(np.array(columns).T)
        assert log_p == pytest.approx(standard_normal_log_prob(row[None])[0] - log_det, abs=1e-4)


def test_densities_against_scipy() -> None:
    box, log, normal = BOX.sample(10, rng_for(3)), LOG.sample(10, rng_for(3)), NORMAL.sample(10, rng_for(3))
    np.testing.assert_allclose(BOX.log_prob(box), -math.log(5.5 * 2.2))
    np.testing.assert_allclose(LOG.log_prob(log), stats.loguniform(1e-2, 1e3).logpdf(log[:, 0]))
    np.testing.assert_allclose(NORMAL.log_prob(normal), stats.norm([1, -2], [0.5, 3]).logpdf(normal).sum(axis=1))
    assert BOX.log_prob([[9.0, 19.0]])[0] == -np.inf


def test_edges_and_the_far_tails_are_finite() -> None:
    assert np.isfinite(BOX.to_unbounded([[-3, 17.8], [2.5, 20]])).all()
    corners = FLAT.to_unbounded(np.eye(5))
    assert np.isfinite(corners).all()
    # u is held within +-8.2, so a corner comes back as close as (Phi(-8.2))^(1/4) of the stick
    np.testing.assert_allclose(FLAT.from_unbounded(corners), np.eye(5), atol=1.1e-4)
    far = FLAT.from_unbounded(np.full((1, 4), 8.0))
    assert far.sum() == pytest.approx(1)
    # small fractions next to one of nearly 1 keep their digits: each tail goes through its own small number
    tiny = np.array([[1 - 4e-4, 1e-4, 1e-4, 1e-4, 1e-4], [1e-12, 1e-9, 1 - 2.1e-4 - 1e-12 - 1e-9, 2e-4, 1e-5]])
    np.testing.assert_allclose(FLAT.from_unbounded(FLAT.to_unbounded(tiny)), tiny, rtol=1e-9)


def test_a_network_is_asked_no_further_out_than_it_has_seen() -> None:
    edges = np.array([[-3, 20.0], [2.5, 17.8]])
    np.testing.assert_array_equal(BOX.to_network(edges), [[-4, 4], [4, -4]])
    # that is 3e-5 of the range inside of the edge
    np.testing.assert_allclose(BOX.from_unbounded(BOX.to_network(edges)), edges, atol=4e-5 * 5.5)
    theta = np.concatenate([edges[:1], [[1e-2, 4.0, -2.0]], np.eye(5)[:1], SKEW.sample(1, rng_for(0))], axis=1)
    u, free = ALL.to_network(theta)[0], ALL.to_unbounded(theta)[0]
    assert free[3] == u[3] == 6  # a normal parameter has no edge
    assert np.abs(np.delete(u, 3)).max() == 4 and (u[-2:] == free[-2:]).all()


@pytest.mark.parametrize("prior", PRIORS, ids=IDS)
def test_description_round_trip_through_json(prior: Prior) -> None:
    again = prior_from_dict(json.loads(json.dumps(prior.to_dict())))
    assert again == prior
    assert hash(again) == hash(prior)
    assert (again.sample(3, rng_for(1)) == prior.sample(3, rng_for(1))).all()
    assert again.parameters == prior.parameters


def test_what_priors_refuse() -> None:
    with pytest.raises(
        SupportError, match=r"1 of 2 rows outside the prior; the first is row 1: lg_rcut = 25 lg V, expected within \[17.8, 20\]"
    ):
        BOX.to_unbounded([[0, 19], [0, 25]])
    with pytest.raises(SupportError, match="sums to 1.5"):
        ALL.to_unbounded(np.concatenate([[0, 19, 1, 1, 1], [0.5, 0.5, 0.5, 0, 0], [0.2, 0.3, 0.5]]))
    with pytest.raises(NonFiniteError):
        BOX.log_prob([[np.nan, 19]])
    with pytest.raises(ShapeError, match=r"expected \(n, 2\)"):
        BOX.contains(np.ones((2, 3)))
    with pytest.raises(SettingError, match="low < high"):
        P("x", 1, 1)
    with pytest.raises(SettingError, match="letters, digits"):
        P("a b")
    with pytest.raises(SettingError, match="repeat"):
        BoxPrior([P("x", 0, 1), P("x", 0, 1)])
    with pytest.raises(SettingError, match="finite bounds"):
        BoxPrior([P("x")])
    with pytest.raises(SettingError, match="low > 0"):
        LogUniformPrior([P("x", 0, 1)])
    with pytest.raises(SettingError, match="sd > 0"):
        NormalPrior([P("x")], sd=0)
    with pytest.raises(SettingError, match="expected none"):
        NormalPrior([P("x", 0, 1)])
    with pytest.raises(SettingError, match="at least 2"):
        DirichletPrior([P("x")])
    with pytest.raises(SettingError, match="no parameters"):
        BoxPrior([])
    with pytest.raises(SettingError, match="expected priors"):
        ProductPrior([BOX, 3])  # type: ignore[list-item]
    with pytest.raises(SettingError, match="numpy Generator"):
        BOX.sample(3, 0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not one of"):
        prior_from_dict({"kind": "Magic", "parameters": []})


def test_observable_checks_its_edges() -> None:
    assert Observable("n", 2, edges=(0, 1, 2)).edges == (0.0, 1.0, 2.0)
    with pytest.raises(ShapeError, match="expected size \\+ 1 = 3"):
        Observable("n", 2, edges=(0, 1))
    with pytest.raises(SettingError, match="kind"):
        Observable("n", 2, kind="count")
    assert P("e", unit="EeV", latex="E").label == "$E$ [EeV]"
