"""Priors over parameters, and the parameters and observables that a simulator names."""

from sbi_phys.priors.distributions import (
    BoxPrior,
    DirichletPrior,
    LogUniformPrior,
    NormalPrior,
    Prior,
    ProductPrior,
    prior_from_dict,
    standard_normal_log_prob,
)
from sbi_phys.priors.parameters import Observable, Parameter

__all__ = [
    "BoxPrior",
    "DirichletPrior",
    "LogUniformPrior",
    "NormalPrior",
    "Observable",
    "Parameter",
    "Prior",
    "ProductPrior",
    "prior_from_dict",
    "standard_normal_log_prob",
]
