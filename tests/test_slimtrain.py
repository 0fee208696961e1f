"""slimTrain against its definition, its closed form, and what it promises of an epoch.

Its contract is in test_method.py.
"""

import functools
import itertools
import pickle
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.tree_util import Partial
from problems import features, initial_theta, make_data

import varprox as vp
from varprox.methods import minibatches
from varprox.problem.model import objective

SAMPLES, BATCH = 16, 4
RATE = 0.1


def make(dtype=np.float64, **options):
    problem = vp.Problem(vp.Separable(features), vp.least_squares(), 1e-2)
    method = vp.slimtrain(problem, optax.sgd(RATE), **options)
    return problem, method, initial_theta(dtype=dtype), make_data("", 2, SAMPLES, dtype=dtype)


def batches(data, size=BATCH):
    return list(zip(*(np.split(x, SAMPLES // size) for x in data), strict=True))


def plain_units(targets):
    """The mean of targets and their variance about it, over all outputs."""
    centre = targets.mean(axis=0)
    return centre, np.mean((targets - centre) ** 2)


def counting(counts, theta, inputs):
    """The first two inputs are features; the third names the sample."""
    return inputs[:, :2] * theta["scale"][None]


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
    """Three steps, so that memory and ΣΛ matter; the objective is that at the new W and old θ. The
    optimizer sees the gradient in the units of the targets, about whose mean W is found."""
    problem, method, theta, data = make(memory=1, selection=vp.sgcv())
    tikhonov, centre, variance = vp.slimtik(1), *plain_units(data[1])
    state, plain = method.init(theta, data), tikhonov.init(np.zeros((4, 2)))
    for batch in batches(data)[:3]:
        state, info = method.step(state, batch)
        rows = problem.model.rows(theta, batch[0]) / BATCH**0.5
        plain, expected = tikhonov.update(plain, rows, (batch[1] - centre) / BATCH**0.5)
        w = plain.w.at[-1].add(centre)
        value, gradient = jax.value_and_grad(objective, 1)(problem, theta, w, batch)
        theta = jax.tree.map(lambda x, g: x - RATE * g / variance, theta, gradient)
        chex.assert_trees_all_close(state.theta, theta, rtol=1e-10)
        np.testing.assert_allclose(state.w, w, rtol=1e-10)
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
        centre, _ = plain_units(data[1])
        expected = np.linalg.solve(matrix, rows.T @ (data[1] - centre) / BATCH)
        expected[-1] += centre
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


def test_features_that_do_not_learn_leave_nothing_in_the_state(x64):
    """Whatever arrays are bound to them."""
    problem, theta, data = counting_task()
    still = vp.Problem(vp.Separable(problem.model.features), vp.least_squares())
    assert vp.slimtrain(still, optax.sgd(0.01)).init(theta, data).learned == []


def test_an_epoch_is_its_steps(x64):
    """Run on one batch of everything an epoch is a step, whatever the order."""
    _, method, theta, data = make()
    state = method.init(theta, data)
    stepped, _ = method.step(state, data)
    after, _ = method.epoch(state, data, batch_size=SAMPLES)
    chex.assert_trees_all_close(after.theta, stepped.theta, rtol=1e-10)
    np.testing.assert_allclose(after.w, stepped.w, rtol=1e-8)


# What is not finite


def same_weights(state, theta, w):
    chex.assert_trees_all_equal(state.theta, jax.tree.map(jnp.asarray, theta))
    np.testing.assert_array_equal(state.w, w)


class At(NamedTuple):
    key: jax.Array
    objective: jax.Array
    status: jax.Array
    place: jax.Array


class Told(NamedTuple):
    objective: jax.Array
    finite: jax.Array


def tell(fixed, values, state, batch):
    value = values[state.place]
    return state._replace(place=state.place + 1), Told(value, jnp.isfinite(value))


def test_an_epoch_fails_where_finite_batches_lead_to_others(x64):
    """All patterns of five batches. The objective is the mean of the finite ones."""
    key, zero = jax.random.key_data(jax.random.key(0)), jnp.zeros((), jnp.int32)
    start = At(key, jnp.array(7.0), zero, zero)
    data = np.zeros((5, 1)), np.zeros((5, 1))
    for finite in itertools.product([True, False], repeat=5):
        values = np.where(finite, np.arange(5.0), np.nan)
        after, infos = minibatches.epoch(tell, None, values, start, data, batch_size=1)
        np.testing.assert_array_equal(infos.objective, values)
        pairs = list(itertools.pairwise(finite))
        fails = pairs.count((True, False)) > pairs.count((True, True)) or not any(finite)
        assert after.status == (vp.Status.NON_FINITE if fails else vp.Status.RUNNING)
        assert after.objective == (np.nanmean(values) if any(finite) else 7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_is_learned_from_a_batch_that_is_not_finite(bad, x64):
    """θ is then the one that a batch was last finite at, and W the one of this batch."""
    problem, theta, data = counting_task()
    method = vp.slimtrain(problem, optax.sgd(0.01, momentum=0.9))
    first, *others = batches(data)
    before, _ = method.step(method.init(theta, data), first)
    inputs = data[0].copy()
    inputs[5, 1] = bad
    state, info = method.step(before, batches((inputs, data[1]))[1])
    assert not info.finite and state.status == vp.Status.NON_FINITE
    for name in ("tikhonov", "optimizer", "learned", "objective"):
        chex.assert_trees_all_equal(getattr(state, name), getattr(before, name))
    same_weights(state, theta, before.w)
    after, info = method.step(state, others[0])
    assert info.finite and after.status == vp.Status.RUNNING
    state, info = method.epoch(before, (inputs, data[1]), batch_size=4)
    assert sorted(info.finite) == [False, True, True, True]
    assert state.status == vp.Status.RUNNING and np.isfinite(state.objective)
    everything = jax.tree.map(lambda x: np.full_like(x, bad), data)
    state, _ = method.epoch(before, everything, batch_size=4)
    assert state.status == vp.Status.NON_FINITE
    same_weights(state, theta, before.w)


def exponentials(theta, inputs):
    return jnp.exp(inputs @ theta["rates"])


def overflowing(rate, dtype, optimizer=optax.adam, samples=24):
    """Exponential features, whose rates a rate of learning as large as this throws off."""
    rng = np.random.default_rng(0)
    inputs = rng.uniform(1, 2, (samples, 2)).astype(dtype)
    data = inputs, np.exp(-inputs[:, :1])
    theta = {"rates": -rng.uniform(0.5, 1.5, (2, 3)).astype(dtype)}
    problem = vp.Problem(vp.Separable(exponentials), vp.least_squares())
    return vp.slimtrain(problem, optimizer(rate)), theta, data


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("optimizer", [optax.adam, functools.partial(optax.sgd, momentum=0.9)])
@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [6, 8])
def test_good_weights_come_back_from_a_rate_that_is_far_too_large(
    optimizer, dtype, epochs, batch_size, standard_promotion
):
    """Four batches an epoch or three: every step is thrown off and taken back, and this ends."""
    with jax.enable_x64(dtype is np.float64):
        method, theta, data = overflowing(1e3, dtype, optimizer)
        solution = vp.fit(method, theta, data, epochs=epochs, batch_size=batch_size)
        predictions = vp.predict(solution.problem, solution.theta, solution.w, data[0])
    assert np.isfinite(predictions).all()
    # Momentum may throw the rates off to where their features are zero, which is finite.
    assert optimizer is not optax.adam or solution.status == vp.Status.NON_FINITE


def test_weights_that_leave_all_bounds_in_one_step_are_not_taken(x64):
    """The gradient and its update are finite; the sum of weights and update is not."""
    method, theta, data = overflowing(1.0, np.float64, lambda _: far_away)
    state, info = method.step(method.init(theta, data), data)
    assert not info.finite and state.status == vp.Status.NON_FINITE
    same_weights(state, theta, np.vstack([np.zeros((3, 1)), data[1].mean(axis=0)]))


def far_towards(updates, state, params=None):
    return jax.tree.map(lambda x: jnp.where(x == x, -1.7e308, x), updates), state


def far_from(params):
    return optax.EmptyState()


far_away = optax.chain(
    optax.GradientTransformation(far_from, far_towards),
    optax.GradientTransformation(
        far_from,
        lambda updates, state, params=None: (jax.tree.map(lambda x: 10 * x, updates), state),
    ),
)


def test_statistics_that_overflow_are_not_kept(x64):
    """Also where features make something finite of them."""

    def learn(fn, theta, inputs):
        return fn(theta, inputs), Partial(counting, fn.args[0] + jnp.sum(inputs**2))

    model = vp.Separable(Partial(counting, jnp.zeros(())), training=learn)
    method = vp.slimtrain(vp.Problem(model, vp.least_squares()), optax.sgd(0.0))
    inputs = np.random.default_rng(0).normal(size=(4, 3))
    theta, data = {"scale": np.ones(2)}, (inputs, inputs[:, :1])
    state = method.init(theta, data)
    inputs = inputs.copy()
    inputs[0, 2] = 1e200
    after, info = method.step(state, (inputs, data[1]))
    assert not info.finite
    chex.assert_trees_all_equal(after.learned, state.learned)


# Units


HEADS = {
    "dense": (features, vp.dense(), (2,), (2,)),
    "dense without bias": (features, vp.dense(bias=False), (2,), (2,)),
    "convolution": (
        lambda theta, y: jnp.tanh(theta["opening"][0, 0] * y),
        vp.conv((2, 2)),
        (3, 3, 1),
        (2, 2, 2),
    ),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    "dtype, scale, shift",
    [
        (np.float64, 1e-6, 0),
        (np.float64, 1e6, 1e10),
        (np.float32, 2.0**-33, 0),
        (np.float32, 2.0**33, 0),
        (np.float32, 2.0**-60, 0),
        (np.float32, 2.0**60, 0),
        (np.float32, 1, 64),
    ],
)
def test_the_units_of_targets_make_no_difference_to_theta(
    name, dtype, scale, shift, standard_promotion
):
    """W goes with the scale, and its bias with the shift; powers of two change no rounding."""
    fn, head, of_inputs, of_targets = HEADS[name]
    shift = 0 if name == "dense without bias" else shift
    with jax.enable_x64(dtype is np.float64):
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=(12, *of_inputs)).astype(dtype)
        targets = np.round(rng.normal(1, 2, size=(12, *of_targets)), 2).astype(dtype)
        method = vp.slimtrain(vp.Problem(vp.Separable(fn, head), vp.least_squares()), ADAM)
        ends = []
        for factor, offset in ((1, 0), (scale, shift)):
            data = inputs, (factor * targets + offset).astype(dtype)
            state = method.init(initial_theta(dtype=dtype), data)
            for _ in range(2):
                state, _ = method.epoch(state, data, batch_size=4)
            assert state.status == vp.Status.RUNNING
            w = np.asarray(state.w, float) - np.vstack(
                [np.zeros_like(state.w[1:]), np.full(2, offset)]
            )
            ends.append((state.theta, w / factor))
            assert method.step(state, data)[1].finite
        rounding = np.finfo(dtype).eps * (1 + abs(shift / scale))
        chex.assert_trees_all_close(*ends, rtol=1e3 * rounding, atol=1e3 * rounding)


ADAM = optax.adam(1e-2)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e15])
@pytest.mark.parametrize("bias", [True, False])
def test_targets_that_are_constant_are_predicted(value, bias, standard_promotion):
    def fn(theta, inputs):
        return jnp.column_stack([features(theta, inputs), jnp.ones(len(inputs))])

    problem = vp.Problem(vp.Separable(fn, vp.dense(bias)), vp.least_squares())
    inputs, targets = make_data("", 2, dtype=np.float32)
    data = inputs, np.full_like(targets, value)
    method = vp.slimtrain(problem, ADAM, selection=vp.sgcv())
    solution = vp.fit(method, initial_theta(dtype=np.float32), data, epochs=10, batch_size=4)
    predictions = vp.predict(problem, solution.theta, solution.w, inputs)
    assert solution.status == vp.Status.BUDGET
    np.testing.assert_allclose(predictions, data[1], rtol=1e-6 if bias else 0.1)


def test_the_penalty_counts_as_much_as_in_the_objective(x64):
    """Its gradient is divided by the square of the unit as that of the loss is."""
    problem, method, theta, data = make()
    data = data[0], 1e3 * data[1]
    state, _ = method.step(method.init(theta, data), data)
    _, gradient = jax.value_and_grad(objective, 1)(problem, theta, state.w, data)
    moved = jax.tree.map(lambda a, b: (a - b) / RATE, theta, state.theta)
    scaled = jax.tree.map(lambda g: g / plain_units(data[1])[1], gradient)
    chex.assert_trees_all_close(moved, scaled, rtol=1e-8)


# States


class Learning(nnx.Module):
    """Batch norm and dropout: statistics, and keys of random numbers."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.hidden, self.norm = nnx.Linear(2, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, y):
        return self.head(self.drop(jnp.tanh(self.norm(self.hidden(y)))))


@pytest.mark.parametrize("optimizer", [ADAM, optax.inject_hyperparams(optax.adam)(1e-2)])
def test_a_state_is_kept_and_taken_up_again(optimizer, standard_promotion):
    """As arrays in a file, the run going on as if it had never stopped."""
    theta, model = vp.nnx.split(Learning())
    data = make_data("", 2, dtype=np.float32)
    method = vp.slimtrain(vp.Problem(model, vp.least_squares()), optimizer)
    options = {"batch_size": 4, "epochs": 2}
    solution = vp.fit(method, theta, data, **options)
    kept = pickle.dumps((solution.theta, solution.w, solution.state))
    theta, w, state = pickle.loads(kept)
    assert all(type(leaf) is type(w) for leaf in jax.tree.leaves(state))
    same_weights(state, theta, w)
    taken_up = solution._replace(theta=theta, w=w, state=state)
    resumed = vp.fit(method, theta, data, start=taken_up, batch_size=4, epochs=4)
    direct = vp.fit(method, model_theta(), data, batch_size=4, epochs=4)
    chex.assert_trees_all_close(resumed.theta, direct.theta, rtol=1e-5, atol=1e-6)
    predict = lambda found: vp.predict(found.problem, found.theta, found.w, data[0])  # noqa: E731
    np.testing.assert_allclose(predict(resumed), predict(direct), rtol=1e-4, atol=1e-5)
    fresh = vp.predict(method.problem, resumed.theta, resumed.w, data[0])
    assert np.abs(fresh - predict(resumed)).max() > 1e-2  # statistics have been learned


def model_theta():
    return vp.nnx.split(Learning())[0]


def test_other_weights_of_the_last_layer_may_be_put_in(x64):
    _, method, theta, data = make()
    w = np.random.default_rng(0).normal(size=(4, 2))
    np.testing.assert_allclose(method.init(theta, data).with_w(w).w, w, rtol=1e-14)


# Products


def precisions(fn, *args):
    """Those of all products and convolutions of a function, in jaxprs within jaxprs too."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                found.append(equation.params["precision"])
            inner = jax.tree.leaves(
                list(equation.params.values()),
                is_leaf=lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr"),
            )
            for value in inner:
                if hasattr(value, "eqns"):
                    walk(value)
                elif hasattr(value, "jaxpr"):
                    walk(value.jaxpr)

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


def full(precision):
    return precision == (jax.lax.Precision.HIGHEST,) * 2


TRANSPOSED = vp.conv_transpose((2, 2), stride=(2, 2))


@pytest.mark.parametrize("name", ["dense", "sgcv", "conv", "transposed"])
def test_every_product_is_in_full_precision_but_for_features_that_are_told(name, x64):
    rng = np.random.default_rng(0)
    images = name in ("conv", "transposed")
    if images:
        kernel = rng.normal(size=(3, 3, 1, 2))
        model = vp.Separable(
            lambda theta, y: jax.lax.conv_general_dilated(
                y, theta["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            vp.conv((2, 2)) if name == "conv" else TRANSPOSED,
        )
        size = 3 if name == "conv" else 8
        theta, data = {"kernel": kernel}, (np.ones((4, 4, 4, 1)), np.ones((4, size, size, 1)))
        of_features = 2  # forward, and reverse to the kernel
    else:
        model, theta, data = vp.Separable(features), initial_theta(), make_data("", 2)
        of_features = 8  # three forward; reverse to three weights and two states
    selection = vp.sgcv() if name == "sgcv" else None
    for chosen in ("highest", "default", None):
        method = vp.slimtrain(
            vp.Problem(model, vp.least_squares(), 1e-3),
            optax.sgd(0.1),
            selection=selection,
            feature_precision=chosen,
        )
        found = precisions(method.step, method.init(theta, data), data)
        less = [precision for precision in found if not full(precision)]
        assert len(less) == (0 if chosen == "highest" else of_features)
        assert len(found) > of_features


def test_those_of_slimtik_alone_and_of_the_transformation_are_too(x64):
    tikhonov = vp.slimtik()
    found = precisions(tikhonov.update, tikhonov.init(np.ones((3, 2))), np.ones((4, 3)), ONES)
    assert found and all(map(full, found))
    tx = vp.transforms.slimtik(optax.sgd(0.1))
    params = {"a": np.ones(3), "head": np.ones((3, 2))}
    update = functools.partial(tx.update, features=np.ones((4, 3)), targets=ONES)
    found = precisions(update, params, tx.init(params), params)
    assert found and all(map(full, found))


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
    state = method.init({"scale": np.ones((1, 1, 1, 2))}, data)
    plain, infos = method.epoch(state, data, batch_size=3)
    jitted, expected = jax.jit(functools.partial(method.epoch, batch_size=3))(state, data)
    chex.assert_trees_all_close(plain.theta, jitted.theta, rtol=1e-9)
    np.testing.assert_allclose(plain.w, jitted.w, rtol=1e-8)
    chex.assert_trees_all_close(infos, expected, rtol=1e-7, atol=1e-9)
    jax.effects_barrier()
    assert len(calls) == 4
    assert minibatches.steps_one_by_one(
        method.step.func, *method.epoch.args, state, data, batch_size=3
    )


def test_constant_features_leave_w_finite(x64):
    model = vp.Separable(lambda theta, inputs: 0 * inputs + theta["level"][None])
    method = vp.slimtrain(vp.Problem(model, vp.least_squares()), optax.sgd(0.1))
    data = make_data("", 2, SAMPLES)
    state = method.init({"level": np.ones(2)}, data)
    for batch in batches(data):
        state, info = method.step(state, batch)
        assert np.isfinite(state.w).all() and info.finite


def test_numbers_in_double_leave_single_precision_single(x64):
    number = np.float64(1e-7)
    ends = []
    for bound in (1e-7, number):
        _, method, theta, data = make(np.float32, lower_bound=bound, initial=10 * bound)
        state, _ = method.epoch(method.init(theta, data), data, batch_size=BATCH)
        ends.append(state)
    chex.assert_trees_all_equal(*ends)

    def step(alpha):
        problem = vp.Problem(vp.Separable(features), vp.least_squares(), alpha, alpha)
        method = vp.slimtrain(problem, optax.sgd(RATE), lower_bound=alpha)
        return method.step(method.init(theta, data), data)

    state, info = jax.eval_shape(step, number)
    single = {info.objective.dtype, state.tikhonov.w.dtype, state.objective.dtype}
    assert single == {jnp.dtype(np.float32)}


# Bad input


def no_least_squares():
    problem = vp.Problem(vp.Separable(features), vp.logistic(), w_penalty=1.0)
    vp.slimtrain(problem, optax.sgd(0.1))


ONES = np.ones((4, 2))


def with_data(inputs=ONES, targets=ONES, head=None, optimizer=None, key=None):
    problem = vp.Problem(vp.Separable(features, head), vp.least_squares())
    method = vp.slimtrain(problem, optimizer or optax.sgd(0.1))
    method.init(initial_theta(), (inputs, targets), key)


def with_batch(inputs=ONES, targets=ONES):
    problem = vp.Problem(vp.Separable(features), vp.least_squares())
    method = vp.slimtrain(problem, optax.sgd(0.1))
    state = method.init(initial_theta(), (ONES, ONES))
    jax.jit(method.step)(state, (inputs, targets))


def with_features_of_all():
    fixed = lambda theta, _: features(theta, np.ones((4, 2)))  # noqa: E731
    method = vp.slimtrain(vp.Problem(vp.Separable(fixed), vp.least_squares()), optax.sgd(0.1))
    method.step(method.init(initial_theta(), ((), ONES)), ((), ONES[:1]))


def of_batches(size):
    _, method, theta, data = make()
    method.epoch(method.init(theta, data), data, batch_size=size)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (no_least_squares, TypeError, "problem: expected the loss varprox.least_squares(), got"),
        (lambda: vp.slimtrain(3, optax.sgd(0.1)), TypeError, "problem: expected a varprox.Problem"),
        (
            lambda: vp.slimtrain(make()[0], 1e-3),
            TypeError,
            "optimizer: expected one of optax, such as optax.adam(1e-3), got 0.001",
        ),
        (
            lambda: make(feature_precision="low"),
            ValueError,
            "feature_precision: expected None or a name that jax.default_matmul_precision takes,",
        ),
        (
            lambda: with_batch(targets=np.ones(4)),
            ValueError,
            "targets: expected float64[4, 2], as `init` has seen, got float64[4]",
        ),
        (
            lambda: with_batch(targets=np.ones((4, 1))),
            ValueError,
            "targets: expected float64[4, 2], as `init` has seen, got float64[4, 1]",
        ),
        (
            lambda: with_batch(np.ones((4, 3))),
            ValueError,
            "inputs: expected float64[4, 2], as `init` has seen, got float64[4, 3]",
        ),
        (
            lambda: with_batch(np.ones((3, 2))),
            ValueError,
            "inputs: expected float64[4, 2], as `init` has seen, got float64[3, 2]",
        ),
        (
            lambda: with_batch(targets=np.ones((4, 2), np.float32)),
            ValueError,
            "targets: expected float64[4, 2], as `init` has seen, got float32[4, 2]",
        ),
        (
            lambda: with_batch({"a": ONES}),
            TypeError,
            "inputs: expected PyTreeDef(*), as `init` has seen, got PyTreeDef({'a': *})",
        ),
        (
            lambda: with_batch(np.ones((0, 2)), np.ones((0, 2))),
            ValueError,
            "targets: expected at least one sample, got shape (0, 2)",
        ),
        (
            with_features_of_all,
            ValueError,
            "features: expected those of 1 samples for a batch of as many, with predictions of",
        ),
        (
            lambda: with_data(optimizer=optax.lbfgs()),
            TypeError,
            "optimizer: expected one whose update takes a gradient, its state and theta alone, "
            "such as optax.adam(1e-3), got TypeError: scale_by_zoom_linesearch",
        ),
        (
            lambda: with_data(key=0),
            TypeError,
            "key: expected a random key, such as jax.random.key(0), got 0",
        ),
        (lambda: make(memory=-1), ValueError, "memory: expected an integer ≥ 0, got -1"),
        (lambda: make(selection=3), TypeError, "selection: expected one such as"),
        (lambda: make(selection=vp.sgcv), TypeError, "selection: expected one such as"),
        (lambda: of_batches(17), ValueError, "batch_size: expected at most 16, the number of"),
        (lambda: of_batches(0), ValueError, "batch_size: expected an integer ≥ 1, got 0"),
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
        method.init({"scale": np.ones(())}, data)
    assert str(caught.value) == (
        "targets: expected shape (3, 3, 3, 1), that of the predictions, got (3, 4, 4, 1)"
    )


def test_full_batch_methods_refuse_images(x64):
    model = vp.Separable(lambda theta, images: theta["scale"] * images, vp.conv((2, 2)))
    problem, data = vp.Problem(model, vp.least_squares()), (np.ones((3, 4, 4, 1)),) * 2
    with pytest.raises(TypeError) as caught:
        vp.gnvpro(problem).init({"scale": np.ones(())}, data)
    assert str(caught.value).startswith("problem: expected a model with a dense head;")
