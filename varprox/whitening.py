"""A change of variables for θ in which the features depend on all weights about equally.

Arrays of weights act on correlated things, such as the bands of a spectrum, so the curvature is
steep in a few of their directions and flat in most. Found once, at the start of a run, from a
sketch of the Gauss–Newton matrix. Imports model.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varprox.model import Problem

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


def whitening(
    problem: Problem, theta: Any, rows: jax.Array, w: jax.Array, data: tuple
) -> Whitening:
    """M for the Gauss–Newton matrix at θ with W held fixed; `rows` are those at θ, by which the
    samples are put in order.

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
    order = jnp.argsort(rows @ jax.random.normal(for_order, rows.shape[1:], rows.dtype))
    buckets = min(BUCKETS, len(rows))
    size = min(SAMPLES, len(rows)) // buckets
    chosen = order[np.arange(size * buckets) * len(rows) // (size * buckets)]
    signs = jax.random.rademacher(for_signs, (buckets, size, data[1].shape[1]), rows.dtype)

    def split(x):
        return jnp.asarray(x)[chosen].reshape(size, buckets, *x.shape[1:]).swapaxes(0, 1)

    def add(total, bucket):
        x, c, sign = bucket
        z, pullback = jax.vjp(lambda theta: problem.model.rows(theta, x), theta)
        cotangent = problem.loss.curvature_root(z @ w, c, sign / buckets**0.5) @ w.T
        return jax.tree.map(jnp.add, total, _squares(*pullback(cotangent))), None

    nothing = _squares(jax.tree.map(jnp.zeros_like, theta))
    squares, _ = jax.lax.scan(add, nothing, (*jax.tree.map(split, data), signs))
    sizes = [leaf.size for leaf in jax.tree.leaves(theta)]
    mean = sum(trace for trace, _ in squares) / sum(sizes)
    arrays = [
        _whiten(trace / size, unfolded, mean)
        for size, (trace, unfolded) in zip(sizes, squares, strict=True)
    ]
    return Whitening(tuple(arrays))


def _transform(x, scale, roots):
    for axis, root in enumerate(roots):
        if root is not None:
            x = jnp.moveaxis(jnp.tensordot(root, x, (1, axis)), 0, axis)
    return scale * x


def _squares(tree):
    """For each array its sum of squares, and its square along each axis that is not too long."""

    def squares(x):
        unfolded = (jnp.moveaxis(x, axis, 0).reshape(n, -1) for axis, n in enumerate(x.shape))
        return jnp.sum(x**2), [u @ u.T if len(u) <= LONGEST else None for u in unfolded]

    return [squares(leaf) for leaf in jax.tree.leaves(tree)]


def _whiten(curvature, squares, mean):
    """Scale and roots for an array of this mean curvature; `mean` is that of all of θ."""
    # An array on which nothing depends would get an infinite scale.
    scale = jax.lax.rsqrt(curvature + jnp.where(mean > 0, LEAST * mean, 1))
    return scale, tuple(
        None if square is None else _root(square, len(squares)) for square in squares
    )


def _root(square, axes):
    """(square + damping)^{−1/(2 axes)}, for a square brought to a mean curvature of one."""
    mean = jnp.trace(square) / len(square)
    eigenvalues, q = jnp.linalg.eigh(square / jnp.where(mean > 0, mean, 1))
    return q * (jnp.maximum(eigenvalues, 0) + DAMPING) ** (-0.5 / axes) @ q.T
