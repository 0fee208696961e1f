"""The separable model, the problem (model + loss + penalties) and its objective Φ(W, θ).

Both are pytrees whose leaves are the numbers in them (penalty weights, constants bound to the
features), so a compiled function takes a problem as an argument and serves for all values of these.
Imports heads, losses and penalties.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, register_pytree_node

from varprox.checks import check_number
from varprox.heads import ConvHead, Head, dense
from varprox.losses import Loss
from varprox.penalties import as_penalty


@dataclass(frozen=True, init=False)
class Separable:
    """Features followed by a linear last layer: `prediction = head.rows(features(theta, inputs)) @
    w`.

    `features(theta, inputs)` maps any pytree θ of floating arrays and inputs (batch, …) to (batch,
    m), or to what else the head takes. Features that learn from the batches they see, such as those
    with batch norm, keep their statistics as arguments of a `jax.tree_util.Partial`, and
    `training(features, theta, inputs) -> (z, features)` is what a stochastic method calls instead:
    it gives z of a training batch and the features that have seen it.
    """

    features: Callable[[Any, Any], jax.Array]
    head: Head
    training: Callable | None

    def __init__(self, features, head: Head | None = None, training=None):
        if not callable(features):
            raise TypeError(f"features: expected a function of (theta, inputs), got {features!r}")
        head = dense() if head is None else head
        if not isinstance(head, Head):
            raise TypeError(f"head: expected a varprox.Head, such as dense(), got {head!r}")
        if training is not None and not callable(training):
            raise TypeError(
                f"training: expected a function of (features, theta, inputs), got {training!r}"
            )
        object.__setattr__(self, "features", _partial(features))
        object.__setattr__(self, "head", head)
        object.__setattr__(self, "training", training)

    def rows(self, theta, inputs) -> jax.Array:
        """The design rows (batch, columns) at θ."""
        return self.head.rows(self.features(theta, inputs))

    def train(self, theta, inputs) -> tuple[jax.Array, "Separable"]:
        """The features of a training batch at θ, and the model that has seen it."""
        if self.training is None:
            return self.features(theta, inputs), self
        z, features = self.training(self.features, theta, inputs)
        return z, Separable(features, self.head, self.training)


@dataclass(frozen=True, init=False)
class Problem:
    """What is minimised: Φ(W, θ) = loss(rows(θ) W, targets) + R(θ) + ½ w_penalty ‖W‖².

    `theta_penalty` is R: a number α (for ½ α ‖θ‖²), a penalty such as `tikhonov(alpha)`, any smooth
    function of θ, a sequence of these, or None. `w_penalty` is a number ≥ 0, the bias being
    penalised like the rest. Under least squares it may be zero (W is then the minimum-norm
    solution); other losses need a positive one, because they may have no minimiser otherwise.
    """

    model: Separable
    loss: Loss
    theta_penalty: tuple
    w_penalty: float

    def __init__(self, model, loss, theta_penalty=None, w_penalty=0.0):
        if not isinstance(model, Separable):
            raise TypeError(f"model: expected a varprox.Separable, got {model!r}")
        if not isinstance(loss, Loss):
            raise TypeError(
                "loss: expected a loss such as varprox.least_squares() or "
                f"varprox.convex_loss(fn), got {loss!r}"
            )
        w_penalty = check_number("w_penalty", w_penalty)
        concrete = not isinstance(w_penalty, jax.core.Tracer)
        if concrete and w_penalty == 0 and not loss.quadratic:
            raise ValueError(
                f"w_penalty: expected a positive number, got {w_penalty!r}; under "
                f"{type(loss).__name__} the last layer may have no minimiser without one"
            )
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "theta_penalty", as_penalty("theta_penalty", theta_penalty))
        object.__setattr__(self, "w_penalty", w_penalty)

    def with_model(self, model: Separable) -> "Problem":
        """The same problem for another model."""
        return Problem(model, self.loss, self.theta_penalty, self.w_penalty)

    def penalty(self, theta) -> jax.Array:
        """R(θ), a scalar of θ's dtype."""
        dtype = jnp.result_type(*jax.tree.leaves(theta))
        return sum((p(theta) for p in self.theta_penalty), start=jnp.zeros((), dtype))

    def w_objective(self, w, rows, targets) -> jax.Array:
        """The part of Φ that sees W: loss(rows W, targets) + ½ w_penalty ‖W‖²."""
        return self.loss.value(rows @ w, targets) + 0.5 * self.w_penalty * jnp.sum(w**2)


