"""Two processes train as one: same weights on both, and the loss that one process reaches."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import sbi_phys as sp
from sbi_phys.core.errors import SettingError
from sbi_phys.training.ranks import Ranks, current_ranks, process_group
from tests import toys
from tests.toys import LinearGaussian

ROOT = Path(__file__).parents[2]
# What a rank does: train, then write what it ended with.
SCRIPT = """
import json, sys
import torch
from sbi_phys.training.ranks import process_group
torch.set_num_threads(1)
from tests.training.test_ranks import estimator, training_set
folder = sys.argv[1]
with process_group("cpu") as ranks:
    for source in ("arrays", "store"):
        npe = estimator()
        if source == "arrays":
            npe.fit(*training_set(2000), checkpoint=folder + "/checkpoint")
        else:
            npe.fit(folder + "/store", memory=2**18)
        theta, x = training_set(500, seed=9)
        result = {"rank": ranks.rank, "size": ranks.size, "log_prob": npe.log_prob(theta, x).tolist(), "history": npe.history[0]}
        with open(f"{folder}/{source}-{ranks.rank}.json", "w") as file:
            json.dump(result, file)
"""
SIM = LinearGaussian(dim=2)
training_set = partial(toys.training_set, SIM)


def estimator() -> sp.NPE:
    return sp.NPE(
        SIM.prior,
        seed=1,
        flow=sp.FlowConfig(n_layers=2, hidden=16),
        embedding=sp.EmbeddingConfig(hidden=16, n_blocks=1, n_features=8),
        device="cpu",
        config=sp.TrainConfig(max_epochs=6, batch_size=128),
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What both ranks ended with, from arrays and from a store: {source: [rank 0, rank 1]}."""
    folder = tmp_path_factory.mktemp("ranks")
    sp.simulate(SIM, 2000, folder / "store", seed=0, shard_size=250, workers=1)
    script = folder / "rank.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {source: [json.loads((folder / f"{source}-{r}.json").read_text()) for r in (0, 1)] for source in ("arrays", "store")}


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    small = ["simulate.n=600", "simulate.shard_size=200", "train.max_epochs=2", "flow.n_layers=1", "embedding.hidden=8"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sbi_phys"]
    options = ["--simulator", "tests.toys:LinearGaussian", "--out", str(tmp_path / "run"), "--device", "cpu", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for stage in ("train", "report"):
        arguments = [*command, stage, *options, *(part for setting in small for part in ("--set", setting))]
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert (done.returncode == 0) == (stage == "train"), done.stderr[-3000:]
    assert "the stage is 'report' under torchrun; expected 'train'" in done.stderr
    npe = sp.load(tmp_path / "run" / "model.pt", simulator=SIM, device="cpu")
    assert [r["epoch"] for r in npe.history[0]] == [0, 1]


def exact_loss() -> float:
    return -float(SIM.exact_log_posterior(*training_set(500, seed=9)).mean())


def test_two_processes_equal_one(two_ranks: dict[str, list[dict]]) -> None:
    first, second = two_ranks["arrays"]
    assert (first["size"], second["size"]) == (2, 2)
    assert first["log_prob"] == second["log_prob"]
    losses = [[(r["train"], r["valid"]) for r in rank["history"]] for rank in (first, second)]
    assert losses[0] == losses[1]
    alone = estimator().fit(*training_set(2000))
    mine = alone.log_prob(*training_set(500, seed=9))
    # every batch holds the same rows; a batch of 129 is 65 and 64, which count as halves, and sums are taken in another order
    assert np.mean(first["log_prob"]) == pytest.approx(mine.mean(), abs=6e-3)
    assert -mine.mean() - exact_loss() < 0.1
    assert [r["valid"] for r in first["history"]] == pytest.approx([r["valid"] for r in alone.history[0]], abs=6e-3)


def test_each_rank_streams_its_own_shards(two_ranks: dict[str, list[dict]]) -> None:
    first, second = two_ranks["store"]
    assert first["log_prob"] == second["log_prob"]
    assert -np.mean(first["log_prob"]) - exact_loss() < 0.1


def test_a_single_process_is_rank_zero_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_ranks() == Ranks(0, 1)
    with process_group("cpu") as ranks:
        assert ranks.first
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingError, match=r"WORLD_SIZE is 2 but \['RANK'"), process_group("cpu"):
        pass
