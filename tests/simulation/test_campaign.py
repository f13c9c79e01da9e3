import importlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SimulatorMismatchError, StoreError, SupportError
from sbi_phys.core.progress import LineProgress
from sbi_phys.core.rng import rng_for
from sbi_phys.priors import BoxPrior, NormalPrior, Parameter
from sbi_phys.simulation import _dispatch
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.manifest import list_shards
from sbi_phys.store.shards import shard_name
from sbi_phys.store.store import Store
from tests.store.helpers import digests
from tests.toys import Flaky, LinearGaussian, Slow

ROOT = Path(__file__).parents[2]
FLAKY = Flaky(1.8, -1.8)


def spawn_pool(n=2):
    return ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Digests of an undisturbed run of 650 rows by one worker."""
    path = tmp_path_factory.mktemp("reference") / "store"
    simulate(FLAKY, 650, path, seed=7, shard_size=100, workers=1)
    return digests(path)


def test_rows_follow_the_model(tmp_path):
    toy = LinearGaussian(dim=2, n_columns=3)
    theta, x = simulate(toy, 5000, tmp_path, seed=1, workers=1, dtype="float64").read()
    assert stats.kstest(theta[:, 0], "norm").pvalue > 1e-3
    z = (x - toy.expected(theta)) / toy.noise
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(z.ravel() * 1.1, "norm").pvalue < 1e-3  # the test could have failed
    assert np.unique(x[:, 0]).size == 5000  # no two shards drew the same numbers


def test_rows_follow_from_seed_and_shard(tmp_path):
    toy = LinearGaussian()
    theta, x = simulate(toy, 30, tmp_path, seed=4, shard_size=20, workers=1, dtype="float64").read()
    np.testing.assert_array_equal(theta[20:], toy.prior.sample(10, rng_for(4, "theta", 1)))
    np.testing.assert_array_equal(x[20:], toy.simulate(theta[20:], rng_for(4, "x", 1)))


def test_two_workers_write_the_bytes_of_one(tmp_path, reference):
    store = simulate(FLAKY, 650, tmp_path, seed=7, shard_size=100, workers=2)
    assert digests(tmp_path) == reference
    assert store.n_failed > 10
    store.verify()


def test_executors_of_the_caller_write_the_same_bytes(tmp_path, reference):
    with ThreadPoolExecutor(3) as threads, spawn_pool() as processes:
        for name, executor in {"threads": threads, "processes": processes}.items():
            simulate(FLAKY, 650, tmp_path / name, seed=7, shard_size=100, executor=executor)
            assert digests(tmp_path / name) == reference
            assert executor.submit(int, 3).result() == 3  # not shut down


def test_tiny_work_starts_no_pool(tmp_path, reference, monkeypatch):
    monkeypatch.setattr(_dispatch, "ProcessPoolExecutor", lambda *args, **kwargs: pytest.fail("a pool for milliseconds of work"))
    simulate(FLAKY, 650, tmp_path, seed=7, shard_size=100)
    assert digests(tmp_path) == reference


def test_long_work_starts_a_pool(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(_dispatch, "_own_pool", lambda run, n: called.append((n, list(run.todo))))
    simulate(Slow(0.05), 200, tmp_path, shard_size=2)
    assert called == [(3, list(range(1, 100)))]  # the first shard was made here, to see how long one takes


def test_in_flight_is_bounded(tmp_path):
    class Counting(Executor):
        flying = most = 0

        def submit(self, fn, /, *args, **kwargs):
            self.flying += 1
            self.most = max(self.most, self.flying)
            future = Future()

            def later():
                time.sleep(0.002)
                result = fn(*args, **kwargs)
                self.flying -= 1
                return result

            inner = threads.submit(later)
            inner.add_done_callback(lambda f: future.set_result(f.result()))
            return future

    with ThreadPoolExecutor(1) as threads:
        executor = Counting()
        simulate(FLAKY, 300, tmp_path, shard_size=10, executor=executor, workers=2)
    assert executor.most == 4


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.integers(1, 650), max_size=3), lost=st.sets(st.integers(0, 6)))
def test_the_folder_does_not_depend_on_its_history(tmp_path, reference, steps, lost):
    path = tmp_path / "store"
    shutil.rmtree(path, ignore_errors=True)
    for i, n in enumerate(steps):
        assert simulate(FLAKY, n, path, seed=7, shard_size=100, workers=1).n_rows == max(steps[: i + 1])
    for index in lost & set(list_shards(path) if path.exists() else ()):
        (path / shard_name(index)).unlink()
    simulate(FLAKY, 650, path, seed=7, workers=1, shard_size=None if steps else 100)
    assert digests(path) == reference


def test_asking_for_more_keeps_full_shards_and_theta(tmp_path):
    store = simulate(FLAKY, 250, tmp_path, seed=7, shard_size=100, workers=1)
    theta, _ = store.read(valid_only=False)
    kept = {name: (tmp_path / name).stat().st_ino for name in (shard_name(0), shard_name(1))}
    store = simulate(FLAKY, 650, tmp_path, seed=7, workers=1)  # shard_size: that of the store
    assert (store.n_rows, store.shard_size) == (650, 100)
    assert {name: (tmp_path / name).stat().st_ino for name in kept} == kept
    np.testing.assert_array_equal(store.read(valid_only=False)[0][:250], theta)
    assert simulate(FLAKY, 10, tmp_path, seed=7, workers=1).n_rows == 650  # fewer: nothing is thrown away


def test_an_unfinished_store_may_end_earlier(tmp_path, reference):
    simulate(FLAKY, 650, tmp_path, seed=7, shard_size=100, workers=1)
    for index in (2, 4, 5, 6):
        (tmp_path / shard_name(index)).unlink()
    store = simulate(FLAKY, 350, tmp_path, seed=7, workers=1)
    assert (store.n_rows, store.complete) == (400, True)  # shard 3 was there already
    store.verify()


def test_a_lost_manifest_is_made_again(tmp_path, reference):
    simulate(FLAKY, 650, tmp_path, seed=7, shard_size=100, workers=1)
    (tmp_path / "store.json").unlink()
    simulate(FLAKY, 1, tmp_path, seed=7, workers=1)
    assert digests(tmp_path) == reference


# ---- settings


def test_what_cannot_be_pickled_is_refused_with_advice(tmp_path):
    toy = LinearGaussian()
    toy.lock = threading.Lock()
    with pytest.raises(SettingError, match=r"LinearGaussian cannot be sent to worker processes: .*workers=1"):
        simulate(toy, 20, tmp_path / "a", shard_size=10, workers=2)
    assert list_shards(tmp_path / "a") == []
    assert simulate(toy, 20, tmp_path / "a", shard_size=10, workers=1).n_rows == 20


SCRIPT = """
import sys
import numpy as np
import sbi_phys as sp
SCALE = 2.0
prior = sp.BoxPrior([sp.Parameter("a", 1.0, 5.0)])
class Mine:
    settings = {}
    parameters, observables = list(prior.parameters), [sp.Observable("n", 2, kind="counts")]
    prior = prior
    def __init__(self):
        self.power = lambda theta: SCALE * theta**2
    def simulate(self, theta, rng):
        return rng.poisson(np.repeat(self.power(theta), 2, axis=1))
