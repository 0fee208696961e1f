"""The small problems of the tests, and the mathematics of the library written out a second time.

Everything after `PLAIN` is the oracle: formulas in NumPy or plain autodiff that share no code with
the package. The only thing taken from JAX there is the derivative of the features.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import varprox as vp
from varprox.problem.weighted import Weighted
from varprox.reduced.projection import project, start_projection
from varprox.reduced.w_hessian import factorise

SAMPLES, WIDTH, LAYERS, TIME_STEP = 16, 3, 2, 0.5


def features(theta, inputs):
    """A residual network: an opening layer and `LAYERS` steps in time."""
    z = jnp.tanh(inputs @ theta["opening"])
    for kernel in theta["layers"]:
        z = z + TIME_STEP * jnp.tanh(z @ kernel)
    return z


def initial_theta(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    theta = {
        "opening": rng.normal(size=(2, WIDTH)),
        "layers": 0.7 * rng.normal(size=(LAYERS, WIDTH, WIDTH)),
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), theta)


def direction(seed=1, dtype=np.float64):
    """A pytree like θ with norm one."""
    theta = initial_theta(seed, dtype)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in theta.values()))
    return jax.tree.map(lambda leaf: (leaf / norm).astype(dtype), theta)


def make_data(kind, outputs, samples=SAMPLES, seed=2, dtype=np.float64):
    """Inputs and targets of the kind a loss takes; noisy targets, so residuals are not small."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(samples, 2))
    score = np.sin(2 * inputs @ rng.normal(size=(2, outputs))) + 0.3 * rng.normal(
        size=(samples, outputs)
    )
    if kind == "softmax_cross_entropy":
        targets = np.eye(outputs)[score.argmax(axis=1)]
        targets[0] = 1 / outputs  # a row of probabilities that is not one-hot
    elif kind == "logistic":
        targets = (score > 0).astype(float)
        targets[0] = 0.3
    else:
        targets = score
    return inputs.astype(dtype), targets.astype(dtype)


def pseudo_huber(prediction, target):
    return jnp.sum(jnp.sqrt(1 + (prediction - target) ** 2) - 1)


def quartic(theta):
    """A penalty that is an arbitrary smooth function of θ, its Hessian dense and not constant."""
    return 1e-2 * jnp.sum(theta["layers"]) ** 4 + 0.1 * jnp.sum(jnp.cos(theta["opening"]))


def layers(theta):
    return theta["layers"]


def products(fn, *args):
    """Where the products and convolutions of a function of arrays stand in the code, and whether
    they ask for full precision: a list of pairs."""
    found = []

    def is_jaxpr(value):
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                precision = equation.params["precision"]
                full = precision is not None and set(precision) == {jax.lax.Precision.HIGHEST}
                found.append((str(equation.source_info.traceback), full))
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(value):
                    walk(getattr(value, "jaxpr", value))

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


LOSSES = {
    "least_squares": vp.least_squares(),
    "softmax_cross_entropy": vp.softmax_cross_entropy(),
    "logistic": vp.logistic(),
    "pseudo_huber": vp.convex_loss(pseudo_huber),
}
PENALTIES = {
    "none": None,
    "tikhonov": vp.tikhonov(1e-2),
    "smoothness": vp.smoothness_in_time(3e-2, TIME_STEP, layers),
    "function": quartic,
    "tuple": (vp.tikhonov(1e-2), vp.smoothness_in_time(3e-2, TIME_STEP, layers), quartic),
}


class Case(NamedTuple):
    """One combination that every derivative is tested on."""

    loss: str
    outputs: int = 3
    bias: bool = True
    penalty: str = "tikhonov"
    w_penalty: float = 3e-2
    weights: str = ""  # of "samples" or of "entries"

    def __str__(self):
        bias = "bias" if self.bias else "nobias"
        weights = f"-{self.weights}" if self.weights else ""
        return f"{self.loss}-{self.outputs}-{bias}-{self.penalty}{weights}"

    @property
    def problem(self):
        return vp.Problem(
            vp.Separable(features, vp.dense(self.bias)),
            LOSSES[self.loss],
            PENALTIES[self.penalty],
            self.w_penalty,
        )

    @property
    def data(self):
        inputs, targets = make_data(self.loss, self.outputs)
        if not self.weights:
            return inputs, targets
        columns = 1 if self.weights == "samples" else self.outputs
        rng = np.random.default_rng(4)
        weights = rng.uniform(0.2, 3, (len(targets), columns))
        weights[rng.uniform(size=weights.shape) < 0.2] = 0
        return inputs, Weighted(targets, weights)


CASES = [
    *(Case(loss, bias=bias) for loss in LOSSES for bias in (True, False)),
    *(Case("least_squares", 2, penalty=p) for p in PENALTIES if p != "tikhonov"),
    Case("least_squares", outputs=1),
    Case("logistic", outputs=1, penalty="tuple"),
    Case("least_squares", weights="samples"),
    Case("least_squares", weights="entries"),
    Case("softmax_cross_entropy", weights="samples"),
    Case("logistic", outputs=2, weights="entries"),
    Case("pseudo_huber", outputs=2, weights="samples"),
]


