"""Penalties: closed forms, and their weights as traced numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varprox as vp
from varprox.problem.penalties import as_penalty

THETA = {"a": np.array([[1.0, -2.0], [3.0, 0.5]]), "b": [np.array([2.0, 0.0, -1.0])]}
SQUARES = 1 + 4 + 9 + 0.25 + 4 + 1


def total(penalty, theta=THETA):
    return sum(p(theta) for p in as_penalty("theta_penalty", penalty))


def test_tikhonov_is_half_the_sum_of_squares_of_all_leaves(x64):
    assert abs(total(vp.tikhonov(3.0)) - 1.5 * SQUARES) < 1e-14
    gradient = jax.grad(vp.tikhonov(3.0))(THETA)
    jax.tree.map(lambda g, t: np.testing.assert_allclose(g, 3 * t), gradient, THETA)


def test_smoothness_is_that_of_the_slopes_in_time(x64):
    """½ α ∫ |θ'|² of a piecewise linear function: a straight line and a kink, by hand."""
    line = np.linspace(0, 4, 5)[:, None] * np.ones(3)
    penalty = vp.smoothness_in_time(2.0, 0.5)
    assert abs(penalty(line) - 0.5 * 2 * 4 * 3 * (1 / 0.5) ** 2) < 1e-12
    kink = np.array([0.0, 1.0, -1.0])
    assert abs(penalty([kink]) - 0.5 * 2 * (2**2 + 4**2)) < 1e-12
    assert penalty(np.ones((5, 2))) == 0


def test_smoothness_sees_only_the_leaves_it_is_pointed_at(x64):
    penalty = vp.smoothness_in_time(1.0, 1.0, lambda theta: theta["a"])
    assert abs(penalty(THETA) - 0.5 * (2**2 + 2.5**2)) < 1e-14
    np.testing.assert_array_equal(jax.grad(penalty)(THETA)["b"][0], 0)
    everything = vp.smoothness_in_time(1.0, 1.0)
    assert abs(everything(THETA) - 0.5 * (2**2 + 2.5**2 + 2**2 + 1)) < 1e-14


def test_numbers_functions_and_sequences_add_up(x64):
    cosine = lambda theta: jnp.sum(jnp.cos(theta["a"]))  # noqa: E731
    expected = 0.5 * 0.1 * SQUARES + np.sum(np.cos(THETA["a"]))
    for penalty in ((0.1, cosine), [vp.tikhonov(0.1), cosine], (cosine, [0.05, (0.05,)])):
        assert abs(total(penalty) - expected) < 1e-13
    assert as_penalty("theta_penalty", None) == ()
    assert total(None) == 0


def test_a_problem_adds_its_penalties(x64):
    model = vp.Separable(lambda theta, inputs: inputs)
    problem = vp.Problem(model, vp.least_squares(), (0.1, vp.tikhonov(0.2)))
    assert abs(problem.penalty(THETA) - 0.5 * 0.3 * SQUARES) < 1e-14
    nothing = vp.Problem(model, vp.least_squares()).penalty(THETA)
    assert nothing == 0 and nothing.dtype == jnp.float64


@pytest.mark.parametrize(
    "build",
    [
        vp.tikhonov,
        lambda alpha: vp.smoothness_in_time(alpha, 0.5),
        lambda alpha: vp.smoothness_in_time(0.3, alpha),
        lambda alpha: as_penalty("theta_penalty", alpha)[0],
    ],
    ids=["tikhonov", "smoothness", "time step", "number"],
)
def test_another_weight_does_not_recompile(build, x64):
    traces = []

    @jax.jit
    def value(penalty, theta):
        traces.append(1)
        return penalty(theta)

    values = [float(value(build(alpha), THETA)) for alpha in (0.1, 0.2, 0.4)]
    assert len(traces) == 1
    assert len(set(values)) == 3


@pytest.mark.parametrize("build", [vp.tikhonov, lambda a: vp.smoothness_in_time(a, 0.5)])
def test_weights_can_be_differentiated(build, x64):
    slope = jax.jit(jax.grad(lambda alpha: build(alpha)(THETA)))(0.7)
    assert abs(slope - build(1.0)(THETA)) < 1e-13


