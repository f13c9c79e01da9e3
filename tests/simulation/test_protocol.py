import sys
import types

import numpy as np
import pytest

from sbi_phys.core.errors import SettingError, SimulatorMismatchError
from sbi_phys.priors import Observable
from sbi_phys.simulation.campaign import simulate
from sbi_phys.simulation.protocol import Simulator, check_output, check_simulator, load_simulator
from sbi_phys.store.identity import simulator_identity
from tests.toys import Counts, Flaky, Gaps, LinearGaussian, Misbehaving, Slow

FLAKY = Flaky(1.8, -1.8)


def broken(**changes):
    toy = LinearGaussian()
    for name, value in changes.items():
        delattr(toy, name) if value is None else setattr(toy, name, value)
    return toy


@pytest.mark.parametrize(
    ("simulator", "message"),
    [
        (LinearGaussian, "is the class LinearGaussian; expected an object"),
        (object(), "builtins:object has no attribute 'prior'"),
        (broken(settings=None), "has no attribute 'settings'"),
        (broken(settings={"a": object()}), "cannot be written as JSON"),
        (broken(settings={"a": float("nan")}), "cannot be written as JSON"),
        (broken(prior="box"), "prior is 'box' .str.; expected a Prior"),
        (broken(parameters=()), r"parameters are \(\); expected those of its prior, \('t0', 't1'\)"),
        (broken(observables=()), r"observables are \(\); expected at least one Observable"),
        (broken(observables=("x",)), "expected at least one Observable"),
        (broken(observables=(Observable("x", 1), Observable("x", 1))), "repeat a name"),
        (broken(simulate="later"), "no method simulate"),
    ],
)
def test_what_is_no_simulator_is_named(tmp_path, simulator, message):
    with pytest.raises(SimulatorMismatchError, match=message):
        check_simulator(simulator)
    with pytest.raises(SimulatorMismatchError, match=message):
        simulate(simulator, 5, tmp_path, workers=1)


def test_a_trial_finds_a_simulator_with_its_own_randomness():
    check_simulator(LinearGaussian(), n_simulations=2)
    check_simulator(Counts(), n_simulations=2)
    check_simulator(Misbehaving("global"))  # not seen without a trial
    with pytest.raises(SimulatorMismatchError, match=r"gave different numbers in columns \[0, 1\] for the same theta and seed"):
        check_simulator(Misbehaving("global"), n_simulations=2)
    with pytest.raises(SimulatorMismatchError, match="returned shape"):
        check_simulator(Misbehaving("columns"), n_simulations=2)


