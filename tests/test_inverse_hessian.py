"""Pairs and the whole inverse Hessian against the formulas of BFGS and of Broyden's class, dense in
NumPy and in double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varprox.numerics.inverse_hessian import (
    UPDATES,
    bfgs,
    no_pairs,
    self_scaled_broyden,
    start_broyden,
)

RULES = {"bfgs": bfgs, "Broyden": self_scaled_broyden}
TRUE, FALSE = jnp.array(True), jnp.array(False)


@partial(jax.jit, static_argnames="rule")
def told(inverse, length, descent, change, gradient, keep=TRUE, forget=FALSE, rule=None):
    """What a step leads to, in the caller's jit."""
    options = {} if rule is None else {"rule": rule}
    new, descent = inverse.following(length, descent, change, gradient, keep, forget, **options)
    return new.without_root().after(inverse), descent


@pytest.mark.parametrize("added", [0, 2, 3, 5])
def test_pairs_give_the_inverse_of_bfgs(added, x64):
    """Of the last three pairs, whatever came before; one along which nothing bends is left out."""
    rng = np.random.default_rng(added)
    root = rng.normal(size=(6, 6))
    pairs, kept, one = no_pairs(3, jnp.zeros(6)), [], jnp.ones(())
    vector = rng.normal(size=6)
    descent = -vector
    for _ in range(added):
        step = rng.normal(size=6)
        change = root @ root.T @ step
        pairs, descent = told(pairs, one, step, change, vector)
        pairs, descent = told(pairs, one, step, -change, vector)
        pairs, descent = told(pairs, one, step, change, vector, FALSE)
        kept.append((step, change))
    inverse = np.eye(6) * (kept[-1][0] @ kept[-1][1] / np.sum(kept[-1][1] ** 2) if kept else 1)
    for step, change in kept[-3:]:
        inverse = of_bfgs(inverse, step, change)
    np.testing.assert_allclose(descent, -inverse @ vector, rtol=1e-9)
    forgotten, descent = told(pairs, one, vector, vector, vector, FALSE, TRUE)
    assert forgotten.empty and pairs.empty == (added == 0)
    np.testing.assert_allclose(descent, -pairs.scale * vector)


def of_bfgs(inverse, step, change):
    left = np.eye(len(step)) - np.outer(step, change) / (step @ change)
    return left @ inverse @ left.T + np.outer(step, step) / (step @ change)


def of_broyden(inverse, s, y, theta, tau):
    """Urbán, Stefanou, Pons, equation 10; θ and φ are related as in its equation 13."""
    ys, hy = y @ s, inverse @ y
    yhy, sbs = y @ hy, s @ np.linalg.solve(inverse, s)
    a = yhy * sbs / ys**2 - 1
    phi = (1 - theta) / (1 + a * theta)
    v = np.sqrt(yhy) * (s / ys - hy / yhy)
    return (inverse - np.outer(hy, hy) / yhy + phi * np.outer(v, v)) / tau + np.outer(s, s) / ys


def parameters(rule, b, h, size):
    """θ and τ of the publication, equations 11 and 14 to 23."""
    if rule == "bfgs":
        return 0.0, 1.0
    a = b * h - 1
    least = min(1.0, h * (1 - np.sqrt(a / (1 + a))))
    theta = max((least - 1) / a, min(1 / least, (1 - b) / b))
    sigma = 1 + a * theta
    power = sigma ** (1 / (1 - size))
    if theta <= 0:
        return theta, min(min(1, 1 / b) * power, sigma)
    return theta, min(1, 1 / b) * min(power, 1 / theta)


def quartic(x):
    """A function whose curvature changes along the way: its gradient."""
    size = len(x)
    weights = np.linspace(1, 30, size)
    return weights * (x + 0.3 * x**3) + 0.5 * np.roll(x, 1) * weights.min()


