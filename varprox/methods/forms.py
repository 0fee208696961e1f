"""The four forms that GNvpro's model comes in.

A form is what the trust region remembers from step to step: the variables in which it is a ball.
`ModelForm` says what all forms answer to.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from varprox.methods.quadratic import Quadratic, penalty_gradient, with_correction
from varprox.numerics import secant, trust_region
from varprox.numerics.krylov import after
from varprox.numerics.krylov import norm as length
from varprox.numerics.recycling import Recycled, nothing_yet, recycle
from varprox.numerics.secant import Secant
from varprox.problem.model import Problem
from varprox.problem.penalties import tikhonov_weight
from varprox.problem.streamed import rows_and_pullback
from varprox.reduced.curvature import linearise
from varprox.reduced.matrix import (
    KEPT_BYTES,
    gauss_newton_matrix,
    gauss_newton_root,
    keeps_rows,
    passes,
)
from varprox.reduced.projection import Projection, without_span
from varprox.reduced.w_hessian import Factor, factorise, hessian_factor
from varprox.reduced.whitening import Whitening, whitening

PASS = 50  # operations that a matrix product does in the time of one of a network's pass
WORTH = 2  # steps in a Krylov space for one of a formed model: on networks 1.2 to 2 (medians)
# How many times the mean curvature is added to that of a weight in the norm of steps. On the zoo 1,
# 10 and 100 solve 52, 57 and 55 % of the problems to 1e-6 of the known decrease.
EVEN = 10


class Form(IntEnum):
    """The forms of the model, as `varprox.gnvpro` names them."""

    KRYLOV = 0
    DENSE = 1
    KERNEL = 2
    FORWARD = 3


class Settings(NamedTuple):
    """What a model is asked to be; see the options of `varprox.gnvpro`."""

    rank: int
    flat: jax.Array
    w_curvature: bool
    kaufman: bool


class Sizes(NamedTuple):
    """What the cost of a step depends on."""

    samples: int
    weights: int  # θ's entries
    rows: int  # of M, where Mᵀ M is the Gauss–Newton matrix
    passes: int  # that the rows take
    rank: int

    def of_passes(self, count: int) -> int:
        """The operations of so many passes."""
        return count * PASS * self.samples * self.weights


class ModelForm:
    """What a form answers to; the defaults are those of the forms that have the whole matrix."""

    kind: ClassVar[Form]

    @classmethod
    def start(
        cls,
        problem: Problem,
        theta: Any,
        rows: jax.Array,
        w: jax.Array,
        data: tuple,
        *,
        memory: int,
        whiten: bool,
        kaufman: bool,
    ) -> "ModelForm":
        """The first one; `memory`, `whiten` and `kaufman` are those of `varprox.gnvpro`."""
        raise NotImplementedError

    def model(
        self,
        problem: Problem,
        theta: Any,
        data: tuple,
        at: Projection,
        settings: Settings,
        radius: jax.Array,
        newton: jax.Array,
    ) -> Quadratic:
        """The model at θ. Only a Krylov space asks for the radius, and whether it is to be that of
        the Hessian instead of the Gauss–Newton matrix."""
        raise NotImplementedError

    @staticmethod
    def operations(sizes: Sizes) -> int:
        """Of a step."""
        raise NotImplementedError

    @staticmethod
    def entries(sizes: Sizes) -> int:
        """Of the largest array that a step forms."""
        raise NotImplementedError

    @staticmethod
    def factor(problem: Problem, rows: jax.Array, w: jax.Array, targets: jax.Array) -> Factor:
        """That of ∇²_W Φ, exact even where W is large."""
        return factorise(problem, rows, w, targets, whole=True)

    @staticmethod
    def trimmed(problem: Problem, at: Projection) -> Projection:
        """W(θ) without what the model does not need."""
        return at

    @staticmethod
    def rows_at(problem: Problem, theta: Any, inputs: Any) -> tuple[Any, Callable]:
        """The rows at θ, and the slope of Σ slopes · (rows W) along a step of θ."""
        rows, pulled = rows_and_pullback(problem, theta, inputs)
        return rows, lambda slopes, w, step: ravel_pytree(pulled(slopes, w))[0] @ step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Krylov(ModelForm):
    """s = M P^½ y, with M from a sketch of the curvature at the start and P from the Krylov spaces
    since."""

    whitening: Whitening | None  # None stands for M = I
    recycled: Recycled

    kind = Form.KRYLOV

    @classmethod
    def start(cls, problem, theta, rows, w, data, *, memory, whiten, kaufman):
        found = whitening(problem, theta, rows, w, data) if whiten else None
        return cls(found, nothing_yet(memory, ravel_pytree(theta)[0]))

    @staticmethod
    def operations(sizes):
        # Of steps that are worth one of a formed model; spaces are counted full.
        return WORTH * sizes.of_passes(2 + 2 * sizes.rank)

    @staticmethod
    def entries(sizes):
        return 0

    @staticmethod
    def factor(problem, rows, w, targets):
        return hessian_factor(problem, rows, w, targets)

    @staticmethod
    def trimmed(problem, at):
        return without_span(problem, at)

    def model(self, problem, theta, data, at, settings, radius, newton):
        """The model in a Krylov space for the Gauss–Newton matrix, or the Hessian if `newton`.

        The space ends where a product adds less than the fraction `flat` of the model's decrease in
        the ball of the given radius.
        """
        weights, unravel = ravel_pytree(theta)

        def whitened(x):
            return x if self.whitening is None else ravel_pytree(self.whitening(unravel(x)))[0]

        def root(y):
            return whitened(self.recycled.root(y))

        def in_ball(x):  # the transpose of `root`
            return self.recycled.root(whitened(x))

        curvature = linearise(
            problem, theta, data, at, full=newton, w_curvature=settings.w_curvature
        )
        gradient = ravel_pytree(curvature.gradient)[0]

        def matvec(y):
            return in_ball(ravel_pytree(curvature.matvec(unravel(root(y))))[0])

        found = trust_region.krylov_space(
            matvec, in_ball(gradient), radius, rank=settings.rank, flat=settings.flat
        )
        products = found.tridiagonal.size

        def following(result, *_):
            t = found.tridiagonal
            t = t._replace(diagonal=after(result.trials, t.diagonal))
            return replace(self, recycled=recycle(self.recycled, found._replace(tridiagonal=t)))

        if self.whitening is None:
            reach = length(self.recycled.inverse_root(weights))
        else:
            # The inverse of M is not known: by Cauchy and Schwarz θ is at least this long.
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(ModelForm):
    """s = y / √d, where d is made of the largest diagonal of the matrices so far. The matrix is
    formed by reverse passes of single samples."""

    diagonal: jax.Array  # (size,)
    secant: Secant | None  # of the curvature that the matrices leave out; None where K is not kept

    kind = Form.DENSE

    @classmethod
    def start(cls, problem, theta, rows, w, data, *, memory, whiten, kaufman):
        return _start_matrix(cls, theta, rows, w, kaufman=kaufman, forward=False)

    @staticmethod
    def operations(sizes):
        return sizes.of_passes(2 + sizes.passes) + _of_matrix(sizes)

    @staticmethod
    def entries(sizes):
        return sizes.weights**2

    def model(self, problem, theta, data, at, settings, radius, newton):
        formed = gauss_newton_matrix(problem, theta, data, at, kaufman=settings.kaufman)
        evaluations = 1 if formed.transposed is not None else 2  # of the rows
        work = evaluations * (1 + passes(at.w, kaufman=settings.kaufman))
        return _matrix_model(self, problem, theta, formed, work)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward(ModelForm):
    """As `Dense`, with a matrix that is formed by forward passes of all samples together."""

    diagonal: jax.Array
    secant: Secant | None

    kind = Form.FORWARD

    @classmethod
    def start(cls, problem, theta, rows, w, data, *, memory, whiten, kaufman):
        return _start_matrix(cls, theta, rows, w, kaufman=kaufman, forward=True)

    @staticmethod
    def operations(sizes):
        return sizes.of_passes(2 + sizes.weights) + _of_matrix(sizes)

    @staticmethod
    def entries(sizes):
        return max(sizes.weights, sizes.passes * sizes.samples) * sizes.weights

    def model(self, problem, theta, data, at, settings, radius, newton):
        formed = gauss_newton_matrix(
            problem, theta, data, at, kaufman=settings.kaufman, forward=True
        )
        return _matrix_model(self, problem, theta, formed, 1 + len(self.diagonal))

    @staticmethod
    def rows_at(problem, theta, inputs):
        def along(slopes, w, step):
            _, unravel = ravel_pytree(theta)
            predictions_at = lambda theta: problem.rows(theta, inputs) @ w  # noqa: E731
            return jnp.sum(slopes * jax.jvp(predictions_at, (theta,), (unravel(step),))[1])

        return problem.rows(theta, inputs), along


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kernel(ModelForm):
    """s = y, as the penalty is a multiple of the identity in θ itself."""

    kind = Form.KERNEL

    @classmethod
    def start(cls, problem, theta, rows, w, data, *, memory, whiten, kaufman):
        return cls()

    @staticmethod
    def operations(sizes):
        rows = sizes.rows
        return sizes.of_passes(2 + sizes.passes) + 2 * sizes.weights * rows**2 + 20 * rows**3

    @staticmethod
    def entries(sizes):
        return sizes.rows * sizes.weights

    def model(self, problem, theta, data, at, settings, radius, newton):
        """The model as the singular values of M, where Mᵀ M + α I is the Gauss–Newton matrix.

        What the gradient has outside the span of M's rows makes one more eigenvector, of eigenvalue
        α.
        """
        formed = gauss_newton_root(problem, theta, data, at, kaufman=settings.kaufman)
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

        def product(s):
            return (formed.matrix @ s) @ formed.matrix + alpha * s

        def solve(error, shift):
            inside = basis @ error
            outside = error - inside @ basis
            return inside / (eigenvalues[1:] + shift) @ basis + outside / (eigenvalues[0] + shift)

        model = Quadratic(
            gradient=gradient,
            root=lambda y: y,
            step=step,
            curvature=eigenvalues[-1],
            reach=length(ravel_pytree(theta)[0]),
            products=jnp.zeros((), jnp.int32),
            work=jnp.int32(1 + passes(at.w, kaufman=settings.kaufman)),
            following=lambda *_: self,
            estimated=jnp.array(False),
        )
        return with_correction(model, problem, theta, formed, product, solve)


FORMS = {form.kind: form for form in (Krylov, Dense, Kernel, Forward)}


def _of_matrix(sizes):
    """The operations of forming and factorising it."""
    return sizes.rows * sizes.weights**2 + sizes.weights**3


def _start_matrix(kind, theta, rows, w, *, kaufman, forward):
    like = ravel_pytree(theta)[0]
    learns = keeps_rows(like, len(rows), w, kaufman=kaufman, forward=forward)
    learns &= like.size * like.nbytes <= KEPT_BYTES
    return kind(jnp.zeros_like(like), secant.nothing_yet(like) if learns else None)


def _matrix_model(form, problem, theta, formed, work):
    """The model as a matrix.

    A step is measured in units of 1/√d for every weight, d being the largest entry so far on the
    diagonal of the matrix and `EVEN` times their mean: the norm follows the problem, but a weight
    of little curvature is not let off its leash. Source: Moré, Lecture Notes in Mathematics 630
    (1978), for the running maximum.

    To the matrix comes what `varprox.numerics.secant` has learnt, while that is to be trusted.
    """
    diagonal = jnp.maximum(form.diagonal, jnp.diagonal(formed.matrix))
    mean = jnp.mean(diagonal)
    scale = jax.lax.rsqrt(diagonal + EVEN * jnp.where(mean > 0, mean, 1))
    hessian, learnt = formed.matrix, form.secant
    if learnt is not None:
        learnt = secant.learn(learnt, formed.gradient)
        hessian = hessian + jnp.where(learnt.trusted, learnt.matrix, 0)
    matrix = hessian * scale[None] * scale[:, None]
    weights, unravel = ravel_pytree(theta)

    def product(s):
        return formed.matrix @ s

    def solve(error, shift):
        shifted = matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype)
        return jax.scipy.linalg.solve(shifted, error, assume_a="pos")

    def following(result, end, held):
        later = replace(form, diagonal=diagonal, secant=learnt)
        if learnt is None or formed.transposed is None:
            return elsewhere(later)
        s = scale * result.x
        without = -(formed.gradient @ s + 0.5 * s @ product(s))
        more = -0.5 * s @ (learnt.matrix @ s)
        streak = secant.judge(learnt, without, more, result.decrease)
        expected = formed.transposed(end.slopes, end.w) + penalty_gradient(
            problem, unravel(weights + s)
        )
        streak = jnp.where(result.accepted & ~held, streak, 0)
        return replace(later, secant=Secant(learnt.matrix, formed.gradient, expected, s, streak))

    model = Quadratic(
        gradient=formed.gradient,
        root=lambda y: scale * y,
        step=partial(trust_region.matrix_step, matrix, scale * formed.gradient),
        curvature=jnp.max(jnp.abs(jnp.diagonal(matrix))),
        reach=length(weights / scale),
        products=jnp.zeros((), jnp.int32),
        work=jnp.int32(work),
        following=following,
        estimated=jnp.array(False) if learnt is None else learnt.trusted,
    )
    return with_correction(model, problem, theta, formed, product, solve)


def elsewhere(form: Any) -> Any:
    """The form at weights that its last step did not lead to."""
    learnt = getattr(form, "secant", None)
    return form if learnt is None else replace(form, secant=secant.elsewhere(learnt))


def takes_kaufman(w: Any, kaufman: bool | None) -> bool:
    """Is A left out of the matrix? None stands for fewer outputs than columns."""
    columns, outputs = w.shape
    return outputs < columns if kaufman is None else kaufman
