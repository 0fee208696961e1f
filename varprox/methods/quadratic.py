"""The quadratic model of the reduced objective at θ, in one of four forms.

Seen in a Krylov space, as a matrix formed from reverse passes of single samples or from forward
passes of all of them, or as the singular values of its rows: each form knows how to minimise itself
in a ball, and in which variables this is one. Imports curvature, jacobian, whitening, recycling,
secant and the trust region.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from varprox.numerics import secant, trust_region
from varprox.numerics.krylov import after
from varprox.numerics.krylov import norm as length
from varprox.numerics.recycling import Recycled, nothing_yet, recycle
from varprox.numerics.secant import Secant
from varprox.problem.model import Problem, derivatives, treats_samples_alone
from varprox.problem.penalties import tikhonov_weight
from varprox.reduced.curvature import linearise
from varprox.reduced.matrix import (
    KEPT_BYTES,
    dimensions,
    gauss_newton_matrix,
    gauss_newton_root,
    keeps_rows,
    passes,
)
from varprox.reduced.projection import Projection
from varprox.reduced.whitening import Whitening, whitening

PASS = 50  # operations that a matrix product does in the time of one of a network's pass
WORTH = 2  # steps in a Krylov space for one of a formed model: on networks 1.2 to 2 (medians)
# How many times the mean curvature is added to that of a weight in the norm of steps. On the zoo 1,
# 10 and 100 solve 52, 57 and 55 % of the problems to 1e-6 of the known decrease.
EVEN = 10
LARGEST = 2**28  # entries of a matrix that is formed unasked


class Form(IntEnum):
    """The forms of the model, as `varprox.gnvpro` names them."""

    KRYLOV = 0
    DENSE = 1
    KERNEL = 2
    FORWARD = 3


class Quadratic(NamedTuple):
    """The model gᵀs + ½ sᵀHs of steps s = root(y) of θ, in variables y in which the trust region
    is a ball."""

    gradient: jax.Array  # (size,), in θ
    root: Callable[[jax.Array], jax.Array]
    step: Callable[[jax.Array, jax.Array], trust_region.Step]  # of radius and a guess at the shift
    curvature: jax.Array  # the largest of a direction y, or near it
    reach: jax.Array  # the length of θ in the variables y
    products: jax.Array
    work: jax.Array  # units spent
    # The norm of the next model, given what the search did, G and W where it ended, and whether the
    # test of convergence held: then the next model holds no estimate.
    following: Callable[[trust_region.Iteration, jax.Array, jax.Array, jax.Array], Any]
    estimated: jax.Array  # is a part of the curvature only estimated?
    # What to add to a step, given G and W at its end; None where K is not kept.
    correct: Callable[[trust_region.Step, jax.Array, jax.Array], jax.Array] | None = None


class KrylovNorm(NamedTuple):
    """s = M P^½ y, with M from a sketch of the curvature at the start and P from the Krylov spaces
    since."""

    whitening: Whitening | None  # None stands for M = I
    recycled: Recycled


class DenseNorm(NamedTuple):
    """s = y / √d, where d is made of the largest diagonal of the matrices so far."""

    diagonal: jax.Array  # (size,)
    secant: Secant | None  # of the curvature that the matrices leave out; None where K is not kept


class ForwardNorm(NamedTuple):
    """As `DenseNorm`, for a matrix formed by forward passes."""

    diagonal: jax.Array  # (size,)
    secant: Secant | None


class KernelNorm(NamedTuple):
    """s = y."""


NORMS = {
    Form.KRYLOV: KrylovNorm,
    Form.DENSE: DenseNorm,
    Form.KERNEL: KernelNorm,
    Form.FORWARD: ForwardNorm,
}


def form_of(norm: Any) -> Form:
    """The form of the model that this norm belongs to."""
    return next(form for form, kind in NORMS.items() if isinstance(norm, kind))


def start_norm(
    form: Form,
    problem: Problem,
    theta: Any,
    rows: jax.Array,
    w: jax.Array,
    data: tuple,
    *,
    memory: int,
    whiten: bool,
    kaufman: bool,
) -> Any:
    """What makes the first model's norm; `memory`, `whiten` and `kaufman` are those of `gnvpro`."""
    like = ravel_pytree(theta)[0]
    if form is Form.KRYLOV:
        found = whitening(problem, theta, rows, w, data) if whiten else None
        return KrylovNorm(found, nothing_yet(memory, like))
    if form is Form.KERNEL:
        return KernelNorm()
    forward = form is Form.FORWARD
    learns = keeps_rows(like, len(rows), w, kaufman=kaufman, forward=forward)
    learns &= like.size * like.nbytes <= KEPT_BYTES
    return NORMS[form](jnp.zeros_like(like), secant.nothing_yet(like) if learns else None)


