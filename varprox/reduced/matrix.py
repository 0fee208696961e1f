"""The Gauss–Newton matrix of the reduced objective, formed instead of multiplied with.

In the notation of `varprox.reduced.curvature`, with K v = dZ W, A v = dZᵀ G and B v = Zᵀ Q dZ W,
it is

    Kᵀ Q K − Bᵀ H⁻¹ B + Aᵀ H⁻¹ A + ∇²R  =  Jᵀ Q J + α₂ J_Wᵀ J_W + ∇²R,

where J = K − Z H⁻¹ (A + B) and J_W = −H⁻¹ (A + B). With H⁻¹ = S Sᵀ and C = Sᵀ B the difference
comes as a sum of squares, K without its part in the columns of Z,

    Kᵀ Q K − Bᵀ H⁻¹ B  =  (K − Z S C)ᵀ Q (K − Z S C) + α₂ (S C)ᵀ S C.

All of it, and the gradient Kᵀ G + ∇R, comes from dZ, one reverse pass for each column of Z. A is of
the size of the residual, and Kaufman's approximation leaves it out; what is left is the Schur
complement of the Gauss–Newton matrix in θ and W together, and takes one pass for each output where
these are fewer. Under least squares, where Q is the identity, K and B only count in the span of Wᵀ,
which has no more dimensions than Z has columns, however many outputs there are; and Aᵀ H⁻¹ A
depends on G Gᵀ alone, whose numerical rank is what it costs. Source: Kaufman, BIT 15 (1975).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from varprox.numerics.ridge import fewer
from varprox.problem.chunks import blocks_of
from varprox.problem.model import Problem
from varprox.problem.weighted import Targets, alike, rooted, rooted_rows
from varprox.reduced.projection import Projection
from varprox.reduced.w_hessian import Factor, to_flat

BLOCK_BYTES = 2**22  # of rows of dZ or K that are held at a time, where the matrix takes less
KEPT_BYTES = 2**27  # of rows of dZ that are kept for `Transposed` products
OUTPUTS = 64  # for which rows of A are added up at a time, at least
NARROW = 256  # columns down to which a symmetric product is halved
Transposed = Callable[[jax.Array, jax.Array], jax.Array]


def passes(w: Any, *, kaufman: bool) -> int:
    """The reverse passes that the rows take."""
    columns, outputs = w.shape
    return min(columns, outputs) if kaufman else columns


def dimensions(problem: Problem, w: Any, targets: Targets) -> int:
    """The rows of K that count for each sample."""
    columns, outputs = w.shape
    return min(columns, outputs) if _curved_alike(problem, targets) else outputs


def _curved_alike(problem, targets):
    """Have all outputs the same curvature, which is a multiple of the identity for each sample?"""
    return problem.loss.quadratic and alike(targets)


def keeps_rows(flat: jax.Array, samples: int, w: Any, *, kaufman: bool, forward: bool) -> bool:
    """Are the rows of dZ kept, so that `Formed.transposed` is there?"""
    return forward or samples * passes(w, kaufman=kaufman) * flat.nbytes <= KEPT_BYTES


class Formed(NamedTuple):
    """The Gauss–Newton model at θ, in the order of `ravel_pytree`."""

    gradient: jax.Array  # (size,)
    matrix: jax.Array  # (size, size); or rows M (rows, size), where the matrix is Mᵀ M + ∇²R
    # (G, W) ↦ Jᵀ G + α₂ J_Wᵀ W, (batch, outputs) and (columns, outputs) to (size,), which takes no
    # pass of the network; None where what it needs is not kept.
    transposed: Transposed | None


def gauss_newton_matrix(
    problem: Problem,
    theta: Any,
    data: tuple,
    at: Projection,
    *,
    kaufman: bool,
    forward: bool = False,
) -> Formed:
    """The Gauss–Newton matrix, without A if `kaufman`.

    It is added up from products Mᵀ M and ∇²R, so that rounding cannot make it indefinite, however
    ill-conditioned H is. Therefore rows of K are needed twice: for what the columns of Z span of
    them, and without it. Where they take more than `KEPT_BYTES` they are not kept but made again,
    by as many reverse passes. Then, beside the matrix, C and A, which have a row for each entry of
    W, rows of dZ or K are held that take `BLOCK_BYTES` or as many as the matrix, or those of one
    sample where they are longer.

    `at` is W(θ) with the exact factor of ∇²_W Φ. `forward` says how dZ is found: by one forward
    pass of all samples together for each weight, or by reverse passes of each sample alone.
    """
    flat, unravel = ravel_pytree(theta)
    w = at.w
    samples, dims, taken = len(data[1]), dimensions(problem, w, data[1]), passes(w, kaufman=kaufman)
    keep = keeps_rows(flat, samples, w, kaufman=kaufman, forward=forward)
    # Fewer bytes at a time than those of the matrix are multiplied faster than they are added up.
    held = max(BLOCK_BYTES, flat.size * flat.nbytes)
    most = samples if keep else held // (max(taken, dims) * flat.nbytes)
    if problem.chunk is not None and not keep:
        most = min(most, problem.chunk)
    blocks = blocks_of(samples, most)
    span = _span(problem, at)
    compressed: Any = None
    if not kaufman:
        compressed, used = _compressed(problem, w, at.slopes, data[1], flat.size)

    def rows_of(place):
        of = problem, theta, data, at, span, blocks, place
        return _rows(*of, kaufman=kaufman, forward=forward)

    def collect(total, place):
        rows = rows_of(place)
        (gradient, b), a = total
        sums = gradient + rows.gradient, b + rows.weights.T @ rows.rooted
        if not kaufman:
            a = jax.lax.fori_loop(
                0,
                used,
                lambda part, a: a.at[part].add(
                    _a(blocks.take(compressed[part], place), rows.pulled)
                ),
                a,
            )
        return (sums, a), rows if keep else None

    def zeros(*shape):
        return jnp.zeros((*shape, flat.size), flat.dtype)

    no_a: Any = None if kaufman else zeros(len(compressed), compressed.shape[2] * len(w))
    start = (zeros(), zeros(dims * len(w))), no_a
    ((gradient, b), a), kept = jax.lax.scan(collect, start, blocks.places)
    c = span.inward(b)
    along = span.outward(c)

    def add(matrix, block):
        rows = block if keep else rows_of(block)
        return matrix + _gram(rows.rooted - rows.weights @ along), None

    matrix = _gram(jnp.sqrt(problem.w_penalty_like(c)) * span.rooted(c))
    matrix, _ = jax.lax.scan(add, matrix, kept if keep else blocks.places)
    if not kaufman:
        of_part = lambda part: _gram(span.transposed(a[part] / samples))  # noqa: E731
        matrix = jax.lax.fori_loop(0, used, lambda part, m: m + of_part(part), matrix)
    penalty = lambda flat: problem.penalty(unravel(flat))  # noqa: E731
    gradient = gradient / samples + jax.grad(penalty)(flat)
    matrix = matrix + jax.hessian(penalty)(flat)
    if not keep:
        return Formed(gradient, matrix, None)
    rows = jax.tree.map(lambda x: x[0], kept)
    transposed = _transposed(problem, at, data[1], span, rows, c, kaufman=kaufman)
    return Formed(gradient, matrix, transposed)


def gauss_newton_root(
    problem: Problem,
    theta: Any,
    data: tuple,
    at: Projection,
    *,
    kaufman: bool,
) -> Formed:
    """The same by rows M, of which the Gauss–Newton matrix is Mᵀ M + ∇²R.

    M consists of K without what Z spans of it, of √α₂ H⁻¹ B and, unless `kaufman`, of A times the
    root of H⁻¹. It is held as a whole, but for what many devices have `fewer` rows for.
    """
    flat, unravel = ravel_pytree(theta)
    samples = len(data[1])
    span = _span(problem, at)
    of = problem, theta, data, at, span, blocks_of(samples, samples), np.int32(0)
    rows = _rows(*of, kaufman=kaufman, forward=False)
    c = span.inward(rows.weights.T @ rows.rooted)
    parts = [
        fewer(rows.rooted - rows.weights @ span.outward(c)),
        jnp.sqrt(problem.w_penalty_like(c)) * span.rooted(c),
        *([] if kaufman else [span.transposed(_a(rows.slope, rows.pulled) / samples)]),
    ]
    penalty_gradient = jax.grad(lambda flat: problem.penalty(unravel(flat)))(flat)
    return Formed(
        rows.gradient / samples + penalty_gradient,
        jnp.concatenate(parts),
        _transposed(problem, at, data[1], span, rows, c, kaufman=kaufman),
    )


class _Span(NamedTuple):
    """The columns of Z, and S with S Sᵀ = H⁻¹, by which products with their span are formed.

    Under least squares `z` is an orthonormal basis of what Z spans, so that K loses its part in it
    to rounding; under other losses it is Z, and H says what it spans in the loss's metric.
    """

    # (batch, columns), or (batch, outputs, columns); None for `Streamed` rows.
    z: jax.Array | None
    factor: Factor
    orthonormal: bool

    def rooted(self, rows):
        """S rows, for rows (entries of W, size)."""
        return jax.vmap(self.factor.root, 1, 1)(rows)

    def transposed(self, rows):
        """Sᵀ rows."""
        return jax.vmap(self.factor.transposed_root, 1, 1)(rows)

    def inward(self, b):
        """C = Sᵀ Zᵀ K, from what `z` gives in place of Z."""
        return b if self.orthonormal else self.transposed(b)

    def outward(self, c):
        """What is to be multiplied by `z` for Z S C."""
        return c if self.orthonormal else self.rooted(c)


def _span(problem, at):
    z = at.rows if problem.loss.quadratic else at.rows / len(at.rows) ** 0.5
    return _Span(z, at.factor, problem.loss.quadratic)


class _Rows(NamedTuple):
    """Of some samples. K is in the basis of `_basis`, L a root of the curvature of one's loss."""

    gradient: jax.Array  # of the sum of their losses
    slope: jax.Array  # G, (samples, outputs), of this sum
    z: jax.Array  # (samples, columns)
    pulled: jax.Array  # dZ, or K if that took fewer passes: (samples, passes, size)
    rooted: jax.Array  # Lᵀ K / √batch, (samples · dimensions, size)
    weights: jax.Array  # Lᵀ ⊗ zᵀ, with `_Span.z`: (samples · dimensions, entries)


