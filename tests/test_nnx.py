"""A network taken apart computes what it did whole, and so does one put back together."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import varprox as vp
from varprox import networks
from varprox.nnx import initial_w, merge, split
from varprox.problem.data import check_data


class Nested(nnx.Module):
    """A head without bias inside another module, and state that is no weight."""

    def __init__(self, rngs):
        linear = {"param_dtype": jnp.result_type(float), "rngs": rngs}
        self.mean = nnx.BatchStat(jnp.array([0.5, -0.5]))
        self.decoder = nnx.Dict(
            hidden=nnx.Linear(2, 4, **linear), out=nnx.Linear(4, 3, use_bias=False, **linear)
        )

    def __call__(self, y):
        return self.decoder.out(jnp.tanh(self.decoder.hidden(y - self.mean[None])))


class Tied(nnx.Module):
    """A network whose head's weights are used before the head too."""

    def __init__(self, rngs):
        self.head = nnx.Linear(2, 2, rngs=rngs)
        self.first = nnx.Linear(2, 2, rngs=rngs)
        self.first.kernel = self.head.kernel

    def __call__(self, y):
        return self.head(jnp.tanh(self.first(y)))


class LowRank(nnx.Module):
    """A network whose head is an `nnx.Linear` by name, and adds something to it."""

    def __init__(self, rngs):
        self.head = nnx.LoRALinear(2, 2, lora_rank=1, rngs=rngs)

    def __call__(self, y):
        return self.head(y)


def dense(rngs):
    return networks.Dense((2, 4, 4, 3), rngs=rngs)


def flow(rngs):
    return networks.AntisymmetricResNet(2, 4, 3, steps=2, final_time=1.0, rngs=rngs)


def sequential(rngs):
    linear = {"param_dtype": jnp.result_type(float), "rngs": rngs}
    return nnx.Sequential(nnx.Linear(2, 4, **linear), jnp.tanh, nnx.Linear(4, 3, **linear))


NETWORKS = [
    pytest.param(dense, "head", id="dense"),
    pytest.param(flow, "head", id="flow"),
    pytest.param(sequential, "head", id="sequential"),
    pytest.param(sequential, "layers.2", id="path in a list"),
    pytest.param(Nested, "decoder.out", id="nested"),
]


def inputs():
    return jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.result_type(float))