@pytest.mark.parametrize("rule", RULES)
def test_the_whole_inverse_is_that_of_broydens_class(rule, x64):
    """Step by step, over the places where what has been kept is added up."""
    size, length = 5, jnp.asarray(0.3)
    x = np.random.default_rng(1).normal(size=size)
    gradient = quartic(x)
    inverse, descent = start_broyden(jnp.asarray(gradient)), -gradient
    expected, first = np.eye(size), True
    for _ in range(2 * UPDATES + 3):
        step = 0.3 * np.asarray(descent)
        new = quartic(x + step)
        change = new - gradient
        b = step @ np.linalg.solve(expected, step) / (step @ change)
        h = change @ expected @ change / (step @ change)
        theta, tau = parameters(rule, b, h, size)
        if first:
            tau, first = h / (1 + (b * h - 1) * theta), False
        inverse, descent = told(inverse, length, step / 0.3, change, new, rule=RULES[rule])
        assert step @ change > 0
        expected = of_broyden(expected, step, change, theta, tau)
        root = inverse.factor * (inverse.root + inverse.left.T @ inverse.right)
        np.testing.assert_allclose(root @ root.T, expected, rtol=1e-7, atol=1e-9 * expected.max())
        np.testing.assert_allclose(root @ (root.T @ change), step, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(descent, -expected @ new, rtol=1e-6, atol=1e-9)
        x, gradient = x + step, new
        # As far as the oracle, which is a difference, stays what it should be.
        expected = np.asarray(root @ root.T)


def test_a_step_that_tells_nothing_leaves_the_inverse(x64):
    """One that is not to be kept, and one along which nothing bends upwards; and it can forget."""
    rng = np.random.default_rng(0)
    start, one = rng.normal(size=4), jnp.ones(())
    gradient = np.array([0.7, 0.2, 0.9, 0.4]) * start
    inverse, descent = told(
        start_broyden(jnp.asarray(start)), one, -start, gradient - start, gradient
    )
    root = np.asarray(inverse.root + inverse.left.T @ inverse.right) * inverse.factor
    for change, keep in ((descent, FALSE), (-descent, TRUE)):
        new = gradient + change
        same, ahead = told(inverse, one, descent, change, new, keep)
        np.testing.assert_array_equal(same.left, inverse.left)
        assert same.factor == inverse.factor and not same.empty
        np.testing.assert_allclose(ahead, -root @ root.T @ new, rtol=1e-12)
    written = inverse._replace(root=inverse.root + jnp.ones((4, 4)))  # as updates do in time
    forgotten, ahead = told(written, one, descent, new - gradient, new, FALSE, TRUE)
    assert forgotten.empty and not forgotten.forgotten and not inverse.empty
    np.testing.assert_allclose(forgotten.root, np.sqrt(inverse.scale) * np.eye(4))
    np.testing.assert_allclose(ahead, -inverse.scale * new)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_stays_definite_whatever_it_is_told(dtype):
    """Ten thousand random updates with curvatures over the whole range that rounding allows."""
    with jax.enable_x64(dtype is np.float64):
        size, steps = 8, 10_000
        eps = float(np.finfo(dtype).eps)

        def update(carry, key):
            inverse, descent, gradient = carry
            first, second, third = jax.random.split(key, 3)
            curvatures = 10 ** jax.random.uniform(first, (size,), dtype, 0.5 * np.log10(eps), 1)
            basis = jnp.linalg.qr(jax.random.normal(second, (size, size), dtype))[0]
            length = jnp.asarray(0.7, dtype)
            change = basis @ (curvatures * (basis.T @ (length * descent)))
            new = jax.random.normal(third, (size,), dtype)
            inverse, descent = told(inverse, length, descent, change, gradient + change)
            # The next step starts elsewhere.
            inverse, descent = told(inverse, length, descent, change, new, FALSE)
            slope = new @ descent / jnp.sqrt((new @ new) * (descent @ descent))
            return (inverse, descent, new), (slope, inverse.used)

        gradient = jnp.ones(size, dtype)
        start = start_broyden(gradient), -gradient, gradient
        _, (slopes, used) = jax.jit(partial(jax.lax.scan, update))(
            start, jax.random.split(jax.random.key(0), steps)
        )
        assert np.isfinite(slopes).all() and np.max(slopes) < 0
        assert np.max(used) == 2 * UPDATES - 2


@pytest.mark.parametrize("condition, agreement", [(1e2, 1e-11), (1e4, 1e-9), (1e6, 1e-6)])
def test_a_linear_change_of_variables_does_not_matter(condition, agreement, x64):
    """Thirty steps in θ and in u with θ = A u: rounding grows with the condition of A."""
    size, rng = 5, np.random.default_rng(4)
    u, v = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    change = u @ np.diag(np.geomspace(1, condition, size)) @ v
    ends = []
    for a in (np.eye(size), change):
        there = np.linalg.solve(a, np.linspace(-1, 1, size))
        gradient = a.T @ quartic(a @ there)
        root = 0.1 * np.linalg.inv(a)
        scaled = root.T @ gradient
        inverse = start_broyden(jnp.asarray(gradient))
        inverse = inverse._replace(root=jnp.asarray(root), scaled=scaled, empty=FALSE)
        descent = -root @ scaled
        for _ in range(30):
            there = there + 0.3 * np.asarray(descent)
            new = a.T @ quartic(a @ there)
            inverse, descent = told(inverse, jnp.asarray(0.3), descent, new - gradient, new)
            gradient = new
        ends.append(a @ there)
    assert np.linalg.norm(ends[0]) < 0.1
    np.testing.assert_allclose(ends[1], ends[0], atol=agreement)