def _rows(problem, theta, data, at, span, blocks, place, *, kaufman, forward):
    """Those of a block of samples, all derivatives being zero where they have been before; if
    `forward` there is one block."""
    w, slopes = at.w, at.slopes
    columns = len(w)
    basis, coordinates = _basis(problem, w, data[1])
    of_features = passes(w, kaufman=kaufman) == columns
    units = jnp.eye(columns, dtype=w.dtype) if of_features else coordinates
    identity = jnp.eye(len(coordinates), dtype=w.dtype)
    flat, unravel = ravel_pytree(theta)

    def alone(x):
        one = jax.tree.map(lambda leaf: leaf[None], x)
        z, pullback = jax.vjp(lambda theta: problem.model.rows(theta, one), theta)
        return z[0], jax.vmap(lambda unit: ravel_pytree(pullback(unit[None]))[0])(units)

    def together(inputs):
        rows_at = lambda flat: problem.model.rows(unravel(flat), inputs)  # noqa: E731
        along = lambda unit: jax.jvp(rows_at, (flat,), (unit,))[1] @ units.T  # noqa: E731
        pulled = jax.vmap(along, out_axes=2)(jnp.eye(flat.size, dtype=flat.dtype))
        return rows_at(flat), pulled

    def root_of(prediction, target):
        target = jax.tree.map(lambda leaf: leaf[None], target)
        of_unit = lambda unit: problem.loss.curvature_root(  # noqa: E731
            prediction[None], target, unit[None]
        )[0]
        return jax.vmap(of_unit)(identity)

    (inputs, targets), slopes, spanned = blocks.take((data, slopes, span.z), place)
    new = blocks.new(place)
    parted = jax.vmap(alone)
    if problem.chunked(inputs):
        parted = partial(jax.lax.map, alone, batch_size=problem.chunk)
    z, pulled = together(inputs) if forward else parted(inputs)
    pulled = jnp.where(new[:, None, None], pulled, 0)
    if spanned is None:
        spanned = _spanned(span.factor, z, targets) / blocks.samples**0.5
    spanned = spanned if spanned.ndim == 3 else spanned[:, None]
    spanned = jnp.where(new[:, None, None], spanned, 0)
    size = pulled.shape[-1]
    k = coordinates @ pulled if of_features else pulled
    slope = blocks.samples * jnp.where(new[:, None], slopes, 0)
    if problem.loss.quadratic:
        root = jnp.broadcast_to(identity, (len(z), *identity.shape))
        curved = jax.vmap(partial(rooted, targets), 2, 2)(k)
    else:
        root = jax.vmap(root_of)(z @ w, targets)
        curved = root @ k
    weights = root[:, :, :, None] * spanned[:, None]
    return _Rows(
        gradient=(slope @ basis).reshape(-1) @ k.reshape(-1, size),
        slope=slope,
        z=z,
        pulled=pulled,
        rooted=curved.reshape(-1, size) / blocks.samples**0.5,
        weights=weights.reshape(len(z) * len(coordinates), -1),
    )


