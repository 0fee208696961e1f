"""The networks against their formulas in NumPy, and the properties their constructions promise."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.integrate import solve_ivp

import varprox as vp
from varprox import networks

GAMMA = 0.1
STEPS, WIDTH, FINAL_TIME = 3, 4, 1.5
SIZES = {"in_features": 2, "width": WIDTH, "out_features": 3}
TIME = {"steps": STEPS, "final_time": FINAL_TIME}


def dense(**options):
    return networks.Dense((2, 4, 4, 3), rngs=nnx.Rngs(0), **options)


def resnet(**options):
    return networks.ResNet(**SIZES, **TIME | options, rngs=nnx.Rngs(0))


def antisymmetric(**options):
    settings = SIZES | TIME | {"gamma": GAMMA} | options
    return networks.AntisymmetricResNet(**settings, rngs=nnx.Rngs(0))


def hamiltonian(**options):
    return networks.HamiltonianNet(**SIZES, **TIME | options, rngs=nnx.Rngs(0))


NETWORKS = [dense, resnet, antisymmetric, hamiltonian]


def randomised(net, seed=1):
    """The network with every weight drawn anew, so that none is zero and no two are equal."""
    rng = np.random.default_rng(seed)
    weights = nnx.to_pure_dict(nnx.state(net, nnx.Param))

    def draw(array):
        return jnp.asarray(rng.normal(scale=0.7, size=array.shape), array.dtype)

    nnx.update(net, jax.tree.map(draw, weights))
    return net


def inputs():
    return np.random.default_rng(2).normal(size=(6, 2))


@nnx.jit
def outputs(net, y):
    return net(y)


# The formulas, one sample at a time


def linear(layer, y):
    return np.asarray(layer.kernel).T @ y + np.asarray(layer.bias)


def dense_formula(net, y, activation=np.tanh):
    for layer in net.layers:
        y = activation(linear(layer, y))
    return linear(net.head, y)


def resnet_formula(net, y, activation=np.tanh):
    z = np.tanh(linear(net.opening, y))
    for kernel, bias in zip(np.asarray(net.kernel), np.asarray(net.bias), strict=True):
        z = z + FINAL_TIME / STEPS * activation(kernel @ z + bias)
    return linear(net.head, z)


def antisymmetric_matrix(lower):
    t = np.zeros((WIDTH, WIDTH))
    t[np.tril_indices(WIDTH, -1)] = lower
    return t - t.T - GAMMA * np.eye(WIDTH)


def antisymmetric_formula(net, y):
    lower, bias = np.asarray(net.lower), np.asarray(net.bias)
    h = FINAL_TIME / STEPS

    def slope(node, z):
        return np.tanh(antisymmetric_matrix(lower[node]) @ z + bias[node])

    z = np.tanh(linear(net.opening, y))
    for j in range(STEPS):
        k1 = slope(2 * j, z)
        k2 = slope(2 * j + 1, z + h / 2 * k1)
        k3 = slope(2 * j + 1, z + h / 2 * k2)
        k4 = slope(2 * j + 2, z + h * k3)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return linear(net.head, z)


def hamiltonian_formula(net, y):
    h = FINAL_TIME / STEPS
    y = np.tanh(linear(net.opening, y))
    z = np.zeros(WIDTH)
    for kernel, bias in zip(np.asarray(net.kernel), np.asarray(net.bias), strict=True):
        z = z - h * np.tanh(kernel.T @ y + bias)
        y = y + h * np.tanh(kernel @ z + bias)
    return linear(net.head, y)


FORMULAS = {
    dense: dense_formula,
    resnet: resnet_formula,
    antisymmetric: antisymmetric_formula,
    hamiltonian: hamiltonian_formula,
}


@pytest.mark.parametrize("build", NETWORKS)
def test_outputs_are_those_of_the_formula(x64, build):
    net = randomised(build())
    expected = [FORMULAS[build](net, y) for y in inputs()]
    np.testing.assert_allclose(outputs(net, inputs()), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("build", [dense, resnet])
def test_activation_is_the_one_asked_for(x64, build):
    net = randomised(build(activation=jnp.sin))
    expected = [FORMULAS[build](net, y, np.sin) for y in inputs()]
    np.testing.assert_allclose(outputs(net, inputs()), expected, rtol=1e-13, atol=1e-13)


# Shapes and dtypes


@pytest.mark.parametrize("build", NETWORKS)
def test_leading_axes_are_samples(x64, build):
    net = randomised(build())
    y = inputs()
    flat = outputs(net, y)
    np.testing.assert_allclose(outputs(net, y.reshape(2, 3, 2)), flat.reshape(2, 3, 3), rtol=1e-13)
    np.testing.assert_allclose(outputs(net, y[0]), flat[0], rtol=1e-13)


@pytest.mark.parametrize("build", NETWORKS)
def test_weights_are_of_the_default_float(build):
    def dtypes(**options):
        def weights_and_outputs():
            net = build(**options)
            y = jnp.zeros((6, 2), net.head.kernel.dtype)
            return nnx.to_pure_dict(nnx.state(net)), net(y)

        return {str(leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(weights_and_outputs))}

    assert dtypes() == {"float32"}
    with jax.enable_x64(True):
        assert dtypes() == {"float64"}
        assert dtypes(param_dtype=jnp.float32) == {"float32"}


@pytest.mark.parametrize("build", NETWORKS)
def test_one_seed_gives_one_network(build):
    first, again = (jax.tree.leaves(nnx.state(build())) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


# The pieces


def test_tanh_has_the_derivatives_of_tanh(x64):
    x = np.linspace(-3, 3, 13)
    y = np.tanh(x)
    first = jax.grad(networks.tanh)
    np.testing.assert_allclose(networks.tanh(x), y, rtol=1e-14)
    np.testing.assert_allclose(jax.vmap(first)(x), 1 - y**2, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(jax.grad(first))(x), -2 * y * (1 - y**2), atol=1e-14)


def test_kernels_are_antisymmetric_but_for_gamma(x64):
    kernels = randomised(antisymmetric()).kernels()
    without = kernels + GAMMA * np.eye(WIDTH)[None]
    np.testing.assert_array_equal(without, -without.swapaxes(1, 2))
    np.testing.assert_allclose(np.linalg.eigvals(kernels).real, -GAMMA, rtol=1e-12)


def test_antisymmetric_network_starts_within_its_spectrum_and_constant_in_time(x64):
    kernels = np.asarray(antisymmetric(width=64).kernels())
    np.testing.assert_array_equal(kernels, np.broadcast_to(kernels[0], kernels.shape))
    # An antisymmetric matrix of n × n normal entries has its spectrum within ±2 i σ √n.
    assert 2.4 < np.abs(np.linalg.eigvals(kernels[0]).imag).max() < 3.3


def test_antisymmetric_flow_converges_with_order_four(x64):
    """The error against an accurate solution of the differential equation falls 16-fold."""
    rng = np.random.default_rng(3)
    l0, l1 = rng.normal(scale=0.2, size=(2, WIDTH * (WIDTH - 1) // 2))
    b0, b1 = rng.normal(scale=0.2, size=(2, WIDTH))
    start = rng.normal(size=(WIDTH, 10))

    def weights(t):
        return l0 + np.sin(2 * t) * l1, b0 + np.cos(t) * b1

    def slope(t, z):
        lower, bias = weights(t)
        z = z.reshape(start.shape)
        return np.tanh(antisymmetric_matrix(lower) @ z + bias[:, None]).ravel()

    exact = solve_ivp(slope, (0, FINAL_TIME), start.ravel(), "DOP853", rtol=1e-12, atol=1e-13)

    def error(steps):
        net = antisymmetric(steps=steps)
        nodes = [weights(t) for t in np.linspace(0, FINAL_TIME, 2 * steps + 1)]
        lower, bias = (jnp.stack(values) for values in zip(*nodes, strict=True))
        nnx.update(net, {"lower": lower, "bias": bias})
        return np.linalg.norm(net.flow(start).ravel() - exact.y[:, -1])

    errors = [error(steps) for steps in (16, 32, 64)]
    assert errors[-1] < 1e-7
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 4, atol=0.1)


def test_hamiltonian_flow_preserves_volume_and_can_be_undone(x64):
    net = randomised(hamiltonian())
    y, z = np.random.default_rng(4).normal(size=(2, WIDTH, 1))

    def flow(state):
        return jnp.concatenate(net.phase_flow(*jnp.split(state, 2)))

    jacobian = jax.jacobian(flow)(jnp.concatenate([y, z]))[:, 0, :, 0]
    assert np.abs(jacobian - np.eye(2 * WIDTH)).max() > 0.1
    np.testing.assert_allclose(np.linalg.det(jacobian), 1, rtol=1e-12)

    end_y, end_z = (np.asarray(state) for state in net.phase_flow(y, z))
    for kernel, bias in zip(np.asarray(net.kernel)[::-1], np.asarray(net.bias)[::-1], strict=True):
        end_y = end_y - FINAL_TIME / STEPS * np.tanh(kernel @ end_z + bias[:, None])
        end_z = end_z + FINAL_TIME / STEPS * np.tanh(kernel.T @ end_y + bias[:, None])
    np.testing.assert_allclose(end_y, y, atol=1e-13)
    np.testing.assert_allclose(end_z, z, atol=1e-13)


# Bad input


@pytest.mark.parametrize("sizes", [(), (3,), (2, 0, 3), (2, 4.0, 3)])
def test_dense_refuses_sizes(sizes):
    with pytest.raises(ValueError, match=r"^sizes.*: expected .*, got "):
        networks.Dense(sizes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("build", [resnet, antisymmetric, hamiltonian])
@pytest.mark.parametrize(
    "name, value", [("steps", 0), ("steps", 2.0), ("final_time", 0.0), ("final_time", np.inf)]
)
def test_time_grid_is_checked(build, name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a positive .*, got {value}"):
        build(**{name: value})


@pytest.mark.parametrize(
    "name, value", [("width", 1), ("gamma", -1.0), ("in_features", 0), ("min_steps", 0)]
)
def test_antisymmetric_network_refuses(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value}"):
        antisymmetric(**{name: value})


# The autoencoder


def autoencoder(**options):
    return networks.Autoencoder((8, 12), channels=2, latent=3, rngs=nnx.Rngs(0), **options)


def test_the_autoencoder_gives_back_images_through_a_narrow_code():
    """Its head is a transposed convolution, whose features are images of half the size."""
    net = autoencoder()
    images = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 12, 1)), jnp.float32)
    assert net(images).shape == images.shape
    assert net.encode(images).shape == (5, 3)
    theta, model = vp.nnx.split(net)
    z = model.features(theta, images)
    assert z.shape == (5, 4, 6, 2)
    net.eval()
    rows = model.head.rows(z) @ vp.nnx.initial_w(net)
    np.testing.assert_allclose(rows, net(images).reshape(-1, 1), atol=1e-5)


def test_the_autoencoder_is_the_composition_of_its_layers():
    """Written with PyTorch's conventions: taps by loops, batch norm by its formula."""
    net = autoencoder()
    images = np.random.default_rng(0).normal(size=(2, 8, 12, 1)).astype(np.float32)

    def convolve(layer, x):
        kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = x.shape[1] // 2, x.shape[2] // 2
        taps = [
            padded[:, i : i + 2 * height : 2, j : j + 2 * width : 2] @ kernel[i, j]
            for i in range(4)
            for j in range(4)
        ]
        return sum(taps) + bias

    def spread(layer, x):
        kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
        batch, height, width, _ = x.shape
        y = np.zeros((batch, 2 * height + 2, 2 * width + 2, kernel.shape[-1]))
        for i in range(4):
            for j in range(4):  # flax's taps run backwards
                y[:, i : i + 2 * height : 2, j : j + 2 * width : 2] += x @ kernel[3 - i, 3 - j]
        return y[:, 1:-1, 1:-1] + bias

    def normalise(x):
        return (x - x.mean(axis=(0, 1, 2))) / np.sqrt(x.var(axis=(0, 1, 2)) + 1e-5)

    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    first, second = net.narrowing
    z = convolve(second, relu(convolve(first, images))).reshape(2, -1)
    codes = [linear(net.encoded, y) for y in z]
    z = np.stack([linear(net.decoded, code) for code in codes]).reshape(2, 2, 3, 4)
    z = normalise(relu(spread(net.widening, normalise(z))))
    np.testing.assert_allclose(net(images), spread(net.head, z), rtol=1e-3, atol=1e-4)