def one(theta, rng):
    return rng.poisson(SCALE * theta["a"], 2)
print("started")
simulators = {"class": Mine(), "function": sp.FunctionSimulator(one, prior, Mine.observables)}
simulators["named"] = sp.FunctionSimulator("__main__:one", prior, Mine.observables)
simulators["lambda"] = sp.FunctionSimulator(lambda theta, rng: rng.poisson(SCALE * theta["a"], 2), prior, Mine.observables)
for name, simulator in simulators.items():
    for workers, isolate in ((1, False), (2, False), (2, True)):
        if not isolate or name in ("class", "named"):
            sp.simulate(simulator, 60, f"{name}-{workers}{isolate}", shard_size=20, workers=workers, isolate=isolate)
"""


@pytest.mark.parametrize("form", ["script", "prompt"])
def test_a_plain_script_and_a_prompt_work_with_workers(tmp_path, form):
    """No guard, classes, functions and lambdas of __main__: nothing runs twice, and any number of workers writes the same bytes."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py"] if form == "script" else [sys.executable, "-c", SCRIPT]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr[-2000:]
    for name in ("class", "function", "named", "lambda"):
        one = {k: v for k, v in digests(tmp_path / f"{name}-1False").items() if k != ".lock"}
        for other in tmp_path.glob(f"{name}-2*"):
            assert {k: v for k, v in digests(other).items() if k != ".lock"} == one


