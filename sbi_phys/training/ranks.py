r"""Training with several processes or GPUs started by `torchrun`, and the sums between them.

    torchrun --nproc-per-node 2 -m sbi_phys train run.toml --out runs/mine

Each rank computes the gradient of its share of a batch, and one all-reduce averages the gradients. The weights of a network are one
vector here (`_optimizer.FlatAdamW`), so this corresponds to DistributedDataParallel with a single bucket. Backend: nccl on CUDA, gloo
on CPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from sbi_phys.core.errors import SettingError

__all__ = ["Ranks", "current_ranks", "process_group", "started_by_torchrun"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank of this process and the number of processes in a training; 0 of 1 for a single process."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def average(self, values: Tensor) -> Tensor:
        """Mean of a tensor over all ranks, in place and identical on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def total(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def same_start(self, values: Tensor) -> None:
        """Copy the values of the first rank to all ranks, in place."""
        if self.size > 1:
            dist.broadcast(values, src=0)

    def wait(self) -> None:
        """Wait until every rank has reached this call."""
        if self.size > 1:
            dist.barrier()


def current_ranks() -> Ranks:
    """Ranks of the open process group, or of a single process."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def started_by_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def process_group(device: str = "auto", *, timeout_s: float = 86_400.0) -> Iterator[Ranks]:
    """Open the process group described by torchrun's environment and close it at the end; `Ranks()` for a single process.

    Args: device: as for an estimator; with CUDA, each process takes the GPU of its local rank.
    Raises: SettingError if the environment is incomplete or has more processes than GPUs.
    """
    if not started_by_torchrun() or dist.is_initialized():
        yield current_ranks()
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SettingError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {missing} are not set; expected torchrun to start the processes")
    cuda = torch.cuda.is_available() and str(device) != "cpu"
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        if local >= torch.cuda.device_count():
            here = torch.cuda.device_count()
            raise SettingError(f"local rank {local} has no GPU, this machine has {here}; expected --nproc-per-node at most {here}")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield current_ranks()
    finally:
        dist.destroy_process_group()