def test_the_autoencoder_trains_in_the_default_float(x64, standard_promotion):
    """Its statistics too, so that a step keeps every dtype."""
    theta, model = vp.nnx.split(autoencoder())
    images = np.random.default_rng(0).normal(size=(4, 8, 12, 1))
    method = vp.slimtrain(vp.Problem(model, vp.least_squares()), optax.sgd(1e-3))
    state = method.init(theta, (images, images))
    after, info = method.step(state, (images, images))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    floats = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {str(x.dtype) for x in floats} == {"float64"}
    again, _ = method.step(after, (images, images))
    assert info.finite and again.objective < after.objective


def test_the_autoencoder_starts_as_pytorch_does():
    """Uniform within ±1/√n, n the inputs of an output, or outputs times taps if transposed."""
    net = networks.Autoencoder((28, 28), rngs=nnx.Rngs(0))
    bounds = {
        0.25: (net.narrowing[0], net.head),
        1 / 16: (net.narrowing[1], net.widening),
        1 / 1568**0.5: (net.encoded,),
        1 / 50**0.5: (net.decoded,),
    }
    for bound, layers in bounds.items():
        for layer in layers:
            largest = np.abs(layer.kernel[...]).max()
            assert 0.9 * bound < largest <= bound
            assert np.abs(layer.bias[...]).max() <= bound
    count = sum(x.size for x in jax.tree.leaves(nnx.state(net, nnx.Param)))
    assert count == 16 * 17 + 32 * 257 + 1569 * 50 + 51 * 1568 + 64 + 32 * 256 + 16 + 32 + 257


