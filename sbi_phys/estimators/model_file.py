"""What the model files of all estimators share: identity, prior, settings; and which class reads which file."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from sbi_phys.core.errors import ModelFileError
from sbi_phys.core.provenance import __version__
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.priors import Observable, prior_from_dict
from sbi_phys.training.loop import TrainConfig

__all__ = ["FILE", "common_content", "common_settings", "maker", "shared_content", "shared_settings", "with_weights"]

Net = TypeVar("Net", bound=nn.Module)

FILE = ("estimator", 1)
# what a file calls its estimator -> the module of the class
_MODULES = {
    "NPE": "sbi_phys.estimators.npe",
    "NLE": "sbi_phys.estimators.nle",
    "NRE": "sbi_phys.estimators.nre",
    "TwoHypotheses": "sbi_phys.estimators.hypotheses",
    "MinedRatio": "sbi_phys.estimators.mined",
    "SALLY": "sbi_phys.estimators.mined",
    "SetNPE": "sbi_phys.estimators.set_npe",
}


def maker(name: str) -> Callable[..., Any]:
    """Return the function (path, content, embedding, device) -> model of an estimator's files.   Raises: KeyError for another name."""
    function: Callable[..., Any] = getattr(importlib.import_module(_MODULES[name]), name)._from_content
    return function


def common_content(model: Any) -> dict[str, Any]:
    """Plain values of the attributes that every estimator has, with or without a prior."""
    return {
        "estimator": type(model).__name__,
        "version": __version__,
        "seed": model.seed,
        "n_ensemble": model.n_ensemble,
        "observables": None if model.observables is None else json.dumps([asdict(o) for o in model.observables]),
        "config": None if model.config is None else asdict(model.config),
        "x_transform": model.x_transform,
        "embedding": type(model.embedding).__qualname__ if isinstance(model.embedding, nn.Module) else asdict(model.embedding),
        "history": model.history,
        "weights": [{k: v.cpu() for k, v in net.state_dict().items()} for net in model._nets],
    }


def shared_content(model: Any) -> dict[str, Any]:
    """The same and what estimators over a prior have besides."""
    return common_content(model) | {"prior": json.dumps(model.prior.to_dict()), "simulator": json.dumps(model.simulator)}


def shared_settings(path: Path, content: dict[str, Any], embedding: nn.Module | None) -> dict[str, Any]:
    """Inverse of `shared_content`: keyword arguments of the class.   Raises: as `common_settings`."""
    own = {"prior": prior_from_dict(json.loads(content["prior"])), "simulator": json.loads(content["simulator"])}
    return common_settings(path, content, embedding) | own


def common_settings(path: Path, content: dict[str, Any], embedding: nn.Module | None) -> dict[str, Any]:
    """Inverse of `common_content`: keyword arguments of the class.

    Raises: ModelFileError if the embedding's module is missing, or is one too many.
    """
    stored = content["embedding"]
    if isinstance(stored, str) and embedding is None:
        raise ModelFileError(f"{path} was trained with an embedding of class {stored}; expected load(path, embedding={stored}(...))")
    if not isinstance(stored, str) and embedding is not None:
        raise ModelFileError(f"{path} was trained with the default embedding; expected load(path) without an embedding")
    observables = content["observables"]
    return {
        "seed": content["seed"],
        "embedding": embedding if embedding is not None else EmbeddingConfig(**stored),
        "n_ensemble": content["n_ensemble"],
        "x_transform": content["x_transform"],
        "observables": None if observables is None else [Observable(**o) for o in json.loads(observables)],
        "config": None if content["config"] is None else TrainConfig(**content["config"]),
    }


def with_weights(nets: Sequence[Net], content: dict[str, Any]) -> list[Net]:
    """Networks with the weights of the file, ready to be evaluated."""
    for net, weights in zip(nets, content["weights"], strict=True):
        net.load_state_dict(weights)
        net.eval()
    return list(nets)
