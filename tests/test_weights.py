"""Weights of samples and of entries: what they mean, in every loss and every method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from methods import FULL_BATCH
from problems import (
    LOSSES,
    Case,
    features,
    initial_theta,
    make_data,
    plain_rows,
    plain_w,
    relative,
)

import varprox as vp

BY_ENTRY = ("least_squares", "logistic")
THETA_PENALTY, W_PENALTY = 1e-2, 3e-2


def problem_of(loss, factor=1.0):
    """With penalties times a factor."""
    penalties = factor * THETA_PENALTY, factor * W_PENALTY
    return vp.Problem(vp.Separable(features), LOSSES[loss], *penalties)


@jax.jit
def reduced(problem, theta, data):
    return jax.value_and_grad(vp.reduced_objective(problem), has_aux=True)(theta, data)


def assert_scaled(found, expected, factor):
    """The same W, and `factor` times the value and its gradient."""
    (value, w), gradient = jax.tree.map(np.asarray, found)
    (expected_value, expected_w), expected_gradient = jax.tree.map(np.asarray, expected)
    assert relative(w, expected_w) < 1e-9
    assert relative(value, factor * expected_value) < 1e-12
    for name, leaf in gradient.items():
        assert relative(leaf, factor * expected_gradient[name]) < 1e-7


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_zero_leave_samples_out(loss, x64):
    """And what stands there as a target, NaN or not, does not matter."""
    inputs, targets = make_data(loss, 2)
    weights = np.where(np.arange(16) % 4 == 2, 0.0, 1.0)
    kept = weights > 0
    gaps = np.where(kept[:, None], targets, np.nan)
    found = reduced(problem_of(loss), initial_theta(), (inputs, gaps, weights))
    expected = reduced(problem_of(loss, 16 / 12), initial_theta(), (inputs[kept], targets[kept]))
    assert_scaled(found, expected, 12 / 16)


@pytest.mark.parametrize("weights", ["", "samples", "entries"])
def test_w_without_a_bias_is_that_of_numpy(weights, x64):
    case = Case("least_squares", bias=False, weights=weights)
    found = vp.solve_w(case.problem, initial_theta(), case.data)
    rows = plain_rows(initial_theta(), case.data[0], bias=False)
    assert relative(found, plain_w(case.loss, rows, case.data[1], case.w_penalty)) < 1e-9


@pytest.mark.parametrize("loss", LOSSES)
def test_a_whole_weight_repeats_a_sample(loss, x64):
    inputs, targets = make_data(loss, 2)
    times = np.arange(16) % 3 + 1
    repeated = inputs.repeat(times, axis=0), targets.repeat(times, axis=0)
    found = reduced(problem_of(loss), initial_theta(), (inputs, targets, times))
    factor = times.sum() / 16
    expected = reduced(problem_of(loss, 1 / factor), initial_theta(), repeated)
    assert_scaled(found, expected, factor)


@pytest.mark.parametrize("loss", BY_ENTRY)
def test_gaps_that_differ_leave_each_output_its_samples(loss, x64):
    inputs, targets = make_data(loss, 2)
    present = np.arange(16)[:, None] % [[4, 5]] > 0
    gaps = np.where(present, targets, np.nan)
    (_, w), _ = reduced(problem_of(loss), initial_theta(), (inputs, gaps, present))
    for output in range(2):
        kept = present[:, output]
        alone = inputs[kept], targets[kept, output : output + 1]
        (_, expected), _ = reduced(problem_of(loss, 16 / kept.sum()), initial_theta(), alone)
        assert relative(w[:, output : output + 1], expected) < 1e-9


def test_the_minimum_norm_w_turns_with_weights_too(x64):
    """Two features that are one: W has no part in their difference, and its derivative is right."""
    model = vp.Separable(lambda theta, x: jnp.tanh(theta * x) @ jnp.array([[1.0, 2.0]]))
    problem = vp.Problem(model, vp.least_squares())
    inputs, targets = make_data("least_squares", 2)
    data = inputs[:, :1], targets, np.random.default_rng(3).uniform(0.1, 2, targets.shape)
    w = jax.jit(lambda theta: vp.solve_w(problem, theta, data))
    slope = jax.jit(jax.jacfwd(w))(0.7)
    step = 1e-5
    difference = (w(0.7 + step) - w(0.7 - step)) / (2 * step)
    assert relative(slope, difference) < 1e-6
    np.testing.assert_allclose(w(0.7)[1], 2 * w(0.7)[0], rtol=1e-9)


# Two decays with gaps of their own in each of three data sets.


def decays(theta, times):
    return jnp.exp(-jnp.exp(theta)[None] * times)


TIMES = np.linspace(0.05, 3, 30)[:, None]
CURVES = vp.Problem(vp.Separable(decays), vp.least_squares())
START = np.log([0.4, 5.0])


def curves():
    rng = np.random.default_rng(0)
    rows = np.hstack([np.exp(-np.array([0.7, 3.0]) * TIMES), np.ones_like(TIMES)])
    observed = rows @ rng.uniform(1, 3, (3, 3)) + 0.02 * rng.normal(size=(30, 3))
    weights = rng.uniform(0.2, 3, observed.shape) * (rng.uniform(size=observed.shape) > 0.25)
    return TIMES, np.where(weights > 0, observed, np.nan), weights


def solved_by_scipy(data):
    """θ and the objective, W by one least-squares problem for each data set."""
    times, observed, weights = data

    def residuals(theta):
        rows = np.hstack([np.exp(-np.exp(theta) * times), np.ones_like(times)])
        parts = []
        for output in range(observed.shape[1]):
            root = np.sqrt(weights[:, output])
            target = root * np.nan_to_num(observed[:, output])
            w = np.linalg.lstsq(root[:, None] * rows, target)[0]
            parts.append(root * (rows @ w) - target)
        return np.concatenate(parts)

    tight = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}
    found = scipy.optimize.least_squares(residuals, START, method="lm", **tight)
    return found.x, found.cost / len(times)


@pytest.mark.parametrize("name", [*FULL_BATCH, "default"])
def test_every_full_batch_method_fits_curves_with_gaps(name, x64):
    data = curves()
    theta, objective = solved_by_scipy(data)
    method = CURVES if name == "default" else FULL_BATCH[name](CURVES)
    solution = vp.fit(method, START, data, max_work=300)
    assert solution.status == vp.Status.CONVERGED
    assert abs(solution.history["objective"][-1] / objective - 1) < 1e-9
    np.testing.assert_allclose(solution.theta, theta, atol=1e-5)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_the_unit_of_weights_does_not_matter(factor, x64):
    times, observed, weights = curves()
    theta, objective = solved_by_scipy(curves())
    solution = vp.fit(CURVES, START, (times, observed, factor * weights), max_work=300)
    assert solution.status == vp.Status.CONVERGED
    assert abs(solution.history["objective"][-1] / (factor * objective) - 1) < 1e-9
    np.testing.assert_allclose(solution.theta, theta, atol=1e-5)


def test_offsets_cost_no_digits_where_there_are_gaps(x64):
    times, observed, weights = curves()
    solutions = [
        vp.fit(CURVES, START, (times, observed + offset, weights), max_work=300)
        for offset in (0.0, 1e6)
    ]
    here, far = (solution.history["objective"][-1] for solution in solutions)
    assert abs(far / here - 1) < 1e-6


def test_standard_errors_are_those_of_scipys_curve_fit(x64):
    times, observed, weights = curves()
    data = times, observed[:, :1], weights[:, :1]
    solution = vp.fit(CURVES, START, data, max_work=300)
    found = vp.covariance(CURVES, solution, data)
    kept = weights[:, 0] > 0

    def model(x, a, b, *w):
        return np.exp(-np.exp(a) * x) * w[0] + np.exp(-np.exp(b) * x) * w[1] + w[2]

    at = np.concatenate([solution.theta, solution.w[:, 0]])
    sigma = 1 / np.sqrt(weights[kept, 0])
    _, covariance = scipy.optimize.curve_fit(
        model, times[kept, 0], observed[kept, 0], at, sigma, ftol=1e-14, xtol=1e-14
    )
    errors = np.concatenate([found.theta_std, found.w_std[:, 0]])
    np.testing.assert_allclose(errors, np.sqrt(np.diag(covariance)), rtol=1e-4)


def test_gaps_of_all_outputs_count_no_residuals(x64):
    """As without the samples: the noise, and the errors."""
    times, observed, _ = curves()
    observed = np.nan_to_num(observed)
    weights = np.where(np.arange(30) % 5 == 1, 0.0, 1.0)
    kept = weights > 0
    solution = vp.fit(CURVES, START, (times[kept], observed[kept]), max_work=300)
    expected = vp.covariance(CURVES, solution, (times[kept], observed[kept]))
    found = vp.covariance(CURVES, solution, (times, observed, weights))
    np.testing.assert_allclose(found.noise_std, expected.noise_std, rtol=1e-10)
    np.testing.assert_allclose(found.theta_std, expected.theta_std, rtol=1e-8)


# slimTrain

HEADS = {
    "dense": (vp.dense(), (6, 3), (6, 2)),
    "conv": (vp.conv((2, 2)), (3, 4, 4, 2), (3, 3, 3, 2)),
    "conv_transpose": (vp.conv_transpose((2, 2), stride=(2, 2)), (3, 2, 2, 2), (3, 4, 4, 2)),
}


@pytest.mark.parametrize("by", ["samples", "entries"])
@pytest.mark.parametrize("name", HEADS)
def test_moments_are_those_of_weighted_rows(name, by, x64):
    head, of_features, of_targets = HEADS[name]
    rng = np.random.default_rng(0)
    z, targets = rng.normal(size=of_features), rng.normal(size=of_targets)
    shape = of_targets if by == "entries" else (len(targets), *[1] * (len(of_targets) - 1))
    weights = rng.uniform(0, 2, shape)
    rows = np.asarray(head.rows(z))
    w = rng.normal(size=(rows.shape[1], 2))
    found = head.moments(z, w, vp.problem.weighted.Weighted(targets, weights))
    of_rows = np.broadcast_to(weights, of_targets).reshape(-1, 2)
    residual = rows @ w - targets.reshape(-1, 2)
    gram = np.einsum("ro,rc,rd->ocd", of_rows, rows, rows)
    gram = gram if by == "entries" else gram[0]
    np.testing.assert_allclose(found.gram, gram, rtol=1e-12)
    np.testing.assert_allclose(found.gradient, rows.T @ (of_rows * residual), rtol=1e-11)
    np.testing.assert_allclose(found.square, np.sum(of_rows * residual**2), rtol=1e-12)


LEAST = {"memory": 0, "initial": 1e-12, "lower_bound": 1e-12}  # regularisation


def complete():
    """The curves without gaps, with weights of samples."""
    times, observed, weights = curves()
    return times, np.nan_to_num(observed), weights[:, 0]


@pytest.mark.parametrize("selection", [vp.constant(0.0), vp.sgcv()], ids=["constant", "sgcv"])
@pytest.mark.parametrize("make_data", [complete, curves])
def test_slimtrain_finds_w_where_theta_stays(make_data, selection, x64):
    data = make_data()
    method = vp.slimtrain(CURVES, optax.set_to_zero(), selection=selection, **LEAST)
    solution = vp.fit(method, START, data, epochs=3, batch_size=30)
    assert relative(solution.w, vp.solve_w(CURVES, START, data)) < 1e-6
    assert solution.status == vp.Status.BUDGET


def test_slimtrain_learns_from_minibatches_with_gaps(x64):
    data = curves()
    _, objective = solved_by_scipy(data)
    method = vp.slimtrain(CURVES, optax.sgd(0.1, momentum=0.9), memory=2)
    solution = vp.fit(method, START, data, epochs=200, batch_size=10)
    reduced = vp.reduced_objective(CURVES)
    assert reduced(START, data)[0] > 15 * objective
    assert reduced(solution.theta, data)[0] < 1.3 * objective


def test_slimtik_in_a_loop_of_ones_own_takes_weights(x64):
    times, observed, weights = complete()
    tx = vp.transforms.slimtik(optax.set_to_zero(), selection=vp.constant(0.0), **LEAST)
    params = {"rates": jnp.asarray(START), "head": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
    z = decays(START, times)
    gradients = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params, state):
        of = {"features": z, "targets": observed, "weights": weights}
        updates, state = tx.update(gradients, state, params, **of)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    found = np.vstack([params["head"]["kernel"], params["head"]["bias"]])
    assert relative(found, vp.solve_w(CURVES, START, (times, observed, weights))) < 1e-6
    with pytest.raises(ValueError, match="weights: expected one for each sample, got one for each"):
        tx.update(
            gradients, state, params, features=z, targets=observed, weights=np.ones((30, 3))
        )  # fmt: skip


# What a run does with them


def test_validation_and_metrics_see_weights(x64):
    times, observed, weights = curves()
    validation = times[::2], np.nan_to_num(observed)[::2], weights[::2]

    def error(predictions, targets, weights):
        return jnp.sum(weights * (predictions - targets) ** 2)

    solution = vp.fit(
        vp.lbfgsvpro(CURVES), START, (times, observed, weights), epochs=2, validation=validation,
        metrics={"error": error},
    )  # fmt: skip
    predictions = vp.predict(CURVES, solution.theta, solution.w, times[::2])
    squares = np.sum(weights[::2] * (predictions - validation[1]) ** 2)
    history = solution.history
    np.testing.assert_allclose(history["validation_loss"][-1], 0.5 * squares / 15, rtol=1e-12)
    np.testing.assert_allclose(history["validation_error"][-1], squares, rtol=1e-12)
    objective = history["train_error"][-1] / 60
    np.testing.assert_allclose(history["objective"][-1], objective, rtol=1e-10)


def test_validation_data_without_weights_have_weights_of_one(x64):
    times, observed, weights = curves()
    validation = times[::2], np.nan_to_num(observed)[::2]
    solution = vp.fit(
        vp.lbfgsvpro(CURVES), START, (times, observed, weights), epochs=1, validation=validation,
        metrics={"error": lambda p, c, weights: jnp.mean(weights * (p - c) ** 2)},
    )  # fmt: skip
    error, loss = (solution.history[f"validation_{name}"][-1] for name in ("error", "loss"))
    np.testing.assert_allclose(3 * error / 2, loss, rtol=1e-12)


@pytest.mark.parametrize("name", ["dense", "slimtrain"])
def test_runs_with_weights_are_kept_and_taken_up(name, tmp_path, x64):
    data, batch_size = curves(), None
    method = vp.gnvpro(CURVES, curvature="dense")
    if name == "slimtrain":
        method, batch_size = vp.slimtrain(CURVES, optax.sgd(0.1)), 10
    whole = vp.fit(method, START, data, epochs=4, batch_size=batch_size)
    vp.fit(method, START, data, epochs=2, batch_size=batch_size).save(tmp_path / "run")
    half = vp.load(tmp_path / "run", CURVES)
    again = vp.fit(method, half.theta, data, epochs=4, batch_size=batch_size, start=half)
    np.testing.assert_array_equal(again.theta, whole.theta)
    np.testing.assert_array_equal(again.w, whole.w)


def test_each_of_many_runs_has_gaps_of_its_own(x64):
    times, observed, weights = curves()
    parts = [(times, observed[:, k : k + 1], weights[:, k : k + 1]) for k in range(3)]
    data = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
    method = vp.gnvpro(CURVES, curvature="dense")
    found = vp.fit_many(method, np.stack(3 * [START]), data, own_data=True, max_work=200)
    for solution, part in zip(found, parts, strict=True):
        _, objective = solved_by_scipy(part)
        assert abs(solution.history["objective"][-1] / objective - 1) < 1e-8


def wrong(weights=None, targets=None, loss="least_squares", data=None):
    inputs, right = make_data(loss, 2)
    return loss, data or (inputs, right if targets is None else targets, weights)


ONES = np.ones((16, 2))
WRONG = {
    "a list": (wrong([1.0] * 16), TypeError, "weights: expected arrays"),
    "a shape": (wrong(np.ones(15)), ValueError, r"weights: expected shape \(16,\), one for each s"),
    "complex": (wrong(np.ones(16) * 1j), TypeError, "weights: expected real numbers, got dtype c"),
    "text": (wrong(np.array(["a"] * 16)), TypeError, "weights: expected arrays that JAX takes"),
    "below zero": (wrong(-np.ones(16)), ValueError, "weights: expected finite numbers ≥ 0"),
    "nan": (wrong(np.full(16, np.nan)), ValueError, "weights: expected finite numbers ≥ 0"),
    "none": (wrong(np.zeros(16)), ValueError, "weights: expected some above zero, got none"),
    "an output": (wrong(ONES * [1, 0]), ValueError, "weights: expected some above zero for output"),
    "classes": (
        wrong(ONES, loss="softmax_cross_entropy"),
        ValueError,
        "weights: expected one for each sample under SoftmaxCrossEntropy",
    ),
    "no gap": (
        wrong(np.ones(16), np.where(ONES * [1, 0], np.nan, 1)),
        ValueError,
        "targets: expected finite numbers, got 16 NaN",
    ),
    "four": (
        wrong(data=(*make_data("least_squares", 2), ONES, ONES)),
        TypeError,
        r"data: expected a pair \(inputs, targets\), or \(inputs, targets, weights\), got tuple of",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_are_no_weights_is_refused(name, x64):
    (loss, data), error, message = WRONG[name]
    with pytest.raises(error, match=message):
        vp.solve_w(problem_of(loss), initial_theta(), data)


def test_weights_of_none_are_no_weights(x64):
    inputs, targets = make_data("least_squares", 2)
    found, expected = (
        vp.solve_w(problem_of("least_squares"), initial_theta(), data)
        for data in ((inputs, targets, None), (inputs, targets))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["gnvpro-dense", "lbfgsvpro"])
def test_a_step_of_a_full_batch_method_is_refused_other_weights_than_init(name, x64):
    times, observed, weights = curves()
    complete = np.nan_to_num(observed)
    method = FULL_BATCH[name](CURVES)
    state = method.init(START, (times, observed, weights))
    with pytest.raises(ValueError, match="weights: expected one for each entry"):
        method.step(state, (times, complete))
    state = method.init(START, (times, complete, weights[:, 0]))
    with pytest.raises(ValueError, match="weights: expected one for each entry"):
        method.step(state, (times, observed, weights))
    assert method.step(state, (times, complete, weights[:, 0]))[1].objective < state.objective


def test_a_step_is_refused_other_data_than_init(x64):
    data = curves()
    method = vp.slimtrain(CURVES, optax.sgd(0.1))
    state = method.init(START, data)
    with pytest.raises(TypeError, match="data: expected \\(inputs, targets, weights\\), as `init`"):
        method.step(state, (data[0], np.nan_to_num(data[1])))
