"""Features that are evaluated for a chunk of samples at a time: the same run, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import FULL_BATCH
from problems import LOSSES, assert_taylor, direction, features, initial_theta, make_data, move

import varprox as vp


def problem_of(loss, chunk, fn=features):
    return vp.Problem(vp.Separable(fn), LOSSES[loss], 1e-2, 1e-2, chunk=chunk)


@pytest.mark.parametrize("name", FULL_BATCH)
def test_a_run_in_chunks_is_the_run(name, x64):
    """17 samples: chunks of 5, and two samples that are left."""
    data = make_data("least_squares", 2, samples=17)
    whole, parts = (
        vp.fit(
            FULL_BATCH[name](problem_of("least_squares", chunk)), initial_theta(), data, epochs=4
        )
        for chunk in (None, 5)
    )
    objective = whole.history["objective"]
    assert objective[-1] < 0.9 * objective[0]
    np.testing.assert_allclose(parts.history["objective"], objective, rtol=1e-10)
    np.testing.assert_allclose(parts.w, whole.w, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 4, 16, 40])
def test_chunks_of_any_size_give_the_same_objective_and_derivatives(chunk, x64):
    data = make_data("softmax_cross_entropy", 3)
    theta, along = initial_theta(), direction()

    @jax.jit
    def at(problem, theta):
        return jax.value_and_grad(vp.reduced_objective(problem), has_aux=True)(theta, data)

    expected = at(problem_of("softmax_cross_entropy", None), theta)
    found = at(problem_of("softmax_cross_entropy", chunk), theta)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    slope = sum(map(np.vdot, *map(jax.tree.leaves, (found[1], along))))
    problem = problem_of("softmax_cross_entropy", chunk)
    assert_taylor(lambda h: at(problem, move(theta, h, along))[0][0], slope)


def deep(theta, inputs):
    z = inputs
    for kernel in theta:
        z = jnp.tanh(z @ kernel)
    return z


@pytest.mark.parametrize("name", ["gnvpro-krylov", "lbfgsvpro"])
def test_memory_grows_by_rows_alone(name, x64):
    """Ten layers of 16 units. Without chunks each further sample takes what all layers know of it;
    with chunks it takes some copies of its row, and nothing else."""
    theta = [np.eye(16) for _ in range(10)]
    row = 17 * 8

    def bytes_of(samples, chunk):
        method = FULL_BATCH[name](problem_of("least_squares", chunk, deep))
        data = np.ones((samples, 16)), np.ones((samples, 1))
        state = jax.eval_shape(method.init, theta, data)
        compiled = jax.jit(method.step).lower(state, data).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, parts = (
        (bytes_of(6000, chunk) - bytes_of(3000, chunk)) / 3000 / row for chunk in (None, 100)
    )
    assert parts < 8
    assert whole > 2 * parts


def test_features_that_couple_samples_are_refused(x64):
    def coupled(theta, inputs):
        z = features(theta, inputs)
        return z - z.mean(axis=0, keepdims=True)

    data = make_data("least_squares", 2)
    with pytest.raises(ValueError, match="chunk: expected None for features that depend on"):
        vp.solve_w(problem_of("least_squares", 5, coupled), initial_theta(), data)


@pytest.mark.parametrize("chunk", [0, 2.5, "all", True])
def test_chunk_is_a_whole_number(chunk):
    with pytest.raises((TypeError, ValueError), match="chunk: expected an integer ≥ 1"):
        problem_of("least_squares", chunk)