def elsewhere(norm: Any) -> Any:
    """What makes a model's norm at weights that its last step did not lead to."""
    learnt = getattr(norm, "secant", None)
    return norm if learnt is None else norm._replace(secant=secant.elsewhere(learnt))


def usable(problem: Problem, theta: Any, inputs: Any) -> tuple[Form, ...]:
    """The forms that these features allow."""
    forward, reverse = derivatives(problem, theta, inputs)
    alone = reverse and treats_samples_alone(problem, theta, inputs)
    allowed = {
        Form.KRYLOV: forward and reverse,
        Form.DENSE: alone,
        Form.KERNEL: alone and tikhonov_weight(problem.theta_penalty) is not None,
        Form.FORWARD: forward,
    }
    return tuple(form for form in Form if allowed[form])


def choose(
    forms: tuple[Form, ...], problem: Problem, theta: Any, data: tuple, w: Any, *, rank, kaufman
) -> Form:
    """Of the forms the one that takes the fewest operations for what its steps are worth.

    Only the shapes of the arrays matter; Krylov spaces are counted full.
    """
    targets = data[1]
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    taken = passes(w, kaufman=kaufman)
    rows = (len(targets) + len(w)) * dimensions(problem, w) + (0 if kaufman else w.size)
    in_pass = PASS * len(targets) * size
    in_matrix = rows * size**2 + size**3
    costs = {
        Form.KRYLOV: WORTH * (2 + 2 * rank) * in_pass,
        Form.DENSE: (2 + taken) * in_pass + in_matrix,
        Form.KERNEL: (2 + taken) * in_pass + 2 * size * rows**2 + 20 * rows**3,
        Form.FORWARD: (2 + size) * in_pass + in_matrix,
    }
    entries = {
        Form.KRYLOV: 0,
        Form.DENSE: size**2,
        Form.KERNEL: rows * size,
        Form.FORWARD: max(size, taken * len(targets)) * size,
    }
    small = [form for form in forms if entries[form] <= LARGEST]
    return min(small or forms, key=costs.__getitem__)


def krylov(
    problem: Problem,
    theta: Any,
    data: tuple,
    at: Projection,
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
    weights, unravel = ravel_pytree(theta)

    def whitened(x):
        return x if norm.whitening is None else ravel_pytree(norm.whitening(unravel(x)))[0]

    def root(y):
        return whitened(norm.recycled.root(y))

    def in_ball(x):  # the transpose of `root`
        return norm.recycled.root(whitened(x))

    curvature = linearise(
        problem, theta, data, at.w, at.factor, at.slopes, full=newton, w_curvature=w_curvature
    )
    gradient = ravel_pytree(curvature.gradient)[0]

    def matvec(y):
        return in_ball(ravel_pytree(curvature.matvec(unravel(root(y))))[0])

    found = trust_region.krylov_space(matvec, in_ball(gradient), radius, rank=rank, flat=flat)
    products = found.tridiagonal.size

    def following(result, *_):
        t = found.tridiagonal
        later = found._replace(tridiagonal=t._replace(diagonal=after(result.trials, t.diagonal)))
        return norm._replace(recycled=recycle(norm.recycled, later))

    if norm.whitening is None:
        reach = length(norm.recycled.inverse_root(weights))
    else:
        # The inverse of M is not known: by Cauchy and Schwarz the length of θ is at least this.
        seen = length(in_ball(weights))
        reach = length(weights) * (length(weights) / jnp.where(seen > 0, seen, 1))
    return Quadratic(
        gradient=gradient,
        root=root,
        step=lambda radius, shift: trust_region.krylov_step(found, radius),
        curvature=jnp.max(jnp.abs(found.tridiagonal.diagonal)),
        reach=reach,
        products=products,
        work=2 + jnp.where(newton, 4, 2) * products,
        following=following,
        estimated=jnp.array(False),
    )


def dense(
    problem: Problem,
    theta: Any,
    data: tuple,
    at: Projection,
    norm: DenseNorm | ForwardNorm,
    *,
    kaufman: bool,
) -> Quadratic:
    """The model as a matrix, formed as the kind of its norm says.

    A step is measured in units of 1/√d for every weight, d being the largest entry so far on the
    diagonal of the matrix and `EVEN` times their mean: the norm follows the problem, but a weight
    of little curvature is not let off its leash. Source: Moré, Lecture Notes in Mathematics 630
    (1978), for the running maximum.

    To the matrix comes what `varprox.numerics.secant` has learnt, while that is to be trusted.
    """
    forward = isinstance(norm, ForwardNorm)
    formed = gauss_newton_matrix(problem, theta, data, at, kaufman=kaufman, forward=forward)
    evaluations = 1 if formed.transposed is not None else 2  # of the rows
    diagonal = jnp.maximum(norm.diagonal, jnp.diagonal(formed.matrix))
    mean = jnp.mean(diagonal)
    scale = jax.lax.rsqrt(diagonal + EVEN * jnp.where(mean > 0, mean, 1))
    hessian, learnt = formed.matrix, norm.secant
    if learnt is not None:
        learnt = secant.learn(learnt, formed.gradient)
        hessian = hessian + jnp.where(learnt.trusted, learnt.matrix, 0)
    matrix = hessian * scale * scale[:, None]
    weights, unravel = ravel_pytree(theta)

    def step(radius, shift):
        return trust_region.matrix_step(matrix, scale * formed.gradient, radius, shift)

    def product(s):
        return formed.matrix @ s

    def solve(error, shift):
        shifted = matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype)
        return jax.scipy.linalg.solve(shifted, error, assume_a="pos")

    def following(result, slopes, w, held):
        later = norm._replace(diagonal=diagonal, secant=learnt)
        if learnt is None or formed.transposed is None:
            return elsewhere(later)
        s = scale * result.x
        without = -(formed.gradient @ s + 0.5 * s @ product(s))
        more = -0.5 * s @ (learnt.matrix @ s)
        streak = secant.judge(learnt, without, more, result.decrease)
        expected = formed.transposed(slopes, w) + _penalty_gradient(problem, unravel(weights + s))
        streak = jnp.where(result.accepted & ~held, streak, 0)
        return later._replace(secant=Secant(learnt.matrix, formed.gradient, expected, s, streak))

    return _formed(
        problem,
        theta,
        formed,
        lambda y: scale * y,
        step,
        product,
        solve,
        curvature=jnp.max(jnp.abs(jnp.diagonal(matrix))),
        reach=length(weights / scale),
        work=evaluations * (1 + (weights.size if forward else passes(at.w, kaufman=kaufman))),
        following=following,
        estimated=jnp.array(False) if learnt is None else learnt.trusted,
    )


