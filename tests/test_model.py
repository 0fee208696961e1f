"""The model, Φ, predictions, and what is refused at the door."""

# The tables of refusals read as tables.
# ruff: noqa: E501

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
from flax import linen, nnx
from problems import (
    LOSSES,
    Case,
    features,
    initial_theta,
    make_data,
    plain_rows,
    plain_w,
    products,
    quartic,
    relative,
    w_value,
)

import varprox as vp
from varprox.problem.heads import ConvHead
from varprox.problem.model import objective
from varprox.problem.traits import derivatives, treats_samples_alone

THETA = initial_theta(dtype=np.float32)
DATA = make_data("least_squares", 2, dtype=np.float32)
ENTROPY = make_data("softmax_cross_entropy", 2, dtype=np.float32)
INPUTS, TARGETS = DATA


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_objective_is_loss_plus_penalties(loss, bias, x64):
    case = Case(loss, 2, bias)
    w = np.random.default_rng(0).normal(size=(3 + bias, 2))
    theta, data = initial_theta(), case.data
    rows = plain_rows(theta, data[0], bias)
    expected = w_value(loss, rows, w, data[1], case.w_penalty)
    expected += 0.5 * 1e-2 * sum(np.sum(leaf**2) for leaf in jax.tree.leaves(theta))
    assert abs(objective(case.problem, theta, w, data) - expected) < 1e-13
    np.testing.assert_allclose(vp.predict(case.problem, theta, w, data[0]), rows @ w, atol=1e-13)


def test_the_bias_is_the_last_row(x64):
    case, theta = Case("least_squares", 2), initial_theta()
    w = np.zeros((4, 2))
    w[-1] = [3.0, -1.0]
    predictions = vp.predict(case.problem, theta, w, case.data[0])
    np.testing.assert_array_equal(predictions, np.tile([3.0, -1.0], (len(predictions), 1)))


def test_inputs_may_be_any_pytree(x64):
    """Two arrays, one of them integers, give what their concatenation gives."""
    inputs, targets = make_data("least_squares", 2)
    labels = (inputs[:, :1] > 0).astype(np.int32)

    def split(theta, inputs):
        y = jnp.concatenate([inputs["y"], inputs["label"].astype(inputs["y"].dtype)], axis=1)
        return jnp.tanh(y @ theta)

    def joined(theta, inputs):
        return jnp.tanh(inputs @ theta)

    theta = np.random.default_rng(1).normal(size=(3, 3))
    solve = lambda fn, inputs: vp.solve_w(  # noqa: E731
        vp.Problem(vp.Separable(fn), vp.least_squares(), w_penalty=0.1), theta, (inputs, targets)
    )
    whole = np.hstack([inputs, labels.astype(np.float64)])
    assert (
        relative(solve(split, {"y": inputs, "label": labels}), np.asarray(solve(joined, whole)))
        < 1e-12
    )


def test_features_may_be_a_bound_method_or_carry_arrays(x64):
    inputs, targets = make_data("least_squares", 2)
    matrix = np.random.default_rng(2).normal(size=(2, 3))

    class Network:
        def __call__(self, theta, inputs):
            return jnp.tanh(theta * (inputs @ matrix))

        def forward(self, theta, inputs):
            return self(theta, inputs)

    def with_matrix(matrix, theta, inputs):
        return jnp.tanh(theta * (inputs @ matrix))

    solutions = [
        vp.solve_w(
            vp.Problem(vp.Separable(fn), vp.least_squares(), w_penalty=0.1),
            np.ones(()), (inputs, targets),
        )
        for fn in (Network(), Network().forward, jax.tree_util.Partial(with_matrix, matrix))
    ]  # fmt: skip
    for w in solutions[1:]:
        np.testing.assert_allclose(w, solutions[0], rtol=1e-12)


def test_a_problem_is_a_pytree_of_its_numbers():
    """So that a function compiled for one serves for another with other penalties."""
    traces = []

    @jax.jit
    def count(problem):
        traces.append(1)
        return problem.w_penalty

    model = vp.Separable(features)
    for alpha in (0.1, 0.2):
        problem = vp.Problem(model, vp.logistic(), vp.tikhonov(alpha), 2 * alpha)
        assert abs(count(problem) - 2 * alpha) < 1e-7
        numbers = [float(leaf) for leaf in jax.tree.leaves(problem)]
        assert sorted(numbers) == [alpha, 2 * alpha]
    assert len(traces) == 1


# What is refused


def problem(fn=features, loss=None, **options):
    loss = loss or vp.least_squares()
    options = {"w_penalty": 0.1} | options
    return vp.Problem(vp.Separable(fn), loss, **options)


def with_nan(array):
    array = np.array(array)
    array.flat[3] = np.nan
    return array


def with_inf(array):
    array = np.array(array)
    array.flat[3] = np.inf
    return array


def solve(theta=THETA, data=DATA, **options):
    return lambda: vp.solve_w(problem(**options), theta, data)


def halved(dtype=np.float16):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), THETA)


class Tensor:
    """What other libraries have for an array."""

    def numpy(self):
        return TARGETS


NET = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
BODY = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
SOLUTION = vp.Solution(THETA, None, {}, vp.Status.BUDGET, 0.0, problem())
W = np.ones((4, 2), np.float32)
DOUBLE = {name: leaf.astype(np.float64) for name, leaf in THETA.items()}
SHORT = TARGETS[:-1]

