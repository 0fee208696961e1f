"""What gradients teach of the curvature that a Gauss–Newton matrix leaves out."""

import jax.numpy as jnp
import numpy as np
import pytest
from problems import relative

from varprox.numerics import secant

SIZE = 5


def made(*, matrix=None, bend=1.0, seed=0):
    """A step of a quadratic function with the Hessian H + S, of which S is to be learnt."""
    rng = np.random.default_rng(seed)
    root, rest = rng.normal(size=(2, SIZE, SIZE))
    hessian, rest = root @ root.T, bend * (rest + rest.T)
    s, g = rng.normal(size=(2, SIZE))
    old = np.zeros((SIZE, SIZE)) if matrix is None else matrix
    before = secant.Secant(*map(jnp.asarray, (old, g, g + hessian @ s, s)), jnp.int32(0))
    return before, g + (hessian + rest) @ s, rest @ s, (hessian + rest) @ s


def test_it_learns_the_curvature_along_the_step(x64):
    for seed in range(5):
        before, gradient, wanted, y = made(seed=seed, bend=0.1)
        assert y @ before.step > 0
        after = secant.learn(before, gradient)
        assert relative(after.matrix @ before.step, wanted) < 1e-12
        assert relative(after.matrix, after.matrix.T) < 1e-12
        changes = np.linalg.eigvalsh(after.matrix)
        assert (abs(changes) > 1e-10 * abs(changes).max()).sum() <= 2


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_units_make_no_difference_in_single_precision(unit):
    """Gradients are in the square of the targets' unit."""
    before, gradient, wanted, _ = made(bend=0.1)
    before = secant.Secant(*(jnp.asarray(unit * x, np.float32) for x in before[:3]), *before[3:])
    before = before._replace(step=jnp.asarray(before.step, np.float32))
    after = secant.learn(before, jnp.asarray(unit * gradient, np.float32))
    assert relative(after.matrix @ before.step, unit * wanted) < 1e-4


def test_it_changes_as_little_as_it_can(x64):
    """Of all symmetric matrices that map s rightly it is the nearest, in variables in which y and s
    are the same."""
    before, gradient, _wanted, y = made(bend=0.1)
    s = np.asarray(before.step)
    after = np.asarray(secant.learn(before, gradient).matrix)
    rng = np.random.default_rng(1)
    metric = rng.normal(size=(SIZE, SIZE))
    metric = metric @ metric.T + np.eye(SIZE)
    # T with T Tᵀ s = y: that of BFGS, from any metric.
    ms = metric @ s
    metric = metric - np.outer(ms, ms) / (s @ ms) + np.outer(y, y) / (s @ y)
    inverse = np.linalg.inv(np.linalg.cholesky(metric))

    def distance(matrix):
        return np.linalg.norm(inverse @ matrix @ inverse.T)

    for _ in range(20):
        other = rng.normal(size=(SIZE, SIZE))
        other = other + other.T
        across = np.eye(SIZE) - np.outer(s, s) / (s @ s)
        nearby = after + 0.1 * across @ other @ across  # maps s as `after` does
        assert distance(after) < distance(nearby)


def test_it_forgets_what_a_step_does_not_bear_out(x64):
    """Where the residual has shrunk so must S, in all directions."""
    before, gradient, *_ = made(matrix=np.eye(SIZE), bend=0.0)
    after = secant.learn(before, gradient)
    assert np.abs(after.matrix).max() < 1e-12


@pytest.mark.parametrize("change", ["none", "downwards", "nan"])
def test_it_keeps_what_it_knows_where_a_step_teaches_nothing(change, x64):
    before, gradient, *_ = made(matrix=np.eye(SIZE))
    if change == "none":
        before, gradient = before._replace(step=jnp.zeros(SIZE)), before.gradient
    elif change == "downwards":
        gradient = before.gradient - before.step
    else:
        gradient = gradient * np.nan
    assert (secant.learn(before, gradient).matrix == before.matrix).all()


def test_trust_is_earned_slowly_and_kept_while_it_is_better(x64):
    known = secant.nothing_yet(jnp.zeros(SIZE))
    for streak, more, expected in [
        (0, 0.8, 1),
        (0, 0.7, 0),
        (2, 1.0, 3),
        (3, 0.1, 4),
        (3, -0.1, 0),
    ]:
        found = secant.judge(known._replace(streak=jnp.int32(streak)), 1.0, more, 2.0)
        assert found == expected
    assert not known._replace(streak=jnp.int32(secant.PATIENCE - 1)).trusted
    assert known._replace(streak=jnp.int32(secant.PATIENCE)).trusted
