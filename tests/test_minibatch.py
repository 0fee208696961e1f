"""The stochastic rival against its definition, and what the experiments make of its curves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import features, initial_theta, make_data

import varprox as vp
from benchmarks import autoencoder, minibatch, peaks_minibatches
from benchmarks.experiment import Run
from benchmarks.starts import solved_w
from varprox.problem.model import objective

PROBLEM = vp.Problem(vp.Separable(features), vp.least_squares(), 1e-2, 1e-2)


def test_a_step_moves_both_weights_along_one_gradient(x64):
    data = make_data("", 2)
    method = minibatch.jointly(PROBLEM, optax.sgd(0.1), solved_w)
    theta = initial_theta()
    state = method.init(theta, data, jax.random.key(0))
    np.testing.assert_allclose(state.w, vp.solve_w(PROBLEM, theta, data), rtol=1e-10)
    batch = jax.tree.map(lambda x: x[:8], data)
    after, info = method.step(state, batch)
    phi = lambda weights: objective(PROBLEM, *weights, batch)  # noqa: E731
    value, gradient = jax.value_and_grad(phi)((theta, state.w))
    expected = jax.tree.map(lambda x, g: x - 0.1 * g, (theta, state.w), gradient)
    chex.assert_trees_all_close((after.theta, after.w), expected, rtol=1e-10)
    np.testing.assert_allclose(info.objective, value, rtol=1e-12)
    assert after.work_units == 1.0  # a forward and a backward pass over half of the data


def run(variant, seed, losses, method="slimTrain"):
    history = {
        "objective": np.array(losses),
        "validation_loss": np.array(losses),
        "seconds": np.arange(len(losses), dtype=float),
    }
    solution = vp.Solution(None, None, history, vp.Status.BUDGET, 0.5, None)
    return Run(method, variant, seed, solution, history)


def test_peaks_takes_the_best_variant_epoch_by_epoch_and_then_the_median():
    runs = [
        *(run("slow", 0, [9, 5, 3]), run("fast", 0, [9, 2, 4])),
        *(run("slow", 1, [9, 8, 1]), run("fast", 1, [9, 4, 6])),
        *(run("slow", 2, [9, 7, 7]), run("fast", 2, [9, 9, 9])),
    ]
    row = peaks_minibatches.summary(runs)
    np.testing.assert_array_equal(row["validation_loss"], [9, 4, 3])
    assert row["seconds_an_epoch"] == 1.0
    table = peaks_minibatches.table({"slimTrain": row})
    assert table.splitlines()[-1].split() == ["slimTrain", "4.00e+00", "3.00e+00", "1.00", "0.5"]


def test_the_autoencoder_reports_the_lowest_loss_of_every_variant():
    runs = [run("rate 1", s, losses) for s, losses in enumerate([[9, 2, 4], [9, 6, 5], [9, 8, 3]])]
    row = autoencoder.summary(runs)["rate 1"]
    assert row == {"lowest": 3.0, "range": [2.0, 5.0], "last": 4.0, "seconds": 2.0}
    assert autoencoder.lowest(runs)["slimTrain"] is runs[0]
    table = autoencoder.table("ten images", {"slimTrain": autoencoder.summary(runs)})
    assert table.splitlines()[-1].split() == [
        "slimTrain,",
        "rate",
        "1",
        "3.0",
        "[2.0,",
        "5.0]",
        "4.0",
        "2.0",
    ]
    np.testing.assert_array_equal(autoencoder.doubled(runs[0].history)["objective"], [18, 4, 8])


def test_adam_starts_its_last_layer_within_the_spread():
    model = vp.Separable(lambda theta, images: theta * images, vp.conv((3, 3)))
    problem = vp.Problem(model, vp.least_squares())
    images = jnp.ones((2, 5, 5, 4))
    w = autoencoder.uniform_w(0.25, problem, jnp.ones(()), (images, None), jax.random.key(0))
    assert w.shape == (37, 1) and 0.2 < jnp.abs(w).max() <= 0.25


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_by_parts_covers_all_images(epochs, monkeypatch):
    """Part by part, each validated; what is trained on is the task's data in another order."""
    monkeypatch.setattr(autoencoder, "PART", 8)
    monkeypatch.setattr(autoencoder, "BATCH_SIZE", 4)
    data = make_data("", 2, samples=16, dtype=np.float32)
    model = vp.Separable(lambda theta, inputs: inputs @ theta["kernel"])
    problem = vp.Problem(model, vp.least_squares())
    method = minibatch.jointly(problem, optax.sgd(0.0), solved_w)
    theta = {"kernel": np.eye(2, dtype=np.float32)}
    images = (jnp.asarray(data[0]),) * 2
    task = autoencoder.Task(problem, theta, images, images, {}, 0)
    solution = autoencoder.by_parts(method, task, epochs)
    assert len(solution.history["objective"]) == 2 * epochs
    np.testing.assert_allclose(solution.history["epoch"], np.arange(1, 2 * epochs + 1) / 2)
    whole = vp.predict(problem, theta, solution.w, images[0])
    expected = float(problem.loss.value(whole, images[1]))
    np.testing.assert_allclose(solution.history["validation_loss"], expected, atol=1e-6)
