"""The search along a line against what it promises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varprox.numerics.line_search import ENOUGH, FIRST_ENOUGH, STEEP, search

FUNCTIONS = {
    "quadratic": lambda t: (t - 1) ** 2,
    "valley": lambda t: -t / (t**2 + 2),
    "quartic": lambda t: (t + 0.004) ** 5 - 2 * (t + 0.004) ** 4,
    "saturating": lambda t: jnp.exp(-t) + 0.1 * t,
    "wall": lambda t: jnp.where(t < 1.5, (t - 1) ** 2, jnp.nan),
}


@partial(jax.jit, static_argnames="name")
def along(name, length, enough, noise=0.0, unit=1.0):
    both = jax.value_and_grad(lambda t: unit * FUNCTIONS[name](t))
    start, slope = both(jnp.zeros_like(length))

    def evaluate(t):
        value, slope = both(t)
        return start - value, slope, t

    return slope, search(evaluate, jnp.zeros_like(length), slope, length, noise, enough)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_search_ends_at_a_point_of_wolfe(name, x64):
    """From first trials a millionth and a million times as long, in any unit."""
    for length in 10.0 ** np.arange(-6, 7, 3):
        for enough in (ENOUGH, FIRST_ENOUGH):
            slope, found = along(name, length, enough)
            assert found.accepted and found.aux == found.point.length
            assert found.point.gain >= -enough * found.point.length * slope
            assert found.point.slope >= STEEP * slope
            _, other = along(name, length, enough, unit=1e-12)
            np.testing.assert_allclose(other.point.length, found.point.length, rtol=1e-6)
            assert other.trials == found.trials


@pytest.mark.parametrize("length", np.float32([0.5, 1, 4]))
def test_where_values_are_noise_the_slopes_decide(length):
    """In single precision, near the minimum of what is known to eps only."""

    def evaluate(t):
        return jnp.float32(-2e-7), 1e-9 * (t / length - 1), t

    slope, zero = jnp.float32(-1e-9), jnp.float32(0)
    found = search(evaluate, zero, slope, length, jnp.float32(3e-7), jnp.float32(ENOUGH))
    assert found.accepted and found.trials == 1
    assert found.point.gain == np.float32(0.5e-9) * length
    assert not search(evaluate, zero, slope, length, zero, jnp.float32(ENOUGH)).accepted


def test_where_nothing_is_finite_the_start_is_kept(x64):
    found = search(
        lambda t: (jnp.nan * t, jnp.nan * t, t), 0.0, jnp.array(-1.0), jnp.array(1.0), 0.0, ENOUGH
    )
    assert not found.accepted and found.aux == 0 and 10 < found.trials <= 20
    assert tuple(found.point) == (0, 0, -1)


def test_a_cubic_is_minimised_by_the_second_trial(x64):
    """Where the first is too long: the next is found from values and slopes at both ends."""

    def evaluate(t):
        of = lambda t: (t - 0.4) ** 2 + 0.3 * (t - 0.4) ** 3  # noqa: E731
        value, slope = jax.value_and_grad(of)(t)
        return of(0.0) - value, slope, t

    _, slope, _ = evaluate(jnp.array(0.0))
    found = search(evaluate, jnp.array(0.0), slope, jnp.array(1.0), jnp.array(0.0), ENOUGH)
    assert found.accepted and found.trials == 2
    assert abs(found.point.length - 0.4) < 1e-12 and abs(found.point.slope) < 1e-12
