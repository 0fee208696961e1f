"""Ridge regression by orthogonal factors, against NumPy's dense solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varprox.numerics.ridge import compressed, ridge, span

COLUMNS, OUTPUTS = 5, 2


def make(samples, rank=COLUMNS, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(samples, rank)) @ rng.normal(size=(rank, COLUMNS))
    return rows, rng.normal(size=(samples, OUTPUTS))


@jax.jit
def solve(rows, targets, alpha):
    return ridge(rows, targets, alpha)


@pytest.mark.parametrize("samples", [30, 5, 3])
@pytest.mark.parametrize("alpha", [0.0, 1e-3])
def test_the_basis_is_rows_times_the_root(samples, alpha, x64):
    rows, _ = make(samples)
    found = span(rows, alpha)
    np.testing.assert_allclose(found.basis, rows @ found.inverse_root, rtol=1e-9, atol=1e-10)


def graded(dtype, samples=40, condition=1e-4):
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.normal(size=(samples, COLUMNS)))
    p, _ = np.linalg.qr(rng.normal(size=(COLUMNS, COLUMNS)))
    return (q * np.geomspace(1, condition, COLUMNS) @ p).astype(dtype)


@pytest.mark.parametrize("dtype, condition", [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_the_basis_is_orthonormal_however_ill_conditioned_the_rows_are(dtype, condition, x64):
    rows = graded(dtype, condition=condition)
    found = span(rows, dtype(0))
    basis, root = np.asarray(found.basis), np.asarray(found.inverse_root)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(basis.T @ basis, np.eye(COLUMNS), atol=50 * eps)
    product = rows @ root
    assert np.abs(product.T @ product - np.eye(COLUMNS)).max() > 1e3 * eps


def test_the_residual_has_more_digits_than_w():
    """It is orthogonal to the rows to rounding of the targets; where it is formed with w, which is
    large, it is not."""
    rows = graded(np.float32)
    targets = np.random.default_rng(0).normal(size=(40, 1)).astype(np.float32)
    found = solve(rows, targets, 0.0)
    q, _ = np.linalg.qr(rows.astype(np.float64))
    formed = rows @ np.asarray(found.w) - targets
    inside, formed_inside = (np.abs(q.T @ np.asarray(r)) for r in (found.residual, formed))
    assert inside[:-1].max() < 1e-5 < 1e-4 < formed_inside.max()


@pytest.mark.parametrize("alpha", [0.0, 1e-6])
def test_a_small_residual_is_orthogonal_to_its_own_rounding(alpha):
    """And not to that of the targets, which is a thousand times larger."""
    rows = graded(np.float32)
    noise = np.random.default_rng(0).normal(size=(40, 1))
    targets = (rows @ np.ones((COLUMNS, 1)) + 1e-3 * noise).astype(np.float32)
    found = solve(rows, targets, np.float32(alpha))
    basis, root = np.asarray(found.span.basis, float), np.asarray(found.span.inverse_root, float)
    left = basis.T @ np.asarray(found.residual, float) + alpha * root.T @ np.asarray(found.w, float)
    size = np.linalg.norm(found.residual) + alpha * np.linalg.norm(root.T @ np.asarray(found.w))
    assert np.abs(left).max() < 4 * np.finfo(np.float32).eps * size
    assert size < 1e-2 * np.linalg.norm(targets)


@pytest.mark.parametrize("samples", [30, 5, 3])
def test_fewer_rows_have_the_same_solutions(samples, x64):
    rows, targets = make(samples)
    fewer, wanted = compressed(rows, targets)
    assert fewer.shape == (min(samples, COLUMNS), COLUMNS)
    for alpha in (0.0, 0.1):
        np.testing.assert_allclose(
            solve(fewer, wanted, alpha).w, solve(rows, targets, alpha).w, rtol=1e-9
        )


@pytest.mark.parametrize("samples", [30, 5, 3])
@pytest.mark.parametrize("alpha", [1e-6, 1.0, 1e6])
def test_ridge_equals_the_stacked_problem(samples, alpha, x64):
    rows, targets = make(samples)
    result = solve(rows, targets, alpha)
    a = np.vstack([rows, alpha**0.5 * np.eye(COLUMNS)])
    b = np.vstack([targets, np.zeros((COLUMNS, OUTPUTS))])
    np.testing.assert_allclose(result.w, np.linalg.lstsq(a, b)[0], rtol=1e-7, atol=1e-12)
    root = np.asarray(result.span.inverse_root)
    expected = np.linalg.inv(rows.T @ rows + alpha * np.eye(COLUMNS))
    np.testing.assert_allclose(root @ root.T, expected, rtol=1e-6, atol=1e-9 / alpha)


@pytest.mark.parametrize("samples, rank", [(30, 5), (30, 3), (3, 3), (3, 2), (30, 0)])
def test_without_penalty_the_minimum_norm_solution_and_the_pseudo_inverse(samples, rank, x64):
    rows, targets = make(samples, rank)
    result = solve(rows, targets, 0.0)
    expected = np.linalg.lstsq(rows, targets, rcond=1e-10)[0]
    np.testing.assert_allclose(result.w, expected, rtol=1e-9, atol=1e-12)
    root = np.asarray(result.span.inverse_root)
    pseudo = np.linalg.pinv(rows.T @ rows, rcond=1e-10)
    np.testing.assert_allclose(root @ root.T, pseudo, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rank", [5, 3])
@pytest.mark.parametrize("alpha", [0.0, 1e-2])
def test_an_offset_is_part_of_the_targets(rank, alpha, x64):
    """Where the rows lack full rank, too: w has the minimum norm then."""
    rows, targets = make(30, rank)
    offset = np.random.default_rng(3).normal(size=(COLUMNS, OUTPUTS))
    apart, together = (
        ridge(rows, targets, alpha, offset),
        ridge(rows, targets + rows @ offset, alpha),
    )
    np.testing.assert_allclose(apart.w, together.w, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(apart.residual, together.residual, rtol=1e-8, atol=1e-10)


def test_an_offset_costs_no_digits():
    rows, targets = (x.astype(np.float32) for x in make(30))
    rows[:, -1] = 1
    offset = np.zeros((COLUMNS, OUTPUTS), np.float32)
    offset[-1] = 1e5
    plain, shifted = ridge(rows, targets, 0.0), ridge(rows, targets, 0.0, offset)
    np.testing.assert_array_equal(shifted.residual, plain.residual)


def test_scaling_the_rows_scales_the_solution_inversely(x64):
    """No absolute threshold hides in the rank decision."""
    rows, targets = make(30, rank=3)
    w = np.asarray(solve(rows, targets, 0.0).w)
    for scale in (1e-12, 1e12):
        scaled = np.asarray(solve(scale * rows, targets, 0.0).w) * scale
        np.testing.assert_allclose(scaled, w, rtol=1e-9, atol=1e-12)


def test_single_precision_is_as_good_as_its_condition_number_not_its_square():
    rows = graded(np.float32)
    targets = (rows @ np.ones((COLUMNS, 1))).astype(np.float32)
    w = solve(rows, targets, 0.0).w
    assert w.dtype == jnp.float32
    exact = np.linalg.lstsq(rows.astype(np.float64), targets.astype(np.float64))[0]
    error = np.abs(np.asarray(w) - exact).max()
    normal = np.linalg.solve(rows.T @ rows, rows.T @ targets)
    assert error < 1e-2
    assert np.abs(normal - exact).max() > 10 * error
