"""One iteration of a trust-region method, for any smooth function of a flat vector.

Its steps minimise a quadratic model, seen in a Krylov space or given as a matrix. The same
iteration solves for W under a general convex loss and for θ in GNvpro.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from varprox.numerics.krylov import KrylovSpace, dense, lanczos, norm

ACCEPT, GROW = 1e-4, 0.75  # gain ratios from which a step is taken, and from which the radius grows
POOR = 0.25  # gain ratio below which the radius shrinks, and a first step is not taken
SHORT = 0.5  # the greatest length of a correction, in that of its step
CLOSE = 0.1  # how near to the radius `matrix_step` comes, relatively
ROUNDINGS = 10  # times eps and the trace: a σ that rounding of H may make of none
ROUNDS = 60  # of the searches for σ; most take two to four


class Step(NamedTuple):
    """The minimiser of gᵀs + ½ sᵀHs over ‖s‖ ≤ radius, of all s or those in a Krylov space."""

    step: jax.Array  # or its coefficients in the eigenvectors
    decrease: jax.Array  # of the model, ≥ 0
    on_boundary: jax.Array
    shift: jax.Array  # σ ≥ 0 with (H + σ I) s = −g
    excess: jax.Array  # of σ over what rounding of H may make of none


class Iteration(NamedTuple):
    """What one iteration did; `x` and `aux` are the old ones where no trial point was accepted."""

    x: jax.Array
    aux: Any
    radius: jax.Array
    shift: jax.Array  # σ of the last trial point
    accepted: jax.Array
    first_ratio: jax.Array  # gain ratio of the first trial point
    ratio: jax.Array  # and of the last
    decrease: jax.Array  # of the function, at the last trial point
    promise: jax.Array  # the most that the model decreases within each `reach` of x, or more
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
    radius = jnp.asarray(radius, gradient.dtype)
    return _in_units(_spectral_step, eigenvalues, gradient, radius, jnp.zeros_like(radius))


def _spectral_step(eigenvalues, gradient, radius, shift):
    tiny = jnp.finfo(gradient.dtype).tiny
    lowest = eigenvalues[0]
    convex = lowest > 0
    spread = jnp.abs(eigenvalues) + tiny
    unbounded = jnp.isinf(radius)
    radius = jnp.where(unbounded, norm(gradient / spread), radius)

    # μ = σ + λ_min, so that λ + σ = (λ − λ_min) + μ without cancellation.
    gaps = eigenvalues - lowest
    low = jnp.maximum(lowest, 0)
    high = jnp.maximum(low, norm(gradient) / radius)

    tolerance = max(1e-10, 10 * float(jnp.finfo(gradient.dtype).eps))

    def refine(carry):
        mu, low, high, _, i = carry
        s = gradient / (gaps + mu + tiny)
        length = norm(s)
        low, high = jnp.where(length > radius, mu, low), jnp.where(length > radius, high, mu)
        slope = jnp.sum((s / length) ** 2 / (gaps + mu + tiny)) + tiny
        newton = mu + (length / radius - 1) / slope
        middle = _between(low, high)
        close = jnp.abs(length - radius) <= tolerance * radius
        mu = jnp.where(close, mu, jnp.where((newton > low) & (newton < high), newton, middle))
        return mu, low, high, close, i + 1

    interior = convex & (unbounded | (norm(gradient / (gaps + low + tiny)) <= radius))
    mu, _, high, close, _ = jax.lax.while_loop(
        lambda c: ~c[3] & (c[4] < ROUNDS),
        refine,
        (low + 1e-3 * (high - low), low, high, interior, jnp.zeros((), jnp.int32)),
    )
    mu = jnp.where(interior, low, jnp.where(close, mu, high))
    s = -gradient / (gaps + mu + tiny)
    missing = radius * jnp.sqrt(jnp.maximum(1 - jnp.sum((s / radius) ** 2), 0))
    toward = jnp.where(gradient[0] > 0, -missing, missing)
    s = s.at[0].add(jnp.where(convex | close, 0, toward))
    decrease = -(gradient @ s + 0.5 * jnp.sum(eigenvalues * s**2))
    shift = jnp.where(interior, 0, mu - lowest)
    return Step(s, decrease, ~interior, shift, _excess(shift, jnp.sum(jnp.abs(eigenvalues))))


def _in_units(solve, hessian, gradient, radius, shift):
    """`solve(H / a, g / b, radius · a / b, shift / a)` in the units that were given; a and b are
    the largest entries of H and g, so that no square overflows."""
    a, b = (_power(jnp.max(jnp.abs(x))) for x in (hessian, gradient))
    tiny = jnp.finfo(radius.dtype).tiny
    scaled = radius * (a / b)
    found = solve(hessian / a, gradient / b, jnp.maximum(scaled, tiny), shift / a)
    step = found.step * jnp.minimum(1, scaled / tiny) * (b / a)
    finite = jnp.isfinite(step).all() & jnp.isfinite(found.decrease)
    return Step(
        jnp.where(finite, step, 0),
        jnp.where(finite, found.decrease * (b / a) * b, 0),
        found.on_boundary,
        *(jnp.where(jnp.isfinite(x), x * a, 0) for x in (found.shift, found.excess)),
    )


def _excess(shift, trace):
    """Of σ over the rounding of a matrix with this sum of absolute eigenvalues."""
    return jnp.maximum(shift - ROUNDINGS * jnp.finfo(shift.dtype).eps * trace, 0)


def _power(x):
    """The power of two next to x ≥ 0, by which one divides without rounding; 1 if it has none."""
    usable = jnp.isfinite(x) & (x > 0)
    return jnp.where(usable, jnp.exp2(jnp.round(jnp.log2(jnp.where(usable, x, 1)))), 1)


def _between(low, high):
    """Their geometric mean, or where `low` is nothing beside `high` a thousandth of this."""
    return jnp.maximum(jnp.sqrt(low) * jnp.sqrt(high), 1e-3 * high)


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
    """Solves the subproblem for a symmetric H, on the boundary to a length within `CLOSE` of the
    radius.

    Newton's method, for 1/‖s(σ)‖ where σ is too small and for log ‖s‖ over log σ where it is too
    large, takes one Cholesky factorisation of H + σ I a step; `shift` is the σ to begin with. The
    σ sought lies above all for which there is no factor, or a step longer than the radius, and
    below all others and ‖H‖ + ‖g‖ / radius; what Newton's method finds outside is replaced by a
    point between. Where no σ has the length asked (H is indefinite and g has next to nothing in the
    direction of its least eigenvalue), this direction leads to the boundary. A σ in the size of
    rounding counts as none. An infinite radius takes the first σ, from none upwards, with a factor.
    Source: Moré and Sorensen, SIAM J. Sci. Stat. Comput. 4 (1983).
    """
    return _in_units(_matrix_step, matrix, gradient, radius, shift)


def _matrix_step(matrix, gradient, radius, shift):
    dtype = gradient.dtype
    identity = jnp.eye(len(gradient), dtype=dtype)
    bound = jnp.max(jnp.sum(jnp.abs(matrix), axis=1))
    least = jnp.finfo(dtype).eps * jnp.maximum(jnp.trace(jnp.abs(matrix)), jnp.finfo(dtype).tiny)
    most = 2 * (bound + norm(gradient) / radius) + least

    def solver(shift):
        lower = jax.lax.linalg.cholesky(matrix + shift * identity, symmetrize_input=False)
        return partial(jax.scipy.linalg.solve_triangular, lower, lower=True)

    def refine(carry):
        shift, low, high, best, _, i = carry
        solve = solver(shift)
        s = -solve(solve(gradient), trans=1)
        length = norm(s)
        definite = jnp.isfinite(length)
        short = definite & (length <= radius)
        low, high = jnp.where(short, low, shift), jnp.where(short, shift, high)
        best = jax.tree.map(lambda new, old: jnp.where(short, new, old), (s, shift), best)
        near = definite & (jnp.abs(length - radius) <= CLOSE * radius)
        found = near | short & (shift <= least) | definite & jnp.isinf(radius)
        best = jax.tree.map(lambda new, old: jnp.where(found, new, old), (s, shift), best)

        slope = jnp.sum(solve(s / length) ** 2)  # −d log ‖s‖ / dσ
        too_long = shift + (length / radius - 1) / slope
        too_short = shift * jnp.exp(-jnp.log(radius / length) / (shift * slope))
        newton = jnp.where(short, too_short, too_long)
        newton = jnp.where(short & ~(newton > least) & (low < least), 0, newton)
        inside = definite & ((low < newton) | (newton == 0) & (low < 0)) & (newton < high)
        # Without a factor σ grows from rounding in large steps: there is none mostly by rounding.
        upwards = jnp.minimum(jnp.maximum(10 * shift, least), _between(shift, high))
        upwards = jnp.where(shift < least, least, upwards)
        middle = jnp.where(definite, _between(jnp.maximum(low, 0), high), upwards)
        following = jnp.where(inside, newton, middle)
        tight = high - low <= 1e-3 * high  # only hard cases leave the bracket so narrow
        return following, low, high, best, found | tight, i + 1

    def towards(best):
        """The step to the boundary along the direction of the least eigenvalue, from inside."""
        s, shift = best
        solve = solver(shift)

        def iterate(_, v):
            v = solve(solve(v), trans=1)
            return v / norm(v)

        v = jnp.cos(jnp.arange(len(s), dtype=dtype))  # any that is orthogonal to nothing
        v = jax.lax.fori_loop(0, 3, iterate, v)
        along, rest = s / radius @ v, 1 - jnp.sum((s / radius) ** 2)
        root = jnp.sqrt(jnp.maximum(along**2 + rest, 0))
        # Of the two points on the boundary the nearer: there the model is lower.
        return s + radius * jnp.where(along > 0, root - along, -root - along) * v

    minus = -jnp.ones_like(shift)
    cauchy = -gradient * jnp.minimum(1 / bound, radius / norm(gradient))
    start = shift, minus, most, (cauchy, most), jnp.array(False), jnp.zeros((), jnp.int32)
    *_, (s, shift), _, _ = jax.lax.while_loop(lambda c: ~c[4] & (c[5] < ROUNDS), refine, start)
    length = norm(s)
    hard = (shift > least) & jnp.isfinite(radius) & (length < (1 - CLOSE) * radius)
    longer = jax.lax.cond(hard, towards, lambda best: best[0], (s, shift))
    hard &= jnp.isfinite(longer).all()
    s = jnp.where(hard, longer, s)
    decrease = -(gradient @ s + 0.5 * s @ (matrix @ s))
    solved = ~hard & (shift < most)  # then (H + σ I) s = −g, and nothing cancels
    decrease = jnp.where(solved, 0.5 * (shift * (s @ s) - gradient @ s), decrease)
    excess = _excess(shift, jnp.trace(jnp.abs(matrix)))
    return Step(s, decrease, (shift > least) & jnp.isfinite(radius), shift, excess)


def search(
    solve: Callable[[jax.Array, jax.Array], Step],
    evaluate: Callable[[jax.Array, Step], tuple[jax.Array, Any]],
    x: jax.Array,
    aux: Any,
    radius: jax.Array,
    shift: jax.Array,
    *,
    max_trials: int,
    reach: jax.Array | float = 0.0,
    first: jax.Array | bool = False,
    correct: Callable[[Step, Any], jax.Array] | None = None,
) -> Iteration:
    """Tries the steps `solve(radius, shift)` from `x` until one is accepted.

    `decrease, aux = evaluate(trial, found)` gives the decrease of the function from `x` to the
    trial point, of which the step `found` promises `found.decrease`, and whatever belongs to that
    point. A rejected step shrinks the radius; an accepted one on the boundary with gain ratio above
    0.75 doubles it. `shift` is a guess at σ. An infinite radius is set by
    the first step. Where the radius is a guess, `first`, a step is taken only if its gain ratio is
    not poor. A rejected step is tried once more with `correct(step, aux)` added to it, where that
    is short beside it.

    The promise is a bound by duality: with (H + σ I) s = −g the model falls nowhere within `reach`
    of x, which may be several lengths, by more than by what it does in s and ½ σ (reach² − ‖s‖²).
    """

    def attempt(carry):
        at, corrected, found = carry
        if correct is None:
            found = solve(at.radius, at.shift)
        else:
            found = jax.lax.cond(corrected, lambda: found, lambda: solve(at.radius, at.shift))
        trial = at.x + found.step
        decrease, trial_aux = evaluate(trial, found)
        ratio = decrease / found.decrease
        accepted = jnp.isfinite(ratio) & (ratio > jnp.where(first, POOR, ACCEPT))
        choose = lambda new, old: jnp.where(accepted, new, old)  # noqa: E731
        after = Iteration(
            x=choose(trial, at.x),
            aux=jax.tree.map(choose, trial_aux, at.aux),
            radius=_next_radius(at.radius, found, ratio, accepted, corrected),
            shift=found.shift,
            accepted=accepted,
            first_ratio=jnp.where(at.trials == 0, ratio, at.first_ratio),
            ratio=ratio,
            decrease=decrease,
            promise=jnp.where(at.trials == 0, _promise(found, reach), at.promise),
            trials=at.trials + 1,
        )
        again = jnp.array(False)
        if correct is not None:
            again = ~accepted & ~corrected
            more = jax.lax.cond(again, lambda: correct(found, trial_aux), lambda: jnp.zeros_like(x))
            again &= norm(more) < SHORT * norm(found.step)
            found = found._replace(step=found.step + jnp.where(again, more, 0))
        return after, again, found

    zero, none = jnp.zeros_like(shift), jnp.zeros((), jnp.int32)
    false = jnp.array(False)
    nothing = jnp.zeros_like(reach * zero)
    start = Iteration(x, aux, radius, shift, false, zero, zero, zero, nothing, none)
    no_step = Step(jnp.zeros_like(x), zero, false, zero, zero)
    goes_on = lambda c: ~c[0].accepted & (c[0].trials < max_trials)  # noqa: E731
    return jax.lax.while_loop(goes_on, attempt, (start, false, no_step))[0]


def _next_radius(radius, found, ratio, accepted, corrected):
    """After a trial with this gain ratio; `corrected` is one that a correction was added to."""
    length = norm(found.step)
    unset = jnp.isinf(radius)
    failed = 0.25 * jnp.where(length > 0, jnp.minimum(length, radius), radius)
    good = (ratio > GROW) & (found.on_boundary | unset)
    cases = [
        (corrected & ~accepted, radius),  # the step that it corrects has shrunk the radius
        (~accepted, failed),
        (ratio < POOR, 0.5 * length),
        (good, 2 * length),
        (unset | corrected, length),
    ]
    conditions, radii = zip(*cases, strict=True)
    return jnp.select(list(conditions), list(radii), radius)


def _promise(found, reach):
    """The most that the model falls within `reach`, by duality."""
    length = norm(found.step)
    beyond = jnp.maximum(reach - length, 0) * (reach + length)
    return found.decrease + 0.5 * found.excess * beyond


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
