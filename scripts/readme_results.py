"""Write the results of the demo from its summary.json into README.md, between two marks.

python scripts/readme_results.py runs/demo/summary.json
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from sbi_phys.report.tables import Table, format_interval

README = Path(__file__).parent.parent / "README.md"
MARKS = re.compile(r"(<!-- results: begin[^\n]*-->\n).*?(<!-- results: end -->)", flags=re.DOTALL)


def results(found: dict[str, Any]) -> str:
    """Markdown tables of the posterior and of the checks."""
    rows = []
    for name, about in found["parameters"].items():
        ours, exact = (found[key][name] for key in ("posterior", "reference"))
        label = f"${about['latex']}$" if about["latex"] else name
        cells = (format_interval(row["q50"], row["q16"], row["q84"]) for row in (ours, exact))
        rows.append((label, *cells, f"{found['median_shift_sd'][name]:+.3f}", about["unit"] or "–"))
    header = ("parameter", "posterior", "exact MCMC", "shift of the median [sd]", "unit")
    checks = {
        "C2ST of the amortised network against exact MCMC (0.5 is no difference)": found["c2st_amortised"],
        "C2ST of the final posterior": found["c2st_final"],
        "effective share of the importance draws": found["importance_ess_fraction"],
        "posterior predictive p-value": found["predictive_pvalue"],
        "SBC p-value, held-out simulations": found["sbc_pvalue"],
        "coverage p-value, held-out simulations": found["coverage_pvalue"],
    }
    said = tuple((name, "not run" if value is None else f"{value:.3g}") for name, value in checks.items())
    seconds = (
        f"{found['n_simulations']} simulations, {found['seconds']['total']:.0f} s in all, {found['threads']} threads, seed {found['seed']}."
    )
    return f"{Table(header, tuple(rows)).to_markdown()}\n{Table(('check', 'value'), said).to_markdown()}\n{seconds}\n"


def main() -> None:
    """Replace the text between the marks."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    text = results(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    README.write_text(MARKS.sub(lambda m: m[1] + text + m[2], README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