def test_theta_may_be_given(tmp_path):
    toy = LinearGaussian()
    theta = toy.prior.sample(35, rng_for(9))
    store = simulate(toy, None, tmp_path, theta=theta, seed=3, shard_size=20, workers=1)
    np.testing.assert_array_equal(store.read()[0], theta)
    one, two = (simulate(toy, None, tmp_path / str(n), theta=theta, seed=3, shard_size=20, workers=n) for n in (1, 2))
    assert digests(one.path) == digests(two.path)
    more = np.concatenate([theta, theta[:10]])
    assert simulate(toy, 45, one.path, theta=more, seed=3, workers=1).n_rows == 45
    for wrong, error, message in [
        (theta[::-1], StoreError, f"{shard_name(0)} was made at other theta; expected rows 0 to 20"),
        (theta[:30], StoreError, "holds 35 rows; expected at most the 30 rows of theta"),
        (None, StoreError, "store.json was made with another theta: got 'given', expected 'prior'"),
    ]:
        with pytest.raises(error, match=message):
            simulate(toy, None if wrong is not None else 35, tmp_path, theta=wrong, seed=3, workers=1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n": 0}, SettingError, "n is 0; expected .* >= 1"),
        ({"n": 1.5}, SettingError, "n is 1.5"),
        ({"n": None}, SettingError, "n is None; expected the number of rows, or theta"),
        ({"seed": -1}, SettingError, "seed is -1"),
        ({"seed": 2**63}, SettingError, "seed is"),
        ({"workers": 0}, SettingError, "workers is 0"),
        ({"shard_size": 0}, SettingError, "shard_size is 0"),
        ({"dtype": "float16"}, SettingError, "dtype is 'float16'; expected one of float32, float64"),
        ({"executor": map}, SettingError, "executor is .*; expected a concurrent.futures.Executor"),
        ({"progress": True}, SettingError, "progress is True"),
        ({"prior": "flat"}, SettingError, "prior is 'flat'"),
        (
            {"prior": NormalPrior([Parameter("a"), Parameter("b")])},
            SimulatorMismatchError,
            r"\('a', 'b'\); expected those of the simulator",
        ),
        ({"theta": np.zeros((5, 3))}, ShapeError, r"theta has shape \(5, 3\); expected \(n, 2\)"),
        ({"theta": np.zeros((4, 2))}, ShapeError, "theta has 4 rows and n is 5"),
        ({"theta": np.zeros((0, 2)), "n": None}, DataError, "theta has no rows"),
        ({"theta": np.full((5, 2), np.nan)}, NonFiniteError, "theta has NaN"),
        (
            {"theta": np.full((5, 2), 3.0), "prior": BoxPrior([Parameter("t0", 0, 1), Parameter("t1", 0, 1)])},
            SupportError,
            "outside the prior",
        ),
    ],
)
def test_bad_settings_are_named_and_leave_no_store(tmp_path, changes, error, message):
    call = {"n": 5, "workers": 1, **changes}
    with pytest.raises(error, match=message):
        simulate(LinearGaussian(), call.pop("n"), tmp_path / "store", **call)
    assert not (tmp_path / "store" / "store.json").exists()


def test_a_prior_of_another_kind_is_refused(tmp_path):
    class Odd(NormalPrior):
        pass

    toy = LinearGaussian()
    toy.prior = Odd(toy.parameters)
    with pytest.raises(SettingError, match="cannot be rebuilt from its to_dict"):
        simulate(toy, 5, tmp_path, workers=1)


@pytest.mark.parametrize(
    ("simulator", "changes", "message"),
    [
        (Flaky(1.8, -1.7), {}, "made with another simulator: got settings = nan_below = -1.8, expected settings = nan_below = -1.7"),
        (FLAKY, {"seed": 8}, "made with another seed: got 7, expected 8"),
        (FLAKY, {"dtype": "float64"}, "made with another dtype: got 'float32', expected 'float64'"),
        (FLAKY, {"shard_size": 50}, "made with another shard_size: got 100, expected 50"),
        (FLAKY, {"prior": NormalPrior(FLAKY.parameters, sd=2)}, r"made with another prior: got sd = \[0\] 1.0, expected sd = \[0\] 2.0"),
    ],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, simulator, changes, message):
    simulate(FLAKY, 150, tmp_path, seed=7, shard_size=100, workers=1)
    before = digests(tmp_path)
    for gone in ("", "store.json"):  # the manifest says it, and so do the shards themselves
        if gone:
            (tmp_path / gone).unlink()
        with pytest.raises(StoreError, match=message):
            simulate(simulator, 300, tmp_path, **{"seed": 7, "workers": 1, **changes})
    assert {k: v for k, v in digests(tmp_path).items() if k != "store.json"} == {k: v for k, v in before.items() if k != "store.json"}


