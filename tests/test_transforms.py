"""The contract of a gradient transformation, run over both of ours; and what each computes."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas
import pytest
from problems import features, initial_theta, make_data

import varprox as vp

RATE = 0.1
PROBLEM = vp.Problem(vp.Separable(features), vp.least_squares(), 1e-2, 1e-2)


def data(dtype=np.float64):
    return make_data("", 2, dtype=dtype)


def params_with_head(dtype=np.float64):
    """θ and a last layer in flax's layout, a level down."""
    rng = np.random.default_rng(3)
    last = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    last = jax.tree.map(lambda x: x.astype(dtype), last)
    return {"body": initial_theta(dtype=dtype), "net": {"head": last}}


def loss(params, batch):
    inputs, targets = batch
    last = params["net"]["head"]
    predictions = features(params["body"], inputs) @ last["kernel"] + last["bias"][None]
    return 0.5 * jnp.sum((predictions - targets) ** 2) / len(targets)


def slimtik(optimizer=None, **options):
    optimizer = optax.sgd(RATE) if optimizer is None else optimizer
    return vp.transforms.slimtik(optimizer, "net.head", memory=1, **options)


def slimtik_step(tx, params, state, batch):
    gradients = jax.grad(loss)(params, batch)
    extra = {"features": features(params["body"], batch[0]), "targets": batch[1]}
    updates, state = tx.update(gradients, state, params, **extra)
    return optax.apply_updates(params, updates), state


def gnvpro(dtype=np.float64, **options):
    return vp.transforms.gnvpro(PROBLEM, data(dtype), curvature="dense", **options)


def gnvpro_step(tx, params, state, batch):
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zero, state, params, data=batch)
    return optax.apply_updates(params, updates), state


CASES = {
    "slimtik": (lambda dtype: slimtik(), slimtik_step, params_with_head),
    "gnvpro": (gnvpro, gnvpro_step, lambda dtype: initial_theta(dtype=dtype)),
}
cases = pytest.mark.parametrize("name", CASES)


def case(name, dtype=np.float64):
    make, step, params = CASES[name]
    return make(dtype), step, jax.tree.map(jnp.asarray, params(dtype))


@cases
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_state_and_updates_keep_structure_shapes_and_dtypes(name, dtype):
    with jax.enable_x64(dtype is np.float64):
        tx, step, params = case(name, dtype)
        state = tx.init(params)
        new, after = step(tx, params, state, data(dtype))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        chex.assert_trees_all_equal_shapes_and_dtypes(params, new)
        chex.assert_trees_all_equal_structs(params, new)


@cases
def test_update_under_jit_equals_without(name, x64):
    tx, step, params = case(name)
    state = tx.init(params)
    jitted = jax.jit(functools.partial(step, tx))
    for _ in range(2):
        plain = step(tx, params, state, data())
        under_jit = jitted(params, state, data())
        chex.assert_trees_all_close(under_jit[0], plain[0], rtol=1e-8, atol=1e-10)
        params, state = plain


@cases
def test_it_scans_and_maps(name, x64):
    tx, step, params = case(name)

    def run(params):
        def body(carry, _):
            return step(tx, *carry, data()), None

        return jax.lax.scan(body, (params, tx.init(params)), None, length=2)[0][0]

    scanned = run(params)
    state, stepwise = tx.init(params), params
    for _ in range(2):
        stepwise, state = step(tx, stepwise, state, data())
    chex.assert_trees_all_close(scanned, stepwise, rtol=1e-7, atol=1e-9)
    both = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), params)
    mapped = jax.vmap(run)(both)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], mapped), scanned, rtol=1e-7, atol=1e-9)


@cases
def test_it_survives_a_checkpoint(name, x64):
    """State and parameters as arrays of NumPy, and back."""
    tx, step, params = case(name)
    params, state = step(tx, params, tx.init(params), data())
    expected, _ = step(tx, params, state, data())
    leaves, structure = jax.tree.flatten((params, state))
    stored = pickle.dumps([np.asarray(leaf) for leaf in leaves])
    params, state = structure.unflatten(map(jnp.asarray, pickle.loads(stored)))
    chex.assert_trees_all_close(step(tx, params, state, data())[0], expected, rtol=1e-12)


