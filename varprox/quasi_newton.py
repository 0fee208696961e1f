"""Quasi-Newton methods on the reduced objective in whitened variables: LBFGSvpro and Broydenvpro.

They differ in what stands for the inverse Hessian. Imports inverse_hessian, line_search,
projection, whitening and model below it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from varprox.checks import check_integer, check_number
from varprox.inverse_hessian import Broyden, Pairs, no_pairs, start_broyden
from varprox.line_search import ENOUGH, FIRST_ENOUGH, search
from varprox.method import Method, Status
from varprox.model import Problem, check_data, check_problem
from varprox.precision import full_products
from varprox.projection import (
    Projection,
    is_exact,
    project,
    rounding_of_predictions,
    start_projection,
    without_span,
)
from varprox.whitening import Whitening, whitening

ACCURACY = 3e-3  # η², what is asked of a W-solve: see `project`
TOLERANCE = 1e-12  # see `lbfgsvpro`
MAX_BYTES = 2**30  # of an inverse Hessian
ROUNDINGS = 10  # that the objective may be off by; with 1, 3 or 10 runs end alike
QUIET, IDLE = 2, 10  # steps in a row, and trials
SHORT = 1e-2  # first trial along a line, of the whole step; with 0.1 and 1e-3 runs take as long


class State(NamedTuple):
    """The weights and what the next iteration starts from; `gradient` is ∇Φ_red(θ)."""

    theta: Any
    projection: Projection
    objective: jax.Array
    gradient: Any
    rounding: jax.Array  # of the objective, where that of all predictions adds up
    decrease: jax.Array  # of the objective, in the last step
    unit: jax.Array  # that objective and gradient are divided by: the size of the first objective
    inverse: Pairs | Broyden  # H, of the Hessian
    descent: jax.Array  # −H g in whitened variables
    whitening: Whitening
    failures: jax.Array  # 1 after a step that failed, 2 when W has been solved for again
    quiet: jax.Array  # steps in a row that promised and gained no more than the tolerance
    idle: jax.Array  # trials in a row of steps that promised and gained no more than rounding
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


class _At(NamedTuple):
    """What belongs to a θ."""

    theta: Any
    projection: Projection
    objective: jax.Array
    gradient: Any
    rounding: jax.Array


def lbfgsvpro(problem: Problem, *, memory: int = 20, tolerance: float | None = None) -> Method:
    """L-BFGS with `memory` pairs on the reduced objective; the cheapest full-batch iteration.

    It works in variables in which the Gauss–Newton matrix at the start is nearer to the identity:
    see `varprox.whitening`. Features that couple samples are not whitened. The features need a
    reverse rule.

    The run has converged when two steps in a row promised, and gained, no more than the fraction
    `tolerance` of the objective, or no more than rounding; where a direction is flatter by a factor
    κ than the model takes it to be, the next gains may add up to κ times that. None stands for
    1e-12, which allows for κ = 1e6 where a relative gain of 1e-6 is left. Ten trials in a row below
    rounding of the objective end the run, too: CONVERGED where at least half of its digits are
    known, or the residual is next to nothing beside the targets, STALLED elsewhere. A start where
    the gradient is zero and the objective is not has the status FLAT.

    Work units: 2 for the start, 2, an upper bound, for the whitening and 2 a trial point of the
    line search, most steps needing one. Where a step found nothing lower, the next one stays in
    place, solves for W to full accuracy and forgets the pairs; only if the step after that, along
    the gradient, fails, too, has the run stalled. `data` is all of it at every step.

    Source: arXiv:2007.13171, section 3.
    """
    check_problem(problem)
    memory = check_integer("memory", memory, least=1)
    return _method(problem, tolerance, memory=memory, max_bytes=None)


def broydenvpro(
    problem: Problem, *, tolerance: float | None = None, max_bytes: int = MAX_BYTES
) -> Method:
    """Self-scaled Broyden on the reduced objective: the whole inverse Hessian from gradients alone.

    Between `lbfgsvpro`, whose steps cost as many passes and know less, and `gnvpro`, whose steps
    are worth more and cost more. It asks of the features no more than a reverse rule: they may
    couple samples, or be a solver. Everything else is as with `lbfgsvpro`: the whitened variables,
    the end of a run, the work units, and what follows a step that found nothing lower.

    The inverse Hessian of θ takes the square of its size in numbers, twice while it is changed,
    which is every 32 steps; a step takes two products with it. Where it alone would take more than
    `max_bytes`, by default 1 GiB for 11,585 weights in double precision, the start raises
    ValueError.

    Source: for the update, Urbán, Stefanou, Pons, J. Comput. Phys. 523 (2025); see
    `varprox.inverse_hessian`.
    """
    check_problem(problem)
    max_bytes = check_integer("max_bytes", max_bytes, least=1)
    return _method(problem, tolerance, memory=None, max_bytes=max_bytes)


def bytes_of_inverse(theta: Any) -> int:
    """What the inverse Hessian of `broydenvpro` takes."""
    leaves = jax.tree.leaves(theta)
    return sum(leaf.size for leaf in leaves) ** 2 * jnp.result_type(*leaves).itemsize


def _method(problem, tolerance, *, memory, max_bytes):
    """With the last `memory` pairs, or the whole of the inverse Hessian if it is None."""
    tolerance = TOLERANCE if tolerance is None else check_number("tolerance", tolerance)
    init = partial(_init, problem, memory=memory, max_bytes=max_bytes)
    step = partial(_step, problem, tolerance, Broyden if memory is None else Pairs)
    return Method(init, step, problem)


def _init(problem, theta, data, key=None, projection=None, *, memory, max_bytes):
    """`projection` is one at these weights, from which that under another loss is found faster."""
    check_data(problem, theta, data, full_batch=True)
    _check_reverse(problem, theta, data[0])
    if memory is None and (taken := bytes_of_inverse(theta)) > max_bytes:
        raise ValueError(
            f"theta: expected so few weights that their inverse Hessian takes at most "
            f"max_bytes={max_bytes:,} bytes, got one of {taken:,}; varprox.lbfgsvpro keeps pairs "
            "instead"
        )
    return _start(problem, theta, data, projection, memory=memory)


def _check_reverse(problem, theta, inputs):
    """Refuses features without a reverse rule with a TypeError."""
    total = lambda theta: jnp.sum(problem.model.rows(theta, inputs))  # noqa: E731
    try:
        jax.eval_shape(jax.grad(total), theta)
    except Exception as error:
        raise TypeError(
            "features: expected a function that JAX can differentiate in reverse, as quasi-Newton "
            'methods need; vp.gnvpro(problem, curvature="forward") works with a forward rule; got '
            f"{type(error).__name__}: {str(error).splitlines()[0]:.200}"
        ) from error


@partial(jax.jit, static_argnames="memory")
@full_products
def _start(problem, theta, data, start, *, memory):
    if start is None:
        shaped = jax.eval_shape(problem.model.rows, theta, data[0])
        start = start_projection(problem, shaped, data[1])
    at, rows = _evaluate(problem, theta, start, data, relative=ACCURACY)
    size = _size(at)
    gradient, _ = ravel_pytree(at.gradient)
    unit = jnp.where(jnp.isfinite(size) & (size > 0), size, 1)
    whiten = whitening(problem, theta, rows, at.projection.w, data).scaled(jnp.sqrt(unit))
    first = _whitened(whiten, unit, at.gradient)
    zero = jnp.zeros((), jnp.int32)
    stationary = jnp.all(gradient == 0)
    status = jnp.select(
        [
            ~jnp.isfinite(size + jnp.sum(gradient / unit)),
            stationary & (size > ROUNDINGS * at.rounding),
            stationary,
        ],
        [Status.NON_FINITE, Status.FLAT, Status.CONVERGED],
        Status.RUNNING,
    )
    return State(
        **at._asdict(),
        decrease=at.objective,
        unit=unit,
        inverse=start_broyden(first) if memory is None else no_pairs(memory, first),
        descent=-first,
        whitening=whiten,
        failures=zero,
        quiet=zero,
        idle=zero,
        work_units=jnp.full((), 4, jnp.int32),
        status=status.astype(jnp.int32),
    )


def _evaluate(problem, theta, start, data, tolerance=0.0, relative=0.0):
    """What belongs to θ, and the rows, by one forward and one reverse pass of the features."""
    inputs, targets = data
    rows, pullback = jax.vjp(lambda theta: problem.model.rows(theta, inputs), theta)
    projection = project(problem, rows, targets, start, tolerance, relative)
    projection = without_span(problem, projection)
    w = projection.w
    (gradient,) = pullback(projection.slopes @ w.T)
    penalty, penalty_gradient = jax.value_and_grad(problem.penalty)(theta)
    gradient = jax.tree.map(jnp.add, gradient, penalty_gradient)
    at = _At(theta, projection, projection.value + penalty, gradient, jnp.zeros_like(penalty))
    error = rounding_of_predictions(problem, rows, w)
    rounding = error * jnp.linalg.norm(projection.slopes) * len(rows) ** 0.5
    return at._replace(rounding=rounding), rows


def _whitened(whiten, unit, gradient):
    """The gradient in the variables, and in the units, in which the method works; flat."""
    return ravel_pytree(whiten(jax.tree.map(lambda leaf: leaf / unit, gradient)))[0]


def _size(at):
    """That of the objective, whose parts may cancel."""
    loss = at.projection.value
    return jnp.abs(loss) + jnp.abs(at.objective - loss)


def _step(problem, tolerance, kind, state, data):
    if not (isinstance(state, State) and isinstance(state.inverse, kind)):
        name = {Pairs: "lbfgsvpro", Broyden: "broydenvpro"}[kind]
        raise TypeError(f"state: expected one of {name}, got that of another method")
    new, info = _advance(problem, tolerance, state, data)
    return new._replace(inverse=new.inverse.after(state.inverse)), info


@jax.jit
@full_products
def _advance(problem, tolerance, state, data):
    """A step, but for what is to be done to the root of the inverse Hessian: a compiled function
    that gives back what it was given would copy it."""
    unit, start = state.unit, _At(*state[:5])
    dtype = unit.dtype
    _, unravel = ravel_pytree(state.theta)
    whitened = partial(_whitened, state.whitening, unit)
    gradient = whitened(start.gradient)
    # After a failure the step stays in place and solves for W to full accuracy.
    refresh = state.failures == 1
    descent = jnp.where(refresh, 0, state.descent)
    direction = state.whitening(unravel(descent))
    slope = gradient @ descent
    promise = -0.5 * slope
    accuracy = ACCURACY * jnp.minimum(state.decrease, promise * unit)
    accuracy = jnp.where(state.failures == 0, accuracy, 0)

    def evaluate(length):
        theta = jax.tree.map(lambda x, d: x + length * d, state.theta, direction)
        at, _ = _evaluate(problem, theta, state.projection, data, accuracy)
        there = whitened(at.gradient)
        return (state.objective - at.objective) / unit, there @ descent, at

    # A model in which the slope promises more than the whole of the objective bends too little.
    size = _size(start) / unit
    first = jnp.minimum(1, size / jnp.where(promise > 0, promise, 1))
    # A self-scaled inverse Hessian is mostly too large along a step; this halves the work. With
    # pairs it neither gains nor costs.
    usual = jnp.clip(state.decrease / unit / jnp.where(promise > 0, promise, 1), SHORT, 1)
    noise = state.rounding / unit / data[1].size ** 0.5
    noise = ROUNDINGS * (jnp.finfo(dtype).eps * size + noise)
    found = search(
        evaluate,
        start,
        slope,
        jnp.where(state.inverse.empty, first, usual),
        noise,
        jnp.where(state.inverse.empty, FIRST_ENOUGH, ENOUGH),
    )
    at, gain, accepted = found.aux, found.point.gain, found.accepted
    there = whitened(at.gradient)
    change = there - gradient
    # In variables of curvature one a gradient is known as well as residuals are, to eps of their
    # size. A pair made of rounding would make H large in any direction.
    unknown = ROUNDINGS * jnp.finfo(dtype).eps * jnp.sqrt(2 * size)
    told = jnp.abs(change @ descent) > unknown * jnp.linalg.norm(descent)
    inverse, next_descent = state.inverse.following(
        found.point.length, descent, change, there, accepted & told & ~refresh, refresh
    )
    failures = jnp.select([refresh, ~accepted], [2, state.failures + 1], 0)

    rounding = ROUNDINGS * state.rounding / unit
    # Rounding of half the digits hides a lower point as well as it hides that there is none.
    known = noise <= jnp.finfo(dtype).eps ** 0.5 * size
    still = (promise <= tolerance * size) & (gain <= tolerance * size)
    exact = is_exact(size * unit, data[1])
    still = still | exact & (size <= rounding)  # the residual is that of rounding
    quiet = jnp.where(accepted, still, known & (promise <= noise))
    quiet = jnp.where(quiet, state.quiet + 1, jnp.where(accepted, 0, state.quiet))
    quiet = jnp.where(refresh, state.quiet, quiet)
    idle = (promise <= noise) & (gain <= noise)
    idle = jnp.where(refresh, state.idle, jnp.where(idle, state.idle + found.trials, 0))
    status = jnp.select(
        [(quiet >= QUIET) | (known | exact) & (idle >= IDLE), (failures > 2) | (idle >= IDLE)],
        [Status.CONVERGED, Status.STALLED],
        Status.RUNNING,
    )
    norm = unit * jnp.linalg.norm(ravel_pytree(at.gradient)[0] / unit)
    new = State(
        **at._asdict(),
        decrease=jnp.where(accepted, gain * unit, state.decrease),
        unit=unit,
        inverse=inverse.without_root(),
        descent=next_descent,
        whitening=state.whitening,
        failures=failures.astype(jnp.int32),
        quiet=quiet.astype(jnp.int32),
        idle=idle.astype(jnp.int32),
        work_units=state.work_units + 2 * found.trials,
        status=status.astype(jnp.int32),
    )
    return new, Info(at.objective, norm, found.trials, at.projection.products)