def drawn_like(tree, seed=1):
    """A tree of the same shapes and dtypes with new numbers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), tree)


@jax.jit
def predict(model, theta, w, y):
    return model.rows(theta, y) @ w


# Taking apart and putting back


@pytest.mark.parametrize("build, head", NETWORKS)
def test_parts_compute_what_the_network_does(x64, build, head):
    net = build(nnx.Rngs(0))
    theta, model = split(net, head)
    w = initial_w(net, head)
    np.testing.assert_allclose(predict(model, theta, w, inputs()), net(inputs()), rtol=1e-13)


@pytest.mark.parametrize("build, head", NETWORKS)
def test_merged_network_computes_what_the_parts_do(x64, build, head):
    net = build(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(net))
    theta, model = split(net, head)
    theta, w = drawn_like(theta), drawn_like(initial_w(net, head))
    merged = merge(net, theta, w, head)
    assert type(merged) is type(net)
    np.testing.assert_allclose(merged(inputs()), predict(model, theta, w, inputs()), rtol=1e-13)
    chex.assert_trees_all_equal(split(merged, head)[0], theta)
    chex.assert_trees_all_equal(initial_w(merged, head), w)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(net)), before)


@pytest.mark.parametrize("build, head", NETWORKS)
def test_theta_is_all_weights_but_the_head_as_plain_arrays(build, head):
    net = build(nnx.Rngs(0))
    theta, _ = split(net, head)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (theta, initial_w(net, head), nnx.state(net, nnx.Param))
    ]
    assert sizes[0] + sizes[1] == sizes[2]
    containers = [theta]
    while containers:
        node = containers.pop()
        assert type(node) is dict or isinstance(node, jax.Array)
        containers.extend(node.values() if type(node) is dict else ())


def test_state_that_is_no_weight_is_used_and_stays(x64):
    net = Nested(nnx.Rngs(0))
    theta, model = split(net, "decoder.out")
    z = model.features(theta, inputs())
    expected = np.tanh(np.asarray(net.decoder.hidden(inputs() - jnp.array([[0.5, -0.5]]))))
    np.testing.assert_allclose(z, expected, rtol=1e-13)
    merged = merge(net, theta, initial_w(net, "decoder.out"), "decoder.out")
    np.testing.assert_array_equal(merged.mean[...], [0.5, -0.5])


@pytest.mark.parametrize("build, head", NETWORKS)
def test_everything_follows_the_dtype_of_the_weights(build, head):
    def dtypes():
        net = build(nnx.Rngs(0))
        theta, model = split(net, head)
        w = initial_w(net, head)
        z = jax.eval_shape(model.features, theta, inputs())
        leaves = jax.tree.leaves((theta, w, z, nnx.state(merge(net, theta, w, head))))
        return {str(leaf.dtype) for leaf in leaves}

    assert dtypes() == {"float32"}
    with jax.enable_x64(True):
        assert dtypes() == {"float64"}


# Convolutional heads


class Images(nnx.Module):
    """One layer, its own head: what comes before it is the input, scaled."""

    def __init__(self, layer):
        self.scale = nnx.Param(jnp.full((), 2.0, layer.kernel[...].dtype))
        self.head = layer
        self.after = lambda out: out

    def __call__(self, images):
        return self.after(self.head(self.scale[...] * images))


def convolution(kind, size=(4, 4), **options):
    layer = kind(2, 3, size, param_dtype=jnp.result_type(float), rngs=nnx.Rngs(0), **options)
    if layer.use_bias:
        layer.bias[...] = jnp.arange(3.0)
    return Images(layer)


def images():
    drawn = np.random.default_rng(0).normal(size=(2, 8, 6, 2))
    return jnp.asarray(drawn, jnp.result_type(float))


CONVOLUTIONS = [
    {"strides": (2, 2)},
    {"strides": (2, 2), "use_bias": False},
    {"strides": 2, "padding": "VALID", "size": (3, 2)},
    {"size": (3, 3)},
    {"padding": 1, "size": (3, 2)},
    {"padding": ((2, 2), (1, 1)), "strides": (1, 2), "size": (4, 3)},
]


@pytest.mark.parametrize("kind", [nnx.Conv, nnx.ConvTranspose])
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_a_convolution_may_be_the_head(kind, options, x64):
    net = convolution(kind, **options)
    theta, model = split(net)
    w = initial_w(net)
    expected = net(images())
    z = model.features(theta, images())
    np.testing.assert_allclose(model.head.apply(z, w), expected, atol=1e-12)
    np.testing.assert_allclose(model.head.rows(z) @ w, expected.reshape(-1, 3), atol=1e-12)
    merged = merge(net, theta, 2 * w)
    np.testing.assert_allclose(merged(images()), 2 * expected, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": ((1, 0), (0, 0))},
        {"padding": "CIRCULAR"},
        {"size": (3,)},
        {"kernel_dilation": 2},
        {"kind": nnx.ConvTranspose, "transpose_kernel": True},
        {"kind": nnx.ConvTranspose, "strides": (1, 1), "size": (4, 4)},
    ],
)
def test_other_convolutions_are_refused(options):
    with pytest.raises(ValueError, match="head: expected a convolution over images without"):
        split(convolution(**({"kind": nnx.Conv} | options)))


# What comes after the head


class Around(nnx.Module):
    """A network whose call is any function of it, of what its head takes, and of the inputs."""

    def __init__(self, call):
        rngs = nnx.Rngs(0)
        self.hidden, self.head = nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
        self.scale, self.drop = nnx.Param(jnp.ones(())), nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.call = call

    def __call__(self, y):
        return self.call(self, jnp.tanh(self.hidden(y)), y)


LAST = "head: expected a network whose last operation is its layer 'head', got one that changes"
ONCE = "head: expected a network that calls its layer 'head' once, got one that "
AROUND = {
    "scaled": (lambda net, z, y: 2 * net.head(z), LAST),
    "scaled by a weight of one": (lambda net, z, y: net.scale[...] * net.head(z), LAST),
    "skip": (lambda net, z, y: net.head(z) + y[:, :1], LAST),
    "clipped": (lambda net, z, y: jnp.clip(net.head(z), -10, 10), LAST),
    "relu": (lambda net, z, y: jax.nn.relu(net.head(z)), LAST),
    "softmax": (lambda net, z, y: jax.nn.softmax(net.head(z)), LAST),
    "reshaped": (lambda net, z, y: net.head(z).reshape(-1, 1, 3), LAST),
    "rounded": (lambda net, z, y: net.head(z).astype(jnp.bfloat16), LAST),
    "a pair": (lambda net, z, y: (net.head(z), z), LAST),
    "normalised": (lambda net, z, y: net.norm(net.head(z)), LAST),
    "dropped out": (lambda net, z, y: net.drop(net.head(z)), LAST + " the output of this layer in"),
    "gated": (lambda net, z, y: net.head(z) * (y[:, :1] < 1.5), LAST),
    "its largest": (lambda net, z, y: net.head(z).max(-1, keepdims=True), LAST),
    "its sum": (lambda net, z, y: net.head(z).sum(-1, keepdims=True), LAST),
    "its logsumexp": (lambda net, z, y: jax.nn.logsumexp(net.head(z), -1, keepdims=True), LAST),
    "its first output": (lambda net, z, y: net.head(z)[:, :1], LAST),
    "in another order": (lambda net, z, y: net.head(z)[:, ::-1], LAST),
    "samples in another order": (lambda net, z, y: net.head(z)[::-1], LAST),
    "another layer": (lambda net, z, y: net.hidden(net.head(z)), LAST),
    "twice": (lambda net, z, y: net.head(net.head(z)), ONCE + "calls it 2 times"),
    "a difference": (lambda net, z, y: net.head(z) - net.head(2 * z), ONCE + "calls it 2 times"),
    "never": (lambda net, z, y: z, ONCE + "never does"),
    "its weights": (
        lambda net, z, y: z @ net.head.kernel[...],
        "inputs: expected what the network",
    ),
}
PLAIN = {
    "plain": lambda net, z, y: net.head(z),
    "normalised before": lambda net, z, y: net.head(net.drop(net.norm(z))),
    "by keyword": lambda net, z, y: net.head(inputs=z),
    "checkpointed": lambda net, z, y: nnx.remat(lambda head, z: head(z))(net.head, z),
    "jitted": lambda net, z, y: nnx.jit(lambda net, z: net.head(z))(net, z),
}


def checked(net, head="head", y=None, targets=3, **options):
    theta, model = split(net, head)
    y = inputs() if y is None else y
    data = y, jnp.zeros((len(y), targets))
    check_data(vp.Problem(model, vp.least_squares()), theta, data, **options)


@pytest.mark.parametrize("name", AROUND)
def test_what_is_not_its_heads_output_is_refused(name):
    """Whatever the targets are that would fit it."""
    call, message = AROUND[name]
    for targets in (1, 3):
        with pytest.raises(ValueError) as caught:
            checked(Around(call), targets=targets)
        assert str(caught.value).startswith(message)


def test_what_is_done_to_few_samples_is_seen():
    """In a batch of many."""
    y = jnp.zeros((1000, 2)).at[600:700].set(9)
    checked(Around(PLAIN["plain"]), y=y)
    with pytest.raises(ValueError, match=LAST):
        checked(Around(lambda net, z, y: net.head(z) * (y[:, :1] < 5)), y=y)


@pytest.mark.parametrize("targets", [1, 2, 4])
def test_targets_of_another_width_are_refused(targets):
    """Their W could not be merged into the network."""
    with pytest.raises(ValueError) as caught:
        checked(Around(PLAIN["plain"]), targets=targets)
    assert str(caught.value).startswith(
        f"targets: expected 3 outputs, as many as the network's layer 'head' has, got {targets}"
    )


@pytest.mark.parametrize("kind", [nnx.Conv, nnx.ConvTranspose])
def test_networks_with_convolutional_heads_are_checked(kind):
    def check(after):
        net = convolution(kind, strides=(2, 2))
        net.after = after
        theta, model = split(net)
        data = images(), jnp.zeros_like(net(images()))
        check_data(vp.Problem(model, vp.least_squares()), theta, data, stochastic=True)

    check(lambda out: out)
    for after in (jax.nn.relu, lambda out: out.max(-1, keepdims=True), lambda out: out[:, :-1]):
        with pytest.raises(ValueError, match=LAST):
            check(after)


@pytest.mark.parametrize("name", PLAIN)
def test_networks_that_end_in_their_heads_pass(name):
    checked(Around(PLAIN[name]))


def test_a_head_within_a_sequential_is_refused():
    net = sequential(nnx.Rngs(0))
    checked(net)
    with pytest.raises(ValueError, match=r"last operation is its layer 'layers.0'"):
        checked(net, "layers.0")


def test_fit_refuses_it_and_so_does_init_under_jit():
    theta, model = split(Around(AROUND["skip"][0]))
    problem, data = vp.Problem(model, vp.least_squares()), (inputs(), jnp.zeros((6, 3)))
    with pytest.raises(ValueError, match=LAST):
        vp.fit(vp.lbfgsvpro(problem), theta, data, epochs=1)
    with pytest.raises(ValueError, match=LAST):
        jax.jit(lambda: vp.solve_w(problem, theta, data))()
    with pytest.raises(ValueError, match=LAST):
        jax.jit(lambda alpha: vp.solve_w(vp.Problem(model, problem.loss, alpha), theta, data))(1.0)
    jax.eval_shape(lambda theta: vp.solve_w(problem, theta, data), theta)  # has no numbers to see


def test_inputs_that_the_network_cannot_take_are_told():
    with pytest.raises(
        ValueError, match=r"inputs: expected what the network takes up to its layer"
    ):
        checked(Around(PLAIN["plain"]), y=jnp.ones((6, 5)))


def test_a_network_for_all_samples_at_once_is_checked_with_all():
    fixed = Around(lambda net, z, y: net.head(jnp.ones((6, 6)) @ z))
    checked(fixed)
    with pytest.raises(ValueError, match=LAST):
        checked(Around(lambda net, z, y: 2 * net.head(jnp.ones((6, 6)) @ z)))


@pytest.mark.parametrize("name", PLAIN)
def test_a_full_batch_method_is_refused_what_learns_from_batches(name):
    """Batch norm, whose statistics would not see the data; not what draws random numbers alone."""
    call = PLAIN[name]
    if name != "normalised before":
        checked(Around(call), full_batch=True)
        checked(Around(lambda net, z, y: net.head(net.drop(z))), full_batch=True)
        return
    with pytest.raises(TypeError, match="problem: expected features that are functions of theta"):
        checked(Around(call), full_batch=True)
    theta, model = split(Around(call))
    kept = vp.Problem(vp.Separable(model.features, model.head), vp.least_squares())
    check_data(kept, theta, (inputs(), jnp.zeros((6, 3))), full_batch=True)


# State that learns from batches


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, y):
        return self.head(self.dropout(self.norm(self.hidden(y))))


def test_training_batches_change_the_state_and_predictions_do_not():
    """Features take the statistics as they are and drop nothing out; training takes the batch's."""
    net = Normalised(nnx.Rngs(0))
    theta, model = split(net)
    hidden = np.asarray(net.hidden(inputs()))
    np.testing.assert_allclose(
        model.features(theta, inputs()), hidden / np.sqrt(1 + 1e-5), rtol=1e-5
    )
    train = jax.jit(lambda model, theta, y: model.train(theta, y))
    z, after = train(model, theta, inputs())
    normal = (hidden - hidden.mean(axis=0)) / np.sqrt(hidden.var(axis=0) + 1e-5)
    kept = np.asarray(z) != 0
    assert 0.2 < kept.mean() < 0.8
    np.testing.assert_allclose(np.asarray(z)[kept], 2 * normal[kept], rtol=1e-4, atol=1e-5)
    mean = 0.5 * hidden.mean(axis=0)
    expected = (hidden - mean) / np.sqrt(0.5 + 0.5 * hidden.var(axis=0) + 1e-5)
    np.testing.assert_allclose(after.features(theta, inputs()), expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(after) == jax.tree.structure(model)
    again, _ = train(after, theta, inputs())
    assert ((np.asarray(again) != 0) != kept).any()  # other units are dropped out


def test_statistics_are_merged_where_asked_for():
    net = Normalised(nnx.Rngs(0))
    theta, model = split(net)
    _, after = model.train(theta, inputs())
    w = initial_w(net)
    for used, given in ((after, after), (model, None)):
        merged = merge(net, theta, w, model=given)
        merged.eval()
        expected = predict(used, theta, w, inputs())
        np.testing.assert_allclose(merged(inputs()), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="model: expected nothing as the shape of model"):
        merge(dense(nnx.Rngs(0)), split(dense(nnx.Rngs(0)))[0], jnp.ones((5, 3)), model=after)


# The model as an argument


def test_equal_networks_share_one_compilation():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def features(model, theta, y):
        return model.features(theta, y)

    for seed in range(2):
        theta, model = split(flow(nnx.Rngs(seed)))
        features(model, theta, inputs())


def test_features_are_differentiable_in_theta(x64):
    """The Taylor remainder of order two falls fourfold when the step is halved."""
    theta, model = split(flow(nnx.Rngs(0)))
    theta = drawn_like(theta)
    direction = drawn_like(theta, seed=2)

    @jax.jit
    def value(h, theta, direction):
        moved = jax.tree.map(lambda t, v: t + h * v, theta, direction)
        return jnp.sum(model.features(moved, inputs()) ** 2)

    gradient = jax.grad(value, argnums=1)(0.0, theta, direction)
    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))
    here = value(0.0, theta, direction)
    remainders = [value(h, theta, direction) - here - h * slope for h in (1e-2, 5e-3, 2.5e-3)]
    orders = np.log2(np.divide(remainders[:-1], remainders[1:]))
    np.testing.assert_allclose(orders, 2, atol=0.1)


