"""A folder to start from: a working simulator, its settings, a test and an observation, for `sbi-phys new NAME`."""

import keyword
import re
import sys
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

from sbi_phys.core.errors import RunFolderError, SettingError
from sbi_phys.core.files import write_aside

__all__ = ["new_project"]

_NAME = re.compile(r"^[a-z][a-z0-9_]*$")
_FILES = {"simulator.py.txt": "{}.py", "config.toml.txt": "{}.toml", "test.py.txt": "test_{}.py"}
_TRUTH = (2.2, 1.0, 250.0)  # of the observation, in the parameters' units
_N_BINS = 12


def new_project(name: str, where: str | Path = ".") -> list[Path]:
    """Write the files of a new analysis into the folder `where`/`name` -> their paths.

    Args: name: of the folder and of the module: small letters, digits and _. where: an existing folder.
    Raises: SettingError (name), RunFolderError (the folder has files).

    >>> from sbi_phys.workflow.start import new_project
    >>> [path.name for path in new_project("nebula")]
    ['nebula.py', 'nebula.toml', 'test_nebula.py', 'observation.csv']
    """
    if not _NAME.match(name) or keyword.iskeyword(name) or name in sys.stdlib_module_names or name in ("sbi_phys", "simulators"):
        raise SettingError(f"the name is {name!r}; expected one that a new module can have: small letters, digits and _, as in my_source")
    folder = Path(where) / name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} exists already; expected a name that is free")
    title = name.replace("_", " ").capitalize()
    words = {"name": name, "title": title, "class_name": "".join(part.capitalize() for part in name.split("_"))}
    made = []
    for source, target in _FILES.items():
        text = (resources.files("sbi_phys.workflow") / "templates" / source).read_text(encoding="utf-8")
        made.append(write_aside(folder / target.format(name), Template(text).substitute(words), make_folder=True))
    made.append(write_aside(folder / "observation.csv", ",".join(map(str, _observation())) + "\n"))
    return made


def _observation() -> list[int]:
    """Counts drawn at the truth from the model of the template."""
    index, lg_cutoff, strength = _TRUTH
    edges = np.geomspace(0.1, 100.0, _N_BINS + 1)
    energy = np.sqrt(edges[1:] * edges[:-1])
    shape = energy ** (1 - index) * np.exp(-energy / 10**lg_cutoff)
    counts: list[int] = np.random.default_rng(7).poisson(strength * shape / shape.sum() + 3.0).tolist()
    return counts
