r"""Evidence of a model for one data set, by importance sampling from its learned posterior.

    Z = p(x | M) = int L(x | theta) p(theta) dtheta = E_q[ L(x | theta(u)) N(u; 0, I) / q(u | x) ]

in the prior's whitened space u: the mean weight of `samplers.importance`, exact for any q that covers the posterior. log of the
Bayes factor = difference of the log Z, P(M | x) = Z_M P(M) / sum Z P. The weights' tail tells whether to believe it: where the Pareto shape
k is 0.7 or more the comparison is refused.

Source: Vehtari et al., arXiv:1507.02646.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from sbi_phys.comparison.probabilities import prior_probabilities, require_names
from sbi_phys.core.checks import as_real, require_finite
from sbi_phys.core.errors import ConvergenceError, SettingError, ShapeError
from sbi_phys.core.progress import Progress
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import standard_normal_log_prob
from sbi_phys.samplers.importance import ImportanceResult, Proposal, importance_sample
from sbi_phys.store.identity import class_path

__all__ = ["EvidenceComparison", "compare_evidence", "importance_evidence"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvidenceComparison:
    """Evidence of K models for one data set.

    names (K,). prior (K,), their probabilities before the data. log_evidence (K,), nats, with log_evidence_err (K,).
    probability (K,), after the data. pareto_k (K,), tail shape of the weights. results: the importance samples of each.
    """

    names: tuple[str, ...]
    prior: Array
    log_evidence: Array
    log_evidence_err: Array
    probability: Array
    pareto_k: Array
    results: tuple[ImportanceResult, ...]

    def log_bayes_factor(self, model: str, against: str) -> tuple[float, float]:
        """log p(x | model) - log p(x | against), nats, and its error.   Raises: SettingError."""
        i, j = (require_names(name, self.names) for name in (model, against))
        error = math.hypot(float(self.log_evidence_err[i]), float(self.log_evidence_err[j])) if i != j else 0.0
        return float(self.log_evidence[i] - self.log_evidence[j]), error

    def summary(self) -> str:
        """Return the result in words."""
        pad = max(map(len, self.names))
        rows = zip(self.names, self.log_evidence, self.log_evidence_err, self.probability, self.pareto_k, strict=True)
        lines = [f"  {n:<{pad}}  log Z = {z:.3f} +- {e:.3f}  P = {p:.4f}  Pareto k {k:.2f}" for n, z, e, p, k in rows]
        return "\n".join(["Evidence by importance sampling", *lines])


def importance_evidence(
    simulator: Any,
    posterior: Any,
    observation: ArrayLike,
    *,
    n: int = 20_000,
    seed: int = 0,
    progress: Progress | None = None,
) -> ImportanceResult:
    """Importance samples of one model; the evidence is their log_evidence, nats.

    Args: simulator: with prior and exact log_likelihood(x, theta). posterior: an NPE of the same prior (or anything with
    `.proposal(x)`), or a proposal density in u itself. observation: one x. n: draws.
    Raises: SettingError (no likelihood, no proposal), ShapeError, NonFiniteError, DataError.
    """
    if not callable(getattr(simulator, "log_likelihood", None)):
        raise SettingError(f"{class_path(simulator)} has no log_likelihood(x, theta); expected a simulator with an exact likelihood")
    x = as_real("observation", observation)
    require_finite("observation", x)
    proposal: Proposal = posterior.proposal(x) if callable(getattr(posterior, "proposal", None)) else posterior
    if not callable(getattr(proposal, "log_prob", None)) or not callable(getattr(proposal, "sample", None)):
        raise SettingError(f"posterior is a {type(posterior).__name__}; expected an NPE, or a density with sample(n, rng) and log_prob(u)")
    prior = simulator.prior

    def log_target(u: Array) -> Array:
        values = np.asarray(simulator.log_likelihood(x, prior.from_unbounded(u)), dtype=np.float64)
        if values.shape != (len(u),):
            raise ShapeError(f"{class_path(simulator)}.log_likelihood gave shape {values.shape}; expected ({len(u)},) for one observation")
        return values + standard_normal_log_prob(u)

    return importance_sample(log_target, proposal, n, seed=seed, progress=progress)


def compare_evidence(
    models: Mapping[str, tuple[Any, Any]],
    observation: ArrayLike,
    *,
    prior: Mapping[str, float] | None = None,
    n: int = 20_000,
    seed: int = 0,
    progress: Progress | None = None,
) -> EvidenceComparison:
    """Evidence and probability of models {name: (simulator, posterior)} for one data set.

    Args: observation: one x. prior: probabilities of the models, any positive numbers; default equal. n: draws a model.
    Raises: ConvergenceError (a Pareto shape of 0.7 or more), and as `importance_evidence`.
    Read: a log Bayes factor of 1 is hardly worth a mention, above 5 decisive, if the priors of the parameters are.
    """
    if len(models) < 2:
        raise SettingError(f"models has {len(models)} entries; expected at least two to compare")
    names = tuple(models)
    before = prior_probabilities(names, prior)
    results = tuple(
        importance_evidence(*models[name], observation, n=n, seed=seed_for(seed, "evidence", name), progress=progress) for name in names
    )
    for name, result in zip(names, results, strict=True):
        if not result.reliable:
            raise ConvergenceError(
                f"evidence of {name}: the weights have Pareto shape {result.pareto_k:.2f}; expected below 0.7: "
                "its posterior misses part of the exact one; train it longer, or on more simulations"
            )
    log_z = np.array([r.log_evidence for r in results])
    joint = log_z + np.log(before)
    return EvidenceComparison(
        names=names,
        prior=before,
        log_evidence=log_z,
        log_evidence_err=np.array([r.log_evidence_err for r in results]),
        probability=np.exp(joint - logsumexp(joint)),
        pareto_k=np.array([r.pareto_k for r in results]),
        results=results,
    )
