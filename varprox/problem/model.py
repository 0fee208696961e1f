"""The separable model, the problem (model, loss and penalties) and its objective Φ(W, θ).

Both are pytrees. Their leaves are the numbers in them: penalty weights, and arrays bound to the
features. A compiled function takes a problem as an argument and serves for all values of these
numbers.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial, register_pytree_node

from varprox.checks import (
    ARRAYS,
    apart,
    called,
    check_array,
    check_number,
    is_result,
    kind,
    library,
    named,
    shown,
)
from varprox.precision import full_products
from varprox.problem.covariance import Covariance, deviations, times_derivative
from varprox.problem.heads import ConvHead, Head, dense
from varprox.problem.losses import Loss
from varprox.problem.penalties import as_penalty


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

    Raises:
        TypeError: If `model` is not a `Separable`, if `loss` is not a loss, or if a penalty is
            neither a number nor a function.
        ValueError: If a number is negative or not finite, or if `w_penalty` is 0 under a loss other
            than least squares.

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

    def __init__(self, model, loss, theta_penalty=None, w_penalty=0.0):
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

    def __repr__(self) -> str:
        penalties = " + ".join(map(named, self.theta_penalty)) or None
        return (
            f"Problem({self.model!r}, {type(self.loss).__name__}, theta_penalty={penalties}, "
            f"w_penalty={self.w_penalty!r})"
        )

    def with_model(self, model: Separable) -> "Problem":
        """The same problem for another model."""
        return Problem(model, self.loss, self.theta_penalty, self.w_penalty)

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
_register(Problem, ["model", "theta_penalty", "w_penalty"], ["loss"])


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
    rows = problem.model.rows(theta, inputs)
    return problem.w_objective(w, rows, targets) + problem.penalty(theta)


@full_products
def predict(
    problem: Problem, theta, w, inputs, covariance: Covariance | None = None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The predictions of a problem's model at given weights, and how far the data determine them.

    Arguments:
        problem: The `Problem`; only its model matters.
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
    for name, leaves in ("theta", weights(theta)), ("w", [w]), ("inputs", jax.tree.leaves(inputs)):
        for leaf in leaves:
            check_array(name, leaf)
    head = problem.model.head
    z = called("features", problem.model.features, theta=theta, inputs=inputs)
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
    predictions = head.apply(z, w)
    if covariance is None:
        return predictions
    _check_covariance(covariance, sum(map(np.size, jax.tree.leaves((theta, w)))))
    forward, _ = derivatives(problem, theta, inputs)
    return predictions, _deviations(problem.model, theta, w, inputs, covariance, forward=forward)


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


def treats_samples_alone(problem: Problem, theta, inputs) -> bool:
    """Are the features of a sample the same without the rest of the batch?

    Where θ, inputs or arrays bound to the features are traced, random ones in their place tell.
    Inputs without an array have no samples to take apart, so features of them are never alone.

    The first, the middle and the last sample are compared. A coupling along the batch in one
    direction, such as a convolution, a solution in time or a cumulative sum, leaves only the sample
    at one end as it is alone; one by a mean, a sum or a norm leaves none but those that happen to
    be the mean, and one by an extremum those that are extremal, of which two may be at the ends,
    hence the third.

    The weights are shifted by about a tenth of their size for this, so that a coupling is seen that
    vanishes at θ, as with a weight that starts at zero. A coupling that depends on the weights
    analytically vanishes almost nowhere or everywhere; so where the features agree at such a place,
    their derivatives do. Where the shift leads to what is not a number, θ itself is tried.

    Batches of another size are added up in another order, so features may differ by rounding: by
    eps^½ of the largest in their column, which forgives cancellation of half the digits, plus
    eps^¾ of the largest of all, for columns that are nothing but rounding. The cost is a pass over
    the data and its compilation.
    """
    batches = [len(leaf) for leaf in jax.tree.leaves(inputs)]
    if not batches:
        return False
    if batches[0] == 1:
        return True
    chosen = np.array([0, batches[0] // 2, batches[0] - 1])
    for at in _places(problem.model.features, theta, inputs):
        try:
            with jax.ensure_compile_time_eval():  # a caller's jit may hold all of this as constants
                both = _features_alone(*at, chosen)
            z, alone = map(np.asarray, both)
        except Exception:  # features may raise anything for a shape that they do not expect
            return False
        together = z[chosen][:, None]
        if alone.shape != together.shape:
            return False
        sizes = np.where(np.isfinite(z), np.abs(z), 0)
        eps = float(jnp.finfo(z.dtype).eps)
        tolerance = eps**0.5 * np.max(sizes, axis=0) + eps**0.75 * np.max(sizes)
        if not np.all(np.isclose(alone, together, rtol=0, atol=tolerance, equal_nan=True)):
            return False
        if np.isfinite(together).all():
            break
    return True


def _places(features, theta, inputs):
    """Features, θ and inputs to compare at, the next ones for where features are not finite: at a
    shifted θ, at θ itself, and where arrays are made up with positive ones, as variances are."""
    given = features, theta, inputs
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given))
    for positive in (False, True) if traced else (False,):
        features, theta, inputs = _made_up(given, positive)
        yield features, _shifted(theta), inputs
        yield features, theta, inputs


def _made_up(tree, positive):
    """The tree with random arrays of the same shapes and dtypes where it is traced."""
    rng = np.random.default_rng(0)

    def concrete(leaf):
        if not isinstance(leaf, jax.core.Tracer):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            with jax.ensure_compile_time_eval():
                return jnp.broadcast_to(
                    jax.random.key(0, impl=jax.random.key_impl(leaf)), leaf.shape
                )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return rng.integers(0, 2, leaf.shape).astype(leaf.dtype)
        drawn = rng.uniform(0.5, 1.5, leaf.shape) if positive else rng.normal(size=leaf.shape)
        return np.asarray(drawn).astype(leaf.dtype)

    return jax.tree.map(concrete, tree)


@jax.jit
@full_products
def _features_alone(features, theta, inputs, chosen):
    """The features of all samples, and those of the chosen ones alone."""
    samples = jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], inputs)
    alone = jax.vmap(lambda x: features(theta, jax.tree.map(lambda leaf: leaf[None], x)))
    return features(theta, inputs), alone(samples)


def _shifted(theta):
    """θ with every weight moved by 5 to 15 % of the root mean square of its array, up or down; of
    the largest of all where the array is zero."""
    leaves, structure = jax.tree.flatten(theta)
    leaves = [np.asarray(leaf) for leaf in leaves]
    sizes = [float(np.sqrt(np.mean(np.square(leaf, dtype=float)))) for leaf in leaves]
    rng = np.random.default_rng(0)

    def shifted(leaf, size):
        way = rng.choice([-1, 1], leaf.shape) * rng.uniform(0.05, 0.15, leaf.shape)
        return (leaf + (size or max(sizes) or 1.0) * way).astype(leaf.dtype)

    return jax.tree.unflatten(structure, map(shifted, leaves, sizes))


def derivatives(problem: Problem, theta, inputs) -> tuple[bool, bool]:
    """Can the rows be differentiated in forward mode, and in reverse mode? Nothing is computed.

    Functions with a rule for one mode only, such as `jax.custom_vjp`, and loops whose length
    depends on what they compute, such as `jax.lax.while_loop`, lack one of them.
    """

    def forward(model, theta, inputs):
        return jax.jvp(lambda theta: model.rows(theta, inputs), (theta,), (theta,))

    def reverse(model, theta, inputs):
        rows, pullback = jax.vjp(lambda theta: model.rows(theta, inputs), theta)
        return pullback(rows)

    types = jax.tree.map(_type, (problem.model, theta, inputs))
    # That `custom_vjp` has no forward mode is not found before the function is lowered.
    ways = partial(jax.jit(forward).lower, *types), partial(jax.eval_shape, reverse, *types)
    return _succeeds(ways[0]), _succeeds(ways[1])


def _type(x):
    x = jax.typeof(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)


def _succeeds(fn):
    try:
        fn()
    except Exception:  # a function of the user may raise anything
        return False
    return True


def check_problem(problem: Any) -> None:
    """Refuses what is not a problem with a TypeError."""
    if not isinstance(problem, Problem):
        has_one = isinstance(getattr(problem, "problem", None), Problem)
        hint = "; its field problem is one" if has_one else ""
        raise TypeError(f"problem: expected a varprox.Problem, got {shown(problem)}{hint}")


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
    check_problem(problem)
    of_images = isinstance(problem.model.head, ConvHead)
    if of_images and not images:
        raise TypeError(
            "problem: expected a model with a dense head; one with a convolutional head is trained "
            "by varprox.slimtrain"
        )
    inputs, targets = check_pair(data)
    dtype = _check_arrays(problem, theta, inputs, targets)
    _check_targets(problem, targets, of_images)
    check_inputs(inputs, targets)
    leaves = jax.tree.leaves((problem.model, theta, data))
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        _check_values(problem.model, theta, data, full_batch)
    _check_features(problem, theta, inputs, targets, dtype, of_images)
    _check_penalties(problem, theta, dtype)
    if not isinstance(targets, jax.core.Tracer):
        problem.loss.check(np.asarray(targets))


def check_pair(data: Any) -> tuple:
    """Inputs and targets, where these are arrays; else TypeError. Looks at no number."""
    if not (isinstance(data, tuple | list) and len(data) == 2):
        came = f"{type(data).__name__} of {len(data)}" if isinstance(data, tuple | list) else ""
        hint = "; weights of samples are not supported" if came.endswith(" of 3") else ""
        raise TypeError(f"data: expected a pair (inputs, targets), got {came or kind(data)}{hint}")
    inputs, targets = data
    for leaf in jax.tree.leaves(inputs):
        check_array("inputs", leaf)
    check_array("targets", targets)
    return inputs, targets


def weights(theta: Any) -> list:
    """The leaves of θ. A whole network, model or result is a leaf, too, which is no array."""

    def is_leaf(node):
        if library(node) == "equinox":  # what `eqx.partition` takes out is a module, too
            return not all(map(_floating, jax.tree.leaves(node)))
        return library(node) is not None or is_result(node) or isinstance(node, Separable | Problem)

    return jax.tree.leaves(theta, is_leaf=is_leaf)


def _floating(leaf):
    return isinstance(leaf, ARRAYS) and jnp.issubdtype(leaf.dtype, jnp.floating)


def check_w(problem: Problem, theta, w, data) -> None:
    """Refuses what is not W for data that have been checked."""
    check_array("w", w)
    expected = jax.eval_shape(lambda theta: _w_like(problem, theta, data), theta)
    if jnp.shape(w) != expected.shape:
        raise ValueError(
            f"w: expected shape {expected.shape}, as the rows and the targets ask for, got "
            f"{jnp.shape(w)}"
        )
    if jnp.result_type(w) != expected.dtype:
        raise TypeError(f"w: expected dtype {expected.dtype}, that of theta, got {w.dtype}")
    _check_finite("w", w)


def _w_like(problem, theta, data):
    inputs, targets = data
    return zero_w(problem, problem.model.features(theta, inputs), targets)


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


def _check_arrays(problem, theta, inputs, targets):
    """Refuses what are no numbers. The dtype of theta and the targets."""
    leaves = weights(theta)
    if not leaves:
        raise ValueError("theta: expected a pytree with at least one array, got an empty one")
    for leaf in leaves:
        check_array("theta", leaf)
        if not _floating(leaf):
            raise TypeError(
                f"theta: expected floating numbers, got dtype {leaf.dtype}; what is not trained is "
                "for the features to hold, as jax.tree_util.Partial binds it"
            )
        _check_finite("theta", leaf)
        if jnp.size(leaf) == 0:
            raise ValueError(f"theta: expected arrays with entries, got shape {jnp.shape(leaf)}")
    for leaf in jax.tree.leaves(inputs):
        _check_finite("inputs", leaf)
    if not _floating(targets):
        labels = targets.shape[1:] in ((), (1,))
        remedy = problem.loss.hint if labels else ""
        remedy = remedy or f"targets.astype({_dtypes(theta)[0]!r}) casts them"
        raise TypeError(f"targets: expected floating numbers, got dtype {targets.dtype}; {remedy}")
    _check_finite("targets", targets)
    return _one_dtype(theta, inputs, targets)


def _one_dtype(theta, inputs, targets):
    """That of theta and targets, where they have one in which there are factorisations."""
    ours, theirs = _dtypes(theta), _dtypes(targets)
    if ours != theirs:
        came = {"theta": ours, "inputs": _dtypes(inputs), "targets": theirs}
        of = ", ".join(
            f"{name} of {' and '.join(dtypes)}" for name, dtypes in came.items() if dtypes
        )
        remedy = f"cast the data to {ours[0]}" if len(ours) == 1 else "cast theta to one of these"
        if theirs == ["float64"]:
            remedy += ", or make the weights as nnx.Linear(…, param_dtype=jnp.float64) does"
        raise TypeError(
            f"theta, targets: expected one floating dtype throughout, got {of}; {remedy}"
        )
    if ours[0] not in ("float32", "float64"):
        raise TypeError(
            f"theta, targets: expected float32 or float64, got {ours[0]}; cast them to float32, "
            "as there are no factorisations in other precisions"
        )
    return jnp.dtype(ours[0])


def _dtypes(tree):
    """The names of the dtypes in a tree, as JAX takes its arrays."""
    return sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)})


def _check_targets(problem, targets, of_images):
    if of_images and jnp.ndim(targets) != 4:
        raise ValueError(
            f"targets: expected shape (batch, height, width, outputs), got {jnp.shape(targets)}"
        )
    if not of_images and jnp.ndim(targets) != 2:
        raise ValueError(
            f"targets: expected shape (batch, outputs), got {jnp.shape(targets)}; "
            + (problem.loss.hint or "a single output wants targets[:, None]")
        )
    if len(targets) == 0:
        raise ValueError("targets: expected at least one sample, got none")
    if 0 in targets.shape:
        raise ValueError(f"targets: expected at least one output, got shape {targets.shape}")


def check_inputs(inputs: Any, targets: Any) -> None:
    """Refuses inputs of another number of samples than the targets with a ValueError."""
    batch = len(targets)
    for leaf in jax.tree.leaves(inputs):
        if jnp.ndim(leaf) == 0 or len(leaf) != batch:
            listed = isinstance(inputs, list) and len(inputs) == batch
            hint = "; jnp.stack(inputs) makes one array of a list of samples" if listed else ""
            raise ValueError(
                f"inputs: expected {batch} samples along the first axis, as targets of shape "
                f"{targets.shape} have, got shape {jnp.shape(leaf)}{hint}"
            )


def _check_features(problem, theta, inputs, targets, dtype, of_images):
    batch = len(targets)
    traced = partial(jax.eval_shape, problem.model.features)
    z = called("features", traced, theta=theta, inputs=inputs)
    shape: tuple = getattr(z, "shape", ())
    came = getattr(z, "shape", type(z).__name__)
    if len(shape) != (4 if of_images else 2) or shape[0] != batch or shape[-1] == 0:
        expected = "height, width, channels), channels ≥ 1" if of_images else "m), m ≥ 1"
        raise ValueError(f"features: expected an array of shape ({batch}, {expected}, got {came}")
    if z.dtype != dtype:
        theirs = _dtypes(inputs)
        given = f" from inputs of {' and '.join(theirs)}" if theirs else ""
        what = "the inputs" if str(z.dtype) in theirs else "what the features return"
        raise TypeError(
            f"features: expected dtype {dtype}, that of theta and targets, got {z.dtype}{given}; "
            f"cast {what} to {dtype}"
        )
    predicted = jax.eval_shape(_predictions_like, problem, z, targets)
    if predicted.shape != targets.shape:
        raise ValueError(
            f"targets: expected shape {predicted.shape}, that of the predictions, "
            f"got {targets.shape}"
        )


def _check_penalties(problem, theta, dtype):
    """Refuses numbers that the dtype does not hold, and functions that are no penalties."""
    limits, w_penalty = jnp.finfo(dtype), problem.w_penalty
    for name in ("w_penalty", "theta_penalty"):
        for number in jax.tree.leaves(getattr(problem, name)):
            if isinstance(number, float) and number > float(limits.max):
                raise ValueError(f"{name}: expected a number that {dtype} holds, got {number!r}")
    vanishes = isinstance(w_penalty, float) and w_penalty < float(limits.tiny)
    if vanishes and not problem.loss.quadratic:
        raise ValueError(
            f"w_penalty: expected a positive number that {dtype} holds, got {w_penalty!r}"
        )
    for penalty in problem.theta_penalty:
        value = called("theta_penalty", partial(jax.eval_shape, penalty), theta=theta)
        came = getattr(value, "shape", type(value).__name__)
        if came != ():
            raise TypeError(f"theta_penalty: expected a scalar function, got {came}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"theta_penalty: expected a floating number, got dtype {value.dtype}")


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


def _check_finite(name, leaf):
    dtype = jax.typeof(leaf).dtype
    if isinstance(leaf, jax.core.Tracer) or not jnp.issubdtype(dtype, jnp.inexact):
        return
    with np.errstate(over="ignore"):  # where JAX makes single precision of double
        finite = np.isfinite(np.asarray(leaf).astype(dtype))
    if not finite.all():
        places = np.argwhere(~finite)
        raise ValueError(
            f"{name}: expected finite numbers, got {len(places)} NaN or Inf in {dtype}, the first "
            f"at {places[0].tolist()}"
        )
