"""Common parts of the results of several tests: p-values by name, verdicts in words, and the layout of the summary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sbi_phys.calibration.pvalues import ALPHA, holm
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.types import Array

__all__ = ["NamedTests", "Repair", "ShapeTests", "fault_words", "shape_text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedTests(Result):
    """p-values of d tests by name (a parameter, a curve), and one of all together."""

    names: tuple[str, ...]
    labels: tuple[str, ...]
    pvalues: dict[str, float]
    pvalue: float

    PASSED: ClassVar[str] = "calibrated"

    @property
    def verdicts(self) -> dict[str, str]:
        """'calibrated', or what is wrong, by name; Holm's correction keeps the family-wise error at 5 %."""
        adjusted = holm(self.pvalues)
        return {name: self.PASSED if adjusted[name] > ALPHA else self._fault(j) for j, name in enumerate(self.names)}

    def rows(self) -> Rows:
        """Return the table: one row for each name, with its p-value, verdict and the numbers of the test."""
        verdicts = self.verdicts
        found: dict[str, Any] = {"name": self.names, "verdict": [verdicts[n] for n in self.names]}
        return Rows.of(found | {"pvalue": [self.pvalues[n] for n in self.names]} | self._columns())

    def _columns(self) -> dict[str, Any]:
        """Further columns of `rows`, {name: (d,)}."""
        return {}

    def _fault(self, j: int) -> str:
        """What is wrong with the j-th, in words, given that its test rejects."""
        raise NotImplementedError

    def _summary(self, subject: str, passed: str, failed: str, details: Sequence[str] = (), note: str = "") -> list[str]:
        """Lines of the summary: one for all tests, one for each name with its verdict, p-value and details."""
        verdicts = self.verdicts
        bad = sum(word != self.PASSED for word in verdicts.values())
        head = f"{bad} of {len(verdicts)} {failed}" if bad else passed
        lines = [f"{subject}: {head} (p = {self.pvalue:.3g}{note})"]
        pad = max(map(len, self.names))
        for name, detail in zip(self.names, details or [""] * len(self.names), strict=True):
            lines.append(f"  {name:<{pad}}  {verdicts[name]:<14}  p = {self.pvalues[name]:<8.3g}  {detail}".rstrip())
        return lines


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeTests(NamedTests):
    """`NamedTests` with the shift (posterior - true value in posterior sd) and the width (1 is right) of each parameter, (d,)."""

    shift: Array
    shift_err: Array
    width: Array
    width_err: Array

    def _columns(self) -> dict[str, Any]:
        return {"shift": self.shift, "shift_err": self.shift_err, "width": self.width, "width_err": self.width_err}

    def _fault(self, j: int) -> str:
        return fault_words(self.shift[j], self.shift_err[j], self.width[j], self.width_err[j])

    def _shapes(self) -> list[str]:
        return [shape_text(*s) for s in zip(self.shift, self.shift_err, self.width, self.width_err, strict=True)]


class Repair(Result):
    """A repair of a posterior, with a `label` for tables and figures."""

    __slots__ = ()

    @property
    def repaired(self) -> bool:
        """True: reports mark results from this object as repaired."""
        return True


def fault_words(shift: float, shift_err: float, width: float, width_err: float) -> str:
    """Words for a rejected shape: 'biased high', 'overconfident' and so on, or 'wrong shape'.

    Deviations below two standard errors are not named.
    """
    words = []
    if abs(shift) > 2 * shift_err:
        words.append("biased high" if shift > 0 else "biased low")
    if abs(width - 1) > 2 * width_err:
        words.append("overconfident" if width < 1 else "underconfident")
    return " and ".join(words) or "wrong shape"


def shape_text(shift: float, shift_err: float, width: float, width_err: float) -> str:
    """Shift and width with their errors."""
    return f"shift {shift:+.2f} +- {shift_err:.2f} sd  width x{width:.2f} +- {width_err:.2f}"
