"""The solver for W inside the methods: its Hessian, its factor and how both follow the features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varprox as vp
from varprox.reduced import projection, w_hessian

ALPHA = 1e-2
LOSSES = {
    "softmax_cross_entropy": vp.softmax_cross_entropy(),
    "logistic": vp.logistic(),
    # One whose curvature is a full matrix for every sample.
    "convex_loss": vp.convex_loss(
        lambda p, c: jax.nn.logsumexp(jnp.array([1.0, 2.0, -1.0]) * p) + 0.1 * jnp.sum((p - c) ** 2)
    ),
}


def make(loss, samples=700, columns=5, seed=0):
    """A problem whose features are its inputs, rows, targets and some W; samples fill no chunk."""
    rng = np.random.default_rng(seed)
    problem = vp.Problem(vp.Separable(lambda theta, inputs: inputs), LOSSES[loss], w_penalty=ALPHA)
    rows = jnp.asarray(rng.normal(size=(samples, columns)))
    targets = jax.nn.one_hot(rng.integers(0, 3, samples), 3, dtype=rows.dtype)
    return problem, rows, targets, jnp.asarray(rng.normal(size=(columns, 3)))


def hessian(problem, rows, targets, w):
    """∇²_W Φ as a matrix, output by output, by automatic differentiation of Φ."""
    flat = w_hessian.to_flat(w)
    phi = lambda x: problem.w_objective(w_hessian.to_w(x, len(w)), rows, targets)  # noqa: E731
    return np.asarray(jax.hessian(phi)(flat))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_factor_is_an_inverse_root_of_the_hessian(loss, x64):
    problem, rows, targets, w = make(loss)
    factor = w_hessian.factorise(problem, rows, w, targets, whole=True)
    root = jax.vmap(factor.root, out_axes=1)(jnp.eye(w.size))
    np.testing.assert_allclose(
        root.T @ hessian(problem, rows, targets, w) @ root, np.eye(w.size), atol=1e-10
    )
    transposed = jax.vmap(factor.transposed_root, out_axes=1)(jnp.eye(w.size))
    np.testing.assert_allclose(transposed, root.T, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_are_inverse_roots_of_the_diagonal_blocks(loss, x64):
    problem, rows, targets, w = make(loss)
    factor = w_hessian.factorise(problem, rows, w, targets)
    assert factor.blocks.shape == (3, 5, 5)
    whole = hessian(problem, rows, targets, w)
    for k, block in enumerate(np.asarray(factor.blocks)):
        part = whole[5 * k : 5 * (k + 1), 5 * k : 5 * (k + 1)]
        np.testing.assert_allclose(block.T @ part @ block, np.eye(5), atol=1e-10)


@pytest.mark.parametrize("loss", ["logistic", "convex_loss"])
def test_w_and_the_factor_follow_a_change_of_basis(loss, x64):
    """Without a penalty on W a change of basis of the features changes neither predictions nor the
    preconditioned Hessian."""
    problem, rows, targets, w = make(loss)
    problem = vp.Problem(problem.model, problem.loss, w_penalty=1e-12)
    factor = w_hessian.factorise(problem, rows, w, targets, whole=True)
    start = projection.start_projection(problem, rows, targets)
    start = start._replace(w=w, rows=rows, factor=factor)
    change = np.random.default_rng(1).normal(size=(5, 5)) + 3 * np.eye(5)
    moved = projection.carry_over(problem, start, rows @ change)
    np.testing.assert_allclose(moved.rows @ moved.w, rows @ w, atol=1e-5)

    root = jax.vmap(moved.factor.root, out_axes=1)(jnp.eye(w.size))
    curvature = hessian(problem, moved.rows, targets, moved.w)
    before = jax.vmap(factor.root, out_axes=1)(jnp.eye(w.size))
    expected = before.T @ hessian(problem, rows, targets, w) @ before
    np.testing.assert_allclose(root.T @ curvature @ root, expected, atol=1e-4)


def test_a_solve_starts_from_what_is_carried_over(x64):
    problem, rows, targets, _ = make("softmax_cross_entropy")
    start = projection.start_projection(problem, rows, targets)
    first = projection.project(problem, rows, targets, start, 1e-4)
    first = first._replace(spent=jnp.int32(0))
    change = np.random.default_rng(1).normal(size=(5, 5)) + 3 * np.eye(5)
    near = (rows + 0.1 * jnp.sin(3 * rows)) @ change

    carried = projection.project(problem, near, targets, first, 1e-6)
    assert carried.spent == carried.products + 1
    # With these as its rows, W and the factor stay as they are.
    left = projection.project(problem, near, targets, first._replace(rows=near), 1e-6)
    assert 0 < 2 * carried.products < left.products

    exact = projection.project(problem, near, targets, start)
    assert 0 <= carried.value - exact.value <= 1e-6
    gradient = near.T @ problem.loss.gradient(near @ exact.w, targets) + ALPHA * exact.w
    assert np.linalg.norm(gradient) < 1e-10


def test_a_worn_factor_is_replaced(x64):
    """By one that belongs to W at the start of the solve; any other is kept."""
    problem, rows, targets, w = make("softmax_cross_entropy")
    start = projection.start_projection(problem, rows, targets)
    start = start._replace(
        w=w, rows=rows, factor=w_hessian.factorise(problem, rows, 0 * w, targets)
    )
    aged = start._replace(spent=jnp.int32(projection.LIFETIME))
    kept = projection.project(problem, rows, targets, aged, jnp.inf)
    np.testing.assert_allclose(kept.factor.blocks, start.factor.blocks)
    assert kept.products == 0 and kept.spent == projection.LIFETIME + 1

    made = projection.project(problem, rows, targets, kept, jnp.inf)
    expected = w_hessian.factorise(problem, rows, w, targets)
    np.testing.assert_allclose(made.factor.blocks, expected.blocks, rtol=1e-6)
    assert made.products == 0 and made.spent == 1


def test_a_loose_solve_stops_where_it_may(x64):
    """It takes fewer products than an exact one, and its excess is what was asked or less."""
    problem, rows, targets, _ = make("softmax_cross_entropy")
    start = projection.start_projection(problem, rows, targets)
    exact = projection.project(problem, rows, targets, start)
    products = [int(exact.products)]
    for tolerance in (1e-8, 1e-4, 1e-2):
        loose = projection.project(problem, rows, targets, start, tolerance)
        assert 0 <= loose.value - exact.value <= tolerance
        products.append(int(loose.products))
    assert products == sorted(products, reverse=True) and products[-1] < products[0] / 2


@pytest.mark.parametrize("unit", [1e-6, 1.0])
def test_a_solve_to_a_fraction_of_its_gain(unit, x64):
    """Rows nearly the same for every class let W gain little, and then little excess is allowed."""
    problem, rows, targets, _ = make("softmax_cross_entropy")
    rows = unit**0.5 * rows
    start = projection.start_projection(problem, rows, targets)
    exact = projection.project(problem, rows, targets, start)
    gain = problem.w_objective(start.w, rows, targets) - exact.value
    loose = projection.project(problem, rows, targets, start, relative=1e-2)
    assert 0 <= loose.value - exact.value <= 1e-2 * gain
    assert 0 < loose.products <= exact.products
