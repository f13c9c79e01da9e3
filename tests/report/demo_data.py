"""Synthetic posterior of nine parameters shaped like the real one: a lower mode, a simplex with edges, two nuisances."""

import numpy as np

from sbi_phys.priors import Parameter

PARAMETERS = (
    Parameter("gamma", -3, 2.5, "", r"\gamma"),
    Parameter("lg_rcut", 17.8, 20, "lg V", r"\lg R_\mathrm{cut}"),
    *(Parameter(f"f_{e.lower()}", 0, 1, "", rf"f_\mathrm{{{e}}}") for e in ("H", "He", "N", "Si", "Fe")),
    Parameter("nu_energy", latex=r"\nu_E"),
    Parameter("nu_xmax", latex=r"\nu_{X_\mathrm{max}}"),
)
PUBLISHED = [
    {
        "label": "CTG 1st",
        "source": "arXiv:1612.07155",
        "theta": {"gamma": -1.03, "lg_rcut": 18.21, "f_h": 0.6794, "f_he": 0.31, "f_n": 0.01, "f_si": 0.0006, "f_fe": 0.0},
    },
    {"label": "far away", "source": "test", "theta": {"gamma": 2.4, "lg_rcut": 19.9}, "errors": {"gamma": (0.1, 0.2)}},
]


def draws(n, rng, scale=1.0, shift=0.0):
    gamma = rng.normal(-1.0 + shift, 0.35 * scale, n)
    lg_rcut = 18.21 + 0.08 * (gamma + 1) + rng.normal(0, 0.03 * scale, n)
    gamma = np.where(rng.random(n) < 0.08, rng.normal(0.8, 0.15, n), gamma)
    lg_rcut = np.where(gamma > 0.4, 18.62 + 0.02 * rng.normal(size=n), lg_rcut)
    nuisance = rng.normal(0, [0.8 * scale, 0.9 * scale], (n, 2))
    return np.column_stack([gamma, lg_rcut, rng.dirichlet([5, 6, 2, 0.35, 0.25], n), nuisance])


def history(members, epochs, rng):
    return [
        [
            {
                "epoch": e + 1,
                "train": 3 * np.exp(-e / 4) + 1.2 - 0.004 * e,
                "valid": 3 * np.exp(-e / 4) + 1.25 + 0.03 * rng.normal(),
                "learning_rate": 5e-4 * 0.5 ** (e // 20),
                "seconds": 2.1 + 0.1 * rng.random(),
            }
            for e in range(epochs)
        ]
        for _ in range(members)
    ]
