"""One house style for every figure, and the one place where a figure becomes files.

Figures are made with matplotlib's object interface: no pyplot, hence no figure kept in a global list and no window.
The style is applied in a context and leaves rcParams as it was.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import SettingError
from sbi_phys.core.files import open_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "MARKERS", "STYLE", "house_style", "new_figure", "save_figure"]

# Okabe and Ito's palette: told apart with every common colour blindness and in grey print.
COLOURS = {
    "flow": "#0072B2",
    "reference": "#111111",
    "amortised": "#D55E00",
    "truth": "#009E73",
    "published": "#AA3377",
    "prior": "#9A9A9A",
    "grey": "#6B6B6B",
}
MARKERS = ("*", "D", "^", "s", "P", "v", "X", "o")

STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "mathtext.fontset": "dejavusans",
    "axes.linewidth": 0.8,
    "axes.labelsize": 10.5,
    "axes.titlesize": 10.5,
    "axes.axisbelow": True,
    "xtick.direction": "in",
    "ytick.direction": "in",
    "xtick.top": True,
    "ytick.right": True,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,  # TrueType: the text of a PDF stays text, which journals ask for
    "svg.hashsalt": "sbi_phys",
}


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Context in which matplotlib draws in the house style; rcParams are restored after it."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc does not reach the figures; the backend is left alone
        matplotlib.rcParams.update(cast(Any, STYLE))
        yield


def new_figure(width: float, height: float, *, constrained: bool = True) -> "Figure":
    """Empty figure of width x height inches, known to no pyplot list; call it within `house_style`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained" if constrained else None)


def save_figure(fig: "Figure", folder: str | os.PathLike[str], name: str, *, dpi: int = 150) -> tuple[Path, Path]:
    """Write `name`.png (dpi 150) and `name`.pdf into `folder` -> the two paths.

    The files hold no date and no version: the same figure gives the same bytes.   Raises: SettingError.
    """
    dpi = require_int("dpi", dpi, low=20, high=1200)
    if not name or not name.replace("-", "_").replace("_", "a").isalnum():
        raise SettingError(f"figure name is {name!r}; expected letters, digits, '-' and '_'")
    base = Path(folder)
    files: dict[Path, dict[str, Any]] = {
        base / f"{name}.png": {"dpi": dpi, "metadata": {"Software": None}},
        base / f"{name}.pdf": {"metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
    }
    with house_style():
        for path, options in files.items():
            with open_aside(path, make_folder=True) as file:
                fig.savefig(file, format=path.suffix[1:], **options)
    png, pdf = files
    return png, pdf
