"""Streaming: every row once, in an order that only the seed decides, with the values that the arrays in memory would give."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, StoreError
from sbi_phys.priors import BoxPrior, Observable, Parameter
from sbi_phys.store.store import Store
from sbi_phys.training import _stream_rows
from sbi_phys.training.scaling import XScaler
from sbi_phys.training.stream import Budget, Stream
from tests.training.stream_helpers import PRIOR, epoch_numbers, flat, make_store, numbers

N, FAILED = 730, [0, 1, 99, 100, 250, 251, 252, 729]
GOOD = sorted(set(range(N)) - set(FAILED))
ROW = 4 * 5 + 8  # bytes of a row in a buffer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("rows") / "store", N, failed=FAILED)


def scaled(stream: Stream, store: Store) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """What each row must become, from the arrays in memory."""
    theta, x = store.read()
    u, z = PRIOR.to_unbounded(theta), stream.scaler.apply(x).numpy()
    return {int(x[i, 0]): (u[i], z[i]) for i in range(len(x))}


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    n_ranks=st.integers(1, 4),
    rows=st.sampled_from([128, 300, 700, 5000]),
    batches=st.integers(0, 50),
)
def test_an_epoch_has_every_row_exactly_once(store, seed, epoch, n_ranks, rows, batches):
    """Whatever the seed, the memory, the number of batches and of ranks; and validation rows are the rest, in all ranks."""
    train, valid = [], []
    memory, total = rows * ROW, 0
    for rank in range(n_ranks):
        with Stream(store, PRIOR, memory=memory, seed=seed, rank=rank, n_ranks=n_ranks) as stream:
            n_batches = min(stream.n_own, -(-stream.n_own // (rows // 16)) + batches)
            got = epoch_numbers(stream, epoch, n_batches)
            assert len(got) == n_batches
            assert {len(b) for b in got} <= {stream.n_own // n_batches, -(-stream.n_own // n_batches)}
            assert sum(map(len, got)) == stream.n_own
            train += flat(got)
            valid += numbers(stream, stream.validation[1])
            assert not stream.note or len(stream.validation[0]) * 20 <= memory // 4
            total, noted = stream.n, stream.note
    assert len(train) == total == len(GOOD) - round(0.1 * len(GOOD))
    assert len(set(train)) == len(train) and not set(train) & set(valid)
    assert set(train) | set(valid) <= set(GOOD)
    if not noted:
        assert sorted(train + valid) == GOOD


def test_values_are_those_of_the_arrays_in_memory(store):
    with Stream(store, PRIOR, memory=150 * ROW) as stream:
        want = scaled(stream, store)
        for u, x in [*stream.epoch(0, 90), stream.validation]:
            assert u.dtype == x.dtype == torch.float32 and u.shape[1] == 2 and x.shape[1] == 3
            for number, ui, xi in zip(numbers(stream, x), u.numpy(), x.numpy(), strict=True):
                np.testing.assert_allclose(ui, want[number][0], rtol=1e-6, atol=1e-6)
                np.testing.assert_allclose(xi, want[number][1], rtol=1e-5, atol=2e-6)


def test_the_order_follows_from_seed_and_epoch_and_not_from_timing(store, tmp_path):
    make = {"memory": 150 * ROW, "cache": tmp_path / "cache"}
    with Stream(store, PRIOR, seed=3, **make) as a, Stream(store, PRIOR, seed=3, **make) as b, Stream(store, PRIOR, seed=4, **make) as c:
        first = epoch_numbers(a, 5, 100)
        slow = []
        for k, batch in enumerate(b.epoch(5, 100)):
            time.sleep(0.002 * (k % 3))
            slow.append(numbers(b, batch[1]))
        assert slow == first
        assert epoch_numbers(a, 6, 100) != first != epoch_numbers(c, 5, 100)
        assert epoch_numbers(a, 5, 100) == first  # an epoch does not depend on those before it
        assert numbers(a, a.validation[1]) == numbers(b, b.validation[1]) != numbers(c, c.validation[1])
        assert sorted(flat(first)) != flat(first)


def test_with_memory_enough_the_shuffle_is_complete(store):
    """Positions of neighbours in the order are independent: their correlation over an epoch is that of a permutation."""
    with Stream(store, PRIOR) as stream:
        for epoch in range(3):
            order = np.array(flat(epoch_numbers(stream, epoch, 7)))
            assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / np.sqrt(len(order))
            assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 4 / np.sqrt(len(order))


@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_the_scaling_is_that_of_the_training_rows_in_memory(tmp_path, offset):
    rng = np.random.default_rng(0)
    x = np.column_stack([np.arange(900) + offset, rng.poisson(5, 900), np.full(900, 3.0)])
    store = make_store(tmp_path / "s", 900, x=x, failed=[3, 4, 500])
    for cache in (None, "auto"):
        with Stream(store, PRIOR, memory=700 * ROW, seed=2, cache=cache) as stream:
            rows = np.array(flat(epoch_numbers(stream, 0, 300)))
            want = XScaler.fit(x[np.sort(rows - int(offset))], np.array([False, True, True]))
            np.testing.assert_allclose(stream.scaler.mean, want.mean, rtol=1e-10)
            np.testing.assert_allclose(stream.scaler.scale, want.scale, rtol=1e-10)
            assert stream.scaler.counts.tolist() == want.counts.tolist()
            # a large offset costs no digits: the rows are still told apart after the cast to float32
            z = torch.cat([b[1] for b in stream.epoch(0, 300)]).numpy()
            np.testing.assert_allclose(z, want.apply(x[rows - int(offset)]).numpy(), atol=1e-5)


def test_cached_and_uncached_rows_are_the_same_bits(store, tmp_path):
    make = {"memory": 500 * ROW, "seed": 1}
    with Stream(store, PRIOR, cache=tmp_path, **make) as cached, Stream(store, PRIOR, cache=None, **make) as live:
        assert cached.fingerprint() == live.fingerprint()
        for a, b in zip([*cached.epoch(0, 90), cached.validation], [*live.epoch(0, 90), live.validation], strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_cache_is_used_again(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s", 300, failed=[7])
    with Stream(store, PRIOR, memory=150 * ROW) as stream:
        first = epoch_numbers(stream, 0, 60)
    (rows,) = (tmp_path / "s" / ".cache").glob("rows-*.f32")
    made = rows.stat()
    assert made.st_size == 299 * 20
    with Stream(store, PRIOR, memory=150 * ROW, seed=1) as stream:  # another split: only its scaling is made
        assert len(epoch_numbers(stream, 0, 60)) == 60
    assert rows.stat().st_mtime_ns == made.st_mtime_ns and len(list(rows.parent.glob("scale-*.json"))) == 2

    def refuse(path):
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(_stream_rows, "open_intact", refuse)
    with Stream(store, PRIOR, memory=150 * ROW) as stream:
        assert epoch_numbers(stream, 0, 60) == first
    assert not list(rows.parent.glob(".*.tmp"))


def test_other_data_or_another_transform_make_another_cache(tmp_path):
    store = make_store(tmp_path / "s", 300)
    settings = [{}, {"x_transform": "real"}, {"observables": [Observable("all", 3)]}]
    prints = []
    for extra in settings:
        with Stream(store, PRIOR, **extra) as stream:
            prints.append(stream.fingerprint())
    assert len(list((tmp_path / "s" / ".cache").glob("rows-*.f32"))) == 2  # the last two say the same
    assert prints[0] != prints[1] == prints[2] == json.loads(json.dumps(prints[2]))
    for other in ({"seed": 1}, {"validation_fraction": 0.2}, {"rates": [1]}, {"labels": True}, {"memory": 400 * ROW}):
        with Stream(store, PRIOR, **other) as stream:
            assert stream.fingerprint() != prints[0]
    with Stream(store, PRIOR, memory=2**21) as stream:  # all in one buffer either way: the same order
        assert stream.fingerprint() == prints[0]
        order = epoch_numbers(stream, 3, 10)
    with Stream(store, PRIOR) as stream:
        assert epoch_numbers(stream, 3, 10) == order
    make_store(tmp_path / "s", 300, offset=0.5)
    with Stream(store, PRIOR) as stream:
        assert stream.fingerprint() != prints[0]
    with Stream(Store(tmp_path / "s"), PRIOR, seed=1) as stream:
        assert stream.fingerprint()["data"] != prints[0]["data"]


def test_a_prior_with_fewer_free_dimensions_and_float32_stores(tmp_path):
    prior = BoxPrior([Parameter("c", 2, 5)])
    store = make_store(tmp_path / "s", 250, prior=prior, dtype="float32")
    with Stream(str(tmp_path / "s"), prior, seed=9) as stream:
        u = torch.cat([b[0] for b in stream.epoch(0, 3)])
        assert u.shape == (225, 1)
        order = flat(epoch_numbers(stream, 0, 3))
        np.testing.assert_allclose(u.numpy(), prior.to_unbounded(store.read()[0][order]), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return [make_store(folder / "a", 400, shard_size=50), make_store(folder / "b", 1000, shard_size=70, first=10_000)]


def test_several_stores_come_with_labels(two):
    with Stream(two, PRIOR, labels=True, memory=200 * (ROW + 8)) as stream:
        assert stream.n == 360 + 900
        for _, x, label in [*stream.epoch(0, 200), stream.validation]:
            assert label.dtype == torch.int64
            assert [int(n >= 10_000) for n in numbers(stream, x)] == label.tolist()
        assert len(flat(epoch_numbers(stream, 0, 200))) == 1260


@pytest.mark.parametrize("memory", [150 * ROW, 2**20])
def test_rates_hold_in_every_epoch_and_an_abundant_store_takes_turns(two, memory):
    """Rates 2 : 1 of 360 and 900 rows: 360 and 180 an epoch; after 5 epochs every row of the second was used once."""
    with Stream(two, PRIOR, rates=[2, 1], memory=memory, seed=5) as stream:
        assert (stream.n, stream.n_own) == (540, 540)
        seen: list[int] = []
        for epoch in range(5):
            rows = flat(epoch_numbers(stream, epoch, 120))
            assert len(set(rows)) == 540
            many = [r for r in rows if r >= 10_000]
            assert len(many) == 180
            seen += many
        assert len(seen) == len(set(seen)) == 900
        valid = np.array(numbers(stream, stream.validation[1]))
        if not stream.note:
            assert (np.sum(valid < 10_000), np.sum(valid >= 10_000)) == (40, 20)


def test_rates_over_ranks_add_up(two):
    counts = []
    for rank in range(3):
        with Stream(two, PRIOR, rates=[1, 1], seed=2, rank=rank, n_ranks=3) as stream:
            rows = flat(epoch_numbers(stream, 1, 11))
            counts.append((sum(r < 10_000 for r in rows), sum(r >= 10_000 for r in rows)))
            assert stream.n == 720 and len(rows) == len(set(rows)) == stream.n_own
    assert np.sum(counts, axis=0).tolist() == [360, 360]
    assert min(min(c) for c in counts) > 60  # every rank has some of each


def test_ranks_wait_for_the_cache_of_rank_0(tmp_path):
    store = make_store(tmp_path / "s", 300)
    found: list[list[int]] = []

    def other():
        with Stream(store, PRIOR, rank=1, n_ranks=2, cache_timeout_s=30) as stream:
            found.append(flat(epoch_numbers(stream, 0, 4)))

    thread = threading.Thread(target=other)
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    with Stream(store, PRIOR, rank=0, n_ranks=2) as stream:
        mine = flat(epoch_numbers(stream, 0, 4))
    thread.join(30)
    assert len(mine) + len(found[0]) == 270 and not set(mine) & set(found[0])
    with pytest.raises(StoreError, match=r"rank 0 was not complete after 0\.1 s"):
        Stream(store, PRIOR, rank=1, n_ranks=2, seed=9, cache_timeout_s=0.1)


def stream_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("stream")]


@pytest.mark.parametrize("how", ["close", "break", "error", "interrupt"])
def test_the_thread_stops_when_the_consumer_does(store, monkeypatch, how):
    with Stream(store, PRIOR, memory=150 * ROW) as stream:
        reads = 0
        read = stream._source.read

        def slow(*args):
            nonlocal reads
            reads += 1
            time.sleep(0.01)
            read(*args)

        monkeypatch.setattr(stream._source, "read", slow)
        batches = stream.epoch(0, 100)
        next(batches)
        assert stream_threads()
        error = {"error": ValueError, "interrupt": KeyboardInterrupt}.get(how)
        before = reads
        if error is not None:
            with pytest.raises(error):
                batches.throw(error())
        elif how == "close":
            batches.close()
        else:
            for _ in batches:
                break
            del batches, _
        assert not stream_threads()
        assert reads <= before + 2  # the block at work, and perhaps one begun in between
        monkeypatch.undo()
        assert len(flat(epoch_numbers(stream, 0, 100))) == stream.n_own  # and the stream goes on


def test_an_error_in_the_thread_reaches_the_consumer(store, monkeypatch):
    with Stream(store, PRIOR, memory=150 * ROW) as stream:
        read, count = stream._source.read, 0

        def fail(*args):
            nonlocal count
            count += 1
            if count > 400:
                raise StoreError("the disk is gone")
            read(*args)

        monkeypatch.setattr(stream._source, "read", fail)
        with pytest.raises(StoreError, match="the disk is gone"):
            list(stream.epoch(0, 100))
        assert not stream_threads()
        threads = torch.get_num_threads()
    assert torch.get_num_threads() == threads


def test_one_epoch_at_a_time_and_none_after_the_end(store):
    stream = Stream(store, PRIOR)
    assert repr(stream) == "Stream(650 of 650 training rows, 72 validation rows, all in memory)"
    first, second = stream.epoch(0, 5), stream.epoch(1, 5)
    next(first)
    with pytest.raises(SettingError, match="another epoch"):
        next(second)
    first.close()
    assert len(list(stream.epoch(1, 5))) == 5
    stream.close()
    with pytest.raises(SettingError, match="closed"):
        stream.epoch(0, 5)


@given(memory=st.integers(128 * 28, 2**31), n=st.integers(1, 10**8), width=st.integers(2, 5))
def test_the_shares_of_the_memory_never_exceed_it(memory, n, width):
    budget = Budget(memory, width, labels=False)
    valid = min(n // 10 + 1, budget.validation_rows)
    capacity, whole = budget.capacity(n, valid, memory // 8)
    assert whole == (capacity == n) or capacity > 2 * budget.block_rows
    assert capacity >= min(n, 2 * budget.block_rows)
    buffers = capacity * budget.held_bytes * (1 if whole else 2)
    scratch = 12 * budget.block_rows * budget.row_bytes
    assert buffers + valid * budget.row_bytes + memory // 8 + memory // 8 + scratch <= memory


CHILD = """
import sys
from sbi_phys.training.stream import Stream
from tests.training.stream_helpers import PRIOR

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024

