"""One iteration of a trust-region Newton–Krylov method, for any smooth function of a flat vector.

The same iteration solves for W under a general convex loss and for θ in GNvpro. Imports krylov.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from varprox.krylov import KrylovSpace, Tridiagonal, dense, lanczos

ACCEPT, GROW = 1e-4, 0.75  # gain ratios from which a step is taken, and from which the radius grows


class Subproblem(NamedTuple):
    """min gᵀs + ½ sᵀHs over s in a Krylov space with ‖s‖ ≤ radius."""

    coefficients: jax.Array  # (rank,), of s in the basis
    decrease: jax.Array  # of the model, ≥ 0
    on_boundary: jax.Array


class Iteration(NamedTuple):
    """What one iteration did; `x` and `aux` are the old ones where no trial point was accepted."""

    x: jax.Array
    aux: Any
    radius: jax.Array
    accepted: jax.Array
    first_ratio: jax.Array  # gain ratio of the first trial point
    ratio: jax.Array  # and of the last
    predicted: jax.Array  # decrease predicted for the last trial point
    products: jax.Array
    trials: jax.Array


def solve_subproblem(t: Tridiagonal, start_norm: jax.Array, radius: jax.Array) -> Subproblem:
    """Solves the trust-region subproblem exactly inside the Krylov space.

    With T = Q diag(λ) Qᵀ the minimiser is s = −Q (λ + σ)⁻¹ Qᵀ e₁ ‖g‖, where σ ≥ max(0, −λ_min) is
    zero for an interior solution and else solves ‖s(σ)‖ = radius; Newton on 1/‖s‖ − 1/radius finds
    it. Where no σ reaches the radius (the hard case), a multiple of the eigenvector of λ_min is
    added. An infinite radius gives the unconstrained minimiser, or where there is none the step
    with |λ| in place of λ. Source: Conn, Gould, Toint, Trust-Region Methods, chapters 5 and 7.
    """
    eigenvalues, q = jnp.linalg.eigh(dense(t))
    gradient = start_norm * q[0]
    tiny = jnp.finfo(gradient.dtype).tiny
    lowest = eigenvalues[0]
    convex = lowest > 0
    spread = jnp.abs(eigenvalues) + tiny
    radius = jnp.where(jnp.isinf(radius), jnp.linalg.norm(gradient / spread), radius)

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

    interior = convex & (length(low) <= radius)
    mu, *_ = jax.lax.while_loop(
        lambda c: ~c[3] & (c[4] < 60),
        refine,
        (low + 1e-3 * (high - low), low, high, interior, jnp.zeros((), jnp.int32)),
    )
    s = -gradient / (gaps + jnp.where(interior, low, mu) + tiny)
    missing = jnp.sqrt(jnp.maximum(radius**2 - jnp.sum(s**2), 0))
    toward = jnp.where(gradient[0] > 0, -missing, missing)
    s = s.at[0].add(jnp.where(convex, 0, toward))
    decrease = -(gradient @ s + 0.5 * jnp.sum(eigenvalues * s**2))
    return Subproblem(q @ s, decrease, ~interior)


def iterate(
    matvec: Callable[[jax.Array], jax.Array],
    gradient: jax.Array,
    evaluate: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
    x: jax.Array,
    aux: Any,
    radius: jax.Array,
    *,
    rank: int,
    flat: jax.Array | float,
    enough: jax.Array | float = 0.0,
    max_trials: int,
) -> tuple[Iteration, KrylovSpace]:
    """Builds a Krylov space at `x`, then tries steps in it until one is accepted.

    `decrease, aux = evaluate(trial, predicted)` gives the decrease of the function from `x` to the
    trial point and whatever belongs to that point. The space stops growing when its last vector
    added less than the fraction `flat` of the model's decrease, or when half the squared norm of
    what the model's gradient has outside the space is below `enough`. A rejected step shrinks the
    radius and reuses the space; an accepted one on the boundary with gain ratio above 0.75 doubles
    it. An infinite radius is set by the first step.
    """

    def finished(t, previous):
        sub = solve_subproblem(t, jnp.linalg.norm(gradient), radius)
        flattened = sub.decrease - previous < flat * sub.decrease
        residual = t.off_diagonal[t.size - 1] * sub.coefficients[t.size - 1]
        return flattened | (0.5 * residual**2 < enough), sub.decrease

    space = lanczos(matvec, gradient, rank, finished, jnp.zeros((), gradient.dtype))

    def attempt(carry: Iteration) -> Iteration:
        sub = solve_subproblem(space.tridiagonal, space.start_norm, carry.radius)
        step = sub.coefficients @ space.basis
        decrease, trial_aux = evaluate(x + step, sub.decrease)
        ratio = decrease / sub.decrease
        accepted = ratio > ACCEPT
        length = jnp.linalg.norm(step)
        unset = jnp.isinf(carry.radius)
        radius = jnp.select(
            [~accepted, ratio < 0.25, (ratio > GROW) & (sub.on_boundary | unset), unset],
            [0.25 * length, 0.5 * length, 2 * length, length],
            carry.radius,
        )
        choose = lambda new, old: jnp.where(accepted, new, old)  # noqa: E731
        return Iteration(
            choose(x + step, carry.x),
            jax.tree.map(choose, trial_aux, carry.aux),
            radius,
            accepted,
            jnp.where(carry.trials == 0, ratio, carry.first_ratio),
            ratio,
            sub.decrease,
            carry.products,
            carry.trials + 1,
        )

    zero = jnp.zeros((), gradient.dtype)
    result = jax.lax.while_loop(
        lambda c: ~c.accepted & (c.trials < max_trials),
        attempt,
        Iteration(
            x, aux, radius, jnp.array(False), zero, zero, zero, space.tridiagonal.size,
            jnp.zeros((), jnp.int32),
        ),
    )  # fmt: skip
    return result, space