# PLAIN


def plain_rows(theta, inputs, bias):
    z = np.asarray(features(theta, inputs))
    return np.hstack([z, np.ones((len(z), 1))]) if bias else z


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def parts(targets):
    """Targets and their weights, (batch, 1) or (batch, outputs)."""
    if isinstance(targets, Weighted):
        return targets.values, targets.weights
    return targets, np.ones((len(targets), 1))


def loss_value(kind, predictions, targets):
    """The mean loss, in operations that NumPy and JAX share."""
    xp = np if isinstance(predictions, np.ndarray) else jnp
    targets, weights = parts(targets)
    residual = predictions - targets
    if kind == "least_squares":
        terms = 0.5 * residual**2
    elif kind == "pseudo_huber":
        terms = xp.sqrt(1 + residual**2) - 1
    elif kind == "logistic":
        terms = xp.logaddexp(predictions, 0.0) - targets * predictions
    else:
        top = predictions.max(axis=1, keepdims=True)
        log_sum = top + xp.log(xp.sum(xp.exp(predictions - top), axis=1, keepdims=True))
        terms = targets * (log_sum - predictions)
    return xp.sum(weights * terms) / len(predictions)


def loss_gradient(kind, predictions, targets):
    targets, weights = parts(targets)
    residual = predictions - targets
    if kind == "least_squares":
        slope = residual
    elif kind == "pseudo_huber":
        slope = residual / np.sqrt(1 + residual**2)
    elif kind == "logistic":
        slope = 1 / (1 + np.exp(-predictions)) - targets
    else:
        slope = softmax(predictions) - targets
    return weights * slope / len(predictions)


def loss_hessian(kind, predictions, targets):
    """The blocks ∂²loss / ∂prediction², (batch, outputs, outputs), with the mean's 1 / batch."""
    n, outputs = predictions.shape
    targets, weights = parts(targets)
    if kind == "softmax_cross_entropy":
        p = softmax(predictions)
        blocks = np.einsum("no,op->nop", p, np.eye(outputs)) - np.einsum("no,np->nop", p, p)
    else:
        if kind == "least_squares":
            curvature = np.ones_like(predictions)
        elif kind == "pseudo_huber":
            curvature = (1 + (predictions - targets) ** 2) ** -1.5
        else:
            s = 1 / (1 + np.exp(-predictions))
            curvature = s * (1 - s)
        blocks = np.einsum("no,op->nop", curvature, np.eye(outputs))
    return weights[:, :, None] * blocks / n


def w_hessian(kind, rows, w, targets, alpha):
    """∇²_W Φ as a square matrix over the entries of W in C order."""
    blocks = loss_hessian(kind, rows @ w, targets)
    size = w.size
    dense = np.einsum("ni,nop,nj->iojp", rows, blocks, rows).reshape(size, size)
    return dense + alpha * np.eye(size)


def w_gradient(kind, rows, w, targets, alpha):
    return rows.T @ loss_gradient(kind, rows @ w, targets) + alpha * w


def w_value(kind, rows, w, targets, alpha):
    return loss_value(kind, rows @ w, targets) + 0.5 * alpha * np.sum(w**2)


def plain_w(kind, rows, targets, alpha):
    """argmin_W Φ: a stacked least-squares problem, or damped Newton with dense solves."""
    columns, outputs = rows.shape[1], targets.shape[1]
    if kind == "least_squares":
        values, weights = parts(targets)
        scale = np.sqrt(np.broadcast_to(weights, values.shape) / len(rows))
        w = np.zeros((columns, outputs))
        for k in range(outputs):
            a = np.vstack([scale[:, k : k + 1] * rows, alpha**0.5 * np.eye(columns)])
            w[:, k] = np.linalg.lstsq(a, np.append(scale[:, k] * values[:, k], columns * [0.0]))[0]
        return w
    w = np.zeros((columns, outputs))
    for _ in range(200):
        gradient = w_gradient(kind, rows, w, targets, alpha)
        step = np.linalg.solve(w_hessian(kind, rows, w, targets, alpha), gradient.ravel())
        step, length = step.reshape(w.shape), 1.0
        here = w_value(kind, rows, w, targets, alpha)
        while length > 1e-8 and w_value(kind, rows, w - length * step, targets, alpha) > here:
            length /= 2
        w = w - (length if length > 1e-8 else 1.0) * step
        if np.linalg.norm(step) < 1e-13 * (1 + np.linalg.norm(w)):
            break
    return w


class Dense(NamedTuple):
    """The reduced problem at θ, as dense NumPy arrays over the flattened θ."""

    value: float
    w: np.ndarray
    gradient: np.ndarray  # (p,)
    jacobian: np.ndarray  # (batch · outputs, p)
    w_jacobian: np.ndarray  # (columns · outputs, p)
    gauss_newton: np.ndarray  # (p, p)


@jax.jit
def feature_derivative(theta, inputs):
    flat, unravel = ravel_pytree(theta)
    return jax.jacfwd(lambda flat: features(unravel(flat), inputs))(flat)


