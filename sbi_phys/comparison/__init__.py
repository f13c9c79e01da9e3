"""Comparison of models: Bayes factors by an amortised classifier and by importance sampling, and tests of nested hypotheses by toys.

amortised       model_comparison: one training, then Bayes factors and probabilities of any data set; their calibration
one data set    compare_evidence: importance-sampled evidence, where each model has an exact likelihood and a posterior
nested          nested_test: p-value and significance of a test statistic by toys
"""

from sbi_phys.comparison.amortised import ModelComparison, model_comparison
from sbi_phys.comparison.evidence import EvidenceComparison, compare_evidence, importance_evidence
from sbi_phys.comparison.nested import NestedTest, nested_test
from sbi_phys.comparison.probabilities import ProbabilityCalibration, check_probabilities

__all__ = [
    "EvidenceComparison", "ModelComparison", "NestedTest", "ProbabilityCalibration", "check_probabilities", "compare_evidence",
    "importance_evidence", "model_comparison", "nested_test",
]  # fmt: skip
