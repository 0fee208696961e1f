"""The Gauss–Newton matrix and its root, formed by rows, against the dense formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import (
    CASES,
    Case,
    dense_reference,
    feature_derivative,
    initial_theta,
    loss_hessian,
    plain_rows,
    projection_at,
    relative,
    w_hessian,
)

import varprox as vp
from varprox.reduced import matrix as jacobian
from varprox.reduced.matrix import gauss_newton_matrix, gauss_newton_root
from varprox.reduced.projection import project, start_projection

# More outputs than columns of the rows.
MANY = [Case("least_squares", outputs=7), Case("least_squares", outputs=7, weights="entries")]


def kaufman_reference(case, w):
    """Kᵀ Q K − Bᵀ H⁻¹ B + ∇²R, the Schur complement of the Gauss–Newton matrix in (θ, W)."""
    theta, (inputs, targets) = initial_theta(), case.data
    flat, unravel = ravel_pytree(theta)
    rows = plain_rows(theta, inputs, case.bias)
    d_rows = np.asarray(feature_derivative(theta, inputs))
    if case.bias:
        d_rows = np.concatenate([d_rows, np.zeros((len(rows), 1, flat.size))], axis=1)
    k = np.einsum("ncp,co->nop", d_rows, w)
    q = loss_hessian(case.loss, rows @ w, targets)
    b = np.einsum("nc,nop,npk->cok", rows, q, k).reshape(w.size, -1)
    h = w_hessian(case.loss, rows, w, targets, case.w_penalty)
    penalty = jax.hessian(lambda flat: case.problem.penalty(unravel(flat)))(flat)
    return np.einsum("noi,nop,npj->ij", k, q, k) - b.T @ np.linalg.solve(h, b) + penalty


def form(fn, case, kaufman=False):
    theta = initial_theta()
    reference = dense_reference(case, theta, case.data)

    @jax.jit
    def made(problem, theta, data, w):
        at = projection_at(problem, theta, data, w)
        formed = fn(problem, theta, data, at, kaufman=kaufman)
        assert formed.transposed is not None
        return formed.gradient, formed.matrix, formed.transposed(*elsewhere(case, reference.w))

    found = made(case.problem, theta, case.data, reference.w)
    return reference, *map(np.asarray, found)


def elsewhere(case, w):
    """Slopes and weights of no particular place."""
    rng = np.random.default_rng(5)
    return rng.normal(size=case.data[1].shape), rng.normal(size=w.shape)


def transposed_reference(case, reference):
    """Jᵀ G + α₂ J_Wᵀ W."""
    slopes, weights = elsewhere(case, reference.w)
    of_w = case.w_penalty * reference.w_jacobian.T @ weights.ravel()
    return reference.jacobian.T @ slopes.ravel() + of_w


@pytest.mark.parametrize("case", [*CASES, *MANY], ids=str)
def test_the_matrix_equals_the_formula(case, x64):
    reference, gradient, matrix, transposed = form(gauss_newton_matrix, case)
    assert relative(gradient, reference.gradient) < 1e-8
    assert relative(transposed, transposed_reference(case, reference)) < 1e-8
    assert relative(matrix, reference.gauss_newton) < 1e-8


@pytest.mark.parametrize("case", [*CASES, *MANY], ids=str)
def test_the_root_gives_the_formula_without_the_penalty(case, x64):
    reference, gradient, root, transposed = form(gauss_newton_root, case)
    assert relative(gradient, reference.gradient) < 1e-8
    assert relative(transposed, transposed_reference(case, reference)) < 1e-8
    theta, unravel = jax.flatten_util.ravel_pytree(initial_theta())
    penalty = jax.hessian(lambda flat: case.problem.penalty(unravel(flat)))(theta)
    columns, outputs = reference.w.shape
    alike = case.problem.loss.quadratic and case.weights != "entries"
    dimensions = min(columns, outputs) if alike else outputs
    height = (len(case.data[1]) + columns) * dimensions + reference.w.size
    assert root.shape == (height, theta.size)
    assert relative(root.T @ root + penalty, reference.gauss_newton) < 1e-8


@pytest.mark.parametrize("case", [*CASES, *MANY], ids=str)
def test_kaufmans_matrix_is_a_schur_complement(case, x64):
    reference, gradient, matrix, _ = form(gauss_newton_matrix, case, kaufman=True)
    assert relative(gradient, reference.gradient) < 1e-8
    assert relative(matrix, kaufman_reference(case, reference.w)) < 1e-8
    assert relative(matrix, reference.gauss_newton) > 1e-6


def test_kaufmans_root_is_that_of_his_matrix(x64):
    case = Case("softmax_cross_entropy", penalty="none")
    reference, gradient, root, _ = form(gauss_newton_root, case, kaufman=True)
    assert relative(gradient, reference.gradient) < 1e-8
    assert relative(root.T @ root, kaufman_reference(case, reference.w)) < 1e-8


@pytest.mark.parametrize("samples", [7, 8, 16])
def test_blocks_of_any_size_give_the_same_matrix(samples, x64, monkeypatch):
    """16 samples in three blocks, of which the last begins with those of the one before, in two and
    in one; their rows are not kept."""
    case, theta = Case("softmax_cross_entropy"), initial_theta()
    of = case.problem, theta, case.data
    w = vp.solve_w(*of)
    monkeypatch.setattr(jacobian, "KEPT_BYTES", 0)
    monkeypatch.setattr(jacobian, "BLOCK_BYTES", samples * len(w) * ravel_pytree(theta)[0].nbytes)

    @jax.jit
    def made(*of):
        formed = gauss_newton_matrix(*of, kaufman=False)
        assert formed.transposed is None
        return formed.gradient, formed.matrix

    gradient, matrix = made(*of, projection_at(*of, w))
    reference = dense_reference(case, theta, case.data)
    assert relative(gradient, reference.gradient) < 1e-8
    assert relative(matrix, reference.gauss_newton) < 1e-8


@pytest.mark.parametrize("samples", [16, 5])
def test_slopes_are_compressed_to_their_rank(samples, x64, monkeypatch):
    """With more samples than outputs and with fewer, in parts of two, of which rounding leaves some
    out: targets differ from what can be fitted in two directions only."""
    monkeypatch.setattr(jacobian, "OUTPUTS", 2)
    inputs, targets = (x[:samples] for x in MANY[0].data)
    rng = np.random.default_rng(1)
    targets = rng.normal(size=(samples, 2)) @ rng.normal(size=(2, targets.shape[1]))
    theta = initial_theta()
    size = ravel_pytree(theta)[0].size
    w = vp.solve_w(MANY[0].problem, theta, (inputs, targets))
    of = MANY[0].problem, theta, (inputs, targets)
    at = projection_at(*of, w)
    parts, used = jacobian._compressed(MANY[0].problem, w, at.slopes, targets, size)
    assert len(parts) == -(-min(samples, 7) // 2) and used == 1

    compressed = jax.jit(lambda *of: gauss_newton_matrix(*of, kaufman=False).matrix)(*of, at)
    reference = dense_reference(MANY[0], theta, (inputs, targets))
    assert relative(compressed, reference.gauss_newton) < 1e-8


def test_wide_symmetric_products_are_halved(x64, monkeypatch):
    monkeypatch.setattr(jacobian, "NARROW", 2)
    rows = np.random.default_rng(0).normal(size=(6, 11))
    np.testing.assert_allclose(jacobian._gram(rows), rows.T @ rows, rtol=1e-12, atol=1e-14)


def test_rows_are_kept_within_a_budget(x64, monkeypatch):
    case, theta = Case("least_squares"), initial_theta()
    bytes_of_k = case.data[1].size * ravel_pytree(theta)[0].nbytes
    of = case.problem, theta, case.data
    at = projection_at(*of, vp.solve_w(*of))
    for budget, kept in ((bytes_of_k, True), (bytes_of_k - 1, False)):
        monkeypatch.setattr(jacobian, "KEPT_BYTES", budget)
        assert (gauss_newton_matrix(*of, at, kaufman=True).transposed is not None) == kept


def test_inputs_may_be_a_pytree(x64):
    case = Case("logistic")
    inputs, targets = case.data
    problem = vp.Problem(
        vp.Separable(lambda theta, x: case.problem.model.features(theta, jnp.stack(x, axis=1))),
        case.problem.loss,
        case.problem.theta_penalty,
        case.w_penalty,
    )
    theta = initial_theta()
    reference = dense_reference(case, theta, case.data)
    of = problem, theta, (tuple(inputs.T), targets)
    matrix = gauss_newton_matrix(*of, projection_at(*of, reference.w), kaufman=False).matrix
    assert relative(matrix, reference.gauss_newton) < 1e-8


def test_memory_is_that_of_the_matrix_and_of_a_pass(x64):
    """Not that of all rows of K, 2.6 GB for 200,000 samples and 1640 weights."""
    shapes = {"first": (2, 40), "second": (40, 38), "third": (38, 1)}
    theta = {name: jax.ShapeDtypeStruct(shape, np.float64) for name, shape in shapes.items()}

    def features(theta, inputs):
        return jnp.tanh(jnp.tanh(inputs @ theta["first"]) @ theta["second"]) @ theta["third"]

    problem = vp.Problem(vp.Separable(features), vp.least_squares(), 1e-3, 1e-3)
    samples, size = 200_000, sum(np.prod(shape) for shape in shapes.values())
    data = [jax.ShapeDtypeStruct((samples, n), np.float64) for n in (2, 1)]
    w = jax.ShapeDtypeStruct((2, 1), np.float64)

    def matrix(theta, data, w):
        at = projection_at(problem, theta, data, w)
        return gauss_newton_matrix(problem, theta, data, at, kaufman=False)[:2]

    used = jax.jit(matrix).lower(theta, tuple(data), w).compile().memory_analysis()
    a_pass = samples * 80 * 8  # bytes of the layers' outputs
    assert used.temp_size_in_bytes < 6 * size**2 * 8 + 6 * a_pass < samples * size * 8 / 2


def nearly_equal(theta, inputs):
    """Columns that hardly differ, so that W and K are large and most of K is spanned by Z."""
    rates = jnp.concatenate([theta, theta * (1 + jnp.asarray(1e-5, theta.dtype))])
    return jnp.exp(-inputs * rates[None])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_matrix_is_semidefinite_where_it_would_cancel(dtype, x64):
    """And in double precision that of NumPy's projection."""
    inputs = np.linspace(0, 5, 50, dtype=dtype)[:, None]
    targets = (np.sin(inputs) + inputs).astype(dtype)
    theta = np.array([0.3, 0.7, 1.5], dtype)
    problem = vp.Problem(vp.Separable(nearly_equal, vp.dense(bias=False)), vp.least_squares())
    rows = problem.model.rows(theta, inputs)

    @jax.jit
    def made(problem, theta, data):
        rows = problem.model.rows(theta, data[0])
        at = project(problem, rows, data[1], start_projection(problem, rows, data[1]))
        return at, gauss_newton_matrix(problem, theta, data, at, kaufman=True).matrix

    at, found = made(problem, theta, (inputs, targets))
    eigenvalues = np.linalg.eigvalsh(np.asarray(found, float))
    assert eigenvalues[0] > -4 * np.finfo(dtype).eps * eigenvalues[-1]
    if dtype == np.float64:
        d_rows = np.asarray(jax.jacfwd(lambda theta: problem.model.rows(theta, inputs))(theta))
        k = np.einsum("ncp,co->np", d_rows, at.w)
        q, _ = np.linalg.qr(np.asarray(rows))
        k = k - q @ (q.T @ k)
        assert np.abs(at.w).max() > 1e4
        assert relative(found, k.T @ k / len(k)) < 1e-6


@pytest.mark.parametrize("kaufman", [False, True])
def test_forward_passes_give_the_same_matrix(kaufman, x64):
    for case in (Case("least_squares"), Case("softmax_cross_entropy")):
        forward = functools.partial(gauss_newton_matrix, forward=True)
        _reference, gradient, matrix, transposed = form(forward, case, kaufman=kaufman)
        _, *backward = form(gauss_newton_matrix, case, kaufman=kaufman)
        for found, expected in zip((gradient, matrix, transposed), backward, strict=True):
            assert relative(found, expected) < 1e-9
