"""The Gauss–Newton matrix of the reduced objective, formed instead of multiplied with.

In the notation of `varprox.curvature`, with K v = dZ W, A v = dZᵀ G and B v = Zᵀ Q dZ W, it is

    Kᵀ Q K − Bᵀ H⁻¹ B + Aᵀ H⁻¹ A + ∇²R  =  Jᵀ Q J + α₂ J_Wᵀ J_W + ∇²R,

where J = K − Z H⁻¹ (A + B) and J_W = −H⁻¹ (A + B). All of it, and the gradient Kᵀ G + ∇R, comes
from dZ, one reverse pass for each column of Z. A is of the size of the residual, and Kaufman's
approximation leaves it out; what is left is the Schur complement of the Gauss–Newton matrix in θ
and W together, and takes one pass for each output where these are fewer. Under least squares, where
Q is the identity, K and B only count in the span of Wᵀ, which has no more dimensions than Z has
columns, however many outputs there are; and Aᵀ H⁻¹ A depends on G Gᵀ alone, whose numerical rank is
what it costs. Imports model and projection. Source: Kaufman, BIT 15 (1975).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from varprox.model import Problem
from varprox.projection import Factor, to_flat

BLOCK_BYTES = 2**22  # of rows of dZ or K that are held at a time, where the matrix takes less
KEPT_BYTES = 2**27  # of rows of dZ that are kept for `Transposed` products
OUTPUTS = 64  # for which rows of A are added up at a time, at least
NARROW = 256  # columns down to which a symmetric product is halved
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
    the rows of dZ have no more than `KEPT_BYTES`, else None. Beside the matrix, A and B, which have
    a row for each entry of W, and what this map keeps, rows of dZ or K are held that take
    `BLOCK_BYTES` or as many as the matrix, or those of one sample where they are longer.
    """
    flat, unravel = ravel_pytree(theta)
    samples, dims, taken = len(data[1]), dimensions(problem, w), passes(w, kaufman=kaufman)
    keep = samples * taken * flat.nbytes <= KEPT_BYTES
    # Fewer bytes at a time than those of the matrix are multiplied faster than they are added up.
    held = max(BLOCK_BYTES, flat.size * flat.nbytes)
    blocks = -(-samples // max(1, held // (max(taken, dims) * flat.nbytes)))
    size = -(-samples // blocks)
    slopes: Any = None
    if not kaufman:
        slopes, used = _compressed(problem, theta, data, w, flat.size)

    def add(total, index):
        # The last block is filled up with repeated samples, which must not count.
        chosen, counts = jnp.minimum(index, samples - 1), index < samples
        rows = _rows(problem, theta, data, w, chosen, counts, kaufman=kaufman)
        k, weights = rows.rooted, rows.weights
        sums, a = total
        sums = jax.tree.map(jnp.add, sums, (rows.gradient, _gram(k), weights.T @ k))
        if not kaufman:
            a = jax.lax.fori_loop(
                0, used, lambda part, a: a.at[part].add(_a(slopes[part, chosen], rows.pulled)), a
            )
        return (sums, a), (rows.slope, rows.pulled, rows.z) if keep else None

    def zeros(*shape):
        return jnp.zeros((*shape, flat.size), flat.dtype)

    nothing = zeros(), zeros(flat.size), zeros(dims * len(w))
    no_a = None if kaufman else zeros(len(slopes), slopes.shape[2] * len(w))
    index = np.arange(blocks * size, dtype=np.int32).reshape(blocks, size)
    total, kept = jax.lax.scan(add, (nothing, no_a), index)
    (gradient, matrix, b), a = jax.tree.map(lambda total: total / samples, total)

    matrix = matrix - _squared(factor, b)
    if not kaufman:
        matrix = jax.lax.fori_loop(0, used, lambda part, m: m + _squared(factor, a[part]), matrix)
    penalty = lambda flat: problem.penalty(unravel(flat))  # noqa: E731
    gradient, matrix = gradient + jax.grad(penalty)(flat), matrix + jax.hessian(penalty)(flat)
    if not keep:
        return gradient, matrix, None

    slope, pulled, z = (x.reshape(-1, *x.shape[2:])[:samples] for x in kept)
    return gradient, matrix, _transposed(problem, w, factor, slope, pulled, z, b, kaufman=kaufman)


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
    b = rows.weights.T @ rows.rooted / samples
    dw = jax.vmap(lambda x: factor.root(factor.transposed_root(x)), 1, 1)(b)
    parts = [
        (rows.rooted - rows.weights @ dw) / samples**0.5,
        jnp.sqrt(problem.w_penalty) * dw,
        *([] if kaufman else [_rooted(factor, _a(rows.slope, rows.pulled) / samples)]),
    ]
    penalty_gradient = jax.grad(lambda flat: problem.penalty(unravel(flat)))(flat)
    gradient = rows.gradient / samples + penalty_gradient
    kept = rows.slope, rows.pulled, rows.z
    transposed = _transposed(problem, w, factor, *kept, b, kaufman=kaufman)
    return gradient, jnp.concatenate(parts), transposed


class _Rows(NamedTuple):
    """Of some samples. K is in the basis of `_basis`, L a root of the curvature of one's loss."""

    gradient: jax.Array  # of the sum of their losses
    slope: jax.Array  # G, (samples, outputs)
    pulled: jax.Array  # dZ, or K if that took fewer passes: (samples, passes, size)
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
        slope=slope,
        pulled=pulled,
        z=z,
        rooted=rooted.reshape(-1, size),
        weights=weights.reshape(len(z) * len(coordinates), -1),
    )


def _basis(problem, w):
    """An orthonormal basis (outputs, dimensions) of where K counts, and Wᵀ in this basis."""
    if dimensions(problem, w) < w.shape[1]:
        return jnp.linalg.qr(w.T)
    return jnp.eye(w.shape[1], dtype=w.dtype), w.T


def _a(slope, pulled):
    """The sum over samples of G ⊗ dZ, (outputs · columns, size)."""
    return jnp.tensordot(slope, pulled, ((0,), (0,))).reshape(-1, pulled.shape[-1])


def _compressed(problem, theta, data, w, size):
    """Slopes for A, (parts, samples, OUTPUTS), and how many of the parts are more than rounding.

    Where H is the same for every output, only G Gᵀ counts. Then G is turned to its principal axes,
    whose numerical rank is far below the number of outputs where these are, say, a smooth field on
    a grid. Otherwise, and where the axes would take longer to find, all of G is one part.
    """
    inputs, targets = data
    samples, outputs = targets.shape
    slopes = samples * problem.loss.gradient(problem.model.rows(theta, inputs) @ w, targets)
    least = min(samples, outputs)
    # `eigh` takes about 25 · least³ operations, A for all outputs least · columns · size².
    if not problem.loss.quadratic or least <= OUTPUTS or 25 * least**2 > len(w) * size**2:
        return slopes[None], 1
    if outputs <= samples:
        squares, axes = jnp.linalg.eigh(slopes.T @ slopes)
        slopes = slopes @ axes
    else:
        squares, axes = jnp.linalg.eigh(slopes @ slopes.T)
        slopes = axes * jnp.sqrt(jnp.maximum(squares, 0))
    # Axes are left out whose weight in G Gᵀ is below eps^¾ of the first one's, 2e-12 in float64.
    rank = jnp.sum(squares > jnp.finfo(w.dtype).eps ** 0.75 * squares[-1], dtype=jnp.int32)
    parts = -(-least // OUTPUTS)
    slopes = jnp.pad(slopes[:, ::-1], ((0, 0), (0, parts * OUTPUTS - least)))
    return slopes.reshape(samples, parts, OUTPUTS).swapaxes(0, 1), -(-rank // OUTPUTS)


def _transposed(problem, w, factor, slope, pulled, z, b, *, kaufman):
    """(G, W) ↦ Jᵀ G + α₂ J_Wᵀ W."""
    basis, _ = _basis(problem, w)
    onto = w.T if passes(w, kaufman=kaufman) == len(w) else basis

    def product(slopes, weights):
        y = factor.solve(z.T @ slopes + problem.w_penalty * weights)
        by_a = 0 if kaufman else slope @ y.T / len(slope)
        return jnp.tensordot(slopes @ onto - by_a, pulled, 2) - to_flat(y @ basis) @ b

    return product


def _rooted(factor, rows):
    """Sᵀ rows for rows (entries of W, size) and a root S of H⁻¹."""
    return jax.vmap(factor.transposed_root, 1, 1)(rows)


def _squared(factor, rows):
    """rowsᵀ H⁻¹ rows."""
    return _gram(_rooted(factor, rows))


def _gram(rows):
    """rowsᵀ rows; where it is wide, what symmetry gives is not multiplied."""
    half = rows.shape[1] // 2
    if half < NARROW:
        return rows.T @ rows
    left, right = rows[:, :half], rows[:, half:]
    beside = right.T @ left
    return jnp.block([[_gram(left), beside.T], [beside, _gram(right)]])
