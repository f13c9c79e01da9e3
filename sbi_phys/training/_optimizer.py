r"""AdamW on all weights of a network as one vector.

A small network has about forty weight tensors, and a step that treats them one by one spends its time on overhead. Here the weights are
views of one vector; the gradients are concatenated once, and then

    g <- g min(1, c / |g|),   AdamW on the vector (matrices decay, biases do not),   average <- average + (1 - d)(w - average)

are one operation each. Source: Loshchilov & Hutter 2019, arXiv:1711.05101.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sbi_phys.core.errors import SettingError
from sbi_phys.training.ranks import Ranks

__all__ = ["FlatAdamW"]


class FlatAdamW:
    """The optimiser, the gradient clipping and the running average of the weights of a module.

    The module's parameters are views of one vector until `release`; they can be read, copied and loaded as usual.

    Args: module: with trainable weights of one dtype on one device. weight_decay: of tensors with two or more axes.
    clip_norm: limit of the gradient's norm. ema_decay: of the running average, 0 for none. ranks: gradients are averaged
    over them.   Raises: SettingError.
    """

    def __init__(
        self, module: nn.Module, *, learning_rate: float, weight_decay: float, clip_norm: float, ema_decay: float, ranks: Ranks
    ) -> None:
        weights = [p for p in module.parameters() if p.requires_grad]
        kinds = {(p.dtype, p.device) for p in weights}
        if len(kinds) != 1:
            shown = sorted(f"{dtype} on {device}" for dtype, device in kinds)
            raise SettingError(f"the network has trainable weights of {shown or 'no kind'}; expected all of one dtype on one device")
        # matrices first, so that each group is one section of the vector
        self.weights = [p for p in weights if p.ndim > 1] + [p for p in weights if p.ndim <= 1]
        self.clip_norm, self.ema_decay, self.ranks = clip_norm, ema_decay, ranks
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.weights])
        ranks.same_start(self.flat)
        self._attach()
        n_matrices = sum(p.numel() for p in self.weights if p.ndim > 1)
        self._groups = [g for g in (self.flat[:n_matrices], self.flat[n_matrices:]) if g.numel()]
        decays = [d for d, n in ((weight_decay, n_matrices), (0.0, len(self.flat) - n_matrices)) if n]
        groups = [{"params": [g], "weight_decay": d} for g, d in zip(self._groups, decays, strict=True)]
        # `step` sets the learning rate
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=self.flat.device.type in ("cpu", "cuda"))
        self.average = self.flat.clone() if ema_decay else None

    def _attach(self) -> None:
        start = 0
        for p in self.weights:
            p.data = self.flat[start : start + p.numel()].view_as(p)
            start += p.numel()

    def zero_grad(self) -> None:
        """Remove the gradients."""
        for p in self.weights:
            p.grad = None

    def step(self, learning_rate: float, step: int) -> None:
        """Update the weights from their gradients; `step` counts from 0 and sets the decay of the average."""
        gradient = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in self.weights])
        self.ranks.average(gradient)
        gradient *= (self.clip_norm / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)
        start = 0
        for group, settings in zip(self._groups, self.optimizer.param_groups, strict=True):
            group.grad = gradient[start : start + group.numel()]
            settings["lr"] = learning_rate
            start += group.numel()
        self.optimizer.step()
        if self.average is not None:
            # in the first steps the average forgets its start faster: decay (2 + step) / (11 + step)
            self.average.lerp_(self.flat, 1 - min(self.ema_decay, (2 + step) / (11 + step)))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averaged weights within the block."""
        if self.average is None:
            yield
            return
        current = self.flat.clone()
        self.flat.copy_(self.average)
        try:
            yield
        finally:
            self.flat.copy_(current)

    def release(self) -> None:
        """Make each parameter a separate tensor again."""
        for p in self.weights:
            p.data = p.data.clone()
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """State of the optimiser and the average, without the weights."""
        return {"adamw": self.optimizer.state_dict(), "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""
        self.optimizer.load_state_dict(state["adamw"])
        if self.average is not None:
            self.average.copy_(state["average"])


def cosine_rate(step: int, total: int, *, peak: float, warmup: float, schedule: str) -> float:
    """Learning rate at a step: linear warm-up over a share of the steps, then cosine to 1e-3 of the peak, or constant."""
    warm = max(1, round(warmup * total))
    if step < warm:
        return peak * (step + 1) / warm
    if schedule == "constant":
        return peak
    progress = (step - warm) / max(1, total - warm)
    return peak * (1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
