r"""Build simulators/data/propagation_<EBL>.npz: CRPropa 3 propagation, summed over the distance of the sources.

The Python package astrotools 1.5.0 (RWTH Aachen, MIT licence) contains, for each model of the extragalactic background light
and each injected nucleus A, a tensor F[E_in 125, distance 100, group 5, E_out 125] from CRPropa 3 (lg(E/eV) 18.5 to 21 in
0.02; distances 1 to 1500 Mpc, equal steps in the logarithm; groups Z = 1, 2, 7, 14, 26). It is summed to

    K[A][E_in, group, E_out] = sum_d  d * dln(d) * (1 + z_d)^(m-1) * n * F[A][E_in, d, group, E_out]

in Mpc: sources of equal luminosity fill space with a comoving density proportional to (1+z)^m, and the flux of a shell is
diluted as 1/d^2 and redshifted in rate by 1/(1+z). n turns F into the mean number of fragments per injected nucleus
(1e4, but 1e5 for Kneiske04); it is checked by the largest number of fragments, A, which a nucleus leaves when it breaks
up completely. The distance d is taken as comoving; z_d for a flat universe with H0 = 67.3 km/s/Mpc, Omega_m = 0.315,
the defaults of CRPropa 3.

    python scripts/build_propagation.py                      # downloads the wheel by name into a temporary folder
    python scripts/build_propagation.py astrotools-1.5.0-py2.py3-none-any.whl
    python scripts/build_propagation.py WHEEL --ebl Gilmore12 --evolution -3 0 3 4 5     # other source evolutions m
    python scripts/build_propagation.py WHEEL --check        # compares, writes nothing

No code of astrotools is imported or run. The tensors are stored in a pickled dictionary, which is read only after the SHA-256 of
the file has been checked, by an unpickler that can build only numpy arrays.
"""

import argparse
import hashlib
import io
import json
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.files import open_aside, write_aside

Array = NDArray[np.float64]

