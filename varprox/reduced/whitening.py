"""A change of variables for θ in which the features depend on all weights about equally.

Arrays of weights act on correlated things, such as the bands of a spectrum, so the curvature is
steep in a few of their directions and flat in most. Found once, at the start of a run, from a
sketch of the Gauss–Newton matrix.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varprox.numerics.krylov import after
from varprox.problem.hosted import taken
from varprox.problem.model import Problem
from varprox.problem.streamed import Streamed

BUCKETS, SAMPLES = 64, 1024  # of the sketch, at most
LONGEST = 256  # axis that is whitened
DAMPING, LEAST = 0.1, 1e-3  # in units of an array's mean curvature, and of that of all of θ


class Whitening(NamedTuple):
    """A symmetric positive definite linear map M, with a curvature Mᵀ H M nearer to the identity.

    M treats each array of θ for itself, as a product of one matrix for each of its axes.
    """

    arrays: tuple  # for each array of θ its scale, and for each axis a matrix or None

    def __call__(self, tree: Any) -> Any:
        """M applied to a pytree like θ."""
        leaves, structure = jax.tree.flatten(tree)
        arrays = zip(leaves, self.arrays, strict=True)
        return jax.tree.unflatten(structure, [_transform(x, *array) for x, array in arrays])

    def scaled(self, factor: jax.Array) -> "Whitening":
        """`factor` times M."""
        return Whitening(tuple((factor * scale, roots) for scale, roots in self.arrays))


def whitening(
    problem: Problem, theta: Any, rows: jax.Array | Streamed, w: jax.Array, data: tuple
) -> Whitening:
    """M for the Gauss–Newton matrix at θ with W held fixed; `rows` are those at θ, by which the
    samples are put in order.

    M is the identity where the features of a bucket are not those that its samples have among all
    the others, or cannot be had, and where it would not be finite. The comparison is part of what
    is compiled. M decides over the speed of a run and not over where it ends, so agreement to the
    root of eps is enough.

    Some samples are put into buckets, and each bucket gives one row of a count sketch S of the
    square root of the Gauss–Newton matrix, Gᵀ G ≈ H with G = S √Q J: the derivative of the sum of
    its predictions, weighted by signs, random but the same in every run, and by the root of the
    loss's curvature. For an array of weights with k axes, Shampoo's bound of H is a product over
    the axes of (Σ Gᵢ Gᵢᵀ)^{1/k}, where Gᵢ unfolds along the axis what row i has for this array; M
    is the product of the (Σ Gᵢ Gᵢᵀ + damping)^{−1/(2k)}. This costs one forward and one reverse
    pass of at most `SAMPLES` samples. Source: Gupta, Koren, Singer, arXiv:1802.09568; for the
    sketch Clarkson, Woodruff, J. ACM 63 (2017).
    """
    for_order, for_signs = jax.random.split(jax.random.key(0))
    # An order of the samples that does not depend on how they are given.
    columns = rows.shape[1]
    order = jnp.argsort((rows @ jax.random.normal(for_order, (columns, 1), rows.dtype))[:, 0])
    buckets = min(BUCKETS, len(rows))
    size = min(SAMPLES, len(rows)) // buckets
    chosen = order[np.arange(size * buckets) * len(rows) // (size * buckets)]
    signs = jax.random.rademacher(for_signs, (buckets, size, data[1].shape[1]), rows.dtype)

    def split(x):
        return x.reshape(size, buckets, *x.shape[1:]).swapaxes(0, 1)

    parts = jax.tree.map(split, taken(data, chosen))
    if not _can_be_parted(problem, theta, parts[0], (size, columns)):
        return _identity(theta)
    rows = rows.of(chosen) if isinstance(rows, Streamed) else rows[chosen]
    near = jnp.finfo(rows.dtype).eps ** 0.5 * jnp.max(jnp.abs(rows))

    def add(carry, bucket):
        total, alone = carry
        x, c, sign, whole = bucket
        z, pullback = jax.vjp(lambda theta: problem.model.rows(theta, x), theta)
        cotangent = problem.loss.curvature_root(z @ w, c, sign / buckets**0.5) @ w.T
        total = jax.tree.map(jnp.add, total, _squares(*pullback(cotangent)))
        return (total, alone & jnp.all(jnp.abs(z - whole) <= near)), None

    start = _squares(jax.tree.map(jnp.zeros_like, theta)), jnp.array(True)
    (squares, alone), _ = jax.lax.scan(add, start, (*parts, signs, split(rows)))
    sizes = [leaf.size for leaf in jax.tree.leaves(theta)]
    mean = sum(trace for trace, _ in squares) / max(sum(sizes), 1)
    arrays, done = [], jnp.zeros((), rows.dtype)
    for size, (trace, unfolded) in zip(sizes, squares, strict=True):
        array, done = _whiten(trace / max(size, 1), unfolded, mean, done)
        arrays.append(array)
    found = Whitening(tuple(arrays))
    good = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(found)]).all()
    return _where(alone & good, found)


def _can_be_parted(problem, theta, inputs, shape):
    """Can the features be evaluated on a bucket of these inputs?"""
    one = jax.tree.map(lambda x: x[0], inputs)
    try:
        return jax.eval_shape(problem.model.rows, theta, one).shape == shape
    except Exception:  # whatever the features raise for another number of samples
        return False


def _identity(theta):
    """M = 1."""
    dtype = jnp.result_type(*jax.tree.leaves(theta))
    return Whitening(tuple((jnp.ones((), dtype), ()) for _ in jax.tree.leaves(theta)))


def _where(good, found):
    """`found`, or the identity."""

    def root(matrix):
        return (
            matrix
            if matrix is None
            else jnp.where(good, matrix, jnp.eye(len(matrix), dtype=matrix.dtype))
        )

    return Whitening(
        tuple((jnp.where(good, scale, 1), tuple(map(root, roots))) for scale, roots in found.arrays)
    )


def _transform(x, scale, roots):
    for axis, root in enumerate(roots):
        if root is not None:
            x = jnp.moveaxis(jnp.tensordot(root, x, (1, axis)), 0, axis)
    return scale * x


def _squares(tree):
    """For each array its sum of squares, and its square along each axis that is not too long."""

    def squares(x):
        others = [math.prod(x.shape[:k] + x.shape[k + 1 :]) for k in range(x.ndim)]
        unfolded = (jnp.moveaxis(x, k, 0).reshape(x.shape[k], m) for k, m in enumerate(others))
        return jnp.sum(x**2), [u @ u.T if 0 < len(u) <= LONGEST else None for u in unfolded]

    return [squares(leaf) for leaf in jax.tree.leaves(tree)]


def _whiten(curvature, squares, mean, done):
    """Scale and roots for an array of this mean curvature; `mean` is that of all of θ. Second comes
    what is known after the last of the roots: they are found one after another."""
    # An array on which nothing depends would get an infinite scale.
    scale = jax.lax.rsqrt(curvature + jnp.where(mean > 0, LEAST * mean, 1))
    roots: list = []
    for square in squares:
        if square is None:
            roots.append(None)
            continue
        root, done = _root(after(done, square), len(squares))
        roots.append(root)
    return (scale, tuple(roots)), done


def _root(square, axes):
    """(square + damping)^{−1/(2 axes)}, for a square brought to a mean curvature of one, and a
    number ≥ 0 that is known when it is."""
    mean = jnp.trace(square) / len(square)
    eigenvalues, q = jnp.linalg.eigh(square / jnp.where(mean > 0, mean, 1))
    raised = (jnp.maximum(eigenvalues, 0) + DAMPING) ** (-0.5 / axes)
    return (q * raised[None]) @ q.T, raised[0]
