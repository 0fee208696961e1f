"""The Gauss–Newton matrix and its root, formed by rows, against the dense formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import CASES, Case, dense_reference, initial_theta, relative

import varprox as vp
from varprox import jacobian
from varprox.jacobian import gauss_newton_matrix, gauss_newton_root
from varprox.projection import factorise


def form(fn, case):
    theta, (inputs, targets) = initial_theta(), case.data
    reference = dense_reference(case, theta, case.data)
    rows = case.problem.model.rows(theta, inputs)
    factor = factorise(case.problem, rows, reference.w, targets, whole=True)
    made = jax.jit(fn)(case.problem, theta, case.data, reference.w, factor)
    return reference, *map(np.asarray, made)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_matrix_equals_the_formula(case, x64):
    reference, gradient, matrix = form(gauss_newton_matrix, case)
    assert relative(gradient, reference.gradient) < 1e-8
    assert relative(matrix, reference.gauss_newton) < 1e-8


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_root_gives_the_formula_without_the_penalty(case, x64):
    reference, gradient, root = form(gauss_newton_root, case)
    assert relative(gradient, reference.gradient) < 1e-8
    theta, unravel = jax.flatten_util.ravel_pytree(initial_theta())
    penalty = jax.hessian(lambda flat: case.problem.penalty(unravel(flat)))(theta)
    assert root.shape == (case.data[1].size + reference.w.size, theta.size)
    assert relative(root.T @ root + penalty, reference.gauss_newton) < 1e-8


@pytest.mark.parametrize("samples", [1, 5, 16])
def test_blocks_of_any_size_give_the_same_matrix(samples, x64, monkeypatch):
    """16 samples: one block for each, a last one filled up with repeated samples, one for all."""
    case = Case("softmax_cross_entropy")
    row = initial_theta()["opening"].size + initial_theta()["layers"].size
    monkeypatch.setattr(
        jacobian, "BLOCK_BYTES", samples * case.data[1].shape[1] * row * np.dtype(float).itemsize
    )
    reference, _, matrix = form(lambda *arguments: gauss_newton_matrix(*arguments), case)
    assert relative(matrix, reference.gauss_newton) < 1e-8


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
    rows = case.problem.model.rows(theta, inputs)
    factor = factorise(problem, rows, reference.w, targets, whole=True)
    data = tuple(inputs.T), targets
    _, matrix = gauss_newton_matrix(problem, theta, data, reference.w, factor)
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
        factor = factorise(problem, problem.model.rows(theta, data[0]), w, data[1], whole=True)
        return gauss_newton_matrix(problem, theta, data, w, factor)

    used = jax.jit(matrix).lower(theta, tuple(data), w).compile().memory_analysis()
    a_pass = samples * 80 * 8  # bytes of the layers' outputs
    assert used.temp_size_in_bytes < 6 * size**2 * 8 + 6 * a_pass < samples * size * 8 / 2
