"""The separable model, the problem (model, loss and penalties) and its objective Φ(W, θ).

Both are pytrees. Their leaves are the numbers in them: penalty weights, and arrays bound to the
features. A compiled function takes a problem as an argument and serves for all values of these
numbers.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, register_pytree_node

from varprox.checks import (
    apart,
    check_integer,
    check_number,
    library,
    named,
    shown,
)
from varprox.problem.heads import Head, dense
from varprox.problem.hosted import leaves_of
from varprox.problem.losses import Loss
from varprox.problem.penalties import as_penalty
from varprox.problem.streamed import Streamed


@dataclass(frozen=True, init=False)
class Separable:
    """A model that is linear in the weights of its last layer: features, then a head.

    It predicts ``head.rows(features(theta, inputs)) @ w``. The features depend nonlinearly on the
    weights θ. The head turns them into design rows, in which the prediction is linear in the
    weights W of the last layer.

    A model is a pytree. Arrays that are bound to the features with `jax.tree_util.Partial` are its
    leaves: they can change without a recompilation. A plain function is equal only to itself, so
    define the features once and not anew in every iteration of a loop.

    Arguments:
        features: A function ``features(theta, inputs) -> z``. `theta` is any pytree of arrays, all
            float32 or all float64. `inputs` is an array, or a pytree of arrays, with the samples
            along the first axis. `z` has the dtype of θ and shape (batch, m), or (batch, height,
            width, channels) for a convolutional head.
        head: The last layer: `dense()`, ``conv(…)``, ``conv_transpose(…)`` or a `Head` of your own.
            None, the default, means `dense()`: fully connected, with a bias.
        training: Only for features that learn from the batches they see, as batch norm does: a
            function ``training(features, theta, inputs) -> (z, features)``. A stochastic method
            calls it instead of the features. It returns z of a training batch, and the features
            with their updated statistics. Such features are a `Partial` whose arguments are the
            statistics. None, the default, is for features that learn nothing.

    Raises:
        TypeError: If `features` or `training` is not callable, or if `head` is not a `Head`.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> def features(theta, inputs):
        ...     return jnp.tanh(inputs @ theta["kernel"] + theta["bias"])
        >>> model = vp.Separable(features, head=vp.dense(bias=True))
        >>> theta = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> model.rows(theta, jnp.ones((5, 2))).shape  # three features, and a column of ones
        (5, 4)
    """

    features: Callable[[Any, Any], jax.Array]
    head: Head
    training: Callable | None

    def __init__(self, features, head: Head | None = None, training=None):
        if not callable(features) or _takes_inputs_alone(features):
            raise TypeError(
                f"features: expected a function of (theta, inputs), got {shown(features)}"
                f"{_unpacked(features) or apart(features)}"
            )
        head = dense() if head is None else head
        if not isinstance(head, Head):
            raise TypeError(f"head: expected a varprox.Head, such as dense(), got {shown(head)}")
        if training is not None and not callable(training):
            raise TypeError(
                f"training: expected a function of (features, theta, inputs), got {shown(training)}"
            )
        object.__setattr__(self, "features", _partial(features))
        object.__setattr__(self, "head", head)
        object.__setattr__(self, "training", training)

    def __repr__(self) -> str:
        training = f", training={named(self.training)}" if self.training else ""
        return f"Separable(features={named(self.features)}, head={self.head!r}{training})"

    def rows(self, theta, inputs) -> jax.Array:
        """Design rows at θ, (batch, columns); a convolutional head has one row per output pixel."""
        return self.head.rows(self.features(theta, inputs))

    def train(self, theta, inputs) -> tuple[jax.Array, "Separable"]:
        """The features z of a training batch at θ, and the model that has seen the batch."""
        if self.training is None:
            return self.features(theta, inputs), self
        z, features = self.training(self.features, theta, inputs)
        return z, Separable(features, self.head, self.training)


@dataclass(frozen=True, init=False)
class Problem:
    """What is minimised: a model, its loss, and penalties on its weights.

    The objective is::

        Φ(W, θ) = loss(rows(θ) W, targets) + R(θ) + ½ w_penalty ‖W‖²

    The loss is a mean over samples. A problem is a pytree. Its leaves are `w_penalty`, the numbers
    in the penalties on θ and the arrays bound to the features: changing them does not recompile.

    Arguments:
        model: The `Separable` model.
        loss: `least_squares()`, `softmax_cross_entropy()`, `logistic()` or ``convex_loss(fn)``.
        theta_penalty: The penalty R. A number α means ½ α ‖θ‖²; the other choices are a penalty
            such as ``tikhonov(alpha)``, any smooth function from θ to a scalar, or a tuple or list
            of these, which are added up. None, the default, means no penalty.
        w_penalty: A finite number ≥ 0, by default 0. It penalises the bias like the rest of W. It
            may be 0 under least squares: W(θ) is then the minimum-norm solution. Other losses may
            have no minimiser without a penalty on W, and need a positive number.
        chunk: The number of samples that full-batch methods and `predict` take at a time, an
            integer ≥ 1; None, the default, takes all together. The features must treat each sample
            alone. Under least squares nothing of more samples is held then but the data and some
            arrays of the size of the targets: whatever needs the features evaluates them anew. On a
            CPU a step is often faster, on an accelerator it takes more passes. Under other losses,
            whose W takes many products with the design rows, some copies of these are held. Inputs
            that are NumPy arrays, such as a `numpy.memmap`, stay where they are, and every chunk is
            read in its turn; they must last as long as the steps that read them. Where they fit on
            the device, `jax.numpy.asarray` puts them there, which is faster. In any case the forms
            ``"kernel"`` and ``"forward"`` of `gnvpro` hold their own rows, which are larger. Work
            units count the passes of a run without chunks.

    Raises:
        TypeError: If `model` is not a `Separable`, if `loss` is not a loss, or if a penalty is
            neither a number nor a function.
        ValueError: If a number is negative or not finite, if `w_penalty` is 0 under a loss other
            than least squares, or if `chunk` is not an integer ≥ 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, inputs: jnp.tanh(inputs @ theta))
        >>> problem = vp.Problem(model, vp.least_squares(), theta_penalty=0.01, w_penalty=0.001)
        >>> round(float(problem.penalty(jnp.ones((2, 3)))), 4)  # R(θ) = ½ · 0.01 · 6
        0.03
    """

    model: Separable
    loss: Loss
    theta_penalty: tuple
    w_penalty: float
    chunk: int | None

    def __init__(self, model, loss, theta_penalty=None, w_penalty=0.0, chunk=None):
        if not isinstance(model, Separable):
            hint = "; varprox.Separable(features) makes one" if callable(model) else ""
            raise TypeError(
                f"model: expected a varprox.Separable, got {shown(model)}"
                f"{_unpacked(model) or apart(model) or hint}"
            )
        if not isinstance(loss, Loss):
            raise TypeError(
                "loss: expected a loss such as varprox.least_squares() or "
                f"varprox.convex_loss(fn), got {shown(loss)}"
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
        chunk = None if chunk is None else check_integer("chunk", chunk, least=1)
        object.__setattr__(self, "chunk", chunk)

    def __repr__(self) -> str:
        penalties = " + ".join(map(named, self.theta_penalty)) or None
        chunk = f", chunk={self.chunk}" if self.chunk else ""
        return (
            f"Problem({self.model!r}, {type(self.loss).__name__}, theta_penalty={penalties}, "
            f"w_penalty={self.w_penalty!r}{chunk})"
        )

    def with_model(self, model: Separable) -> "Problem":
        """The same problem for another model."""
        return Problem(model, self.loss, self.theta_penalty, self.w_penalty, self.chunk)

    def rows(self, theta, inputs) -> jax.Array | Streamed:
        """Design rows at θ, (batch, columns), made of `chunk` samples at a time. Under least
        squares they are not held then; under other losses W takes many products with them."""
        if self.chunk is None or not self.chunked(inputs):
            return self.model.rows(theta, inputs)
        streamed = Streamed(self.model, theta, inputs, self.chunk)
        return streamed if self.loss.quadratic else streamed.each(lambda z: z)

    def chunked(self, inputs) -> bool:
        """Are there more samples than a chunk has?"""
        return self.chunk is not None and any(len(x) > self.chunk for x in leaves_of(inputs))

    def penalty(self, theta) -> jax.Array:
        """R(θ), a scalar of θ's dtype."""
        dtype = jnp.result_type(*jax.tree.leaves(theta))
        values = (jnp.asarray(p(theta), dtype) for p in self.theta_penalty)
        return sum(values, start=jnp.zeros((), dtype))

    def w_penalty_like(self, array) -> jax.Array:
        """`w_penalty` in an array's dtype: under trace it may come in another one."""
        return jnp.asarray(self.w_penalty, jnp.result_type(array))

    def penalty_on_w(self, w) -> jax.Array:
        """½ w_penalty ‖W‖², a scalar of W's dtype."""
        return 0.5 * self.w_penalty_like(w) * jnp.sum(w**2)

    def w_objective(self, w, rows, targets) -> jax.Array:
        """The part of Φ that sees W: loss(rows W, targets) + ½ w_penalty ‖W‖²."""
        return self.loss.value(rows @ w, targets) + self.penalty_on_w(w)

    def w_gradient(self, w, rows, targets) -> jax.Array:
        """The derivative of `w_objective` in W, (columns, outputs)."""
        return rows.T @ self.loss.gradient(rows @ w, targets) + self.w_penalty_like(w) * w


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
_register(Problem, ["model", "theta_penalty", "w_penalty"], ["loss", "chunk"])


def _partial(fn):
    return fn if isinstance(fn, Partial) else Partial(fn)


def _takes_inputs_alone(features):
    """Is this a network, or a class, rather than a function of θ and inputs?"""
    if isinstance(features, type):
        return True
    if library(features) is None:
        return False
    asked = inspect.signature(features).parameters.values()
    return sum(x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD for x in asked) < 2


def _unpacked(value):
    """How to come by a model from the pair that has one, as the end of a message."""
    paired = isinstance(value, tuple) and any(isinstance(item, Separable) for item in value)
    return "; theta, model = varprox.nnx.split(net) unpacks the pair" if paired else ""


def objective(problem: Problem, theta, w, data) -> jax.Array:
    """Φ(W, θ), a scalar; `data` is (inputs, targets)."""
    inputs, targets = data
    rows = problem.rows(theta, inputs)
    return problem.w_objective(w, rows, targets) + problem.penalty(theta)


def check_problem(problem: Any) -> None:
    """Refuses what is not a problem with a TypeError."""
    if not isinstance(problem, Problem):
        has_one = isinstance(getattr(problem, "problem", None), Problem)
        hint = "; its field problem is one" if has_one else ""
        raise TypeError(f"problem: expected a varprox.Problem, got {shown(problem)}{hint}")
