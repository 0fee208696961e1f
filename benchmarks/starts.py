"""Where W starts in the methods that train it along with θ."""

from typing import Any

import jax

import varprox as vp

SPREAD = 0.1  # standard deviation of the random W


def solved_w(problem: vp.Problem, theta: Any, data: tuple, key: jax.Array) -> jax.Array:
    """W(θ), which has the lowest Φ."""
    return vp.solve_w(problem, theta, data)


def random_w(problem: vp.Problem, theta: Any, data: tuple, key: jax.Array) -> jax.Array:
    """0.1 · normal, which may lead further."""
    rows = jax.eval_shape(problem.model.rows, theta, data[0])
    return SPREAD * jax.random.normal(key, (rows.shape[1], data[1].shape[1]), rows.dtype)


STARTS = {"W(θ)": solved_w, "random W": random_w}