@cases
def test_it_composes_with_chain(name, x64):
    """A chain that halves the updates halves the step, and the next one starts from there."""
    tx, step, params = case(name)
    chained = optax.chain(tx, optax.scale(0.5))
    whole, _ = step(tx, params, tx.init(params), data())
    half, state = step(chained, params, chained.init(params), data())
    moved = jax.tree.map(lambda a, b: 0.5 * (a + b), params, whole)
    chex.assert_trees_all_close(half, moved, rtol=1e-9, atol=1e-12)
    after, _ = step(chained, half, state, data())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


# slimTik


def start(w, rows, targets, bias):
    """What slimTik begins from: W about the mean of the targets, or zero if that predicts worse."""
    centre = targets.reshape(-1, w.shape[1]).mean(axis=0) * bias
    w = np.asarray(w) - np.vstack([np.zeros_like(w[1:]), centre])
    centred = targets.reshape(-1, w.shape[1]) - centre
    worse = np.sum((rows @ w - centred) ** 2) > np.sum(centred**2)
    return centre, np.zeros_like(w) if worse else w


@pytest.mark.parametrize("good", [False, True])
def test_theta_takes_the_optimizer_and_the_head_slimtik(good, x64):
    """From the second batch on, by gradients in the units of the targets so far."""
    params, (inputs, targets) = params_with_head(), data()
    rows = np.column_stack([features(params["body"], inputs), np.ones(16)])
    if good:
        w = np.linalg.lstsq(rows, targets)[0]
        params["net"]["head"] = {"kernel": w[:-1], "bias": w[-1]}
    tx = slimtik(initial=0.3)
    reference = vp.slimtik(1, vp.proportional(), initial=0.3)
    last = params["net"]["head"]
    w = np.vstack([last["kernel"], last["bias"]])
    centre, begin = start(w, rows[:6], targets[:6], bias=True)
    assert begin.any() == good
    state, plain, squares = tx.init(params), reference.init(begin), []
    for k in (0, 5, 10):
        batch = inputs[k : k + 6], targets[k : k + 6]
        squares.append(np.mean((batch[1] - centre) ** 2))
        gradient = jax.grad(loss)(params, batch)["body"]
        rate = 0 if k == 0 else RATE / np.mean(squares)
        body = jax.tree.map(lambda x, g: x - rate * g, params["body"], gradient)  # noqa: B023
        rows = np.column_stack([features(params["body"], batch[0]), np.ones(6)])
        plain, _ = reference.update(plain, rows / 6**0.5, (batch[1] - centre) / 6**0.5)
        params, state = slimtik_step(tx, params, state, batch)
        chex.assert_trees_all_close(params["body"], body, rtol=1e-10)
        last = params["net"]["head"]
        np.testing.assert_allclose(last["kernel"], plain.w[:-1], rtol=1e-8)
        np.testing.assert_allclose(last["bias"], plain.w[-1] + centre, rtol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_may_be_an_array_or_a_kernel_alone(bias, x64):
    rng = np.random.default_rng(0)
    w, z, c = rng.normal(size=(3, 2)), rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    params = {"body": np.ones(2), "head": w if bias else {"kernel": w}}
    tx = vp.transforms.slimtik(optax.sgd(0.1), layer=vp.dense(bias=False))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params, features=z, targets=c)
    reference = vp.slimtik(selection=vp.proportional())
    _, begin = start(w, z, c, bias=False)
    expected, _ = reference.update(reference.init(begin), z / 6**0.5, c / 6**0.5)
    found = updates["head"] if bias else updates["head"]["kernel"]
    np.testing.assert_allclose(w + found, expected.w, rtol=1e-9)


