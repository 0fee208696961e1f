"""The Gauss–Newton matrix of the reduced objective, formed instead of multiplied with.

In the notation of `varprox.curvature`, with K v = dZ W, A v = dZᵀ G and B v = Zᵀ Q dZ W, it is

    Kᵀ Q K − Bᵀ H⁻¹ B + Aᵀ H⁻¹ A + ∇²R  =  Jᵀ Q J + α₂ J_Wᵀ J_W + ∇²R,

where J = K − Z H⁻¹ (A + B) and J_W = −H⁻¹ (A + B). K takes one reverse pass for each sample and
output, and gives the gradient Kᵀ G + ∇R, too. A takes one pass of the whole batch for each entry of
W. It is of the size of the residual, and Kaufman's approximation leaves it out; what is left is the
Schur complement of the Gauss–Newton matrix in θ and W together. Imports model and projection.
Source: Kaufman, BIT 15 (1975).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from varprox.model import Problem
from varprox.projection import Factor, to_flat

BLOCK_BYTES = 2**22  # of rows of K that are held at a time
KEPT_BYTES = 2**27  # of rows of K that are kept for `Transposed` products
Transposed = Callable[[jax.Array, jax.Array], jax.Array]


def gauss_newton_matrix(
    problem: Problem, theta: Any, data: tuple, w: jax.Array, factor: Factor, *, kaufman: bool
) -> tuple[jax.Array, jax.Array, Transposed | None]:
    """The reduced gradient (size,) and the Gauss–Newton matrix (size, size), in the order of
    `ravel_pytree`; the latter without A if `kaufman`.

    `factor` is that of ∇²_W Φ at `w` = W(θ), exact. Third comes the map (G, W) ↦ Jᵀ G + α₂ J_Wᵀ W,
    (batch, outputs) and (columns, outputs) to (size,), which takes no pass of the network, where
    the rows of K have no more than `KEPT_BYTES`, else None. Beside the matrix and what this map
    keeps at most `BLOCK_BYTES` of rows of K are held, or those of one sample where they are longer.
    """
    flat, unravel = ravel_pytree(theta)
    samples, outputs = data[1].shape
    keep = data[1].size * flat.nbytes <= KEPT_BYTES
    blocks = -(-samples // max(1, BLOCK_BYTES // (outputs * flat.nbytes)))
    size = -(-samples // blocks)

    def add(total, index):
        # The last block is filled up with repeated samples, which must not count.
        chosen, counts = jnp.minimum(index, samples - 1), index < samples
        rows = _rows(problem, theta, data, w, chosen, counts)
        k, weights = rows.rooted, rows.weights
        total = jax.tree.map(jnp.add, total, (rows.gradient, k.T @ k, weights.T @ k))
        return total, (rows.k, rows.z) if keep else None

    nothing = [jnp.zeros((*n, flat.size), flat.dtype) for n in ((), (flat.size,), (w.size,))]
    index = np.arange(blocks * size, dtype=np.int32).reshape(blocks, size)
    sums, kept = jax.lax.scan(add, tuple(nothing), index)
    gradient, matrix, b = (total / samples for total in sums)

    matrix, right = matrix - _squared(factor, b), b
    if not kaufman:
        a = _residual_rows(problem, theta, data, w)
        matrix, right = matrix + _squared(factor, a), b + a
    penalty = lambda flat: problem.penalty(unravel(flat))  # noqa: E731
    gradient, matrix = gradient + jax.grad(penalty)(flat), matrix + jax.hessian(penalty)(flat)
    if not keep:
        return gradient, matrix, None

    k, z = (x.reshape(-1, *x.shape[2:])[:samples] for x in kept)
    return gradient, matrix, _transposed(problem, factor, k, z, right)


def gauss_newton_root(
    problem: Problem, theta: Any, data: tuple, w: jax.Array, factor: Factor, *, kaufman: bool
) -> tuple[jax.Array, jax.Array, Transposed]:
    """The reduced gradient (size,) and a root M (rows, size) of the Gauss–Newton matrix, which is
    Mᵀ M + ∇²R; there is a row for each sample and output and for each entry of W.

    Arguments and the third result are those of `gauss_newton_matrix`. M is held as a whole.
    """
    flat, unravel = ravel_pytree(theta)
    samples = len(data[1])
    everything = np.arange(samples)
    rows = _rows(problem, theta, data, w, everything, everything < samples)
    right = rows.weights.T @ rows.rooted / samples
    if not kaufman:
        right = right + _residual_rows(problem, theta, data, w)
    dw = -jax.vmap(lambda x: factor.root(factor.transposed_root(x)), 1, 1)(right)
    penalty_gradient = jax.grad(lambda flat: problem.penalty(unravel(flat)))(flat)
    j = (rows.rooted + rows.weights @ dw) / samples**0.5
    root = jnp.concatenate([j, jnp.sqrt(problem.w_penalty) * dw])
    gradient = rows.gradient / samples + penalty_gradient
    return gradient, root, _transposed(problem, factor, rows.k, rows.z, right)


def _transposed(problem, factor, k, z, right):
    """(G, W) ↦ Jᵀ G + α₂ J_Wᵀ W from K, Z and A + B."""

    def product(slopes, weights):
        y = factor.solve(z.T @ slopes + problem.w_penalty * weights)
        return jnp.tensordot(slopes, k, 2) - to_flat(y) @ right

    return product


class _Rows(NamedTuple):
    """Of some samples: the gradient of the sum of their losses, and with a root L of the curvature
    of each one's loss Lᵀ K and Lᵀ ⊗ zᵀ, which gives L Lᵀ K ⊗ z."""

    gradient: jax.Array
    k: jax.Array  # (samples, outputs, size)
    z: jax.Array  # (samples, columns)
    rooted: jax.Array  # (samples · outputs, size)
    weights: jax.Array  # (samples · outputs, entries of W output by output)


