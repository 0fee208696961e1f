"""The projection: W(θ) for given rows, directly under least squares, else by Newton–Krylov.

What the methods solve for at every trial point lives here: warm-started, preconditioned with a
factor that is kept while it serves, and as accurate as asked.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varprox.numerics import trust_region
from varprox.numerics.ridge import ridge
from varprox.problem.heads import has_bias
from varprox.problem.model import Problem

LIFETIME = 20  # products that a factor serves for, which take about as long as making it
NO_FACTOR = 10**6  # products spent on a factor that is none
RANK, FLAT, ITERATIONS = 24, 1e-2, 50  # of the Newton–Krylov iterations
CHUNK = 512  # samples


class Factor(NamedTuple):
    """S with S Sᵀ ≈ (∇²_W Φ)⁻¹, acting on the entries of W listed output by output.

    S = (I ⊗ basis) · blocks, where the diagonal blocks are one for each output, (outputs, columns,
    columns), one that serves every output, (1, columns, columns), or one for the whole of W, (1,
    size, size).
    """

    blocks: jax.Array
    basis: jax.Array  # (columns, columns)

    @property
    def whole(self) -> bool:
        return self.blocks.shape[-1] > len(self.basis)

    def root(self, x: jax.Array) -> jax.Array:
        """S x for x of W's size."""
        y = self.blocks @ x.reshape(-1, self.blocks.shape[-1], 1)
        return (y.reshape(-1, len(self.basis)) @ self.basis.T).reshape(-1)

    def transposed_root(self, x: jax.Array) -> jax.Array:
        """Sᵀ x for x of W's size."""
        y = x.reshape(-1, len(self.basis)) @ self.basis
        return (y.reshape(-1, 1, self.blocks.shape[-1]) @ self.blocks).reshape(-1)

    def solve(self, y: jax.Array) -> jax.Array:
        """S Sᵀ y for y shaped like W."""
        return to_w(self.root(self.transposed_root(to_flat(y))), len(y))


class Projection(NamedTuple):
    """W(θ), what is known of it, and what is kept to find the next one faster.

    `rows` are those that W and the factor belong to; under least squares what they span, the
    `basis` of `varprox.numerics.ridge.Span` for rows divided by the root of their number.
    """

    w: jax.Array  # (columns, outputs)
    slopes: jax.Array  # (batch, outputs), of the loss in the predictions, to more digits than W has
    rows: jax.Array | None  # (batch, columns); None where no one needs them
    factor: Factor
    value: jax.Array  # of Φ without R
    products: jax.Array  # spent in the last solve, each one product with rows and one with rowsᵀ
    spent: jax.Array  # since the factor was made


def to_flat(w: jax.Array) -> jax.Array:
    """The entries of W (columns, outputs), output by output."""
    return w.T.reshape(-1)


def to_w(x: jax.Array, columns: int) -> jax.Array:
    """The inverse of `to_flat`."""
    return x.reshape(-1, columns).T


