"""One iteration of a trust-region method, for any smooth function of a flat vector.

Its steps minimise a quadratic model, seen in a Krylov space or given as a matrix. The same
iteration solves for W under a general convex loss and for θ in GNvpro. Imports krylov.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from varprox.krylov import KrylovSpace, dense, lanczos

ACCEPT, GROW = 1e-4, 0.75  # gain ratios from which a step is taken, and from which the radius grows
SHORT = 0.5  # the greatest length of a correction, in that of its step
CLOSE = 0.1  # how near to the radius `matrix_step` comes, relatively


class Step(NamedTuple):
    """The minimiser of gᵀs + ½ sᵀHs over ‖s‖ ≤ radius, of all s or those in a Krylov space."""

    step: jax.Array  # or its coefficients in the eigenvectors
    decrease: jax.Array  # of the model, ≥ 0
    on_boundary: jax.Array
    shift: jax.Array  # σ ≥ 0 with (H + σ I) s = −g


class Iteration(NamedTuple):
    """What one iteration did; `x` and `aux` are the old ones where no trial point was accepted."""

    x: jax.Array
    aux: Any
    radius: jax.Array
    shift: jax.Array  # σ of the last trial point
    accepted: jax.Array
    first_ratio: jax.Array  # gain ratio of the first trial point
    ratio: jax.Array  # and of the last
    predicted: jax.Array  # decrease predicted for the last trial point
    trials: jax.Array


def spectral_step(eigenvalues: jax.Array, gradient: jax.Array, radius: jax.Array) -> Step:
    """Solves the trust-region subproblem exactly, given H's eigenvalues in ascending order and the
    coefficients of g in its eigenvectors; so are those of s.

    The minimiser is s = −(λ + σ)⁻¹ g, where σ ≥ max(0, −λ_min) is zero for an interior solution and
    else solves ‖s(σ)‖ = radius; Newton on 1/‖s‖ − 1/radius finds it. Where no σ reaches the radius
    (the hard case), a multiple of the eigenvector of λ_min is added. An infinite radius gives the
    unconstrained minimiser, or where there is none the step with |λ| in place of λ. Source: Conn,
    Gould, Toint, Trust-Region Methods, chapters 5 and 7.
    """
    tiny = jnp.finfo(gradient.dtype).tiny
    lowest = eigenvalues[0]
    convex = lowest > 0
    spread = jnp.abs(eigenvalues) + tiny
    unbounded = jnp.isinf(radius)
    radius = jnp.where(unbounded, jnp.linalg.norm(gradient / spread), radius)

    # μ = σ + λ_min, so that λ + σ = (λ − λ_min) + μ without cancellation.
    gaps = eigenvalues - lowest
    low = jnp.maximum(lowest, 0)
    high = jnp.maximum(low, jnp.linalg.norm(gradient) / radius)

    tolerance = max(1e-10, 10 * float(jnp.finfo(gradient.dtype).eps))

    def length(mu):
        return jnp.linalg.norm(gradient / (gaps + mu + tiny))

    def refine(carry):
        mu, low, high, _, i = carry
        s = gradient / (gaps + mu + tiny)
        norm = jnp.linalg.norm(s)
        low, high = jnp.where(norm > radius, mu, low), jnp.where(norm > radius, high, mu)
        slope = jnp.sum(s**2 / (gaps + mu + tiny)) + tiny
        newton = mu + (norm / radius - 1) * norm**2 / slope
        middle = 0.5 * (low + high)
        close = jnp.abs(norm - radius) <= tolerance * radius
        mu = jnp.where(close, mu, jnp.where((newton > low) & (newton < high), newton, middle))
        return mu, low, high, close, i + 1

    interior = convex & (unbounded | (length(low) <= radius))
    mu, *_ = jax.lax.while_loop(
        lambda c: ~c[3] & (c[4] < 60),
        refine,
        (low + 1e-3 * (high - low), low, high, interior, jnp.zeros((), jnp.int32)),
    )
    mu = jnp.where(interior, low, mu)
    s = -gradient / (gaps + mu + tiny)
    missing = jnp.sqrt(jnp.maximum(radius**2 - jnp.sum(s**2), 0))
    toward = jnp.where(gradient[0] > 0, -missing, missing)
    s = s.at[0].add(jnp.where(convex, 0, toward))
    decrease = -(gradient @ s + 0.5 * jnp.sum(eigenvalues * s**2))
    return Step(s, decrease, ~interior, jnp.where(interior, 0, mu - lowest))


def krylov_step(space: KrylovSpace, radius: jax.Array) -> Step:
    """Solves the subproblem exactly inside the Krylov space of the gradient."""
    found = _tridiagonal_step(space.tridiagonal, space.start_norm, radius)
    return found._replace(step=found.step @ space.basis)


def _tridiagonal_step(t, start_norm, radius):
    eigenvalues, q = jnp.linalg.eigh(dense(t))
    found = spectral_step(eigenvalues, start_norm * q[0], radius)
    return found._replace(step=q @ found.step)


def matrix_step(
    matrix: jax.Array, gradient: jax.Array, radius: jax.Array, shift: jax.Array
) -> Step:
    """Solves the subproblem for a positive semidefinite H, on the boundary to a length within
    `CLOSE` of the radius.

    Newton's method, for 1/‖s(σ)‖ where σ is too small and for log ‖s‖ over log σ where it is too
    large, takes one Cholesky factorisation of H + σ I a step; `shift` is the σ to begin with. Where
    rounding leaves no definite matrix, σ grows, and one in the size of rounding counts as none.
    Source: Moré and Sorensen, SIAM J. Sci. Stat. Comput. 4 (1983).
    """
    identity = jnp.eye(len(gradient), dtype=gradient.dtype)
    least = jnp.finfo(gradient.dtype).eps * jnp.trace(matrix)

    def refine(carry):
        shift, low, high, *_, i = carry
        lower = jax.lax.linalg.cholesky(matrix + shift * identity, symmetrize_input=False)
        solve = partial(jax.scipy.linalg.solve_triangular, lower, lower=True)
        s = -solve(solve(gradient), trans=1)
        length = jnp.linalg.norm(s)
        definite, long = jnp.isfinite(length), ~(length <= radius)
        low, high = jnp.where(long, shift, low), jnp.where(long, high, shift)
        slope = jnp.sum(solve(s) ** 2) / length**2  # −d log ‖s‖ / dσ
        too_long = shift + (length / radius - 1) / slope
        too_short = shift * jnp.exp(-jnp.log(radius / length) / (shift * slope))
        newton = jnp.where(long, too_long, jnp.where(too_short < least, 0, too_short))
        middle = 0.5 * (jnp.maximum(low, 0) + high)
        following = jnp.where((low < newton) & (newton < high), newton, middle)
        following = jnp.where(definite, following, jnp.maximum(10 * shift, least))
        exact = (shift <= least) & ~long | (jnp.abs(length - radius) <= CLOSE * radius)
        found = definite & (exact | jnp.isinf(radius))
        return jnp.where(found, shift, following), low, high, s, found, i + 1

    infinity = jnp.full_like(shift, jnp.inf)
    start = shift, -infinity, infinity, gradient, jnp.array(False), jnp.zeros((), jnp.int32)
    shift, *_, s, _, _ = jax.lax.while_loop(lambda c: ~c[4] & (c[5] < 30), refine, start)
    on_boundary = (shift > least) & jnp.isfinite(radius)
    return Step(s, 0.5 * (shift * (s @ s) - gradient @ s), on_boundary, shift)


def search(
    solve: Callable[[jax.Array, jax.Array], Step],
    evaluate: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
    x: jax.Array,
    aux: Any,
    radius: jax.Array,
    shift: jax.Array,
    *,
    max_trials: int,
    correct: Callable[[Step, Any], jax.Array] | None = None,
) -> Iteration:
    """Tries the steps `solve(radius, shift)` from `x` until one is accepted.

    `decrease, aux = evaluate(trial, predicted)` gives the decrease of the function from `x` to the
    trial point and whatever belongs to that point. A rejected step shrinks the radius; an accepted
    one on the boundary with gain ratio above 0.75 doubles it. An infinite radius is set by the
    first step. `shift` is a guess at σ. A rejected step is tried once more with `correct(step,
    aux)` added to it, where that is short beside it.
    """

    def attempt(carry):
        carry, corrected, found = carry
        if correct is None:
            found = solve(carry.radius, carry.shift)
        else:
            found = jax.lax.cond(corrected, lambda: found, lambda: solve(carry.radius, carry.shift))
        step = found.step
        decrease, trial_aux = evaluate(x + step, found.decrease)
        ratio = decrease / found.decrease
        accepted = ratio > ACCEPT
        length = jnp.linalg.norm(step)
        unset = jnp.isinf(carry.radius)
        again = jnp.array(False)
        if correct is not None:
            again = ~accepted & ~corrected
            more = jax.lax.cond(again, lambda: correct(found, trial_aux), lambda: jnp.zeros_like(x))
            again &= jnp.linalg.norm(more) < SHORT * length
            found = found._replace(step=step + more)
        radius = jnp.select(
            [
                corrected & ~accepted,  # the step that it corrects has shrunk the radius
                ~accepted,
                ratio < 0.25,
                (ratio > GROW) & (found.on_boundary | unset),
                unset | corrected,
            ],
            [carry.radius, 0.25 * length, 0.5 * length, 2 * length, length],
            carry.radius,
        )
        choose = lambda new, old: jnp.where(accepted, new, old)  # noqa: E731
        carry = Iteration(
            x=choose(x + step, carry.x),
            aux=jax.tree.map(choose, trial_aux, carry.aux),
            radius=radius,
            shift=found.shift,
            accepted=accepted,
            first_ratio=jnp.where(carry.trials == 0, ratio, carry.first_ratio),
            ratio=ratio,
            predicted=found.decrease,
            trials=carry.trials + 1,
        )
        return carry, again, found

    zero, none = jnp.zeros_like(shift), jnp.zeros((), jnp.int32)
    false = jnp.array(False)
    start = Iteration(x, aux, radius, shift, false, zero, zero, zero, none)
    no_step = Step(jnp.zeros_like(x), zero, false, zero)
    goes_on = lambda c: ~c[0].accepted & (c[0].trials < max_trials)  # noqa: E731
    return jax.lax.while_loop(goes_on, attempt, (start, false, no_step))[0]


def krylov_space(
    matvec: Callable[[jax.Array], jax.Array],
    gradient: jax.Array,
    radius: jax.Array,
    *,
    rank: int,
    flat: jax.Array | float,
    enough: jax.Array | float = 0.0,
) -> KrylovSpace:
    """The Krylov space of the gradient, of at most `rank` dimensions.

    It stops growing when its last vector added less than the fraction `flat` of the model's
    decrease in the ball of the given radius, or when half the squared norm of what the model's
    gradient has outside the space is below `enough`.
    """

    def finished(t, previous):
        found = _tridiagonal_step(t, jnp.linalg.norm(gradient), radius)
        flattened = found.decrease - previous < flat * found.decrease
        residual = t.off_diagonal[t.size - 1] * found.step[t.size - 1]
        return flattened | (0.5 * residual**2 < enough), found.decrease

    return lanczos(matvec, gradient, rank, finished, jnp.zeros((), gradient.dtype))
