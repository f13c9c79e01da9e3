"""Results of `validate`: of one method and of all, as tables, words, figures and files."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sbi_phys.calibration.inputs import ALPHA, holm
from sbi_phys.core.figures import figures
from sbi_phys.core.files import write_aside
from sbi_phys.core.types import Array
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.validate_checks import BottomLine, Closure, Priors, Scan
from sbi_phys.unfold.validate_pit import EventPIT
from sbi_phys.unfold.validate_rows import Check, Criteria
from sbi_phys.unfold.validate_toys import Toys

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MethodValidation", "Row", "Validation"]


EVENTS = "event posteriors"


class Row(NamedTuple):
    """One line of the table: passed is None where nothing is asked; pvalue, corrected, where toys decide."""

    name: str
    value: float
    criterion: str
    passed: bool | None
    words: str
    pvalue: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodValidation:
    """What was found of one method.

    checks, each test with its own number. closure; stress and bottom_lines, by the name of the other truth; toys. counts, the answer to
    the measured counts with its error, or None. priors, scan: None unless asked. warned: what the method warned of, and how often.
    """

    name: str
    checks: tuple[Check, ...]
    closure: Closure
    stress: Mapping[str, Closure]
    bottom_lines: Mapping[str, BottomLine]
    toys: Toys
    priors: Priors | None
    scan: Scan | None
    warned: Mapping[str, int]

    @property
    def pvalues(self) -> dict[str, float]:
        """Of each test that toys decide, for itself."""
        return {c.name: c.pvalue for c in self.checks if c.pvalue is not None}

    @property
    def adjusted(self) -> dict[str, float]:
        """Holm's p-values of those."""
        return holm(self.pvalues)

    def rows(self) -> tuple[Row, ...]:
        """Every test, decided."""
        adjusted = self.adjusted
        return tuple(
            Row(c.name, c.value, c.criterion, c.met if c.pvalue is None else adjusted[c.name] > ALPHA, c.words, adjusted.get(c.name))
            for c in self.checks
        )

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the tests that are not passed."""
        return tuple(row.name for row in self.rows() if row.passed is False)

    @property
    def passed(self) -> bool:
        """Whether all are."""
        return not self.failed

    @property
    def verdict(self) -> str:
        """One sentence."""
        n = sum(row.passed is not None for row in self.rows())
        if self.passed:
            return f"{self.name}: passes all {n} tests."
        return f"{self.name}: fails {len(self.failed)} of {n} tests: {', '.join(self.failed)}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What `validate` found.

    methods, by name. response, truth (t,), n_toys, asked: what it was found with. events: ranks of event posteriors, or None. seconds, by
    method.
    """

    methods: Mapping[str, MethodValidation]
    response: Response
    truth: Array
    n_toys: int
    asked: Criteria
    events: EventPIT | None
    seconds: Mapping[str, float] = field(compare=False)

    def table(self) -> tuple[Row, ...]:
        """Rows (name, value, criterion, passed, words, pvalue); with several methods the name begins with that of the method."""
        several = len(self.methods) > 1
        rows = [r._replace(name=f"{name}: {r.name}") if several else r for name, m in self.methods.items() for r in m.rows()]
        if self.events is not None:
            p = self.events.pvalue
            words = self.events.sbc.summary().split("\n")[0]
            rows.append(Row(EVENTS, p, "ranks of event truths uniform, p > 0.05", p > ALPHA, words, p))
        return tuple(rows)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the table's rows that are not passed."""
        return tuple(row.name for row in self.table() if row.passed is False)

    @property
    def passed(self) -> bool:
        """Whether every method passes every test."""
        return not self.failed

    @property
    def verdict(self) -> str:
        """A sentence for each method."""
        words = [m.verdict for m in self.methods.values()]
        if self.events is not None:
            words.append(
                f"{EVENTS.capitalize()}: {'calibrated' if self.events.pvalue > ALPHA else 'wrong'} (p = {self.events.pvalue:.3g})."
            )
        return " ".join(words)

    def summary(self) -> str:
        """Every result in words, the verdict first."""
        lines = [self.verdict, ""]
        for row in self.table():
            mark = {True: "passes", False: "FAILS", None: "-"}[row.passed]
            p = "" if row.pvalue is None else f", p = {row.pvalue:.3g} corrected"
            lines.append(f"  {mark:<7} {row.name}: {row.value:.4g} ({row.criterion}{p}); {row.words}")
        for m in self.methods.values():
            lines += [f"  {m.name} warned {k} times: {text}" for text, k in m.warned.items()]
        return "\n".join(lines)

    def figures(self) -> "dict[str, Figure]":
        """Figures by name: closure, stress, pulls, coverage, correlation; regularisation and events where they were asked for.

        Read: `plots_validate` says for each what a right method looks like.
        """
        return figures.unfold_validate.figures(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and words."""
        return {
            "verdict": self.verdict, "passed": self.passed, "failed": list(self.failed), "n_toys": self.n_toys,
            "asked": asdict(self.asked), "truth": self.truth.tolist(), "seconds": dict(self.seconds),
            "rows": [{k: _plain(v) for k, v in row._asdict().items()} for row in self.table()],
            "bins": {name: _bins(m) for name, m in self.methods.items()},
            "warned": {name: dict(m.warned) for name, m in self.methods.items()},
        }  # fmt: skip

    def write(self, folder: str | Path) -> Path:
        """Write validation.json and each figure as PNG and PDF into a folder, each aside and renamed -> the folder.

        Raises: WriteError (the folder cannot be written).
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_aside(target / "validation.json", text, sync=True)
        for name, figure in self.figures().items():
            figures.unfold_validate.save(figure, target, name)
        return target


def _bins(m: MethodValidation) -> dict[str, Any]:
    """Numbers of every bin, for tables and other plots."""
    arrays = {
        "closure": m.closure.counts,
        "closure_errors": m.closure.errors,
        "mean_pull": m.toys.mean_pull,
        "mean_pull_err": m.toys.mean_pull_err,
        "coverage": m.toys.covered(1.0).mean(axis=0),
        "bias": m.toys.bias,
        "sd": m.toys.sd,
        "quoted": np.sqrt(np.mean(m.toys.errors**2, axis=0)),
        **{f"stress: {name}": c.counts for name, c in m.stress.items()},
    }
    return {name: values.tolist() for name, values in arrays.items()}


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
