"""The search along a line by values and slopes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MOST_TRIALS = 20
ENOUGH, FIRST_ENOUGH = 1e-4, 0.25  # of what the slope promises: asked of a step, and of the first
STEEP = 0.9  # of the slope at the start: where it is as steep, the step was too short
LONGER = 10.0
LEAST, MOST = 0.1, 0.5  # of the bracket, from its lower end: where the next trial may lie


class Point(NamedTuple):
    """A point on the line."""

    length: jax.Array
    gain: jax.Array  # how far the objective lies below that of the start
    slope: jax.Array


class Search(NamedTuple):
    """What a search ends with: the point that it accepts, or the start."""

    point: Point
    aux: Any  # what belongs to the point
    accepted: jax.Array
    trials: jax.Array


class _Bracket(NamedTuple):
    low: Point  # gains enough, and still falls as steeply as at the start
    high: Point  # gains too little; its length is infinite as long as there is none
    aux: Any  # of what has gained enough last
    best: Point
    length: jax.Array  # of the next trial
    trials: jax.Array
    done: jax.Array


def search(
    evaluate: Callable[[jax.Array], tuple[jax.Array, jax.Array, Any]],
    start: Any,
    slope: jax.Array,
    length: jax.Array,
    noise: jax.Array,
    enough: jax.Array,
) -> Search:
    """A point on the line that satisfies the Wolfe conditions, or one that is only lower.

    `evaluate(length)` gives the decrease of the objective by its values, the slope, and what
    belongs to the point; `start` is what belongs to the start, where the slope is `slope` ≤ 0, and
    `length` the first trial. A point gains enough if it gains the fraction `enough` of what the
    slope promises, and is far enough if the slope has flattened to the fraction `STEEP`.

    Where the values differ by no more than `noise`, which rounding may have done, the slopes at
    both ends measure the gain, by the trapezoidal rule: then the conditions are the approximate
    ones of Hager and Zhang, SIAM J. Optim. 16 (2005). What is not finite gains too little.
    """
    zero = jnp.zeros_like(slope)
    infinite = zero + jnp.inf
    here = Point(zero, zero, slope)
    # A step that is much shorter goes nowhere but by rounding.
    shortest = jnp.finfo(length.dtype).eps * length

    def trial(at):
        gain, new_slope, aux = evaluate(at.length)
        by_slopes = -0.5 * at.length * (slope + new_slope)
        gain = jnp.where(jnp.abs(gain) <= noise, by_slopes, gain)
        point = Point(at.length, gain, new_slope)
        gains = (gain >= -enough * at.length * slope) & jnp.isfinite(gain + new_slope)
        short = gains & (new_slope < STEEP * slope)
        low = _where(short, point, at.low)
        high = _where(gains, at.high, point)
        return _Bracket(
            low,
            high,
            _where(gains, aux, at.aux),
            _where(gains, point, at.best),
            jnp.where(jnp.isinf(high.length), LONGER * low.length, _between(low, high)),
            at.trials + 1,
            gains & ~short,
        )

    ended = jax.lax.while_loop(
        lambda at: ~at.done & (at.trials < MOST_TRIALS) & (at.length > shortest),
        trial,
        _Bracket(
            here,
            Point(infinite, zero, zero),
            start,
            here,
            length,
            jnp.zeros((), jnp.int32),
            jnp.array(False),
        ),
    )
    return Search(ended.best, ended.aux, ended.best.length > 0, ended.trials)


def _between(low, high):
    """The minimiser of the cubic through both points, where it lies well inside; else the end of
    that part, the lower one where the cubic is not finite."""
    width = high.length - low.length
    bend = low.slope + high.slope - 3 * (low.gain - high.gain) / width
    root = jnp.sqrt(jnp.maximum(bend**2 - low.slope * high.slope, 0))
    place = 1 - (high.slope + root - bend) / (high.slope - low.slope + 2 * root)
    place = jnp.where(jnp.isfinite(place), place, LEAST)
    return low.length + jnp.clip(place, LEAST, MOST) * width


def _where(condition, new, old):
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
