r"""Embedding of vectors, a residual perceptron, and what every embedding has in common: a module x (n, ...) -> features h (n, k)."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.checks import require_int
from sbi_phys.core.classes import plain_settings, spec_of, split_spec
from sbi_phys.core.errors import SettingError, ShapeError
from sbi_phys.nets._kernels import silu_layer
from sbi_phys.nets.own import build_own, guarded, require_own

__all__ = ["EmbeddingConfig", "ResidualMLP", "build_embedding", "is_own"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """Settings of the embedding: of the default one, a `ResidualMLP`, or the name of a class of the user's own.   Raises: SettingError.

    Args: hidden: width. n_blocks: residual blocks. n_features: length of the summary.
    spec: 'package.module:Class', a torch.nn.Module x (n, *x_shape) -> h (n, k), in place of the perceptron. settings: its keyword
    arguments, plain values. The module is built with the estimator's seed; a model file holds name, arguments and weights.

    >>> import sbi_phys as sp
    >>> sp.EmbeddingConfig(hidden=32, n_features=16).n_blocks
    2
    >>> sp.EmbeddingConfig(spec="my_module:MyCNN", settings={"channels": 8}).spec
    'my_module:MyCNN'
    """

    hidden: int = 128
    n_blocks: int = 2
    n_features: int = 64
    spec: str = ""
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check ranges."""
        require_int("embedding hidden", self.hidden, low=1)
        require_int("embedding n_blocks", self.n_blocks, low=0)
        require_int("embedding n_features", self.n_features, low=1)
        object.__setattr__(self, "settings", plain_settings("embedding settings", self.settings))
        if not self.spec and self.settings:
            raise SettingError(f"embedding has settings {self.settings} and no spec; expected spec = 'package.module:Class'")
        if self.spec:
            split_spec("embedding spec", self.spec)
            for name in ("hidden", "n_blocks", "n_features"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise SettingError(
                        f"embedding {name} is {getattr(self, name)}, of the perceptron, beside spec {self.spec!r}; expected one"
                    )

    def require_class(self) -> None:
        """Import the module of `spec` and check class and arguments; nothing without a spec.   Raises: SettingError."""
        if self.spec:
            require_own("embedding", self.spec, self.settings)

    @classmethod
    def of(cls, value: "str | type[nn.Module] | EmbeddingConfig | nn.Module") -> "Self | EmbeddingConfig | nn.Module":
        """Settings from a name 'package.module:Class' or a class; settings and modules as they are.   Raises: SettingError."""
        if isinstance(value, str):
            return cls(spec=value)
        if isinstance(value, type):
            if not issubclass(value, nn.Module):
                raise SettingError(f"embedding is the class {value.__name__}; expected a subclass of torch.nn.Module")
            if "<locals>" in value.__qualname__:
                raise SettingError(
                    f"embedding is the class {value.__qualname__} of a function, which no file can name; expected one at the top of a"
                    f" module, or an object: {value.__name__}(...)"
                )
            return cls(spec=spec_of(value))
        if not isinstance(value, EmbeddingConfig | nn.Module):
            raise SettingError(f"embedding is a {type(value).__name__}; expected an EmbeddingConfig, a torch.nn.Module, or 'module:Class'")
        return value


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


def is_own(embedding: EmbeddingConfig | nn.Module) -> bool:
    """Whether an embedding is a module, given or named, and not the default perceptron."""
    return isinstance(embedding, nn.Module) or bool(embedding.spec)


def build_embedding(embedding: EmbeddingConfig | nn.Module, x_shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Return an embedding of observations of shape x_shape, and its number of features k.

    Args: embedding: the shape of a `ResidualMLP`, whose weights come from torch's global generator, a class by its name, likewise, or a
    module (n, *x_shape) -> (n, k), which is copied with its weights.
    Raises: ShapeError (the module returns another shape), SettingError (it fails), NonFiniteError (it returns NaN).
    """
    if isinstance(embedding, nn.Module):
        module = guarded(copy.deepcopy(embedding), "embedding")
    elif embedding.spec:
        module = guarded(build_own("embedding", embedding.spec, embedding.settings), "embedding")
    else:
        module = ResidualMLP(math.prod(x_shape), embedding)
    mode = module.training
    module.eval()
    with torch.no_grad():
        out = module(torch.zeros(2, *x_shape))
    module.train(mode)
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ShapeError(f"embedding maps x of shape (2, {', '.join(map(str, x_shape))}) to {got}; expected (2, n_features)")
    return module, int(out.shape[1])
