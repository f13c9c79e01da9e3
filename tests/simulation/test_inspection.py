"""Inspection of simulators: right ones have no errors, and each kind of fault is found and named."""

import json
import random
import time
from typing import ClassVar

import numpy as np
import pytest
from scipy import stats

from sbi_phys.core.errors import SettingError
from sbi_phys.core.rng import rng_for
from sbi_phys.priors import BoxPrior, Observable, Parameter
from sbi_phys.simulation.inspection import _label_test, inspect_simulator, quick_check
from simulators import LineSearch, MuonDecay, OnOff
from tests.toys import LinearGaussian


class Toy:
    """n ~ Poisson(10 a), x ~ N(b, 1), with likelihood, means and an observation; subclasses are wrong."""

    settings: ClassVar[dict] = {}
    prior = BoxPrior([Parameter("a", 1.0, 5.0), Parameter("b", -3.0, 3.0)])
    parameters = prior.parameters
    observables = (Observable("n", 1, kind="counts"), Observable("x", 2))

    def simulate(self, theta, rng):
        return np.hstack([rng.poisson(10 * theta[:, :1]), theta[:, 1:] + rng.standard_normal((len(theta), 2))])

    def expected(self, theta):
        return np.hstack([10 * theta[:, :1], theta[:, 1:], theta[:, 1:]])

    def log_likelihood(self, x, theta):
        return stats.poisson.logpmf(x[:, 0], 10 * theta[:, 0]) + stats.norm.logpdf(x[:, 1:], theta[:, 1:]).sum(axis=1)

    def observed(self):
        return np.array([30.0, 0.3, -0.2])


def toy(**methods):
    """A Toy with other methods; simulate= takes (right rows, theta, rng) -> rows."""
    if "simulate" in methods:
        change = methods["simulate"]
        methods["simulate"] = lambda self, theta, rng: change(Toy.simulate(self, theta, rng).astype(float), theta, rng)
    return type("Wrong", (Toy,), {"__module__": __name__, **methods})()


def found(simulator, topic, kind="error", **options):
    result = inspect_simulator(simulator, **{"n": 400, **options})
    texts = [f.text for f in result.findings if f.topic == topic and f.kind == kind]
    assert texts, result.summary()
    assert result.ok == (kind != "error")
    return " | ".join(texts)


@pytest.mark.parametrize("simulator", [Toy(), OnOff(), MuonDecay(), LineSearch(), LinearGaussian(3)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_right_simulators_have_no_errors(simulator, seed):
    result = inspect_simulator(simulator, n=400, seed=seed)
    assert result.ok and not result.warnings, result.summary()
    assert result.n == 400 and result.n_failed == 0 and result.rate > 0
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["ok"] and [b["name"] for b in plain["blocks"]] == [o.name for o in simulator.observables]
    assert "rows/s in one process" in result.summary()


def test_attributes_and_classes():
    assert "is the class Toy; expected an object" in found(Toy, "attributes")
    assert "expected a dict" in found(toy(settings=3), "attributes")
    with pytest.raises(SettingError, match="n is 1; expected"):
        inspect_simulator(Toy(), n=1)


def test_shapes():
    assert "for 1 row of theta: " in found(toy(simulate=lambda x, theta, rng: x.squeeze()), "shape")
    assert "returned shape (16, 2) for 16 rows" in found(toy(simulate=lambda x, theta, rng: x[:, :2] if len(x) > 1 else x), "shape")

    def only_batches(x, theta, rng):
        if len(x) == 1:
            raise IndexError("axis 1")
        return x

    assert "simulate raised IndexError: axis 1 for a single row of theta" in found(toy(simulate=only_batches), "shape")


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: np.random.normal(), "it uses numpy's global generator"),  # noqa: NPY002
        (lambda: random.random(), "it uses Python's module random"),
        (lambda: np.random.default_rng().normal(), "it seeds a generator from the time or the system"),
        (lambda: time.perf_counter_ns() % 1000, "it seeds a generator from the time or the system"),
    ],
)
def test_random_numbers_from_elsewhere(draw, words):
    before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    text = found(toy(simulate=lambda x, theta, rng: x + [0, 0, 1] * np.array(draw())), "random numbers")
    assert "other numbers in x[1]" in text and words in text
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert random.getstate() == before[1]


