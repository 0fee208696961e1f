"""The model, Φ, predictions, and what is refused at the door."""

# The tables of refusals read as tables.
# ruff: noqa: E501

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    LOSSES,
    Case,
    features,
    initial_theta,
    make_data,
    plain_rows,
    relative,
    w_value,
)

import varprox as vp
from varprox.model import objective

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


DOUBLE = {name: leaf.astype(np.float64) for name, leaf in THETA.items()}
SHORT = TARGETS[:-1]

REFUSED = {
    # what is built
    "features": (lambda: vp.Separable(3), TypeError, "features", "function", "3"),
    "head": (lambda: vp.Separable(features, "dense"), TypeError, "head", "dense()", "'dense'"),
    "head not called": (lambda: vp.Separable(features, vp.dense), TypeError, "head", "dense()", "function dense"),
    "bias": (lambda: vp.dense(bias=1), TypeError, "bias", "True or False", "1"),
    "model": (lambda: vp.Problem(features, vp.logistic(), w_penalty=1.0), TypeError, "model", "Separable", "function features"),
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
    # data
    "data one array": (solve(data=INPUTS), TypeError, "data", "pair (inputs, targets)", "ndarray"),
    "data three": (solve(data=(INPUTS, TARGETS, TARGETS)), TypeError, "data", "pair (inputs, targets)", "3"),
    "lengths": (solve(data=(INPUTS, SHORT)), ValueError, "inputs", "15 samples", "(16, 2)"),
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
    "inputs nan": (solve(data=(with_nan(INPUTS), TARGETS)), ValueError, "inputs", "finite", "1 NaN or Inf"),
    "inputs inf": (solve(data=(with_inf(INPUTS), TARGETS)), ValueError, "inputs", "finite", "1 NaN or Inf"),
    "class labels": (solve(data=(INPUTS, np.arange(16) % 2), loss=vp.softmax_cross_entropy()), TypeError, "targets", "floating", "int"),
    "softmax sums": (solve(data=(INPUTS, 2 * ENTROPY[1]), loss=vp.softmax_cross_entropy()), ValueError, "targets", "one-hot", "2"),
    "softmax negative": (solve(data=(INPUTS, 1.5 - 2 * ENTROPY[1]), loss=vp.softmax_cross_entropy()), ValueError, "targets", "one-hot", "-0.5"),
    "logistic range": (solve(data=(INPUTS, 2 * ENTROPY[1] - 1), loss=vp.logistic()), ValueError, "targets", "between 0 and 1", "-1"),
    # theta
    "theta empty": (solve(theta={}), ValueError, "theta", "at least one array", "empty"),
    "theta none": (solve(theta=None), ValueError, "theta", "at least one array", "empty"),
    "theta a number": (solve(theta={"opening": 1.0}), TypeError, "theta", "array", "float"),
    "theta integer": (solve(theta=THETA | {"n": np.arange(3)}), TypeError, "theta", "floating", "int64"),
    "theta nan": (solve(theta=THETA | {"layers": with_nan(THETA["layers"])}), ValueError, "theta", "finite", "1 NaN or Inf"),
    # features
    "features 1-D": (solve(fn=lambda t, y: features(t, y)[:, 0]), ValueError, "features", "(16, m)", "(16,)"),
    "features 3-D": (solve(fn=lambda t, y: features(t, y)[:, None]), ValueError, "features", "(16, m)", "(16, 1, 3)"),
    "features transposed": (solve(fn=lambda t, y: features(t, y).T), ValueError, "features", "(16, m)", "(3, 16)"),
    "features a tuple": (solve(fn=lambda t, y: (features(t, y), 0.0)), ValueError, "features", "(16, m)", "tuple"),
    "features integer": (solve(fn=lambda t, y: features(t, y).astype(jnp.int32)), TypeError, "features", "float32", "int32"),
    "features half": (solve(fn=lambda t, y: features(t, y).astype(jnp.float16)), TypeError, "features", "float32", "float16"),
    "no features": (solve(fn=lambda t, y: features(t, y)[:, :0]), ValueError, "features", "m ≥ 1", "(16, 0)"),
    # user functions that return something other than a number
    "penalty not scalar": (solve(theta_penalty=lambda t: t["opening"]), TypeError, "theta_penalty", "scalar", "(2, 3)"),
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
    for theta, data in ((DOUBLE, DATA), (THETA, (INPUTS, TARGETS.astype(np.float64)))):
        with pytest.raises(
            TypeError, match="theta, targets: expected one floating dtype"
        ) as caught:
            solve(theta, data)()
        assert "float32" in str(caught.value) and "float64" in str(caught.value)


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


def test_under_trace_nothing_raises():
    """Inside jit the checks are silent: NaN comes out as NaN, not as an exception."""
    value, _ = jax.jit(vp.reduced_objective(problem()))(THETA, (INPUTS, with_nan(TARGETS)))
    assert np.isnan(value)
