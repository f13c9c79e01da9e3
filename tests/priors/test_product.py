"""Priors of the user's own: rebuilt from a file by name and settings, or refused before any training; wrong ones are found."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import sbi_phys as sp
from sbi_phys.core.errors import DataError, ModelFileError, SettingError
from sbi_phys.core.types import Array, Mask
from sbi_phys.priors import Parameter, Prior, prior_from_dict
from sbi_phys.priors.product import require_rebuilt, same_prior

P = (Parameter("a"), Parameter("b"))


class Correlated(Prior):
    """N(0, C) with correlation rho."""

    def __init__(self, parameters: Any, rho: float = 0.8) -> None:
        super().__init__(parameters)
        self.rho = rho
        self._factor = np.linalg.cholesky([[1, rho], [rho, 1]])

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "rho": self.rho}

    def _contains(self, theta: Array) -> Mask:
        return np.ones(len(theta), dtype=bool)

    def _to_unbounded(self, theta: Array) -> Array:
        return np.linalg.solve(self._factor, theta.T).T

    def _from_unbounded(self, u: Array) -> Array:
        return u @ self._factor.T

    def _log_prob(self, theta: Array) -> Array:
        u = self._to_unbounded(theta)
        return stats.norm.logpdf(u).sum(axis=1) - np.log(np.diag(self._factor)).sum()


class Forgetful(Correlated):
    """Its description lacks rho."""

    def to_dict(self) -> dict[str, Any]:
        return Prior.to_dict(self)


class NotPlain(Correlated):
    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "rho": np.ones(2)}


class Unnormalised(Correlated):
    def _log_prob(self, theta: Array) -> Array:
        return super()._log_prob(theta) + 0.2


class OtherInverse(Correlated):
    def _to_unbounded(self, theta: Array) -> Array:
        return super()._to_unbounded(theta) + 0.01


class TooSmall(Correlated):
    def _contains(self, theta: Array) -> Mask:
        return theta[:, 0] < 0.5


class Simplex(sp.DirichletPrior):
    """A subclass of a prior of the package, with fewer degrees of freedom than columns."""


def test_a_prior_of_ones_own_is_rebuilt_from_plain_values() -> None:
    prior = Correlated(P, rho=-0.4)
    description = json.loads(json.dumps(prior.to_dict()))
    assert description["class"] == f"{__name__}:Correlated" and len(description["source"]) == 16
    again = prior_from_dict(description)
    assert again == prior and isinstance(again, Correlated) and again.rho == -0.4
    assert prior_from_dict(sp.ProductPrior([prior, sp.NormalPrior([Parameter("c")])]).to_dict()).blocks[0] == prior
    simplex = Simplex([Parameter(n) for n in "xyz"], [1.0, 2.0, 3.0])
    require_rebuilt(simplex)
    assert prior_from_dict(simplex.to_dict()) == simplex
    assert "class" not in sp.NormalPrior(P).to_dict()


def test_a_model_with_a_prior_of_ones_own_is_saved_and_read(tmp_path: Path) -> None:
    prior, rng = Correlated(P, rho=0.3), np.random.default_rng(0)
    theta = prior.sample(400, rng)
    npe = sp.NPE(prior, config=sp.TrainConfig(max_epochs=2), device="cpu").fit(theta, theta + rng.standard_normal(theta.shape))
    npe.save(tmp_path / "m.pt")
    again = sp.load(tmp_path / "m.pt", device="cpu")
    assert again.prior == prior
    np.testing.assert_array_equal(again.sample([1.0, 0.0], 9), npe.sample([1.0, 0.0], 9))
    assert sp.load(tmp_path / "m.pt", prior=Correlated(P, rho=0.3), device="cpu").prior.rho == 0.3
    with pytest.raises(ModelFileError, match=r"m.pt was trained with another prior: rho is 0.3; got 0.5"):
        sp.load(tmp_path / "m.pt", prior=Correlated(P, rho=0.5))
    store = sp.simulate(Toy(prior), 30, tmp_path / "store", workers=1)
    assert store.prior == prior


class Toy:
    """x = theta + noise."""

    settings: dict[str, Any] = {}  # noqa: RUF012
    observables = (sp.Observable("x", 2),)

    def __init__(self, prior: Prior | None = None) -> None:
        self.prior = prior or Correlated(P)
        self.parameters = self.prior.parameters

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        return theta + rng.standard_normal(theta.shape)


def test_a_class_that_is_gone_is_named_and_the_prior_may_be_given(tmp_path: Path) -> None:
    from sbi_phys.estimators.base import FILE
    from sbi_phys.training.checkpoint import read_file, write_file

    prior = Correlated(P)
    theta = prior.sample(60, np.random.default_rng(0))
    npe = sp.NPE(prior, config=sp.TrainConfig(max_epochs=1), device="cpu").fit(theta, theta)
    npe.save(tmp_path / "m.pt")
    content = read_file(tmp_path / "m.pt", *FILE)
    description = json.loads(content["settings"]["prior"]["prior"]) | {"class": "gone_module:Correlated"}
    content["settings"]["prior"] = {"prior": json.dumps(description)}
    write_file(tmp_path / "m.pt", *FILE, content)
    with pytest.raises(ModelFileError, match=r"'gone_module:Correlated', and the module gone_module has not been imported.*prior=\.\.\."):
        sp.load(tmp_path / "m.pt")
    with pytest.raises(ModelFileError, match="there is no module 'gone_module'"):
        sp.load(tmp_path / "m.pt", allow_import=True)
    assert sp.load(tmp_path / "m.pt", prior=prior, device="cpu").prior is prior


def local_prior() -> Prior:
    class Local(Correlated):
        pass

    return Local(P)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (local_prior(), r"cannot be saved:.*expected a class Local\(parameters, \*\*settings\) at the top of a module"),
        (Forgetful(P, rho=0.5), "rebuilt from its to_dict.* gives other numbers"),
        (NotPlain(P), "cannot be saved"),
        (Unnormalised(P), "log_prob differs by 0.2 .*normalised log density"),
        (OtherInverse(P), r"_to_unbounded\(_from_unbounded\(u\)\) is off by 0.01"),
        (TooSmall(P), "of 64 draws lie outside its support"),
        (sp.ProductPrior([sp.NormalPrior([Parameter("c")]), Forgetful(P, rho=0.5)]), "expected a class Forgetful"),
    ],
    ids=["local", "forgetful", "not plain", "unnormalised", "inverse", "support", "block"],
)
def test_a_wrong_prior_is_refused_before_any_training(prior: Prior, message: str) -> None:
    for estimator in (sp.NPE, sp.NLE, sp.NRE):
        with pytest.raises(SettingError, match=message):
            estimator(prior)


def test_the_right_ones_pass() -> None:
    for prior in (Correlated(P), Correlated(P, rho=0.99), sp.ProductPrior([sp.NormalPrior([Parameter("c")]), Correlated(P)])):
        require_rebuilt(prior)


def test_a_changed_source_is_warned_of() -> None:
    description = Correlated(P).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior_from_dict(description)
    with pytest.warns(UserWarning, match="Correlated has changed since it was saved"):
        prior_from_dict(description | {"source": "0" * 16})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "subprocess:Popen"}, "standard library"),
        ({"class": f"{__name__}:Toy"}, "a class, but none of Prior"),
        ({"class": f"{__name__}:local_prior"}, "a function; expected a subclass"),
        ({"class": "unheard_of:Prior"}, "has not been imported"),
        ({"tau": 1}, r"Correlated takes \(parameters.*unexpected keyword argument 'tau'"),
    ],
)
def test_descriptions_of_other_things_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prior_from_dict({**Correlated(P).to_dict(), **change})


def test_a_prior_that_is_given_must_be_the_same() -> None:
    prior = Correlated(P)
    assert same_prior("m.pt", prior.to_dict() | {"class": "elsewhere:Correlated", "source": "x"}, prior) is prior
    with pytest.raises(DataError, match="another prior: kind is 'Correlated'; got 'NormalPrior'"):
        same_prior("m.pt", prior.to_dict(), sp.NormalPrior(P))
    with pytest.raises(DataError, match="prior is a str; expected a Prior"):
        same_prior("m.pt", prior.to_dict(), "prior")  # type: ignore[arg-type]