def test_a_convolutional_head_in_the_layout_of_flax(x64):
    rng = np.random.default_rng(0)
    layer = vp.conv_transpose((4, 4), stride=(2, 2), padding=(1, 1))
    kernel, bias = rng.normal(size=(4, 4, 3, 2)), rng.normal(size=2)
    z, c = rng.normal(size=(5, 3, 3, 3)), rng.normal(size=(5, 6, 6, 2))
    params = {"head": {"kernel": kernel, "bias": bias}}
    tx = vp.transforms.slimtik(optax.sgd(0.1), layer=layer)
    updates, state = tx.update(params, tx.init(params), params, features=z, targets=c)
    new = optax.apply_updates(params, updates)["head"]
    reference = vp.slimtik(selection=vp.proportional())
    rows = np.asarray(layer.rows(z))
    centre, begin = start(layer.pack(kernel, bias), rows, c, bias=True)
    plain = rows / 5**0.5, (c.reshape(-1, 2) - centre) / 5**0.5
    expected, _ = reference.update(reference.init(begin), *plain)
    found = np.asarray(layer.pack(new["kernel"], new["bias"]))
    np.testing.assert_allclose(state.tikhonov.w, expected.w, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(found[:-1], expected.w[:-1], rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(found[-1], expected.w[-1] + centre, rtol=1e-7)


def test_it_composes_with_multi_transform_schedules_and_injected_rates(x64):
    params = jax.tree.map(jnp.asarray, params_with_head())
    plain, _ = slimtik_step(slimtik(), params, slimtik().init(params), data())
    labels = {"body": "rest", "net": "last"}
    split = optax.multi_transform({"last": slimtik(), "rest": optax.sgd(RATE)}, labels)
    found, _ = slimtik_step(split, params, split.init(params), data())
    chex.assert_trees_all_close(found["net"], plain["net"], rtol=1e-9)
    gradient = jax.grad(loss)(params, data())["body"]
    body = jax.tree.map(lambda x, g: x - RATE * g, params["body"], gradient)
    chex.assert_trees_all_close(found["body"], body, rtol=1e-9)

    def twice(tx):
        once, state = slimtik_step(tx, params, tx.init(params), data())
        return slimtik_step(tx, once, state, data())[0]

    scheduled = slimtik(optax.sgd(optax.constant_schedule(RATE)))
    chex.assert_trees_all_close(twice(scheduled), twice(slimtik()), rtol=1e-9)


UNITS = [(np.float64, 1e-6, 0), (np.float64, 1e10, 1e14), (np.float32, 2.0**-33, 0)]


@pytest.mark.parametrize("dtype, scale, offset", [*UNITS, (np.float32, 2.0**33, 0)])
def test_the_units_of_targets_make_no_difference_to_theta(dtype, scale, offset, standard_promotion):
    """With Adam from a W drawn at random, which fits targets in none of these units."""
    with jax.enable_x64(dtype is np.float64):
        tx, ends = slimtik(optax.adam(1e-2)), []
        step = jax.jit(functools.partial(slimtik_step, tx))
        for factor, shift in ((1, 0), (scale, offset)):
            inputs, targets = data(dtype)
            targets = (factor * targets + shift).astype(dtype)
            params = params_with_head(dtype)
            zero = jax.tree.map(lambda leaf: 0 * leaf, params["net"])
            params = jax.tree.map(jnp.asarray, params | {"net": zero})
            state = tx.init(params)
            for k in (0, 8) * 4:
                params, state = step(params, state, (inputs[k : k + 8], targets[k : k + 8]))
            ends.append((params["body"], params["net"]["head"]["kernel"] / factor))
        tolerance = 1e-6 if dtype is np.float64 else 1e-5
        chex.assert_trees_all_close(*ends, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_targets_that_are_constant_are_predicted(value, x64):
    params, (inputs, targets) = params_with_head(), data()
    tx = slimtik()
    state = tx.init(params)
    for _ in range(3):
        params, state = slimtik_step(tx, params, state, (inputs, np.full_like(targets, value)))
    chex.assert_trees_all_close(params["body"], initial_theta(), rtol=1e-12)
    np.testing.assert_allclose(params["net"]["head"]["kernel"], 0, atol=1e-12)
    np.testing.assert_allclose(params["net"]["head"]["bias"], value, atol=1e-12)


@pytest.mark.parametrize(
    "features, targets, message",
    [
        (np.ones((4, 3)), np.ones(4), "targets: expected shape (4, 2), that of the predictions, "),
        (np.ones((4, 3)), np.ones((4, 1)), "targets: expected shape (4, 2), that of the"),
        (np.ones((4, 3)), np.ones((3, 2)), "targets: expected shape (4, 2), that of the"),
        (np.ones((4, 2)), np.ones((4, 2)), "features: expected as many as the last layer takes, 4"),
    ],
)
def test_batches_that_do_not_fit_the_head_are_refused(features, targets, message, x64):
    params = params_with_head()
    with pytest.raises(ValueError) as caught:
        slimtik().update(params, slimtik().init(params), params, features=features, targets=targets)
    assert str(caught.value).startswith(message)


ONES, TWO = np.ones((4, 3)), np.ones((4, 2))


@pytest.mark.parametrize(
    "batch, error, message",
    [
        ({"features": ONES.tolist()}, TypeError, "features: expected arrays of NumPy or JAX, got"),
        ({"features": ONES[0]}, ValueError, "features: expected those of a batch, (batch, …), got"),
        ({"targets": pandas.DataFrame(TWO)}, TypeError, "targets: expected arrays of NumPy or JAX"),
        ({"state": None}, TypeError, "state: expected one of transforms.slimtik, got NoneType"),
        ({"gradients": None}, ValueError, "gradients: expected arrays like gradients['body']['la"),
    ],
)
def test_what_is_no_batch_and_no_state_is_refused(batch, error, message, x64):
    tx, params = slimtik(), params_with_head()
    given = {"gradients": params, "state": tx.init(params), "features": ONES, "targets": TWO}
    with pytest.raises(error) as caught:
        tx.update(params=params, **given | batch)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"optimizer": 1e-3},
            "optimizer: expected one of optax, such as optax.adam(1e-3), got 0.0",
        ),
        ({"optimizer": optax.adam}, "optimizer: expected one of optax, such as optax.adam(1e-3)"),
        ({"head": 2}, "head: expected a path, such as 'decoder.out', got 2"),
        ({"layer": "dense"}, "layer: expected varprox.dense() or varprox.conv(…), got 'dense'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(TypeError) as caught:
        vp.transforms.slimtik(**{"optimizer": optax.sgd(0.1)} | options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ["features", "targets"])
def test_batches_of_another_dtype_are_refused(name, x64):
    params = params_with_head(np.float32)
    batch = {"features": np.ones((4, 3), np.float32), "targets": np.ones((4, 2), np.float32)}
    batch[name] = batch[name].astype(np.float64)
    with pytest.raises(TypeError) as caught:
        slimtik().update(params, slimtik().init(params), params, **batch)
    assert str(caught.value).startswith(f"{name}: expected dtype float32, that of W, got float64")


def test_a_last_layer_in_half_precision_is_refused():
    with pytest.raises(TypeError, match="w: expected float32 or float64, got float16"):
        slimtik().init(params_with_head(np.float16))


def test_numbers_can_be_injected(x64, standard_promotion):
    """ΣΛ's bound as a hyperparameter, the memory being static, and the rate of the optimizer."""
    params = jax.tree.map(jnp.asarray, params_with_head())
    inject = optax.inject_hyperparams(vp.transforms.slimtik, static_args=("memory", "head"))
    tx = inject(optax.sgd(RATE), "net.head", memory=1, lower_bound=1e-7)
    state = tx.init(params)
    step = jax.jit(functools.partial(slimtik_step, tx))
    plain, _ = slimtik_step(slimtik(), params, slimtik().init(params), data())
    chex.assert_trees_all_close(step(params, state, data())[0], plain, rtol=1e-8)
    state.hyperparams["lower_bound"] = jnp.asarray(1e3)
    found, _ = step(params, state, data())
    assert np.abs(found["net"]["head"]["kernel"] - plain["net"]["head"]["kernel"]).max() > 0.1


def test_a_batch_that_is_not_finite_moves_nothing(x64):
    params = params_with_head()
    tx = slimtik(optax.sgd(RATE, momentum=0.9))
    params, state = slimtik_step(tx, params, tx.init(params), data())
    inputs, targets = data()
    for batch in ((inputs * np.nan, targets), (inputs, targets * np.nan)):
        chex.assert_trees_all_equal(slimtik_step(tx, params, state, batch), (params, state))


def test_it_trains_a_flax_module(standard_promotion):
    """The loop of a user of nnx, whose parameters are an `nnx.State`."""
    nnx = pytest.importorskip("flax.nnx")
    net = vp.networks.Dense((2, 8, 2), rngs=nnx.Rngs(0))
    tx = vp.transforms.slimtik(optax.adam(1e-2), selection=vp.sgcv())
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    inputs, targets = data(np.float32)

    @nnx.jit
    def step(net, optimizer):
        def loss(net):
            return 0.5 * jnp.mean(jnp.sum((net(inputs) - targets) ** 2, axis=1))

        value, gradients = nnx.value_and_grad(loss)(net)
        optimizer.update(net, gradients, features=net.features(inputs), targets=targets)
        return value

    values = [float(step(net, optimizer)) for _ in range(20)]
    w = np.linalg.lstsq(
        np.column_stack([net.features(inputs), np.ones(16)]), np.asarray(targets), rcond=None
    )[0]
    residual = np.column_stack([net.features(inputs), np.ones(16)]) @ w - targets
    assert values[-1] < 0.7 * values[0]
    assert values[-1] < 1.3 * 0.5 * np.mean(np.sum(residual**2, axis=1))


@pytest.mark.parametrize("head", ["last", "net", "body"])
def test_a_path_that_is_no_last_layer_is_refused(head):
    params = params_with_head(np.float32)
    with pytest.raises(ValueError) as caught:
        vp.transforms.slimtik(optax.sgd(0.1), head).init(params)
    assert str(caught.value).startswith("head: expected the path of 'kernel' and 'bias', or of an")
    assert repr(head) in str(caught.value)


# GNvpro


def test_updates_are_the_steps_of_the_method(x64):
    method = vp.gnvpro(PROBLEM, curvature="dense")
    tx, params = gnvpro(), initial_theta()
    state, plain = tx.init(params), method.init(params, data())
    for _ in range(3):
        params, state = gnvpro_step(tx, params, state, data())
        plain, _ = method.step(plain, data())
        chex.assert_trees_all_close(params, plain.theta, rtol=1e-9)
        np.testing.assert_allclose(state.w, plain.w, rtol=1e-8)
        assert state.work_units == plain.work_units


def test_parameters_moved_by_another_are_taken_as_they_are(x64):
    """The objective is that at the new place, not that of the method's own last step."""
    tx = gnvpro()
    _params, state = gnvpro_step(tx, initial_theta(), tx.init(initial_theta()), data())
    away = initial_theta(seed=5)
    _, state = gnvpro_step(tx, away, state, data())
    fresh, _ = vp.reduced_objective(PROBLEM)(away, data())
    assert state.objective < fresh
    plain, _ = vp.gnvpro(PROBLEM, curvature="dense").step(tx.init(away), data())
    assert state.objective < 2 * plain.objective


def test_a_move_by_another_teaches_no_curvature(x64):
    """Its gradients do not belong to the method's own last step."""
    tx = gnvpro()
    params, state = gnvpro_step(tx, initial_theta(), tx.init(initial_theta()), data())
    _, after = gnvpro_step(tx, params, state, data())
    _, moved = gnvpro_step(tx, initial_theta(seed=5), state, data())
    assert np.any(after.form.secant.matrix != 0) and np.all(moved.form.secant.matrix == 0)


def test_states_and_parameters_of_another_are_refused(x64):
    tx, theta = gnvpro(), initial_theta()
    for state in (None, optax.sgd(RATE, 0.9).init(theta)):
        with pytest.raises(TypeError, match=r"^state: expected one of gnvpro, got"):
            tx.update(None, state, theta)
    with pytest.raises(ValueError, match=r"^params: expected arrays like params\['layers'\]"):
        tx.update(None, tx.init(theta), {"layers": theta["layers"]})


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_asked_for(name, x64):
    tx, _, params = case(name)
    extra = {"features": np.ones((4, 3)), "targets": np.ones((4, 2))}
    with pytest.raises(ValueError, match="params: expected"):
        tx.update(params, tx.init(params), **(extra if name == "slimtik" else {}))
