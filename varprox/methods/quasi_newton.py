"""Quasi-Newton methods on the reduced objective in whitened variables: LBFGSvpro and Broydenvpro.

They differ in what stands for the inverse Hessian.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from varprox.checks import check_integer, check_number, told
from varprox.methods.method import Method, Status, check_all, check_state
from varprox.numerics.inverse_hessian import Broyden, Pairs, no_pairs, start_broyden
from varprox.numerics.line_search import ENOUGH, FIRST_ENOUGH, search
from varprox.precision import full_products
from varprox.problem.data import check_data
from varprox.problem.hosted import shapes_of
from varprox.problem.model import Problem, check_problem
from varprox.problem.streamed import rows_and_pullback
from varprox.reduced.projection import (
    Projection,
    is_exact,
    project,
    start_projection,
    without_span,
)
from varprox.reduced.whitening import Whitening, whitening

ACCURACY = 3e-3  # η², what is asked of a W-solve: see `project`
TOLERANCE = 1e-12  # see `lbfgsvpro`
MAX_BYTES = 2**30  # of an inverse Hessian
ROUNDINGS = 10  # that the objective may be off by; with 1, 3 or 10 runs end alike
QUIET, IDLE = 2, 10  # steps in a row, and trials
SHORT = 1e-2  # first trial along a line, of the whole step; with 0.1 and 1e-3 runs take as long


class State(NamedTuple):
    """The weights of a quasi-Newton method and what its next step starts from.

    Attributes:
        theta: The nonlinear weights θ.
        projection: W(θ) and what speeds up the next solve for it.
        objective: Φ at these weights.
        gradient: ∇Φ_red(θ), a pytree like θ.
        rounding: The rounding error of Φ if the errors of all predictions add up.
        decrease: The decrease of Φ in the last accepted step; Φ itself at the start.
        unit: The size of the first objective, by which objectives and gradients are divided.
        inverse: The approximation H of the inverse Hessian, as pairs or as a matrix.
        descent: −H g, the next direction, in the whitened variables.
        whitening: The map from the whitened variables to θ.
        failures: 1 after a step that failed, 2 after W has been solved for again.
        quiet: The number of steps in a row that promised and gained no more than the tolerance.
        idle: The number of trial points of steps in a row that promised and gained only rounding.
        work_units: The work units so far.
        status: The number of a ``Status``.
    """

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
        """The last layer W(θ), (columns, outputs)."""
        return self.projection.w


class Info(NamedTuple):
    """What one step of a quasi-Newton method did.

    Attributes:
        objective: Φ at the weights after the step.
        gradient_norm: ‖∇Φ_red‖ at the weights after the step.
        trials: The number of trial points of the line search.
        w_products: The number of products in the last solve for W; 0 under least squares.
    """

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
    """L-BFGS on the reduced objective, the full-batch method with the cheapest steps.

    The method keeps the last ``memory`` pairs of steps and changes of the gradient. It works in
    variables in which the Gauss–Newton matrix at the start is closer to the identity (see
    ``varprox.reduced.whitening``); features that couple samples are not whitened. The features need
    a derivative in reverse mode. Every step uses all data. Use the method for classification, for
    many inputs, and for more than some thousand weights. Up to there, ``broydenvpro`` learns more
    from the same gradients.

    The run has converged when two steps in a row promised and gained at most ``tolerance`` · Φ, or
    no more than rounding. If a direction is flatter by a factor κ than the model assumes, the gains
    still possible may add up to κ times the tolerance. The default of 1e-12 thus allows for κ = 1e6
    if a relative gain of 1e-6 may remain. Ten trial points in a row with gains below rounding of Φ
    also end the run. The status is then CONVERGED if rounding leaves at least half of the digits of
    Φ or if the residual is negligible beside the targets, and STALLED otherwise.

    If the line search finds no lower point, the next step stays put, solves for W again to full
    accuracy and discards the pairs. The run stalls only if the gradient step after that fails as
    well. If the gradient is zero at the start and the objective is not, the status is FLAT.

    Work units, one being a forward or a backward pass over the data:

    =============================  ============================================================
    Part                           Work units
    =============================  ============================================================
    start                          2
    whitening                      2, an upper bound
    trial point                    2; most steps need one
    =============================  ============================================================

    Arguments:
        problem: The problem to train. The head must be dense, and the features must not learn from
            batches.
        memory: The number of pairs, an integer ≥ 1. Each takes twice as much memory as θ. Changing
            it recompiles.
        tolerance: The relative gain at which the run has converged, a number ≥ 0. None stands for
            1e-12. Changing it does not recompile.

    Returns:
        A full-batch ``Method``, a pair of pure functions. ``state = method.init(theta, data)``
        checks the data and solves for the first W. ``state, info = method.step(state, data)`` takes
        one step. The state is a ``varprox.methods.quasi_newton.State``, the info a
        ``varprox.methods.quasi_newton.Info``.

    Raises:
        TypeError: If ``problem`` is not a ``Problem`` or ``tolerance`` is not a number. ``init``
            raises it for data, θ or features of the wrong type, and for features without a
            derivative in reverse mode; ``step`` raises it for the state of another method and for
            data that are not a pair of arrays.
        ValueError: If ``memory`` or ``tolerance`` is out of its range. ``init`` raises it for data
            that do not fit the problem, ``step`` for data of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> data = inputs, 2 * jnp.exp(-3 * inputs)
        >>> solution = vp.fit(vp.lbfgsvpro(problem), jnp.ones(1), data, max_work=200)
        >>> print(solution.theta.round(2), solution.w.round(2))
        [3.] [[2.]]

    Source:
        Newman, Ruthotto, Hart, van Bloemen Waanders, arXiv:2007.13171, section 3.
    """
    check_problem(problem)
    memory = check_integer("memory", memory, least=1)
    return _method(problem, tolerance, memory=memory, max_bytes=None)


def broydenvpro(
    problem: Problem, *, tolerance: float | None = None, max_bytes: int = MAX_BYTES
) -> Method:
    """Self-scaled Broyden on the reduced objective: the whole inverse Hessian from gradients alone.

    A step takes as many passes as a step of ``lbfgsvpro``, but knows more of the curvature. A step
    of ``gnvpro`` gains more and costs more. The features only need a derivative in reverse mode:
    they may couple samples, or be a solver. The whitened variables, the work units, the end of a
    run and what follows a failed line search are as in ``lbfgsvpro``.

    For n weights the inverse Hessian takes n² numbers, and 2 n² while it is rewritten, which
    happens every 32 steps. A step takes two products with it.

    Arguments:
        problem: The problem to train. The head must be dense, and the features must not learn from
            batches.
        tolerance: The relative gain at which the run has converged, a number ≥ 0. None stands for
            1e-12. Changing it does not recompile.
        max_bytes: The most that the inverse Hessian alone may take, an integer ≥ 1, in bytes. The
            default of 1 GiB is enough for 11,585 weights in double precision. Changing it does not
            recompile.

    Returns:
        A full-batch ``Method``, a pair of pure functions. ``state = method.init(theta, data)``
        checks the data and solves for the first W. ``state, info = method.step(state, data)`` takes
        one step. The state is a ``varprox.methods.quasi_newton.State``, the info a
        ``varprox.methods.quasi_newton.Info``.

    Raises:
        TypeError: If ``problem`` is not a ``Problem`` or ``tolerance`` is not a number. ``init``
            raises it for data, θ or features of the wrong type, and for features without a
            derivative in reverse mode; ``step`` raises it for the state of another method and for
            data that are not a pair of arrays.
        ValueError: If ``tolerance`` or ``max_bytes`` is out of its range. ``init`` raises it for
            data that do not fit the problem, and for so many weights that the inverse Hessian takes
            more than ``max_bytes``; ``step`` for data of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> data = inputs, 2 * jnp.exp(-3 * inputs)
        >>> solution = vp.fit(vp.broydenvpro(problem), jnp.ones(1), data, max_work=200)
        >>> print(solution.theta.round(2), solution.w.round(2))
        [3.] [[2.]]

    Source:
        Urbán, Stefanou, Pons, J. Comput. Phys. 523 (2025), for the update; see
        ``varprox.numerics.inverse_hessian``.
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
    return Method(init, step, problem, name="broydenvpro" if memory is None else "lbfgsvpro")


