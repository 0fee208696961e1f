"""The covariance of all weights, and the standard deviations of what is linear in them.

It is held by its axes: combinations of weights that are independent of one another, with a
deviation along each that is infinite where the data say nothing. Nothing is inverted or subtracted
on the way from these to a deviation. How they are found is in `varprox.training.uncertainty`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 64  # derivatives that are taken at a time


class Covariance(NamedTuple):
    """The covariance of θ and W together, as `covariance` finds it.

    All weights stand in one order, that of ``jax.flatten_util.ravel_pytree((theta, w))``: first the
    arrays of θ in the order of ``jax.tree.leaves``, then W, each row by row.

    The data may leave a weight open: one on which nothing depends, or those of features that are
    multiples of one another. Its variance, its row and its column are infinite then. A sum of such
    weights may well be known, and `predict` knows which are.

    Attributes:
        theta_std: The standard deviations of θ, a pytree like θ.
        w_std: The standard deviations of W, (columns, outputs).
        matrix: The covariance matrix of all weights, (size, size).
        noise_std: Under least squares s, the standard deviation of the noise in a target, as
            estimated from the residuals; 1 under other losses. ``matrix / noise_std**2`` is the
            covariance for noise of standard deviation one.
        axes: Uncorrelated combinations of weights, the columns of a matrix (size, size).
        spreads: The standard deviation along each axis, (size,); infinite where the data say
            nothing. ``(axes * spreads) @ (axes * spreads).T`` is the matrix where all are finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> data = inputs, 2 * jnp.exp(-3 * inputs) + 0.01 * jnp.sin(40 * inputs)
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> solution = vp.fit(problem, jnp.ones(1), data, max_work=100)
        >>> found = vp.covariance(problem, solution, data)
        >>> found.theta_std.shape, found.w_std.shape, found.matrix.shape
        ((1,), (1, 1), (2, 2))
    """

    theta_std: Any
    w_std: jax.Array
    matrix: jax.Array
    noise_std: jax.Array
    axes: jax.Array
    spreads: jax.Array


def deviations(spreads: jax.Array, along: jax.Array) -> jax.Array:
    """The standard deviations of linear functions of the weights, of which `along` (…, size) has
    the values on the axes.

    They are infinite where a function changes along an axis without a finite spread, by more than
    rounding may make of none: eps^½ of its change along all of them.
    """
    spreads = jnp.broadcast_to(spreads, along.shape)
    known = jnp.isfinite(spreads)
    open_part = jnp.linalg.norm(jnp.where(known, 0, along), axis=-1)
    small = open_part <= jnp.finfo(along.dtype).eps ** 0.5 * jnp.linalg.norm(along, axis=-1)
    deviation = jnp.linalg.norm(along * jnp.where(known, spreads, 0), axis=-1)
    return jnp.where(small, deviation, jnp.inf)


def times_derivative(
    fn: Callable[[jax.Array], jax.Array], x: jax.Array, matrix: jax.Array, *, forward: bool
) -> jax.Array:
    """J · `matrix` for the derivative J of a function from flat x to flat values.

    It takes a forward pass for each column of the matrix, or a reverse pass for each value.
    """
    if forward:
        along = lambda v: jax.jvp(fn, (x,), (v,))[1]  # noqa: E731
        return jax.lax.map(along, matrix.T, batch_size=BLOCK).T
    values, pullback = jax.vjp(fn, x)
    row = lambda i: pullback(jnp.zeros_like(values).at[i].set(1))[0] @ matrix  # noqa: E731
    return jax.lax.map(row, jnp.arange(values.size), batch_size=BLOCK)
