"""The baselines of the benchmarks: objective, work, and references written from the formulas.

Their contract is in test_method.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import varprox as vp
from benchmarks import baselines
from benchmarks.scipy_lbfgs import scipy_lbfgs
from benchmarks.starts import random_w, solved_w
from varprox.problem.model import objective

pytestmark = pytest.mark.usefixtures("x64")
SAMPLES, WIDTH, CLASSES = 30, 4, 3


def features(theta, inputs):
    return jnp.tanh(jnp.tanh(inputs @ theta["first"]) @ theta["second"])


@pytest.fixture
def problem():
    return vp.Problem(vp.Separable(features), vp.softmax_cross_entropy(), vp.tikhonov(1e-2), 3e-2)


@pytest.fixture
def start():
    """θ and data (inputs, targets)."""
    rng = np.random.default_rng(0)
    theta = {"first": rng.normal(size=(2, WIDTH)), "second": rng.normal(size=(WIDTH, WIDTH))}
    inputs = rng.normal(size=(SAMPLES, 2))
    classes = (np.sin(2 * inputs).sum(axis=1) * 2).round().astype(int) % CLASSES
    return jax.tree.map(jnp.asarray, (theta, (inputs, np.eye(CLASSES)[classes])))


METHODS = {
    "adam": lambda problem: baselines.adam(problem, 1e-2, batch_size=10),
    "adam, cosine": lambda problem: baselines.adam(problem, 3e-2, horizon=10),
    "lbfgs": baselines.lbfgs,
    "gn": lambda problem: baselines.gn(problem, rank=6),
}


@pytest.mark.parametrize("name", METHODS)
def test_objective_falls_and_is_that_of_the_weights(name, problem, start):
    theta, data = start
    solution = vp.fit(METHODS[name](problem), theta, data, epochs=6)
    values = solution.history["objective"]
    assert len(values) == 7
    assert values[-1] < values[0]
    np.testing.assert_allclose(
        values[-1], objective(problem, solution.theta, solution.w, data), rtol=1e-13
    )
    assert solution.status == vp.Status.BUDGET


@pytest.mark.parametrize("name", METHODS)
def test_work_units(name, problem, start):
    history = vp.fit(METHODS[name](problem), *start, epochs=4).history
    steps = {
        "lbfgs": lambda h: 2 * h["trials"],
        "gn": lambda h: 2 + 2 * h["products"] + h["trials"],
    }.get(name, lambda h: np.full(5, 2.0))(history)
    np.testing.assert_array_equal(np.diff(history["work_units"]), steps[1:])
    assert history["work_units"][0] == {"lbfgs": 2, "gn": 1}.get(name, 0)


def test_starts(problem, start):
    theta, data = start
    key = jax.random.key(0)
    solved = solved_w(problem, theta, data, key)
    drawn = random_w(problem, theta, data, key)
    np.testing.assert_array_equal(solved, vp.solve_w(problem, theta, data))
    assert drawn.shape == solved.shape
    assert 0.03 < jnp.std(drawn) < 0.3
    state = baselines.lbfgs(problem, start=random_w).init(theta, data, key)
    np.testing.assert_array_equal(state.w, drawn)


def test_full_batch_adam_is_optax_adam(problem, start, standard_promotion):
    theta, data = start
    # From W(θ) Adam's first steps would be the signs of a gradient that is nothing but rounding.
    method = baselines.adam(problem, 2e-2, horizon=8, start=random_w)
    initial = method.init(theta, data, jax.random.key(0))
    weights = initial.theta, initial.w
    rule = optax.adam(optax.cosine_decay_schedule(2e-2, 4))
    state = rule.init(weights)
    gradient_at = jax.jit(jax.grad(lambda weights: objective(problem, *weights, data)))
    for _ in range(4):
        gradient = gradient_at(weights)
        updates, state = rule.update(gradient, state)
        weights = optax.apply_updates(weights, updates)

    solution = vp.fit(method, theta, data, max_work=8)
    for ours, expected in zip(jax.tree.leaves(solution[:2]), jax.tree.leaves(weights), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-10)


def test_learning_rate_is_constant_or_falls_along_a_cosine(problem, start):
    def rates(**options):
        return vp.fit(baselines.adam(problem, 0.1, **options), *start, epochs=6).history[
            "learning_rate"
        ][1:]

    np.testing.assert_allclose(rates(), 0.1)
    work = 2 * np.arange(6)
    expected = 0.05 * (1 + np.cos(np.pi * np.minimum(work / 8, 1)))
    np.testing.assert_allclose(rates(horizon=8), expected, atol=1e-15)


def test_each_epoch_shuffles_and_a_seed_fixes_the_run(problem, start):
    method = baselines.adam(problem, 1e-2, batch_size=8)
    first, again, other = (vp.fit(method, *start, epochs=3, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.w, again.w)
    assert not np.array_equal(first.w, other.w)


def test_gauss_newton_product_equals_the_dense_matrix(problem, start):
    theta, (inputs, targets) = start
    w = 0.3 * jax.random.normal(jax.random.key(1), (WIDTH + 1, CLASSES))
    value, gradient, product = baselines.gauss_newton(problem, theta, w, (inputs, targets))
    x, unravel = ravel_pytree((theta, w))

    def predictions(x):
        theta, w = unravel(x)
        return (features(theta, inputs) @ w[:-1] + w[-1:]).ravel()

    jacobian = np.asarray(jax.jacobian(predictions)(x))
    probabilities = np.asarray(jax.nn.softmax(predictions(x).reshape(SAMPLES, CLASSES)))
    curvature = np.zeros((SAMPLES, CLASSES, SAMPLES, CLASSES))
    for i, p in enumerate(probabilities):
        curvature[i, :, i] = (np.diag(p) - np.outer(p, p)) / SAMPLES
    curvature = curvature.reshape(len(jacobian), len(jacobian))
    penalty = ravel_pytree((jax.tree.map(lambda a: jnp.full_like(a, 1e-2), theta), 0 * w + 3e-2))[0]
    dense = jacobian.T @ curvature @ jacobian + np.diag(penalty)
    products = [ravel_pytree(product(unravel(v)))[0] for v in jnp.eye(len(x))]
    np.testing.assert_allclose(np.stack(products, axis=1), dense, rtol=1e-10, atol=1e-13)

    residual = (probabilities - targets).ravel() / SAMPLES
    expected = jacobian.T @ residual + penalty * x
    np.testing.assert_allclose(ravel_pytree(gradient)[0], expected, rtol=1e-10, atol=1e-13)
    loss = -np.mean(np.sum(targets * np.log(probabilities), axis=1))
    np.testing.assert_allclose(value, loss + 0.5 * penalty @ x**2, rtol=1e-12)


def test_scipy_reports_what_fit_does(problem, start):
    theta, data = start
    w = vp.solve_w(problem, theta, data)
    metrics = {"size": lambda predictions, targets: jnp.mean(predictions**2)}
    options = {"validation": data, "metrics": metrics}
    solution = scipy_lbfgs(
        problem, theta, w, data, stop=lambda value, work, seconds: work >= 20, **options
    )
    reference = vp.fit(baselines.lbfgs(problem), theta, data, max_work=20, **options)

    history = solution.history
    common = set(reference.history) - {"gradient_norm", "trials"}
    assert set(history) == common
    np.testing.assert_allclose(history["objective"][0], reference.history["objective"][0])
    assert (np.diff(history["objective"]) < 0).all()
    assert (np.diff(history["seconds"]) >= 0).all()
    assert (np.diff(history["work_units"]) % 2 == 0).all()
    assert history["work_units"][0] == 2
    assert history["work_units"][-2] < 20 <= history["work_units"][-1]
    assert solution.status == vp.Status.BUDGET
    np.testing.assert_allclose(
        history["objective"][-1], objective(problem, solution.theta, solution.w, data)
    )
    penalties = problem.penalty(solution.theta) + 0.5 * problem.w_penalty * jnp.sum(solution.w**2)
    np.testing.assert_allclose(history["train_loss"][-1], history["objective"][-1] - penalties)


def test_scipy_stalls_at_a_minimum(problem, start):
    theta, data = start
    w = vp.solve_w(problem, theta, data)
    solution = scipy_lbfgs(problem, theta, w, data, stop=lambda *_: False)
    assert solution.status == vp.Status.STALLED
    gradient = jax.grad(objective, argnums=(1, 2))(problem, solution.theta, solution.w, data)
    assert optax.tree.norm(gradient) < 1e-5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: baselines.adam(p, 0.0), "learning_rate: expected a positive number, got 0.0"),
        (lambda p: baselines.adam(p, "fast"), "learning_rate: expected a positive number, got 'f"),
        (lambda p: baselines.adam(p, 1e-3, horizon=-1), "horizon: expected a positive number"),
        (lambda p: baselines.adam(p, 1e-3, batch_size=0), "batch_size: expected an integer ≥ 1"),
        (lambda p: baselines.gn(p, rank=True), "rank: expected an integer ≥ 1, got True"),
    ],
)
def test_bad_options_are_refused(make, message, problem):
    with pytest.raises(ValueError) as error:
        make(problem)
    assert str(error.value).startswith(message)


def test_a_batch_larger_than_the_data_is_refused(problem, start):
    with pytest.raises(ValueError, match=r"batch_size: expected at most .* 30, got 31"):
        vp.fit(baselines.adam(problem, 1e-3, batch_size=31), *start, epochs=1)
