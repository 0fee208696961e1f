"""The quadratic model of the reduced objective at θ, in one of three forms.

Seen in a Krylov space, as a matrix, or as the singular values of its rows: each form knows how to
minimise itself in a ball, and in which variables this is one. Imports curvature, jacobian,
whitening, recycling and the trust region.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from varprox import trust_region
from varprox.curvature import linearise
from varprox.jacobian import dimensions, gauss_newton_matrix, gauss_newton_root, passes
from varprox.model import Problem
from varprox.penalties import tikhonov_weight
from varprox.projection import Factor
from varprox.recycling import Recycled, nothing_yet, recycle
from varprox.whitening import Whitening, whitening

PASS = 50  # operations that a matrix product does in the time of one of a network's pass
LARGEST = 2**28  # entries of a matrix that is formed unasked


class Form(IntEnum):
    """The forms of the model, as `varprox.gnvpro` names them."""

    KRYLOV = 0
    DENSE = 1
    KERNEL = 2


class Quadratic(NamedTuple):
    """The model gᵀs + ½ sᵀHs of steps s = root(y) of θ, in variables y in which the trust region
    is a ball."""

    gradient_norm: jax.Array  # in θ
    root: Callable[[jax.Array], jax.Array]
    step: Callable[[jax.Array, jax.Array], trust_region.Step]  # of radius and a guess at the shift
    products: jax.Array
    work: jax.Array  # units spent
    norm: Any  # that of the next model
    # What to add to a step, given G and W at its end; None where K is not kept.
    correct: Callable[[trust_region.Step, jax.Array, jax.Array], jax.Array] | None = None


class KrylovNorm(NamedTuple):
    """s = M P^½ y, with M from a sketch of the curvature at the start and P from the Krylov spaces
    since."""

    whitening: Whitening | None  # None stands for M = I
    recycled: Recycled


def start_norm(
    form: Form, problem: Problem, theta: Any, rows, w, data: tuple, memory: int, whiten: bool
) -> Any:
    """What makes the first model's norm; `memory` and `whiten` are those of `gnvpro`."""
    like = ravel_pytree(theta)[0]
    if form is Form.KRYLOV:
        found = whitening(problem, theta, rows, w, data) if whiten else None
        return KrylovNorm(found, nothing_yet(memory, like))
    return jnp.zeros(like.size if form is Form.DENSE else 0, like.dtype)


def choose(problem: Problem, theta: Any, data: tuple, w: Any, *, rank: int, kaufman: bool) -> Form:
    """The form whose steps take the fewest operations, counted for a full Krylov space.

    Only the shapes of the arrays matter. A Krylov space it is where the features cannot be had for
    one sample alone.
    """
    inputs, targets = data
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    rows = (len(targets) + len(w)) * dimensions(problem, w) + (0 if kaufman else w.size)
    in_pass = PASS * len(targets) * size
    in_rows = (2 + passes(w, kaufman=kaufman)) * in_pass
    costs = {Form.KRYLOV: (2 + 2 * rank) * in_pass}
    if size**2 <= LARGEST:
        costs[Form.DENSE] = in_rows + rows * size**2 + size**3
    if rows * size <= LARGEST and tikhonov_weight(problem.theta_penalty) is not None:
        costs[Form.KERNEL] = in_rows + 2 * size * rows**2 + 20 * rows**3
    cheapest = min(costs, key=costs.__getitem__)
    return cheapest if _takes_one_sample(problem, theta, inputs) else Form.KRYLOV


def _takes_one_sample(problem, theta, inputs):
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    try:
        return len(jax.eval_shape(problem.model.features, theta, one)) == 1
    except (TypeError, ValueError):  # what JAX raises for shapes that do not fit
        return False


def krylov(
    problem: Problem,
    theta: Any,
    data: tuple,
    w: jax.Array,
    factor: Factor,
    norm: KrylovNorm,
    radius: jax.Array,
    newton: jax.Array,
    *,
    rank: int,
    flat: jax.Array,
    w_curvature: bool,
) -> Quadratic:
    """The model in a Krylov space for the Gauss–Newton matrix, or for the Hessian if `newton`.

    The space ends where a product adds less than the fraction `flat` of the model's decrease in the
    ball of the given radius.
    """
    _, unravel = ravel_pytree(theta)

    def whitened(x):
        return x if norm.whitening is None else ravel_pytree(norm.whitening(unravel(x)))[0]

    def root(y):
        return whitened(norm.recycled.root(y))

    def space(full):
        curvature = linearise(problem, theta, data, w, factor, full=full, w_curvature=w_curvature)
        gradient = ravel_pytree(curvature.gradient)[0]

        def in_ball(x):  # the transpose of `root`
            return norm.recycled.root(whitened(x))

        def matvec(y):
            return in_ball(ravel_pytree(curvature.matvec(unravel(root(y))))[0])

        found = trust_region.krylov_space(matvec, in_ball(gradient), radius, rank=rank, flat=flat)
        return jnp.linalg.norm(gradient), found

    gradient_norm, found = jax.lax.cond(newton, lambda: space(True), lambda: space(False))
    products = found.tridiagonal.size
    return Quadratic(
        gradient_norm,
        root,
        lambda radius, shift: trust_region.krylov_step(found, radius),
        products,
        2 + jnp.where(newton, 4, 2) * products,
        norm._replace(recycled=recycle(norm.recycled, found)),
    )


