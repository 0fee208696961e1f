"""J, J_W, the Gauss–Newton matrix and the Hessian of the reduced objective, by dense formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import (
    CASES,
    LOSSES,
    WIDTH,
    Case,
    assert_taylor,
    dense_reference,
    direction,
    features,
    initial_theta,
    loss_hessian,
    move,
    plain_reduced,
    relative,
)

import varprox as vp
from varprox.reduced import curvature

SIZE = sum(leaf.size for leaf in initial_theta().values())


def flat(tree):
    return ravel_pytree(tree)[0]


def unflatten(vector):
    _, unravel = ravel_pytree(initial_theta())
    return unravel(vector)


@jax.jit
def dense_maps(problem, theta, data):
    """Every linear map of both curvatures as a matrix."""
    unit = jnp.eye(SIZE)
    gauss_newton, newton = vp.gauss_newton(problem, theta, data), vp.newton(problem, theta, data)
    unit_u = jnp.eye(data[1].size).reshape(-1, *data[1].shape)
    return {
        "value": gauss_newton.value,
        "w": gauss_newton.w,
        "gradient": flat(gauss_newton.gradient),
        "gauss_newton": jax.vmap(lambda v: flat(gauss_newton.matvec(unflatten(v))))(unit),
        "newton": jax.vmap(lambda v: flat(newton.matvec(unflatten(v))))(unit),
        "jvp": jax.vmap(lambda v: gauss_newton.jvp(unflatten(v)).ravel())(unit).T,
        "w_jvp": jax.vmap(lambda v: gauss_newton.w_jvp(unflatten(v)).ravel())(unit).T,
        "vjp": jax.vmap(lambda u: flat(gauss_newton.vjp(u)))(unit_u),
    }


@jax.jit
def evaluate(problem, theta, data):
    reduced = vp.reduced_objective(problem)
    (value, w), gradient = jax.value_and_grad(reduced, has_aux=True)(theta, data)
    return {
        "value": value,
        "w": w,
        "gradient": flat(gradient),
        "predictions": vp.predict(problem, theta, w, data[0]),
    }


@functools.cache
def maps(case):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, dense_maps(case.problem, initial_theta(), case.data))


@functools.cache
def reference(case):
    with jax.enable_x64(True):
        return dense_reference(case, initial_theta(), case.data)


@functools.cache
def moved(case, h):
    """The reduced objective and what belongs to it at θ + h · direction."""
    with jax.enable_x64(True):
        theta = move(initial_theta(), h, direction())
        return jax.tree.map(np.asarray, evaluate(case.problem, theta, case.data))


def flat_direction():
    with jax.enable_x64(True):
        return np.asarray(flat(direction()))


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    """Of module scope: the tests of a case run one after the other and share what they compile."""
    return request.param


def test_value_weights_and_gradient_equal_the_formula(case):
    for name in ("value", "w", "gradient"):
        assert relative(maps(case)[name], getattr(reference(case), name)) < 1e-8, name
        assert relative(moved(case, 0.0)[name], getattr(reference(case), name)) < 1e-8, name


def test_jacobians_equal_the_implicit_function_theorem(case):
    assert relative(maps(case)["jvp"], reference(case).jacobian) < 1e-8
    assert relative(maps(case)["w_jvp"], reference(case).w_jacobian) < 1e-8


def test_gauss_newton_equals_the_formula(case):
    assert relative(maps(case)["gauss_newton"], reference(case).gauss_newton) < 1e-8


def test_jvp_and_vjp_are_adjoint(case):
    rng = np.random.default_rng(3)
    jacobian, transposed = maps(case)["jvp"], maps(case)["vjp"]
    for _ in range(5):
        v, u = rng.normal(size=SIZE), rng.normal(size=len(transposed))
        product = jacobian @ v
        scale = np.linalg.norm(product) * np.linalg.norm(u)
        assert abs(product @ u - v @ (u @ transposed)) < 1e-10 * scale


def test_products_are_symmetric(case):
    for name in ("gauss_newton", "newton"):
        matrix = maps(case)[name]
        assert relative(matrix.T, matrix) < 1e-10, name


def test_gauss_newton_is_positive_semidefinite_up_to_the_penalty(case):
    """Without ∇²R, which for an arbitrary function may be indefinite."""
    penalty = case.problem.penalty
    with jax.enable_x64(True):
        curvature = jax.hessian(lambda v: penalty(unflatten(v)))(flat(initial_theta()))
    eigenvalues = np.linalg.eigvalsh(maps(case)["gauss_newton"] - np.asarray(curvature))
    assert eigenvalues[0] > -1e-10 * eigenvalues[-1]
    assert eigenvalues[-1] > 0


def test_gradient_is_the_derivative_of_the_value(case):
    slope = maps(case)["gradient"] @ flat_direction()
    assert_taylor(lambda h: moved(case, h)["value"], slope)


def test_newton_product_is_the_derivative_of_the_gradient(case):
    change = maps(case)["newton"] @ flat_direction()
    assert_taylor(lambda h: moved(case, h)["gradient"], change)


def test_jvp_is_the_derivative_of_the_predictions(case):
    change = (maps(case)["jvp"] @ flat_direction()).reshape(case.data[1].shape)
    assert_taylor(lambda h: moved(case, h)["predictions"], change)


def test_w_jvp_is_the_derivative_of_the_weights(case):
    w = maps(case)["w"]
    change = (maps(case)["w_jvp"] @ flat_direction()).reshape(w.shape)
    assert_taylor(lambda h: moved(case, h)["w"], change)


def test_gauss_newton_differs_from_newton_where_there_is_a_residual(case):
    assert relative(maps(case)["gauss_newton"], maps(case)["newton"]) > 1e-2


@pytest.mark.parametrize("loss", LOSSES)
def test_newton_equals_the_hessian_of_a_plain_reduced_objective(loss, x64):
    case = Case(loss)
    start, data, w = flat(initial_theta()), case.data, reference(case).w
    plain = lambda v: plain_reduced(case, w, v, unflatten, data)  # noqa: E731
    expected = jax.jit(jax.hessian(plain))(start)
    assert relative(maps(case)["newton"], expected) < 1e-8


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_without_residual_gauss_newton_equals_newton(bias, x64):
    """Targets that the model generates at θ, no penalties: residual and its curvature vanish."""
    case = Case("least_squares", bias=bias, penalty="none", w_penalty=0.0)
    theta, (inputs, _) = initial_theta(), case.data
    w_true = np.random.default_rng(4).normal(size=(WIDTH + bias, 3))
    data = (inputs, np.asarray(vp.predict(case.problem, theta, w_true, inputs)))
    result = dense_maps(case.problem, theta, data)
    assert relative(result["w"], w_true) < 1e-10
    assert relative(result["gauss_newton"], result["newton"]) < 1e-10
    nearby = move(theta, 1e-2, direction())
    result = dense_maps(case.problem, nearby, data)
    assert 1e-6 < relative(result["gauss_newton"], result["newton"]) < 0.5


def test_many_outputs_use_blocks_and_give_the_same_curvature(x64):
    """Past the size up to which the Hessian in W is factorised, its systems are solved by CG."""
    outputs, width, samples, alpha = 23, 90, 30, 1e-2
    rng = np.random.default_rng(5)
    projection = rng.normal(size=(WIDTH, width)) / WIDTH**0.5

    def wide(theta, inputs):
        return jnp.tanh(features(theta, inputs) @ projection + jnp.arange(width)[None] / width)

    targets = np.eye(outputs)[rng.integers(outputs, size=samples)]
    data, u = (rng.normal(size=(samples, 2)), targets), rng.normal(size=targets.shape)
    problem = vp.Problem(vp.Separable(wide), vp.softmax_cross_entropy(), None, alpha)
    theta, along = initial_theta(), direction()

    @jax.jit
    def products(theta):
        newton = vp.newton(problem, theta, data)
        return {
            "gradient": flat(newton.gradient),
            "newton": flat(newton.matvec(along)),
            "jvp": newton.jvp(along),
            "vjp": flat(newton.vjp(u)),
            "w_jvp": newton.w_jvp(along),
            "w": newton.w,
            "predictions": vp.predict(problem, theta, newton.w, data[0]),
        }

    @jax.jit
    def gauss_newton(theta):
        return flat(vp.gauss_newton(problem, theta, data).matvec(along))

    here = jax.tree.map(np.asarray, products(theta))
    v = np.asarray(flat(along))
    assert abs(np.sum(here["jvp"] * u) - v @ here["vjp"]) < 1e-10 * np.linalg.norm(here["jvp"])
    at = functools.cache(lambda h: products(move(theta, h, along)))
    for function, derivative in [("gradient", "newton"), ("predictions", "jvp"), ("w", "w_jvp")]:
        assert_taylor(lambda h, name=function: at(h)[name], here[derivative])

    blocks = loss_hessian("softmax_cross_entropy", here["predictions"], targets)
    expected = np.einsum("no,nop,np->", here["jvp"], blocks, here["jvp"])
    expected += alpha * np.sum(here["w_jvp"] ** 2)
    assert abs(v @ gauss_newton(theta) - expected) < 1e-8 * expected


@pytest.mark.parametrize("loss", LOSSES)
def test_single_precision_agrees_with_double(loss):
    case = Case(loss)

    @jax.jit
    def product(theta, along, data):
        curvature = vp.gauss_newton(case.problem, theta, data)
        return curvature.value, flat(curvature.gradient), flat(curvature.matvec(along))

    data = jax.tree.map(lambda x: x.astype(np.float32), case.data)
    single = product(initial_theta(dtype=np.float32), direction(dtype=np.float32), data)
    expected = reference(case)
    assert {part.dtype for part in single} == {jnp.dtype(jnp.float32)}
    assert relative(single[0], expected.value) < 1e-4
    assert relative(single[1], expected.gradient) < 1e-3
    assert relative(single[2], expected.gauss_newton @ flat_direction()) < 1e-3


def test_products_are_finite_where_the_unneeded_half_would_divide_by_zero(x64):
    """Which product it is may be known only when it runs."""
    inputs = np.linspace(0, 1, 20)[:, None]
    data = inputs, np.sin(3 * inputs)
    bumps = lambda theta, x: jnp.exp(-(((x - theta[:1]) / theta[1:]) ** 2))  # noqa: E731
    problem = vp.Problem(vp.Separable(bumps), vp.least_squares(), 1e-3, 1e-3)
    theta, v = np.array([[0.2, 0.8], [0.4, 0.3]]), np.ones((2, 2))
    product = jax.jit(lambda full: curvature.linearise(problem, theta, data, full=full).matvec(v))
    for full, exact in ((False, vp.gauss_newton), (True, vp.newton)):
        expected = exact(problem, theta, data).matvec(v)
        np.testing.assert_allclose(product(full), expected, rtol=1e-9)
