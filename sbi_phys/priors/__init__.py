"""Priors, and the parameters and observables of a simulator."""

from sbi_phys.priors.base import Prior, standard_normal_log_prob
from sbi_phys.priors.blocks import to_blocks, to_rows
from sbi_phys.priors.dirichlet import DirichletPrior
from sbi_phys.priors.independent import BoxPrior, LogUniformPrior, NormalPrior
from sbi_phys.priors.parameters import Observable, Parameter
from sbi_phys.priors.product import ProductPrior, prior_from_dict

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
    "to_blocks",
    "to_rows",
]