def _register(cls, children, static):
    """Makes a frozen dataclass a pytree; rebuilding skips the checks of its constructor."""

    def flatten(self):
        return [getattr(self, n) for n in children], tuple(getattr(self, n) for n in static)

    def unflatten(aux, values):
        self = object.__new__(cls)
        for name, value in [*zip(children, values, strict=True), *zip(static, aux, strict=True)]:
            object.__setattr__(self, name, value)
        return self

    register_pytree_node(cls, flatten, unflatten)


_register(Separable, ["features"], ["head", "training"])
_register(Problem, ["model", "theta_penalty", "w_penalty"], ["loss"])


def _partial(fn):
    return fn if isinstance(fn, Partial) else Partial(fn)


def objective(problem: Problem, theta, w, data) -> jax.Array:
    """Φ(W, θ), a scalar; `data` is (inputs, targets)."""
    inputs, targets = data
    rows = problem.model.rows(theta, inputs)
    return problem.w_objective(w, rows, targets) + problem.penalty(theta)


def predict(problem: Problem, theta, w, inputs) -> jax.Array:
    """The model's predictions (batch, outputs), or (batch, height, width, outputs) for a
    convolutional head; under cross entropy these are logits."""
    head, z = problem.model.head, problem.model.features(theta, inputs)
    columns = jax.eval_shape(head.rows, z).shape[1]
    if jnp.ndim(w) != 2 or len(w) != columns:
        raise ValueError(
            f"w: expected shape ({columns}, outputs), as the rows ask for, got {jnp.shape(w)}"
        )
    return head.apply(z, w)


def check_problem(problem: Any) -> None:
    """Refuses what is not a problem with a TypeError."""
    if not isinstance(problem, Problem):
        raise TypeError(f"problem: expected a varprox.Problem, got {problem!r}")


