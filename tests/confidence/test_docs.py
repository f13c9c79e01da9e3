"""The guide's code runs, and says what it says."""

import re
from pathlib import Path

import numpy as np

import sbi_phys.confidence  # noqa: F401  the guide's sp.confidence

GUIDE = (Path(__file__).parent.parent.parent / "docs/confidence.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
    namespace: dict[str, object] = {}
    exec(compile(code, "docs/confidence.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "90 % interval on mu" in printed and "expected 90 % upper limit on mu without signal" in printed
    sets = namespace["sets"]
    (low,), (high,) = (getattr(sets.interval(np.array([[145, 70]])), side) for side in ("low", "high"))
    # mu_hat = 5 with an error of sqrt(145 + 70) / 15 = .98
    assert abs(low - (5 - 1.645 * 0.98)) < 0.35 and abs(high - (5 + 1.645 * 0.98)) < 0.35


def test_every_public_name_is_there():
    import sbi_phys.confidence as confidence

    for name in re.findall(r"`(?:sp\.confidence\.)?([A-Za-z_0-9]+)\(", GUIDE):
        assert hasattr(confidence, name) or hasattr(confidence.Fit, name) or hasattr(confidence.Neyman, name), name
    assert all(callable(getattr(confidence, name)) for name in confidence.__all__)
