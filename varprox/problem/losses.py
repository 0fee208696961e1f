"""Convex losses: value, gradient and curvature in the predictions.

Predictions and targets are (batch, outputs); targets may have weights, by which the terms of the
loss are multiplied. Every loss is a mean over the batch, so its gradient and its Hessian carry the
factor 1 / batch. Losses are hashable, and equal if built alike, which lets compiled functions be
reused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from varprox.checks import called
from varprox.problem.weighted import plain, rooted, weighed


class Loss:
    """What every loss has; the curvature of all of them comes from their gradient."""

    quadratic = False  # is the Hessian the weights / batch?
    by_entry = False  # is it a sum over outputs, whose terms may have weights of their own?
    hint = ""  # how to come by targets, where others than those of the right form are given

    def value(self, predictions, targets):
        """The loss, a scalar."""
        raise NotImplementedError

    def gradient(self, predictions, targets):
        """The derivative of `value` in the predictions, (batch, outputs)."""
        raise NotImplementedError

    def curvature(self, predictions, targets):
        """The second derivative of `value` in the predictions, as a linear map of (batch,
        outputs)."""
        return jax.linearize(lambda p: self.gradient(p, targets), predictions)[1]

    def curvature_root(self, predictions, targets, v):
        """L v, (batch, outputs), for some L with L Lᵀ the second derivative of `value`."""
        raise NotImplementedError

    def check(self, targets: np.ndarray) -> None:
        """Raises ValueError where targets lie outside what the loss is defined for."""


@dataclass(frozen=True)
class ConvexLoss(Loss):
    """The mean of a convex function of one prediction and one target: see `convex_loss`."""

    fn: Callable[[jax.Array, jax.Array], jax.Array]

    def value(self, predictions, targets):
        terms = jax.vmap(self.fn)(predictions, plain(targets))
        return jnp.mean(weighed(targets, terms[:, None]))

    def gradient(self, predictions, targets):
        slopes = jax.vmap(jax.grad(self.fn))(predictions, plain(targets))
        return weighed(targets, slopes) / len(predictions)

    def curvature_root(self, predictions, targets, v):
        hessians = jax.vmap(jax.hessian(self.fn))(predictions, plain(targets))
        eigenvalues, q = jnp.linalg.eigh(hessians)
        scaled = rooted(targets, jnp.sqrt(jnp.maximum(eigenvalues, 0) / len(v)) * v)
        return jnp.squeeze(q @ scaled[..., None], -1)

    def check(self, targets):
        dtype = jnp.result_type(targets)
        one = jax.ShapeDtypeStruct(targets.shape[1:], dtype)
        value = called("fn", partial(jax.eval_shape, self.fn), prediction=one, target=one)
        came = getattr(value, "shape", type(value).__name__)
        if came != ():
            raise TypeError(f"fn: expected a scalar for one prediction and target, got {came}")
        if value.dtype != dtype:
            raise TypeError(f"fn: expected dtype {dtype}, that of the targets, got {value.dtype}")
        samples = np.linspace(0, len(targets) - 1, 4).astype(int)
        with jax.ensure_compile_time_eval():  # the targets may be constants under a trace
            convex, lowest, highest = _curvatures(self.fn, targets[samples])
        if not convex:
            raise ValueError(
                "fn: expected a function that is convex in the prediction, got one with second "
                f"derivatives from {lowest:g} to {highest:g} at predictions near the targets"
            )


@partial(jax.jit, static_argnums=0)
def _curvatures(fn, targets):
    """Are the second derivatives of `fn` along lines through the targets ≥ 0 up to rounding? And
    the lowest and the highest of them.

    The lines go along the first outputs alone, and along random signs of all, which tell products
    of any two outputs. The points are up to 3 standard deviations from the targets, and up to 3.
    """
    outputs = targets.shape[1]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (8, outputs))
    lines = jnp.asarray(np.vstack([np.eye(outputs)[:8], signs]), targets.dtype)
    size = jnp.std(targets)
    size = jnp.where(size > 0, size, jnp.maximum(jnp.max(jnp.abs(targets)), 1))
    steps = jnp.asarray([-3, -1, -0.3, 0.3, 1, 3], targets.dtype)
    places = jnp.concatenate([size * steps, steps])

    def along(target, line, place):
        value = lambda s: fn(target + s * line, target)  # noqa: E731
        return jax.grad(jax.grad(value))(place), value(place)

    for axes in ((None, None, 0), (None, 0, None), (0, None, None)):
        along = jax.vmap(along, axes)
    second, values = (jnp.where(jnp.isfinite(x), x, 0) for x in along(targets, lines, places))
    # Second derivatives may be sums of much larger terms, hence not eps itself.
    rounding = jnp.abs(values) / (places**2)[None, None]
    tolerance = jnp.finfo(second.dtype).eps ** 0.5 * jnp.maximum(jnp.max(second), rounding)
    return jnp.all(second >= -tolerance), jnp.min(second), jnp.max(second)


@dataclass(frozen=True)
class LeastSquares(Loss):
    """½ mean ‖prediction − target‖²: see `least_squares`."""

    quadratic = True
    by_entry = True

    def value(self, predictions, targets):
        residual = rooted(targets, predictions - plain(targets))
        return 0.5 * jnp.sum(residual**2) / len(predictions)

    def gradient(self, predictions, targets):
        return weighed(targets, predictions - plain(targets)) / len(predictions)

    def curvature_root(self, predictions, targets, v):
        return rooted(targets, v) / len(v) ** 0.5


@dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """−mean Σ target · log softmax(prediction): see `softmax_cross_entropy`."""

    hint = "jax.nn.one_hot(labels, classes) makes one-hot rows of integer labels"

    def value(self, predictions, targets):
        terms = weighed(targets, plain(targets)) * jax.nn.log_softmax(predictions)
        return -jnp.sum(terms) / len(predictions)

    def gradient(self, predictions, targets):
        slopes = jax.nn.softmax(predictions) - plain(targets)
        return weighed(targets, slopes) / len(predictions)

    def curvature_root(self, predictions, targets, v):
        # diag(p) − p pᵀ = L Lᵀ for L = diag(√p) − p √pᵀ.
        p = jax.nn.softmax(predictions)
        scaled = jnp.sqrt(p) * v
        scaled = scaled - p * jnp.sum(scaled, axis=1, keepdims=True)
        return rooted(targets, scaled) / len(v) ** 0.5

    def check(self, targets):
        total = targets.sum(axis=1)
        if targets.min() < 0 or not np.allclose(total, 1, atol=1e-5):
            raise ValueError(
                "targets: expected one-hot rows or probabilities (entries ≥ 0, rows summing to 1; "
                f"{self.hint}), got entries from {targets.min():g} and row sums from "
                f"{total.min():g} to {total.max():g}"
            )


@dataclass(frozen=True)
class Logistic(Loss):
    """mean Σ log(1 + exp(prediction)) − target · prediction: see `logistic`."""

    by_entry = True

    def value(self, predictions, targets):
        terms = jax.nn.softplus(predictions) - plain(targets) * predictions
        return jnp.sum(weighed(targets, terms)) / len(predictions)

    def gradient(self, predictions, targets):
        slopes = jax.nn.sigmoid(predictions) - plain(targets)
        return weighed(targets, slopes) / len(predictions)

    def curvature_root(self, predictions, targets, v):
        p = jax.nn.sigmoid(predictions)
        return rooted(targets, jnp.sqrt(p * (1 - p) / len(v)) * v)

    def check(self, targets):
        if targets.min() < 0 or targets.max() > 1:
            raise ValueError(
                "targets: expected probabilities or labels between 0 and 1, got entries from "
                f"{targets.min():g} to {targets.max():g}"
            )


def least_squares() -> LeastSquares:
    """The least-squares loss, ½ mean ‖prediction − target‖².

    The mean is over samples; the squares of a sample's outputs are added up. Under this loss W(θ)
    has a direct solution, which is computed by an orthogonal factorisation of the design rows.
    Targets are any finite numbers, shaped like the predictions.

    Returns:
        The loss. Its ``value(predictions, targets)`` is a scalar, and its
        ``gradient(predictions, targets)`` the derivative in the predictions.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> predictions, targets = jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2))
        >>> float(vp.least_squares().value(predictions, targets))  # (1² + 2²) / 2
        2.5
    """
    return LeastSquares()


def softmax_cross_entropy() -> SoftmaxCrossEntropy:
    """The multinomial cross entropy, −mean Σ target · log softmax(prediction).

    The sum is over classes, the mean over samples. Predictions are logits (batch, classes). Targets
    (batch, classes) are one-hot rows or probabilities: entries of at least 0 and rows that sum to
    1. ``jax.nn.one_hot(labels, classes)`` makes such rows from integer labels; other targets raise
    ValueError as soon as a method sees them. The loss needs a positive `w_penalty`, because classes
    that a hyperplane separates have no best W without one.

    Returns:
        The loss. Its ``value(predictions, targets)`` is a scalar, and its
        ``gradient(predictions, targets)`` the derivative in the predictions, (batch, classes).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> targets = jax.nn.one_hot(jnp.array([0, 2]), 3)
        >>> value = vp.softmax_cross_entropy().value(jnp.zeros((2, 3)), targets)
        >>> round(float(value), 3)  # log 3
        1.099
    """
    return SoftmaxCrossEntropy()


def logistic() -> Logistic:
    """The binary cross entropy of each output, mean Σ (log(1 + exp(p)) − t p).

    The sum is over outputs, each with its own yes or no, and the mean over samples. Predictions p
    are logits (batch, outputs). Targets t (batch, outputs) lie in [0, 1]; others raise ValueError
    as soon as a method sees them. The loss needs a positive `w_penalty`, because samples that a
    hyperplane separates have no best W without one.

    Returns:
        The loss. Its ``value(predictions, targets)`` is a scalar, and its
        ``gradient(predictions, targets)`` the derivative in the predictions, (batch, outputs).

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> value = vp.logistic().value(jnp.zeros((4, 1)), jnp.ones((4, 1)))
        >>> round(float(value), 3)  # log 2
        0.693
    """
    return Logistic()


def convex_loss(fn: Callable[[jax.Array, jax.Array], jax.Array]) -> ConvexLoss:
    """A loss of your own, the mean over samples of ``fn(prediction, target)``.

    Its gradient and curvature come from automatic differentiation. Two losses are equal if their
    functions are, so define `fn` once and not anew in every iteration of a loop.

    When a method first sees the data, it checks `fn` near four of the targets: ValueError is raised
    if a second derivative is negative there, and TypeError if the result is not a scalar of the
    targets' dtype.

    Arguments:
        fn: A function of one prediction (outputs,) and one target (outputs,) to a scalar. It must
            be convex in the prediction, twice differentiable in it, and traceable by JAX.

    Returns:
        The loss. Its ``value(predictions, targets)`` is a scalar, and its
        ``gradient(predictions, targets)`` the derivative in the predictions, (batch, outputs).

    Raises:
        TypeError: If `fn` is not callable.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> def poisson(prediction, target):  # counts, whose expectation is exp(prediction)
        ...     return jnp.sum(jnp.exp(prediction) - target * prediction)
        >>> loss = vp.convex_loss(poisson)
        >>> float(loss.value(jnp.zeros((4, 2)), jnp.ones((4, 2))))
        2.0
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a function of one prediction and one target, got {fn!r}")
    return ConvexLoss(fn)
