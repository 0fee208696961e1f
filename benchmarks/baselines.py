"""What variable projection is compared with: methods that train θ and W together.

Each is a `varprox.Method`, run through the same `varprox.fit`. It starts from W(θ), or from small
random numbers if `start` is `random_w`, and is charged no work for it. SciPy's L-BFGS, which no
step can be taken out of, is in `scipy_lbfgs`.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from benchmarks import minibatch
from benchmarks.starts import solved_w
from varprox import Method, Problem, Status
from varprox.numerics import trust_region
from varprox.numerics.inverse_hessian import Broyden, bfgs, self_scaled_broyden, start_broyden
from varprox.numerics.line_search import ENOUGH, search
from varprox.precision import full_products
from varprox.problem.data import check_data
from varprox.problem.model import objective
from varprox.problem.prediction import predict

MEMORY = 20  # pairs that L-BFGS keeps
MAX_TRIALS = 10  # of GN's trust region


class State(NamedTuple):
    """The weights, and in `memory` whatever the method carries from step to step."""

    theta: Any
    w: jax.Array
    objective: jax.Array
    memory: Any
    work_units: jax.Array  # so far
    status: jax.Array


def _phi(problem, weights, data):
    return objective(problem, *weights, data)


_value = jax.jit(_phi)
_value_and_gradient = jax.jit(jax.value_and_grad(_phi, argnums=1))


def _begin(theta, w, value, memory, work_units):
    return State(theta, w, value, memory, jnp.full((), work_units, jnp.int32), _status(value))


def _status(value):
    status = jnp.where(jnp.isfinite(value), Status.RUNNING, Status.NON_FINITE)
    return status.astype(jnp.int32)


def _choose(condition, new, old):
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


# --------------------------------------------------------------------------------------------- Adam


class EpochInfo(NamedTuple):
    """What one epoch did; the objective is that at its end."""

    objective: jax.Array
    learning_rate: jax.Array


def adam(
    problem: Problem,
    learning_rate: float,
    *,
    batch_size: int | None = None,
    horizon: float = math.inf,
    start: Callable = solved_w,
) -> Method:
    """`minibatch.adam`, a step being one epoch in batches of `batch_size` samples.

    None puts all samples in one batch; samples that do not fill one are left out of the epoch. An
    epoch is 2 work units. The evaluation of Φ at its end is no part of the method and charged no
    work, but the seconds that `fit` measures contain it: `evaluation_seconds` says how many to
    subtract.
    """
    for name, value in {"learning_rate": learning_rate, "horizon": horizon}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    if batch_size is not None:
        _check_count("batch_size", batch_size)
    init = partial(_adam_init, problem, learning_rate, batch_size, start)
    step = partial(_epoch, problem, learning_rate, horizon, batch_size=batch_size)
    return Method(init, step, problem)


def _adam_init(problem, learning_rate, batch_size, start, theta, data, key):
    state = minibatch.adam(problem, learning_rate, start).init(theta, data, key)
    if batch_size is not None and batch_size > len(data[1]):
        raise ValueError(
            f"batch_size: expected at most the number of samples, {len(data[1])}, got {batch_size}"
        )
    value = _value(problem, (state.theta, state.w), data)
    return state._replace(objective=value, status=_status(value))


@partial(jax.jit, static_argnames="batch_size")
def _epoch(problem, learning_rate, horizon, state, data, *, batch_size):
    size = len(data[1]) if batch_size is None else batch_size
    method = minibatch.adam(problem, learning_rate, horizon=horizon)
    after, _ = method.epoch(state, data, batch_size=size)
    value = _phi(problem, (after.theta, after.w), data)
    chosen = _choose(jnp.isfinite(value), after._replace(objective=value), state)
    info = EpochInfo(chosen.objective, after.optimizer.hyperparams["learning_rate"])
    return chosen._replace(work_units=state.work_units + 2, status=_status(value)), info


def evaluation_seconds(problem: Problem, theta: Any, w: jax.Array, data: tuple) -> float:
    """The time that one compiled evaluation of Φ takes: the median of 21."""
    times = []
    for _ in range(22):
        begin = time.perf_counter()
        jax.block_until_ready(_value(problem, (theta, w), data))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))  # the first one compiles


# ------------------------------------------------------------------------------------------- L-BFGS


class LbfgsInfo(NamedTuple):
    """What one iteration did; all of it belongs to the weights after it."""

    objective: jax.Array
    gradient_norm: jax.Array
    trials: jax.Array


def lbfgs(problem: Problem, *, start: Callable = solved_w) -> Method:
    """optax's L-BFGS with 20 pairs and its zoom line search, on (θ, W).

    Work units: 2 an evaluation in the line search, whose last gradient serves the next step.
    """
    return Method(partial(_lbfgs_init, problem, start), partial(_lbfgs_step, problem), problem)


def _lbfgs_init(problem, start, theta, data, key):
    check_data(problem, theta, data)
    weights = theta, start(problem, theta, data, key)
    value, gradient = _value_and_gradient(problem, weights, data)
    return _begin(*weights, value, (gradient, optax.scale_by_lbfgs(MEMORY).init(weights)), 2)


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
            value_fn=lambda weights: _phi(problem, weights, data),
        )
    better = found.value < state.objective  # False where it is not a number
    weights, value, gradient = _choose(
        better,
        (optax.apply_updates(weights, updates), found.value, found.grad),
        (weights, state.objective, gradient),
    )
    trials = found.info.num_linesearch_steps.astype(jnp.int32)
    status = jnp.where(better, Status.RUNNING, Status.STALLED).astype(jnp.int32)
    state = State(*weights, value, (gradient, pairs), state.work_units + 2 * trials, status)
    return state, LbfgsInfo(value, optax.tree.norm(gradient), trials)


# ------------------------------------------------------------------------ full-memory quasi-Newton


class FullMemory(NamedTuple):
    """What these methods carry from step to step, in the flat weights (θ, W)."""

    gradient: jax.Array
    inverse: Broyden
    descent: jax.Array
    decrease: jax.Array  # of Φ in the last step
    failures: jax.Array  # in a row


def broyden(problem: Problem, *, start: Callable = solved_w) -> Method:
    """Self-scaled Broyden on (θ, W), of Urbán, Stefanou and Pons, J. Comput. Phys. 523 (2025).

    Work units: 2 an evaluation in the line search. As in SciPy the first trial is where the slope
    promises what the last step gained, and in the first step the whole of Φ. Where a step fails,
    the next goes along the gradient.
    """
    return _full_memory(problem, self_scaled_broyden, start)


def full_bfgs(problem: Problem, *, start: Callable = solved_w) -> Method:
    """BFGS with the whole inverse Hessian on (θ, W); everything else as in `broyden`."""
    return _full_memory(problem, bfgs, start)


def _full_memory(problem, rule, start):
    init = partial(_full_memory_init, problem, start)
    return Method(init, partial(_full_memory_step, problem, rule), problem)


def _full_memory_init(problem, start, theta, data, key):
    check_data(problem, theta, data)
    weights = theta, start(problem, theta, data, key)
    value, gradient = _value_and_gradient(problem, weights, data)
    gradient, _ = ravel_pytree(gradient)
    memory = FullMemory(
        gradient, start_broyden(gradient), -gradient, value, jnp.zeros((), jnp.int32)
    )
    return _begin(*weights, value, memory, 2)


def _full_memory_step(problem, rule, state, data):
    new, info = _full_memory_advance(problem, state, data, rule=rule)
    inverse = new.memory.inverse.after(state.memory.inverse)
    return new._replace(memory=new.memory._replace(inverse=inverse)), info


@partial(jax.jit, static_argnames="rule")
@full_products
def _full_memory_advance(problem, state, data, *, rule):
    x, unravel = ravel_pytree((state.theta, state.w))
    memory = state.memory
    slope = memory.gradient @ memory.descent
    promise = jnp.where(slope < 0, -slope / 2, 1)
    expected = jnp.where(memory.inverse.empty, jnp.abs(state.objective), memory.decrease)

    def evaluate(length):
        weights = unravel(x + length * memory.descent)
        value, gradient = jax.value_and_grad(_phi, argnums=1)(problem, weights, data)
        gradient, _ = ravel_pytree(gradient)
        aux = weights, value, gradient
        return state.objective - value, gradient @ memory.descent, aux

    found = search(
        evaluate,
        ((state.theta, state.w), state.objective, memory.gradient),
        slope,
        jnp.where(
            memory.inverse.empty,
            jnp.minimum(expected / promise, 1),
            jnp.clip(expected / promise, 1e-2, 1),
        ),
        10 * jnp.finfo(x.dtype).eps * jnp.abs(state.objective),
        jnp.asarray(ENOUGH, x.dtype),
    )
    weights, value, gradient = found.aux
    inverse, descent = memory.inverse.following(
        found.point.length,
        memory.descent,
        gradient - memory.gradient,
        gradient,
        found.accepted,
        ~found.accepted,
        rule,
    )
    failures = jnp.where(found.accepted, 0, memory.failures + 1)
    memory = FullMemory(
        gradient,
        inverse.without_root(),
        descent,
        jnp.where(found.accepted, found.point.gain, memory.decrease),
        failures,
    )
    status = jnp.where(failures < 2, Status.RUNNING, Status.STALLED).astype(jnp.int32)
    state = State(*weights, value, memory, state.work_units + 2 * found.trials, status)
    return state, LbfgsInfo(value, jnp.linalg.norm(gradient), found.trials)


# --------------------------------------------------------------------------- Gauss–Newton–Krylov


class GnInfo(NamedTuple):
    """What one iteration did; the objective is that after it, the gradient that before it."""

    objective: jax.Array
    gradient_norm: jax.Array
    radius: jax.Array
    ratio: jax.Array
    accepted: jax.Array
    products: jax.Array
    trials: jax.Array


def gn(
    problem: Problem, *, rank: int = 20, flat: float = 0.03, start: Callable = solved_w
) -> Method:
    """GNvpro without variable projection: trust-region Gauss–Newton–Krylov on (θ, W) together.

    `rank` and `flat`, the fraction that ends a Krylov iteration, are those of `vp.gnvpro`. So are
    the work units: 2 a step, 2 a product, 1 a trial point.
    """
    _check_count("rank", rank)
    init = partial(_gn_init, problem, start)
    return Method(init, partial(_gn_step, problem, flat, rank=rank), problem)


def _gn_init(problem, start, theta, data, key):
    check_data(problem, theta, data)
    weights = theta, start(problem, theta, data, key)
    value = _value(problem, weights, data)
    return _begin(*weights, value, jnp.full_like(value, jnp.inf), 1)


def gauss_newton(problem: Problem, theta, w, data) -> tuple[jax.Array, Any, Callable]:
    """Φ, its gradient and v ↦ (Jᵀ∇²L J + ∇²R + ∇²S) v in (θ, W), linearised once."""
    inputs, targets = data
    weights = theta, w

    def penalties(weights):
        theta, w = weights
        return problem.penalty(theta) + 0.5 * problem.w_penalty * jnp.sum(w**2)

    predictions, forward = jax.linearize(lambda x: predict(problem, *x, inputs), weights)
    transposed = jax.linear_transpose(forward, weights)
    curved = problem.loss.curvature(predictions, targets)
    penalty_gradient, penalty_product = jax.linearize(jax.grad(penalties), weights)

    def product(v):
        return jax.tree.map(jnp.add, *transposed(curved(forward(v))), penalty_product(v))

    value = problem.loss.value(predictions, targets) + penalties(weights)
    (gradient,) = transposed(problem.loss.gradient(predictions, targets))
    return value, jax.tree.map(jnp.add, gradient, penalty_gradient), product


@partial(jax.jit, static_argnames="rank")
def _gn_step(problem, flat, state, data, *, rank):
    x, unravel = ravel_pytree((state.theta, state.w))
    value, gradient, product = gauss_newton(problem, state.theta, state.w, data)
    gradient = ravel_pytree(gradient)[0]

    def trial_value(trial, found):
        reached = _phi(problem, unravel(trial), data)
        return value - reached, reached

    space = trust_region.krylov_space(
        lambda v: ravel_pytree(product(unravel(v)))[0],
        gradient,
        state.memory,
        rank=rank,
        flat=flat,
    )
    result = trust_region.search(
        lambda radius, shift: trust_region.krylov_step(space, radius),
        trial_value,
        x,
        value,
        state.memory,
        jnp.zeros_like(value),
        max_trials=MAX_TRIALS,
    )
    products = space.tridiagonal.size
    work_units = state.work_units + 2 + 2 * products + result.trials
    status = jnp.where(result.accepted, Status.RUNNING, Status.STALLED).astype(jnp.int32)
    info = GnInfo(
        objective=result.aux,
        gradient_norm=jnp.linalg.norm(gradient),
        radius=state.memory,
        ratio=result.ratio,
        accepted=result.accepted,
        products=products,
        trials=result.trials,
    )
    return State(*unravel(result.x), result.aux, result.radius, work_units, status), info


def _check_count(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer ≥ 1, got {value!r}")