@pytest.mark.parametrize("size", [(28,), (28, 30), (0, 4)])
def test_the_autoencoder_refuses_sizes(size):
    with pytest.raises(ValueError, match="size: expected two positive multiples of 4"):
        networks.Autoencoder(size, rngs=nnx.Rngs(0))


def at_times(build, steps, piecewise=False):
    """θ of a network whose flow's weights are values of functions of time: smooth ones, or
    parabolas that start anew in each of two halves of the time."""
    theta, model = vp.nnx.split(build(steps=steps))
    times = np.linspace(0, 1, len(theta["bias"]), endpoint="lower" in theta)
    rng = np.random.default_rng(3)

    def values(leaf):
        a, b, c = rng.normal(scale=0.5, size=(3, *leaf.shape[1:]))
        t = times.reshape(-1, *(1,) * (leaf.ndim - 1))
        if piecewise:
            return jnp.asarray(a + abs(t - 0.5) * b + abs(t - 0.5) * t * c)
        return jnp.asarray(a + b * np.sin(3 * t) + c * np.cos(4 * t))

    flow = {name: values(theta[name]) for name in sorted(theta) if name != "opening"}
    return theta | flow, model


@pytest.mark.parametrize(
    "build, piecewise, order",
    [
        (resnet, False, 1),
        (hamiltonian, False, 1),
        (antisymmetric, False, 4),
        (antisymmetric, True, 4),
    ],
)
def test_prolongation_changes_the_outputs_by_its_order(build, piecewise, order, x64):
    inputs = np.random.default_rng(0).normal(size=(10, 2))
    changes = []
    for steps in (16, 32, 64):
        theta, model = at_times(build, steps, piecewise)
        finer = vp.networks.prolong(theta)
        shapes = [x.shape for x in jax.tree.leaves(at_times(build, 2 * steps)[0])]
        assert [x.shape for x in jax.tree.leaves(finer)] == shapes
        assert finer["opening"] is theta["opening"]
        change = model.features(finer, inputs) - model.features(theta, inputs)
        changes.append(np.linalg.norm(change))
    np.testing.assert_allclose(-np.diff(np.log2(changes)), order, atol=0.2)


