"""W(θ) and the reduced objective Φ_red(θ) = min_W Φ(W, θ), with their derivatives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from varprox.precision import full_products
from varprox.problem.data import check_data
from varprox.problem.model import Problem, check_problem
from varprox.problem.streamed import Streamed
from varprox.reduced.projection import project, start_projection
from varprox.reduced.w_hessian import hessian_factor, hessian_map, hessian_solver


@jax.custom_jvp
@full_products
def w_of_rows(problem: Problem, rows: jax.Array | Streamed, targets: jax.Array) -> jax.Array:
    """argmin_W Φ to full accuracy, as a differentiable function of rows, targets and penalty.

    Forward and reverse derivatives of any order come from the implicit function theorem: along a
    direction, ∇²_W Φ · dW = −d(∇_W Φ) with W held fixed on the right.
    """
    return project(problem, rows, targets, start_projection(problem, rows, targets)).w


@w_of_rows.defjvp
@full_products  # for a rule is traced where the caller differentiates
def _w_of_rows_jvp(primals, tangents):
    problem, rows, targets = primals
    w = w_of_rows(*primals)
    # Higher derivatives take none of the factor: those of a solution are implicit, too.
    factor = hessian_factor(*jax.lax.stop_gradient((problem, rows, w, targets)))

    def stationarity(problem, rows, targets):
        return problem.w_gradient(w, rows, targets)

    _, change = jax.jvp(stationarity, primals, tangents)
    dw = jax.lax.custom_linear_solve(
        hessian_map(problem, rows, w, targets),
        change,
        lambda _, y: hessian_solver(problem, rows, w, targets, factor)(y),
        symmetric=True,
    )
    if problem.loss.quadratic:
        return w, _turn(problem, factor, rows, tangents[1], w, targets) - dw
    return w, -dw


def _turn(problem, factor, rows, d_rows, w, targets):
    """How the minimum-norm W under least squares turns with the null space of the rows.

    This is N d_rowsᵀ Ω rows (rowsᵀ Ω rows)⁺ W with the weights Ω of an output and the projector N
    onto the null space; it vanishes where the rows have full column rank. Source: Golub and
    Pereyra, SIAM J. Numer. Anal. 10 (1973), theorem 4.3. Its own derivative leaves out that of N
    and of the pseudo-inverse, as `factor` has none.
    """
    curved = problem.loss.curvature(rows @ w, targets)(rows @ factor.solve(w))
    _, lifted = jax.jvp(lambda rows: rows.T @ curved, (rows,), (d_rows,))
    # The columns of a block are orthogonal, and zero for the null space.
    norms = jnp.linalg.norm(factor.blocks, axis=1, keepdims=True)
    span = factor.blocks / jnp.where(norms > 0, norms, 1)
    inside = span @ (span.mT @ lifted.T[:, :, None])
    return lifted - inside[:, :, 0].T


@jax.custom_jvp
@full_products
def envelope(problem: Problem, rows: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
    """Φ without R at W = W(θ), where ∇_W Φ = 0: its derivative leaves out that along W."""
    return problem.w_objective(w, rows, targets)


@envelope.defjvp
@full_products
def _envelope_jvp(primals, tangents):
    problem, rows, w, targets = primals
    d_problem, d_rows, _, d_targets = tangents
    return jax.jvp(
        lambda problem, rows, targets: problem.w_objective(w, rows, targets),
        (problem, rows, targets),
        (d_problem, d_rows, d_targets),
    )


@jax.jit
@full_products
def _reduced(problem, theta, data):
    inputs, targets = data
    rows = problem.rows(theta, inputs)
    w = w_of_rows(problem, rows, targets)
    return envelope(problem, rows, w, targets) + problem.penalty(theta), w


def solve_w(problem: Problem, theta: Any, data: tuple) -> jax.Array:
    """The best last layer for given features, W(θ) = argmin_W Φ(W, θ).

    Under least squares the solution is direct, by an orthogonal factorisation of the design rows;
    without `w_penalty` it is the minimum-norm solution. Under other losses it comes from
    Newton–Krylov iterations to full accuracy.

    W is differentiable in θ, in the data and in the penalties, in forward and reverse mode and to
    any order. There is one exception: if the minimum-norm solution is taken for rows without full
    column rank, only first derivatives are right.

    Arguments:
        problem: The `Problem`; its head must not be convolutional.
        theta: The nonlinear weights θ, a pytree of arrays.
        data: The pair (inputs, targets), with inputs as the features take them and targets
            (batch, outputs); or (inputs, targets, weights), as for `fit`.

    Returns:
        W(θ), (columns, outputs), in the dtype of θ.

    Raises:
        TypeError: If `problem` is not a `Problem` or has a convolutional head, if `data` is not a
            pair, if θ and the targets are not all float32 or all float64, or if the features cannot
            be traced.
        ValueError: If shapes do not agree, if numbers are not finite, or if the loss does not take
            the targets. Under `jit` numbers are not checked.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> inputs = jnp.linspace(-1, 1, 20)[:, None]
        >>> targets = 3 * jnp.tanh(2 * inputs) + 1
        >>> model = vp.Separable(lambda theta, inputs: jnp.tanh(theta * inputs))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> w = vp.solve_w(problem, jnp.array([2.0]), (inputs, targets))
        >>> [round(float(x), 3) for x in w[:, 0]]  # the kernel and the bias
        [3.0, 1.0]
    """
    theta, data = check_data(problem, theta, data)
    return _reduced(problem, theta, data)[1]


def reduced_objective(problem: Problem) -> Callable:
    """The reduced objective Φ_red(θ) = min_W Φ(W, θ), as a function of θ and the data.

    By the envelope theorem its gradient is ∇_θ Φ(W, θ) at W = W(θ): it costs one reverse pass of
    the features beside the solve for W. Second derivatives use the implicit derivative of W.

    Arguments:
        problem: The `Problem`; its head must not be convolutional.

    Returns:
        A function ``reduced(theta, data) -> (value, w)`` for
        ``jax.value_and_grad(reduced, has_aux=True)``. `value` is Φ_red(θ), a scalar, and `w` is
        W(θ), (columns, outputs). It takes and refuses the same θ and data as `solve_w`.

    Raises:
        TypeError: If `problem` is not a `Problem`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> inputs = jnp.linspace(-1, 1, 20)[:, None]
        >>> data = inputs, 3 * jnp.tanh(2 * inputs) + 1
        >>> model = vp.Separable(lambda theta, inputs: jnp.tanh(theta * inputs))
        >>> reduced = vp.reduced_objective(vp.Problem(model, vp.least_squares()))
        >>> value_and_gradient = jax.value_and_grad(reduced, has_aux=True)
        >>> (value, w), gradient = value_and_gradient(jnp.array([1.5]), data)
        >>> value.shape, w.shape, gradient.shape
        ((), (2, 1), (1,))
        >>> bool(gradient[0] < 0)  # the minimum is at θ = 2
        True

    Source:
        Newman, Ruthotto, Hart, van Bloemen Waanders, arXiv:2007.13171, section 2.
    """
    check_problem(problem)

    def reduced(theta, data):
        theta, data = check_data(problem, theta, data)
        return _reduced(problem, theta, data)

    return reduced
