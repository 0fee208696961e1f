"""What variable projection is compared with: methods that train θ and W together.

All but `scipy_lbfgs` are a `varprox.Method`, run through the same `varprox.fit`. Each starts from the lower
Φ of two choices of W: small random numbers, and W(θ).
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

import varprox as vp
from varprox import Method, Problem, Status, trust_region
from varprox.model import check_data, objective, predict

SPREAD = 0.1  # standard deviation of the random W
MEMORY = 20  # pairs that L-BFGS keeps
MAX_TRIALS = 10  # of GN's trust region
ADAM, SGD = optax.scale_by_adam(), optax.trace(decay=0.9, nesterov=True)


class State(NamedTuple):
    """The weights, and in `memory` whatever the method itself carries from step to step."""

    theta: Any
    w: jax.Array
    objective: jax.Array
    memory: Any
    work_units: jax.Array  # so far
    status: jax.Array


def start_w(problem: Problem, theta: Any, data: tuple, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The W that a baseline starts from, and Φ there: the better of 0.1 · normal and W(θ)."""
    solved = vp.solve_w(problem, theta, data)
    drawn = SPREAD * jax.random.normal(key, solved.shape, solved.dtype)
    value, drawn_value = (_objective(problem, (theta, w), data) for w in (solved, drawn))
    better = drawn_value < value
    return jnp.where(better, drawn, solved), jnp.where(better, drawn_value, value)


# ------------------------------------------------------------------------------- stochastic gradients


class EpochInfo(NamedTuple):
    """What one epoch ended with."""

    objective: jax.Array
    learning_rate: jax.Array


def adam(
    problem: Problem,
    learning_rate: float,
    *,
    batch_size: int | None = None,
    horizon: float = math.inf,
) -> Method:
    """Adam on (θ, W); a step is one epoch over shuffled minibatches of `batch_size` samples, None for all.

    The learning rate falls along half a cosine to zero at `horizon` work units; with an infinite horizon it is
    constant. An epoch leaves out the samples that do not fill a batch, other ones each time. It is 2 work units;
    the evaluation of Φ that ends it is charged none, but `seconds` contains it: see `evaluation_seconds`.
    """
    return _stochastic(problem, ADAM, learning_rate, batch_size, horizon)


def sgd(
    problem: Problem,
    learning_rate: float,
    *,
    batch_size: int | None = None,
    horizon: float = math.inf,
) -> Method:
    """Stochastic gradient descent with Nesterov momentum 0.9 on (θ, W); everything else as in `adam`."""
    return _stochastic(problem, SGD, learning_rate, batch_size, horizon)


def _stochastic(problem, rule, learning_rate, batch_size, horizon):
    for name, value in {"learning_rate": learning_rate, "horizon": horizon}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    if batch_size is not None:
        _check_count("batch_size", batch_size)
    init = partial(_stochastic_init, problem, rule, batch_size)
    step = partial(_epoch, problem, learning_rate, horizon, rule=rule, batch_size=batch_size)
    return Method(init, step, problem)


def _stochastic_init(problem, rule, batch_size, theta, data, key):
    check_data(problem, theta, data)
    if batch_size is not None and batch_size > len(data[1]):
        raise ValueError(
            f"batch_size: expected at most the number of samples, {len(data[1])}, got {batch_size}"
        )
    w_key, key = jax.random.split(key)
    w, value = start_w(problem, theta, data, w_key)
    return _state(theta, w, value, (rule.init((theta, w)), key), 1, Status.RUNNING)


@partial(jax.jit, static_argnames=("rule", "batch_size"))
def _epoch(problem, learning_rate, horizon, state, data, *, rule, batch_size):
    samples = len(data[1])
    size = samples if batch_size is None else batch_size
    memory, key = state.memory
    key, shuffling = jax.random.split(key)
    order = jax.random.permutation(shuffling, samples)[: samples // size * size]
    part = jnp.minimum((state.work_units - 1) / horizon, 1).astype(state.w.dtype)
    rate = learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * part))

    def descend(carry, chosen):
        weights, memory = carry
        batch = jax.tree.map(lambda x: x[chosen], data)
        gradient = jax.grad(objective_of, argnums=1)(problem, weights, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and int64 under x64
            direction, memory = rule.update(gradient, memory)
        weights = jax.tree.map(lambda x, d: x - rate.astype(x.dtype) * d, weights, direction)
        return (weights, memory), None

    carry = (state.theta, state.w), memory
    (weights, memory), _ = jax.lax.scan(descend, carry, order.reshape(-1, size))
    value = objective_of(problem, weights, data)
    finite = jnp.isfinite(value)
    weights, value = _choose(
        finite, (weights, value), ((state.theta, state.w), state.objective)
    )
    status = jnp.where(finite, Status.RUNNING, Status.NON_FINITE)
    new = _state(*weights, value, (memory, key), state.work_units + 2, status)
    return new, EpochInfo(value, rate)


def evaluation_seconds(problem: Problem, theta: Any, w: jax.Array, data: tuple) -> float:
    """The time of one evaluation of Φ, compiled: the median of 21."""
    times = []
    for _ in range(22):  # the first one compiles
        begin = time.perf_counter()
        jax.block_until_ready(_objective(problem, (theta, w), data))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))


