"""Values of an HDF5 file that lie elsewhere, or nowhere, are refused by name."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from sbi_phys.core.errors import DataError, StoreError
from sbi_phys.core.hdf5 import require_inside


def external(file: h5py.File) -> None:
    file.create_dataset("deep/x", (4,), "<f8", external=[("/etc/hostname", 0, 32)])


def external_link(file: h5py.File) -> None:
    file["link"] = h5py.ExternalLink("/etc/other.h5", "/x")


def soft_link(file: h5py.File) -> None:
    file["deep/x"] = h5py.SoftLink("/y")


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "<f8")
    layout[:] = h5py.VirtualSource("../other.h5", "x", (4,))
    file.create_virtual_dataset("deep/x", layout)


def huge(file: h5py.File) -> None:
    file.create_dataset("deep/x", (10**12,), "<f8")


def bomb(file: h5py.File) -> None:
    file.create_dataset("deep/x", (10**9,), "<f8", chunks=(10**6,), compression="gzip", fillvalue=1.0)


def references(file: h5py.File) -> None:
    file["deep/x"] = np.array([file.ref], dtype=h5py.ref_dtype)


def circle(file: h5py.File) -> None:
    a = file.create_group("deep/a")
    a["b"] = a


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external, "the values of deep/x lie in another file"),
        (external_link, "link is no array in this file"),
        (soft_link, "deep/x is no array in this file"),
        (virtual, r"the values of deep/x lie in \['\.\./other\.h5'\]"),
        (huge, r"the values of deep/x have shape \(1000000000000,\) and 0 bytes in the file"),
        (bomb, "the values of deep/x have shape"),
        (references, "deep/x is no array in this file"),
        (circle, "holds itself"),
    ],
)
def test_values_that_are_not_in_the_file_are_refused(tmp_path: Path, change, message):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(5)
        file.create_dataset("deep/z", data=np.zeros((500, 50)), chunks=(50, 50), compression="gzip", shuffle=True)
        file["deep/words"] = np.array([b"a", b"bc"])
        require_inside(file, path, groups=True)
        change(file)
        with pytest.raises(StoreError, match=f"{message}.*. Make it again"):
            require_inside(file, path, groups=True, error=StoreError, advice=". Make it again")


def test_groups_and_kinds_are_refused_unless_expected(tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["deep/x"] = np.zeros(5)
        with pytest.raises(DataError, match="deep is no array"):
            require_inside(file, "a.h5")
        file["words"] = np.array(["a", "b"], dtype=h5py.string_dtype())
        require_inside(file, "a.h5", kinds="fO", groups=True)
        with pytest.raises(DataError, match="words is no array"):
            require_inside(file, "a.h5", groups=True)
