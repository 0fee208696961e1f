"""How slimTik chooses its regularisation parameter Λ at every step.

A selection is a function `select(fit, count, lambda_sum, lower_bound) -> (lambda_, value)`:
`fit(lambda_)` gives the squared residual of the batch at w(Λ) and the trace of A B(Λ) Aᵀ, both over
all its `count` scalar residuals; `fit.scale` is the mean eigenvalue of the Gram matrices in memory,
`fit.row` the mean square of the norm of a row there; `value` is that of the function which was
minimised. Imports checks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from varprox.checks import check_number

GRID, REFINEMENTS = 30, 2  # magnitudes of Λ for either sign, and how often the best is refined
# Of `proportional`:
START, FALL = 50, 0.99  # in mean eigenvalues, and the factor of a step
LEAST, MOST = 0.1, 3  # times the ΣΛ to end at: below it starts, above it falls
ROWS = 2.5  # mean squares of a row's norm in the ΣΛ to end at


class Fit(NamedTuple):
    """The batch at w(Λ): ‖A w − c‖², and the trace of A B Aᵀ, its effective degrees of freedom."""

    residual: jax.Array
    trace: jax.Array


class Trials(NamedTuple):
    """The batch at any Λ, and what to measure Λ by."""

    at: Callable[[jax.Array], Fit]
    scale: jax.Array  # the mean eigenvalue of M
    row: jax.Array  # the mean square of the norm of a row in memory

    def __call__(self, lambda_: jax.Array) -> Fit:
        """The batch at w(Λ)."""
        return self.at(lambda_)


def proportional(factor: float = 0.3) -> Partial:
    """A ΣΛ that falls from `START` times the mean eigenvalue of the Gram matrices in memory, by one
    in a hundred a step, to `factor` times this and `ROWS` mean squares of a row's norm.

    It keeps W near the one before in directions that the last few batches say little of. At first,
    while features are poor, a small W that follows slowly has them learn; later W is to follow
    them. Where ΣΛ ends is in proportion to the features, and high enough to keep down the leverage
    ‖a‖² / ΣΛ of single rows, which matters where rows are few for the weights.

    ΣΛ starts where it is less than `LEAST` times the one to end at, falls where it is more than
    `MOST` times that, and in between stays: Λ scales W in the same directions, so that a ΣΛ that
    took part in the noise of small batches would pass it on to W. The value is reported as zero.
    """
    return Partial(_proportional, check_number("factor", factor))


def sgcv() -> Partial:
    """Sampled generalised cross validation: ‖A w − c‖² / (N − trace)², without any knowledge of the
    noise. Source: arXiv:2109.14002, section 3."""
    return minimise(_sgcv)


def supre(noise_variance: float) -> Partial:
    """The sampled unbiased predictive risk estimator: ‖A w − c‖² + 2 σ² trace − N σ²."""
    return minimise(Partial(_supre, check_number("noise_variance", noise_variance)))


def sdp(noise_variance: float) -> Partial:
    """The sampled discrepancy principle: |‖A w − c‖² − N σ²|, where the paper has the square of
    it, which is least at the same Λ."""
    return minimise(Partial(_sdp, check_number("noise_variance", noise_variance)))


def constant(value: float) -> Partial:
    """The same Λ at every step; the value of the selection function is reported as zero."""
    return Partial(_constant, check_number("value", value))


def minimise(criterion: Callable) -> Partial:
    """A selection that takes the Λ with the least `criterion(fit, count)`, NaN counting as never,
    and the largest Λ if this is infinite for all of them.

    Tried are first `GRID` magnitudes from 1e-16 to half of ΣΛ for either sign, as in the authors'
    code, then as many values between the neighbours of the best, `REFINEMENTS` times.
    """
    return Partial(_minimise, criterion if isinstance(criterion, Partial) else Partial(criterion))


def tries(selection: Partial) -> bool:
    """Whether a selection may ask for the batch at values of Λ; false for two of these here."""
    return selection.func not in (_proportional, _constant)


def candidates(lambda_sum: jax.Array) -> jax.Array:
    """±logspace(−16, log₁₀(ΣΛ/2), GRID), in ascending order; of a smaller ΣΛ they are all 1e-16."""
    largest = jnp.log10(jnp.maximum(lambda_sum / 2, 1e-16))
    sizes = jnp.logspace(-16, largest, GRID, dtype=lambda_sum.dtype)
    return jnp.concatenate([-sizes[::-1], sizes])


def _minimise(criterion, fit, count, lambda_sum, lower_bound):
    def best(tried):
        tried = jnp.maximum(tried, lower_bound - lambda_sum)
        values = jax.vmap(lambda lambda_: criterion(fit(lambda_), count))(tried)
        values = jnp.where(jnp.isnan(values), jnp.inf, values)
        last = len(tried) - 1
        place = jnp.where(jnp.isinf(values).all(), last, jnp.argmin(values))
        around = tried[jnp.maximum(place - 1, 0)], tried[jnp.minimum(place + 1, last)]
        return tried[place], values[place], around

    lambda_, value, (low, high) = best(candidates(lambda_sum))
    for _ in range(REFINEMENTS):
        found, lower, (low, high) = best(jnp.linspace(low, high, GRID, dtype=lambda_sum.dtype))
        better = lower < value
        lambda_, value = jnp.where(better, found, lambda_), jnp.where(better, lower, value)
    return lambda_, value


def _sgcv(fit, count):
    # Beyond its pole, where the trace exceeds the number of residuals, the function means nothing,
    # nor where their difference is rounding error.
    freedom = count - fit.trace
    rounding = 4 * jnp.finfo(freedom.dtype).eps * count
    return jnp.where(freedom > rounding, fit.residual / freedom**2, jnp.inf)


def _supre(variance, fit, count):
    return fit.residual + 2 * variance * fit.trace - count * variance


def _sdp(variance, fit, count):
    return jnp.abs(fit.residual - count * variance)


def _proportional(factor, fit, count, lambda_sum, lower_bound):
    lowest = factor * fit.scale + ROWS * fit.row
    falling = jnp.where(lambda_sum > MOST * lowest, FALL * lambda_sum, lambda_sum)
    wanted = jnp.where(lambda_sum < LEAST * lowest, START * fit.scale, falling)
    return jnp.maximum(lowest, wanted) - lambda_sum, jnp.zeros_like(lambda_sum)


def _constant(value, fit, count, lambda_sum, lower_bound):
    lambda_ = jnp.maximum(jnp.full_like(lambda_sum, value), lower_bound - lambda_sum)
    return lambda_, jnp.zeros_like(lambda_sum)
