import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, SimulatorMismatchError, StoreError
from sbi_phys.core.rng import rng_for
from sbi_phys.priors import Observable
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.manifest import list_shards
from tests.toys import Counts, Flaky, Gaps, LinearGaussian, Misbehaving

ROOT = Path(__file__).parents[2]


def test_poison_rows_are_isolated_reproducibly(tmp_path):
    simulator = Flaky(raise_above=2.0)
    store = simulate(simulator, 400, tmp_path, seed=2, shard_size=400, workers=1, dtype="float64")
    theta, x = store.read(valid_only=False)
    poison = theta[:, 0] > 2.0
    assert 3 < poison.sum() < 30
    np.testing.assert_array_equal(store.status() == 2, poison)
    np.testing.assert_array_equal(x[~poison], divided(simulator, theta, poison, 0, 400, seed=2)[~poison])


def divided(simulator, theta, poison, a, b, seed):
    """x of rows a to b: in one call if none is poison, else in sixteen parts, each from its own generator."""
    if not poison[a:b].any():
        rng = rng_for(seed, "x", 0, a, b) if (a, b) != (0, len(theta)) else rng_for(seed, "x", 0)
        return LinearGaussian.simulate(simulator, theta[a:b], rng)
    if b - a == 1:
        return np.full((1, 2), np.nan)
    n = min(16, b - a)
    edges = [a + (b - a) * i // n for i in range(n + 1)]
    return np.concatenate([divided(simulator, theta, poison, c, d, seed) for c, d in pairwise(edges)])


@pytest.mark.parametrize(("how", "reason"), [("raises", "ValueError: no tables"), ("exits", "SystemExit: bye")])
def test_a_simulator_that_always_fails_ends_the_run(tmp_path, how, reason):
    with pytest.raises(
        DataError, match=rf"all 20 rows of shard 0 failed in tests\.toys:Misbehaving: {reason}; expected at least one good row"
    ):
        simulate(Misbehaving(how), 60, tmp_path, shard_size=20, workers=1)
    with pytest.raises(DataError, match="all 3 rows of shard 0 failed"):
        simulate(Misbehaving(how), 3, tmp_path / "small", workers=1)
    assert list_shards(tmp_path) == list_shards(tmp_path / "small") == []  # mended, it starts afresh


def test_a_short_last_shard_may_fail_entirely(tmp_path):
    toy = Flaky(raise_above=0.5)
    seed = next(s for s in range(100) if toy.prior.sample(1, rng_for(s, "theta", 1))[0, 0] > 0.5)
    store = simulate(toy, 101, tmp_path, seed=seed, shard_size=100, workers=1)
    assert store.failures()[-1].row == 100


def test_a_simulator_may_use_one_buffer_for_all_calls(tmp_path):
    class Buffered(Flaky):
        buffer = np.empty((400, 2))

        def simulate(self, theta, rng):
            x = self.buffer[: theta.shape[0]]
            x[:] = super().simulate(theta, rng)
            return x

    stores = [simulate(c(2.0), 400, tmp_path / c.__name__, seed=2, workers=1, dtype="float64") for c in (Flaky, Buffered)]
    np.testing.assert_array_equal(stores[0].read()[1], stores[1].read()[1])
    assert stores[0].n_failed > 3


def test_memory_that_runs_out_flags_no_row(tmp_path):
    with pytest.raises(StoreError, match="memory ran out in a batch of 10 rows; expected a smaller shard_size"):
        simulate(Misbehaving("memory"), 10, tmp_path, workers=1)


def test_an_error_in_a_worker_comes_back_as_itself(tmp_path):
    with pytest.raises(DataError, match="all 20 rows of shard . failed"):
        simulate(Misbehaving("raises"), 100, tmp_path, shard_size=20, workers=2)
    with ThreadPoolExecutor(2) as threads, pytest.raises(SimulatorMismatchError, match=r"returned shape \(20, 1\)"):
        simulate(Misbehaving("columns"), 100, tmp_path / "b", shard_size=20, executor=threads)
    assert list_shards(tmp_path) == []


def test_a_simulator_that_works_in_place_does_not_change_theta(tmp_path):
    theta, _ = simulate(Misbehaving("in place"), 10, tmp_path, workers=1).read()
    np.testing.assert_array_equal(theta, Misbehaving().prior.sample(10, rng_for(0, "theta", 0)))


# ---- what a shard may hold


def test_a_torch_tensor_is_refused(tmp_path):
    torch = pytest.importorskip("torch")

    class Torch(LinearGaussian):
        def simulate(self, theta, rng):
            return torch.zeros(theta.shape)

    with pytest.raises(SimulatorMismatchError, match=r"returned a torch\.Tensor; expected a numpy array \(5, 2\)"):
        simulate(Torch(), 5, tmp_path, workers=1)


@pytest.mark.parametrize("value", [2**24 + 1, 2**40 + 1])
def test_counts_that_float32_would_change_are_refused(tmp_path, value):
    class Big(Counts):
        def simulate(self, theta, rng):
            x = super().simulate(theta, rng)
            x[-1, 1] = value
            return x

    with pytest.raises(DataError, match=rf"{float(value)!r}\W+ in spectrum\[1\], which float32 cannot hold; expected dtype=\"float64\""):
        simulate(Big(), 5, tmp_path, workers=1)
    assert simulate(Big(), 5, tmp_path / "double", workers=1, dtype="float64").read()[1][-1, 1] == value


def test_what_float32_holds_is_stored(tmp_path):
    class Big(Counts):
        def simulate(self, theta, rng):
            x = super().simulate(theta, rng)
            x[:, 0] = 2**24 + 2  # even: exact
            x[:, 3] = 2**24 + 1  # not a count: rounding is what real numbers do
            return x

    _, x = simulate(Big(), 5, tmp_path, workers=1).read()
    assert (x[:, 0] == 2**24 + 2).all()


def test_a_real_number_past_float32_is_refused_not_made_infinite(tmp_path):
    class Big(LinearGaussian):
        def simulate(self, theta, rng):
            return super().simulate(theta, rng) * 1e39

    with pytest.raises(DataError, match=r"in x\[0\], which float32 cannot hold"):
        simulate(Big(), 5, tmp_path, workers=1)


def test_blas_has_one_thread_while_it_simulates_and_its_own_after(tmp_path):
    from threadpoolctl import threadpool_info, threadpool_limits

    class Asks(LinearGaussian):
        seen = None

        def simulate(self, theta, rng):
            self.seen = {pool["num_threads"] for pool in threadpool_info()}
            return super().simulate(theta, rng)

    simulator = Asks()
    with threadpool_limits(2):
        before = [pool["num_threads"] for pool in threadpool_info()]
        simulate(simulator, 5, tmp_path, workers=1)
        assert [pool["num_threads"] for pool in threadpool_info()] == before
    assert simulator.seen == {1}


def test_workers_start_without_torch():
    code = "import sys, sbi_phys.simulation.campaign; print([m for m in ('torch', 'rich', 'matplotlib', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("columns", r"returned shape \(10, 1\) for 10 rows of theta; expected \(10, 2\), columns \{'x': 2\}"),
        ("rows", r"returned shape \(9, 2\) for 10 rows"),
        ("complex", "returned dtype complex128; expected real numbers"),
        ("text", "returned dtype <U"),
        ("list", r"returned a builtins.list; expected a numpy array \(10, 2\)$"),
        ("tensor", r"returned a tests\.toys\._Tensor; expected a numpy array \(10, 2\); return x\.detach\(\)"),
        ("changes", r"returned shape \(10, 3\) for 10 rows"),
    ],
)
def test_wrong_output_is_named(tmp_path, how, message):
    with pytest.raises(SimulatorMismatchError, match=r"tests\.toys:Misbehaving\.simulate " + message):
        simulate(Misbehaving(how), 200, tmp_path, shard_size=10, workers=1)