@pytest.mark.parametrize("penalty", [vp.tikhonov(0.1), vp.smoothness_in_time(0.1, 0.5)])
def test_penalties_follow_the_dtype(penalty, x64):
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), THETA)
    assert penalty(single).dtype == jnp.float32
    assert penalty(THETA).dtype == jnp.float64


@pytest.mark.parametrize("promotion", ["strict", "standard"])
@pytest.mark.parametrize(
    "number", [np.float64(0.1), np.array(0.1), jnp.float32(0.1), 1, np.int8(1)]
)
def test_numbers_of_any_kind_take_the_dtype_of_theta(number, promotion, x64):
    """So do functions whose value has another dtype."""
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), THETA)
    model = vp.Separable(lambda theta, inputs: inputs)
    double = lambda theta: jnp.sum(theta["a"] ** 2).astype(jnp.float64)  # noqa: E731
    with jax.numpy_dtype_promotion(promotion):
        penalties = (number, vp.tikhonov(number), vp.smoothness_in_time(number, number), double)
        for penalty in penalties:
            problem = vp.Problem(model, vp.least_squares(), penalty, number)
            value, gradient = jax.jit(jax.value_and_grad(problem.penalty))(single)
            exact = vp.Problem(model, vp.least_squares(), penalty).penalty(THETA)
            assert value.dtype == jnp.float32 and exact.dtype == jnp.float64
            assert abs(float(value) - float(exact)) < 1e-6 * exact
            assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
        w = np.ones((2, 3), np.float32)
        of_w = problem.penalty_on_w(w)
        assert of_w.dtype == jnp.float32 and abs(float(of_w) - 3 * float(number)) < 1e-6


@pytest.mark.parametrize("promotion", ["strict", "standard"])
def test_a_weight_under_trace_takes_the_dtype_of_theta(promotion, x64):
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), THETA)
    with jax.numpy_dtype_promotion(promotion):
        for build in (vp.tikhonov, lambda alpha: vp.smoothness_in_time(alpha, alpha)):
            value = jax.jit(lambda alpha, build=build: build(alpha)(single))(np.float64(0.3))
            assert (
                value.dtype == jnp.float32 and abs(float(value) - float(build(0.3)(single))) < 1e-5
            )


@pytest.mark.parametrize(
    "build, error, named, came",
    [
        (lambda: vp.tikhonov(True), TypeError, "alpha", "True"),
        (lambda: vp.tikhonov(np.bool_(False)), TypeError, "alpha", "False"),
        (lambda: vp.tikhonov(1j), TypeError, "alpha", "1j"),
        (lambda: vp.tikhonov(np.complex64(1)), TypeError, "alpha", "1+0j"),
        (lambda: vp.tikhonov(b"1"), TypeError, "alpha", "b'1'"),
        (lambda: vp.tikhonov(np.timedelta64(1, "ns")), TypeError, "alpha", "timedelta"),
        (lambda: vp.tikhonov(10**400), ValueError, "alpha", "1000"),
        (lambda: vp.tikhonov(-1.0), ValueError, "alpha", "-1.0"),
        (lambda: vp.tikhonov(float("nan")), ValueError, "alpha", "nan"),
        (lambda: vp.tikhonov(float("inf")), ValueError, "alpha", "inf"),
        (lambda: vp.tikhonov("1e-3"), TypeError, "alpha", "'1e-3'"),
        (lambda: vp.tikhonov(None), TypeError, "alpha", "None"),
        (lambda: vp.smoothness_in_time(-1.0, 0.1), ValueError, "alpha", "-1.0"),
        (lambda: vp.smoothness_in_time(1.0, 0.0), ValueError, "step", "0.0"),
        (lambda: vp.smoothness_in_time(1.0, -0.5), ValueError, "step", "-0.5"),
        (lambda: vp.smoothness_in_time(1.0, float("nan")), ValueError, "step", "nan"),
        (lambda: vp.smoothness_in_time(1.0, "a"), TypeError, "step", "'a'"),
        (lambda: vp.smoothness_in_time(1.0, None), TypeError, "step", "None"),
        (lambda: vp.smoothness_in_time(1.0, 0.5, "layers"), TypeError, "where", "'layers'"),
    ],
)
def test_bad_penalties_are_refused(build, error, named, came):
    with pytest.raises(error, match=f"^{named}: expected") as caught:
        build()
    assert came in str(caught.value)