WHEEL = "astrotools-1.5.0-py2.py3-none-any.whl"
WHEEL_SHA256 = "960d417107e9559cc084efaca14b6f7b11b6052d8a675944d62f74a3becc649b"
MEMBER = "astrotools/simulation/crpropa3__emin_18.5__emax_21.0__IRB_{ebl}.npz"
# per EBL model: SHA-256 of the source file, injected nuclei per unit of F, source evolutions m stored by default
SOURCES: dict[str, tuple[str, float, tuple[float, ...]]] = {
    "Gilmore12": ("e94311289f272c47c0c21047eb39fe299aa29871e4e4eeebddfeebcd04517f84", 1e4, (-3.0, 0.0, 3.0, 5.0)),
    "Dominguez11": ("bfa55ed852c5f935a52ad389cd6c7bcbd4e1869f5f79d82bdff460441a4868e5", 1e4, (-3.0, 0.0, 3.0, 5.0)),
    "Kneiske04": ("2d5d3b52cdc91c9b4611287a39e658122a528e8c0c4b46ab8276f5ec4966f90c", 1e5, (-3.0, 0.0, 3.0, 5.0)),
}
SPECIES = (("h", 1), ("he", 4), ("n", 14), ("si", 28), ("fe", 56))
HUBBLE_KM_S_MPC, OMEGA_M, LIGHT_KM_S = 67.3, 0.315, 299792.458
FORMULA = "K[A][E_in, group, E_out] = sum_d d * dln(d) * (1+z_d)^(m-1) * n * F[A][E_in, d, group, E_out], d in Mpc"
DATA = Path(__file__).resolve().parent.parent / "simulators" / "data"


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can build numpy arrays and nothing else."""

    _allowed = frozenset({"_reconstruct", "ndarray", "dtype", "scalar"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self._allowed:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"the source file asks for {module}.{name}; expected numpy arrays only")


def redshift(distance_mpc: Array) -> Array:
    """Redshift z of comoving distances (n,) in Mpc: d(z) = c/H0 * integral_0^z dz' / sqrt(Om (1+z')^3 + 1 - Om)."""
    z = np.linspace(0.0, 1.0, 20001)
    inverse = 1.0 / np.sqrt(OMEGA_M * (1 + z) ** 3 + 1 - OMEGA_M)
    steps = 0.5 * (inverse[1:] + inverse[:-1]) * np.diff(z)
    comoving = LIGHT_KM_S / HUBBLE_KM_S_MPC * np.concatenate([[0.0], np.cumsum(steps)])
    return np.interp(distance_mpc, comoving, z)


def read_tensors(wheel: Path, ebl: str) -> tuple[dict[str, Array], Array, Array]:
    """Read (F per element (125, 100, 5, 125), lg E bin edges (126,), distances in Mpc (100,)) after checking the SHA-256."""
    with zipfile.ZipFile(wheel) as outer:
        raw = outer.read(MEMBER.format(ebl=ebl))
    got = hashlib.sha256(raw).hexdigest()
    if got != SOURCES[ebl][0]:
        raise SystemExit(f"{wheel}: {MEMBER.format(ebl=ebl)} has SHA-256 {got}; expected {SOURCES[ebl][0]}")
    with zipfile.ZipFile(io.BytesIO(raw)) as inner:
        edges = np.lib.format.read_array(io.BytesIO(inner.read("log10e_bins.npy")))
        distances = np.lib.format.read_array(io.BytesIO(inner.read("distances.npy")))
        stream = io.BytesIO(inner.read("fractions.npy"))
    version = np.lib.format.read_magic(stream)
    (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(stream)
    holder = _ArraysOnly(stream, encoding="latin1").load()
    return holder.item(), edges, distances


def collapse(tensors: dict[str, Array], distances: Array, per_unit: float, evolutions: Sequence[float]) -> NDArray[np.float32]:
    """Sum over distance -> K (len(evolutions), species 5, E_in 125, group 5, E_out 125) in Mpc, float32."""
    step = np.log(distances[-1] / distances[0]) / (distances.size - 1)
    shells = distances * step * (1 + redshift(distances)) ** (np.asarray(evolutions, dtype=np.float64)[:, None] - 1)
    out = np.empty((len(evolutions), len(SPECIES), 125, 5, 125), dtype=np.float32)
    for a, (name, mass) in enumerate(SPECIES):
        tensor = tensors[name] * per_unit
        most = tensor.sum(axis=(2, 3)).max()
        if abs(most - mass) > 1e-3:
            raise SystemExit(f"a nucleus of {name} leaves up to {most:.4f} fragments; expected {mass} (is the unit of F wrong?)")
        for k, weights in enumerate(shells):
            total = np.zeros((125, 5, 125))
            for d, weight in enumerate(weights):  # a fixed order of summation: the same bytes with every BLAS
                total += weight * tensor[:, d]
            out[k, a] = total
    return out


def content_sha256(arrays: dict[str, NDArray[Any]]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the arrays: the same for every version of zlib."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_npz(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a compressed npz with fixed time stamps (same arrays, same bytes), atomically."""
    with open_aside(path) as file, zipfile.ZipFile(file, "w", compression=zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for name in sorted(arrays):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            out.writestr(entry, buffer.getvalue())


def build(wheel: Path, ebl: str, evolutions: Sequence[float]) -> dict[str, NDArray[Any]]:
    """The arrays of one data file: matrix, evolution, lg_energy_edges, provenance (JSON text as bytes)."""
    tensors, edges, distances = read_tensors(wheel, ebl)
    provenance = {
        "source": f"{WHEEL}: {MEMBER.format(ebl=ebl)}",
        "source_sha256": SOURCES[ebl][0],
        "origin": "CRPropa 3 simulations distributed with astrotools 1.5.0, RWTH Aachen (https://pypi.org/project/astrotools/)",
        "licence": "MIT",
        "ebl": ebl,
        "formula": FORMULA,
        "n": SOURCES[ebl][1],
        "cosmology": f"d comoving, flat, H0 = {HUBBLE_KM_S_MPC} km/s/Mpc, Omega_m = {OMEGA_M}",
        "axes": "matrix[m, species (H, He, N, Si, Fe), E_in, group (Z = 1, 2, 7, 14, 26), E_out], Mpc",
    }
    return {
        "matrix": collapse(tensors, distances, SOURCES[ebl][1], evolutions),
        "evolution": np.asarray(evolutions, dtype=np.float64),
        "lg_energy_edges": np.round(np.asarray(edges, dtype=np.float64), 6),
        "provenance": np.frombuffer(json.dumps(provenance, sort_keys=True).encode(), dtype=np.uint8),
    }


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), "astrotools==1.5.0"]
    subprocess.run(command, check=True)
    return folder / WHEEL


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "propagation.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Build or check the data files; returns the exit status."""
    parser = argparse.ArgumentParser(description="Collapse the CRPropa 3 tensors of astrotools 1.5.0 to simulators/data/propagation_*.npz.")
    parser.add_argument("wheel", nargs="?", type=Path, help=f"path of {WHEEL}; without it pip downloads it into a temporary folder")
    parser.add_argument("--ebl", nargs="+", choices=list(SOURCES), default=list(SOURCES), help="models of the background light")
    parser.add_argument("--evolution", nargs="+", type=float, help="source evolutions m to store (default: as shipped)")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to")
    parser.add_argument("--check", action="store_true", help="compare with the recorded content hashes and write nothing")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = args.wheel or _download(Path(temporary))
        if not wheel.is_file():
            parser.error(f"{wheel} is no file; expected the path of {WHEEL}")
        got = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if got != WHEEL_SHA256:
            parser.error(f"{wheel} has SHA-256 {got}; expected {WHEEL_SHA256}")
        return _build_all(wheel, args)


def _build_all(wheel: Path, args: argparse.Namespace) -> int:
    manifest = _manifest(args.out)
    for ebl in args.ebl:
        arrays = build(wheel, ebl, sorted(set(args.evolution or SOURCES[ebl][2])))
        name, content = f"propagation_{ebl}.npz", content_sha256(arrays)
        if args.check:
            recorded = manifest.get(name, {}).get("content_sha256")
            print(f"{name}: {'matches' if recorded == content else f'DIFFERS: built {content}, recorded {recorded}'}")
            if recorded != content:
                return 1
            continue
        write_npz(args.out / name, arrays)
        blob = (args.out / name).read_bytes()
        manifest[name] = {
            "sha256": hashlib.sha256(blob).hexdigest(),
            "content_sha256": content,
            "bytes": len(blob),
            "evolution": arrays["evolution"].tolist(),
            "source_sha256": SOURCES[ebl][0],
        }
        print(f"{name}: {len(blob) / 1e3:.0f} kB, m = {arrays['evolution'].tolist()}, content {content}")
    if not args.check:
        write_aside(args.out / "propagation.json", json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