cache = None if sys.argv[3] == "None" else sys.argv[3]
def drain(path, memory, n_batches):
    with Stream(path, PRIOR, memory=memory, cache=cache) as stream:
        return stream.n, sum(len(u) for epoch in range(1) for u, _ in stream.epoch(epoch, n_batches))
drain(sys.argv[1], 2**20, 100)
before = status("VmHWM")
print(*drain(sys.argv[2], int(sys.argv[4]), 1000), status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_peak_memory_stays_within_the_allowance(tmp_path, cached):
    """Data 8 times the allowance; the growth of the process's peak resident memory is measured, pass at the start included."""
    memory, n = 8 * 2**20, 8 * 8 * 2**20 // 80
    blocks, rng = [Observable("x", 18)], np.random.default_rng(0)
    x = rng.random((n, 18), dtype=np.float32)
    make_store(tmp_path / "large", n, shard_size=n // 3, observables=blocks, dtype="float32", x=x)
    make_store(tmp_path / "small", 5000, shard_size=2000, observables=blocks, dtype="float32", x=x[:5000])
    args = [str(tmp_path / "small"), str(tmp_path / "large"), "auto" if cached else "None", str(memory)]
    out = subprocess.run([sys.executable, "-c", CHILD, *args], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert out.returncode == 0, out.stderr
    rows, drained, growth = map(int, out.stdout.split())
    assert drained == rows and 80 * rows > 7 * memory
    print(f"peak memory grew by {growth / 2**20:.1f} MiB")
    assert growth < memory, f"peak memory grew by {growth / 2**20:.1f} MiB; allowed are {memory / 2**20:.0f}"


@pytest.mark.parametrize("standardise", ["column", "block", "none"])
@pytest.mark.parametrize("cache", [None, "auto"])
def test_missing_values_and_blocks_are_scaled_as_in_memory(tmp_path, standardise, cache):
    rng = np.random.default_rng(0)
    observables = [Observable("image", shape=(2, 2), missing=True), Observable("y", 2)]
    x = rng.normal(100, [1, 2, 3, 4, 5, 6], (900, 6))
    x[rng.random((900, 6)) < [0.3, 0.3, 0.3, 0.0, 0, 0]] = np.nan
    x[:, 0] = np.where(np.arange(900) < 300, np.nan, x[:, 0])  # nothing in the first shards
    store = make_store(tmp_path / "s", 900, x=x, observables=observables, failed=[7])
    settings = {"memory": 700 * ROW, "seed": 2, "standardise": standardise}
    with Stream(store, PRIOR, cache=cache, **settings) as stream:
        scaled = torch.cat([stream.validation[1], *(b[1] for b in stream.epoch(0, 100))])
        back = stream.scaler.invert(scaled)
        train = stream.scaler.invert(torch.cat([b[1] for b in stream.epoch(0, 100)]))
        want = XScaler.fit(train, np.zeros(6, dtype=bool), observables=observables, standardise=standardise)
        np.testing.assert_allclose(stream.scaler.mean, want.mean, rtol=1e-5)
        np.testing.assert_allclose(stream.scaler.scale, want.scale, rtol=1e-3)
        keep = np.delete(x, 7, axis=0)
        order, back = keep[np.argsort(keep[:, 5])], back[np.argsort(back[:, 5])]
        np.testing.assert_allclose(back, order, atol=1e-3)  # NaN equals NaN
        assert stream.scaler.arrange(scaled).shape == (899, 10)


def test_nan_that_no_observable_declares_is_refused(tmp_path):
    x = np.random.default_rng(0).normal(size=(200, 3))
    x[120, 1] = np.nan
    store = make_store(tmp_path / "s", 200, x=x, observables=[Observable("y", 3, missing=True)])
    with Stream(store, PRIOR) as stream:
        assert torch.isnan(torch.cat([stream.validation[1], *(b[1] for b in stream.epoch(0, 5))])).sum() == 1
    with pytest.raises(NonFiniteError, match="shard-00001.h5, row 20 has NaN"):
        Stream(store, PRIOR, observables=[Observable("y", 3)], cache=None)


def test_fractions_in_counts_are_refused(tmp_path):
    x = np.random.default_rng(0).poisson(3.0, (200, 3)) + 0.0
    x[120, 1] = 2.5
    store = make_store(tmp_path / "s", 200, x=x, observables=[Observable("n", 3, kind="counts")])
    with pytest.raises(DataError, match=r"shard-00001.h5, row 20 has 2.5 in n\[1\], of kind 'counts'"):
        Stream(store, PRIOR)
