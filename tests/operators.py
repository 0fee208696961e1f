"""Symmetric matrices that Krylov spaces are built with."""

import jax.numpy as jnp
import numpy as np

SIZE = 12


def never(tridiagonal, memory):
    return jnp.array(False), memory


def operator(kind, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    eigenvalues = {
        "definite": np.linspace(1, 5, SIZE),
        "indefinite": np.linspace(-3, 5, SIZE),
        "ill-conditioned": np.logspace(0, -12, SIZE),
        "clustered": 1 + 1e-6 * np.arange(SIZE),
    }[kind]
    return q * eigenvalues @ q.T, rng.normal(size=SIZE)
