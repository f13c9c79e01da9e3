r"""Evidence of a model for one data set, by importance sampling from its learned posterior.

    Z = p(x | M) = int L(x | theta) p(theta) dtheta = E_q[ L(x | theta(u)) N(u; 0, I) / q(u | x) ]

in the whitened space u of the prior: the mean importance weight (`samplers.importance`), exact for any q that covers the posterior. The
log Bayes factor is the difference of the log Z, and P(M | x) = Z_M P(M) / sum Z P. The tail of the weights shows whether the estimate is
reliable: if its Pareto shape k is 0.7 or more, the comparison is refused.

Source: Vehtari et al., arXiv:1507.02646.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import logsumexp

from sbi_phys.comparison.probabilities import prior_probabilities, require_names
from sbi_phys.core.checks import as_real, require_finite
from sbi_phys.core.errors import ConvergenceError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import standard_normal_log_prob
from sbi_phys.samplers.importance import ImportanceResult, Proposal, importance_sample
from sbi_phys.store.identity import class_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EvidenceComparison", "compare_evidence", "importance_evidence"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvidenceComparison(Result):
    """Result of `compare_evidence`: evidence of K models for one data set.

    names (K,). prior (K,), prior probabilities. log_evidence (K,), nats, with log_evidence_err (K,). probability (K,), posterior
    probabilities. pareto_k (K,), tail shape of the weights. results: the importance samples of each model.

    >>> import numpy as np
    >>> from sbi_phys.comparison import EvidenceComparison
    >>> numbers = dict(log_evidence=np.array([-3.0, -1.0]), log_evidence_err=np.array([0.03, 0.04]), pareto_k=np.zeros(2), results=())
    >>> found = EvidenceComparison(names=("a", "b"), prior=np.full(2, 0.5), probability=np.array([0.12, 0.88]), **numbers)
    >>> found.log_bayes_factor("b", "a")
    (2.0, 0.05)
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

    def rows(self) -> Rows:
        """Return the table: one row for each model."""
        shown = ("prior", "log_evidence", "log_evidence_err", "probability", "pareto_k")
        return Rows.of({"name": self.names} | {k: getattr(self, k) for k in shown}, {"log_evidence": "nats", "log_evidence_err": "nats"})

    def summary(self) -> str:
        """Return the result in words."""
        pad = max(map(len, self.names))
        rows = zip(self.names, self.log_evidence, self.log_evidence_err, self.probability, self.pareto_k, strict=True)
        lines = [f"  {n:<{pad}}  log Z = {z:.3f} +- {e:.3f}  P = {p:.4f}  Pareto k {k:.2f}" for n, z, e, p, k in rows]
        return "\n".join(["Evidence by importance sampling", *lines])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the log evidence of each model with its error, relative to the largest."""
        relative = self.log_evidence - self.log_evidence.max()
        return figures.results.forest(self.names, relative, self.log_evidence_err, ax, line=0.0, xlabel="log evidence - largest [nats]")


def importance_evidence(
    simulator: Any,
    posterior: Any,
    x_obs: ArrayLike,
    *,
    n_draws: int = 20_000,
    seed: int = 0,
    progress: Progress | None = None,
) -> ImportanceResult:
    """Importance samples of one model; the evidence is their log_evidence, nats.

    Args:
        simulator: with a prior and an exact log_likelihood(x, theta).
        posterior: an NPE with the same prior (or any object with `.proposal(x)`), or a proposal density in u itself.
        x_obs: one observation.
        n_draws: importance draws.
        seed: of the draws.
        progress: default none.

    Raises: SettingError (no likelihood, no proposal), ShapeError, NonFiniteError, DataError.

    >>> from types import SimpleNamespace
    >>> from scipy.stats import norm
    >>> import sbi_phys as sp
    >>> prior = sp.NormalPrior([sp.Parameter("theta")], [0.0], [1.0])
    >>> model = SimpleNamespace(prior=prior, log_likelihood=lambda x, theta: norm.logpdf(x[0], theta[:, 0]))
    >>> posterior = SimpleNamespace(sample=lambda n, rng: rng.normal(size=(n, 1)), log_prob=lambda u: norm.logpdf(u[:, 0]))
    >>> result = sp.comparison.importance_evidence(model, posterior, [0.0])
    >>> bool(abs(result.log_evidence - norm.logpdf(0, scale=2**0.5)) < 0.05)  # x ~ N(0, 2)
    True
    """
    if not callable(getattr(simulator, "log_likelihood", None)):
        raise SettingError(f"{class_path(simulator)} has no log_likelihood(x, theta); expected a simulator with an exact likelihood")
    x = as_real("x_obs", x_obs)
    require_finite("x_obs", x)
    proposal: Proposal = posterior.proposal(x) if callable(getattr(posterior, "proposal", None)) else posterior
    if not callable(getattr(proposal, "log_prob", None)) or not callable(getattr(proposal, "sample", None)):
        raise SettingError(f"posterior is a {type(posterior).__name__}; expected an NPE, or a density with sample(n, rng) and log_prob(u)")
    prior = simulator.prior

    def log_target(u: Array) -> Array:
        values = np.asarray(simulator.log_likelihood(x, prior.from_unbounded(u)), dtype=np.float64)
        if values.shape != (len(u),):
            raise ShapeError(f"{class_path(simulator)}.log_likelihood gave shape {values.shape}; expected ({len(u)},) for one observation")
        return values + standard_normal_log_prob(u)

    return importance_sample(log_target, proposal, n_draws, seed=seed, progress=progress)


def compare_evidence(
    models: Mapping[str, tuple[Any, Any]],
    x_obs: ArrayLike,
    *,
    prior: Mapping[str, float] | None = None,
    n_draws: int = 20_000,
    seed: int = 0,
    progress: Progress | None = None,
) -> EvidenceComparison:
    """Evidence and probability of models {name: (simulator, posterior)} for one data set.

    Args:
        models: simulators and posteriors as in `importance_evidence`.
        x_obs: one observation.
        prior: prior probabilities of the models, any positive numbers; default equal.
        n_draws: importance draws of each model.
        seed: of the draws.
        progress: default none.

    Raises: ConvergenceError (a Pareto shape of 0.7 or more), and as `importance_evidence`.
    Read: a log Bayes factor of 1 is weak evidence, above 5 decisive, given the priors of the parameters.

    >>> from types import SimpleNamespace
    >>> from scipy.stats import norm
    >>> import sbi_phys as sp
    >>> posterior = SimpleNamespace(sample=lambda n, rng: rng.normal(size=(n, 1)), log_prob=lambda u: norm.logpdf(u[:, 0]))
    >>> def model(sd):
    ...     prior = sp.NormalPrior([sp.Parameter("theta")], [0.0], [sd])
    ...     return SimpleNamespace(prior=prior, log_likelihood=lambda x, theta: norm.logpdf(x[0], theta[:, 0])), posterior
    >>> sp.compare_evidence({"narrow": model(0.5), "wide": model(1.0)}, [0.0]).names
    ('narrow', 'wide')
    """
    if len(models) < 2:
        raise SettingError(f"models has {len(models)} entries; expected at least two to compare")
    names = tuple(models)
    before = prior_probabilities(names, prior)
    results = tuple(
        importance_evidence(*models[name], x_obs, n_draws=n_draws, seed=seed_for(seed, "evidence", name), progress=progress)
        for name in names
    )
    for name, result in zip(names, results, strict=True):
        if not result.reliable:
            raise ConvergenceError(
                f"evidence of {name}: the weights have Pareto shape {result.pareto_k:.2f}; expected below 0.7: "
                "the learned posterior does not cover the exact one; train it longer, or on more simulations"
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
