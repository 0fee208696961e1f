"""GNvpro: trust-region Gauss–Newton–Krylov on the reduced objective.

Source: Newman, Ruthotto, Hart, van Bloemen Waanders, arXiv:2007.13171, algorithm 3.1. Imports the
mathematics (reduced, curvature) and the trust region below it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from varprox import trust_region
from varprox.curvature import linearise
from varprox.model import Method, Problem, Status, check_data
from varprox.reduced import Projection, project, start_projection

PATIENCE = 3  # iterations in a row with a low gain ratio, after which Newton products take over
LOW_RATIO = 0.25
ACCURACY = 1e-6  # η²: excess of Φ allowed in a W-solve, relative to the last decrease (see `project`)


class State(NamedTuple):
    """The weights and what the next iteration starts from."""

    theta: Any
    w: jax.Array
    projection: Projection
    objective: jax.Array
    decrease: jax.Array  # of the objective, in the last accepted step
    radius: jax.Array
    low: jax.Array  # iterations in a row whose gain ratio was low
    newton: jax.Array  # have Newton products taken over?
    status: jax.Array


class Info(NamedTuple):
    """What one iteration did; `objective` belongs to the weights after it, `gradient_norm` to those before."""

    objective: jax.Array
    gradient_norm: jax.Array
    radius: jax.Array
    ratio: jax.Array
    accepted: jax.Array
    products: jax.Array
    trials: jax.Array
    w_products: jax.Array
    newton: jax.Array
    work_units: jax.Array


def gnvpro(problem: Problem, *, rank: int = 20, flat: float = 0.05, tolerance: float = 0.0) -> Method:
    return Method(
        Partial(_init, problem),
        Partial(jax.jit(_step, static_argnums=1), problem)
        , problem)


def _init(problem, theta, data, key=None):
    check_data(problem, theta, data)
    return _start(problem, theta, data)


@jax.jit
def _start(problem, theta, data):
    inputs, targets = data
    rows = problem.model.rows(theta, inputs)
    projection = project(problem, rows, targets, start_projection(problem, rows, targets))
    value = projection.value + problem.penalty(theta)
    return State(
        theta,
        projection.w,
        projection,
        value,
        value,
        jnp.full_like(value, jnp.inf),
        jnp.zeros((), jnp.int32),
        jnp.array(False),
        jnp.zeros((), jnp.int32),
    )


@jax.jit(static_argnames="rank")
def _step(problem, options, state, data, *, rank):
    inputs, targets = data
    theta, unravel = ravel_pytree(state.theta)

    def evaluate(trial, predicted):
        rows = problem.model.rows(unravel(trial), inputs)
        tolerance = ACCURACY * jnp.minimum(predicted, state.decrease)
        projection = project(problem, rows, targets, state.projection, tolerance)
        value = projection.value + problem.penalty(unravel(trial))
        return state.objective - value, (value, projection)

    def iteration(full):
        curvature = linearise(problem, state.theta, data, state.w, full)
        gradient = ravel_pytree(curvature.gradient)[0]
        result = trust_region.iterate(
            lambda v: ravel_pytree(curvature.matvec(unravel(v)))[0],
            gradient, evaluate, theta, (state.objective, state.projection), state.radius,
            rank=rank, flat=options.flat, max_trials=10)
        return jnp.linalg.norm(gradient), result

    gradient_norm, result = jax.lax.cond(
        state.newton, lambda: iteration(True), lambda: iteration(False))
    value, projection = result.aux
