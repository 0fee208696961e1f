"""The Gauss–Newton matrix of the reduced objective, formed instead of multiplied with.

In the notation of `varprox.curvature`, with K v = dZ W, A v = dZᵀ G and B v = Zᵀ Q dZ W, it is

    Kᵀ Q K − Bᵀ H⁻¹ B + Aᵀ H⁻¹ A + ∇²R  =  Jᵀ Q J + α₂ J_Wᵀ J_W + ∇²R,

where J = K − Z H⁻¹ (A + B) and J_W = −H⁻¹ (A + B). All of it, and the gradient Kᵀ G + ∇R, comes
from dZ, one reverse pass for each column of Z. A is of the size of the residual, and Kaufman's
approximation leaves it out; what is left is the Schur complement of the Gauss–Newton matrix in θ
and W together, and takes one pass for each output where these are fewer. Under least squares, where
Q is the identity, K and B only count in the span of Wᵀ, which has no more dimensions than Z has
columns, however many outputs there are. Imports model and projection. Source: Kaufman, BIT 15
(1975).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from varprox.model import Problem
from varprox.projection import Factor, to_flat

BLOCK_BYTES = 2**22  # of rows of dZ or K that are held at a time
KEPT_BYTES = 2**27  # of rows of K that are kept for `Transposed` products
Transposed = Callable[[jax.Array, jax.Array], jax.Array]


def passes(w: Any, *, kaufman: bool) -> int:
    """The reverse passes that the rows take."""
    columns, outputs = w.shape
    return min(columns, outputs) if kaufman else columns


def dimensions(problem: Problem, w: Any) -> int:
    """The rows of K that count for each sample."""
    columns, outputs = w.shape
    return min(columns, outputs) if problem.loss.quadratic else outputs


def gauss_newton_matrix(
    problem: Problem, theta: Any, data: tuple, w: jax.Array, factor: Factor, *, kaufman: bool
) -> tuple[jax.Array, jax.Array, Transposed | None]:
    """The reduced gradient (size,) and the Gauss–Newton matrix (size, size), in the order of
    `ravel_pytree`; the latter without A if `kaufman`.

    `factor` is that of ∇²_W Φ at `w` = W(θ), exact. Third comes the map (G, W) ↦ Jᵀ G + α₂ J_Wᵀ W,
    (batch, outputs) and (columns, outputs) to (size,), which takes no pass of the network, where
    the rows of K have no more than `KEPT_BYTES`, else None. Beside the matrix, A and B, which have
    a row for each entry of W, and what this map keeps, at most `BLOCK_BYTES` of rows of dZ or K are
    held, or those of one sample where they are longer.
    """
    flat, unravel = ravel_pytree(theta)
    samples, dims = len(data[1]), dimensions(problem, w)
    keep = samples * dims * flat.nbytes <= KEPT_BYTES
    longest = max(passes(w, kaufman=kaufman), dims) * flat.nbytes  # bytes of a sample's rows
    blocks = -(-samples // max(1, BLOCK_BYTES // longest))
    size = -(-samples // blocks)

    def add(total, index):
        # The last block is filled up with repeated samples, which must not count.
        chosen, counts = jnp.minimum(index, samples - 1), index < samples
        rows = _rows(problem, theta, data, w, chosen, counts, kaufman=kaufman)
        k, weights = rows.rooted, rows.weights
        total = jax.tree.map(jnp.add, total, (rows.gradient, k.T @ k, weights.T @ k, rows.a))
        return total, (rows.k, rows.z) if keep else None

    def zeros(*height):
        return jnp.zeros((*height, flat.size), flat.dtype)

    nothing = zeros(), zeros(flat.size), zeros(dims * len(w)), None if kaufman else zeros(w.size)
    index = np.arange(blocks * size, dtype=np.int32).reshape(blocks, size)
    sums, kept = jax.lax.scan(add, nothing, index)
    gradient, matrix, b, a = jax.tree.map(lambda total: total / samples, sums)

    matrix = matrix - _squared(factor, b) + (0 if kaufman else _squared(factor, a))
    penalty = lambda flat: problem.penalty(unravel(flat))  # noqa: E731
    gradient, matrix = gradient + jax.grad(penalty)(flat), matrix + jax.hessian(penalty)(flat)
    if not keep:
        return gradient, matrix, None

    k, z = (x.reshape(-1, *x.shape[2:])[:samples] for x in kept)
    return gradient, matrix, _transposed(problem, w, factor, k, z, b, a)


def gauss_newton_root(
    problem: Problem, theta: Any, data: tuple, w: jax.Array, factor: Factor, *, kaufman: bool
) -> tuple[jax.Array, jax.Array, Transposed]:
    """The reduced gradient (size,) and a root M (rows, size) of the Gauss–Newton matrix, which is
    Mᵀ M + ∇²R.

    M consists of (K − Z H⁻¹ B) / √batch, of √α₂ H⁻¹ B and, unless `kaufman`, of A times the root of
    H⁻¹. Arguments and the third result are those of `gauss_newton_matrix`. M is held as a whole.
    """
    flat, unravel = ravel_pytree(theta)
    samples = len(data[1])
    everything = np.arange(samples)
    rows = _rows(problem, theta, data, w, everything, everything < samples, kaufman=kaufman)
    b, a = rows.weights.T @ rows.rooted / samples, None if kaufman else rows.a / samples
    dw = jax.vmap(lambda x: factor.root(factor.transposed_root(x)), 1, 1)(b)
    parts = [
        (rows.rooted - rows.weights @ dw) / samples**0.5,
        jnp.sqrt(problem.w_penalty) * dw,
        *([] if kaufman else [_rooted(factor, a)]),
    ]
    penalty_gradient = jax.grad(lambda flat: problem.penalty(unravel(flat)))(flat)
    gradient = rows.gradient / samples + penalty_gradient
    transposed = _transposed(problem, w, factor, rows.k, rows.z, b, a)
    return gradient, jnp.concatenate(parts), transposed


class _Rows(NamedTuple):
    """Of some samples. K is in the basis of `_basis`, L a root of the curvature of one's loss."""

    gradient: jax.Array  # of the sum of their losses
    a: jax.Array | None  # the sum of A, (entries of W output by output, size)
    k: jax.Array  # (samples, dimensions, size)
    z: jax.Array  # (samples, columns)
    rooted: jax.Array  # Lᵀ K, (samples · dimensions, size)
    weights: jax.Array  # Lᵀ ⊗ zᵀ, which gives L Lᵀ K ⊗ z: (samples · dimensions, entries)


