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
