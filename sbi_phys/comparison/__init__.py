"""Model comparison: Bayes factors by a trained classifier or by importance sampling, and tests of nested hypotheses.

amortised       model_comparison: one training, then Bayes factors and probabilities of any data set, with their calibration
one data set    compare_evidence: evidence by importance sampling, for models with an exact likelihood and a posterior
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