def test_prolongation_of_parabolas_is_exact(x64):
    theta, _ = at_times(antisymmetric, 4, piecewise=True)
    finer, _ = at_times(antisymmetric, 8, piecewise=True)
    found = vp.networks.prolong(theta)
    np.testing.assert_allclose(found["lower"], finer["lower"], atol=1e-14)
    np.testing.assert_allclose(found["bias"], finer["bias"], atol=1e-14)


@pytest.mark.parametrize("steps, min_steps", [(2, 8), (3, 10), (1, 2)])
def test_prolongation_up_to_the_states_steps_changes_nothing(steps, min_steps, x64):
    inputs = np.random.default_rng(0).normal(size=(10, 2))
    build = partial(antisymmetric, min_steps=min_steps)
    theta, model = at_times(build, steps, piecewise=True)
    expected = model.features(theta, inputs)
    while len(theta["bias"]) < 2 * min_steps + 1:
        theta = vp.networks.prolong(theta)
        np.testing.assert_allclose(model.features(theta, inputs), expected, atol=1e-13)
    # Without `min_steps`, these weights are in as many steps of the states.
    coarse = at_times(antisymmetric, steps)[1]
    np.testing.assert_allclose(coarse.features(theta, inputs), expected, atol=1e-13)
    assert np.abs(coarse.features(at_times(build, steps)[0], inputs) - expected).max() > 1e-4


@pytest.mark.parametrize("theta", [{"layers": {}}, jnp.ones(3), {"opening": 1, "bias": 2}])
def test_what_has_no_time_is_not_prolonged(theta):
    with pytest.raises(ValueError, match=r"^theta: expected the weights of a ResNet"):
        vp.networks.prolong(theta)
