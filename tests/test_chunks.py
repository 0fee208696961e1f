"""Samples that are taken a chunk at a time: the same run, in less memory, from the host too."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import FULL_BATCH
from problems import (
    LOSSES,
    assert_taylor,
    direction,
    features,
    initial_theta,
    make_data,
    move,
    relative,
)

import varprox as vp


def problem_of(loss, chunk, fn=features):
    return vp.Problem(vp.Separable(fn), LOSSES[loss], 1e-2, 1e-2, chunk=chunk)


@pytest.mark.parametrize("name", FULL_BATCH)
def test_a_run_in_chunks_is_the_run(name, x64):
    """17 samples: four blocks of 5, of which two samples come twice; on the device or not."""
    method, host = FULL_BATCH[name], make_data("least_squares", 2, samples=17)
    device = jax.tree.map(jnp.asarray, host)
    whole, parts, streamed = (
        vp.fit(method(problem_of("least_squares", chunk)), initial_theta(), data, epochs=4)
        for chunk, data in ((None, device), (5, device), (5, host))
    )
    objective = whole.history["objective"]
    assert objective[-1] < 0.9 * objective[0]
    np.testing.assert_allclose(parts.history["objective"], objective, rtol=1e-10)
    np.testing.assert_allclose(parts.w, whole.w, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(streamed.history["objective"], objective, rtol=1e-10)


@jax.jit
def reduced(problem, theta, data):
    return jax.value_and_grad(vp.reduced_objective(problem), has_aux=True)(theta, data)


@pytest.mark.parametrize(
    "loss, chunk", [*(("least_squares", n) for n in (1, 4, 16, 40)), ("softmax_cross_entropy", 5)]
)
def test_chunks_of_any_size_give_the_same_objective_and_derivatives(loss, chunk, x64):
    data = make_data(loss, 3)
    theta, along = initial_theta(), direction()
    expected = reduced(problem_of(loss, None), theta, data)
    found = reduced(problem_of(loss, chunk), theta, data)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    slope = sum(map(np.vdot, *map(jax.tree.leaves, (found[1], along))))
    problem = problem_of(loss, chunk)
    assert_taylor(lambda h: reduced(problem, move(theta, h, along), data)[0][0], slope)


@jax.jit
def derivatives(problem, theta, data, along, u):
    """What there is at θ, along a direction, and of a `u` shaped like the targets."""
    found = [vp.solve_w(problem, theta, data)]
    for make in (vp.gauss_newton, vp.newton):
        at = make(problem, theta, data)
        found += [at.value, at.gradient, at.matvec(along), at.w_jvp(along)]
        found += [at.jvp(along), at.vjp(u)]
    gradient = jax.grad(lambda theta: vp.reduced_objective(problem)(theta, data)[0])
    return [*found, jax.jvp(gradient, (theta,), (along,))[1]]


@pytest.mark.parametrize("weights", [None, "samples", "entries"])
def test_curvature_and_second_derivatives_are_the_same(weights, x64):
    inputs, targets = make_data("least_squares", 3)
    rng = np.random.default_rng(0)
    shapes = {None: None, "samples": targets.shape[:1], "entries": targets.shape}
    data = inputs, targets
    if weights:
        data = *data, rng.choice([0.0, 0.5, 2.0], shapes[weights], p=[0.2, 0.4, 0.4])
    at = initial_theta(), data, direction(), rng.normal(size=targets.shape)
    whole, parts = (
        jax.tree.leaves(derivatives(problem_of("least_squares", chunk), *at)) for chunk in (None, 5)
    )
    assert max(relative(one, other) for one, other in zip(parts, whole, strict=True)) < 1e-9


def test_in_single_precision_chunks_end_as_low():
    """Where W is large, rows times W are known to some digits only."""
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1, 1, (200, 1)).astype(np.float32)
    targets = np.exp(inputs) * np.sin(4 * inputs)
    theta = rng.normal(size=(1, 8)).astype(np.float32), np.ones(8, np.float32)

    def smooth(theta, inputs):
        return jnp.tanh(inputs @ theta[0] + theta[1][None])

    def ends(chunk):
        problem = vp.Problem(vp.Separable(smooth), vp.least_squares(), chunk=chunk)
        method = vp.gnvpro(problem, curvature="dense")
        solution = vp.fit(method, theta, (inputs, targets), max_work=600)
        assert np.abs(solution.w).max() > 100
        return solution.history["objective"][-1]

    assert ends(30) < 3 * ends(None) < 1e-4


def test_inputs_may_be_on_a_disk(tmp_path, x64):
    """A memory map, in a dictionary beside an array that is on the device."""
    inputs, targets = make_data("least_squares", 2, samples=17)
    np.save(tmp_path / "inputs.npy", inputs)
    read = np.load(tmp_path / "inputs.npy", mmap_mode="r")
    scale = np.linspace(1, 2, 17)[:, None]

    def scaled(theta, x):
        return features(theta, x["read"] * x["scale"])

    problem, whole = (problem_of("least_squares", chunk, scaled) for chunk in (5, None))
    mapped = {"read": read, "scale": jnp.asarray(scale)}
    solutions = [
        vp.fit(problem, initial_theta(), (x, targets), validation=(x, targets), max_work=60)
        for x in (mapped, jax.tree.map(jnp.asarray, mapped))
    ]
    for column in ("objective", "validation_loss"):
        np.testing.assert_allclose(*(one.history[column] for one in solutions), rtol=1e-10)
    theta, w = solutions[0].theta, solutions[0].w
    expected = vp.predict(whole, theta, w, mapped)
    found = vp.predict(problem, theta, w, mapped)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    of_chunks, of_all = (
        vp.covariance(of, solutions[0], (mapped, targets)).matrix for of in (problem, whole)
    )
    np.testing.assert_allclose(of_chunks, of_all, rtol=1e-9)


def test_other_arrays_of_the_same_shape_compile_nothing(x64):
    traced = []

    def counted(theta, inputs):
        traced.append(None)
        return features(theta, inputs)

    problem = problem_of("least_squares", 5, counted)
    method = vp.lbfgsvpro(problem)
    theta, objectives = initial_theta(), []
    for seed in range(2):
        data = make_data("least_squares", 2, samples=17, seed=seed)
        state, _ = method.step(method.init(theta, data), data)
        objectives.append(float(state.objective))
        made, _ = len(traced), traced.clear()
    assert objectives[0] != objectives[1]
    assert made <= 3  # to see what it allows: the compiled functions are there


def test_arrays_that_are_gone_are_told(x64):
    from varprox.problem.hosted import Hosted

    left = Hosted(np.ones((4, 2)))
    leaves, structure = jax.tree.flatten(left)
    del left
    gc.collect()
    with pytest.raises(Exception, match="inputs: expected arrays that last as long as"):
        jax.block_until_ready(jax.tree.unflatten(structure, leaves).take(jnp.arange(2), 2))


def deep(theta, inputs):
    z = inputs
    for kernel in theta:
        z = jnp.tanh(z @ kernel)
    return z


@pytest.mark.parametrize("name", ["gnvpro-krylov", "lbfgsvpro"])
def test_memory_grows_by_what_is_of_the_size_of_targets(name, x64):
    """Ten layers of 16 units. Without chunks each further sample takes what all layers know of it;
    with chunks it takes its target, its slope and the like, and not even its row."""
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
    assert parts < 0.6
    assert whole > 10


def test_features_that_couple_samples_are_refused(x64):
    def coupled(theta, inputs):
        z = features(theta, inputs)
        return z - z.mean(axis=0, keepdims=True)

    inputs, targets = make_data("least_squares", 2)
    with pytest.raises(ValueError, match="chunk: expected None for features that depend on"):
        vp.solve_w(problem_of("least_squares", 5, coupled), initial_theta(), (inputs, targets))
    of_none = problem_of("least_squares", 5, lambda theta, _: features(theta, inputs))
    with pytest.raises(ValueError, match="chunk: expected None for features that depend on"):
        vp.solve_w(of_none, initial_theta(), (None, targets))


@pytest.mark.parametrize("chunk", [0, 2.5, "all", True])
def test_chunk_is_a_whole_number(chunk):
    with pytest.raises((TypeError, ValueError), match="chunk: expected an integer ≥ 1"):
        problem_of("least_squares", chunk)