def kernel(
    problem: Problem,
    theta: Any,
    data: tuple,
    at: Projection,
    norm: KernelNorm,
    *,
    kaufman: bool,
) -> Quadratic:
    """The model as the singular values of M, where Mᵀ M + α I is the Gauss–Newton matrix.

    What the gradient has outside the span of M's rows makes one more eigenvector, of eigenvalue α.
    Steps are measured in θ itself, where the penalty is a multiple of the identity.
    """
    formed = gauss_newton_root(problem, theta, data, at, kaufman=kaufman)
    gradient = formed.gradient
    _, singular, basis = jnp.linalg.svd(formed.matrix, full_matrices=False)
    singular, basis = singular[::-1], basis[::-1]  # in ascending order
    inside = basis @ gradient
    outside = gradient - inside @ basis
    rest = length(outside)
    beyond = outside / jnp.where(rest > 0, rest, 1)

    alpha = jnp.asarray(tikhonov_weight(problem.theta_penalty), rest.dtype)
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

    return _formed(
        problem,
        theta,
        formed,
        lambda y: y,
        step,
        lambda s: (formed.matrix @ s) @ formed.matrix + alpha * s,
        solve,
        curvature=eigenvalues[-1],
        reach=length(ravel_pytree(theta)[0]),
        work=1 + passes(at.w, kaufman=kaufman),
        following=lambda *_: norm,
        estimated=jnp.array(False),
    )


def _formed(
    problem,
    theta,
    formed,
    root,
    step,
    product,
    solve,
    *,
    curvature,
    reach,
    work,
    following,
    estimated,
):
    """The model of a matrix: `product` is with H, what J makes of it, in θ; `solve` in the
    variables y, with all of it.

    The second-order correction a of a step s, at whose end the residuals are off from what the
    model promised, is with G and W there

        (H + S + σ I) a = −(Jᵀ G + α₂ J_Wᵀ W + ∇R(θ + s) − g − H s),

    S being what the matrix has beside H.

    It bends the step along the curved valley that s leaves on a tangent. This is the geodesic
    acceleration of Transtrum and Sethna, arXiv:1201.5885, with the second derivative as a
    difference that a trial point gives for nothing, J being at hand.
    """

    def correct(found, slopes, weights):
        flat, unravel = ravel_pytree(theta)
        end = unravel(flat + root(found.step))
        there = formed.transposed(slopes, weights) + _penalty_gradient(problem, end)
        error = there - formed.gradient - product(root(found.step))
        return -solve(root(error), found.shift)

    return Quadratic(
        gradient=formed.gradient,
        root=root,
        step=step,
        curvature=curvature,
        reach=reach,
        products=jnp.zeros((), jnp.int32),
        work=jnp.int32(work),
        following=following,
        estimated=estimated,
        correct=formed.transposed and correct,
    )


def _penalty_gradient(problem, theta):
    return ravel_pytree(jax.grad(problem.penalty)(theta))[0]