def test_features_can_be_mapped_over_thetas(x64):
    theta, model = split(flow(nnx.Rngs(0)))
    thetas = [drawn_like(theta, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *thetas)
    mapped = jax.jit(jax.vmap(model.features, in_axes=(0, None)))(stacked, inputs())
    one_by_one = [model.features(theta, inputs()) for theta in thetas]
    np.testing.assert_allclose(mapped, one_by_one, rtol=1e-12, atol=1e-14)


# Bad input


class Unnamed(nnx.Module):
    def __init__(self, rngs):
        self.first, self.out = nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)


NET = vp.networks.Dense((2, 4, 3), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "net, head, error, message",
    [
        (3, "head", TypeError, "net: expected a flax nnx.Module, got int"),
        (Nested, 2, TypeError, "head: expected an attribute path, .*, got 2"),
        (Nested, "head", ValueError, "head: expected .* attribute of Nested.*, got 'head'"),
        (Unnamed, "head", ValueError, "of Unnamed such as 'first' or 'out', got 'head'"),
        (Nested, "decoder.in", ValueError, "head: expected .*, got 'decoder.in'"),
        (sequential, "layers.3", ValueError, "such as 'layers.0' or 'layers.2', got 'layers.3'"),
        (sequential, "layers.1", TypeError, "; leave out of the network what comes after its last"),
        (Nested, "mean", TypeError, "head: expected an nnx.Linear, .* at 'mean', got BatchStat"),
        (NET, NET.head, TypeError, "head: expected an attribute path, .*, got Linear$"),
        (NET.head, "head", ValueError, "head: expected the path of an attribute of Linear, got"),
        (Nested, "out", ValueError, "such as 'decoder.hidden' or 'decoder.out', got 'out'"),
        (lambda rngs: Unnamed, "out", TypeError, "nnx.Module, got the class Unnamed$"),
        (lambda rngs: linen.Dense(3), "out", TypeError, "Dense; leave its last layer out; net.in"),
        (lambda rngs: (1, 2), "out", TypeError, "net: expected a flax nnx.Module, got tuple"),
        (Tied, "head", ValueError, "head: expected a layer with weights of its own"),
        (LowRank, "head", TypeError, "head: expected an nnx.Linear, .* at 'head', got LoRALinear"),
    ],
)
def test_split_refuses(net, head, error, message):
    if callable(net) and not isinstance(net, nnx.Module):
        net = net(nnx.Rngs(0))
    with pytest.raises(error, match=message):
        split(net, head)


