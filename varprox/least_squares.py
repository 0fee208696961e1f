"""Ridge regression on design rows by orthogonal factors, never by normal equations.

Rows enter through the triangular factor of a QR decomposition, which can be accumulated over chunks
of samples or over devices; singular values of that small factor give the solution. Imports nothing
of the package.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ridge(NamedTuple):
    """The minimiser of ½‖rows w − targets‖² + ½ α ‖w‖², and a root of its inverse Hessian."""

    w: jax.Array  # (columns, outputs)
    inverse_root: jax.Array  # (columns, columns), S with S Sᵀ = (rowsᵀ rows + α I)⁻¹


class Span(NamedTuple):
    """U = rows S for the S of `Ridge`, orthonormal to rounding where α is zero, however
    ill-conditioned the rows are: rows times S would not be."""

    basis: jax.Array  # (batch, columns), U; columns that the rows do not determine are zero
    inverse_root: jax.Array  # (columns, columns), S


def triangular_factor(rows: jax.Array, targets: jax.Array) -> jax.Array:
    """The triangular factor of [rows, targets], zero-padded to (columns + outputs) square.

    Factors of two chunks combine into that of their union: `triangular_factor` of the two stacked.
    """
    stacked = jnp.concatenate([rows, targets], axis=1)
    factor = jnp.linalg.qr(stacked, mode="r")
    return jnp.pad(factor, ((0, stacked.shape[1] - factor.shape[0]), (0, 0)))


def ridge(factor: jax.Array, columns: int, alpha) -> Ridge:
    """Solves the ridge problem from the triangular factor of [rows, targets].

    Directions that the rows do not determine to working precision get zero weight, so that α = 0
    gives the minimum-norm solution, and `inverse_root` the pseudo-inverse.
    """
    u, s, vt = jnp.linalg.svd(factor[:columns, :columns])
    root = _inverse_root(s, alpha)
    w = vt.T @ ((root**2 * s)[:, None] * (u.T @ factor[:columns, columns:]))
    return Ridge(w, vt.T * root)


def span(rows: jax.Array, alpha) -> Span:
    """What the rows span; of rows (batch, columns), with fewer or more rows than columns."""
    q, factor = jnp.linalg.qr(rows)
    missing = rows.shape[1] - len(factor)
    u, s, vt = jnp.linalg.svd(jnp.pad(factor, ((0, missing), (0, 0))))
    root = _inverse_root(s, alpha)
    return Span(jnp.pad(q, ((0, 0), (0, missing))) @ u * (s * root), vt.T * root)


def _inverse_root(s, alpha):
    """(s² + α)^{−½}, and zero where that is more than what rounding leaves of singular values."""
    curvature = s**2 + alpha
    cutoff = (len(s) * jnp.finfo(s.dtype).eps * s[0]) ** 2
    keep = curvature > cutoff
    return jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, curvature, 1)), 0)
