"""The projection: W(θ) for given rows, directly under least squares, else by Newton–Krylov.

What the methods solve for at every trial point lives here: warm-started, preconditioned with a
factor that is kept while it serves, and as accurate as asked.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from varprox.numerics import trust_region
from varprox.numerics.ridge import ridge, ridge_of_each
from varprox.problem.heads import has_bias
from varprox.problem.model import Problem
from varprox.problem.streamed import Streamed
from varprox.problem.weighted import Targets, alike, means, plain, rooted, rooted_rows, shifted
from varprox.reduced.w_hessian import (
    Factor,
    factorise,
    hessian_map,
    ridge_factor,
    streamed_ridge,
    to_flat,
    to_w,
)

LIFETIME = 20  # products that a factor serves for, which take about as long as making it
WORN = LIFETIME + 1  # products after which it is made anew, as is one that is none
RANK, FLAT, ITERATIONS = 24, 1e-2, 50  # of the Newton–Krylov iterations


class Projection(NamedTuple):
    """W(θ), what is known of it, and what is kept to find the next one faster.

    `rows` are those that W and the factor belong to; under least squares what they span, the
    `basis` of `varprox.numerics.ridge.Span` for rows divided by the root of their number.
    """

    w: jax.Array  # (columns, outputs)
    slopes: jax.Array  # (batch, outputs), of the loss in the predictions, to more digits than W has
    # (batch, columns); (batch, outputs, columns) where each output has weights, and a basis, of its
    # own; None where no one needs them, and for `Streamed` rows.
    rows: jax.Array | None
    factor: Factor
    value: jax.Array  # of Φ without R
    error: jax.Array  # of a prediction, by rounding: see `rounding_of_predictions`
    products: jax.Array  # spent in the last solve, each one product with rows and one with rowsᵀ
    spent: jax.Array  # since the factor was made


def start_projection(problem: Problem, rows: Any, targets: Targets) -> Projection:
    """W = 0 and no factor yet; of rows (batch, columns) only shape and dtype are used."""
    (samples, columns), outputs = rows.shape, targets.shape[1]
    blocks = 1 if problem.loss.quadratic and alike(targets) else outputs
    each = (outputs,) if problem.loss.quadratic and not alike(targets) else ()
    return Projection(
        jnp.zeros((columns, outputs), rows.dtype),
        jnp.zeros(targets.shape, rows.dtype),
        None if isinstance(rows, Streamed) else jnp.zeros((samples, *each, columns), rows.dtype),
        Factor(
            jnp.zeros((blocks, columns, columns), rows.dtype),
            jnp.zeros((columns, columns), rows.dtype),
        ),
        jnp.array(jnp.inf, rows.dtype),
        jnp.zeros((), rows.dtype),
        jnp.zeros((), jnp.int32),
        jnp.int32(WORN),
    )


def without_span(problem: Problem, at: Projection) -> Projection:
    """`at` without what only formed models need; W-solves under least squares need no rows."""
    return at._replace(rows=None) if problem.loss.quadratic else at


def project(
    problem: Problem, rows, targets, start: Projection, tolerance=0.0, relative=0.0
) -> Projection:
    """Minimises Φ over W for given rows.

    Least squares is solved directly. Under other losses Newton–Krylov iterations start from the W
    in `start`, preconditioned with its factor, both carried over to these rows. They end when
    ‖∇_W Φ‖ ≤ eps^0.64 max(1, ‖∇_W Φ(0)‖) (1e-10 in float64), when rounding leaves nothing to gain,
    or earlier, when the estimated excess δ = Φ(W, θ) − Φ_red(θ) is below `tolerance` plus the
    fraction `relative` of what this solve has gained. A factor that is worn is replaced by one that
    belongs to the W found so far.

    An excess δ is harmless to the outer iteration, and this is why. Hold the inexact W fixed and
    let Ψ(ϑ) = Φ(W, ϑ) − Φ_red(ϑ). Then Ψ ≥ 0 everywhere, Ψ(θ) = δ and ∇Ψ(θ) is the error of the
    gradient ∇_θ Φ(W, θ) used for ∇Φ_red(θ). Where Ψ has an L-Lipschitz gradient, 0 ≤ Ψ(θ − ∇Ψ(θ)/L)
    ≤ δ − ‖∇Ψ(θ)‖²/(2L), so

        ‖∇_θ Φ(W, θ) − ∇Φ_red(θ)‖ ≤ √(2 L δ).

    The methods ask for δ ≤ η² Δ, their `ACCURACY` being η² and Δ the decrease of their last step,
    or that expected of this one if it is smaller; before any step, quasi-Newton methods ask for η²
    times what the solve gains. Then the objective is known to the fraction η² of what a step gains,
    and the error of the gradient is at most η √(2 L Δ). A steepest-descent step of length 1/L from
    θ gains ‖∇Φ_red‖²/(2L); where Δ is of this order, η bounds the relative error of the gradient.
    """
    if problem.loss.quadratic:
        return _ridge(problem, rows, targets)
    return _newton(problem, rows, targets, start, tolerance, relative)


def _ridge(problem, rows, targets):
    scale, shape = len(rows) ** 0.5, (rows.shape[1], targets.shape[1])
    offset: Any = 0.0
    if has_bias(problem.model.head):
        mean = means(targets)
        offset = jnp.zeros(shape, rows.dtype).at[-1].set(mean)
        targets = shifted(targets, mean)
    alpha = problem.w_penalty_like(rows)
    solve = ridge if alike(targets) else ridge_of_each
    if isinstance(rows, Streamed):
        w, v, factor = streamed_ridge(problem, rows, targets, offset)
        residual, sizes = _streamed_residual(problem, rows, targets, w, v, factor)
        basis = None
    else:
        alpha = problem.w_penalty_like(rows)
        solve = ridge if alike(targets) else ridge_of_each
        weighted = rooted_rows(targets, rows) / scale
        w, residual, found = solve(weighted, rooted(targets, plain(targets)) / scale, alpha, offset)
        basis, factor = found.basis, ridge_factor(found)
        basis = basis if basis.ndim == 2 else basis.swapaxes(0, 1)
        sizes = _sizes(problem, rows, w, targets)
    return Projection(
        w=w,
        slopes=rooted(targets, residual) / scale,
        rows=basis,
        factor=factor,
        value=0.5 * jnp.sum(residual**2) + problem.penalty_on_w(w),
        error=_rounding(sizes),
        products=jnp.zeros((), jnp.int32),
        spent=jnp.zeros((), jnp.int32),
    )


def _streamed_residual(problem, rows, targets, w, v, factor):
    """The residual for rows that are not held, as `ridge` has it and as refined, and the sizes of
    the terms of the predictions."""
    scale, basis = len(rows) ** 0.5, factor.basis

    def look(gradient, new, z, c):
        y = z @ basis
        residual = rooted(c, y @ v - plain(c)) / scale
        slopes = jnp.where(new[:, None], rooted(c, residual) / scale, 0)
        return gradient + y.T @ slopes, residual

    gradient, residual = rows.scan(look, problem.w_penalty_like(w) * (basis.T @ w), targets)
    left = factor._replace(basis=jnp.eye(len(basis), dtype=basis.dtype)).solve(gradient)

    def refine(z, residual, c):
        residual = residual - rooted(c, (z @ basis) @ left) / scale
        return residual, _sizes(problem, z, w, c)

    return rows.each(refine, residual, targets)


class _Point(NamedTuple):
    """A W, flat, with Φ and its gradient there."""

    x: jax.Array
    value: jax.Array
    gradient: jax.Array


class _Iterate(NamedTuple):
    point: _Point
    preconditioned: jax.Array  # Sᵀ gradient
    products: jax.Array  # with the present factor
    accepted: jax.Array
    iterations: jax.Array


class _Task(NamedTuple):
    """Minimising Φ over W for given rows, and when this is done."""

    problem: Problem
    rows: jax.Array
    targets: jax.Array
    start_value: jax.Array
    tolerance: jax.Array | float
    relative: jax.Array | float
    limit: jax.Array  # the norm of the gradient at which W is exact

    @property
    def columns(self) -> int:
        return self.rows.shape[1]

    def point(self, x):
        at = to_w(x, self.columns), self.rows, self.targets
        return _Point(x, self.problem.w_objective(*at), to_flat(self.problem.w_gradient(*at)))

    def allowed(self, value):
        """The excess of Φ over its minimum at which W is good enough."""
        return self.tolerance + self.relative * (self.start_value - value)

    def done(self, at):
        value, excess = at.point.value, 0.5 * jnp.sum(at.preconditioned**2)
        small = jnp.linalg.norm(at.point.gradient) <= self.limit
        small |= excess <= self.allowed(value)
        return small | ~jnp.isfinite(value) | (at.iterations >= ITERATIONS)


def _newton(problem, rows, targets, start, tolerance, relative):
    """Newton–Krylov iterations, each factor serving until it is worn."""
    start = carry_over(problem, start, rows)
    start_value = problem.w_objective(start.w, rows, targets)
    scale = jnp.linalg.norm(problem.w_gradient(jnp.zeros_like(start.w), rows, targets))
    limit = jnp.finfo(rows.dtype).eps ** 0.64 * jnp.maximum(scale, 1)
    task = _Task(problem, rows, targets, start_value, tolerance, relative, limit)
    first, zero = task.point(to_flat(start.w)), jnp.zeros((), jnp.int32)
    at = _Iterate(first, first.gradient, zero, jnp.array(True), zero)
    at, factor, products, spent, _ = jax.lax.while_loop(
        lambda carry: ~carry[-1] & jnp.isfinite(carry[0].point.value),
        partial(_life_of_a_factor, task),
        (at, start.factor, zero, start.spent, jnp.array(False)),
    )
    # Even a factor that is not used grows old, as θ moves.
    w = to_w(at.point.x, task.columns)
    return start._replace(
        w=w,
        slopes=problem.loss.gradient(rows @ w, targets),
        factor=factor,
        value=at.point.value,
        error=rounding_of_predictions(problem, rows, w, targets),
        products=products,
        spent=spent + 1,
    )


def _life_of_a_factor(task, carry):
    """Iterations with one factor, which is made anew where it is worn."""
    at, factor, products, spent, _ = carry
    worn = spent >= WORN

    def anew():
        w = to_w(at.point.x, task.columns)
        return factorise(task.problem, task.rows, w, task.targets, whole=factor.whole)

    factor = jax.lax.cond(worn, anew, lambda: factor)
    spent = jnp.where(worn, 0, spent)
    at = jax.lax.while_loop(
        lambda at: ~task.done(at) & at.accepted & (spent + at.products < WORN),
        partial(_iteration, task, factor),
        at._replace(
            preconditioned=factor.transposed_root(at.point.gradient),
            products=jnp.zeros((), jnp.int32),
            accepted=jnp.array(True),
        ),
    )
    # With a new factor, a step that is not accepted has met rounding.
    done = task.done(at) | (worn & ~at.accepted)
    spent = jnp.where(at.accepted, spent + at.products, WORN)
    return at, factor, products + at.products, spent, done


def _iteration(task, factor, at):
    """A step in the Krylov space of the preconditioned gradient."""
    problem, rows, targets, *_ = task
    here = at.point
    hessian = hessian_map(problem, rows, to_w(here.x, task.columns), targets)

    def matvec(y):
        return factor.transposed_root(to_flat(hessian(to_w(factor.root(y), task.columns))))

    def evaluate(y, found):
        trial = task.point(here.x + factor.root(y))
        # Below rounding of the value the trapezoidal rule still measures the decrease.
        by_gradient = -0.5 * (here.gradient + trial.gradient) @ (trial.x - here.x)
        noisy = found.decrease < 1e3 * jnp.finfo(rows.dtype).eps * jnp.abs(here.value)
        return jnp.where(noisy, by_gradient, here.value - trial.value), trial

    infinite = jnp.array(jnp.inf, rows.dtype)
    space = trust_region.krylov_space(
        matvec,
        at.preconditioned,
        infinite,
        rank=min(RANK, here.x.size),
        flat=FLAT,
        enough=task.allowed(here.value) / 2,
    )
    result = trust_region.search(
        lambda radius, _: trust_region.krylov_step(space, radius),
        evaluate,
        jnp.zeros_like(here.x),
        here,
        infinite,
        jnp.zeros((), rows.dtype),
        max_trials=20,
    )
    point = result.aux
    return _Iterate(
        point,
        factor.transposed_root(point.gradient),
        at.products + space.tridiagonal.size,
        result.accepted,
        at.iterations + 1,
    )


def rounding_of_predictions(problem: Problem, rows, w, targets) -> jax.Array:
    """Eps times the size of the terms that predictions are sums of, which cancel where W is large;
    the root of its mean square. The bias takes no part: targets are centred before W is found."""
    return _rounding(_sizes(problem, rows, w, targets))


def _sizes(problem, rows, w, targets):
    """Of the terms of each prediction, (batch, outputs)."""
    if has_bias(problem.model.head):
        rows, w = rows[:, :-1], w[:-1]
    return rooted(targets, jnp.abs(rows) @ jnp.abs(w))


def _rounding(sizes):
    return jnp.finfo(sizes.dtype).eps * jnp.sqrt(jnp.mean(jnp.sum(sizes**2, axis=1)))


def is_exact(value: jax.Array, targets: Targets) -> jax.Array:
    """Is this objective next to nothing beside that of predictions of zero, by a factor of eps^1.5?

    Rounding of the predictions alone says nothing of this: it is large where W is, and with other θ
    W may be smaller.
    """
    eps, values = jnp.finfo(value.dtype).eps, rooted(targets, plain(targets))
    unit = jnp.max(jnp.abs(values))  # whose square may overflow
    size = unit * jnp.sqrt(jnp.mean(jnp.sum((values / jnp.where(unit > 0, unit, 1)) ** 2, axis=1)))
    return jnp.sqrt(jnp.abs(value)) <= eps**0.75 * size


def carry_over(problem: Problem, start: Projection, rows) -> Projection:
    """`start` for other rows of the same samples.

    When θ moves, much of the change in the features is a change of basis: rows · M ≈ old rows. Then
    M W leaves the predictions where they were, and (I ⊗ M) S is the inverse root of the Hessian. M
    is found by least squares, and kept close to the identity in directions that the rows hardly
    have, where the Hessian is that of the penalty. On Indian Pines this leaves about half of the
    products, with the whole Hessian as preconditioner.
    """
    gram = rows.T @ rows
    columns = len(gram)
    scale = jnp.finfo(rows.dtype).eps ** 0.5 * jnp.trace(gram) / columns
    damping = (len(rows) * problem.w_penalty_like(rows) + scale) * jnp.eye(
        columns, dtype=rows.dtype
    )
    change = jax.scipy.linalg.solve(gram + damping, rows.T @ start.rows + damping, assume_a="pos")
    factor = start.factor._replace(basis=change @ start.factor.basis)
    return start._replace(w=change @ start.w, rows=rows, factor=factor)