def dense_reference(case: Case, theta, data) -> Dense:
    """H = Jᵀ∇²L J + α₂ J_WᵀJ_W + ∇²R with J_W by the implicit function theorem, entry by entry."""
    inputs, targets = data
    flat, unravel = ravel_pytree(theta)
    derivative = np.asarray(feature_derivative(theta, inputs))
    n, _m, p = derivative.shape
    if case.bias:
        derivative = np.concatenate([derivative, np.zeros((n, 1, p))], axis=1)
    rows = plain_rows(theta, inputs, case.bias)
    w = plain_w(case.loss, rows, targets, case.w_penalty)
    predictions = rows @ w
    slope = loss_gradient(case.loss, predictions, targets)
    blocks = loss_hessian(case.loss, predictions, targets)

    outputs = targets.shape[1]
    jacobian_w = np.zeros((w.size, p))
    jacobian = np.zeros((n * outputs, p))
    gradient = np.zeros(p)
    hessian_w = w_hessian(case.loss, rows, w, targets, case.w_penalty)
    for k in range(p):
        d_rows = derivative[:, :, k]
        held = d_rows @ w  # the change of the predictions with W held fixed
        change = d_rows.T @ slope + rows.T @ np.einsum("nop,np->no", blocks, held)
        jacobian_w[:, k] = -np.linalg.solve(hessian_w, change.ravel())
        d_w = jacobian_w[:, k].reshape(w.shape)
        jacobian[:, k] = (held + rows @ d_w).ravel()
        gradient[k] = np.sum(slope * held)

    size = n * outputs
    loss_curvature = np.zeros((size, size))
    for i in range(n):
        block = slice(i * outputs, (i + 1) * outputs)
        loss_curvature[block, block] = blocks[i]
    gauss_newton = jacobian.T @ loss_curvature @ jacobian
    gauss_newton += case.w_penalty * jacobian_w.T @ jacobian_w

    value = w_value(case.loss, rows, w, targets, case.w_penalty)
    terms = PENALTY_TERMS[case.penalty]
    for term in terms:
        penalty = functools.partial(term, unravel)
        value += float(penalty(flat))
        gradient += np.asarray(jax.grad(penalty)(flat))
        gauss_newton += np.asarray(jax.hessian(penalty)(flat))
    return Dense(float(value), w, gradient, jacobian, jacobian_w, gauss_newton)


def _square(unravel, flat):
    return 0.5 * 1e-2 * flat @ flat


def _slopes(unravel, flat):
    kernels = unravel(flat)["layers"]
    terms = [jnp.sum((kernels[j + 1] - kernels[j]) ** 2) for j in range(LAYERS - 1)]
    return 0.5 * 3e-2 * sum(terms) / TIME_STEP**2


def _quartic(unravel, flat):
    return quartic(unravel(flat))


PENALTY_TERMS: dict[str, list[Any]] = {
    "none": [],
    "tikhonov": [_square],
    "smoothness": [_slopes],
    "function": [_quartic],
    "tuple": [_square, _slopes, _quartic],
}


def plain_reduced(case: Case, w_star, flat, unravel, data):
    """Φ_red by two exact Newton iterations on W from a constant, to be differentiated.

    At the constant W(θ) one iteration has the right first derivative and two have the right second.
    """
    inputs, targets = data
    z = features(unravel(flat), inputs)
    rows = jnp.concatenate([z, jnp.ones_like(z[:, :1])], axis=1) if case.bias else z

    def phi(w):
        w = w.reshape(w_star.shape)
        return loss_value(case.loss, rows @ w, targets) + 0.5 * case.w_penalty * jnp.sum(w**2)

    w = jnp.asarray(w_star).ravel()
    for _ in range(2):
        w = w - jnp.linalg.solve(jax.hessian(phi)(w), jax.grad(phi)(w))
    return phi(w) + sum(term(unravel, flat) for term in PENALTY_TERMS[case.penalty])


STEPS = 0.01 * 0.5 ** np.arange(5)


def assert_taylor(at, derivative):
    """`at(h) − at(0) − h · derivative` falls with the square of h; `at` returns an array."""
    here = np.asarray(at(0.0))
    remainders = [np.linalg.norm(np.asarray(at(h)) - here - h * derivative) for h in STEPS]
    orders = np.log2(np.array(remainders[:-1]) / remainders[1:])
    assert orders.min() >= 1.9, (orders, remainders)


def relative(actual, expected):
    """The largest difference of two arrays over the largest entry of the second."""
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def move(theta, step, along):
    return jax.tree.map(lambda a, b: a + np.asarray(step, a.dtype) * b, theta, along)


@jax.jit
def projection_at(problem, theta, data, w):
    """What the methods know of W(θ), which is `w`, with its exact factor."""
    inputs, targets = data
    rows = problem.model.rows(theta, inputs)
    found = project(problem, rows, targets, start_projection(problem, rows, targets))
    slopes = problem.loss.gradient(rows @ w, targets)
    factor = factorise(problem, rows, w, targets, whole=True)
    return found._replace(w=w, slopes=slopes, factor=factor)