def _rows(problem, theta, data, w, index, counts):
    """Those of the samples at `index`, of which K is zero where they do not count."""
    units = jnp.eye(w.shape[1], dtype=w.dtype)

    def of_sample(sample):
        x, c = jax.tree.map(lambda leaf: leaf[None], sample)
        z, pullback = jax.vjp(lambda theta: problem.model.rows(theta, x), theta)
        k = jax.vmap(lambda unit: ravel_pytree(pullback(unit[None] @ w.T))[0])(units)
        root = jax.vmap(lambda unit: problem.loss.curvature_root(z @ w, c, unit[None])[0])(units)
        return z[0], problem.loss.gradient(z @ w, c)[0], root, k

    samples = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], data)
    z, slope, root, k = jax.vmap(of_sample)(samples)
    k = jnp.where(counts[:, None, None], k, 0)
    gradient = slope.reshape(-1) @ k.reshape(-1, k.shape[-1])
    rooted = k if problem.loss.quadratic else root @ k
    weights = root[:, :, :, None] * z[:, None, None, :]  # (samples, outputs, outputs, columns)
    rooted, weights = rooted.reshape(-1, k.shape[-1]), weights.reshape(-1, w.size)
    return _Rows(gradient, k, z, rooted, weights)


def _squared(factor, rows):
    """rowsᵀ H⁻¹ rows for rows (entries of W, size)."""
    rooted = jax.vmap(factor.transposed_root, 1, 1)(rows)
    return rooted.T @ rooted


def _residual_rows(problem, theta, data, w):
    """A, (entries of W output by output, size); one pass after the other, to save memory."""
    inputs, targets = data
    rows, pullback = jax.vjp(lambda theta: problem.model.rows(theta, inputs), theta)
    residual = problem.loss.gradient(rows @ w, targets)
    columns = jnp.eye(len(w), dtype=w.dtype)

    def of_entry(index):
        output, column = index
        return ravel_pytree(pullback(residual[:, output, None] * columns[column])[0])[0]

    return jax.lax.map(of_entry, np.divmod(np.arange(w.size, dtype=np.int32), np.int32(len(w))))
