"""LBFGSvpro: L-BFGS on the reduced objective in whitened variables, with optax's L-BFGS direction
and line search.

Source: arXiv:2007.13171, section 3. Imports projection, whitening and model below it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from varprox.checks import check_integer, check_number
from varprox.method import Method, Status
from varprox.model import Problem, check_data, check_problem
from varprox.projection import Projection, project, start_projection
from varprox.whitening import Whitening, whitening

ACCURACY = 3e-3  # η², what is asked of a W-solve: see `project`


class State(NamedTuple):
    """The weights and what the next iteration starts from; `gradient` is ∇Φ_red(θ)."""

    theta: Any
    projection: Projection
    objective: jax.Array
    gradient: Any
    decrease: jax.Array  # of the objective, in the last step; 0 where that failed
    lbfgs: optax.OptState
    whitening: Whitening
    position: Any  # θ in whitened variables, from where the run began
    work_units: jax.Array  # so far
    status: jax.Array

    @property
    def w(self) -> jax.Array:
        return self.projection.w


class Info(NamedTuple):
    """What one iteration did; all of it belongs to the weights after it."""

    objective: jax.Array
    gradient_norm: jax.Array
    trials: jax.Array
    w_products: jax.Array


def lbfgsvpro(problem: Problem, *, memory: int = 20, tolerance: float = 0.0) -> Method:
    """L-BFGS with `memory` pairs on the reduced objective; the cheapest full-batch iteration.

    It works in variables in which the Gauss–Newton matrix at the start is nearer to the identity:
    see `varprox.whitening`. The run has converged when the gradient's norm is at most `tolerance`.
    Work units: 2 for the start, 2, an upper bound, for the whitening and 2 a trial point of the
    line search, most steps needing one. Where a step found nothing lower, the next one stays in
    place, solves for W to full accuracy and forgets the pairs; only if the step after that, along
    the gradient, fails, too, has the run stalled. `data` is all of it at every step.
    """
    check_problem(problem)
    memory = check_integer("memory", memory, least=1)
    check_number("tolerance", tolerance)
    step = partial(_step, problem, tolerance, memory=memory)
    return Method(partial(_init, problem, memory), step, problem)


def _init(problem, memory, theta, data, key=None):
    check_data(problem, theta, data, full_batch=True)
    return _start(problem, theta, data, memory=memory)


@partial(jax.jit, static_argnames="memory")
def _start(problem, theta, data, *, memory):
    shaped = jax.eval_shape(problem.model.rows, theta, data[0])
    start = start_projection(problem, shaped, data[1])
    value, gradient, projection, rows = _value_and_gradient(
        problem, theta, start, data, relative=ACCURACY
    )
    finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradient))
    position = jax.tree.map(jnp.zeros_like, theta)
    return State(
        theta=theta,
        projection=projection,
        objective=value,
        gradient=gradient,
        decrease=value,
        lbfgs=_in_dtype(optax.scale_by_lbfgs(memory).init(position), value.dtype),
        whitening=whitening(problem, theta, rows, projection.w, data),
        position=position,
        work_units=jnp.full((), 4, jnp.int32),
        status=jnp.where(finite, Status.RUNNING, Status.NON_FINITE).astype(jnp.int32),
    )


def _in_dtype(tree, dtype):
    """Floating leaves cast to `dtype`: under x64 optax makes some of single precision double."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _value_and_gradient(problem, theta, start, data, tolerance=0.0, relative=0.0):
    """Φ_red(θ), its gradient, the projection and the rows, by one forward and one reverse pass of
    the features."""
    inputs, targets = data
    rows, pullback = jax.vjp(lambda theta: problem.model.rows(theta, inputs), theta)
    projection = project(problem, rows, targets, start, tolerance, relative)
    w = projection.w
    (gradient,) = pullback(problem.loss.gradient(rows @ w, targets) @ w.T)
    penalty, penalty_gradient = jax.value_and_grad(problem.penalty)(theta)
    gradient = jax.tree.map(jnp.add, gradient, penalty_gradient)
    return projection.value + penalty, gradient, projection, rows