def test_the_form_in_which_a_simulator_returns_x_does_not_matter(tmp_path):
    stores = [simulate(Gaps(form=form), 200, tmp_path / form, seed=1, workers=1) for form in ("rows", "shape", "blocks")]
    theta, x = stores[0].read()
    assert x.shape == (200, 6)
    for store in stores[1:]:
        np.testing.assert_array_equal(store.read()[0], theta)
        np.testing.assert_array_equal(store.read()[1], x)


def test_missing_values_are_kept_and_fail_no_row(tmp_path):
    store = simulate(Gaps(single=False, form="blocks"), 300, tmp_path, seed=1, workers=1)
    assert store.n_failed == 0
    theta, blocks = store.blocks()
    assert {k: v.shape for k, v in blocks.items()} == {"image": (300, 2, 3), "present": (300, 1)}
    gone = np.isnan(blocks["image"])
    assert 0.4 < gone.mean() < 0.6
    np.testing.assert_array_equal((~gone).sum(axis=(1, 2)), blocks["present"][:, 0])
    np.testing.assert_array_equal(store.observable("image"), blocks["image"])
    assert store.observables == Gaps(single=False, form="blocks").observables
    assert len(theta) == 300


def test_nan_beside_the_missing_ones_inf_and_empty_rows_are_failures(tmp_path):
    class Faulty(Gaps):
        def simulate(self, theta, rng):
            x = super().simulate(theta, rng)
            x[0, 1], x[1, 6], x[2, :] = np.inf, np.nan, np.nan
            return x

    store = simulate(Faulty(single=False), 40, tmp_path, seed=1, shard_size=40, workers=1)
    assert [f.row for f in store.failures()] == [0, 1, 2]
    assert [f.reason.partition(" in")[0] for f in store.failures()] == ["non-finite x"] * 3
    assert "image[0, 1]" in store.failures()[0].reason
    assert "present[0]" in store.failures()[1].reason