def _rows(problem, theta, data, w, index, counts, *, kaufman):
    """Those of the samples at `index`, all derivatives being zero where they do not count."""
    columns, outputs = w.shape
    basis, coordinates = _basis(problem, w)
    of_features = passes(w, kaufman=kaufman) == columns
    units = jnp.eye(columns, dtype=w.dtype) if of_features else coordinates
    identity = jnp.eye(len(coordinates), dtype=w.dtype)

    def of_sample(sample):
        x, c = jax.tree.map(lambda leaf: leaf[None], sample)
        z, pullback = jax.vjp(lambda theta: problem.model.rows(theta, x), theta)
        pulled = jax.vmap(lambda unit: ravel_pytree(pullback(unit[None]))[0])(units)
        root = identity
        if not problem.loss.quadratic:
            curved = lambda unit: problem.loss.curvature_root(z @ w, c, unit[None])[0]  # noqa: E731
            root = jax.vmap(curved)(identity)
        return z[0], problem.loss.gradient(z @ w, c)[0], root, pulled

    samples = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], data)
    z, slope, root, pulled = jax.vmap(of_sample)(samples)
    pulled = jnp.where(counts[:, None, None], pulled, 0)
    size = pulled.shape[-1]
    k = coordinates @ pulled if of_features else pulled
    rooted = k if problem.loss.quadratic else root @ k
    weights = (
        root[:, :, :, None] * z[:, None, None, :]
    )  # (samples, dimensions, dimensions, columns)
    return _Rows(
        gradient=(slope @ basis).reshape(-1) @ k.reshape(-1, size),
        a=None if kaufman else jnp.tensordot(slope, pulled, ((0,), (0,))).reshape(-1, size),
        k=k,
        z=z,
        rooted=rooted.reshape(-1, size),
        weights=weights.reshape(len(z) * len(coordinates), -1),
    )


def _basis(problem, w):
    """An orthonormal basis (outputs, dimensions) of where K counts, and Wᵀ in this basis."""
    if dimensions(problem, w) < w.shape[1]:
        return jnp.linalg.qr(w.T)
    return jnp.eye(w.shape[1], dtype=w.dtype), w.T


def _transposed(problem, w, factor, k, z, b, a):
    """(G, W) ↦ Jᵀ G + α₂ J_Wᵀ W."""
    basis, _ = _basis(problem, w)

    def product(slopes, weights):
        y = factor.solve(z.T @ slopes + problem.w_penalty * weights)
        by_a = 0 if a is None else to_flat(y) @ a
        return jnp.tensordot(slopes @ basis, k, 2) - to_flat(y @ basis) @ b - by_a

    return product


def _rooted(factor, rows):
    """Sᵀ rows for rows (entries of W, size) and a root S of H⁻¹."""
    return jax.vmap(factor.transposed_root, 1, 1)(rows)


def _squared(factor, rows):
    """rowsᵀ H⁻¹ rows."""
    rooted = _rooted(factor, rows)
    return rooted.T @ rooted
