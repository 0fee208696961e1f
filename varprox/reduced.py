"""W(θ) and the reduced objective Φ_red(θ) = min_W Φ(W, θ), with their derivatives.

`project` is the solver used inside the methods: warm-started, as accurate as asked. `solve_w` and
`reduced_objective` are its differentiable faces. Imports model, least_squares and trust_region.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varprox import trust_region
from varprox.least_squares import ridge, triangular_factor
from varprox.model import Problem, check_data

DENSE_LIMIT = (
    2048  # entries of W up to which its whole Hessian is factorised, not a block per output
)
ACCURACY = 3e-3  # η², what the methods ask of a W-solve: see `project`
LIFETIME = 40  # products that a factor serves for, which take about as long as making it
NO_FACTOR = 2 * LIFETIME  # products spent on a factor that is none, or poor
PATIENCE = 20  # Krylov products in one Newton iteration beyond which the factor is made anew
INNER_RANK, INNER_FLAT, INNER_ITERATIONS = 24, 1e-2, 50
CHUNK = 512  # samples


class Projection(NamedTuple):
    """W(θ) and what is kept to find the next one faster.

    `rows` are those that W belongs to; under least squares, which needs none, there are zero of
    them. `inverse_root` holds blocks S with S Sᵀ ≈ (∇²_W Φ)⁻¹: see `apply_root`. Under least squares it
    is exact and of shape (1, columns, columns), one block for all outputs; under other losses it is
    the factor made at some earlier W, (1, columns·outputs, columns·outputs) or, past `DENSE_LIMIT`,
    (outputs, columns, columns).
    """

    w: jax.Array  # (columns, outputs)
    rows: jax.Array  # (batch, columns)
    inverse_root: jax.Array
    value: jax.Array  # of Φ without R
    products: jax.Array  # spent in the last solve, each one product with rows and one with rowsᵀ
    spent: jax.Array  # products since the factor was made


def apply_root(inverse_root: jax.Array, x: jax.Array, transpose: bool = False) -> jax.Array:
    """S x or Sᵀ x for a vector x that lists the entries of W output by output."""
    size = inverse_root.shape[-1]
    if transpose:  # as a row from the left, which needs no transposed copy of the blocks
        return (x.reshape(-1, 1, size) @ inverse_root).reshape(x.shape)
    return (inverse_root @ x.reshape(-1, size, 1)).reshape(x.shape)


def inverse_hessian(inverse_root: jax.Array, y: jax.Array) -> jax.Array:
    """S Sᵀ y for y shaped like W."""
    columns, outputs = y.shape
    flat = apply_root(inverse_root, apply_root(inverse_root, y.T.reshape(-1), transpose=True))
    return flat.reshape(outputs, columns).T


def factorise(problem: Problem, rows, w, targets) -> jax.Array:
    """The inverse root of ∇²_W Φ at `w` under a general loss, as `Projection` describes it."""
    blocks = w_hessian(problem, rows, w, targets)
    size = blocks.shape[-1]
    scale = jnp.max(jnp.diagonal(blocks, axis1=1, axis2=2), axis=1)[:, None, None]
    floor = problem.w_penalty + size * jnp.finfo(w.dtype).eps * scale
    identity = jnp.eye(size, dtype=w.dtype)
    lower = jnp.linalg.cholesky(blocks + floor * identity)
    # In single precision rounding may leave no definite matrix; any preconditioner will do then.
    lower = jax.lax.cond(
        jnp.isfinite(lower).all(),
        lambda: lower,
        lambda: jnp.linalg.cholesky(blocks + jnp.finfo(w.dtype).eps ** 0.5 * scale * identity),
    )
    identity = jnp.broadcast_to(identity, lower.shape)
    return jax.scipy.linalg.solve_triangular(lower, identity, lower=True).mT


def w_hessian(problem: Problem, rows, w, targets) -> jax.Array:
    """∇²_W Φ at `w` without the penalty: the blocks of which `Projection` keeps the inverse roots.

    It is Σ Q ⊗ z zᵀ over the samples, with rows z and curvatures Q of the loss. Both factors being
    symmetric, one matrix product of their lower triangles gives all of it: a quarter of the work of
    the whole matrices. It is summed over chunks of samples that stay in the processor's cache.
    """
    columns, outputs = w.shape
    dense = w.size <= DENSE_LIMIT
    units = jnp.eye(outputs, dtype=w.dtype)[:, None, :]
    i, j = np.tril_indices(outputs) if dense else (np.arange(outputs),) * 2
    k, l = np.tril_indices(columns)  # noqa: E741
    chunks = -(-len(rows) // CHUNK)

    def split(x, mode):
        missing = chunks * CHUNK - len(x)
        return jnp.pad(x, ((0, missing), (0, 0)), mode).reshape(chunks, CHUNK, -1)

    def add(total, chunk):
        z, c = chunk
        curved = jax.vmap(problem.loss.curvature(z @ w, c))
        q = curved(jnp.broadcast_to(units, (outputs, *c.shape)))  # (outputs, CHUNK, outputs)
        return total + q[i, :, j] @ (z[:, k] * z[:, l]), None

    # Zeros lengthen the rows, and so add nothing; targets are repeated, which any loss can take.
    total = jnp.zeros((len(i), len(k)), w.dtype)
    total, _ = jax.lax.scan(add, total, (split(rows, "constant"), split(targets, "edge")))
    total = total * (CHUNK / len(rows))
    of_columns = _entries(k, l)
    if not dense:
        return total[:, of_columns]
    whole = total[_entries(i, j)[:, None, :, None], of_columns[None, :, None, :]]
    return whole.reshape(1, w.size, w.size)


def _entries(i, j):
    """The symmetric matrix of places: entry (i[n], j[n]) is n."""
    places = np.zeros((i[-1] + 1, j[-1] + 1), int)
    places[i, j] = places[j, i] = np.arange(len(i))
    return places


def start_projection(problem: Problem, rows, targets) -> Projection:
    """W = 0 and no factor yet; of rows (batch, columns) only shape and dtype are used."""
    (samples, columns), outputs = rows.shape, targets.shape[1]
    if problem.loss.quadratic:
        samples, shape = 0, (1, columns, columns)
    elif columns * outputs <= DENSE_LIMIT:
        shape = (1, columns * outputs, columns * outputs)
    else:
        shape = (outputs, columns, columns)
    return Projection(
        jnp.zeros((columns, outputs), rows.dtype),
        jnp.zeros((samples, columns), rows.dtype),
        jnp.zeros(shape, rows.dtype),
        problem.loss.value(jnp.zeros_like(targets), targets),
        jnp.zeros((), jnp.int32),
        jnp.int32(NO_FACTOR),
    )


def carry_over(start: Projection, rows) -> Projection:
    """`start` for other rows of the same samples.

    When θ moves, much of the change in the features is a change of basis: rows ≈ old rows · M⁻¹.
    Then M W leaves the predictions where they were, and (I ⊗ M) S is the inverse root of the
    Hessian. M is found by least squares. On Indian Pines this spares some two thirds of the
    products.
    """
    if len(start.rows) == 0:
        return start
    gram = rows.T @ rows
    columns = len(gram)
    damping = jnp.finfo(rows.dtype).eps ** 0.5 * jnp.trace(gram) / columns
    damped = gram + damping * jnp.eye(columns, dtype=rows.dtype)
    change = jax.scipy.linalg.solve(damped, rows.T @ start.rows, assume_a="pos")
    root = start.inverse_root
    blocks = root.reshape(-1, columns, root.shape[-1])  # one for each output
    return start._replace(
        w=change @ start.w, rows=rows, inverse_root=(change @ blocks).reshape(root.shape)
    )


def renew(problem: Problem, targets, projection: Projection) -> Projection:
    """The projection with its solve counted, and with a new factor if the old one is worn."""
    if problem.loss.quadratic:
        return projection
    _, rows, root, _, products, spent = projection
    spent = spent + 1 + products
    worn = spent > LIFETIME
    root = jax.lax.cond(
        worn, lambda: factorise(problem, rows, projection.w, targets), lambda: root
    )
    return projection._replace(inverse_root=root, spent=jnp.where(worn, 0, spent))


def project(problem: Problem, rows, targets, start: Projection, tolerance=0.0) -> Projection:
    """Minimises Φ over W for given rows.

    Least squares is solved directly. Under other losses Newton–Krylov iterations start from the W
    in `start`, preconditioned with its factor, both carried over to these rows. They end when ‖∇_W Φ‖ ≤ eps^0.64 max(1,
    ‖∇_W Φ(0)‖) (1e-10 in float64), when rounding leaves nothing to gain, or earlier, when the
    estimated excess δ = Φ(W, θ) − Φ_red(θ) is below `tolerance`.

    An excess δ is harmless to the outer iteration, and this is why. Hold the inexact W fixed and
    let Ψ(ϑ) = Φ(W, ϑ) − Φ_red(ϑ). Then Ψ ≥ 0 everywhere, Ψ(θ) = δ and ∇Ψ(θ) is the error of the
    gradient ∇_θ Φ(W, θ) used for ∇Φ_red(θ). Where Ψ has an L-Lipschitz gradient, 0 ≤ Ψ(θ − ∇Ψ(θ)/L)
    ≤ δ − ‖∇Ψ(θ)‖²/(2L), so

        ‖∇_θ Φ(W, θ) − ∇Φ_red(θ)‖ ≤ √(2 L δ).

    The methods ask for δ ≤ η² Δ, η² = `ACCURACY`, Δ being the decrease of their last step. Then the objective is
    known to the fraction η² of what a step gains, and the error of the gradient is at most η √(2 L
    Δ). A steepest-descent step of length 1/L from θ gains ‖∇Φ_red‖²/(2L); where Δ is of this order,
    η bounds the relative error of the gradient.
    """
    if problem.loss.quadratic:
        return _ridge(problem, rows, targets)
    return _newton(problem, rows, targets, start, tolerance)


def _ridge(problem, rows, targets):
    scale = len(rows) ** 0.5
    factor = triangular_factor(rows / scale, targets / scale)
    w, root = ridge(factor, rows.shape[1], problem.w_penalty)
    value = problem.w_objective(w, rows, targets)
    zero = jnp.zeros((), jnp.int32)
    return Projection(w, rows[:0], root[None], value, products=zero, spent=zero)


def _newton(problem, rows, targets, start, tolerance):
    loss, alpha = problem.loss, problem.w_penalty
    start = carry_over(start, rows)
    columns, outputs = start.w.shape
    eps = jnp.finfo(rows.dtype).eps

    def to_flat(w):
        return w.T.reshape(-1)

    def to_w(x):
        return x.reshape(outputs, columns).T

    def value_and_gradient(x):
        w = to_w(x)
        predictions = rows @ w
        gradient = rows.T @ loss.gradient(predictions, targets) + alpha * w
        value = loss.value(predictions, targets) + 0.5 * alpha * jnp.sum(w**2)
        return value, to_flat(gradient)

    def iteration(carry):
        x, value, gradient, root, spent, products, _, i = carry
        w = to_w(x)
        worn = spent > LIFETIME
        root = jax.lax.cond(worn, lambda: factorise(problem, rows, w, targets), lambda: root)
        spent = jnp.where(worn, 0, spent)
        hessian = hessian_map(problem, rows, w, targets)

        def matvec(y):
            product = hessian(to_w(apply_root(root, y)))
            return apply_root(root, to_flat(product), transpose=True)

        def evaluate(y, predicted):
            trial = x + apply_root(root, y)
            trial_value, trial_gradient = value_and_gradient(trial)
            # Below rounding of the value the trapezoidal rule still measures the decrease.
            by_gradient = -0.5 * (gradient + trial_gradient) @ (trial - x)
            noisy = predicted < 1e3 * eps * jnp.abs(value)
            decrease = jnp.where(noisy, by_gradient, value - trial_value)
            return decrease, (trial_value, trial_gradient)

        result = trust_region.iterate(
            matvec,
            apply_root(root, gradient, transpose=True),
            evaluate,
            jnp.zeros_like(x),
            (value, gradient),
            jnp.array(jnp.inf, x.dtype),
            rank=min(INNER_RANK, x.size),
            flat=INNER_FLAT,
            max_trials=20,
        )
        value, gradient = result.aux
        x = x + apply_root(root, result.x)
        poor = ~result.accepted | (result.products > PATIENCE)
        spent = jnp.where(poor, NO_FACTOR, spent + result.products)
        products = products + result.products
        # With a new factor, a step that is not accepted has met rounding.
        return x, value, gradient, root, spent, products, worn & ~result.accepted, i + 1

    limit = jnp.linalg.norm(value_and_gradient(jnp.zeros_like(to_flat(start.w)))[1])
    limit = eps**0.64 * jnp.maximum(limit, 1)

    def unfinished(carry):
        x, value, gradient, root, spent, _, done, i = carry
        excess = 0.5 * jnp.sum(apply_root(root, gradient, transpose=True) ** 2)
        close = (jnp.linalg.norm(gradient) <= limit) | ((spent < NO_FACTOR) & (excess <= tolerance))
        return ~close & ~done & jnp.isfinite(value) & (i < INNER_ITERATIONS)

    x = to_flat(start.w)
    value, gradient = value_and_gradient(x)
    zero = jnp.zeros((), jnp.int32)
    x, value, _, root, spent, products, _, _ = jax.lax.while_loop(
        unfinished,
        iteration,
        (x, value, gradient, start.inverse_root, start.spent, zero, jnp.array(False), zero),
    )
    return Projection(to_w(x), rows, root, value, products, spent)


def hessian_root(problem: Problem, rows, w, targets) -> jax.Array:
    """The blocks S with S Sᵀ ≈ (∇²_W Φ)⁻¹ at `w`, as `Projection` describes them."""
    if problem.loss.quadratic:
        return _ridge(problem, rows, targets).inverse_root
    return factorise(problem, rows, w, targets)


def hessian_solver(problem: Problem, rows, w, targets, root) -> Callable[[jax.Array], jax.Array]:
    """y ↦ (∇²_W Φ)⁻¹ y at `w`, for y shaped like W, given its `hessian_root`; W-space work only."""
    if problem.loss.quadratic or w.size <= DENSE_LIMIT:
        return lambda y: inverse_hessian(root, y)
    return lambda y: _conjugate_gradients(problem, rows, w, targets, root, y)


def hessian_map(problem: Problem, rows, w, targets) -> Callable[[jax.Array], jax.Array]:
    """v ↦ ∇²_W Φ v at `w`, for v shaped like W."""
    curved = problem.loss.curvature(rows @ w, targets)
    return lambda v: rows.T @ curved(rows @ v) + problem.w_penalty * v


def _conjugate_gradients(problem, rows, w, targets, root, y):
    return jax.scipy.sparse.linalg.cg(
        hessian_map(problem, rows, w, targets),
        y,
        tol=float(jnp.finfo(y.dtype).eps) ** 0.8,
        maxiter=200,
        M=lambda v: inverse_hessian(root, v),
    )[0]


@jax.custom_jvp
def w_of_rows(problem: Problem, rows: jax.Array, targets: jax.Array) -> jax.Array:
    """argmin_W Φ to full accuracy, as a differentiable function of rows, targets and penalty.

    Forward and reverse derivatives of any order come from the implicit function theorem: along a
    direction, ∇²_W Φ · dW = −d(∇_W Φ) with W held fixed on the right.
    """
    return project(problem, rows, targets, start_projection(problem, rows, targets)).w


@w_of_rows.defjvp
def _w_of_rows_jvp(primals, tangents):
    problem, rows, targets = primals
    w = w_of_rows(*primals)
    root = hessian_root(problem, rows, w, targets)

    def stationarity(problem, rows, targets):
        gradient = problem.loss.gradient(rows @ w, targets)
        return rows.T @ gradient + problem.w_penalty * w

    _, change = jax.jvp(stationarity, primals, tangents)
    dw = jax.lax.custom_linear_solve(
        hessian_map(problem, rows, w, targets),
        change,
        lambda _, y: hessian_solver(problem, rows, w, targets, root)(y),
        symmetric=True,
    )
    return w, -dw


@jax.custom_jvp
def envelope(problem: Problem, rows: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
    """Φ without R at W = W(θ), where ∇_W Φ = 0: its derivative leaves out that along W."""
    return problem.w_objective(w, rows, targets)


@envelope.defjvp
def _envelope_jvp(primals, tangents):
    problem, rows, w, targets = primals
    d_problem, d_rows, _, d_targets = tangents
    return jax.jvp(
        lambda problem, rows, targets: problem.w_objective(w, rows, targets),
        (problem, rows, targets),
        (d_problem, d_rows, d_targets),
    )


@jax.jit
def _reduced(problem, theta, data):
    inputs, targets = data
    rows = problem.model.rows(theta, inputs)
    w = w_of_rows(problem, rows, targets)
    return envelope(problem, rows, w, targets) + problem.penalty(theta), w


def solve_w(problem: Problem, theta: Any, data: tuple) -> jax.Array:
    """W(θ) = argmin_W Φ(W, θ), of shape (columns, outputs), for data = (inputs, targets).

    Differentiable in θ, the data and the penalties, in forward and reverse mode, to any order.
    Under least squares without penalty W is the minimum-norm solution; where the rows lack full
    column rank its derivative leaves out the part in their null space. Raises as `varprox.model.check_data` does.
    """
    check_data(problem, theta, data)
    return _reduced(problem, theta, data)[1]


def reduced_objective(problem: Problem) -> Callable:
    """The function (theta, data) ↦ (Φ_red(θ), W(θ)), for `jax.value_and_grad(…, has_aux=True)`.

    By the envelope theorem its gradient costs one reverse pass of the features and no solve; second
    derivatives use the implicit derivative of W. Source: arXiv:2007.13171, section 2.
    """

    def reduced(theta, data):
        check_data(problem, theta, data)
        return _reduced(problem, theta, data)

    return reduced
