"""The methods of the contract suite, the problems that they are run on, and runs of theirs."""

import functools
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import features, initial_theta, make_data, plain_rows, plain_w, w_value

import varprox as vp
from benchmarks import baselines
from benchmarks.starts import random_w

METHODS = {
    "gnvpro-krylov": functools.partial(vp.gnvpro, curvature="krylov", rank=8),
    "gnvpro-dense": functools.partial(vp.gnvpro, curvature="dense"),
    "gnvpro-kernel": functools.partial(vp.gnvpro, curvature="kernel"),
    "lbfgsvpro": functools.partial(vp.lbfgsvpro, memory=8),
    "broydenvpro": vp.broydenvpro,
}
FORWARD = {"gnvpro-forward": functools.partial(vp.gnvpro, curvature="forward")}
FULL_BATCH = METHODS | FORWARD
RIVALS = {  # which train θ and W together
    "gn": functools.partial(baselines.gn, rank=8),
    "lbfgs": baselines.lbfgs,
    "broyden": baselines.broyden,
    # From W(θ) its first steps would be signs of rounding.
    "adam": functools.partial(baselines.adam, learning_rate=1e-2, start=random_w),
}
SLIMTRAIN = {"slimtrain": functools.partial(vp.slimtrain, optimizer=optax.sgd(0.1))}
ALL = METHODS | RIVALS | SLIMTRAIN
# The options that are numbers.
NUMBERS = {name: {"tolerance": 1e-13} for name in METHODS} | {
    "gn": {"flat": 0.03},
    "lbfgs": {},
    "broyden": {},
    "adam": {"learning_rate": 1e-2, "horizon": 1e3},
    "slimtrain": {"initial": 0.05, "lower_bound": 1e-7},
}
LOSSES = {"least_squares": vp.least_squares(), "softmax_cross_entropy": vp.softmax_cross_entropy()}
PENALTY, W_PENALTY = 3e-2, 3e-2

methods = pytest.mark.parametrize("name", METHODS)
losses = pytest.mark.parametrize("loss", LOSSES)
# Broydenvpro and LBFGSvpro see the loss through the same lines.
PAIRS = [*product(METHODS, LOSSES)]
PAIRS.remove(("broydenvpro", "softmax_cross_entropy"))
# Rivals see the loss through its value and slopes alone, but for GN.
OTHERS = [
    ("gn", "softmax_cross_entropy"),
    ("lbfgs", "softmax_cross_entropy"),
    ("broyden", "least_squares"),
    ("adam", "softmax_cross_entropy"),
    ("slimtrain", "least_squares"),
]
traces = []


def fenced(centre, radius, theta, inputs):
    """The features, not a number further than `radius` from `centre`; notes whenever it is traced.

    Centre and radius are numbers of the problem, so that all tests share one compiled step.
    """
    traces.append(None)
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), theta, centre)
    outside = sum(jax.tree.leaves(squares)) > radius * jnp.abs(radius)
    return features(theta, inputs) * jnp.where(outside, jnp.nan, 1.0).astype(inputs.dtype)


def make_problem(
    loss="least_squares", radius=np.inf, penalty=PENALTY, w_penalty=W_PENALTY, dtype=np.float64
):
    fn = jax.tree_util.Partial(fenced, initial_theta(dtype=dtype), np.array(radius, dtype))
    return vp.Problem(vp.Separable(fn), LOSSES[loss], penalty, w_penalty)


def plain_problem(fn, penalty=PENALTY, w_penalty=W_PENALTY):
    return vp.Problem(vp.Separable(fn), vp.least_squares(), penalty, w_penalty)


def make(loss="least_squares", dtype=np.float64):
    return initial_theta(dtype=dtype), make_data(loss, 2, dtype=dtype)


def signature(tree):
    """Structure, shapes, dtypes and weak types: what decides whether a step is compiled again."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [jax.typeof(leaf) for leaf in leaves]


class Run(NamedTuple):
    """A run, of full-batch methods to convergence, in NumPy, and how often each call traced the
    features."""

    loss: str
    data: tuple
    states: list
    infos: list
    traces: list
    signatures: list


def begin(method, theta, data):
    """With the same random key always, which the rivals do not do without."""
    return method.init(theta, data, jax.random.key(0))


@functools.cache
def run(name, loss):
    with jax.enable_x64(True):
        theta, data = make(loss)
        method = ALL[name](make_problem(loss), **NUMBERS[name])
        steps = 200 if name in METHODS else 12
        states, infos, counts = [begin(method, theta, data)], [], []
        while states[-1].status == vp.Status.RUNNING and len(infos) < steps:
            traces.clear()
            state, info = method.step(states[-1], data)
            counts.append(len(traces))
            states.append(state)
            infos.append(info)
        # Other numbers in the problem and the options, same functions.
        other = make_problem(loss, np.inf, 2 * PENALTY, 3 * W_PENALTY)
        traces.clear()
        twice = {option: 2 * number for option, number in NUMBERS[name].items()}
        ALL[name](other, **twice).step(states[1], data)
        counts.append(len(traces))
        signatures = [signature(state) for state in states], [signature(info) for info in infos]
        states, infos = jax.tree.map(np.asarray, (states, infos))
        return Run(loss, data, states, infos, counts, signatures)


def value(run, state):
    """Φ at the weights of a state of this run in NumPy."""
    inputs, targets = run.data
    with jax.enable_x64(True):
        rows = plain_rows(state.theta, inputs, bias=True)
    squares = sum(float(np.sum(np.square(leaf))) for leaf in state.theta.values())
    of_w = w_value(run.loss, rows, state.w, targets, W_PENALTY)
    return of_w + 0.5 * PENALTY * squares


def reference(loss, theta, data):
    """Φ_red and W at θ in NumPy."""
    with jax.enable_x64(True):
        rows = plain_rows(theta, data[0], bias=True)
    w = plain_w(loss, rows, data[1], W_PENALTY)
    squares = sum(float(np.sum(np.square(leaf))) for leaf in theta.values())
    return w_value(loss, rows, w, data[1], W_PENALTY) + 0.5 * PENALTY * squares, w


def finish(method, theta, data, steps=60):
    """The states until the status says that the run has ended."""
    states = [begin(method, theta, data)]
    while states[-1].status == vp.Status.RUNNING and len(states) <= steps:
        states.append(method.step(states[-1], data)[0])
    return states