def start_projection(problem: Problem, rows, targets) -> Projection:
    """W = 0 and no factor yet; of rows (batch, columns) only shape and dtype are used."""
    (samples, columns), outputs = rows.shape, targets.shape[1]
    blocks = 1 if problem.loss.quadratic else outputs
    return Projection(
        jnp.zeros((columns, outputs), rows.dtype),
        jnp.zeros(targets.shape, rows.dtype),
        jnp.zeros((samples, columns), rows.dtype),
        Factor(
            jnp.zeros((blocks, columns, columns), rows.dtype),
            jnp.zeros((columns, columns), rows.dtype),
        ),
        jnp.array(jnp.inf, rows.dtype),
        jnp.zeros((), jnp.int32),
        jnp.int32(NO_FACTOR),
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
    scale = len(rows) ** 0.5
    offset: Any = 0.0
    if has_bias(problem.model.head):
        mean = jnp.mean(targets, axis=0)
        offset = jnp.zeros((rows.shape[1], len(mean)), rows.dtype).at[-1].set(mean)
        targets = targets - mean
    found = ridge(rows / scale, targets / scale, problem.w_penalty_like(rows), offset)
    root = found.span.inverse_root
    value = 0.5 * jnp.sum(found.residual**2) + problem.penalty_on_w(found.w)
    return Projection(
        w=found.w,
        slopes=found.residual / scale,
        rows=found.span.basis,
        factor=Factor(root[None], jnp.eye(len(root), dtype=root.dtype)),
        value=value,
        products=jnp.zeros((), jnp.int32),
        spent=jnp.zeros((), jnp.int32),
    )


class _Iterate(NamedTuple):
    x: jax.Array  # W, flat
    value: jax.Array
    gradient: jax.Array
    preconditioned: jax.Array  # Sᵀ gradient
    products: jax.Array  # with the present factor
    accepted: jax.Array
    iterations: jax.Array


def _newton(problem, rows, targets, start, tolerance, relative):
    loss, alpha = problem.loss, problem.w_penalty_like(rows)
    start = carry_over(problem, start, rows)
    columns = len(start.w)
    zero, true, dtype = jnp.zeros((), jnp.int32), jnp.array(True), rows.dtype

    def value_and_gradient(x):
        w = to_w(x, columns)
        predictions = rows @ w
        gradient = rows.T @ loss.gradient(predictions, targets) + alpha * w
        value = loss.value(predictions, targets) + 0.5 * alpha * jnp.sum(w**2)
        return value, to_flat(gradient)

    # ∇_W Φ at W = 0, where all predictions are zero.
    scale = jnp.linalg.norm(rows.T @ loss.gradient(jnp.zeros_like(targets), targets))
    limit = jnp.finfo(dtype).eps ** 0.64 * jnp.maximum(scale, 1)

    def asked(value):
        return tolerance + relative * (start_value - value)

    def close(at):
        excess = 0.5 * jnp.sum(at.preconditioned**2)
        small = (jnp.linalg.norm(at.gradient) <= limit) | (excess <= asked(at.value))
        return small | ~jnp.isfinite(at.value) | (at.iterations >= ITERATIONS)

    def iteration(factor, at):
        hessian = hessian_map(problem, rows, to_w(at.x, columns), targets)

        def matvec(y):
            return factor.transposed_root(to_flat(hessian(to_w(factor.root(y), columns))))

        def evaluate(y, found):
            trial = at.x + factor.root(y)
            value, gradient = value_and_gradient(trial)
            # Below rounding of the value the trapezoidal rule still measures the decrease.
            by_gradient = -0.5 * (at.gradient + gradient) @ (trial - at.x)
            noisy = found.decrease < 1e3 * jnp.finfo(dtype).eps * jnp.abs(at.value)
            return jnp.where(noisy, by_gradient, at.value - value), (trial, value, gradient)

        infinite = jnp.array(jnp.inf, dtype)
        space = trust_region.krylov_space(
            matvec,
            at.preconditioned,
            infinite,
            rank=min(RANK, at.x.size),
            flat=FLAT,
            enough=asked(at.value) / 2,
        )
        result = trust_region.search(
            lambda radius, shift: trust_region.krylov_step(space, radius),
            evaluate,
            jnp.zeros_like(at.x),
            (at.x, at.value, at.gradient),
            infinite,
            jnp.zeros((), dtype),
            max_trials=20,
        )
        x, value, gradient = result.aux
        return _Iterate(
            x,
            value,
            gradient,
            factor.transposed_root(gradient),
            at.products + space.tridiagonal.size,
            result.accepted,
            at.iterations + 1,
        )

    def life_of_a_factor(carry):
        at, factor, products, spent, _ = carry
        worn = spent > LIFETIME
        factor = jax.lax.cond(
            worn,
            lambda: factorise(problem, rows, to_w(at.x, columns), targets, whole=factor.whole),
            lambda: factor,
        )
        spent = jnp.where(worn, 0, spent)
        at = jax.lax.while_loop(
            lambda at: ~close(at) & at.accepted & (spent + at.products <= LIFETIME),
            lambda at: iteration(factor, at),
            at._replace(
                preconditioned=factor.transposed_root(at.gradient),
                products=zero,
                accepted=true,
            ),
        )
        # With a new factor, a step that is not accepted has met rounding.
        done = close(at) | (worn & ~at.accepted)
        spent = jnp.where(at.accepted, spent + at.products, NO_FACTOR)
        return at, factor, products + at.products, spent, done

    x = to_flat(start.w)
    start_value, gradient = value_and_gradient(x)
    at = _Iterate(x, start_value, gradient, gradient, zero, true, zero)
    at, factor, products, spent, _ = jax.lax.while_loop(
        lambda carry: ~carry[-1] & jnp.isfinite(carry[0].value),
        life_of_a_factor,
        (at, start.factor, zero, start.spent, ~true),
    )
    # Even a factor that is not used grows old, as θ moves.
    w = to_w(at.x, columns)
    return start._replace(
        w=w,
        slopes=loss.gradient(rows @ w, targets),
        factor=factor,
        value=at.value,
        products=products,
        spent=spent + 1,
    )


def rounding_of_predictions(problem: Problem, rows, w) -> jax.Array:
    """Eps times the size of the terms that predictions are sums of, which cancel where W is large;
    the root of its mean square. The bias takes no part: targets are centred before W is found."""
    if has_bias(problem.model.head):
        rows, w = rows[:, :-1], w[:-1]
    sizes = jnp.abs(rows) @ jnp.abs(w)
    return jnp.finfo(w.dtype).eps * jnp.sqrt(jnp.mean(jnp.sum(sizes**2, axis=1)))


def is_exact(value: jax.Array, targets: jax.Array) -> jax.Array:
    """Is this objective next to nothing beside that of predictions of zero, by a factor of eps^1.5?

    Rounding of the predictions alone says nothing of this: it is large where W is, and with other θ
    W may be smaller.
    """
    eps = jnp.finfo(value.dtype).eps
    unit = jnp.max(jnp.abs(targets))  # whose square may overflow
    size = unit * jnp.sqrt(jnp.mean(jnp.sum((targets / jnp.where(unit > 0, unit, 1)) ** 2, axis=1)))
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


def factorise(problem: Problem, rows, w, targets, *, whole: bool = False) -> Factor:
    """The factor of ∇²_W Φ at `w`: of the whole, or of the diagonal block of each output.

    Under least squares these are the same, and exact. Under other losses the blocks take fewer
    multiplications by the factor (outputs + 1) / 2, and precondition nearly as well: on Indian
    Pines the first steps of LBFGSvpro took a fifth more products with them.
    """
    if problem.loss.quadratic:
        return _ridge(problem, rows, targets).factor
    blocks = w_hessian(problem, rows, w, targets, whole)
    size = blocks.shape[-1]
    scale = jnp.max(jnp.diagonal(blocks, axis1=1, axis2=2), axis=1)[:, None, None]
    floor = problem.w_penalty_like(w) + size * jnp.finfo(w.dtype).eps * scale
    identity = jnp.eye(size, dtype=w.dtype)
    lower = jnp.linalg.cholesky(blocks + floor * identity)
    # In single precision rounding may leave no definite matrix; any preconditioner will do then.
    lower = jax.lax.cond(
        jnp.isfinite(lower).all(),
        lambda: lower,
        lambda: jnp.linalg.cholesky(blocks + jnp.finfo(w.dtype).eps ** 0.5 * scale * identity),
    )
    identity = jnp.broadcast_to(identity, lower.shape)
    inverse = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
    return Factor(inverse.mT, jnp.eye(len(w), dtype=w.dtype))


def w_hessian(problem: Problem, rows, w, targets, whole: bool) -> jax.Array:
    """∇²_W Φ at `w` without the penalty: in the blocks of a `Factor`.

    It is Σ Q ⊗ z zᵀ over the samples, with rows z and curvatures Q of the loss. Both factors being
    symmetric, one matrix product of their lower triangles gives all of it: a quarter of the work of
    the whole matrices. It is summed over chunks of samples that stay in the processor's cache.
    """
    columns, outputs = w.shape
    units = jnp.eye(outputs, dtype=w.dtype)[:, None, :]
    i, j = np.tril_indices(outputs) if whole else (np.arange(outputs),) * 2
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
    if not whole:
        return total[:, of_columns]
    matrix = total[_entries(i, j)[:, None, :, None], of_columns[None, :, None, :]]
    return matrix.reshape(1, w.size, w.size)


def _entries(i, j):
    """The symmetric matrix of places: entry (i[n], j[n]) is n."""
    places = np.zeros((i[-1] + 1, j[-1] + 1), int)
    places[i, j] = places[j, i] = np.arange(len(i))
    return places


def hessian_map(problem: Problem, rows, w, targets) -> Callable[[jax.Array], jax.Array]:
    """v ↦ ∇²_W Φ v at `w`, for v shaped like W."""
    curved = problem.loss.curvature(rows @ w, targets)
    return lambda v: rows.T @ curved(rows @ v) + problem.w_penalty_like(v) * v