REFUSED = {
    # what is built
    "features": (lambda: vp.Separable(3), TypeError, "features", "function", "3"),
    "features a flax module": (lambda: vp.Separable(NET), TypeError, "features", "(theta, inputs)", "Linear; theta, model = varprox.nnx.split(net)"),
    "features an equinox module": (lambda: vp.Separable(BODY), TypeError, "features", "(theta, inputs)", "MLP; theta, model = varprox.equinox.split(net) takes it apart"),
    "features a linen module": (lambda: vp.Separable(linen.Dense(3)), TypeError, "features", "(theta, inputs)", "Dense; leave its last layer out; net.init(key, inputs) is theta"),
    "features a class": (lambda: vp.Separable(nnx.Linear), TypeError, "features", "(theta, inputs)", "the class Linear; theta, model = varprox.nnx.split(net)"),
    "features a pair": (lambda: vp.Separable((THETA, vp.Separable(features))), TypeError, "features", "(theta, inputs)", "theta, model = varprox.nnx.split(net) unpacks the pair"),
    "head": (lambda: vp.Separable(features, "dense"), TypeError, "head", "dense()", "'dense'"),
    "head not called": (lambda: vp.Separable(features, vp.dense), TypeError, "head", "dense()", "function dense"),
    "bias": (lambda: vp.dense(bias=1), TypeError, "bias", "True or False", "1"),
    "model": (lambda: vp.Problem(features, vp.logistic(), w_penalty=1.0), TypeError, "model", "Separable", "function features"),
    "model a module": (lambda: vp.Problem(NET, vp.least_squares()), TypeError, "model", "Separable", "Linear; theta, model = varprox.nnx.split(net)"),
    "model not made": (lambda: vp.Problem(features, vp.least_squares()), TypeError, "model", "Separable", "varprox.Separable(features) makes one"),
    "loss name": (lambda: problem(loss="mse"), TypeError, "loss", "least_squares()", "'mse'"),
    "loss not called": (lambda: problem(loss=vp.logistic), TypeError, "loss", "least_squares()", "function logistic"),
    "fn": (lambda: vp.convex_loss("huber"), TypeError, "fn", "function", "'huber'"),
    "w_penalty negative": (lambda: problem(w_penalty=-1e-3), ValueError, "w_penalty", "≥ 0", "-0.001"),
    "w_penalty nan": (lambda: problem(w_penalty=np.nan), ValueError, "w_penalty", "finite", "nan"),
    "w_penalty inf": (lambda: problem(w_penalty=np.inf), ValueError, "w_penalty", "finite", "inf"),
    "w_penalty text": (lambda: problem(w_penalty="0.1"), TypeError, "w_penalty", "number", "'0.1'"),
    "w_penalty none": (lambda: problem(w_penalty=None), TypeError, "w_penalty", "number", "None"),
    "w_penalty array": (lambda: problem(w_penalty=np.ones(2)), TypeError, "w_penalty", "number", "array([1., 1.])"),
    "w_penalty one-element array": (lambda: problem(w_penalty=np.ones(1)), TypeError, "w_penalty", "number", "array([1.])"),
    "w_penalty zero, softmax": (lambda: problem(loss=vp.softmax_cross_entropy(), w_penalty=0.0), ValueError, "w_penalty", "positive", "0.0"),
    "w_penalty zero, logistic": (lambda: problem(loss=vp.logistic(), w_penalty=0), ValueError, "w_penalty", "positive", "0"),
    "w_penalty zero, convex": (lambda: problem(loss=LOSSES["pseudo_huber"], w_penalty=0.0), ValueError, "w_penalty", "positive", "0.0"),
    "theta_penalty negative": (lambda: problem(theta_penalty=-1.0), ValueError, "theta_penalty", "≥ 0", "-1.0"),
    "theta_penalty text": (lambda: problem(theta_penalty="l2"), TypeError, "theta_penalty", "number", "'l2'"),
    "theta_penalty in a tuple": (lambda: problem(theta_penalty=(0.1, "l2")), TypeError, "theta_penalty", "number", "'l2'"),
    "theta_penalty a dict": (lambda: problem(theta_penalty={"layers": 0.1}), TypeError, "theta_penalty", "a function of theta such as varprox.tikhonov(alpha, where)", "{'layers': 0.1}"),
    # data
    "data one array": (solve(data=INPUTS), TypeError, "data", "pair (inputs, targets)", "ndarray"),
    "data four": (solve(data=(INPUTS, TARGETS, TARGETS, TARGETS)), TypeError, "data", "pair (inputs, targets)", "4"),
    "lengths": (solve(data=(INPUTS, SHORT)), ValueError, "inputs", "15 samples along the first axis, as targets of shape (15, 2)", "(16, 2)"),
    "inputs a list of samples": (solve(data=(list(INPUTS), TARGETS)), ValueError, "inputs", "16 samples", "(2,); jnp.stack(inputs)"),
    "data an array of JAX": (solve(data=jnp.asarray(INPUTS)), TypeError, "data", "pair (inputs, targets)", "Array of shape (16, 2)"),
    "targets text": (solve(data=(INPUTS, "targets.csv")), TypeError, "targets", "arrays of NumPy or JAX", "'targets.csv'"),
    "targets a tensor": (solve(data=(INPUTS, Tensor())), TypeError, "targets", "arrays of NumPy or JAX", "Tensor; .numpy() makes"),
    "labels text": (solve(data=(INPUTS, np.array(["a"] * 16)), loss=vp.softmax_cross_entropy()), TypeError, "targets", "arrays that JAX takes", "<U1; numpy.unique(labels, return_inverse=True)"),
    "labels in a column": (solve(data=(INPUTS, np.arange(16)[:, None]), loss=vp.softmax_cross_entropy()), TypeError, "targets", "floating", "jax.nn.one_hot"),
    "labels one-hot": (solve(data=(INPUTS, ENTROPY[1].astype(int)), loss=vp.softmax_cross_entropy()), TypeError, "targets", "floating", "int64; targets.astype('float32')"),
    "labels of yes and no": (solve(data=(INPUTS, ENTROPY[1] > 0), loss=vp.logistic()), TypeError, "targets", "floating", "bool; targets.astype('float32')"),
    "inputs a number": (solve(data=(np.float32(1), TARGETS)), ValueError, "inputs", "16 samples", "()"),
    "targets 1-D": (solve(data=(INPUTS, TARGETS[:, 0])), ValueError, "targets", "(batch, outputs)", "(16,)"),
    "targets 3-D": (solve(data=(INPUTS, TARGETS[:, None])), ValueError, "targets", "(batch, outputs)", "(16, 1, 2)"),
    "no samples": (solve(data=(INPUTS[:0], TARGETS[:0])), ValueError, "targets", "at least one sample", "none"),
    "no outputs": (solve(data=(INPUTS, TARGETS[:, :0])), ValueError, "targets", "at least one output", "(16, 0)"),
    "targets integer": (solve(data=(INPUTS, TARGETS.astype(np.int32))), TypeError, "targets", "floating", "int32"),
    "targets bool": (solve(data=(INPUTS, TARGETS > 0)), TypeError, "targets", "floating", "bool"),
    "targets complex": (solve(data=(INPUTS, TARGETS.astype(np.complex64))), TypeError, "targets", "floating", "complex64"),
    "targets a list": (solve(data=(INPUTS, TARGETS.tolist())), TypeError, "targets", "array", "list"),
    "targets nan": (solve(data=(INPUTS, with_nan(TARGETS))), ValueError, "targets", "finite", "1 NaN or Inf"),
    "inputs nan": (solve(data=(with_nan(INPUTS), TARGETS)), ValueError, "inputs", "finite", "1 NaN or Inf in float32, the first at [1, 1]"),
    "inputs inf": (solve(data=(with_inf(INPUTS), TARGETS)), ValueError, "inputs", "finite", "1 NaN or Inf"),
    "class labels": (solve(data=(INPUTS, np.arange(16) % 2), loss=vp.softmax_cross_entropy()), TypeError, "targets", "floating", "int"),
    "softmax sums": (solve(data=(INPUTS, 2 * ENTROPY[1]), loss=vp.softmax_cross_entropy()), ValueError, "targets", "one-hot", "2"),
    "softmax negative": (solve(data=(INPUTS, 1.5 - 2 * ENTROPY[1]), loss=vp.softmax_cross_entropy()), ValueError, "targets", "one-hot", "-0.5"),
    "logistic range": (solve(data=(INPUTS, 2 * ENTROPY[1] - 1), loss=vp.logistic()), ValueError, "targets", "between 0 and 1", "-1"),
    "targets half": (solve(theta=halved(), data=(INPUTS, TARGETS.astype(np.float16))), TypeError, "theta, targets", "float32 or float64", "float16; cast them to float32"),
    "targets bfloat16": (solve(theta=halved(jnp.bfloat16), data=(INPUTS, jnp.asarray(TARGETS, jnp.bfloat16))), TypeError, "theta, targets", "float32 or float64", "bfloat16; cast them to float32"),
    "targets too large": (solve(data=(INPUTS, 1e39 * TARGETS.astype(np.float64))), ValueError, "targets", "finite", "NaN or Inf in float32"),
    "targets a table": (solve(data=(INPUTS, pandas.DataFrame(TARGETS))), TypeError, "targets", "arrays of NumPy or JAX", "DataFrame; .to_numpy() makes"),
    "targets a column": (solve(data=(INPUTS, pandas.Series(TARGETS[:, 0]))), TypeError, "targets", "arrays of NumPy or JAX", "Series; .to_numpy() makes"),
    "targets none": (solve(data=(INPUTS, None)), TypeError, "targets", "arrays of NumPy or JAX", "NoneType"),
    "targets masked": (solve(data=(INPUTS, np.ma.masked_array(TARGETS, TARGETS > 1))), TypeError, "targets", "arrays that JAX takes", "MaskedArray"),
    "inputs a table": (solve(data=(pandas.DataFrame(INPUTS), TARGETS)), TypeError, "inputs", "arrays of NumPy or JAX", "DataFrame; .to_numpy() makes"),
    "inputs a list": (solve(data=(INPUTS.tolist(), TARGETS)), TypeError, "inputs", "arrays of NumPy or JAX", "float; jnp.asarray makes"),
    "inputs text": (solve(data=(np.array(["a"] * 16), TARGETS)), TypeError, "inputs", "arrays that JAX takes", "<U1"),
    "inputs objects": (solve(data=(INPUTS.astype(object), TARGETS)), TypeError, "inputs", "arrays that JAX takes", "object"),
    "inputs big-endian": (solve(data=(INPUTS.astype(">f4"), TARGETS)), TypeError, "inputs", "arrays that JAX takes", ">f4"),
    "sample weights": (solve(data=(INPUTS, TARGETS, TARGETS[:, 0])), ValueError, "weights", "finite numbers ≥ 0", "-1.42"),
    "labels": (solve(data=(INPUTS, np.arange(16) % 2), loss=vp.softmax_cross_entropy()), TypeError, "targets", "floating", "jax.nn.one_hot"),
    "floating labels": (solve(data=(INPUTS, np.arange(16, dtype=np.float32) % 2), loss=vp.softmax_cross_entropy()), ValueError, "targets", "(batch, outputs)", "jax.nn.one_hot"),
    # theta
    "theta without entries": (solve(theta=THETA | {"more": np.zeros((0, 3), np.float32)}), ValueError, "theta", "arrays with entries", "(0, 3)"),
    "theta a function": (solve(theta=features), TypeError, "theta", "arrays of NumPy or JAX", "function"),
    "theta empty": (solve(theta={}), ValueError, "theta", "at least one array", "empty"),
    "theta none": (solve(theta=None), ValueError, "theta", "at least one array", "empty"),
    "theta a number": (solve(theta={"opening": 1.0}), TypeError, "theta", "array", "float"),
    "theta integer": (solve(theta=THETA | {"n": np.arange(3)}), TypeError, "theta", "floating", "int64"),
    "theta a list": (solve(theta=[[1.0, 2.0]]), TypeError, "theta", "arrays of NumPy or JAX", "float; jnp.asarray"),
    "theta a table": (solve(theta={"a": pandas.DataFrame(INPUTS)}), TypeError, "theta", "arrays of NumPy or JAX", "DataFrame; .to_numpy()"),
    "theta text": (solve(theta="weights"), TypeError, "theta", "arrays of NumPy or JAX", "'weights'"),
    "theta a key": (solve(theta={"key": jax.random.key(0)}), TypeError, "theta", "floating", "key<fry>; what is not trained"),
    "theta a flax module": (solve(theta=NET), TypeError, "theta", "arrays of NumPy or JAX", "Linear; theta, model = varprox.nnx.split(net)"),
    "theta has a flax module": (solve(theta={"net": NET}), TypeError, "theta", "arrays of NumPy or JAX", "Linear; theta, model = varprox.nnx.split(net)"),
    "theta an equinox module": (solve(theta=BODY), TypeError, "theta", "arrays of NumPy or JAX", "MLP; theta, model = varprox.equinox.split(net) takes it apart"),
    "theta a linen module": (solve(theta=linen.Dense(3)), TypeError, "theta", "arrays of NumPy or JAX", "Dense; leave its last layer out; net.init(key, inputs)"),
    "theta a state": (lambda: solve(vp.gnvpro(problem()).init(THETA, DATA))(), TypeError, "theta", "arrays of NumPy or JAX", "State; its field theta"),
    "theta a solution": (lambda: solve(SOLUTION)(), TypeError, "theta", "arrays of NumPy or JAX", "Solution; its field theta"),
    "theta a model": (solve(theta=(THETA, vp.Separable(features))), TypeError, "theta", "arrays of NumPy or JAX", "Separable"),
    "theta nan": (solve(theta=THETA | {"layers": with_nan(THETA["layers"])}), ValueError, "theta", "finite", "1 NaN or Inf"),
    # features
    "features 1-D": (solve(fn=lambda t, y: features(t, y)[:, 0]), ValueError, "features", "(16, m)", "(16,)"),
    "features 3-D": (solve(fn=lambda t, y: features(t, y)[:, None]), ValueError, "features", "(16, m)", "(16, 1, 3)"),
    "features transposed": (solve(fn=lambda t, y: features(t, y).T), ValueError, "features", "(16, m)", "(3, 16)"),
    "features a tuple": (solve(fn=lambda t, y: (features(t, y), 0.0)), ValueError, "features", "(16, m)", "tuple"),
    "features integer": (solve(fn=lambda t, y: features(t, y).astype(jnp.int32)), TypeError, "features", "float32", "int32"),
    "features half": (solve(fn=lambda t, y: features(t, y).astype(jnp.float16)), TypeError, "features", "float32", "float16"),
    "no features": (solve(fn=lambda t, y: features(t, y)[:, :0]), ValueError, "features", "m ≥ 1", "(16, 0)"),
    "features raise": (solve(fn=lambda t, y: t["nowhere"]), TypeError, "features", "a function of (theta, inputs) that JAX can trace", "KeyError: 'nowhere'"),
    "features of other shapes": (solve(fn=lambda t, y: y @ jnp.ones((5, 3))), TypeError, "features", "a function of (theta, inputs) that JAX can trace", "TypeError: dot_general"),
    "features of NumPy": (solve(fn=lambda t, y: np.tanh(y @ t["opening"])), TypeError, "features", "a function of (theta, inputs) that JAX can trace", "TracerArrayConversionError"),
    "features with if": (solve(fn=lambda t, y: y if t["opening"][0, 0] > 0 else -y), TypeError, "features", "a function of (theta, inputs) that JAX can trace", "jnp.where"),
    "features none": (solve(fn=lambda t, y: None), ValueError, "features", "(16, m)", "NoneType"),
    # numbers that single precision does not hold
    "w_penalty too large": (solve(w_penalty=1e39), ValueError, "w_penalty", "that float32 holds", "1e+39"),
    "w_penalty too small": (solve(data=(INPUTS, ENTROPY[1]), loss=vp.logistic(), w_penalty=1e-60), ValueError, "w_penalty", "positive number that float32 holds", "1e-60"),
    "theta_penalty too large": (solve(theta_penalty=(0.1, 1e39)), ValueError, "theta_penalty", "that float32 holds", "1e+39"),
    "w_penalty bool": (lambda: problem(w_penalty=True), TypeError, "w_penalty", "number", "True"),
    # user functions that return something other than a number
    "penalty not scalar": (solve(theta_penalty=lambda t: t["opening"]), TypeError, "theta_penalty", "scalar", "(2, 3)"),
    "penalty one-element array": (solve(theta_penalty=lambda t: jnp.sum(t["opening"])[None]), TypeError, "theta_penalty", "scalar", "(1,)"),
    "penalty a tuple": (solve(theta_penalty=lambda t: (1.0, 2.0)), TypeError, "theta_penalty", "scalar", "tuple"),
    "penalty none": (solve(theta_penalty=lambda t: None), TypeError, "theta_penalty", "scalar", "NoneType"),
    "penalty an integer": (solve(theta_penalty=lambda t: 3), TypeError, "theta_penalty", "floating", "int32"),
    "penalty raises": (solve(theta_penalty=lambda t: t["nowhere"]), TypeError, "theta_penalty", "a function of (theta) that JAX can trace", "KeyError: 'nowhere'"),
    "convex loss not convex": (solve(loss=vp.convex_loss(lambda p, t: jnp.sum(jnp.cos(p - t)))), ValueError, "fn", "convex", "second derivatives from -"),
    # what comes in the place of a problem
    "problem a solution": (lambda: vp.predict(SOLUTION, THETA, W, INPUTS), TypeError, "problem", "varprox.Problem", "its field problem is one"),
    "problem a model": (lambda: vp.gnvpro(vp.Separable(features)), TypeError, "problem", "varprox.Problem", "Separable(features=features, head=DenseHead(bias=True))"),
    "solve_w none": (lambda: vp.solve_w(None, THETA, DATA), TypeError, "problem", "varprox.Problem", "None"),
    "reduced_objective none": (lambda: vp.reduced_objective(None), TypeError, "problem", "varprox.Problem", "None"),
    "gauss_newton none": (lambda: vp.gauss_newton(None, THETA, DATA), TypeError, "problem", "varprox.Problem", "None"),
    "newton none": (lambda: vp.newton(None, THETA, DATA), TypeError, "problem", "varprox.Problem", "None"),
    "predict none": (lambda: vp.predict(None, THETA, W, INPUTS), TypeError, "problem", "varprox.Problem", "None"),
    # predictions
    "predict w none": (lambda: vp.predict(problem(), THETA, None, INPUTS), TypeError, "w", "arrays of NumPy or JAX", "NoneType"),
    "predict w a list": (lambda: vp.predict(problem(), THETA, W.tolist(), INPUTS), TypeError, "w", "arrays of NumPy or JAX", "list"),
    "predict w integer": (lambda: vp.predict(problem(), THETA, W.astype(int), INPUTS), TypeError, "w", "float32", "int64"),
    "predict inputs a table": (lambda: vp.predict(problem(), THETA, W, pandas.DataFrame(INPUTS)), TypeError, "inputs", "arrays of NumPy or JAX", "DataFrame"),
    "predict theta a module": (lambda: vp.predict(problem(), NET, W, INPUTS), TypeError, "theta", "arrays of NumPy or JAX", "Linear; theta, model = varprox.nnx.split(net)"),
    "predict theta none": (lambda: vp.predict(problem(), None, W, INPUTS), TypeError, "features", "a function of (theta, inputs) that JAX can trace", "TypeError"),
    "convex loss not scalar": (solve(loss=vp.convex_loss(lambda p, t: (p - t) ** 2)), TypeError, "fn", "scalar", "(2,)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name(name):
    """The type of the exception, the argument, what was expected and what came."""
    call, error, argument, expected, came = REFUSED[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{argument}:"), message
    assert "expected" in message and expected in message, message
    assert came in message.split("got", 1)[1], message


def test_mixed_precision_is_refused(x64):
    """With the dtypes of all, and what makes them one."""
    double = tuple(np.float64(array) for array in DATA)
    mixed = THETA | {"opening": DOUBLE["opening"]}
    param_dtype = "make the weights as nnx.Linear(…, param_dtype=jnp.float64) does"
    for theta, data, came, remedy in (
        (DOUBLE, DATA, "theta of float64, inputs of float32, targets of float32", "to float64"),
        (THETA, double, "theta of float32, inputs of float64, targets of float64", "to float32"),
        (THETA, double, "targets of float64", param_dtype),
        (mixed, double, "theta of float32 and float64, inputs of float64", param_dtype),
    ):
        with pytest.raises(
            TypeError, match="theta, targets: expected one floating dtype"
        ) as caught:
            solve(theta, data)()
        assert came in str(caught.value) and remedy in str(caught.value)


@pytest.mark.parametrize("dtype, remedy", [(np.float64, "cast the inputs"), (np.float32, "return")])
def test_features_of_another_precision_are_refused(dtype, remedy, x64):
    """Where inputs make them so, and where the features themselves do."""
    fn = lambda t, y: features(t, y.astype(np.float32)).astype(np.float64)  # noqa: E731
    with pytest.raises(
        TypeError, match=r"^features: expected dtype float32.*got float64"
    ) as caught:
        solve(fn=fn, data=(INPUTS.astype(dtype), TARGETS))()
    assert remedy in str(caught.value) and "to float32" in str(caught.value)


def test_what_features_raise_is_told_with_what_they_were_given():
    def wrong(theta, inputs):
        raise RuntimeError("no such layer\nand more")

    theta = THETA | {f"more{i}": np.ones(i + 1, np.float32) for i in range(6)}
    with pytest.raises(TypeError) as caught:
        solve(theta, fn=wrong)()
    assert str(caught.value) == (
        "features: expected a function of (theta, inputs) that JAX can trace for "
        "theta['layers'] float32[2, 3, 3], theta['more0'] float32[1], theta['more1'] float32[2], "
        "theta['more2'] float32[3], theta['more3'] float32[4], theta['more4'] float32[5], "
        "2 more in theta, inputs float32[16, 2], got RuntimeError: no such layer"
    )
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_weights_that_equinox_takes_out_are_weights():
    """They are a module, too; so is what is allowed to take θ and inputs."""
    theta, static = eqx.partition(BODY, eqx.is_inexact_array)

    class Body(eqx.Module):
        def __call__(self, theta, inputs):
            return jax.vmap(eqx.combine(theta, static))(inputs)

    assert solve({"body": theta}, fn=lambda t, y: Body()(t["body"], y))().shape == (4, 2)
    assert solve(theta, fn=Body())().shape == (4, 2)


def test_models_and_problems_are_told_in_a_line():
    def bound(matrix, theta, inputs):
        return features(theta, inputs @ matrix)

    plain = vp.Problem(vp.Separable(features, vp.dense(False)), vp.least_squares())
    assert repr(plain) == (
        "Problem(Separable(features=features, head=DenseHead(bias=False)), LeastSquares, "
        "theta_penalty=None, w_penalty=0.0)"
    )
    fn = jax.tree_util.Partial(bound, np.eye(2))
    penalties = (0.1, vp.smoothness_in_time(0.2, 0.5), quartic)
    full = vp.Problem(vp.Separable(fn, training=bound), vp.logistic(), penalties, 0.3)
    assert repr(full) == (
        "Problem(Separable(features=bound(float64[2, 2]), head=DenseHead(bias=True), "
        "training=bound), Logistic, theta_penalty=tikhonov(0.1) + "
        "smoothness_in_time(0.2, 0.5) + quartic, w_penalty=0.3)"
    )
    _, model = vp.nnx.split(vp.networks.Dense((2, 8, 1), rngs=nnx.Rngs(0)))
    assert repr(model) == "Separable(features=nnx network, head=DenseHead(bias=True))"
    jax.jit(lambda problem: len(repr(problem)))(full)  # where its numbers are traced


@pytest.mark.parametrize(
    "call",
    [
        lambda p, t, d: vp.reduced_objective(p)(t, d),
        lambda p, t, d: vp.gauss_newton(p, t, d),
        lambda p, t, d: vp.newton(p, t, d),
        lambda p, t, d: vp.gnvpro(p).init(t, d),
        lambda p, t, d: vp.lbfgsvpro(p).init(t, d),
        lambda p, t, d: vp.fit(vp.gnvpro(p), t, d, epochs=1),
    ],
    ids=["reduced_objective", "gauss_newton", "newton", "gnvpro", "lbfgsvpro", "fit"],
)
def test_every_door_refuses_bad_data(call):
    with pytest.raises(ValueError, match="targets: expected finite numbers, got 1 NaN"):
        call(problem(), THETA, (INPUTS, with_nan(TARGETS)))


def test_predict_refuses_weights_of_another_shape():
    with pytest.raises(ValueError, match=r"w: expected shape \(4, .*got \(7, 2\)"):
        vp.predict(problem(), THETA, np.ones((7, 2), np.float32), INPUTS)


def test_predict_refuses_a_single_sample():
    w = vp.solve_w(problem(), THETA, DATA)
    with pytest.raises(
        ValueError, match=r"inputs: expected a batch.*single sample wants inputs\[N"
    ):
        vp.predict(problem(), THETA, w, INPUTS[0])


def test_under_trace_nothing_raises():
    """Inside jit the checks are silent: NaN comes out as NaN, not as an exception."""
    value, _ = jax.jit(vp.reduced_objective(problem()))(THETA, (INPUTS, with_nan(TARGETS)))
    assert np.isnan(value)


@pytest.mark.parametrize("promotion", ["strict", "standard"])
@pytest.mark.parametrize("number", [np.float64(0.1), np.array(0.1), jnp.float32(0.1)])
def test_penalties_of_any_precision_leave_single_precision_single(number, promotion, x64):
    expected = vp.solve_w(problem(theta_penalty=0.1), THETA, DATA)
    with jax.numpy_dtype_promotion(promotion):
        built = problem(w_penalty=number, theta_penalty=(number, vp.tikhonov(number)))
        w = vp.solve_w(built, THETA, DATA)
        value = objective(built, THETA, w, DATA)
    assert w.dtype == value.dtype == jnp.float32
    np.testing.assert_allclose(w, expected, rtol=1e-5)


@pytest.mark.parametrize("loss", ["least_squares", "logistic"])
def test_penalties_under_trace_leave_single_precision_single(loss, x64):
    """A number that `jit` takes from NumPy is in double precision there."""
    data = make_data(loss, 2, dtype=np.float32)

    def value(alpha):
        built = problem(loss=LOSSES[loss], w_penalty=alpha, theta_penalty=(alpha, quartic))
        reduced, w = vp.reduced_objective(built)(THETA, data)
        curvature = vp.gauss_newton(built, THETA, data)
        return reduced, w, built.penalty_on_w(w), curvature.matvec(THETA)

    found = jax.jit(value)(np.float64(0.1))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(np.float32)}
    rows = plain_rows(THETA, data[0], bias=True).astype(np.float64)
    assert relative(found[1], plain_w(loss, rows, data[1].astype(np.float64), 0.1)) < 1e-4


@pytest.mark.parametrize("curvature", ["dense", "krylov", "forward", None])
def test_methods_stay_in_single_precision_under_a_double_penalty(curvature, x64):
    def step(alpha):
        built = problem(w_penalty=alpha, theta_penalty=alpha)
        method = vp.gnvpro(built, curvature=curvature) if curvature else vp.lbfgsvpro(built)
        return method.step(method.init(THETA, DATA), DATA)[0].objective

    assert jax.eval_shape(step, np.float64(0.1)).dtype == jnp.float32


@pytest.mark.parametrize("head", [vp.dense(), vp.conv((2, 2))])
def test_predictions_ask_for_full_precision(head):
    """Those of the features and that of the head."""
    images = isinstance(head, ConvHead)
    fn = (lambda theta, y: jnp.tanh(y @ theta)) if images else features
    theta, inputs = (jnp.ones((2, 2)), jnp.ones((3, 4, 4, 2))) if images else (THETA, INPUTS)
    built = vp.Problem(vp.Separable(fn, head), vp.least_squares())
    w = jnp.ones((9, 2)) if images else W
    found = products(lambda w: vp.predict(built, theta, w, inputs), w)
    assert len(found) >= 2 and all(full for _, full in found), found


def test_inputs_may_have_parts_without_entries():
    nothing = np.zeros((16, 0), np.float32)
    fn = lambda theta, inputs: features(theta, inputs["y"])  # noqa: E731
    w = vp.solve_w(problem(fn), THETA, ({"y": INPUTS, "more": nothing}, TARGETS))
    np.testing.assert_array_equal(w, vp.solve_w(problem(), THETA, DATA))


# Samples alone, and derivatives

TIMES = np.linspace(0, 6, 33, dtype=np.float32)
RATES = np.array([0.3, 1.1], np.float32)


def decays(rates, t):
    return jnp.exp(-t[:, None] * rates[None])


def convolved(rates, t):
    """The response of a filter that starts from zero."""
    kernel = jnp.exp(-jnp.arange(9, dtype=t.dtype))
    columns = [jnp.convolve(column, kernel)[: len(t)] for column in decays(rates, t).T]
    return jnp.stack(columns, 1)


def solved(rates, t):
    """y' = −rate · y by Euler's method over the grid of all times."""
    step = lambda y, dt: (y - dt * rates * y,) * 2  # noqa: E731
    return jax.lax.scan(step, jnp.ones_like(rates), jnp.diff(t, prepend=t[:1]))[1]


def normalised(rates, t):
    z = decays(rates, t)
    return (z - z.mean(0, keepdims=True)) / z.std(0, keepdims=True)


def attention(rates, t):
    return jax.nn.softmax(-((t[:, None] - t[None]) ** 2)) @ decays(rates, t)


def gated(theta, t):
    rates, gate = theta
    return decays(rates, t) + gate * jnp.cumsum(decays(rates, t), 0)


def of_fixed_length(rates, t):
    return decays(rates, t) * jnp.linspace(0, 1, 33, dtype=t.dtype)[:, None]


def in_groups(rates, t):
    z = decays(rates, t).reshape(3, 11, -1)
    return (z - z[:, :1]).reshape(33, -1)


def squares_by_the_largest(rates, t):
    z = ((t - 3)[:, None] * rates) ** 2  # both ends have the largest
    return z / z.max(0)


COUPLED = {
    "convolution": convolved,
    "against time": lambda rates, t: convolved(rates, t[::-1])[::-1],
    "equation solved": solved,
    "normalisation": normalised,
    "mean": lambda rates, t: decays(rates, t) - decays(rates, t).mean(0),
    "largest": lambda rates, t: decays(rates, t) / decays(rates, t).max(0),
    "largest at both ends": squares_by_the_largest,
    "first": lambda rates, t: decays(rates, t) - decays(rates, t)[:1],
    "cumulative": lambda rates, t: jnp.cumsum(decays(rates, t), 0),
    "differences": lambda rates, t: jnp.diff(decays(rates, t), axis=0, append=1),
    "sorted": lambda rates, t: jnp.sort(decays(rates, t), 0),
    "transformed": lambda rates, t: jnp.fft.fft(decays(rates, t), axis=0).real,
    "attention": attention,
    "length of the batch": lambda rates, t: decays(rates, t) / len(t),
    "fixed length": of_fixed_length,
    "groups": in_groups,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", COUPLED)
def test_features_that_couple_samples_are_found(name, dtype):
    with jax.enable_x64(dtype == np.float64):
        found = treats_samples_alone(
            problem(COUPLED[name]), RATES.astype(dtype), TIMES.astype(dtype)
        )
    assert found is False


def test_a_coupling_is_found_that_vanishes_at_the_start():
    theta = (RATES, np.zeros((), np.float32))
    assert treats_samples_alone(problem(gated), theta, TIMES) is False
    nothing = jax.tree.map(np.zeros_like, theta)
    assert treats_samples_alone(problem(gated), nothing, TIMES) is False


def with_rounding(theta, inputs):
    """A column that is nothing but rounding, and one that loses half the digits."""
    z = features(theta, inputs)
    big = jnp.finfo(z.dtype).eps ** -0.3
    return jnp.concatenate([z, 3 * z[:, :1] - z[:, :1] - 2 * z[:, :1], (z[:, :1] + big) - big], 1)


ALONE = {
    "network": features,
    "rounding": with_rounding,
    "mapped": lambda theta, y: jax.vmap(lambda y: features(theta, y[None])[0])(y),
    "zero": lambda theta, y: 0 * features(theta, y),
    "undefined": lambda theta, y: features(theta, y) / 0,
    "undefined in part": lambda theta, y: jnp.sqrt(features(theta, y)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ALONE)
def test_features_that_treat_samples_alone_are_taken(name, dtype):
    with jax.enable_x64(dtype == np.float64):
        theta = initial_theta(dtype=dtype)
        inputs, _ = make_data("least_squares", 2, samples=300, dtype=dtype)
        assert treats_samples_alone(problem(ALONE[name]), theta, inputs) is True


def test_a_start_next_to_where_features_are_undefined_is_looked_at_itself():
    """√θ from zero: half of the shifted weights are negative."""
    fn = lambda theta, t: jnp.sqrt(theta[None]) * t[:, None]  # noqa: E731
    start = np.zeros(4, np.float32)
    assert treats_samples_alone(problem(fn), start, TIMES) is True
    summed = lambda theta, t: jnp.cumsum(1 + fn(theta, t), 0)  # noqa: E731
    assert treats_samples_alone(problem(summed), start, TIMES) is False


def test_one_sample_is_alone():
    assert treats_samples_alone(problem(normalised), RATES, TIMES[:1]) is True


@pytest.mark.parametrize("fn", [decays, normalised])
def test_weights_and_inputs_under_trace_are_made_up(fn):
    seen = []

    @jax.jit
    def traced(rates, times):
        seen.append(treats_samples_alone(problem(fn), rates, times))
        return rates

    traced(RATES, TIMES)
    assert seen == [fn is decays]


def seen_by(transform, fn, bound):
    """What is found of features under trace, with an array bound to them under trace, too."""
    seen = []

    def traced(bound, penalty):
        features = jax.tree_util.Partial(fn, bound)
        built = problem(features, theta_penalty=penalty, w_penalty=penalty)
        seen.append(treats_samples_alone(built, RATES, TIMES))
        return penalty

    transform(traced)(bound, jnp.full(len(bound), 0.1))
    return seen


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
@pytest.mark.parametrize("fn", [decays, normalised])
def test_what_is_bound_to_features_under_trace_is_made_up(transform, fn):
    shifted = lambda shift, theta, x: fn(theta, x) + jnp.sum(shift)  # noqa: E731
    for bound in (np.ones(3, np.float32), np.arange(3), np.array([True, False, True])):
        found = seen_by(transform, lambda s, *a: shifted(s.astype(jnp.float32), *a), bound)
        assert found == [fn is decays]


@pytest.mark.parametrize("coupled", [False, True])
def test_what_is_made_up_may_have_to_be_positive(coupled):
    """As the variances of batch norm: of the two, one comes out negative at first."""

    def scaled(variance, theta, x):
        z = decays(theta, x)
        last = jnp.cumsum(z[:, 1:], 0) if coupled else z[:, 1:]
        return jnp.concatenate([z[:, :1], last], 1) / jnp.sqrt(variance)[None]

    assert seen_by(jax.jit, scaled, np.ones(2, np.float32)) == [not coupled]


@pytest.mark.parametrize("fn", [decays, normalised])
def test_random_keys_under_trace_are_made_up(fn):
    def noisy(keys, theta, x):
        return fn(theta, x) + jax.random.normal(keys[1], (1, 2))

    assert seen_by(jax.jit, noisy, jax.random.split(jax.random.key(1))) == [fn is decays]


@pytest.mark.parametrize("inputs", [(), None, {}], ids=str)
def test_without_inputs_no_sample_is_alone(inputs):
    assert treats_samples_alone(problem(lambda rates, _: decays(rates, TIMES)), RATES, inputs) is (
        False
    )


@pytest.mark.parametrize("fn", [decays, normalised])
def test_constants_under_trace_are_looked_at(fn):
    seen = []

    @jax.jit
    def traced(x):
        seen.append(treats_samples_alone(problem(fn), RATES, TIMES))
        return x

    traced(1.0)
    assert seen == [fn is decays]


@jax.custom_vjp
def one_way(x):
    return jnp.tanh(x)


one_way.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g / jnp.cosh(x) ** 2,))


def looped(rates, t):
    """A loop whose length is a value."""
    y = jax.lax.while_loop(lambda y: y.max() > 10, lambda y: y / 2, jnp.exp(rates))
    return t[:, None] * y[None]


def called_back(rates, t):
    z = decays(rates, t)
    return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(z.shape, z.dtype), z)


@pytest.mark.parametrize(
    "fn, expected",
    [
        (decays, (True, True)),
        (solved, (True, True)),
        (lambda rates, t: one_way(decays(rates, t)), (False, True)),
        (looped, (True, False)),
        (called_back, (False, False)),
    ],
    ids=["both", "scan", "custom_vjp", "while_loop", "callback"],
)
def test_which_derivatives_there_are(fn, expected):
    assert derivatives(problem(fn), RATES, TIMES) == expected
    seen = []

    @jax.jit
    def traced(rates):
        seen.append(derivatives(problem(fn), rates, TIMES))
        return rates

    traced(RATES)
    assert seen == [expected]