def dense(
    problem: Problem,
    theta: Any,
    data: tuple,
    w: jax.Array,
    factor: Factor,
    norm: jax.Array,
    *,
    kaufman: bool,
) -> Quadratic:
    """The model as a matrix. `norm` is the largest diagonal of the matrices so far.

    A step is measured in units of 1/√d for every weight, d being its entry there and their mean
    added up: the norm follows the problem, but a weight of little curvature is not let off its
    leash. Source: Moré, Lecture Notes in Mathematics 630 (1978), for the running maximum.
    """
    gradient, matrix, transposed = gauss_newton_matrix(
        problem, theta, data, w, factor, kaufman=kaufman
    )
    norm = jnp.maximum(norm, jnp.diagonal(matrix))
    mean = jnp.mean(norm)
    scale = jax.lax.rsqrt(norm + jnp.where(mean > 0, mean, 1))
    matrix = matrix * scale * scale[:, None]

    def step(radius, shift):
        return trust_region.matrix_step(matrix, scale * gradient, radius, shift)

    def solve(error, shift):
        shifted = matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype)
        return jax.scipy.linalg.solve(shifted, error, assume_a="pos")

    work = 1 + passes(w, kaufman=kaufman)
    root, product = lambda y: scale * y, lambda y: matrix @ y
    correct = transposed and _correction(problem, theta, gradient, transposed, root, product, solve)
    return _formed(gradient, root, step, correct, work, norm)


def kernel(
    problem: Problem,
    theta: Any,
    data: tuple,
    w: jax.Array,
    factor: Factor,
    norm: jax.Array,
    *,
    kaufman: bool,
) -> Quadratic:
    """The model as the singular values of M, where Mᵀ M + α I is the Gauss–Newton matrix.

    What the gradient has outside the span of M's rows makes one more eigenvector, of eigenvalue α.
    Steps are measured in θ itself, where the penalty is a multiple of the identity.
    """
    gradient, root, transposed = gauss_newton_root(problem, theta, data, w, factor, kaufman=kaufman)
    _, singular, basis = jnp.linalg.svd(root, full_matrices=False)
    singular, basis = singular[::-1], basis[::-1]  # in ascending order
    inside = basis @ gradient
    outside = gradient - inside @ basis
    rest = jnp.linalg.norm(outside)
    beyond = outside / jnp.where(rest > 0, rest, 1)

    alpha = tikhonov_weight(problem.theta_penalty)
    eigenvalues = alpha + jnp.concatenate([jnp.zeros_like(singular[:1]), singular**2])
    # What is known to be zero only up to rounding would make a step of any length.
    eigenvalues = jnp.maximum(eigenvalues, jnp.finfo(rest.dtype).eps * eigenvalues[-1])
    coefficients = jnp.concatenate([rest[None], inside])
    whole = jnp.concatenate([beyond[None], basis])

    def step(radius, shift):
        found = trust_region.spectral_step(eigenvalues, coefficients, radius)
        return found._replace(step=found.step @ whole)

    def solve(error, shift):
        inside = basis @ error
        outside = error - inside @ basis
        return inside / (eigenvalues[1:] + shift) @ basis + outside / (eigenvalues[0] + shift)

    work = 1 + passes(w, kaufman=kaufman)
    same, product = lambda y: y, lambda s: (root @ s) @ root + alpha * s
    correct = _correction(problem, theta, gradient, transposed, same, product, solve)
    return _formed(gradient, same, step, correct, work, norm)


def _correction(problem, theta, gradient, transposed, root, product, solve):
    """The second-order correction a of a step s, at whose end the residuals are off from what the
    model promised: with G and W there,

        (H + σ I) a = −(Jᵀ G + α₂ J_Wᵀ W + ∇R(θ + s) − g − H s).

    It bends the step along the curved valley that s leaves on a tangent. This is the geodesic
    acceleration of Transtrum and Sethna, arXiv:1201.5885, with the second derivative as a
    difference that a trial point gives for nothing, J being at hand.
    """

    def correct(found, slopes, weights):
        flat, unravel = ravel_pytree(theta)
        end = unravel(flat + root(found.step))
        there = transposed(slopes, weights) + ravel_pytree(jax.grad(problem.penalty)(end))[0]
        return -solve(root(there - gradient) - product(found.step), found.shift)

    return correct


def _formed(gradient, root, step, correct, work, norm):
    return Quadratic(
        gradient_norm=jnp.linalg.norm(gradient),
        root=root,
        step=step,
        correct=correct,
        products=jnp.zeros((), jnp.int32),
        work=jnp.int32(work),
        norm=norm,
    )
