"""Observations far outside the simulations are found, and those of the prior predictive are not."""

import warnings

import numpy as np
import pytest
import torch

from sbi_phys.estimators.base import load
from sbi_phys.estimators.npe import NPE
from sbi_phys.estimators.nre import NRE
from sbi_phys.priors import BoxPrior, Parameter
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.reach import Reach, describe, warn_far

POPULATIONS = {
    "normal": lambda rng, n: rng.standard_normal((n, 6)),
    "bounded": lambda rng, n: rng.uniform(size=(n, 3)),
    "exponential": lambda rng, n: rng.exponential(size=(n, 4)),
    "heavy": lambda rng, n: rng.standard_t(3, size=(n, 2)),
    "correlated": lambda rng, n: rng.standard_normal((n, 1)) + 0.1 * rng.standard_normal((n, 5)),
    "counts": lambda rng, n: 2 * np.sqrt(rng.poisson(0.4, (n, 3)) + 0.375),
    "images": lambda rng, n: rng.standard_normal((n, 20, 20)),
}


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_prior_predictive_is_not_far(name: str) -> None:
    """60 000 observations one by one, or the most that fit: below 1e-4 of them lie far outside; all at once they give no word."""
    draw, rng = POPULATIONS[name], np.random.default_rng(1)
    reach, n = Reach.fit(draw(rng, 4000)), 3000 if name == "images" else 60_000
    fresh = draw(rng, n)
    rows = describe(fresh)
    assert reach is not None and reach.message(fresh) == ""
    d = reach.distances(rows)
    alone = [k for k in np.flatnonzero((d > np.quantile(d, 0.999, axis=0)).any(axis=1)) if reach.message(fresh[k : k + 1])]
    assert len(alone) <= 1e-4 * n + 3


@pytest.mark.parametrize("name", POPULATIONS)
def test_what_was_never_seen_is_far(name: str) -> None:
    rng = np.random.default_rng(2)
    z = POPULATIONS[name](rng, 4000)
    reach, one = Reach.fit(z), z[:1].copy()
    assert reach is not None
    away = one + {"heavy": 400, "exponential": 40, "counts": 40}.get(name, 15) * z.std()
    assert "far outside the simulations: its distance from their mean is" in reach.message(away)
    assert "observation 7" in reach.message(np.concatenate([z[:7], away, z[:5]]))


def test_values_that_never_come_together_are_far() -> None:
    rng = np.random.default_rng(3)
    z = POPULATIONS["correlated"](rng, 3000)
    reach = Reach.fit(torch.from_numpy(z))
    assert reach is not None
    odd = np.array([[1.5, -1.5, 1.5, -1.5, 1.5]])  # each value alone is common
    assert "in all values together" in reach.message(odd) and reach.message(np.full((1, 5), 1.5)) == ""


def test_a_constant_column_must_stay() -> None:
    z = np.column_stack([np.random.default_rng(0).standard_normal(500), np.full(500, 3.0)])
    reach = Reach.fit(z)
    assert reach is not None and reach.message(np.array([[0.2, 3.0]])) == ""
    assert "differs from all simulations in column 1: it had one value in the training, from which this one is 0.5 away" in reach.message(
        np.array([[0.1, 3.0], [0.2, 3.5]])
    )
    assert Reach.fit(z[:10]) is None and warn_far(None, z) is None


@pytest.mark.parametrize("kind", [NPE, NRE])
def test_estimators_warn_at_the_call_and_keep_the_region(kind: type, tmp_path: object) -> None:
    prior, rng = BoxPrior([Parameter("a", -1, 1), Parameter("b", -1, 1)]), np.random.default_rng(4)
    theta = prior.sample(400, rng)
    model = kind(prior, config=TrainConfig(max_epochs=2)).fit(theta, theta + 0.2 * rng.standard_normal(theta.shape))
    model.save(f"{tmp_path}/model.pt")
    for each in (model, load(f"{tmp_path}/model.pt")):
        call = each.log_prob if kind is NPE else (lambda t, x, m=each: m.log_ratio(x, t))
        call(theta[:1], [0.3, -0.2])
        with pytest.warns(RuntimeWarning, match=r"far outside the simulations.*learned nothing there") as said:
            call(theta[:1], [9.0, 8.0])
        assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(theta, theta)  # a further training does not look at its own rows
