"""Confidence intervals, limits and sets with calibrated coverage, from any likelihood or test statistic (a function of arrays).

- counting experiments: `feldman_cousins`, `feldman_cousins_gaussian`, `acceptance`; `on_off` for a background measured off source
- profile likelihood: `fit` (iminuit, with Hesse and Minos errors), `profile`, `contour`, `impacts`; asymptotic intervals, CLs, `discovery`
- test statistics: `LRT`, `RefinedLRT` (searches for the maximum itself), `Profiled` (nuisance parameters), `Waldo`
- calibrated sets: `neyman` (toys on a grid), `lf2i` (critical values and p-values learned from simulations)
- limits: `limits` and `expected_limits`, from any of the above
- test of coverage: `coverage_map`, the coverage as a function of theta with errors
"""

from sbi_phys.confidence.counting import (
    FeldmanCousins,
    OnOff,
    acceptance,
    counting_cls,
    counting_wilks,
    feldman_cousins,
    feldman_cousins_gaussian,
    li_ma,
    on_off,
    on_off_coverage,
    on_off_wilks,
)
from sbi_phys.confidence.coverage_map import CoverageMap, coverage_map
from sbi_phys.confidence.lf2i import LF2I, CriticalValues, PValues, learn_critical_values, learn_pvalues, lf2i
from sbi_phys.confidence.limits import ExpectedLimits, Limits, expected_limits, limits
from sbi_phys.confidence.neyman import Neyman, neyman
from sbi_phys.confidence.profile import (
    Contour,
    Discovery,
    Fit,
    Impacts,
    Profile,
    asymptotic_interval,
    asymptotic_limit,
    cls_limit,
    cls_value,
    contour,
    discovery,
    fit,
    impacts,
    profile,
)
from sbi_phys.confidence.sets import Construction, Interval, Region
from sbi_phys.confidence.statistics import LRT, Profiled, RefinedLRT, Waldo, posterior_moments, waldo

__all__ = [
    "LF2I", "LRT", "Construction", "Contour", "CoverageMap", "CriticalValues", "Discovery", "ExpectedLimits", "FeldmanCousins", "Fit",
    "Impacts", "Interval", "Limits", "Neyman", "OnOff", "PValues", "Profile", "Profiled", "RefinedLRT", "Region", "Waldo",
    "acceptance", "asymptotic_interval", "asymptotic_limit", "cls_limit", "cls_value", "contour", "counting_cls", "counting_wilks",
    "coverage_map", "discovery", "expected_limits", "feldman_cousins", "feldman_cousins_gaussian", "fit", "impacts",
    "learn_critical_values", "learn_pvalues", "lf2i", "li_ma", "limits", "neyman", "on_off", "on_off_coverage", "on_off_wilks",
    "posterior_moments", "profile", "waldo",
]  # fmt: skip