CODE = """
import numpy as np, sbi_phys as sp
from rates import SCALE
class Mine:
    settings = {}
    parameters = (sp.Parameter("a", 1.0, 5.0),)
    prior = sp.BoxPrior(parameters)
    observables = (sp.Observable("n", 2, kind="counts"),)
    def simulate(self, theta, rng):
        return rng.poisson(SCALE * np.repeat(theta, 2, axis=1))
"""


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A simulator whose code is edited between calls: `edited(scale)` returns it with another value of a constant beside it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_mine.py").write_text(CODE)

    def load(scale):
        (tmp_path / "rates.py").write_text(f"SCALE = {scale}\n")
        for name in ("edited_mine", "rates"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("edited_mine").Mine()

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield load
    for name in ("edited_mine", "rates"):
        sys.modules.pop(name, None)


def test_a_store_refuses_rows_of_edited_code(tmp_path, edited):
    folder, options = tmp_path / "store", {"seed": 0, "workers": 1, "shard_size": 100}
    first = simulate(edited("1.0"), 100, folder, **options)
    assert [set(c) for c in first.code] == [{"sha256", "parts"}] and set(first.code[0]["parts"]) == {"edited_mine", "rates"}
    changed = edited("50.00")
    before = digests(folder)
    for n in (100, 200):  # also where nothing is left to make
        with pytest.raises(StoreError, match=r"other code of the simulator: rates changed; .* accept_code_change=True"):
            simulate(changed, n, folder, **options)
    with pytest.raises(StoreError, match="rates changed"):
        simulate(changed, 200, folder, shards="1", **options)
    assert {k: v for k, v in digests(folder).items() if k != ".plan.lock"} == before
    store = simulate(changed, 200, folder, accept_code_change=True, **options)
    assert store.code[0] == first.code[0] and len(store.code) == 2 and store.n_rows == 200
    assert digests(folder)[shard_name(0)] == before[shard_name(0)]
    assert simulate(changed, 200, folder, **options).code == store.code  # accepted for good
    with pytest.raises(StoreError, match="rates changed"):
        simulate(edited("1.0"), 300, folder, **options)


def test_a_store_made_before_the_code_was_kept_is_accepted(tmp_path, edited):
    simulator = edited("1.0")
    simulate(simulator, 100, tmp_path / "store", workers=1, shard_size=100)
    manifest = tmp_path / "store" / "store.json"
    values = json.loads(manifest.read_text())
    code = values.pop("code")
    values.pop("checksum", None)
    manifest.write_text(json.dumps(values))
    assert Store(tmp_path / "store").code == ()
    store = simulate(simulator, 200, tmp_path / "store", workers=1)
    assert [c["sha256"] for c in store.code] == [code[0]["sha256"]] and "stores did not keep the code" in store.code[0]["note"]
    with pytest.raises(StoreError, match="rates changed"):
        simulate(edited("2.00"), 200, tmp_path / "store", workers=1)
    manifest.write_text(json.dumps({**values, "code": ["abc"]}))
    with pytest.raises(StoreError, match=r"has code = \['abc'\]; expected a list of fingerprints"):
        Store(tmp_path / "store")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be created"):
        simulate(LinearGaussian(), 5, tmp_path / "file" / "store", workers=1)


def test_foreign_files_named_like_shards_are_refused(tmp_path):
    (tmp_path / shard_name(0)).write_text("mine")
    with pytest.raises(StoreError, match="no HDF5 file"):
        simulate(LinearGaussian(), 5, tmp_path, workers=1)
    assert (tmp_path / shard_name(0)).read_text() == "mine"


def test_progress_counts_rows_and_failures(tmp_path):
    simulate(FLAKY, 300, tmp_path, seed=7, shard_size=100, workers=1)
    stream = io.StringIO()
    simulate(FLAKY, 650, tmp_path, seed=7, workers=1, progress=LineProgress(stream, interval_s=0))
    out = stream.getvalue().splitlines()
    assert out[0].startswith("simulate: 300/650 (46 %)") and out[1].startswith("simulate: 400/650 (62 %)")
    failed = Store(tmp_path).status()[300:]
    assert f"{np.count_nonzero(failed)} failed, done" in out[-1]