@partial(jax.jit, static_argnames="memory")
def _step(problem, tolerance, state, data, *, memory):
    # optax's line search takes a function of one argument and keeps its gradient at the point it
    # chooses, and nothing else of that point. So the objective gets a second argument, which it
    # ignores, and its derivative along this is declared to be what belongs to W(θ).
    start = state.projection

    @jax.custom_vjp
    def reduced(point):
        return reduced_forward(point)[0]

    def reduced_forward(point):
        theta = _in_dtype(point[0], state.objective.dtype)
        accuracy = ACCURACY * jnp.minimum(state.decrease, expected)
        value, gradient, found, _ = _value_and_gradient(problem, theta, start, data, accuracy)
        return value, (gradient, belongings(found))

    def belongings(projection):
        kept = (projection.w, projection.rows, projection.factor)
        counts = (projection.products, projection.spent)
        return kept, jax.tree.map(lambda x: x.astype(state.objective.dtype), counts)

    reduced.defvjp(
        reduced_forward, lambda derivative, scale: (jax.tree.map(lambda d: scale * d, derivative),)
    )

    ignored = jax.tree.map(jnp.zeros_like, belongings(start))
    point = (state.theta, ignored)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and int64 under x64
        whitened, lbfgs = optax.scale_by_lbfgs(memory).update(
            state.whitening(state.gradient), state.lbfgs, state.position
        )
        whitened, lbfgs = _in_dtype((whitened, lbfgs), state.objective.dtype)
        # Where the last step failed, this one stays, solves for W to full accuracy and forgets the
        # pairs, which may have come from where the objective bends otherwise.
        refresh = state.decrease == 0
        whitened = jax.tree.map(lambda d: jnp.where(refresh, 0, d), whitened)
        lbfgs = lbfgs._replace(
            count=jnp.where(refresh, 0, lbfgs.count),
            weights_memory=jnp.where(refresh, 0, lbfgs.weights_memory),
        )
        direction = state.whitening(whitened)
        expected = 0.5 * jnp.abs(optax.tree.vdot(direction, state.gradient))
        search = optax.scale_by_zoom_linesearch(20, initial_guess_strategy="one")
        updates, found = search.update(
            (jax.tree.map(jnp.negative, direction), ignored),
            search.init(point),
            point,
            value=state.objective,
            grad=(state.gradient, ignored),
            value_fn=reduced,
        )
    lower = found.value < state.objective
    better = lower | refresh
    new = optax.apply_updates(state.theta, updates[0]), found.value, *found.grad
    old = state.theta, state.objective, state.gradient, belongings(start)
    theta, value, gradient, ((w, rows, factor), counts) = jax.tree.map(
        lambda n, o: jnp.where(better, n, o), new, old
    )
    length = jnp.where(lower, found.learning_rate, 0)
    position = jax.tree.map(lambda x, d: x - length * d, state.position, whitened)
    products, spent = (count.astype(jnp.int32) for count in counts)
    projection = Projection(w, rows, factor, value, products, spent)
    gradient_norm = optax.tree.norm(gradient)
    exact = jnp.finfo(value.dtype).tiny  # the decrease noted after a refreshment
    stalled = ~better & (state.decrease == exact)
    status = jnp.select(
        [gradient_norm <= tolerance, stalled], [Status.CONVERGED, Status.STALLED], Status.RUNNING
    )
    trials = found.info.num_linesearch_steps
    state = State(
        theta=theta,
        projection=projection,
        objective=value,
        gradient=gradient,
        decrease=jnp.select([refresh, lower], [exact, state.objective - value], 0),
        lbfgs=lbfgs,
        whitening=state.whitening,
        position=position,
        work_units=state.work_units + 2 * trials.astype(jnp.int32),
        status=status.astype(jnp.int32),
    )
    return state, Info(value, gradient_norm, trials, products)
