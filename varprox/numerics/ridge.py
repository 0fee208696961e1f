"""Ridge regression on design rows by orthogonal factors, never by normal equations.

A QR decomposition of the rows gives an orthonormal basis of what they span, and the singular values
of its small triangular factor the solution. Where there are many devices, each factorises a block
of the rows, and only the triangular factors meet. Source: Demmel, Grigori, Hoemmen, Langou, SIAM J.
Sci. Comput. 34 (2012).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from varprox.numerics.krylov import after
from varprox.precision import full_products


class Span(NamedTuple):
    """What rows span: U = rows S with S Sᵀ = (rowsᵀ rows + α I)⁻¹.

    Where α is zero U is orthonormal to rounding, however ill-conditioned the rows are: a product
    of rows and S would not be.
    """

    q: jax.Array  # (blocks, batch / blocks, columns), each block orthonormal
    turn: jax.Array  # (blocks, columns, columns), with q · turn the blocks of U
    inverse_root: jax.Array  # (columns, columns), S

    @property
    def basis(self) -> jax.Array:
        """U (batch, columns); columns that the rows do not determine are zero."""
        *each, _, _, columns = self.q.shape
        return (self.q @ self.turn).reshape(*each, -1, columns)

    def inward(self, x: jax.Array) -> jax.Array:
        """Uᵀ x (columns, outputs), for x (batch, outputs)."""
        x = x.reshape(len(self.q), -1, x.shape[1])
        return jnp.sum(self.turn.mT @ jnp.einsum("bnk,bno->bko", self.q, x), axis=0)

    def outward(self, y: jax.Array) -> jax.Array:
        """U y (batch, outputs), for y (columns, outputs)."""
        return (self.q @ (self.turn @ y)).reshape(-1, y.shape[1])


class Ridge(NamedTuple):
    """The minimiser of ½‖rows w − targets‖² + ½ α ‖w‖²."""

    w: jax.Array  # (columns, outputs)
    residual: jax.Array  # (batch, outputs): rows w − targets, to rounding of the targets
    span: Span


def _blocks(rows):
    """The rows (blocks, batch / blocks, columns), with one block for each device, as far as their
    number divides.

    A device factorises its own block, and as all others do what is left of all: `columns` rows of
    each. Where these are more than half of the rows, little is gained, and there is one block.
    """
    batch, columns = rows.shape
    blocks = math.gcd(batch, jax.device_count())
    return rows.reshape(1 if batch < 2 * blocks * columns else blocks, -1, columns)


def fewer(rows: jax.Array) -> jax.Array:
    """Rows with the same Gram matrix: the triangular factors of the blocks where there are some."""
    blocks = _blocks(rows)
    if len(blocks) == 1:
        return rows
    return jnp.linalg.qr(blocks, mode="r").reshape(-1, rows.shape[1])


@full_products
def compressed(rows: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """At most as many rows as columns, and targets, with the same solutions: R and Qᵀ targets for
    the rows Q R."""
    q, top, factor = _factorised(rows)
    split = targets.reshape(len(q), -1, targets.shape[1])
    inside = jnp.einsum("bnk,bno->bko", q, split)
    return factor, jnp.sum(inside if top is None else top.mT @ inside, axis=0)


def _factorised(rows):
    """Q (blocks, batch / blocks, k), T (blocks, k, k) and R (k, columns): the rows are the blocks
    Q · T, stacked, times R. These blocks together are orthonormal, as each one of Q is. For a
    single block there is no T."""
    blocks = _blocks(rows)
    if len(blocks) == 1:  # which a batch of one would take longer
        q, factor = jnp.linalg.qr(rows)
        return q[None], None, factor
    q, factors = jnp.linalg.qr(blocks)
    stacked = after(jnp.abs(q[0, 0, 0]), factors).reshape(-1, rows.shape[1])
    top, factor = jnp.linalg.qr(stacked)
    return q, top.reshape(factors.shape), factor


@full_products
def span(rows: jax.Array, alpha) -> Span:
    """What rows (batch, columns) span, fewer or more than there are columns.

    Directions that they do not determine to working precision count as none.
    """
    q, top, factor = _factorised(rows)
    missing = rows.shape[1] - len(factor)
    u, s, vt = jnp.linalg.svd(jnp.pad(factor, ((0, missing), (0, 0))))
    unit = jnp.where(s[0] > 0, s[0], 1)  # in which no square underflows
    curvature = (s / unit) ** 2 + alpha / unit / unit
    keep = curvature > (len(s) * jnp.finfo(s.dtype).eps) ** 2
    root = jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, curvature, 1)) / unit, 0)
    turn = u * (s * root)[None]
    turn = turn[None] if top is None else top @ turn
    return Span(jnp.pad(q, ((0, 0), (0, 0), (0, missing))), turn, vt.T * root[None])


@full_products
def ridge(rows: jax.Array, targets: jax.Array, alpha, offset: jax.Array | float = 0.0) -> Ridge:
    """Solves the ridge problem for the targets rows · offset + `targets`; α = 0 gives the
    minimum-norm solution.

    The residual is formed without w: where the rows are ill-conditioned w is large, and rows times
    w is known to rounding of their products only. What rounding leaves of the residual in the span
    of the rows is projected out once more, as derivatives may be large there: in single precision
    GNvpro's dense form ends 1.3 to 2 times lower by it on Peaks. `offset` (columns, outputs) is for
    what is large beside the rest of the targets, and known to be spanned by the rows, such as their
    mean.
    """
    found = span(rows, alpha)
    inside = found.inward(targets)
    if jnp.ndim(offset):
        norms = jnp.linalg.norm(found.inverse_root, axis=0, keepdims=True)
        axes = found.inverse_root / jnp.where(norms > 0, norms, 1)
        inside = inside - alpha * (found.inverse_root.T @ offset)
        # Of the minimum norm is only what the rows determine.
        offset = jnp.where(jnp.all(norms > 0), offset, axes @ (axes.T @ offset))
    residual = found.outward(inside) - targets
    w = offset + found.inverse_root @ inside
    left = found.inward(residual) + alpha * (found.inverse_root.T @ w)
    residual = residual - found.outward(left)
    return Ridge(w - found.inverse_root @ left, residual, found)


def ridge_of_each(rows: jax.Array, targets: jax.Array, alpha, offset) -> Ridge:
    """`ridge` with rows (outputs, batch, columns) of its own for each output."""

    def alone(rows, column, offset):
        return ridge(rows, column[:, None], alpha, offset[:, None] if jnp.ndim(offset) else offset)

    found = jax.vmap(alone, (0, 1, 1 if jnp.ndim(offset) else None))(rows, targets, offset)
    return Ridge(found.w[..., 0].T, found.residual[..., 0].T, found.span)
