r"""Embedding of vectors, a residual perceptron, and what every embedding has in common: a module x (n, ...) -> features h (n, k)."""

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import ShapeError
from sbi_phys.nets._kernels import silu_layer

__all__ = ["EmbeddingConfig", "ResidualMLP", "build_embedding"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """Settings of the default embedding, a `ResidualMLP`.   Raises: SettingError.

    Args: hidden: width. n_blocks: residual blocks. n_features: length of the summary.

    >>> import sbi_phys as sp
    >>> sp.EmbeddingConfig(hidden=32, n_features=16).n_blocks
    2
    """

    hidden: int = 128
    n_blocks: int = 2
    n_features: int = 64

    def __post_init__(self) -> None:
        """Check ranges."""
        require_int("embedding hidden", self.hidden, low=1)
        require_int("embedding n_blocks", self.n_blocks, low=0)
        require_int("embedding n_features", self.n_features, low=1)


class ResidualMLP(nn.Module):
    """Perceptron with skip connections: h_0 = W x, h_{i+1} = h_i + V_i silu(U_i h_i), out = W' silu(h) + W'' x.

    The last term passes the input on unchanged, so that features linear in x need no hidden units.

    >>> import sbi_phys as sp, torch
    >>> sp.nets.ResidualMLP(10, sp.EmbeddingConfig(n_features=16))(torch.zeros(5, 10)).shape
    torch.Size([5, 16])
    """

    def __init__(self, n_inputs: int, config: EmbeddingConfig) -> None:
        super().__init__()
        self.first = nn.Linear(n_inputs, config.hidden)
        self.up = nn.ModuleList(nn.Linear(config.hidden, config.hidden) for _ in range(config.n_blocks))
        down = [nn.Linear(config.hidden, config.hidden) for _ in range(config.n_blocks)]
        self.down = nn.ModuleList(down)
        self.last = nn.Linear(config.hidden, config.n_features)
        self.straight = nn.Linear(n_inputs, config.n_features, bias=False)
        for layer in down:
            # a block starts as the identity, so that depth does not slow down the start of the training
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Observations x (n, ...) -> features (n, k); axes after the first are flattened."""
        x = torch.flatten(x, start_dim=1)
        hidden: Tensor = self.first(x)
        for up, down in zip(self.up, self.down, strict=True):
            hidden = hidden + down(silu_layer(F.silu(hidden), cast(Tensor, up.weight), cast(Tensor, up.bias)))
        out: Tensor = self.last(F.silu(hidden)) + self.straight(x)
        return out


def build_embedding(embedding: EmbeddingConfig | nn.Module, x_shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Return an embedding of observations of shape x_shape, and its number of features k.

    Args: embedding: the shape of a `ResidualMLP`, whose weights come from torch's global generator, or a module
    (n, *x_shape) -> (n, k), which is copied.   Raises: ShapeError (the module returns another shape).
    """
    module = copy.deepcopy(embedding) if isinstance(embedding, nn.Module) else ResidualMLP(math.prod(x_shape), embedding)
    mode = module.training
    module.eval()
    with torch.no_grad():
        out = module(torch.zeros(2, *x_shape))
    module.train(mode)
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ShapeError(f"embedding maps x of shape (2, {', '.join(map(str, x_shape))}) to {got}; expected (2, n_features)")
    return module, int(out.shape[1])
