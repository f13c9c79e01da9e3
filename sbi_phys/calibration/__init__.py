"""Calibration: arrays in, a frozen result out with its numbers, `.pvalue`, `.summary()` and `.plot(ax=None)`; never sees a network."""

from sbi_phys.calibration.c2st import C2ST, c2st
from sbi_phys.calibration.coverage import Coverage, coverage
from sbi_phys.calibration.predictive import PredictivePValue, predictive_pvalue
from sbi_phys.calibration.sbc import SBC, sbc

__all__ = ["C2ST", "SBC", "Coverage", "PredictivePValue", "c2st", "coverage", "predictive_pvalue", "sbc"]
