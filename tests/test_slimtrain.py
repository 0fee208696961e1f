"""slimTrain against its definition, its closed form, and what it promises of an epoch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from problems import features, initial_theta, make_data

import varprox as vp
from varprox import minibatches
from varprox.model import objective

SAMPLES, BATCH = 16, 4
RATE = 0.1


def make(dtype=np.float64, **options):
    problem = vp.Problem(vp.Separable(features), vp.least_squares(), 1e-2)
    method = vp.slimtrain(problem, optax.sgd(RATE), **options)
    return problem, method, initial_theta(dtype=dtype), make_data("", 2, SAMPLES, dtype=dtype)


def batches(data, size=BATCH):
    return list(zip(*(np.split(x, SAMPLES // size) for x in data), strict=True))


def counting(counts, theta, inputs):
    """The first two inputs are features; the third names the sample."""
    return inputs[:, :2] * theta["scale"]


def count(fn, theta, inputs):
    (counts,) = fn.args
    seen = counts.at[inputs[:, 2].astype(jnp.int32)].add(1)
    return fn(theta, inputs), Partial(counting, seen)


def counting_task(samples=SAMPLES, dtype=np.float64):
    """Features whose state counts how often a training batch has held each sample."""
    model = vp.Separable(Partial(counting, jnp.zeros(samples, jnp.int32)), training=count)
    rng = np.random.default_rng(0)
    inputs = np.column_stack([rng.normal(size=(samples, 2)), np.arange(samples)])
    data = inputs.astype(dtype), rng.normal(size=(samples, 1)).astype(dtype)
    return vp.Problem(model, vp.least_squares()), {"scale": np.ones(2, dtype)}, data


def test_a_step_is_slimtik_and_the_gradient_at_the_new_w(x64):
    """Three steps, so that memory and ΣΛ matter; the objective is that at the new W and old θ."""
    problem, method, theta, data = make(memory=1, selection=vp.sgcv())
    tikhonov = vp.slimtik(1)
    state, plain = method.init(theta, data), tikhonov.init(np.zeros((4, 2)))
    for batch in batches(data)[:3]:
        state, info = method.step(state, batch)
        rows = problem.model.rows(theta, batch[0]) / BATCH**0.5
        plain, expected = tikhonov.update(plain, rows, batch[1] / BATCH**0.5)
        value, gradient = jax.value_and_grad(objective, 1)(problem, theta, plain.w, batch)
        theta = jax.tree.map(lambda x, g: x - RATE * g, theta, gradient)
        chex.assert_trees_all_close(state.theta, theta, rtol=1e-10)
        np.testing.assert_allclose(state.w, plain.w, rtol=1e-10)
        np.testing.assert_allclose([info.objective, state.objective], value, rtol=1e-10)
        np.testing.assert_allclose(info.lambda_sum, expected.lambda_sum, rtol=1e-9)
        assert info.finite


def test_one_epoch_with_full_memory_solves_the_whole_problem(x64):
    """θ at rest and Λ = λ / batches: Tikhonov's solution, the mean of squares being that of the
    samples of a batch."""
    steps = SAMPLES // BATCH
    options = {"selection": vp.constant(0.3 / steps), "initial": 0.0, "lower_bound": 0.0}
    problem = vp.Problem(vp.Separable(features), vp.least_squares())
    method = vp.slimtrain(problem, optax.set_to_zero(), steps - 1, **options)
    theta, data = initial_theta(), make_data("", 2, SAMPLES)
    for seed in range(2):
        state = method.init(theta, data, jax.random.key(seed))
        state, _ = method.epoch(state, data, batch_size=BATCH)
        rows = np.asarray(problem.model.rows(theta, data[0]))
        matrix = rows.T @ rows / BATCH + 0.3 * np.eye(4)
        expected = np.linalg.solve(matrix, rows.T @ data[1] / BATCH)
        np.testing.assert_allclose(state.w, expected, atol=1e-10)


@pytest.mark.parametrize("batch_size", [4, 5])
def test_an_epoch_takes_every_sample_once_but_for_an_unfilled_batch(batch_size, x64):
    """And features keep what they learn from the batches."""
    problem, theta, data = counting_task()
    method = vp.slimtrain(problem, optax.sgd(0.01))
    state = method.init(theta, data)
    state, info = method.epoch(state, data, batch_size=batch_size)
    steps = SAMPLES // batch_size
    (counts,) = state.learned
    assert sorted(counts) == [0] * (SAMPLES - steps * batch_size) + [1] * (steps * batch_size)
    assert info.objective.shape == (steps,)
    np.testing.assert_allclose(state.objective, np.mean(info.objective), rtol=1e-12)
    assert state.work_units == 2 * steps * batch_size / SAMPLES
    (at_start,) = problem.model.features.args
    assert not at_start.any()


def test_an_epoch_is_shuffled_anew_and_fixed_by_its_seed(x64):
    problem, theta, data = counting_task()
    method = vp.slimtrain(problem, optax.sgd(0.01))

    def chosen(seed, epochs):
        state = method.init(theta, data, jax.random.key(seed))
        for _ in range(epochs):
            state, info = method.epoch(state, data, batch_size=5)
        return np.asarray(info.objective)

    np.testing.assert_array_equal(chosen(0, 1), chosen(0, 1))
    assert (chosen(0, 1) != chosen(1, 1)).any()
    problem, theta, data = counting_task()
    state = method.init(theta, data)
    for _ in range(6):
        state, _ = method.epoch(state, data, batch_size=5)
    (counts,) = state.learned
    assert counts.min() >= 1  # the one left out was not always the same


def test_an_epoch_is_its_steps(x64):
    """Run on one batch of everything an epoch is a step, whatever the order."""
    _, method, theta, data = make()
    state = method.init(theta, data)
    stepped, _ = method.step(state, data)
    after, _ = method.epoch(state, data, batch_size=SAMPLES)
    chex.assert_trees_all_close(after.theta, stepped.theta, rtol=1e-10)
    np.testing.assert_allclose(after.w, stepped.w, rtol=1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_is_passed_over(bad, x64):
    problem, theta, data = counting_task()
    method = vp.slimtrain(problem, optax.sgd(0.01, momentum=0.9))
    before, _ = method.step(method.init(theta, data), batches(data)[0])
    inputs = data[0].copy()
    inputs[5, 1] = bad
    state, info = method.step(before, batches((inputs, data[1]))[1])
    assert not info.finite and state.status == vp.Status.NON_FINITE
    kept = ("problem", "theta", "tikhonov", "optimizer", "objective")
    for name in kept:
        chex.assert_trees_all_equal(getattr(state, name), getattr(before, name))
    state, info = method.epoch(before, (inputs, data[1]), batch_size=4)
    assert sorted(info.finite) == [False, True, True, True]
    assert state.status == vp.Status.RUNNING and np.isfinite(state.objective)
    everything = jax.tree.map(lambda x: np.full_like(x, bad), data)
    state, _ = method.epoch(before, everything, batch_size=4)
    assert state.status == vp.Status.NON_FINITE
    chex.assert_trees_all_equal(state.theta, before.theta)


def test_it_learns_in_single_precision_with_adam(standard_promotion):
    """Without a learning rate for W; every number keeps its dtype, and a step its trace."""
    problem = vp.Problem(vp.Separable(features), vp.least_squares(), 1e-6)
    method = vp.slimtrain(problem, optax.adam(1e-2))
    theta, data = initial_theta(dtype=np.float32), make_data("", 2, 64, dtype=np.float32)
    state = method.init(theta, data)
    before = state
    losses = []
    for _ in range(30):
        state, info = method.epoch(state, data, batch_size=8)
        losses.append(float(state.objective))
    chex.assert_trees_all_equal_dtypes(state, before)
    assert losses[-1] < 0.7 * losses[0]
    assert info.finite.all()


def test_a_step_traces_once_and_maps(x64):
    _, method, theta, data = make()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, batch):
        return method.step(state, batch)

    state = method.init(theta, data)
    for batch in batches(data)[:2]:
        state, _ = step(state, batch)
    thetas = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), theta)
    first = batches(data)[0]
    run = lambda theta: method.step(method.init(theta, data), first)[0].w  # noqa: E731
    mapped = jax.vmap(run)(thetas)
    np.testing.assert_allclose(mapped[0], run(theta), rtol=1e-9)


def test_an_epoch_under_jit_is_the_same(x64):
    problem, theta, data = counting_task()
    method = vp.slimtrain(problem, optax.sgd(0.01))
    state = method.init(theta, data)
    plain, _ = method.epoch(state, data, batch_size=5)
    jitted, _ = jax.jit(functools.partial(method.epoch, batch_size=5))(state, data)
    chex.assert_trees_all_close(jitted.theta, plain.theta, rtol=1e-12)
    np.testing.assert_allclose(jitted.w, plain.w, rtol=1e-10)


def test_steps_with_convolutions_are_not_scanned_on_cpu_and_come_to_the_same(x64):
    """What is called step by step equals the scan, which the epoch is inside of a jit."""
    if jax.default_backend() != "cpu":
        pytest.skip("elsewhere all epochs are scanned")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 4, 4, 2))
    model = vp.Separable(lambda theta, x: jnp.tanh(theta["scale"] * x), vp.conv((2, 2)))
    data = images, rng.normal(size=(8, 3, 3, 1))
    calls = []

    def training(features, theta, inputs):
        jax.debug.callback(lambda: calls.append(None))
        return features(theta, inputs), features

    model = vp.Separable(model.features, model.head, training)
    method = vp.slimtrain(vp.Problem(model, vp.least_squares()), optax.sgd(0.01))
    state = method.init({"scale": np.ones(2)}, data)
    plain, infos = method.epoch(state, data, batch_size=3)
    jitted, expected = jax.jit(functools.partial(method.epoch, batch_size=3))(state, data)
    chex.assert_trees_all_close(plain.theta, jitted.theta, rtol=1e-9)
    np.testing.assert_allclose(plain.w, jitted.w, rtol=1e-8)
    chex.assert_trees_all_close(infos, expected, rtol=1e-7, atol=1e-9)
    jax.effects_barrier()
    assert len(calls) == 4
    assert minibatches.steps_one_by_one(
        slimtrain._step, *method.epoch.args, state, data, batch_size=3
    )


def test_constant_features_leave_w_finite(x64):
    model = vp.Separable(lambda theta, inputs: 0 * inputs + theta["level"])
    method = vp.slimtrain(vp.Problem(model, vp.least_squares()), optax.sgd(0.1))
    data = make_data("", 2, SAMPLES)
    state = method.init({"level": np.ones(2)}, data)
    for batch in batches(data):
        state, info = method.step(state, batch)
        assert np.isfinite(state.w).all() and info.finite


# Bad input


def no_least_squares():
    problem = vp.Problem(vp.Separable(features), vp.logistic(), w_penalty=1.0)
    vp.slimtrain(problem, optax.sgd(0.1))


ONES = np.ones((4, 2))


def with_data(inputs=ONES, targets=ONES, head=None):
    problem = vp.Problem(vp.Separable(features, head), vp.least_squares())
    vp.slimtrain(problem, optax.sgd(0.1)).init(initial_theta(), (inputs, targets))


def of_batches(size):
    _, method, theta, data = make()
    method.epoch(method.init(theta, data), data, batch_size=size)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (no_least_squares, TypeError, "problem: expected the loss varprox.least_squares(), got"),
        (lambda: vp.slimtrain(3, optax.sgd(0.1)), TypeError, "problem: expected a varprox.Problem"),
        (
            lambda: vp.slimtrain(make()[0], 1e-3),
            TypeError,
            "optimizer: expected one of optax, such as optax.adam(1e-3), got 0.001",
        ),
        (lambda: make(memory=-1), ValueError, "memory: expected an integer ≥ 0, got -1"),
        (lambda: make(selection=3), TypeError, "selection: expected one such as"),
        (lambda: of_batches(17), ValueError, "batch_size: expected at most 16, the number of"),
        (lambda: of_batches(0), ValueError, "batch_size: expected an integer ≥ 1, got 0"),
        (
            lambda: with_data(np.ones((0, 2)), np.ones((0, 2))),
            ValueError,
            "targets: expected at least one sample, got none",
        ),
        (
            lambda: with_data(targets=np.ones(4)),
            ValueError,
            "targets: expected shape (batch, outputs), got (4,)",
        ),
        (
            lambda: with_data(targets=np.full((4, 2), np.nan)),
            ValueError,
            "targets: expected finite numbers, got 8 NaN or Inf",
        ),
        (
            lambda: with_data(head=vp.conv((2, 2))),
            ValueError,
            "targets: expected shape (batch, height, width, outputs), got (4, 2)",
        ),
        (
            lambda: with_data(targets=np.ones((4, 2, 2, 1)), head=vp.conv((2, 2))),
            ValueError,
            "features: expected an array of shape (4, height, width, channels), channels ≥ 1, got",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message, x64):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_images_of_another_size_are_refused(x64):
    model = vp.Separable(lambda theta, images: theta["scale"] * images, vp.conv((2, 2)))
    method = vp.slimtrain(vp.Problem(model, vp.least_squares()), optax.sgd(0.1))
    data = np.ones((3, 4, 4, 1)), np.ones((3, 4, 4, 1))
    with pytest.raises(ValueError) as caught:
        method.init({"scale": np.ones(1)}, data)
    assert str(caught.value) == (
        "targets: expected shape (3, 3, 3, 1), that of the predictions, got (3, 4, 4, 1)"
    )


def test_full_batch_methods_refuse_images(x64):
    model = vp.Separable(lambda theta, images: theta["scale"] * images, vp.conv((2, 2)))
    problem, data = vp.Problem(model, vp.least_squares()), (np.ones((3, 4, 4, 1)),) * 2
    with pytest.raises(TypeError) as caught:
        vp.gnvpro(problem).init({"scale": np.ones(1)}, data)
    assert str(caught.value).startswith("problem: expected a model with a dense head;")