def _spanned(factor, rows, targets):
    """What `_Span.z` has of these rows, by the factor under least squares."""
    return (rooted_rows(targets, rows @ factor.basis) @ factor.blocks).swapaxes(0, 1)


def _basis(problem, w, targets):
    """An orthonormal basis (outputs, dimensions) of where K counts, and Wᵀ in this basis."""
    if dimensions(problem, w, targets) < w.shape[1]:
        return jnp.linalg.qr(w.T)
    return jnp.eye(w.shape[1], dtype=w.dtype), w.T


def _a(slope, pulled):
    """The sum over samples of G ⊗ dZ, (outputs · columns, size)."""
    return jnp.tensordot(slope, pulled, ((0,), (0,))).reshape(-1, pulled.shape[-1])


def _compressed(problem, w, slopes, targets, size):
    """Slopes for A, (parts, samples, OUTPUTS), and how many of the parts are more than rounding.

    Where H is the same for every output, only G Gᵀ counts. Then G is turned to its principal axes,
    whose numerical rank is far below the number of outputs where these are, say, a smooth field on
    a grid. Otherwise, and where the axes would take longer to find, all of G is one part.
    """
    samples, outputs = slopes.shape
    slopes = samples * slopes
    least = min(samples, outputs)
    # `eigh` takes about 25 · least³ operations, A for all outputs least · columns · size².
    if not _curved_alike(problem, targets) or least <= OUTPUTS or 25 * least**2 > len(w) * size**2:
        return slopes[None], 1
    if outputs <= samples:
        squares, axes = jnp.linalg.eigh(slopes.T @ slopes)
        slopes = slopes @ axes
    else:
        squares, axes = jnp.linalg.eigh(slopes @ slopes.T)
        slopes = axes * jnp.sqrt(jnp.maximum(squares, 0))[None]
    # Axes are left out whose weight in G Gᵀ is below eps^¾ of the first one's, 2e-12 in float64.
    rank = jnp.sum(squares > jnp.finfo(w.dtype).eps ** 0.75 * squares[-1], dtype=jnp.int32)
    parts = -(-least // OUTPUTS)
    slopes = jnp.pad(slopes[:, ::-1], ((0, 0), (0, parts * OUTPUTS - least)))
    return slopes.reshape(samples, parts, OUTPUTS).swapaxes(0, 1), -(-rank // OUTPUTS)


def _transposed(problem, at, targets, span, rows, c, *, kaufman):
    """(G, W) ↦ Jᵀ G + α₂ J_Wᵀ W."""
    w = at.w
    basis, _ = _basis(problem, w, targets)
    onto = w.T if passes(w, kaufman=kaufman) == len(w) else basis

    def product(slopes, weights):
        along = rows.z.T @ slopes + problem.w_penalty_like(weights) * weights
        by_a = 0 if kaufman else rows.slope @ span.factor.solve(along).T / len(slopes)
        by_b = span.factor.transposed_root(to_flat(along @ basis)) @ c
        return jnp.tensordot(slopes @ onto - by_a, rows.pulled, 2) - by_b

    return product


def _gram(rows):
    """rowsᵀ rows; where it is wide, what symmetry gives is not multiplied."""
    half = rows.shape[1] // 2
    if half < NARROW:
        return rows.T @ rows
    left, right = rows[:, :half], rows[:, half:]
    beside = right.T @ left
    return jnp.block([[_gram(left), beside.T], [beside, _gram(right)]])
