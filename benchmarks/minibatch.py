"""What slimTrain is compared with: any optimizer on θ and W together, on the same minibatches.

The epochs are those of `varprox.methods.minibatches`, so that nothing but the step differs.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.starts import solved_w
from varprox import Method, Problem, Status
from varprox.methods.minibatches import epoch
from varprox.methods.slimtrain import learned_by, with_learned
from varprox.problem.data import check_data

FIXED = ("b1", "b2", "eps", "eps_root")  # so that nothing but the rate is in Adam's state
ADAM = optax.inject_hyperparams(optax.adam, FIXED)(1e-3)  # one compilation for all rates


class State(NamedTuple):
    """The weights and what the next step starts from."""

    theta: Any
    w: jax.Array
    optimizer: Any
    learned: list  # what features hold that learn from batches
    objective: jax.Array
    work_units: jax.Array
    unit: jax.Array
    key: jax.Array
    status: jax.Array


class Info(NamedTuple):
    """The loss of a batch before the step."""

    objective: jax.Array
    finite: jax.Array


def jointly(problem: Problem, optimizer: optax.GradientTransformation, start: Callable) -> Method:
    """The optimizer on θ and W, which begins at `start(problem, theta, data, key)`; the problem's
    penalties count."""
    return Method(
        init=partial(_init, problem, optimizer, start),
        step=partial(_step, optimizer, problem),
        problem=problem,
        epoch=partial(epoch, _step, optimizer, problem),
    )


def adam(
    problem: Problem, rate: float, start: Callable = solved_w, horizon: float = math.inf
) -> Method:
    """Adam on θ and W. From epoch to epoch its rate falls along half a cosine, to zero at `horizon`
    work units; it is constant for an infinite one."""
    method = at_rate(rate, jointly(problem, ADAM, start))

    def epoch(state, data, *, batch_size):
        falling = _along_cosine(rate, state.work_units / horizon)
        optimizer = optax.tree.set(state.optimizer, learning_rate=falling)
        return method.epoch(state._replace(optimizer=optimizer), data, batch_size=batch_size)

    return method._replace(epoch=epoch)


@jax.jit
def _along_cosine(rate, part):
    return 0.5 * rate * (1 + jnp.cos(jnp.pi * jnp.minimum(part, 1)))


def at_rate(rate: float, method: Method) -> Method:
    """The method, whose optimizer is `ADAM`, with this learning rate."""

    def init(theta, data, key):
        state = method.init(theta, data, key)
        rated = optax.tree.set(state.optimizer, learning_rate=jnp.asarray(rate, state.w.dtype))
        return state._replace(optimizer=rated)

    return method._replace(init=init)


def _init(problem, optimizer, start, theta, data, key):
    check_data(problem, theta, data, stochastic=True)
    drawing, key = jax.random.split(key)
    w = start(problem, theta, data, drawing)
    theta, w = jax.tree.map(jnp.asarray, (theta, w))
    zero = jnp.zeros((), w.dtype)
    return State(
        theta=theta,
        w=w,
        optimizer=optimizer.init((theta, w)),
        learned=learned_by(problem.model),
        objective=zero + jnp.nan,
        work_units=zero,
        unit=zero + len(data[1]),
        key=jax.random.key_data(key),
        status=jnp.int32(Status.RUNNING),
    )


@partial(jax.jit, static_argnums=0)
def _step(optimizer, problem, state, batch):
    inputs, targets = batch
    problem = with_learned(problem, state.learned)

    def phi(weights):
        theta, w = weights
        z, model = problem.model.train(theta, inputs)
        value = problem.loss.value(model.head.apply(z, w), targets)
        penalty = problem.penalty(theta) + 0.5 * problem.w_penalty * jnp.sum(w**2)
        return value + penalty, model

    weights = state.theta, state.w
    (value, model), gradient = jax.value_and_grad(phi, has_aux=True)(weights)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and int64 under x64
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, weights)
    theta, w = optax.apply_updates(weights, updates)
    after = state._replace(
        theta=theta,
        w=w,
        optimizer=optimizer_state,
        learned=learned_by(model),
        objective=value,
        work_units=state.work_units + 2 * len(targets) / state.unit,
    )
    return after, Info(value, jnp.isfinite(value))
