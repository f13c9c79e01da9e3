"""Comparison of models, of networks, and of observations.

amortised       model_comparison: one training, then Bayes factors and probabilities of any data set, with their calibration
one data set    compare_evidence: evidence by importance sampling, for models with an exact likelihood and a posterior
nested          nested_test: p-value and significance of a test statistic by toys
networks        compare_networks: log score on held-out simulations, calibration and C2ST of several trained networks
simulations     learning_curve: would more simulations help?
observations    compare_posteriors: medians, intervals and shifts of several posteriors
"""

from sbi_phys.comparison.amortised import ModelComparison, model_comparison
from sbi_phys.comparison.evidence import EvidenceComparison, compare_evidence, importance_evidence
from sbi_phys.comparison.learning_curve import LearningCurve, learning_curve
from sbi_phys.comparison.nested import NestedTest, nested_test
from sbi_phys.comparison.observations import PosteriorComparison, compare_posteriors
from sbi_phys.comparison.probabilities import ProbabilityCalibration, check_probabilities
from sbi_phys.comparison.scores import NetworkComparison, compare_networks

__all__ = [
    "EvidenceComparison", "LearningCurve", "ModelComparison", "NestedTest", "NetworkComparison", "PosteriorComparison",
    "ProbabilityCalibration", "check_probabilities", "compare_evidence", "compare_networks", "compare_posteriors",
    "importance_evidence", "learning_curve", "model_comparison", "nested_test",
]  # fmt: skip
