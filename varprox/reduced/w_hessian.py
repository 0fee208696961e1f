"""The Hessian of Φ in W: as a product, factorised, and solved with."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varprox.numerics.ridge import Span, compressed, fewer, ridge, ridge_of_each, span
from varprox.problem.chunks import blocks_of
from varprox.problem.model import Problem
from varprox.problem.streamed import Streamed
from varprox.problem.weighted import Targets, alike, plain, rooted, rooted_rows, weights_of

CHUNK = 512  # samples of a device
DENSE_LIMIT = 2048  # entries of W up to which its Hessian is factorised as a whole


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


def to_flat(w: jax.Array) -> jax.Array:
    """The entries of W (columns, outputs), output by output."""
    return w.T.reshape(-1)


def to_w(x: jax.Array, columns: int) -> jax.Array:
    """The inverse of `to_flat`."""
    return x.reshape(-1, columns).T


def hessian_map(problem: Problem, rows, w, targets) -> Callable[[jax.Array], jax.Array]:
    """v ↦ ∇²_W Φ v at `w`, for v shaped like W."""
    curved = problem.loss.curvature(rows @ w, targets)
    return lambda v: rows.T @ curved(rows @ v) + problem.w_penalty_like(v) * v


def hessian_factor(problem: Problem, rows, w, targets) -> Factor:
    """What `hessian_solver` needs: the factor of the whole Hessian, or of its blocks if W is
    large."""
    if isinstance(rows, Streamed):
        _, _, factor = streamed_ridge(problem, rows, targets)
        u, s, _ = jnp.linalg.svd(factor.basis[None] @ factor.blocks)
        return Factor(u * s[:, None], jnp.eye(len(w), dtype=w.dtype))
    return factorise(problem, rows, w, targets, whole=w.size <= DENSE_LIMIT)


def hessian_solver(
    problem: Problem, rows, w, targets, factor: Factor
) -> Callable[[jax.Array], jax.Array]:
    """y ↦ (∇²_W Φ)⁻¹ y at `w`, for y shaped like W, given the factor there; W-space work only."""
    if problem.loss.quadratic or w.size <= DENSE_LIMIT:
        return factor.solve
    return lambda y: _conjugate_gradients(problem, rows, w, targets, factor, y)


def _conjugate_gradients(problem, rows, w, targets, factor, y):
    return jax.scipy.sparse.linalg.cg(
        hessian_map(problem, rows, w, targets),
        y,
        tol=float(jnp.finfo(y.dtype).eps) ** 0.8,
        maxiter=200,
        M=factor.solve,
    )[0]


def ridge_factor(found: Span) -> Factor:
    """The factor under least squares, from what rows divided by the root of their number span;
    `found` has a leading axis where outputs have weights of their own."""
    root = found.inverse_root
    columns = root.shape[-1]
    return Factor(root.reshape(-1, columns, columns), jnp.eye(columns, dtype=root.dtype))


def factorise(problem: Problem, rows, w, targets, *, whole: bool = False) -> Factor:
    """The factor of ∇²_W Φ at `w`: of the whole, or of the diagonal block of each output.

    Under least squares these are the same, and exact. Under other losses the blocks take fewer
    multiplications by the factor (outputs + 1) / 2, and precondition nearly as well: on Indian
    Pines the first steps of LBFGSvpro took a fifth more products with them.
    """
    if problem.loss.quadratic:
        weighted = rooted_rows(targets, rows) / len(rows) ** 0.5
        spanned = span if weighted.ndim == 2 else jax.vmap(span, (0, None))
        return ridge_factor(spanned(weighted, problem.w_penalty_like(rows)))
    blocks = w_hessian(problem, rows, w, targets, whole)
    size = blocks.shape[-1]
    scale = jnp.max(jnp.diagonal(blocks, axis1=1, axis2=2), axis=1)[:, None, None]
    floor = problem.w_penalty_like(w) + size * jnp.finfo(w.dtype).eps * scale
    identity = jnp.eye(size, dtype=w.dtype)[None]
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


def streamed_ridge(
    problem: Problem, rows: Streamed, targets: Targets, offset: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array, Factor]:
    """Least squares for rows that are not held: W, V and the factor, where W = offset + basis V in
    the factor's basis. The targets are less what the offset predicts.

    A triangular factor of the rows, merged chunk by chunk, gives a basis in which they are nearly
    orthonormal. Only rows times this basis are solved for, so that the residual, these times V, is
    known to rounding of the targets, as from orthogonal factors, however large W is. Source, for
    the second factorisation: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, ETNA 44 (2015).
    """
    (samples, columns), outputs = rows.shape, targets.shape[1]
    alpha = problem.w_penalty_like(rows)
    offset = jnp.broadcast_to(jnp.asarray(offset, rows.dtype), (columns, outputs))

    def merge(factor, wanted, *more):
        more = compressed(*more)
        return compressed(*map(jnp.concatenate, zip((factor, wanted), more, strict=True)))

    def first(factor, z, c):
        weight = jnp.mean(weights_of(c), axis=1, keepdims=True)
        z = fewer(jnp.sqrt(weight) * z) / samples**0.5
        return jnp.linalg.qr(jnp.concatenate([factor, z]), mode="r")

    def second(so_far, z, c):
        rows = rooted_rows(c, z @ basis) / samples**0.5
        wanted = rooted(c, plain(c)) / samples**0.5
        if alike(c):
            return merge(*so_far, rows, wanted)
        return jax.vmap(merge)(*so_far, rows, wanted.T[:, :, None])

    factor = rows.total(first, jnp.zeros((columns, columns), rows.dtype), targets)
    basis = span(factor, alpha).inverse_root
    norms = jnp.linalg.norm(basis, axis=0, keepdims=True)
    axes = basis / jnp.where(norms > 0, norms, 1)
    # Of the minimum norm is only what the rows determine.
    offset = jnp.where(jnp.all(norms > 0), offset, axes @ (axes.T @ offset))
    start = jnp.sqrt(alpha) * basis, -jnp.sqrt(alpha) * offset
    if alike(targets):
        found = ridge(*rows.total(second, start, targets), 0)
    else:
        each = jnp.broadcast_to(start[0], (outputs, columns, columns)), start[1].T[:, :, None]
        merged, wanted = rows.total(second, each, targets)
        found = ridge_of_each(merged, wanted[:, :, 0].T, 0, 0.0)
    root = found.span.inverse_root.reshape(-1, columns, columns)
    return offset + basis @ found.w, found.w, Factor(root, basis)


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
    chunks = blocks_of(len(rows), CHUNK * jax.device_count())

    def add(total, place):
        z, c = chunks.take((rows, targets), place)
        z = jnp.where(chunks.new(place)[:, None], z, 0)
        curved = jax.vmap(problem.loss.curvature(z @ w, c))
        q = curved(jnp.broadcast_to(units, (outputs, *c.shape)))  # (outputs, samples, outputs)
        return total + q[i, :, j] @ (z[:, k] * z[:, l]), None

    total = jnp.zeros((len(i), len(k)), w.dtype)
    total, _ = jax.lax.scan(add, total, chunks.places)
    total = total * (chunks.devices * chunks.size / len(rows))
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
