"""Recycled Krylov spaces: the matrix they stand for, written out densely in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operators import SIZE, never, operator

from varprox.numerics.krylov import lanczos
from varprox.numerics.recycling import nothing_yet, recycle

KINDS = ["definite", "indefinite", "clustered"]


@functools.partial(jax.jit, static_argnames="rank")
def renewed(matrix, start, old, rank):
    """P after a Krylov space of P^½ H P^½ from P^½ g, and that space."""
    product = lambda v: old.root(matrix @ old.root(v))  # noqa: E731
    space = lanczos(product, old.root(start), rank, never, jnp.zeros((), start.dtype))
    return recycle(old, space), space


def root_of(recycled):
    return np.asarray(jax.vmap(recycled.root)(jnp.eye(SIZE, dtype=recycled.basis.dtype)))


def after(root, matrix, space):
    """P^½ (I − Σ (1 − λ₁/|λ|) u uᵀ) P^½ for the Ritz pairs of P^½ H P^½ in the space."""
    basis = np.asarray(space.basis)[: int(space.tridiagonal.size)]
    values, vectors = np.linalg.eigh(basis @ root @ matrix @ root @ basis.T)
    curvature, u = np.abs(values), basis.T @ vectors
    inner = np.eye(SIZE) - (u * (1 - curvature.min() / curvature)) @ u.T
    return root @ inner @ root


@pytest.mark.parametrize("kind", KINDS)
def test_recycling_twice_equals_the_formula(kind, x64):
    matrix, start = operator(kind)
    recycled = nothing_yet(SIZE + 9, start)  # room for more than there are
    assert recycled.basis.shape == (SIZE, SIZE)
    np.testing.assert_array_equal(root_of(recycled), np.eye(SIZE))
    for _ in range(2):
        before = root_of(recycled)
        recycled, space = renewed(matrix, start, recycled, 4)
        root = root_of(recycled)
        np.testing.assert_allclose(root, root.T, atol=1e-14)
        np.testing.assert_allclose(root @ root, after(before, matrix, space), atol=1e-9)


def test_the_inverse_root_takes_the_root_back(x64):
    matrix, start = operator("definite")
    recycled, _ = renewed(matrix, start, nothing_yet(SIZE, start), 4)
    back = np.asarray(jax.vmap(recycled.inverse_root)(root_of(recycled)))
    np.testing.assert_allclose(back, np.eye(SIZE), atol=1e-9)
    assert np.abs(root_of(recycled) - np.eye(SIZE)).max() > 0.1


def test_a_full_space_leaves_nothing_to_precondition(x64):
    matrix, start = operator("definite")
    recycled, _ = renewed(matrix, start, nothing_yet(SIZE, start), SIZE)
    root = root_of(recycled)
    eigenvalues = np.linalg.eigvalsh(root @ matrix @ root)
    np.testing.assert_allclose(eigenvalues, np.linalg.eigvalsh(matrix)[0], rtol=1e-7)


def test_small_spaces_one_after_another_condition_the_matrix(x64):
    """Spaces of four dimensions for 1e5 in condition, each from a gradient of its own."""
    matrix, _ = operator("definite")
    values, q = np.linalg.eigh(matrix)
    matrix = q * np.logspace(0, 5, len(values)) @ q.T
    recycled, conditions = nothing_yet(SIZE, jnp.zeros(SIZE)), [1e5]
    for seed in range(5):
        start = np.random.default_rng(seed).normal(size=SIZE)
        recycled, _ = renewed(matrix, start, recycled, 4)
        root = root_of(recycled)
        conditions.append(np.linalg.cond(root @ matrix @ root))
    assert conditions[-1] < 1e-2 * conditions[0]


@pytest.mark.parametrize("memory", [0, 1, 3])
def test_memory_keeps_what_is_shrunk_most(memory, x64):
    matrix, start = operator("definite")
    _, space = renewed(matrix, start, nothing_yet(memory, start), 4)
    kept = recycle(nothing_yet(memory, start), space)
    values, vectors = np.linalg.eigh(np.eye(SIZE) - after(np.eye(SIZE), matrix, space))
    largest = vectors[:, SIZE - memory :] * values[SIZE - memory :] @ vectors[:, SIZE - memory :].T
    root = root_of(kept)
    np.testing.assert_allclose(root @ root, np.eye(SIZE) - largest, atol=1e-10)


@pytest.mark.parametrize("kind", [*KINDS, "ill-conditioned"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_stays_positive_definite_over_many_rounds(kind, dtype, x64):
    matrix, start = (x.astype(dtype) for x in operator(kind))
    recycled = nothing_yet(6, jnp.asarray(start))
    for _ in range(10):
        recycled, _ = renewed(matrix, start, recycled, 5)
    assert recycled.basis.dtype == dtype and recycled.shrinkage.dtype == dtype
    eigenvalues = np.linalg.eigvalsh(root_of(recycled).astype(np.float64))
    assert eigenvalues[0] > 0.5 * np.finfo(dtype).eps ** 0.25 and eigenvalues[-1] < 1 + 1e-5


def test_a_zero_gradient_teaches_nothing(x64):
    matrix, _ = operator("definite")
    recycled, _ = renewed(matrix, jnp.zeros(SIZE), nothing_yet(3, jnp.zeros(SIZE)), 4)
    np.testing.assert_array_equal(root_of(recycled), np.eye(SIZE))