# ------------------------------------------------------------------------------------------- L-BFGS


class LbfgsInfo(NamedTuple):
    """What one iteration did; all of it belongs to the weights after it."""

    objective: jax.Array
    gradient_norm: jax.Array
    trials: jax.Array


def lbfgs(problem: Problem) -> Method:
    """optax's L-BFGS with 20 pairs and its zoom line search, on (θ, W).

    Work units: 2 an evaluation in the line search, which hands its last gradient on to the next step.
    """
    return Method(partial(_lbfgs_init, problem), partial(_lbfgs_step, problem), problem)


def _lbfgs_init(problem, theta, data, key):
    check_data(problem, theta, data)
    w, _ = start_w(problem, theta, data, key)
    value, gradient = _value_and_gradient(problem, (theta, w), data)
    memory = gradient, optax.scale_by_lbfgs(MEMORY).init((theta, w))
    return _state(theta, w, value, memory, 2, Status.RUNNING)


@jax.jit
def _lbfgs_step(problem, state, data):
    weights, (gradient, pairs) = (state.theta, state.w), state.memory
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and int64 under x64
        direction, pairs = optax.scale_by_lbfgs(MEMORY).update(gradient, pairs, weights)
        search = optax.scale_by_zoom_linesearch(20, initial_guess_strategy="one")
        updates, found = search.update(
            jax.tree.map(jnp.negative, direction),
            search.init(weights),
            weights,
            value=state.objective,
            grad=gradient,
            value_fn=lambda weights: objective_of(problem, weights, data),
        )
    better = found.value < state.objective  # False where it is not a number
    weights, value, gradient = _choose(
        better,
        (optax.apply_updates(weights, updates), found.value, found.grad),
        (weights, state.objective, gradient),
    )
    trials = found.info.num_linesearch_steps.astype(jnp.int32)
    status = jnp.where(better, Status.RUNNING, Status.STALLED)
    new = _state(*weights, value, (gradient, pairs), state.work_units + 2 * trials, status)
    return new, LbfgsInfo(value, optax.tree.norm(gradient), trials)


def scipy_lbfgs(
    problem: Problem,
    theta: Any,
    w: jax.Array,
    data: tuple,
    *,
    validation: tuple | None = None,
    metrics: Mapping[str, Callable] | None = None,
    max_work: float,
) -> vp.Solution:
    """SciPy's L-BFGS-B with 20 pairs on (θ, W), from the given weights; history and units as in `fit`.

    SciPy's own arithmetic is in double precision; Φ and its gradient are compiled, in the dtype of θ. `seconds`
    counts both, from the start of the run, and leaves evaluation for the history out.
    """
    flat, unravel = ravel_pytree((theta, w))
    sets = {"train": data} | ({"validation": validation} if validation is not None else {})

    def value_and_gradient(x):
        weights = unravel(jnp.asarray(x, flat.dtype))
        value, gradient = _value_and_gradient(problem, weights, data)
        return float(value), np.asarray(ravel_pytree(gradient)[0], np.float64)

    begin = time.perf_counter()
    value, _ = value_and_gradient(flat)
    compiling = time.perf_counter()
    value_and_gradient(flat)
    run_begin = time.perf_counter()
    compile_seconds = max(compiling - begin - (run_begin - compiling), 0.0)

    evaluations, outside, table = 0, 0.0, []

    def counted(x):
        nonlocal evaluations
        evaluations += 1
        return value_and_gradient(x)

    def record(intermediate_result):
        nonlocal outside
        pause = time.perf_counter()
        weights = unravel(jnp.asarray(intermediate_result.x, flat.dtype))
        row = {"objective": float(intermediate_result.fun), "work_units": 2.0 * evaluations}
        row["seconds"] = pause - run_begin - outside
        table.append(row | _evaluations(problem, weights, row["objective"], sets, metrics or {}))
        outside += time.perf_counter() - pause
        if row["work_units"] >= max_work:
            raise StopIteration

    limits = {"maxcor": MEMORY, "maxiter": 10**9, "maxfun": 10**9, "ftol": 0.0, "gtol": 0.0}
    found = minimize(
        counted, np.asarray(flat, np.float64), jac=True, method="L-BFGS-B", callback=record,
        options=limits,
    )  # fmt: skip
