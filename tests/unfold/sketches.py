"""Files in place of figures, for tests of what is around them: saving a figure as PNG and PDF takes half a second."""

from pathlib import Path

import pytest
from PIL import Image


def sketch(patch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let save_figure of the modules write blank files where there are none."""

    def save(figure: object, folder: Path, name: str, **settings: int) -> tuple[Path, Path]:
        png, pdf = Path(folder) / f"{name}.png", Path(folder) / f"{name}.pdf"
        png.parent.mkdir(parents=True, exist_ok=True)
        if not png.exists():
            Image.new("RGB", (60, 40), "white").save(png)
            pdf.write_bytes(b"%PDF-1.4\n")
        return png, pdf

    for module in modules:
        patch.setattr(f"{module}.save_figure", save)