def _init(problem, theta, data, key=None, projection=None, *, memory, max_bytes):
    """`projection` is one at these weights, from which that under another loss is found faster."""
    theta, data = check_data(problem, theta, data, full_batch=True)
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
    total = lambda theta, inputs: jnp.sum(problem.model.rows(theta, inputs))  # noqa: E731
    try:
        jax.eval_shape(jax.grad(total), theta, shapes_of(inputs))
    except Exception as error:
        raise TypeError(
            "features: expected a function that JAX can differentiate in reverse, as quasi-Newton "
            'methods need; vp.gnvpro(problem, curvature="forward") works with a forward rule; got '
            f"{told(error)}"
        ) from error


@partial(jax.jit, static_argnames="memory")
@full_products
def _start(problem, theta, data, start, *, memory):
    if start is None:
        shaped = jax.eval_shape(problem.model.rows, theta, shapes_of(data[0]))
        start = without_span(problem, start_projection(problem, shaped, data[1]))
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
    rows, pulled = rows_and_pullback(problem, theta, inputs)
    projection = project(problem, rows, targets, start, tolerance, relative)
    projection = without_span(problem, projection)
    gradient = pulled(projection.slopes, projection.w)
    penalty, penalty_gradient = jax.value_and_grad(problem.penalty)(theta)
    gradient = jax.tree.map(jnp.add, gradient, penalty_gradient)
    at = _At(theta, projection, projection.value + penalty, gradient, jnp.zeros_like(penalty))
    rounding = projection.error * jnp.linalg.norm(projection.slopes) * len(rows) ** 0.5
    return at._replace(rounding=rounding), rows


def _whitened(whiten, unit, gradient):
    """The gradient in the variables, and in the units, in which the method works; flat."""
    return ravel_pytree(whiten(jax.tree.map(lambda leaf: leaf / unit, gradient)))[0]


def _size(at):
    """That of the objective, whose parts may cancel."""
    loss = at.projection.value
    return jnp.abs(loss) + jnp.abs(at.objective - loss)


def _step(problem, tolerance, kind, state, data):
    own = isinstance(state, State) and isinstance(state.inverse, kind)
    check_state({Pairs: "lbfgsvpro", Broyden: "broydenvpro"}[kind], own, state)
    data = check_all(problem, state, data)
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
