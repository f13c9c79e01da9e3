r"""Attack on files: mutants of everything that is read, kills at random moments, loops, and the cost of checking on read.

    python benchmarks/attack.py --mutants 2200 --out benchmarks/results/attack.json

A mutant is a file with flipped bits, other bytes, a hole of zeros, an end that is missing or too long, or a moved part, or, with
valid checksums, a crafted content: a huge shape, values in other files, an archive made to deceive. Each is read in a process of its own
group, and the outcome is one of: refused with an error of the package, the same numbers, damaged numbers accepted, another class of error,
the end of the process, no end within the time limit. Settings (TOML) are the user's to change: valid ones count as other settings.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402

import h5py
import numpy as np
import torch

import sbi_phys as sp
from benchmarks.suite.table import Numbers, arguments, run
from sbi_phys.core.errors import SbiPhysError
from sbi_phys.report import group, read_netcdf, to_inference_data, write_netcdf
from sbi_phys.report.arviz import attributes
from sbi_phys.store import shards
from sbi_phys.training.loop import TrainConfig, fit
from sbi_phys.workflow.run import Run
from sbi_phys.workflow.settings import Config

__all__ = ["OUTCOMES", "TARGETS", "Target", "attack"]

OUTCOMES = ("refused", "same", "other settings", "damaged", "wrong error", "crash", "hang")
_LIMIT_S = 60.0
Reader = Callable[[], Any]


# ---- what is attacked


class Target:
    """Files that are read together, the function that reads them, and the crafted contents that must be refused."""

    def __init__(self, files: list[Path], read: Reader, crafted: list[Callable[[], None]] | None = None) -> None:
        self.files, self.read, self.crafted = files, read, crafted or []
        self.whole = {path: path.read_bytes() for path in files}
        self.answer = read()

    def restore(self) -> None:
        """Write all files as they were."""
        for path, content in self.whole.items():
            path.write_bytes(content)


def _prior() -> sp.BoxPrior:
    return sp.BoxPrior([sp.Parameter("energy", 0, 10, unit="EeV"), sp.Parameter("depth", 600, 900)])


def _rows(n: int) -> tuple[Any, Any]:
    theta = _prior().sample(n, np.random.default_rng(0))
    return theta, theta[:, :1] / 3 + np.random.default_rng(1).normal(size=(n, 3))


def _canonical(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray):
        array = np.asarray(value)
        return f"{array.shape} {array.dtype} {array.tobytes().hex()}"
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items()}
    return [_canonical(v) for v in value] if isinstance(value, list | tuple) else value


def store_target(folder: Path) -> Target:
    """A store of three shards, one of them read through its status and reasons too."""
    theta, x = _rows(120)
    np.savez(folder / "rows.npz", energy=theta[:, 0], depth=theta[:, 1], signal=x)
    path = sp.store.import_store(folder / "rows.npz", folder / "s", prior=_prior(), observables=[sp.Observable("signal", 3)], shard_size=50)

    def read() -> Any:
        store = sp.Store(path)
        return _canonical(
            [*store.read(valid_only=False), store.status(), store.n_failed, store.seed, store.prior.to_dict(), store.n_requested]
        )

    shard = path / "shard-00001.h5"
    crafted = [partial(_crafted_shard, shard, change) for change in (_external, _linked, _soft, _virtual, _huge, _grouped)]
    crafted += [partial(_crafted_json, path / "store.json", k, v) for k, v in (
        ("n", 10**400), ("n", -1), ("n", 10**15), ("shard_size", 0), ("seed", "x"), ("dtype", "O"), ("prior", {"kind": "os.system"}),
        ("observables", [{"name": "../../x", "size": 10**12}]), ("layout", {"compression": "/tmp/evil.so"}),
    )]  # fmt: skip
    return Target([*sorted(path.glob("shard-*.h5")), path / "store.json"], read, crafted)


def model_target(folder: Path) -> Target:
    """A model file: settings, scaling, weights, and a density from them."""
    theta, x = _rows(100)
    path = folder / "model.pt"
    sp.NPE(_prior(), config=sp.TrainConfig(max_epochs=1)).fit(theta, x).save(path)

    def read() -> Any:
        model = sp.load(path)
        return _canonical(
            [repr(model), model.history, model.prior.to_dict(), model._scaler.to_dict(), [net.state_dict() for net in model._nets]]
        )

    def craft(change: Callable[[dict[str, Any]], Any]) -> None:
        payload = torch.load(path, weights_only=True)
        change(payload["content"])
        torch.save(payload, path)

    crafted = [partial(craft, change) for change in (
        lambda c: c["weights"][0].update({next(iter(c["weights"][0])): torch.zeros(1).expand(10**12)}),
        lambda c: c["settings"]["flow"]["values"].update(hidden=10**9),
        lambda c: c["settings"]["flow"]["values"].update(n_layers=10**8),
        lambda c: c.update(estimator="../../evil"), lambda c: c.update(weights=[]), lambda c: c.update(weights=3),
        lambda c: c.update(scaler=[]), lambda c: c.update(identity="{"), lambda c: c.update(history=torch.zeros(2, device="meta")),
    )]  # fmt: skip
    return Target([path], read, crafted)


def checkpoint_target(folder: Path) -> Target:
    """A checkpoint that a training continues from."""
    path, x = folder / "checkpoint", torch.linspace(-1, 1, 128)[:, None]

    def train(epochs: int) -> Any:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        rows = (x[::2], x[::2] ** 2), (x[1::2], x[1::2] ** 2)
        config, losses = TrainConfig(max_epochs=3, batch_size=32), []
        for record in fit(lambda m, a, b: ((m(a) - b) ** 2).sum(dim=1), net, *rows, config, seed=0, checkpoint=path):
            losses.append([record.train, record.valid])
            if len(losses) == epochs:
                break
        return _canonical([losses, net.state_dict()])

    train(1)
    kept = path.read_bytes()

    def read() -> Any:
        answer = train(3)
        if path.read_bytes() != kept and answer == target_answer:
            path.write_bytes(kept)
        return answer

    target_answer: Any = None
    target = Target([path], read)
    target.whole[path] = kept
    return target


def netcdf_target(folder: Path) -> Target:
    """Draws of a posterior."""
    path = folder / "p.nc"
    rng = np.random.default_rng(0)
    tree = to_inference_data({"energy": rng.normal(size=(2, 80))}, observed_data={"x": np.arange(5.0)}, attrs={"seed": 3})
    write_netcdf(path, tree)

    def read() -> Any:
        data = read_netcdf(path)
        return _canonical([group(data, "posterior"), group(data, "observed_data"), attributes(data)])

    crafted = [partial(_crafted_netcdf, path, change) for change in (_external, _linked, _soft, _virtual, _huge)]
    return Target([path], read, crafted)


def toml_target(folder: Path) -> Target:
    """Settings of a run."""
    path = folder / "config.toml"
    path.write_text(Config().to_toml())
    return Target([path], lambda: Config.read(path).to_dict())


def record_target(folder: Path) -> Target:
    """The record of a stage, and an array."""
    run_ = Run(folder / "run", Config())
    run_.begin()
    run_.write_record("train", {"stage": "train", "numbers": {"loss": [1.25, -3.5e-7], "words": "é", "none": None}})
    run_.write_array("weights.npy", np.linspace(0, 1, 50))
    paths = [run_.path("stages", "train.json"), run_.path("weights.npy")]
    return Target(paths, lambda: _canonical([run_.record("train"), run_.read_array("weights.npy")]))


TARGETS: dict[str, tuple[Callable[[Path], Target], float]] = {  # and the share of the mutants
    "store": (store_target, 0.36), "model": (model_target, 0.2), "checkpoint": (checkpoint_target, 0.12),
    "netcdf": (netcdf_target, 0.12), "toml": (toml_target, 0.1), "record": (record_target, 0.1),
}  # fmt: skip


# ---- crafted contents


def _external(file: h5py.File, name: str) -> None:
    shape = file[name].shape
    del file[name]
    file.create_dataset(name, shape, "<f8", external=[("/etc/passwd", 0, 8 * int(np.prod(shape)))])


def _linked(file: h5py.File, name: str) -> None:
    del file[name]
    file[name] = h5py.ExternalLink("../../other.h5", "x")


def _soft(file: h5py.File, name: str) -> None:
    del file[name]
    file[name] = h5py.SoftLink("/elsewhere")


def _virtual(file: h5py.File, name: str) -> None:
    layout = h5py.VirtualLayout(file[name].shape, "<f8")
    layout[:] = h5py.VirtualSource("../../other.h5", "x", file[name].shape)
    del file[name]
    file.create_virtual_dataset(name, layout)


def _huge(file: h5py.File, name: str) -> None:
    del file[name]
    file.create_dataset(name, (10**7, 10**6), "<f8", chunks=(1000, 100))


def _grouped(file: h5py.File, name: str) -> None:
    del file[name]
    file.create_group(name)


def _crafted_shard(path: Path, change: Callable[[h5py.File, str], None]) -> None:
    from dataclasses import replace

    from sbi_phys.store._encoding import Label

    with h5py.File(path, "r+") as file:
        change(file, "x")
    label = Label.decode(path.read_bytes()[:4096])
    if label is not None:
        with open(path, "rb+", buffering=0) as raw:
            whole = replace(label, ranges=()).with_rest(raw)
            raw.seek(0)
            raw.write(whole.encode())


def _crafted_netcdf(path: Path, change: Callable[[h5py.File, str], None]) -> None:
    path.write_bytes(path.read_bytes().rpartition(b"\nsbi_phys")[0])
    with h5py.File(path, "r+") as file:
        change(file, "posterior/energy")


def _crafted_json(path: Path, key: str, value: Any) -> None:
    from sbi_phys.core.checksums import seal

    values = json.loads(path.read_text()) | {key: value}
    del values["checksum"]
    path.write_text(json.dumps(seal(values)))


# ---- mutants


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Content with one random fault."""
    data, kind = bytearray(content), int(rng.integers(7))
    at, n = int(rng.integers(len(data))), int(rng.integers(1, 65))
    if kind in (0, 1):
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        data[at : at + n] = rng.bytes(len(data[at : at + n]))
    elif kind == 3:
        data[at : at + 8 * n] = bytes(len(data[at : at + 8 * n]))
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        data += rng.bytes(n)
    else:
        part = bytes(data[at : at + n])
        to = int(rng.integers(len(data)))
        data[to : to + len(part)] = part
    return bytes(data)


