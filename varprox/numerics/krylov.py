"""Lanczos tridiagonalisation of a symmetric operator, with full reorthogonalisation.

Works on flat vectors and knows nothing of what the operator is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Tridiagonal(NamedTuple):
    """An operator seen in a Krylov space: basisᵀ H basis, zero beyond the first `size` entries."""

    diagonal: jax.Array  # (rank,)
    off_diagonal: jax.Array  # (rank,), entry j couples j and j + 1
    size: jax.Array  # (), the dimension reached


class KrylovSpace(NamedTuple):
    """span{g, H g, …, H^{size−1} g} with an orthonormal basis whose first vector is g / ‖g‖."""

    basis: jax.Array  # (rank, n), rows beyond `size` are zero
    tridiagonal: Tridiagonal
    start_norm: jax.Array  # ‖g‖


def norm(x: jax.Array) -> jax.Array:
    """‖x‖, whose squares neither overflow nor underflow."""
    most = jnp.max(jnp.abs(x), initial=0)
    unit = jnp.where((most > 0) & jnp.isfinite(most), most, 1)
    return unit * jnp.linalg.norm(x / unit)


def after(done: jax.Array, x: jax.Array) -> jax.Array:
    """x, but known only once `done` is, a number ≥ 0.

    Under `vmap` on CPU two factorisations that run at once can wait for one another for ever inside
    jaxlib, and an optimisation barrier between them is gone by then.
    """
    return jnp.where(done < 0, jnp.nan, x)


def lanczos(
    matvec: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    rank: int,
    stop: Callable[[Tridiagonal, Any], tuple[jax.Array, Any]],
    memory: Any,
) -> KrylovSpace:
    """Builds a Krylov space of at most `rank` dimensions with one product each.

    After every product `finished, memory = stop(tridiagonal, memory)` may end the iteration; it
    also ends where the space is invariant to working precision or a product is not finite. Each new
    vector is orthogonalised twice against all before it. Source: Golub and Van Loan, Matrix
    Computations, 10.3.
    """
    eps = jnp.finfo(start.dtype).eps
    start_norm = norm(start)
    zeros = jnp.zeros(rank, start.dtype)

    def extend(carry):
        v, basis, t, scale, _, memory = carry
        k = t.size
        basis = basis.at[k].set(v)
        product = matvec(v)
        diagonal = t.diagonal.at[k].set(v @ product)
        scale = jnp.maximum(scale, norm(product))
        for _ in range(2):
            product = product - basis.T @ (basis @ product)
        coupling = norm(product)
        invariant = ~(coupling > 10 * rank * eps * scale)  # also where it is not a number
        t = Tridiagonal(diagonal, t.off_diagonal.at[k].set(coupling), k + 1)
        finished, memory = stop(t, memory)
        v = product / jnp.where(invariant, 1, coupling)
        return v, basis, t, scale, finished | invariant, memory

    def unfinished(carry):
        _, _, t, _, finished, _ = carry
        return ~finished & (t.size < rank)

    carry = (
        start / jnp.where(start_norm > 0, start_norm, 1),
        jnp.zeros((rank, start.size), start.dtype),
        Tridiagonal(zeros, zeros, jnp.zeros((), jnp.int32)),
        jnp.zeros((), start.dtype),
        ~(start_norm > 0),
        memory,
    )
    _, basis, t, _, _, _ = jax.lax.while_loop(unfinished, extend, carry)
    return KrylovSpace(basis, t, start_norm)


def dense(t: Tridiagonal) -> jax.Array:
    """The tridiagonal matrix; its unused rows are decoupled and never hold the least eigenvalue."""
    index = jnp.arange(len(t.diagonal), dtype=jnp.int32)
    diagonal = jnp.where(index < t.size, t.diagonal, jnp.max(jnp.abs(t.diagonal)))
    coupling = jnp.where(index < t.size - 1, t.off_diagonal, 0)[:-1]
    return jnp.diag(diagonal) + jnp.diag(coupling, 1) + jnp.diag(coupling, -1)
