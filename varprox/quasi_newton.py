"""Limited-memory BFGS in flat variables: the pairs that stand for the inverse Hessian, and the
search along a line. Imports nothing of the package.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MOST_TRIALS = 20
ENOUGH, FIRST_ENOUGH = 1e-4, 0.25  # of what the slope promises: asked of a step, and of the first
STEEP = 0.9  # of the slope at the start: where it is as steep, the step was too short
LONGER = 10.0
LEAST, MOST = 0.1, 0.5  # of the bracket, from its lower end: where the next trial may lie


class Pairs(NamedTuple):
    """Steps and what the gradient changed by along them, the newest over the oldest."""

    steps: jax.Array  # (memory, size)
    changes: jax.Array  # (memory, size)
    weights: jax.Array  # (memory,), 1 / (step · change), 0 where there is no pair
    scale: jax.Array  # of the inverse Hessian in directions that no pair tells of
    added: jax.Array  # how many pairs ever were

    @property
    def empty(self) -> jax.Array:
        """Is there no pair?"""
        return jnp.all(self.weights == 0)

    def solve(self, gradient: jax.Array) -> jax.Array:
        """The inverse Hessian times a vector. Source: Nocedal, Math. Comp. 35 (1980)."""
        memory = len(self.weights)
        newest_first = (self.added - 1 - jnp.arange(memory, dtype=jnp.int32)) % memory

        def take_out(q, i):
            along = self.weights[i] * (self.steps[i] @ q)
            return q - along * self.changes[i], along

        def put_back(r, pair):
            i, along = pair
            return r + (along - self.weights[i] * (self.changes[i] @ r)) * self.steps[i], None

        q, along = jax.lax.scan(take_out, gradient, newest_first)
        result, _ = jax.lax.scan(put_back, self.scale * q, (newest_first, along), reverse=True)
        return result

    def add(self, step: jax.Array, change: jax.Array, keep: jax.Array) -> "Pairs":
        """With this pair, if `keep` and if the objective bends upwards along the step."""
        memory, eps = len(self.weights), jnp.finfo(step.dtype).eps
        product, square = step @ change, change @ change
        # A curvature below rounding of the change would weigh without bound.
        keep = keep & (product > eps * square) & (square > 0)
        place = self.added % memory
        product, square = jnp.where(keep, product, 1), jnp.where(keep, square, 1)

        def put(old, new):
            return old.at[place].set(jnp.where(keep, new, old[place]))

        return Pairs(
            put(self.steps, step),
            put(self.changes, change),
            put(self.weights, 1 / product),
            jnp.where(keep, product / square, self.scale),
            self.added + keep.astype(jnp.int32),
        )

    def forget(self, when: jax.Array) -> "Pairs":
        """Without pairs, if `when`; the scale stays."""
        return self._replace(weights=jnp.where(when, 0, self.weights))


def no_pairs(memory: int, like: jax.Array) -> Pairs:
    """No pair yet, of vectors (size,) like the one given, and the identity."""
    nothing = jnp.zeros((memory, like.size), like.dtype)
    return Pairs(
        nothing,
        nothing,
        jnp.zeros(memory, like.dtype),
        jnp.ones((), like.dtype),
        jnp.zeros((), jnp.int32),
    )


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