def test_a_column_that_float32_turns_into_zeros_is_refused(tmp_path):
    class Flux:
        settings: ClassVar[dict] = {}
        prior = LinearGaussian(1).prior
        parameters = prior.parameters
        observables = (Observable("t", 1), Observable("flux", 2))

        def __init__(self, exponent):
            self.exponent = exponent

        def simulate(self, theta, rng):
            return np.hstack([theta, 10.0 ** (self.exponent + theta), np.exp(-60 * theta**2)])  # the last has a tail

    with pytest.raises(DataError, match=r"in flux\[0\], which float32 cannot hold; expected dtype=\"float64\""):
        simulate(Flux(-50), 100, tmp_path / "a", workers=1)
    x = simulate(Flux(-50), 100, tmp_path / "b", workers=1, dtype="float64").read()[1]
    assert (x[:, 1] > 0).all()
    x = simulate(Flux(-10), 100, tmp_path / "c", workers=1).read()[1]
    assert (x[:, 1] > 0).all() and (x[:, 2] == 0).any()


class OnOffset(LinearGaussian):
    """A signal of width 3e-3 on an offset of 8e4: float32 has steps of 8e-3 there."""

    offset: ClassVar[float] = 8e4

    def simulate(self, theta, rng):
        return self.offset + 3e-3 * rng.standard_normal((len(theta), len(self.matrix)))


def test_a_signal_on_an_offset_that_float32_rounds_away_is_refused(tmp_path):
    with pytest.raises(DataError, match=r'x\[0\] of about .*which float32 rounds by up to .*expected dtype="float64"'):
        simulate(OnOffset(), 60, tmp_path / "lost", seed=0, workers=1)
    kept = simulate(OnOffset(), 60, tmp_path / "kept", seed=0, workers=1, dtype="float64").read()[1]
    assert len(np.unique(kept)) == kept.size


def test_values_over_decades_are_stored_in_float32(tmp_path, monkeypatch):
    """Large values move by more than the spread of the small ones, and lose nothing."""
    monkeypatch.setattr(OnOffset, "simulate", lambda self, theta, rng: np.exp(30 * rng.uniform(-1, 1, (len(theta), len(self.matrix)))))
    assert simulate(OnOffset(), 60, tmp_path / "wide", seed=0, workers=1).dtype == np.float32
