"""What the Krylov spaces of earlier iterations tell of the curvature, kept as a preconditioner.

From one outer iteration to the next the Hessian changes little, so the directions in which a Krylov
space has found it large need not be found again. Works on flat vectors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from varprox.numerics.krylov import KrylovSpace, dense


class Recycled(NamedTuple):
    """A symmetric positive definite P = I − Vᵀ diag(s) V, an approximate inverse of the Hessian up
    to a factor; V has orthonormal rows, and 0 ≤ s < 1."""

    basis: jax.Array  # (memory, n), V; rows whose s is zero may be anything
    shrinkage: jax.Array  # (memory,), s

    def root(self, x: jax.Array) -> jax.Array:
        """P^½ x."""
        return x - ((1 - jnp.sqrt(1 - self.shrinkage)) * (self.basis @ x)) @ self.basis

    def inverse_root(self, x: jax.Array) -> jax.Array:
        """P^−½ x."""
        return x + ((jax.lax.rsqrt(1 - self.shrinkage) - 1) * (self.basis @ x)) @ self.basis


def nothing_yet(memory: int, like: jax.Array) -> Recycled:
    """P = I for vectors such as `like`, with room for `memory` directions, or for all there are."""
    memory = min(memory, like.size)
    return Recycled(jnp.zeros((memory, like.size), like.dtype), jnp.zeros(memory, like.dtype))


def recycle(old: Recycled, space: KrylovSpace) -> Recycled:
    """P after a Krylov space for P^½ H P^½, which its Ritz pairs (λ, u) flatten further.

    P ← P^½ (I − Σ (1 − λ₁/|λ|) u uᵀ) P^½, λ₁ being the least |λ|: the curvature in all Ritz
    directions becomes that of the flattest. Of what has come together, the directions that P
    shrinks most are kept. Source: the spectral limited-memory preconditioner of Gratton, Sartenaer
    and Tshimanga, SIAM J. Optim. 21 (2011); and Morales and Nocedal, SIAM J. Optim. 10 (2000), for
    keeping it between iterations.
    """
    eigenvalues, q = jnp.linalg.eigh(dense(space.tridiagonal))
    curvature = jnp.abs(eigenvalues)
    directions = q.T @ space.basis
    used = jnp.sum(directions**2, axis=1) > 0.5
    eps = jnp.finfo(curvature.dtype).eps
    least = jnp.min(curvature, initial=jnp.inf, where=used)
    # Less curvature than this is rounding.
    least = jnp.maximum(least, eps**0.5 * jnp.max(curvature))
    flattened = jnp.where(used & (curvature > least), 1 - least / curvature, 0)
    added = jnp.sqrt(flattened)[:, None] * jax.vmap(old.root)(directions)

    # Together they are Bᵀ B, whose eigenpairs are also those of B Bᵀ.
    together = jnp.concatenate([jnp.sqrt(old.shrinkage)[:, None] * old.basis, added])
    wide = len(together) < together.shape[1]
    shrinkage, q = jnp.linalg.eigh(together @ together.T if wide else together.T @ together)
    first = len(shrinkage) - len(old.shrinkage)
    shrinkage, q = shrinkage[first:], q[:, first:]
    known = shrinkage > 1e3 * eps
    basis = (q.T @ together) / jnp.sqrt(jnp.where(known, shrinkage, 1))[:, None] if wide else q.T
    # Rounding blurs how little of a direction is left.
    return Recycled(basis, jnp.where(known, jnp.minimum(shrinkage, 1 - eps**0.5), 0))
