"""Products with the curvature of the reduced objective, linearised once at θ.

Write Z for the design rows, dZ for their derivative along v, G for the derivative of the loss in
the predictions, Q for its second derivative, H = ZᵀQZ + α₂I for the Hessian in W, and

    a = dZᵀ G,      b = Zᵀ Q dZ W,      dW = J_W v = −H⁻¹ (a + b),      J v = dZ W + Z dW.

The Gauss–Newton matrix Jᵀ Q J + α₂ J_Wᵀ J_W then needs no more than one product with the linearised
features and one with their transpose: inserting dW and using ZᵀQZ + α₂I = H, all terms collapse
into

    v ↦ dZ ↦ [Q (dZ W − Z H⁻¹ b)] Wᵀ + G (H⁻¹ a)ᵀ ↦ its pullback to θ,

the first term being Kaufman's approximation and the second what Golub and Pereyra's full derivative
adds. The Hessian replaces the cotangent by Q (dZ W + Z dW) Wᵀ + G dWᵀ and adds the curvature of the
features under G Wᵀ.

Source: arXiv:2007.13171, section 3; Golub and Pereyra, Inverse Problems 19 (2003) R1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from varprox.precision import full_products
from varprox.problem.data import check_data
from varprox.problem.model import Problem
from varprox.problem.streamed import Streamed, rows_and_pullback
from varprox.problem.weighted import weighed
from varprox.reduced.objective import w_of_rows
from varprox.reduced.projection import Projection
from varprox.reduced.w_hessian import Factor, hessian_factor, hessian_solver


class Curvature(NamedTuple):
    """The reduced objective at θ: its value, its gradient and its linear maps.

    Vectors v are pytrees like θ. A `Curvature` holds functions, so it cannot leave a `jit`: make it
    in the compiled function that uses it.

    Attributes:
        value: Φ_red(θ), a scalar.
        w: W(θ), (columns, outputs).
        gradient: ∇Φ_red(θ), a pytree like θ.
        matvec: A function of v. It returns H v, a pytree like θ, where H is the Gauss–Newton matrix
            or the Hessian.
        jvp: A function of v. It returns J v, (batch, outputs), where J is the derivative of the
            predictions rows(θ) W(θ).
        vjp: A function of u (batch, outputs). It returns Jᵀ u, a pytree like θ.
        w_jvp: A function of v. It returns J_W v, shaped like W, where J_W is the derivative of
            W(θ).
        factor: A factorisation of the Hessian of Φ in W at W(θ). ``factor.solve(y)`` applies its
            inverse to y shaped like W; if W has more than 2048 entries and the loss is not least
            squares, only approximately.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> inputs = jnp.linspace(-1, 1, 20)[:, None]
        >>> data = inputs, 3 * jnp.tanh(2 * inputs) + 1
        >>> model = vp.Separable(lambda theta, inputs: jnp.tanh(theta * inputs))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> curvature = vp.gauss_newton(problem, jnp.array([1.5]), data)
        >>> curvature.w.shape, curvature.jvp(jnp.array([1.0])).shape
        ((2, 1), (20, 1))
    """

    value: jax.Array
    w: jax.Array
    gradient: Any
    matvec: Callable
    jvp: Callable
    vjp: Callable
    w_jvp: Callable
    factor: Factor  # of the Hessian in W, at W(θ)


@full_products
def gauss_newton(problem: Problem, theta: Any, data: tuple) -> Curvature:
    """The reduced objective at θ with its Gauss–Newton matrix.

    With J the derivative of the predictions rows(θ) W(θ), J_W the derivative of W(θ), Q the second
    derivative of the loss in the predictions and α = `w_penalty`, the matrix is::

        H = Jᵀ Q J + α J_Wᵀ J_W + ∇²R

    J includes the change of W with θ. H is positive semidefinite if R is convex. It is never
    formed; the features are linearised once, and products with H cost:

    =================  ========================================
    call               passes of the features
    =================  ========================================
    `gauss_newton`     one forward, linearised, and one reverse
    `matvec`           one forward and one reverse
    `jvp` and `w_jvp`  one forward
    `vjp`              one reverse
    =================  ========================================

    The features need derivatives in forward and in reverse mode.

    Arguments:
        problem: The `Problem`; its head must not be convolutional.
        theta: The nonlinear weights θ, a pytree of arrays.
        data: The pair (inputs, targets), with inputs as the features take them and targets
            (batch, outputs); or (inputs, targets, weights), as for `fit`.

    Returns:
        A `Curvature` whose `matvec` multiplies with H.

    Raises:
        TypeError: In the cases in which `solve_w` does.
        ValueError: In the cases in which `solve_w` does.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> inputs = jnp.linspace(-1, 1, 20)[:, None]
        >>> data = inputs, 3 * jnp.tanh(2 * inputs) + 1  # the minimum is at θ = 2
        >>> model = vp.Separable(lambda theta, inputs: jnp.tanh(theta * inputs))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> theta = jnp.array([1.5])
        >>> curvature = vp.gauss_newton(problem, theta, data)
        >>> step = curvature.gradient / curvature.matvec(jnp.array([1.0]))  # H is 1 × 1
        >>> round(float((theta - step)[0]), 2)
        1.97

    Source:
        Newman, Ruthotto, Hart, van Bloemen Waanders, arXiv:2007.13171, section 3; Golub and
        Pereyra, Inverse Problems 19 (2003) R1.
    """
    theta, data = check_data(problem, theta, data)
    return linearise(problem, theta, data)


@full_products
def newton(problem: Problem, theta: Any, data: tuple) -> Curvature:
    """The reduced objective at θ with its full Hessian.

    It is like `gauss_newton`, but `matvec` multiplies with ∇²Φ_red(θ), which may be indefinite. The
    product also takes the second derivatives of the features, and costs about twice as much: two
    forward and two reverse passes.

    Arguments:
        problem: The `Problem`; its head must not be convolutional.
        theta: The nonlinear weights θ, a pytree of arrays.
        data: The pair (inputs, targets), with inputs as the features take them and targets
            (batch, outputs); or (inputs, targets, weights), as for `fit`.

    Returns:
        A `Curvature` whose `matvec` multiplies with the Hessian.

    Raises:
        TypeError: In the cases in which `solve_w` does.
        ValueError: In the cases in which `solve_w` does.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> inputs = jnp.linspace(-1, 1, 20)[:, None]
        >>> data = inputs, 3 * jnp.tanh(2 * inputs) + 1  # the minimum is at θ = 2
        >>> model = vp.Separable(lambda theta, inputs: jnp.tanh(theta * inputs))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> theta = jnp.array([1.5])
        >>> curvature = vp.newton(problem, theta, data)
        >>> step = curvature.gradient / curvature.matvec(jnp.array([1.0]))  # H is 1 × 1
        >>> round(float((theta - step)[0]), 2)
        1.94

    Source:
        Newman, Ruthotto, Hart, van Bloemen Waanders, arXiv:2007.13171, section 3; Golub and
        Pereyra, Inverse Problems 19 (2003) R1.
    """
    theta, data = check_data(problem, theta, data)
    return linearise(problem, theta, data, full=True)


def linearise(
    problem: Problem,
    theta: Any,
    data: tuple,
    at: Projection | None = None,
    *,
    full: jax.Array | bool = False,
    w_curvature: bool = True,
) -> Curvature:
    """The `gauss_newton` or, if `full`, the `newton` curvature, unchecked.

    `at` is W(θ), with the factor of ∇²_W Φ there, for callers that know it; without it W is a
    differentiable function of θ. Without `w_curvature` the Gauss–Newton matrix lacks α₂ J_WᵀJ_W, as
    in the authors' implementation under cross entropy. `full` may be traced: both products are one
    program.
    """
    inputs, targets = data
    rows, along, pulled = _linear_maps(problem, theta, data)
    w = w_of_rows(problem, rows, targets) if at is None else at.w
    curved = problem.loss.curvature(rows @ w, targets)
    if at is None:
        residual = problem.loss.gradient(rows @ w, targets)
        factor = hessian_factor(problem, rows, w, targets)
    else:
        residual, factor = at.slopes, at.factor
    along, pulled = partial(along, w, residual, curved), partial(pulled, w, residual, curved)
    solve = hessian_solver(problem, rows, w, targets, factor)
    penalty_gradient, penalty_product = jax.linearize(jax.grad(problem.penalty), theta)
    gradient_at = lambda theta: rows_and_pullback(problem, theta, inputs)[1](residual, w)  # noqa: E731
    feature_curvature = _derivative_if(full, gradient_at, theta)

    def w_change(v):
        _, a, b = along(v)
        return -solve(a + b)

    def jvp(v):
        d_predictions, a, b = along(v)
        return d_predictions - rows @ solve(a + b)

    def vjp(u):
        y = solve(rows.T @ u)
        return pulled(u, y, -y)

    def product(v):
        d_predictions, a, b = along(v)
        by_a, by_b = solve(a), solve(b)
        ahead = jnp.where(full, by_a + by_b, by_b)
        back = jnp.where(full, -by_a - by_b, by_a)
        features = feature_curvature(v)
        return _add(pulled(curved(d_predictions), ahead, back), features, penalty_product(v))

    def published_product(v):
        return _add(vjp(curved(jvp(v))), penalty_product(v))

    def either_product(v):
        return jax.lax.cond(full, product, published_product, v)

    return Curvature(
        value=problem.w_objective(w, rows, targets) + problem.penalty(theta),
        w=w,
        gradient=_add(pulled(residual), penalty_gradient),
        matvec=full_products(product if w_curvature else either_product),
        jvp=full_products(jvp),
        vjp=full_products(vjp),
        w_jvp=full_products(w_change),
        factor=factor,
    )


def _linear_maps(problem, theta, data):
    """The design rows and, in the notation above, two maps that also take W, G and Q: v ↦ (dZ W, a,
    b), and (u, y, x) ↦ the pullback of (u − Q Z y) Wᵀ + G xᵀ, where y and x may be left out.

    The features are linearised once; where rows are `Streamed`, in each chunk anew.
    """
    inputs, targets = data
    rows = problem.rows(theta, inputs)
    if isinstance(rows, Streamed):
        return rows, partial(_along_chunks, rows, targets), partial(_from_chunks, rows, targets)
    rows, forward = jax.linearize(lambda theta: problem.rows(theta, inputs), theta)
    transposed = jax.linear_transpose(forward, theta)

    def along(w, residual, curved, v):
        d_rows = forward(v)
        d_predictions = d_rows @ w
        return d_predictions, d_rows.T @ residual, rows.T @ curved(d_predictions)

    def pulled(w, residual, curved, u, y=None, x=None):
        u = u if y is None else u - curved(rows @ y)
        return transposed(u @ w.T if x is None else u @ w.T + residual @ x.T)[0]

    return rows, along, pulled


def _along_chunks(rows, targets, w, residual, _, v):
    def add(so_far, new, x, g, c):
        at = lambda theta: rows.model.rows(theta, x)  # noqa: E731
        z, d_z = jax.jvp(at, (rows.theta,), (v,))
        z, d_z = jnp.where(new[:, None], z, 0), jnp.where(new[:, None], d_z, 0)
        d_predictions = d_z @ w
        of_block = d_z.T @ g, z.T @ weighed(c, d_predictions / len(rows))
        return _add(so_far, of_block), d_predictions

    start = jnp.zeros_like(w), jnp.zeros_like(w)
    (a, b), d_predictions = rows.blocks.scan(add, start, rows.inputs, residual, targets)
    return d_predictions, a, b


def _from_chunks(rows, targets, w, residual, _, u, y=None, x=None):
    def add(so_far, new, inputs, u, g, c):
        z, pullback = jax.vjp(lambda theta: rows.model.rows(theta, inputs), rows.theta)
        u = u if y is None else u - weighed(c, z @ y / len(rows))
        cotangent = u @ w.T if x is None else u @ w.T + g @ x.T
        (pulled,) = pullback(jnp.where(new[:, None], cotangent, 0))
        return _add(so_far, pulled), None

    start = jax.tree.map(jnp.zeros_like, rows.theta)
    return rows.blocks.scan(add, start, rows.inputs, u, residual, targets)[0]


def _derivative_if(needed, fn, x):
    """The derivative of `fn` at x, a symmetric linear map, and zero where it is not `needed`: then
    no pass is taken for it, neither here nor in a product."""
    zero = partial(jax.tree.map, jnp.zeros_like)
    if needed is False:
        return zero
    structure: Any = None

    def take():
        nonlocal structure
        leaves, structure = jax.tree.flatten(jax.vjp(fn, x)[1])
        return leaves

    shapes = jax.eval_shape(take)
    nothing = lambda: [jnp.zeros(s.shape, s.dtype) for s in shapes]  # noqa: E731
    leaves = jax.lax.cond(needed, take, nothing)
    derivative = lambda v: jax.tree.unflatten(structure, leaves)(v)[0]  # noqa: E731
    return lambda v: jax.lax.cond(needed, derivative, zero, v)


def _add(*trees):
    return jax.tree.map(lambda *leaves: sum(leaves), *trees)
