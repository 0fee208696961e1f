"""GNvpro: trust-region Gauss–Newton–Krylov on the reduced objective.

Source: Newman, Ruthotto, Hart, van Bloemen Waanders, arXiv:2007.13171, algorithm 3.1. Imports the
mathematics (reduced, curvature, projection), the trust region and recycling below it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from varprox import trust_region
from varprox.checks import check_integer, check_number
from varprox.curvature import linearise
from varprox.method import Method, Status
from varprox.model import Problem, check_data, check_problem
from varprox.projection import Projection, project, start_projection
from varprox.recycling import Recycled, nothing_yet, recycle
from varprox.reduced import hessian_factor

PATIENCE = 3  # iterations in a row with a low gain ratio, after which Newton products take over
LOW_RATIO = 0.5
MAX_TRIALS = 10
ACCURACY = 1e-6  # η² of `project`; a W-solve is cheap beside a Krylov space


class State(NamedTuple):
    """The weights and what the next iteration starts from."""

    theta: Any
    w: jax.Array
    projection: Projection
    objective: jax.Array
    decrease: jax.Array  # of the objective, in the last accepted step
    radius: jax.Array
    recycled: Recycled  # from the Krylov spaces so far
    low: jax.Array  # iterations in a row whose gain ratio was low
    newton: jax.Array  # have Newton products taken over?
    work_units: jax.Array  # so far
    status: jax.Array


class Info(NamedTuple):
    """What one iteration did; `objective` belongs to the weights after it, `gradient_norm` to those
    before."""

    objective: jax.Array
    gradient_norm: jax.Array
    radius: jax.Array
    ratio: jax.Array
    accepted: jax.Array
    products: jax.Array
    trials: jax.Array
    w_products: jax.Array
    newton: jax.Array


class Options(NamedTuple):
    """Numbers that may change without recompiling."""

    flat: float
    tolerance: float
    hand_over: bool


def gnvpro(
    problem: Problem,
    *,
    rank: int = 20,
    memory: int = 100,
    flat: float = 0.03,
    tolerance: float = 0.0,
    hand_over: bool = True,
    w_curvature: bool = True,
) -> Method:
    """The full-batch method of choice for small and medium problems.

    Each step builds a Krylov space of at most `rank` dimensions for the Gauss–Newton matrix of the
    reduced objective, ending earlier when a further product adds less than the fraction `flat` of
    the model's decrease, and takes the trust-region step in it. Up to `memory` directions in which
    earlier Krylov spaces found the curvature large precondition the next one, and the trust region
    is a ball in the variables so preconditioned; 0 starts every space anew, as published, and each
    direction takes as much memory as θ. When gain ratios stay low, products with the full Hessian
    take over, unless `hand_over` is False. `w_curvature` False leaves α₂ J_WᵀJ_W out of the
    Gauss–Newton matrix, as the authors' implementation does under cross entropy. The run has
    converged when the gradient's norm is at most `tolerance`.

    Work units: 2 a step, 2 a product (4 with the full Hessian), 1 a trial point. `data` is all of
    it at every step.
    """
    check_problem(problem)
    rank = check_integer("rank", rank, least=1)
    memory = check_integer("memory", memory, least=0)
    check_number("flat", flat, below=1)
    check_number("tolerance", tolerance)
    options = Options(float(flat), float(tolerance), hand_over)
    step = partial(_step, problem, options, rank=rank, w_curvature=w_curvature)
    return Method(partial(_init, problem, memory), step, problem)


def _init(problem, memory, theta, data, key=None):
    check_data(problem, theta, data)
    return _start(problem, theta, data, memory=memory)


@partial(jax.jit, static_argnames="memory")
def _start(problem, theta, data, *, memory):
    inputs, targets = data
    rows = problem.model.rows(theta, inputs)
    start = start_projection(problem, rows, targets)
    projection = project(problem, rows, targets, start)
    factor = hessian_factor(problem, rows, projection.w, targets)
    projection = projection._replace(factor=factor)
    value = projection.value + problem.penalty(theta)
    return State(
        theta=theta,
        w=projection.w,
        projection=projection,
        objective=value,
        decrease=value,
        radius=jnp.full_like(value, jnp.inf),
        recycled=nothing_yet(memory, ravel_pytree(theta)[0]),
        low=jnp.zeros((), jnp.int32),
        newton=jnp.array(False),
        work_units=jnp.ones((), jnp.int32),
        status=_status(value, jnp.inf, True, 0.0),
    )


@partial(jax.jit, static_argnames=("rank", "w_curvature"))
def _step(problem, options, state, data, *, rank, w_curvature):
    inputs, targets = data
    theta, unravel = ravel_pytree(state.theta)
    root = state.recycled.root

    def flat(tree):
        return ravel_pytree(tree)[0]

    def iteration(full):
        factor = state.projection.factor if problem.loss.quadratic else None
        curvature = linearise(
            problem, state.theta, data, state.w, factor, full=full, w_curvature=w_curvature
        )
        projection = state.projection._replace(factor=curvature.factor, spent=jnp.int32(0))

        def evaluate(step, predicted):
            trial = theta + root(step)
            rows = problem.model.rows(unravel(trial), inputs)
            tolerance = ACCURACY * jnp.minimum(predicted, state.decrease)
            solved = project(problem, rows, targets, projection, tolerance)
            value = solved.value + problem.penalty(unravel(trial))
            return curvature.value - value, (value, solved)

        gradient = flat(curvature.gradient)
        result, space = trust_region.iterate(
            lambda v: root(flat(curvature.matvec(unravel(root(v))))),
            root(gradient),
            evaluate,
            jnp.zeros_like(theta),
            (curvature.value, projection),
            state.radius,
            rank=rank,
            flat=options.flat,
            max_trials=MAX_TRIALS,
        )
        return jnp.linalg.norm(gradient), result, space

    gradient_norm, result, space = jax.lax.cond(
        state.newton, lambda: iteration(True), lambda: iteration(False)
    )
    value, projection = result.aux
    low = jnp.where(result.first_ratio < LOW_RATIO, state.low + 1, 0)
    newton = state.newton | (options.hand_over & (low >= PATIENCE))
    # The radius that the Gauss–Newton model could be trusted in says nothing of the Newton model.
    radius = jnp.where(newton & ~state.newton, jnp.inf, result.radius)
    per_product = jnp.where(state.newton, 4, 2)
    info = Info(
        objective=value,
        gradient_norm=gradient_norm,
        radius=state.radius,
        ratio=result.ratio,
        accepted=result.accepted,
        products=result.products,
        trials=result.trials,
        w_products=projection.products,
        newton=state.newton,
    )
    state = State(
        theta=unravel(theta + root(result.x)),
        w=projection.w,
        projection=projection,
        objective=value,
        decrease=jnp.where(result.accepted, state.objective - value, state.decrease),
        radius=radius,
        recycled=recycle(state.recycled, space),
        low=low,
        newton=newton,
        work_units=state.work_units + 2 + per_product * result.products + result.trials,
        status=_status(value, gradient_norm, result.accepted, options.tolerance),
    )
    return state, info


def _status(value, gradient_norm, accepted, tolerance):
    finite = jnp.isfinite(value) & ~jnp.isnan(gradient_norm)
    return jnp.select(
        [~finite, gradient_norm <= tolerance, jnp.logical_not(accepted)],
        [jnp.int32(Status.NON_FINITE), jnp.int32(Status.CONVERGED), jnp.int32(Status.STALLED)],
        jnp.int32(Status.RUNNING),
    )