def test_toys_are_simulators():
    for toy in (LinearGaussian(3, 5), FLAKY, Slow(), Counts(), Misbehaving()):
        assert isinstance(toy, Simulator)
        identity = simulator_identity(toy)
        assert load_simulator(identity["class"], identity["settings"]).settings == toy.settings


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("tests.toys", {}, "expected 'package.module:Class'"),
        (":LinearGaussian", {}, "expected 'package.module:Class'"),
        ("tests.toyz:LinearGaussian", {}, "module 'tests.toyz' was not found: no module named 'tests.toyz'"),
        ("nowhere.at_all:X", {}, "no module named 'nowhere'"),
        ("..toys:X", {}, "cannot be imported"),
        ("tests.toys:LinearGausian", {}, "no class 'LinearGausian'; it has LinearGaussian, .*did you mean 'LinearGaussian'"),
        ("tests.toys:math", {}, "no class 'math'"),
        ("tests.toys:LinearGaussian", {"nois": 1}, "unknown key 'nois'.*did you mean 'noise'"),
        ("tests.toys:LinearGaussian", {"dim": "two"}, "cannot be built with settings {'dim': 'two'}"),
    ],
)
def test_a_wrong_name_of_a_simulator_is_explained(spec, options, message):
    with pytest.raises(SettingError, match=message):
        load_simulator(spec, options)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("subprocess:Popen", {"args": ["touch", "called"]}, "standard library"),
        ("os:system", {"command": "touch called"}, "standard library"),
        ("builtins:open", {"file": "called", "mode": "w"}, "standard library"),
        ("logging.handlers:RotatingFileHandler", {"filename": "called"}, "standard library"),
        ("caller:Popen", {"args": ["touch", "called"]}, "standard library"),
        ("caller:Writer", {"path": "called"}, r"caller:Writer has no method simulate\(theta, rng\)"),
        ("caller:Other", {"path": "called"}, r"has simulate\(self\); expected simulate\(self, theta, rng\)"),
        ("caller:Data", {"path": "called"}, "has no method simulate"),
        ("caller:write", {"path": "called"}, "no class 'write'"),
        ("numpy:memmap", {"filename": "called", "mode": "w+", "shape": [3]}, "has no method simulate"),
    ],
)
def test_what_a_file_names_is_not_called_before_it_is_known_to_be_a_simulator(spec, options, message, tmp_path, monkeypatch):
    (tmp_path / "caller.py").write_text(
        "from subprocess import Popen\n"
        "def write(path): open(path, 'w').close()\n"
        "class Writer:\n"
        "    def __init__(self, path): write(path)\n"
        "class Other(Writer):\n"
        "    def simulate(self): pass\n"
        "class Data(Writer):\n"
        "    simulate = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "caller", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=message):
        load_simulator(spec, options)
    assert not (tmp_path / "called").exists()


def test_a_module_that_a_simulator_needs_and_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "needy_simulator.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingError, match="needy_simulator needs the module 'no_such_dependency', which is not installed"):
        load_simulator("needy_simulator:X")


def test_output_is_flattened_by_the_observables_and_by_nothing_else():
    toy = Gaps(shape=(2, 3), single=False)
    blocks = {"image": np.arange(24.0).reshape(4, 2, 3), "present": np.ones((4, 1), dtype=np.int64)}
    rows = check_output(toy, blocks, 4)
    np.testing.assert_array_equal(rows, np.hstack([np.arange(24.0).reshape(4, 6), np.ones((4, 1))]))
    np.testing.assert_array_equal(check_output(Gaps(), blocks["image"], 4), rows[:, :6])
    wrong = [
        ({"image": blocks["image"]}, r"blocks \['image'\]; expected the observables \['image', 'present'\]"),
        (blocks | {"image": np.zeros((4, 3, 2))}, r"\['image'\] returned shape \(4, 3, 2\)"),
        (blocks | {"present": np.ones((3, 1))}, r"\['present'\] returned shape \(3, 1\) for 4 rows"),
        (blocks | {"present": [[1]] * 4}, r"\['present'\] returned a builtins.list"),
        (np.zeros((7, 4)), r"returned shape \(7, 4\)"),
        (np.zeros((4, 2, 3)), r"returned shape \(4, 2, 3\)"),
    ]
    for got, message in wrong:
        with pytest.raises(SimulatorMismatchError, match=message):
            check_output(toy, got, 4)
    with pytest.raises(SimulatorMismatchError, match=r"returned shape \(4, 3, 2\)"):
        check_output(Gaps(), np.zeros((4, 3, 2)), 4)


def test_a_trial_finds_fractions_in_counts():
    class Weighted(Counts):
        def simulate(self, theta, rng):
            return super().simulate(theta, rng) * np.array([1, 0.7, 1, 1])

    check_simulator(Counts(), n_simulations=5)
    with pytest.raises(SimulatorMismatchError, match=r"in spectrum\[1\], of kind 'counts'; expected whole numbers, or kind='real'"):
        check_simulator(Weighted(), n_simulations=5)


def test_an_object_that_a_module_has_made_is_a_simulator(monkeypatch):
    made = LinearGaussian()
    monkeypatch.setitem(sys.modules, "ready_made", types.SimpleNamespace(simulator=made, __name__="ready_made"))
    assert load_simulator("ready_made:simulator") is made
    with pytest.raises(SettingError, match="is an object that the module has made, and settings"):
        load_simulator("ready_made:simulator", {"dim": 3})


def test_lists_are_taken_for_tuples_and_messages_are_short():
    toy = LinearGaussian()
    toy.parameters, toy.observables = list(toy.parameters), list(toy.observables)
    check_simulator(toy, n_simulations=5)
    for name, value in (("settings", {"table": list(range(5000))}), ("observables", [Observable(f"x{i}", 1) for i in range(500)])):
        setattr(toy, name, value if name == "settings" else (*value, 3))
        toy.settings = toy.settings | {"bad": object()} if name == "settings" else {}
        with pytest.raises(SimulatorMismatchError) as caught:
            check_simulator(toy)
        assert len(str(caught.value)) < 420
