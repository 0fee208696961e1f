"""Ridge regression from triangular factors, against NumPy's dense solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varprox.least_squares import ridge, triangular_factor

COLUMNS, OUTPUTS = 5, 2


def make(samples, rank=COLUMNS, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(samples, rank)) @ rng.normal(size=(rank, COLUMNS))
    return rows, rng.normal(size=(samples, OUTPUTS))


@jax.jit
def solve(rows, targets, alpha):
    return ridge(triangular_factor(rows, targets), rows.shape[1], alpha)


@pytest.mark.parametrize("samples", [30, 6, 5, 3, 1])
def test_factor_keeps_the_gram_matrix_and_is_square_and_triangular(samples, x64):
    rows, targets = make(samples)
    factor = np.asarray(triangular_factor(rows, targets))
    stacked = np.hstack([rows, targets])
    assert factor.shape == (COLUMNS + OUTPUTS, COLUMNS + OUTPUTS)
    assert np.array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor, stacked.T @ stacked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunks", [[7, 23], [1, 1, 28], [10, 10, 10]])
def test_factors_of_chunks_combine_into_that_of_the_whole(chunks, x64):
    rows, targets = make(30)
    combined = np.zeros((0, COLUMNS + OUTPUTS))
    for part in np.split(np.arange(30), np.cumsum(chunks)[:-1]):
        factor = np.asarray(triangular_factor(rows[part], targets[part]))
        combined = np.vstack([combined, factor])
        combined = np.asarray(triangular_factor(combined[:, :COLUMNS], combined[:, COLUMNS:]))
    whole = np.asarray(triangular_factor(rows, targets))
    np.testing.assert_allclose(np.abs(combined), np.abs(whole), rtol=1e-11, atol=1e-12)
    parts, together = ridge(combined, COLUMNS, 0.1), ridge(whole, COLUMNS, 0.1)
    np.testing.assert_allclose(parts.w, together.w, rtol=1e-12)


@pytest.mark.parametrize("samples", [30, 5, 3])
@pytest.mark.parametrize("alpha", [1e-6, 1.0, 1e6])
def test_ridge_equals_the_stacked_problem(samples, alpha, x64):
    rows, targets = make(samples)
    result = solve(rows, targets, alpha)
    a = np.vstack([rows, alpha**0.5 * np.eye(COLUMNS)])
    b = np.vstack([targets, np.zeros((COLUMNS, OUTPUTS))])
    np.testing.assert_allclose(result.w, np.linalg.lstsq(a, b)[0], rtol=1e-7, atol=1e-12)
    root = np.asarray(result.inverse_root)
    expected = np.linalg.inv(rows.T @ rows + alpha * np.eye(COLUMNS))
    np.testing.assert_allclose(root @ root.T, expected, rtol=1e-6, atol=1e-9 / alpha)


@pytest.mark.parametrize("samples, rank", [(30, 5), (30, 3), (3, 3), (3, 2), (30, 0)])
def test_without_penalty_the_minimum_norm_solution_and_the_pseudo_inverse(samples, rank, x64):
    rows, targets = make(samples, rank)
    result = solve(rows, targets, 0.0)
    expected = np.linalg.lstsq(rows, targets, rcond=1e-10)[0]
    np.testing.assert_allclose(result.w, expected, rtol=1e-9, atol=1e-12)
    root = np.asarray(result.inverse_root)
    pseudo = np.linalg.pinv(rows.T @ rows, rcond=1e-10)
    np.testing.assert_allclose(root @ root.T, pseudo, rtol=1e-8, atol=1e-12)


def test_scaling_the_rows_scales_the_solution_inversely(x64):
    """No absolute threshold hides in the rank decision."""
    rows, targets = make(30, rank=3)
    w = np.asarray(solve(rows, targets, 0.0).w)
    for scale in (1e-12, 1e12):
        scaled = np.asarray(solve(scale * rows, targets, 0.0).w) * scale
        np.testing.assert_allclose(scaled, w, rtol=1e-9, atol=1e-12)


def test_single_precision_is_as_good_as_its_condition_number_not_its_square():
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.normal(size=(40, COLUMNS)))
    p, _ = np.linalg.qr(rng.normal(size=(COLUMNS, COLUMNS)))
    rows = (q * np.logspace(0, -4, COLUMNS) @ p).astype(np.float32)
    targets = (rows @ np.ones((COLUMNS, 1))).astype(np.float32)
    w = solve(rows, targets, 0.0).w
    assert w.dtype == jnp.float32
    exact = np.linalg.lstsq(rows.astype(np.float64), targets.astype(np.float64))[0]
    error = np.abs(np.asarray(w) - exact).max()
    normal = np.linalg.solve(rows.T @ rows, rows.T @ targets)
    assert error < 1e-2
    assert np.abs(normal - exact).max() > 10 * error
