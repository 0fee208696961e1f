"""Ridge regression on design rows by orthogonal factors, never by normal equations.

A QR decomposition of the rows gives an orthonormal basis of what they span, and the singular values
of its small triangular factor the solution.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from varprox.precision import full_products


class Span(NamedTuple):
    """What rows span: U = rows S with S Sᵀ = (rowsᵀ rows + α I)⁻¹.

    Where α is zero U is orthonormal to rounding, however ill-conditioned the rows are: a product
    of rows and S would not be.
    """

    q: jax.Array  # (batch, columns), orthonormal
    turn: jax.Array  # (columns, columns), with U = q · turn
    inverse_root: jax.Array  # (columns, columns), S

    @property
    def basis(self) -> jax.Array:
        """U (batch, columns); columns that the rows do not determine are zero."""
        return self.q @ self.turn


class Ridge(NamedTuple):
    """The minimiser of ½‖rows w − targets‖² + ½ α ‖w‖²."""

    w: jax.Array  # (columns, outputs)
    residual: jax.Array  # (batch, outputs): rows w − targets, to rounding of the targets
    span: Span


@full_products
def span(rows: jax.Array, alpha) -> Span:
    """What rows (batch, columns) span, fewer or more than there are columns.

    Directions that they do not determine to working precision count as none.
    """
    q, factor = jnp.linalg.qr(rows)
    missing = rows.shape[1] - len(factor)
    u, s, vt = jnp.linalg.svd(jnp.pad(factor, ((0, missing), (0, 0))))
    unit = jnp.where(s[0] > 0, s[0], 1)  # in which no square underflows
    curvature = (s / unit) ** 2 + alpha / unit / unit
    keep = curvature > (len(s) * jnp.finfo(s.dtype).eps) ** 2
    root = jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, curvature, 1)) / unit, 0)
    return Span(jnp.pad(q, ((0, 0), (0, missing))), u * (s * root)[None], vt.T * root[None])


@full_products
def ridge(rows: jax.Array, targets: jax.Array, alpha, offset: jax.Array | float = 0.0) -> Ridge:
    """Solves the ridge problem for the targets rows · offset + `targets`; α = 0 gives the
    minimum-norm solution.

    The residual is formed without w: where the rows are ill-conditioned w is large, and rows times
    w is known to rounding of their products only. `offset` (columns, outputs) is for what is large
    beside the rest of the targets, and known to be spanned by the rows, such as their mean.
    """
    found = span(rows, alpha)
    inside = found.turn.T @ (found.q.T @ targets)
    if jnp.ndim(offset):
        norms = jnp.linalg.norm(found.inverse_root, axis=0, keepdims=True)
        axes = found.inverse_root / jnp.where(norms > 0, norms, 1)
        inside = inside - alpha * (found.inverse_root.T @ offset)
        # Of the minimum norm is only what the rows determine.
        offset = jnp.where(jnp.all(norms > 0), offset, axes @ (axes.T @ offset))
    residual = found.q @ (found.turn @ inside) - targets
    return Ridge(offset + found.inverse_root @ inside, residual, found)