def _prepare(target: Target, number: int, seed: int) -> bool:
    """Write mutant `number` of a target; whether it is a crafted one."""
    target.restore()
    if number < len(target.crafted):
        target.crafted[number]()
        return True
    rng = np.random.default_rng([seed, number])
    path = target.files[int(rng.integers(len(target.files)))]
    path.write_bytes(mutate(target.whole[path], rng))
    return False


def _outcome(name: str, target: Target, number: int, seed: int) -> str:
    crafted = _prepare(target, number, seed)
    try:
        answer = target.read()
    except SbiPhysError:
        return "refused"
    except Exception as err:
        return f"wrong error {type(err).__name__}: {str(err)[:100]}"
    if answer == target.answer and not crafted:
        return "same"
    return "other settings" if name == "toml" else "damaged"


def attack(name: str, n: int, seed: int = 0, limit_s: float = _LIMIT_S) -> tuple[Counter[str], list[str]]:
    """Read n mutants of a target -> how many had which outcome, and words on those that should not be."""
    counts, words, done = Counter[str](), list[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[name][0](Path(folder))
        while done < n:
            reader, writer = os.pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child uses one thread
                child = os.fork()
            if child == 0:
                _child(name, target, done, n, seed, writer)
            os.close(writer)
            for outcome in _outcomes(reader, limit_s, child):
                kind = next(k for k in OUTCOMES if outcome.startswith(k))
                counts[kind] += 1
                if kind in OUTCOMES[3:]:
                    words.append(f"{name} {done}: {outcome}")
                done += 1
                if done == n:
                    break
            os.close(reader)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return counts, words


def _child(name: str, target: Target, first: int, n: int, seed: int, writer: int) -> None:
    with suppress(BaseException):
        torch.set_num_threads(1)
        for number in range(first, n):
            os.write(writer, _outcome(name, target, number, seed).replace("\n", " ").encode() + b"\n")
    os._exit(0)


def _outcomes(reader: int, limit_s: float, child: int) -> Any:
    """Outcomes as they come; the last one of a process that ends or hangs says so."""
    buffer = b""
    while True:
        if not select.select([reader], [], [], limit_s)[0]:
            yield "hang"
            return
        got = os.read(reader, 4096)
        if not got:
            yield "crash"
            return
        *lines, buffer = (buffer + got).split(b"\n")
        for line in lines:
            yield line.decode()


def mutants(total: int, seed: int) -> Numbers:
    """All targets, and the table of outcomes."""
    numbers: Numbers = {}
    everything = Counter[str]()
    print(f"{'':<12}" + "".join(f"{o:>16}" for o in OUTCOMES))
    for name, (_, share) in TARGETS.items():
        counts, words = attack(name, round(total * share), seed)
        everything += counts
        print(f"{name:<12}" + "".join(f"{counts[o]:>16}" for o in OUTCOMES), flush=True)
        print("".join(f"    {w}\n" for w in words[:10]), end="", flush=True)
        for outcome in OUTCOMES:
            bound = 0.0 if outcome in OUTCOMES[3:] else None
            numbers[f"{name}: {outcome}"] = (float(counts[outcome]), "<=", bound)
    numbers["mutants"] = (float(sum(everything.values())), ">=", None)
    return numbers


# ---- kills, loops, cost

_PIPELINE = """
import sys
import numpy as np, torch
import sbi_phys as sp
from simulators import MuonDecay
folder = sys.argv[1]
store = sp.simulate(MuonDecay(), 6000, folder + "/store", seed=1, shard_size=200, workers=1)
npe = sp.NPE(MuonDecay().prior, config=sp.TrainConfig(max_epochs=6)).fit(store, checkpoint=folder + "/training")
npe.history = [[{k: v for k, v in e.items() if k not in ("seconds", "step_ms")} for e in h] for h in npe.history]
npe.save(folder + "/model.pt")
"""


def kills(n: int, seed: int) -> Numbers:
    """A small pipeline that is killed n times at random moments, and the bytes that it ends with."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _PIPELINE]
        begin = time.perf_counter()
        subprocess.run([*command, f"{folder}/a"], check=True)
        whole, rng, killed = time.perf_counter() - begin, np.random.default_rng(seed), 0
        while True:
            process = subprocess.Popen([*command, f"{folder}/b"], start_new_session=True)
            if killed < n:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(whole * rng.uniform(0.3, 0.7))
            else:
                process.wait()
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        same = {p.name: p.read_bytes() for p in Path(folder, "a").rglob("*.h5")} == {
            p.name: p.read_bytes() for p in Path(folder, "b").rglob("*.h5")
        }
        same = same and Path(folder, "a/model.pt").read_bytes() == Path(folder, "b/model.pt").read_bytes()
        litter = [p for p in Path(folder, "b/store").iterdir() if p.name.endswith(".tmp")]
    return {
        "kill -9: times": (float(killed), ">=", None),
        "kill -9: store and model have the bytes of an uninterrupted run": (float(process.returncode == 0 and same), ">=", 1.0),
        "kill -9: temporary files left in the store": (float(len(litter)), "<=", 0.0),
    }


def _held() -> tuple[float, int, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), threading.active_count()


def loops(n: int) -> Numbers:
    """Every reader n times in one process."""
    with tempfile.TemporaryDirectory() as folder:
        targets = []
        for name in ("store", "model", "checkpoint", "netcdf", "record"):
            Path(folder, name).mkdir()
            targets.append(TARGETS[name][0](Path(folder, name)))
        before = (0.0, 0, 0)
        for i in range(n):
            if i == n // 4:
                before = _held()
            for target in targets:
                target.restore()
                target.read()
        after = _held()
    return {
        f"{n} loops: growth of memory / MiB": (after[0] - before[0], "<=", 20.0),
        f"{n} loops: growth of open files": (float(after[1] - before[1]), "<=", 0.0),
        f"{n} loops: growth of threads": (float(after[2] - before[2]), "<=", 0.0),
    }


def cost(n_repeats: int) -> Numbers:
    """Time of reading with and without the check, the first time and then."""
    numbers: Numbers = {}
    verify = shards.verify_shard
    for n_columns, size in ((10, 500), (50, 4096), (200, 20_000)):
        with tempfile.TemporaryDirectory() as folder:
            rng = np.random.default_rng(0)
            np.savez(
                f"{folder}/rows.npz",
                energy=rng.uniform(1, 9, 4 * size),
                depth=rng.uniform(600, 900, 4 * size),
                signal=rng.normal(size=(4 * size, n_columns)),
            )
            store = sp.Store(sp.store.import_store(
                f"{folder}/rows.npz", f"{folder}/s", prior=_prior(), observables=[sp.Observable("signal", n_columns)], shard_size=size,
            ))  # fmt: skip

            def timed(check: Any, first: bool, store: sp.Store = store) -> float:
                shards.verify_shard = check
                if first:
                    shards._CHECKED.clear()
                begin = time.perf_counter()
                store.read()
                return time.perf_counter() - begin

            rounds = [(timed(lambda *_: "", True), timed(verify, True), timed(verify, False)) for _ in range(n_repeats)]
            shards.verify_shard = verify
            without, first, later = np.min(rounds, axis=0)
            mib = sum(p.stat().st_size for p in Path(folder, "s").glob("*.h5")) / 4 / 2**20
            for what, value in (("first", first), ("later", later)):
                numbers[f"shards of {mib:.2g} MiB, {what} read: time of checking / time of reading without"] = (
                    value / without - 1,
                    "<=",
                    0.1,
                )
    return numbers


def main() -> None:
    """Run all parts."""
    parser = arguments(__doc__, "attack")
    parser.add_argument("--mutants", type=int, default=2200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--loops", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "mutants": lambda: mutants(o.mutants, o.seed), "cost": lambda: cost(o.repeats), "loops": lambda: loops(o.loops),
        "kills": lambda: kills(o.kills, o.seed),
    }  # fmt: skip
    sys.exit(run(parts, o, {"n_mutants": o.mutants, "n_kills": o.kills, "n_loops": o.loops, "seed": o.seed}))


if __name__ == "__main__":
    main()