def test_torchs_global_generator():
    torch = pytest.importorskip("torch")
    state = torch.get_rng_state()
    text = found(toy(simulate=lambda x, theta, rng: x + [0, 0, 1] * torch.randn(1).numpy()), "random numbers")
    assert "it uses torch's global generator" in text
    assert torch.equal(torch.get_rng_state(), state)


def test_a_global_generator_without_effect_and_no_noise_at_all():
    def idle(x, theta, rng):
        random.random()
        return x

    assert "used Python's module random, though x did not depend on it" in found(toy(simulate=idle), "random numbers", "warning")
    same = toy(simulate=lambda x, theta, rng: Toy().expected(theta).round(), expected=None, log_likelihood=None)
    assert "the same for another generator" in found(same, "random numbers", "warning")


def test_failures_and_their_dependence_on_theta():
    def late(x, theta, rng):
        return np.where(theta[:, :1] > 4.5, np.nan, x)

    text = found(toy(simulate=late), "failures", "warning")
    assert "Failures depend on a (median 4." in text and " b (" not in text
    anywhere = toy(simulate=lambda x, theta, rng: np.where(rng.random((len(x), 1)) < 0.1, np.nan, x))
    text = found(anywhere, "failures", "warning")
    assert "depend" not in text and "rows failed" in text

    def broken(x, theta, rng):
        raise ZeroDivisionError("flux is 0")

    assert "all 400 rows of" in (text := found(toy(simulate=broken), "failures")) and "ZeroDivisionError: flux is 0" in text


def test_counts_constants_and_ranges():
    assert "expected whole numbers" in found(toy(simulate=lambda x, theta, rng: x + np.array([0.5, 0, 0])), "counts")
    assert "expected counts >= 0" in found(toy(simulate=lambda x, theta, rng: x - [40, 0, 0]), "counts")
    assert "x[0], x[1] did not vary (1 in all" in found(
        toy(simulate=lambda x, t, rng: x * [1, 0, 0] + [0, 1, 1], expected=None, log_likelihood=None, observed=None), "constant", "warning"
    )
    assert "x[1] did not vary" in found(
        toy(simulate=lambda x, t, rng: x * [1, 1, 0], expected=None, log_likelihood=None), "constant", "note"
    )
    wide = toy(simulate=lambda x, t, rng: np.hstack([x[:, :2], 10 ** (3 * x[:, 2:])]), expected=None, log_likelihood=None)
    assert "x[1] of kind 'real' run over" in found(wide, "range", "warning")


def test_what_float32_loses():
    faint = toy(simulate=lambda x, theta, rng: x * [1, 1, 1e-50], expected=None, log_likelihood=None, observed=None)
    assert "x[1] are mostly below what float32 holds" in found(faint, "float32")
    huge = toy(simulate=lambda x, theta, rng: x * [1, 1, 1e45], expected=None, log_likelihood=None, observed=None)
    assert "x[1] exceed what float32 holds" in found(huge, "float32")
    offset = toy(simulate=lambda x, theta, rng: x + np.array([0, 0, 1e7]), expected=None, log_likelihood=None, observed=None)
    assert "x[1] vary by less than 100 steps" in found(offset, "float32", "warning")


