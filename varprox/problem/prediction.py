"""Predictions at given weights, and how far they may be off."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from varprox.checks import (
    called,
    check_array,
    shown,
)
from varprox.precision import full_products
from varprox.problem.chunks import blocks_of
from varprox.problem.covariance import Covariance, deviations, times_derivative
from varprox.problem.data import automatic, weights, where_they_stay
from varprox.problem.hosted import at_hand, leaves_of, shapes_of
from varprox.problem.model import Problem, check_problem
from varprox.problem.traits import derivatives


@full_products
def predict(
    problem: Problem, theta, w, inputs, covariance: Covariance | None = None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The predictions of a problem's model at given weights, and how far the data determine them.

    Arguments:
        problem: The `Problem`; only its model matters, and its `chunk`: so many samples are
            evaluated at a time.
        theta: The nonlinear weights θ, a pytree as the features take it.
        w: The weights W of the last layer, (columns, outputs), in the dtype of the features.
        inputs: Inputs as the features take them, with the samples along the first axis.
        covariance: What `covariance` has found for these weights, if standard deviations are
            wanted; None, the default, is for predictions alone.

    Returns:
        The predictions (batch, outputs), or (batch, height, width, outputs) if the head is
        convolutional. Under a cross entropy, softmax or logistic, they are logits.

        With a covariance it is the pair of the predictions and their standard deviations, which
        have the same shape: those of the curve itself, by its derivative in all weights, without
        the noise of a new measurement; ``sqrt(std**2 + covariance.noise_std**2)`` has both. They
        are infinite where a prediction depends on what the data leave open.

    Raises:
        TypeError: If `problem` is not a `Problem`, if another argument holds something other than
            arrays, if the features cannot be evaluated, if `w` has another dtype than the
            features, or if `covariance` is something else.
        ValueError: If `w` does not have one row per column of the design rows, or if the covariance
            is that of more or fewer weights.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, inputs: jnp.tanh(inputs @ theta))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> theta, w = jnp.ones((2, 3)), jnp.ones((4, 1))  # three features and the bias
        >>> vp.predict(problem, theta, w, jnp.zeros((5, 2))).shape
        (5, 1)
    """
    check_problem(problem)
    theta, w, inputs = automatic((theta, w, at_hand(inputs)))
    for name, leaves in ("theta", weights(theta)), ("w", [w]), ("inputs", jax.tree.leaves(inputs)):
        for leaf in leaves:
            check_array(name, leaf)
    head = problem.model.head
    features, chunked = problem.model.features, problem.chunked(inputs)
    if chunked:
        shapes = partial(jax.eval_shape, features)
        z = called("features", shapes, theta=theta, inputs=shapes_of(inputs))
    else:
        z = called("features", features, theta=theta, inputs=inputs)
    if jnp.ndim(z) < 2:
        raise ValueError(
            f"inputs: expected a batch, for which features are (batch, m), got features of shape "
            f"{jnp.shape(z)}; a single sample wants inputs[None]"
        )
    columns = jax.eval_shape(head.rows, z).shape[1]
    if jnp.ndim(w) != 2 or len(w) != columns:
        raise ValueError(
            f"w: expected shape ({columns}, outputs), as the rows ask for, got {jnp.shape(w)}"
        )
    if jnp.result_type(w) != z.dtype:
        raise TypeError(f"w: expected dtype {z.dtype}, that of the features, got {w.dtype}")
    if chunked:
        predictions = _in_chunks(problem, theta, w, where_they_stay(problem, inputs))
        predictions = jax.block_until_ready(predictions)  # while there are arrays to read
    else:
        predictions = head.apply(z, w)
    if covariance is None:
        return predictions
    _check_covariance(covariance, sum(map(np.size, jax.tree.leaves((theta, w)))))
    forward, _ = derivatives(problem, theta, inputs)
    return predictions, _deviations(problem.model, theta, w, inputs, covariance, forward=forward)


@jax.jit
@full_products
def _in_chunks(problem, theta, w, inputs):
    """Predictions of a chunk of samples at a time."""
    model = problem.model

    def of_block(so_far, _, x):
        return so_far, model.head.apply(model.features(theta, x), w)

    return blocks_of(len(leaves_of(inputs)[0]), problem.chunk).scan(of_block, None, inputs)[1]


@partial(jax.jit, static_argnames="forward")
@full_products
def _deviations(model, theta, w, inputs, covariance, *, forward):
    """The standard deviations of predictions, shaped like these."""
    flat, unravel = ravel_pytree((theta, w))

    def predictions_at(flat):
        theta, w = unravel(flat)
        return model.head.apply(model.features(theta, inputs), w)

    shape = jax.eval_shape(predictions_at, flat).shape
    along = times_derivative(
        lambda flat: predictions_at(flat).reshape(-1), flat, covariance.axes, forward=forward
    )
    return deviations(covariance.spreads, along).reshape(shape)


def _check_covariance(covariance, size):
    if not isinstance(covariance, Covariance):
        raise TypeError(
            f"covariance: expected what varprox.covariance returns, got {shown(covariance)}"
        )
    if jnp.shape(covariance.axes) != (size, size):
        raise ValueError(
            f"covariance: expected that of {size} weights, as theta and w have, got that of "
            f"{len(covariance.axes)}"
        )
