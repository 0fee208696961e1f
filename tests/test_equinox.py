"""Equinox networks: taken apart, trained, put back; and those that cannot be are refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varprox as vp

KEY = jax.random.key(0)


def mlp(outputs=3, **options):
    return eqx.nn.MLP(2, outputs, 8, 2, activation=jnp.tanh, key=KEY, **options)


class Coupled(eqx.Module):
    """Several inputs, a layer of another name, dropout, and whole numbers that are not trained."""

    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    order: jax.Array
    out: dict

    def __init__(self):
        keys = jax.random.split(KEY)
        self.first = eqx.nn.Linear(3, 4, key=keys[0])
        self.dropout = eqx.nn.Dropout(0.5)
        self.order = jnp.array([2, 0, 1, 3])
        self.out = {"head": eqx.nn.Linear(4, 3, use_bias=False, key=keys[1])}

    def __call__(self, x):
        z = jnp.tanh(self.first(jnp.concatenate([x["place"], x["time"][None]])))
        return self.out["head"](self.dropout(z[self.order]))


def data(outputs=3):
    x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    return x, np.sin(x @ np.ones((2, outputs), np.float32))


def w_of(layer):
    return np.vstack([layer.weight.T, *([] if layer.bias is None else [layer.bias])])


def test_features_and_the_layer_are_the_network():
    net, (x, _) = mlp(), data()
    theta, model = vp.equinox.split(net)
    predictions = model.head.apply(model.features(theta, x), w_of(net.layers[-1]))
    np.testing.assert_allclose(predictions, jax.vmap(net)(x), rtol=1e-5, atol=1e-6)


def test_what_is_no_plain_stack_of_layers():
    net, (x, _) = Coupled(), data()
    inputs = {"place": x, "time": x[:, 0]}
    theta, model = vp.equinox.split(net, head="out.head")
    assert [leaf.shape for leaf in jax.tree.leaves(theta)] == [(4, 3), (4,)]
    predictions = model.head.apply(model.features(theta, inputs), w_of(net.out["head"]))
    plain = jax.vmap(eqx.nn.inference_mode(net))(inputs)
    np.testing.assert_allclose(predictions, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("net, head", [(mlp(), None), (Coupled(), "out.head")], ids=["mlp", "own"])
def test_a_trained_network_predicts_what_the_solution_does(net, head):
    x, targets = data()
    inputs = x if head is None else {"place": x, "time": x[:, 0]}
    theta, model = vp.equinox.split(net, head)
    problem = vp.Problem(model, vp.least_squares(), 1e-4, 1e-4)
    solution = vp.fit(vp.lbfgsvpro(problem), theta, (inputs, targets), epochs=3)
    objective = solution.history["objective"]
    assert objective[-1] < 0.9 * objective[0]
    trained = vp.equinox.merge(net, solution.theta, solution.w, head)
    assert jax.tree.structure(trained) == jax.tree.structure(net)
    predictions = vp.predict(problem, solution.theta, solution.w, inputs)
    found = jax.vmap(eqx.nn.inference_mode(trained))(inputs)
    np.testing.assert_allclose(found, predictions, rtol=1e-5, atol=1e-6)


def test_an_equal_network_compiles_nothing_anew():
    rows = jax.jit(lambda theta, model, x: model.rows(theta, x))
    for _ in range(2):
        theta, model = vp.equinox.split(mlp())
        rows(theta, model, data()[0])
    assert rows._cache_size() == 1


def test_a_solution_is_kept_and_loaded(tmp_path):
    theta, model = vp.equinox.split(mlp())
    problem = vp.Problem(model, vp.least_squares(), 1e-4, 1e-4)
    solution = vp.fit(vp.lbfgsvpro(problem), theta, data(), epochs=1)
    solution.save(tmp_path / "run")
    again = vp.load(tmp_path / "run", problem, theta=theta)
    assert jax.tree.structure(again.theta) == jax.tree.structure(theta)
    for one, other in zip(*map(jax.tree.leaves, (again.theta, solution.theta)), strict=True):
        np.testing.assert_array_equal(one, other)


def shared():
    """A network whose first layer is its last one, too."""
    layer = eqx.nn.Linear(3, 3, key=KEY)
    net = eqx.nn.Sequential([layer, eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(3, 3, key=KEY)])
    return eqx.tree_at(lambda net: net.layers[2].weight, net, layer.weight)


SPLITS = {
    "no module": (lambda: vp.equinox.split(jnp.tanh), TypeError, "net: expected an equinox.Module"),
    "no path": (
        lambda: vp.equinox.split(mlp(), "layers.7"),
        ValueError,
        "head: expected the attribute path of the last layer, got 'layers.7', where there is none",
    ),
    "no name": (lambda: vp.equinox.split(mlp(), 2), TypeError, "head: expected a path, such as"),
    "not linear": (
        lambda: vp.equinox.split(eqx.nn.Sequential([eqx.nn.Lambda(jnp.tanh)])),
        TypeError,
        "head: expected an equinox.nn.Linear at 'layers.0', got Lambda",
    ),
    "scalar": (
        lambda: vp.equinox.split(mlp("scalar")),
        TypeError,
        "head: expected an equinox.nn.Linear at 'layers.2', got one with a scalar output",
    ),
    "shared": (lambda: vp.equinox.split(shared()), ValueError, "head: expected a layer with weigh"),
    "theta": (
        lambda: vp.equinox.merge(mlp(), {"a": np.ones(2)}, np.ones((9, 3))),
        ValueError,
        "theta: expected arrays like",
    ),
    "w": (
        lambda: vp.equinox.merge(mlp(), vp.equinox.split(mlp())[0], np.ones((8, 3))),
        ValueError,
        r"w: expected shape \(9, 3\), got \(8, 3\)",
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_what_cannot_be_split_or_merged_is_refused(name):
    call, error, message = SPLITS[name]
    with pytest.raises(error, match=message):
        call()


class Twice(eqx.Module):
    first: eqx.nn.Linear
    out: eqx.nn.Linear

    def __call__(self, x):
        return self.out(self.out(self.first(x)))


class Never(eqx.Module):
    first: eqx.nn.Linear
    out: eqx.nn.Linear

    def __call__(self, x):
        return self.first(x)


def layer(outputs, inputs=2):
    return eqx.nn.Linear(inputs, outputs, key=KEY)


NETWORKS = {
    "tanh after": (mlp(final_activation=jnp.tanh), None, "whose last operation is its layer"),
    "relu after": (mlp(final_activation=jax.nn.relu), None, "whose last operation is its layer"),
    "twice": (Twice(layer(3), layer(3, 3)), "out", "calls it 2 times"),
    "never": (Never(layer(3), layer(3)), "out", "got one that never does"),
    "outputs": (mlp(2), None, "targets: expected 2 outputs"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_does_something_else_is_refused(name):
    net, head, message = NETWORKS[name]
    theta, model = vp.equinox.split(net, head)
    with pytest.raises(ValueError, match=message):
        vp.solve_w(vp.Problem(model, vp.least_squares()), theta, data())