def check_data(
    problem: Problem, theta, data, *, images: bool = False, full_batch: bool = False
) -> None:
    """Refuses data that the problem cannot be solved for; passes in silence under trace.

    Convolutional heads, and images as targets, are for methods that say they take `images`. A
    `full_batch` method is refused features that learn from the batches they see, to which it shows
    none. Where the function of the features' `Partial` has a `varprox_check(*args, theta, inputs,
    targets)`, it is called with the arguments there. Raises TypeError or ValueError naming the
    argument, what was expected and what came.
    """
    of_images = isinstance(problem.model.head, ConvHead)
    if of_images and not images:
        raise TypeError(
            "problem: expected a model with a dense head; one with a convolutional head is trained "
            "by varprox.slimtrain"
        )
    if not (isinstance(data, tuple | list) and len(data) == 2):
        count = f" of {len(data)}" if isinstance(data, tuple | list) else ""
        raise TypeError(
            f"data: expected a pair (inputs, targets), got {type(data).__name__}{count}"
        )
    inputs, targets = data
    leaves = {
        "theta": jax.tree.leaves(theta),
        "inputs": jax.tree.leaves(inputs),
        "targets": [targets],
    }
    if not leaves["theta"]:
        raise ValueError("theta: expected a pytree with at least one array, got an empty one")
    for name, arrays in leaves.items():
        for leaf in arrays:
            _check_array(name, leaf)
    dtypes = {str(jnp.asarray(leaf).dtype) for leaf in [*leaves["theta"], targets]}
    if len(dtypes) > 1:
        raise TypeError(
            f"theta, targets: expected one floating dtype throughout, got {sorted(dtypes)}; "
            "cast the data to the dtype of theta"
        )
    if of_images and jnp.ndim(targets) != 4:
        raise ValueError(
            f"targets: expected shape (batch, height, width, outputs), got {jnp.shape(targets)}"
        )
    if not of_images and jnp.ndim(targets) != 2:
        raise ValueError(
            f"targets: expected shape (batch, outputs), got {jnp.shape(targets)}; "
            "a single output wants targets[:, None]"
        )
    batch = len(targets)
    if batch == 0:
        raise ValueError("targets: expected at least one sample, got none")
    if targets.shape[-1] == 0:
        raise ValueError(f"targets: expected at least one output, got shape {targets.shape}")
    for leaf in leaves["inputs"]:
        if jnp.ndim(leaf) == 0 or len(leaf) != batch:
            raise ValueError(
                f"inputs: expected {batch} samples along the first axis, as targets have, "
                f"got shape {jnp.shape(leaf)}"
            )
    if not any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((problem, theta, data))
    ):
        _check_values(problem.model, theta, data, full_batch)
    z = jax.eval_shape(problem.model.features, theta, inputs)
    shape: tuple = getattr(z, "shape", ())
    came = getattr(z, "shape", type(z).__name__)
    if len(shape) != (4 if of_images else 2) or shape[0] != batch or shape[-1] == 0:
        expected = "height, width, channels), channels ≥ 1" if of_images else "m), m ≥ 1"
        raise ValueError(f"features: expected an array of shape ({batch}, {expected}, got {came}")
    if str(z.dtype) not in dtypes:
        raise TypeError(
            f"features: expected dtype {dtypes.pop()}, that of theta and targets, got {z.dtype}"
        )
    predicted = jax.eval_shape(_predictions_like, problem, z, targets)
    if predicted.shape != targets.shape:
        raise ValueError(
            f"targets: expected shape {predicted.shape}, that of the predictions, "
            f"got {targets.shape}"
        )
    penalty = jax.eval_shape(problem.penalty, theta)
    if penalty.shape != ():
        raise TypeError(f"theta_penalty: expected a scalar function, got shape {penalty.shape}")
    if not isinstance(targets, jax.core.Tracer):
        problem.loss.check(np.asarray(targets))


def _check_values(model, theta, data, full_batch):
    """What needs numbers to be seen, in features that others than the user have made."""
    inputs, targets = data
    with jax.ensure_compile_time_eval():
        if hasattr(model.features.func, "varprox_check"):
            model.features.func.varprox_check(*model.features.args, theta, inputs, targets)
        if full_batch and model.training is not None and _learns(model, theta, inputs):
            raise TypeError(
                "problem: expected features that are functions of theta and the inputs alone, got "
                "some that learn from training batches, such as batch norm; a full-batch method "
                "shows them none. Train them with varprox.slimtrain, or keep what they have "
                "learned with varprox.Separable(model.features, model.head)"
            )


@jax.jit
def _learns(model, theta, inputs):
    """Do the features of the same inputs differ after a training batch?"""
    _, after = model.train(theta, inputs)
    return jnp.any(model.features(theta, inputs) != after.features(theta, inputs))


def _predictions_like(problem, z, targets):
    return problem.model.head.apply(z, zero_w(problem, z, targets))


def zero_w(problem: Problem, z: jax.Array, targets: jax.Array) -> jax.Array:
    """W = 0 for features and targets, of which only shapes and dtypes are used."""
    rows = jax.eval_shape(problem.model.head.rows, z)
    return jnp.zeros((rows.shape[1], targets.shape[-1]), rows.dtype)


def _check_array(name, leaf):
    if isinstance(leaf, jax.core.Tracer):
        return
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(f"{name}: expected arrays, got {type(leaf).__name__}")
    if name != "inputs" and not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floating numbers, got dtype {leaf.dtype}")
    if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(np.asarray(leaf)).all():
        count = int((~np.isfinite(np.asarray(leaf))).sum())
        raise ValueError(f"{name}: expected finite numbers, got {count} NaN or Inf")
