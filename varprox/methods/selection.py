"""How slimTik chooses its regularisation parameter Λ at every step.

A selection is a function ``select(trials, count, lambda_sum, lower_bound) -> (lambda_, value)``.
``trials(lambda_)`` gives the squared residual of the batch at W(Λ) and the trace of A B(Λ) Aᵀ, both
over all its `count` scalar residuals; `trials.scale` is the mean eigenvalue of the sum of the Gram
matrices in memory, and `trials.row` the mean squared norm of a row there. `value` is the value of
the function that was minimised.
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
    """A ΣΛ that starts high and decays to a level in proportion to the features.

    Let M be the sum of the Gram matrices in memory, s its mean eigenvalue and ρ the mean squared
    norm of a row in memory. ΣΛ is led to the target L = factor · s + 2.5 ρ; a step takes it to:

    ==================  =================
    ΣΛ before the step  ΣΛ after the step
    ==================  =================
    below L / 10        max(L, 50 s)
    from L / 10 to 3 L  max(L, ΣΛ)
    above 3 L           max(L, 0.99 ΣΛ)
    ==================  =================

    So ΣΛ starts at about 50 s, decays by 1 % per step, and stays once it is within three times the
    target. It is left alone there because Λ scales W in the directions that ΣΛ damps: a ΣΛ that
    followed the noise of small batches would pass it on to W.

    ΣΛ keeps W near its previous value in directions that the last few batches say little about. At
    first, while the features are poor, a small W that follows slowly lets them learn; later W is to
    follow the features. The term in ρ bounds the leverage ‖a‖² / ΣΛ of single rows a, which matters
    if there are few rows per weight. The value of the selection is reported as zero.

    Arguments:
        factor: The part of L that is in proportion to s, a finite number ≥ 0.

    Returns:
        The selection, for the option `selection` of `slimtik`, `slimtrain` (whose default it is)
        and `varprox.transforms.slimtik` (likewise).

    Raises:
        TypeError: If `factor` is not a number.
        ValueError: If `factor` is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> slimtik = vp.slimtik(selection=vp.proportional())
        >>> state = slimtik.init(jnp.zeros((2, 1)))
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> state, info = slimtik.update(state, rows, rows @ jnp.array([[3.0], [1.0]]))
        >>> round(float(info.lambda_sum), 2)  # 50 s, as M has the eigenvalues 1 and 3
        100.0
    """
    return Partial(_proportional, check_number("factor", factor))


def sgcv() -> Partial:
    """Sampled generalised cross validation.

    It minimises ‖A w − c‖² / (N − trace)² over Λ, where A holds the rows of the batch, c its
    targets, w is W(Λ), N the number of scalar residuals and trace the trace of A B(Λ) Aᵀ, the
    effective degrees of freedom. No knowledge of the noise is needed.

    Λ is found by search: 30 magnitudes from 1e-16 to ΣΛ / 2 for either sign, then twice 30 values
    around the best. So one step at most halves ΣΛ, or raises it by half. As sGCV looks at the batch
    that W is fitted to, it tends to lower ΣΛ to its lower bound.

    Returns:
        The selection, for the option `selection` of `slimtik` (whose default it is), `slimtrain`
        and `varprox.transforms.slimtik`.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> slimtik = vp.slimtik(selection=vp.sgcv())
        >>> state = slimtik.init(jnp.zeros((2, 1)))
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> state, info = slimtik.update(state, rows, rows @ jnp.array([[3.0], [1.0]]))
        >>> round(float(info.lambda_sum), 3)  # from 0.05: for targets without noise less is better
        0.025

    Source:
        Newman, Chung, Chung, Ruthotto, arXiv:2109.14002, section 3.
    """
    return minimise(_sgcv)


def supre(noise_variance: float) -> Partial:
    """The sampled unbiased predictive risk estimator.

    It minimises ‖A w − c‖² + 2 σ² trace − N σ² over Λ, with the notation and the search of `sgcv`,
    where σ² is the variance of the noise.

    Arguments:
        noise_variance: σ², the variance of the noise in one entry of the targets that slimTik is
            given, a finite number ≥ 0. `slimtrain` and `varprox.transforms.slimtik` divide rows and
            targets by √batch, hence the variance by the batch size.

    Returns:
        The selection, for the option `selection` of `slimtik`, `slimtrain` and
        `varprox.transforms.slimtik`.

    Raises:
        TypeError: If `noise_variance` is not a number.
        ValueError: If `noise_variance` is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> slimtik = vp.slimtik(selection=vp.supre(1e-4))
        >>> state = slimtik.init(jnp.zeros((2, 1)))
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> state, info = slimtik.update(state, rows, rows @ jnp.array([[3.0], [1.0]]))
        >>> round(float(info.lambda_sum), 3)  # from 0.05: the residual is larger than the noise
        0.025

    Source:
        Newman, Chung, Chung, Ruthotto, arXiv:2109.14002.
    """
    return minimise(Partial(_supre, check_number("noise_variance", noise_variance)))


def sdp(noise_variance: float) -> Partial:
    """The sampled discrepancy principle.

    It minimises the distance of ‖A w − c‖² from N σ² over Λ, with the notation and the search of
    `sgcv`, where σ² is the variance of the noise. The paper has the square of this distance, which
    is least at the same Λ.

    Arguments:
        noise_variance: σ², the variance of the noise in one entry of the targets that slimTik is
            given, a finite number ≥ 0. `slimtrain` and `varprox.transforms.slimtik` divide rows and
            targets by √batch, hence the variance by the batch size.

    Returns:
        The selection, for the option `selection` of `slimtik`, `slimtrain` and
        `varprox.transforms.slimtik`.

    Raises:
        TypeError: If `noise_variance` is not a number.
        ValueError: If `noise_variance` is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> slimtik = vp.slimtik(selection=vp.sdp(1.0))
        >>> state = slimtik.init(jnp.zeros((2, 1)))
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> state, info = slimtik.update(state, rows, rows @ jnp.array([[3.0], [1.0]]))
        >>> round(float(info.lambda_sum), 3)  # from 0.05: the residual is smaller than the noise
        0.075

    Source:
        Newman, Chung, Chung, Ruthotto, arXiv:2109.14002.
    """
    return minimise(Partial(_sdp, check_number("noise_variance", noise_variance)))


def constant(value: float) -> Partial:
    """The same regularisation parameter Λ at every step.

    ΣΛ then grows by Λ per batch; with Λ = 0 it stays at `initial`, an option of `slimtik`. The
    value of the selection is reported as zero.

    Arguments:
        value: Λ, a finite number ≥ 0.

    Returns:
        The selection, for the option `selection` of `slimtik`, `slimtrain` and
        `varprox.transforms.slimtik`.

    Raises:
        TypeError: If `value` is not a number.
        ValueError: If `value` is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> slimtik = vp.slimtik(selection=vp.constant(2.0), initial=0.05)
        >>> state = slimtik.init(jnp.zeros((2, 1)))
        >>> state, info = slimtik.update(state, jnp.ones((3, 2)), jnp.ones((3, 1)))
        >>> round(float(info.lambda_sum), 2)
        2.05
    """
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