def test_files_and_theta(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def writes(x, theta, rng):
        (tmp_path / "events.tmp").write_text("")
        theta *= 0
        return x

    assert "events.tmp; several workers" in found(toy(simulate=writes), "files", "warning")
    assert "changed the array theta" in found(toy(simulate=writes), "theta", "warning")


@pytest.mark.parametrize(
    "change",
    [
        lambda x, theta, rng: np.hstack([x[:, :1], x[:, 1:] - theta[:, 1:].mean() + theta[:1, 1:]]),  # of the first row
        lambda x, theta, rng: np.hstack([x[:, :1], x[:, 1:] - x[:, 1:].mean(axis=0)]),  # centred over the batch
        lambda x, theta, rng: Toy().simulate(np.tile(theta[:1], (len(theta), 1)), rng).astype(float),
    ],
)
def test_rows_that_depend_on_each_other(change):
    assert "rows at one theta differ with the other rows" in found(
        toy(simulate=change, expected=None, log_likelihood=None, observed=None), "rows"
    )


def test_rows_that_share_their_noise():
    def shared(x, theta, rng):
        return np.hstack([np.full((len(x), 1), rng.poisson(30)), theta[:, 1:] + rng.standard_normal((1, 2))])

    assert "they share their noise" in found(toy(simulate=shared, expected=None, log_likelihood=None), "rows")


@pytest.mark.parametrize(
    "density",
    [
        lambda self, x, theta: 2 * Toy.log_likelihood(self, x, theta),
        lambda self, x, theta: 0.5 * Toy.log_likelihood(self, x, theta),
        lambda self, x, theta: Toy.log_likelihood(self, x, theta + np.array([0, 0.5])),
        lambda self, x, theta: stats.norm.logpdf(x[:, 1:], theta[:, 1:], 0.7).sum(axis=1),
        lambda self, x, theta: Toy.log_likelihood(self, x, theta) + np.log(theta[:, 0]) * 5,  # a constant that depends on theta
    ],
)
def test_a_wrong_density_is_found(density):
    assert "draws do not belong to log_likelihood" in found(toy(log_likelihood=density), "log_likelihood", n=2000)


def test_a_density_of_other_form():
    assert "has shape (400, 1)" in found(toy(log_likelihood=lambda self, x, t: Toy.log_likelihood(self, x, t)[:, None]), "log_likelihood")
    assert "raised TypeError" in found(toy(log_likelihood=lambda self, x: 0), "log_likelihood")
    assert "is not finite in 400 of 400 rows" in found(toy(log_likelihood=lambda self, x, t: np.full(len(x), -np.inf)), "log_likelihood")


def test_the_test_of_labels_has_its_size():
    """Labels that follow their probabilities are rejected at most as often as stated, also where most are nearly sure."""

    def pvalue(i):
        rng = rng_for(3, i)
        log_ratio = rng.normal(0, 3 * 10 ** rng.uniform(-1, 1), size=500)
        changes = {"a": rng.standard_normal(500), "b": rng.choice([-1, 1], size=500) * 10 ** rng.uniform(-2, 0, size=500)}
        return _label_test(log_ratio, rng.random(500) < 1 / (1 + np.exp(-log_ratio)), changes)[0]

    p = np.array([pvalue(i) for i in range(400)])
    assert (p < 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400) and p.min() > 1e-5


def test_means_and_the_observation():
    assert "is 30" in (text := found(toy(expected=lambda self, t: 1.1 * Toy.expected(self, t)), "expected")) or "standard errors" in text
    assert "has shape (400, 1)" in found(toy(expected=lambda self, t: t[:, :1]), "expected", "warning")
    assert "raised ValueError: no" in found(toy(expected=lambda self, t: (_ for _ in ()).throw(ValueError("no"))), "expected")
    assert "lies outside the 400 simulations in n" in found(toy(observed=lambda self: np.array([3e4, 0, 0])), "observed", "warning")
    assert "expected (3,) for one observation" in found(toy(observed=lambda self: np.zeros(4)), "observed")
    assert "is nan in x[0]" in found(toy(observed=lambda self: np.array([30.0, np.nan, 0])), "observed")


def test_time_is_kept():
    class Slow(Toy):
        def simulate(self, theta, rng):
            time.sleep(0.05 * len(theta))
            return super().simulate(theta, rng)

    begin = time.perf_counter()
    result = quick_check(Slow())
    assert time.perf_counter() - begin < 3 and result.ok
    assert "were left out: a row takes 0.05" in result.summary()
    assert quick_check(toy(simulate=lambda x, theta, rng: x[:, :2])).errors


def test_a_single_row_that_fails_by_chance_is_no_fault_of_shape():
    class Chance(LinearGaussian):
        def simulate(self, theta, rng):
            if len(theta) == 1 and rng.random() < 0.5:
                raise RuntimeError("no fit")
            return super().simulate(theta, rng)

    assert all(inspect_simulator(Chance(), n=50, seed=seed).ok for seed in range(5))


def test_a_column_that_is_outside_by_chance_is_not_warned_of():
    """Of 200 columns about 4 lie outside 100 simulations."""

    class Many:
        settings: ClassVar[dict] = {}
        prior = BoxPrior([Parameter("a", 0.0, 1.0)])
        parameters = prior.parameters
        observables = (Observable("y", 200),)

        def simulate(self, theta, rng):
            return theta + rng.standard_normal((len(theta), 200))

        def observed(self):
            return self.simulate(np.array([[0.5]]), np.random.default_rng(5))[0]

    assert inspect_simulator(Many(), n=100).warnings == ()
