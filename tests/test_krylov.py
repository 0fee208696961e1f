"""Lanczos: the identities that define its result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operators import SIZE, never, operator

from varprox.numerics.krylov import lanczos


@functools.partial(jax.jit, static_argnames="rank")
def run(matrix, start, rank):
    return lanczos(lambda v: matrix @ v, start, rank, never, jnp.zeros(()))


def projected(space):
    """The tridiagonal matrix, dense, of the size reached."""
    k = int(space.tridiagonal.size)
    off = np.asarray(space.tridiagonal.off_diagonal)[: k - 1]
    return np.diag(np.asarray(space.tridiagonal.diagonal)[:k]) + np.diag(off, 1) + np.diag(off, -1)


@pytest.mark.parametrize("kind", ["definite", "indefinite", "ill-conditioned", "clustered"])
@pytest.mark.parametrize("rank", [1, 5, SIZE])
def test_basis_is_orthonormal_and_tridiagonalises_the_operator(kind, rank, x64):
    matrix, start = operator(kind)
    space = run(matrix, start, rank)
    k = int(space.tridiagonal.size)
    basis = np.asarray(space.basis)
    assert basis.shape == (rank, SIZE) and 1 <= k <= rank
    assert not basis[k:].any()
    basis = basis[:k]
    np.testing.assert_allclose(basis @ basis.T, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(basis @ matrix @ basis.T, projected(space), atol=1e-11)
    np.testing.assert_allclose(basis[0], start / np.linalg.norm(start), rtol=1e-14)
    assert abs(space.start_norm - np.linalg.norm(start)) < 1e-14 * np.linalg.norm(start)


def test_basis_spans_the_krylov_space(x64):
    matrix, start = operator("definite")
    basis = np.asarray(run(matrix, start, 5).basis)
    vector = start
    for _ in range(5):
        outside = vector - basis.T @ (basis @ vector)
        assert np.linalg.norm(outside) < 1e-9 * np.linalg.norm(vector)
        vector = matrix @ vector
    assert np.linalg.norm(vector - basis.T @ (basis @ vector)) > 1e-6 * np.linalg.norm(vector)


def test_full_rank_gives_the_eigenvalues(x64):
    matrix, start = operator("indefinite")
    space = run(matrix, start, SIZE)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(projected(space)), np.linspace(-3, 5, SIZE), atol=1e-11
    )


@pytest.mark.parametrize("dimension", [1, 2, 4])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_an_invariant_subspace_ends_the_iteration(dimension, scale, x64):
    """A start in the span of a few eigenvectors: no more products than its dimension."""
    eigenvalues = np.linspace(1, 5, SIZE)
    start = np.where(np.arange(SIZE) % 3 == 0, 1.0, 0.0) * (np.arange(SIZE) < 3 * dimension)
    space = run(scale * np.diag(eigenvalues), start, SIZE)
    assert int(space.tridiagonal.size) == dimension
    expected = scale * eigenvalues[::3][:dimension]
    np.testing.assert_allclose(np.linalg.eigvalsh(projected(space)), expected, rtol=1e-10)


def test_rank_above_the_dimension_ends_at_the_dimension(x64):
    matrix, start = operator("definite")
    space = run(matrix, start, SIZE + 5)
    k = int(space.tridiagonal.size)
    assert k <= SIZE
    np.testing.assert_allclose(
        np.asarray(space.basis)[:k] @ np.asarray(space.basis)[:k].T, np.eye(k), atol=1e-12
    )


def test_zero_start_gives_an_empty_space(x64):
    space = run(operator("definite")[0], np.zeros(SIZE), 5)
    assert space.tridiagonal.size == 0 and not np.asarray(space.basis).any()
    assert space.start_norm == 0


def test_not_a_number_ends_the_iteration(x64):
    matrix, start = operator("definite")
    space = run(np.full_like(matrix, np.nan), start, 5)
    assert space.tridiagonal.size == 1
    np.testing.assert_allclose(np.asarray(space.basis)[0], start / np.linalg.norm(start))


def test_stop_is_asked_after_every_product_and_keeps_its_memory(x64):
    """It sees the known part of the tridiagonal matrix, and what it returned the time before."""
    matrix, start = operator("definite")

    def stop(tridiagonal, memory):
        return tridiagonal.size >= 3, memory + tridiagonal.diagonal.sum()

    space = jax.jit(lambda: lanczos(lambda v: matrix @ v, start, 8, stop, jnp.zeros(())))()
    assert space.tridiagonal.size == 3
    whole = run(matrix, start, 8).tridiagonal
    np.testing.assert_allclose(space.tridiagonal.diagonal[:3], whole.diagonal[:3], rtol=1e-12)
    assert not np.asarray(space.tridiagonal.diagonal)[3:].any()


def test_single_precision_basis_is_orthonormal():
    matrix, start = operator("ill-conditioned")
    space = run(matrix.astype(np.float32), start.astype(np.float32), SIZE)
    k = int(space.tridiagonal.size)
    basis = np.asarray(space.basis)[:k]
    assert basis.dtype == np.float32
    np.testing.assert_allclose(basis @ basis.T, np.eye(k), atol=1e-5)
