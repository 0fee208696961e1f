"""Convex losses: value, gradient and curvature in the predictions.

Predictions and targets are (batch, outputs); every loss is a mean over the batch, so its gradient
and its Hessian carry the factor 1 / batch. Losses are hashable, and equal when built alike, which
lets compiled functions be reused. Imports nothing of the package.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


class Loss:
    """What every loss has; the curvature of all of them comes from their gradient."""

    quadratic = False  # is the Hessian the identity / batch?

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
        return jnp.mean(jax.vmap(self.fn)(predictions, targets))

    def gradient(self, predictions, targets):
        return jax.vmap(jax.grad(self.fn))(predictions, targets) / len(predictions)

    def curvature_root(self, predictions, targets, v):
        eigenvalues, q = jnp.linalg.eigh(jax.vmap(jax.hessian(self.fn))(predictions, targets))
        rooted = jnp.sqrt(jnp.maximum(eigenvalues, 0) / len(v)) * v
        return jnp.squeeze(q @ rooted[..., None], -1)

    def check(self, targets):
        one = jax.ShapeDtypeStruct(targets.shape[1:], targets.dtype)
        shape = jnp.shape(jax.eval_shape(self.fn, one, one))
        if shape != ():
            raise TypeError(f"fn: expected a scalar for one prediction and target, got {shape}")


@dataclass(frozen=True)
class LeastSquares(Loss):
    """½ mean ‖prediction − target‖²: see `least_squares`."""

    quadratic = True

    def value(self, predictions, targets):
        return 0.5 * jnp.sum((predictions - targets) ** 2) / len(predictions)

    def gradient(self, predictions, targets):
        return (predictions - targets) / len(predictions)

    def curvature_root(self, predictions, targets, v):
        return v / len(v) ** 0.5


@dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """−mean Σ target · log softmax(prediction): see `softmax_cross_entropy`."""

    def value(self, predictions, targets):
        return -jnp.sum(targets * jax.nn.log_softmax(predictions)) / len(predictions)

    def gradient(self, predictions, targets):
        return (jax.nn.softmax(predictions) - targets) / len(predictions)

    def curvature_root(self, predictions, targets, v):
        # diag(p) − p pᵀ = L Lᵀ for L = diag(√p) − p √pᵀ.
        p = jax.nn.softmax(predictions)
        scaled = jnp.sqrt(p) * v
        return (scaled - p * jnp.sum(scaled, axis=1, keepdims=True)) / len(v) ** 0.5

    def check(self, targets):
        total = targets.sum(axis=1)
        if targets.min() < 0 or not np.allclose(total, 1, atol=1e-5):
            raise ValueError(
                "targets: expected one-hot rows or probabilities (entries ≥ 0, rows summing to 1; "
                "jax.nn.one_hot makes them of integer labels), got entries from "
                f"{targets.min():g} and row sums from {total.min():g} to {total.max():g}"
            )


@dataclass(frozen=True)
class Logistic(Loss):
    """mean Σ log(1 + exp(prediction)) − target · prediction: see `logistic`."""

    def value(self, predictions, targets):
        return jnp.sum(jax.nn.softplus(predictions) - targets * predictions) / len(predictions)

    def gradient(self, predictions, targets):
        return (jax.nn.sigmoid(predictions) - targets) / len(predictions)

    def curvature_root(self, predictions, targets, v):
        p = jax.nn.sigmoid(predictions)
        return jnp.sqrt(p * (1 - p) / len(v)) * v

    def check(self, targets):
        if targets.min() < 0 or targets.max() > 1:
            raise ValueError(
                "targets: expected probabilities or labels between 0 and 1, got entries from "
                f"{targets.min():g} to {targets.max():g}"
            )


def least_squares() -> LeastSquares:
    """½ mean over samples of ‖prediction − target‖²; any real targets (batch, outputs)."""
    return LeastSquares()


def softmax_cross_entropy() -> SoftmaxCrossEntropy:
    """Multinomial cross entropy; targets (batch, classes) are one-hot rows or probabilities."""
    return SoftmaxCrossEntropy()


def logistic() -> Logistic:
    """Binary cross entropy of each output; targets (batch, outputs) lie in [0, 1]."""
    return Logistic()


def convex_loss(fn: Callable[[jax.Array, jax.Array], jax.Array]) -> ConvexLoss:
    """A user's loss: the mean over samples of `fn(prediction, target)`.

    `fn` maps one prediction (outputs,) and one target (outputs,) to a scalar. It must be convex and
    twice differentiable in the prediction; gradient and curvature come from automatic
    differentiation.
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a function of one prediction and one target, got {fn!r}")
    return ConvexLoss(fn)