def test_merge_refuses_weights_that_do_not_fit():
    net = dense(nnx.Rngs(0))
    theta, _ = split(net)
    w = initial_w(net)
    with pytest.raises(ValueError, match=r"w: expected shape \(5, 3\), got \(4, 3\)"):
        merge(net, theta, w[1:])
    with pytest.raises(ValueError, match=r"theta\['layers'\]\[0\]\['bias'\], got \(3,\)"):
        theta["layers"][0]["bias"] = jnp.zeros(3)
        merge(net, theta, w)
    with pytest.raises(ValueError, match=r"theta\['layers'\]\[0\]\['bias'\], got nothing"):
        del theta["layers"][0]["bias"]
        merge(net, theta, w)
    with pytest.raises(ValueError, match=r"nothing as the shape of theta\['head'\]\['kernel'\]"):
        merge(net, split(net)[0] | {"head": {"kernel": w}}, w)


def test_merge_refuses_what_are_no_weights():
    theta, model = split(NET)
    w = initial_w(NET)
    solution = vp.Solution(theta, w, {}, vp.Status.BUDGET, 0.0, None)
    for given, message in (
        ((solution, w), "theta: expected arrays .*got Solution; its field theta has the weights"),
        ((theta, w.tolist()), "w: expected arrays of NumPy or JAX, got list"),
        ((theta, None), "w: expected arrays of NumPy or JAX, got NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            merge(NET, *given)
    problem = vp.Problem(model, vp.least_squares())
    for other in (problem, vp.Separable(lambda theta, inputs: inputs)):
        with pytest.raises(TypeError, match=r"model: expected solution.problem.model, that of a"):
            merge(NET, theta, w, model=other)
