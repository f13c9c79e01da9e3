"""Calibration: is a posterior right? Tests of posterior draws, of the observation, of two samples and of learned ratios, and repairs.

Each test takes arrays and returns a frozen result with `pvalue`, `summary()` and `plot(ax=None)`; no test sees a network.

all together    calibrate
on average      sbc · coverage · tarp · pulls
given x         local_coverage · pit_regression
at one x        lc2st (train_lc2st for many) · posterior_sbc
the data        misspecification · predictive_pvalue · predictive_checks · prior_predictive_check
two samples     c2st · mmd · marginal_ks
ratios          mean_ratio · reliability · reweighting_auc · check_ratio · recalibrate_ratio
repair          conformal_regions · recalibrate_ranks · temper · mix_draws
"""

from sbi_phys.calibration.calibrate import Calibration, calibrate
from sbi_phys.calibration.conformal import ConformalRegions, conformal_regions, hpd_content
from sbi_phys.calibration.coverage import Coverage, coverage
from sbi_phys.calibration.lc2st import LC2ST, LC2STModel, lc2st, train_lc2st
from sbi_phys.calibration.local import LocalCoverage, local_coverage
from sbi_phys.calibration.misspecification import Misspecification, misspecification
from sbi_phys.calibration.pit import PITRegression, pit_regression
from sbi_phys.calibration.posterior_sbc import PosteriorSBC, posterior_sbc
from sbi_phys.calibration.predictive import (
    PredictiveChecks,
    PredictivePValue,
    PriorPredictive,
    predictive_checks,
    predictive_pvalue,
    prior_predictive_check,
)
from sbi_phys.calibration.pulls import Pulls, pulls
from sbi_phys.calibration.ratios import (
    MeanRatio,
    RatioCalibration,
    RatioCheck,
    Reliability,
    ReweightingAUC,
    check_ratio,
    mean_ratio,
    recalibrate_ratio,
    reliability,
    reweighting_auc,
)
from sbi_phys.calibration.recalibration import RankRecalibration, Tempering, mix_draws, recalibrate_ranks, temper
from sbi_phys.calibration.sbc import SBC, sbc
from sbi_phys.calibration.tarp import TARP, tarp
from sbi_phys.calibration.two_sample import C2ST, MMD, MarginalKS, c2st, marginal_ks, mmd

__all__ = [
    "C2ST", "LC2ST", "MMD", "SBC", "TARP", "Calibration", "ConformalRegions", "Coverage", "LC2STModel", "LocalCoverage",
    "MarginalKS", "MeanRatio", "Misspecification", "PITRegression", "PosteriorSBC", "PredictiveChecks", "PredictivePValue",
    "PriorPredictive", "Pulls", "RankRecalibration", "RatioCalibration", "RatioCheck", "Reliability", "ReweightingAUC",
    "Tempering", "c2st", "calibrate", "check_ratio", "conformal_regions", "coverage", "hpd_content", "lc2st", "local_coverage",
    "marginal_ks", "mean_ratio", "misspecification", "mix_draws", "mmd", "pit_regression", "posterior_sbc", "predictive_checks",
    "predictive_pvalue", "prior_predictive_check", "pulls", "recalibrate_ranks", "recalibrate_ratio", "reliability",
    "reweighting_auc", "sbc", "tarp", "temper", "train_lc2st",
]  # fmt: skip
