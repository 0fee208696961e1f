"""The Gauss–Newton matrix of the reduced objective, formed instead of multiplied with.

In the notation of `varprox.curvature`, with K v = dZ W, A v = dZᵀ G and B v = Zᵀ Q dZ W, it is

    Kᵀ Q K − Bᵀ H⁻¹ B + Aᵀ H⁻¹ A + ∇²R  =  Jᵀ Q J + α₂ J_Wᵀ J_W + ∇²R,

where J = K − Z H⁻¹ (A + B) and J_W = −H⁻¹ (A + B). K takes one reverse pass for each sample and
output, A one of the whole batch for each entry of W; the reduced gradient is Aᵀ W + ∇R. Imports
model and projection.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from varprox.model import Problem
from varprox.projection import Factor, to_flat

BLOCK_BYTES = 2**22  # of rows of K that are held at a time


def gauss_newton_matrix(
    problem: Problem, theta: Any, data: tuple, w: jax.Array, factor: Factor
) -> tuple[jax.Array, jax.Array]:
    """The reduced gradient (size,) and the Gauss–Newton matrix (size, size), in the order of
    `ravel_pytree`.

    `factor` is that of ∇²_W Φ at `w` = W(θ), exact. Beside the matrix this holds at most
    `BLOCK_BYTES` of rows of K, or those of one sample where they are longer.
    """
    flat, unravel = ravel_pytree(theta)
    samples, outputs = data[1].shape
    blocks = -(-samples // max(1, BLOCK_BYTES // (outputs * flat.nbytes)))
    size = -(-samples // blocks)

    def add(total, index):
        z, root, k = _rooted_rows(problem, theta, data, w, jnp.minimum(index, samples - 1))
        # The last block is filled up with repeated samples, which must not count.
        k = jnp.where((index < samples)[:, None, None], k, 0).reshape(-1, flat.size)
        weights = root[:, :, :, None] * z[:, None, None, :]  # (batch, outputs, outputs, columns)
        return (total[0] + k.T @ k, total[1] + weights.reshape(len(k), -1).T @ k), None

    nothing = jnp.zeros((flat.size, flat.size), flat.dtype), jnp.zeros((w.size, flat.size), w.dtype)
    index = np.arange(blocks * size, dtype=np.int32).reshape(blocks, size)
    (matrix, b), _ = jax.lax.scan(add, nothing, index)

    a = _residual_rows(problem, theta, data, w)
    gradient = to_flat(w) @ a
    a, b = (jax.vmap(factor.transposed_root, 1, 1)(x) for x in (a, b / samples))
    penalty = lambda flat: problem.penalty(unravel(flat))  # noqa: E731
    matrix = matrix / samples - b.T @ b + a.T @ a + jax.hessian(penalty)(flat)
    return gradient + jax.grad(penalty)(flat), matrix


def gauss_newton_root(
    problem: Problem, theta: Any, data: tuple, w: jax.Array, factor: Factor
) -> tuple[jax.Array, jax.Array]:
    """The reduced gradient (size,) and a root M (rows, size) of the Gauss–Newton matrix, which is
    Mᵀ M + ∇²R; there is a row for each sample and output and for each entry of W.

    Arguments are those of `gauss_newton_matrix`. M is held as a whole.
    """
    flat, unravel = ravel_pytree(theta)
    samples = len(data[1])
    z, root, k = _rooted_rows(problem, theta, data, w, np.arange(samples))
    k = k.reshape(-1, flat.size)
    weights = (root[:, :, :, None] * z[:, None, None, :]).reshape(len(k), -1)
    a = _residual_rows(problem, theta, data, w)
    b = weights.T @ k / samples
    dw = -jax.vmap(lambda x: factor.root(factor.transposed_root(x)), 1, 1)(a + b)
    gradient = to_flat(w) @ a + jax.grad(lambda flat: problem.penalty(unravel(flat)))(flat)
    j = (k + weights @ dw) / samples**0.5
    return gradient, jnp.concatenate([j, jnp.sqrt(problem.w_penalty) * dw])


def _rooted_rows(problem, theta, data, w, index):
    """For some samples z (batch, columns), a root L (batch, outputs, outputs) of the curvature of
    each one's own loss and Lᵀ K (batch, outputs, size)."""
    units = jnp.eye(w.shape[1], dtype=w.dtype)

    def of_sample(sample):
        x, c = jax.tree.map(lambda leaf: leaf[None], sample)
        z, pullback = jax.vjp(lambda theta: problem.model.rows(theta, x), theta)
        root = jax.vmap(lambda unit: problem.loss.curvature_root(z @ w, c, unit[None]))(units)
        (k,) = jax.vmap(lambda u: pullback(u @ w.T))(root)
        return z[0], root[:, 0], jax.vmap(lambda k: ravel_pytree(k)[0])(k)

    return jax.vmap(of_sample)(jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], data))


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
