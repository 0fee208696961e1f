"""The Gauss–Newton matrix of the reduced objective, formed instead of multiplied with.

In the notation of `varprox.curvature`, with K v = dZ W, A v = dZᵀ G and B v = Zᵀ Q dZ W, it is

    Kᵀ Q K − Bᵀ H⁻¹ B + Aᵀ H⁻¹ A + ∇²R  =  Jᵀ Q J + α₂ J_Wᵀ J_W + ∇²R,

where J = K − Z H⁻¹ (A + B) and J_W = −H⁻¹ (A + B). K takes one reverse pass for each sample and
output, and gives the gradient Kᵀ G + ∇R, too. A takes one pass of the whole batch for each entry of
W. It is of the size of the residual, and Kaufman's approximation leaves it out; what is left is the
Schur complement of the Gauss–Newton matrix in θ and W together. Imports model and projection.
Source: Kaufman, BIT 15 (1975).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from varprox.model import Problem
from varprox.projection import Factor

BLOCK_BYTES = 2**22  # of rows of K that are held at a time


def gauss_newton_matrix(
    problem: Problem, theta: Any, data: tuple, w: jax.Array, factor: Factor, *, kaufman: bool
) -> tuple[jax.Array, jax.Array]:
    """The reduced gradient (size,) and the Gauss–Newton matrix (size, size), in the order of
    `ravel_pytree`; the latter without A if `kaufman`.

    `factor` is that of ∇²_W Φ at `w` = W(θ), exact. Beside the matrix this holds at most
    `BLOCK_BYTES` of rows of K, or those of one sample where they are longer.
    """
    flat, unravel = ravel_pytree(theta)
    samples, outputs = data[1].shape
    blocks = -(-samples // max(1, BLOCK_BYTES // (outputs * flat.nbytes)))
    size = -(-samples // blocks)

    def add(total, index):
        # The last block is filled up with repeated samples, which must not count.
        chosen, counts = jnp.minimum(index, samples - 1), index < samples
        gradient, k, weights = _rows(problem, theta, data, w, chosen, counts)
        return jax.tree.map(jnp.add, total, (gradient, k.T @ k, weights.T @ k)), None

    nothing = [jnp.zeros((*n, flat.size), flat.dtype) for n in ((), (flat.size,), (w.size,))]
    index = np.arange(blocks * size, dtype=np.int32).reshape(blocks, size)
    sums, _ = jax.lax.scan(add, tuple(nothing), index)
    gradient, matrix, b = (total / samples for total in sums)

    matrix = matrix - _squared(factor, b)
    if not kaufman:
        matrix = matrix + _squared(factor, _residual_rows(problem, theta, data, w))
    penalty = lambda flat: problem.penalty(unravel(flat))  # noqa: E731
    return gradient + jax.grad(penalty)(flat), matrix + jax.hessian(penalty)(flat)


def gauss_newton_root(
    problem: Problem, theta: Any, data: tuple, w: jax.Array, factor: Factor, *, kaufman: bool
) -> tuple[jax.Array, jax.Array]:
    """The reduced gradient (size,) and a root M (rows, size) of the Gauss–Newton matrix, which is
    Mᵀ M + ∇²R; there is a row for each sample and output and for each entry of W.

    Arguments are those of `gauss_newton_matrix`. M is held as a whole.
    """
    flat, unravel = ravel_pytree(theta)
    samples = len(data[1])
    everything = np.arange(samples)
    gradient, k, weights = _rows(problem, theta, data, w, everything, everything < samples)
    right = weights.T @ k / samples
    if not kaufman:
        right = right + _residual_rows(problem, theta, data, w)
    dw = -jax.vmap(lambda x: factor.root(factor.transposed_root(x)), 1, 1)(right)
    penalty_gradient = jax.grad(lambda flat: problem.penalty(unravel(flat)))(flat)
    j = (k + weights @ dw) / samples**0.5
    root = jnp.concatenate([j, jnp.sqrt(problem.w_penalty) * dw])
    return gradient / samples + penalty_gradient, root


def _rows(problem, theta, data, w, index, counts):
    """For the samples at `index`, those only that count: the gradient of the sum of their own
    losses, Lᵀ K (rows, size) for a root L of the curvature of each one's loss, and Lᵀ ⊗ zᵀ (rows,
    entries of W output by output), which gives L Lᵀ K ⊗ z."""
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
    return gradient, rooted.reshape(-1, k.shape[-1]), weights.reshape(-1, w.size)


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
