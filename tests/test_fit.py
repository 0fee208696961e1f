"""The loop a person runs: its history, budgets, validation, progress and refusals."""

# The tables of refusals read as tables.
# ruff: noqa: E501

import importlib
import math
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas
import pytest
from flax import nnx
from problems import features, initial_theta, loss_value, make_data, plain_rows

import varprox as vp
from varprox.methods import form_choice
from varprox.training import choice

loop = importlib.import_module("varprox.training.fit")

ALPHA, W_PENALTY = 3e-2, 1e-2


def make(dtype=np.float32):
    theta = initial_theta(dtype=dtype)
    return theta, make_data("least_squares", 2, dtype=dtype)


def make_problem(fn=features):
    return vp.Problem(vp.Separable(fn), vp.least_squares(), ALPHA, W_PENALTY)


VALIDATION = make_data("least_squares", 2, samples=11, seed=5, dtype=np.float32)
METHODS = {
    "gnvpro": vp.gnvpro(make_problem(), curvature="krylov", rank=6),
    "lbfgsvpro": vp.lbfgsvpro(make_problem(), memory=5),
}
GNVPRO = METHODS["gnvpro"]


def worst(predictions, targets):
    return jnp.max(jnp.abs(predictions - targets))


@pytest.fixture(scope="module", params=METHODS)
def solution(request):
    theta, data = make()
    return vp.fit(
        METHODS[request.param], theta, data,
        validation=VALIDATION, metrics={"worst": worst}, epochs=8,
    )  # fmt: skip


# History


COLUMNS = {
    "objective", "train_loss", "validation_loss", "train_worst", "validation_worst",
    "gradient_norm", "work_units", "seconds",
}  # fmt: skip


def test_history_has_one_entry_a_step_and_one_for_the_start(solution):
    assert set(solution.history) >= COLUMNS
    for name, column in solution.history.items():
        assert column.shape == (9,), name
        assert np.issubdtype(column.dtype, np.floating)
    assert np.isfinite(solution.history["objective"]).all()
    assert np.isnan(solution.history["gradient_norm"][0])
    assert np.isfinite(solution.history["gradient_norm"][1:]).all()


def test_history_makes_a_data_frame(solution):
    frame = pandas.DataFrame(solution.history)
    assert len(frame) == 9 and set(frame.columns) >= COLUMNS
    assert frame.work_units.is_monotonic_increasing and frame.seconds.is_monotonic_increasing


def test_work_and_seconds_grow_and_the_objective_falls(solution):
    assert (np.diff(solution.history["work_units"]) > 0).all()
    assert (np.diff(solution.history["seconds"]) > 0).all()
    assert solution.history["seconds"][0] > 0
    assert (np.diff(solution.history["objective"]) <= 0).all()


def test_last_row_belongs_to_the_weights_returned(solution):
    """Losses and metrics, evaluated again from the formulas on the data and on the validation set."""
    _theta, data = make()
    squares = sum(np.sum(np.asarray(leaf) ** 2) for leaf in solution.theta.values())
    w = np.asarray(solution.w)
    losses = {}
    for name, (inputs, targets) in (("train", data), ("validation", VALIDATION)):
        predictions = plain_rows(solution.theta, inputs, bias=True) @ w
        losses[name] = loss_value("least_squares", predictions, targets)
        assert abs(solution.history[f"{name}_loss"][-1] - losses[name]) < 1e-6
        maximum = np.abs(predictions - targets).max()
        assert abs(solution.history[f"{name}_worst"][-1] - maximum) < 1e-5
    objective = losses["train"] + 0.5 * ALPHA * squares + 0.5 * W_PENALTY * np.sum(w**2)
    assert abs(solution.history["objective"][-1] - objective) < 1e-6


def test_first_row_belongs_to_the_start(solution):
    theta, (inputs, targets) = make()
    value, w = vp.reduced_objective(make_problem())(theta, (inputs, targets))
    assert abs(solution.history["objective"][0] - value) < 1e-6
    predictions = plain_rows(theta, VALIDATION[0], bias=True) @ np.asarray(w)
    expected = loss_value("least_squares", predictions, VALIDATION[1])
    assert abs(solution.history["validation_loss"][0] - expected) < 1e-5


def test_evaluation_may_be_rare_and_includes_start_and_end():
    theta, data = make()
    options = {"validation": VALIDATION, "metrics": {"worst": worst}, "epochs": 8}
    whole = vp.fit(GNVPRO, theta, data, **options).history
    rare = vp.fit(GNVPRO, theta, data, evaluate_every=3, **options).history
    evaluated = ["validation_loss", "train_worst", "validation_worst"]
    for name in set(whole) - {"seconds"}:
        expected = whole[name].copy()
        if name in evaluated:
            expected[[1, 2, 4, 5, 7]] = np.nan
        np.testing.assert_array_equal(rare[name], expected)


def test_fit_is_its_method_step_by_step():
    """A convenience on `init` and `step`, and nothing else: the same weights, bit for bit."""
    theta, data = make()
    solution = vp.fit(GNVPRO, theta, data, epochs=3)
    state = GNVPRO.init(theta, data)
    for _ in range(3):
        state, info = GNVPRO.step(state, data)
    jax.tree.map(np.testing.assert_array_equal, solution.theta, state.theta)
    np.testing.assert_array_equal(solution.w, state.w)
    for name in info._fields:
        assert solution.history[name][-1] == float(getattr(info, name)), name
    assert not any(name.startswith("validation") for name in solution.history)


def test_the_start_is_left_alone_and_two_runs_agree():
    theta, data = make()
    before = jax.tree.map(np.copy, (theta, data))
    first = vp.fit(GNVPRO, theta, data, epochs=3)
    second = vp.fit(GNVPRO, theta, data, epochs=3, seed=7)  # a full-batch method draws nothing
    jax.tree.map(np.testing.assert_array_equal, (theta, data), before)
    np.testing.assert_array_equal(first.history["objective"], second.history["objective"])


@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_run_goes_on_from_the_state_of_a_solution(batch_size):
    """As if it had not ended, be it GNvpro's or slimTrain's."""
    theta, data = make()
    method = vp.slimtrain(make_problem(), optax.sgd(0.05, momentum=0.9)) if batch_size else GNVPRO
    whole = vp.fit(method, theta, data, epochs=3, batch_size=batch_size)
    begun = vp.fit(method, theta, data, epochs=1, batch_size=batch_size)
    ended = vp.fit(method, theta, data, start=begun, epochs=3, batch_size=batch_size)
    jax.tree.map(np.testing.assert_array_equal, ended.state, whole.state)
    for name, column in whole.history.items():
        if name != "seconds":
            np.testing.assert_array_equal(ended.history[name], column)
    assert (np.diff(ended.history["seconds"]) > 0).all()
    assert ended.compile_seconds >= begun.compile_seconds


OTHER = {
    "targets": lambda theta, inputs, targets: (make_problem(), (inputs, 2 * targets)),
    "inputs": lambda theta, inputs, targets: (make_problem(), (inputs + 1, targets)),
    "fewer samples": lambda theta, inputs, targets: (make_problem(), (inputs[:9], targets[:9])),
    "fewer outputs": lambda theta, inputs, targets: (make_problem(), (inputs, targets[:, :1])),
    "theta_penalty": lambda theta, *data: (with_penalties(10 * ALPHA, W_PENALTY), data),
    "w_penalty": lambda theta, *data: (with_penalties(ALPHA, 10 * W_PENALTY), data),
}


def with_penalties(*penalties):
    return vp.Problem(vp.Separable(features), vp.least_squares(), *penalties)


@pytest.mark.parametrize("of_solution", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_state_goes_on_with_its_own_data_and_problem_only(name, of_solution, solution):
    """Whatever θ is passed; with others its objective would be stale."""
    theta, data = make()
    begun = vp.fit(METHODS[name], theta, data, epochs=1)
    start = begun.theta if of_solution else theta
    build = {"gnvpro": vp.gnvpro, "lbfgsvpro": vp.lbfgsvpro}[name]
    options = {"gnvpro": {"curvature": "krylov", "rank": 6}, "lbfgsvpro": {"memory": 5}}[name]
    for other in OTHER.values():
        problem, others = other(theta, *data)
        method = build(problem, **options)
        with pytest.raises(ValueError, match=r"^data: expected .* of the state that is taken up"):
            vp.fit(method, start, others, start=begun, epochs=2)
    for foreign, options in (
        (next(METHODS[n] for n in METHODS if n != name), {}),
        (vp.broydenvpro(make_problem()), {}),
        (vp.slimtrain(make_problem(), optax.sgd(0.1)), {"batch_size": 10}),
    ):
        with pytest.raises(TypeError, match=r"^(method|state): expected (the )?one .* another"):
            vp.fit(foreign, theta, data, start=begun, epochs=2, **options)
    more = start | {"more": np.ones(1, np.float32)}
    with pytest.raises(ValueError, match=r"^theta: expected arrays like those of the state"):
        vp.fit(METHODS[name], more, data, start=begun, epochs=2)


# What is printed


def test_a_solution_prints_in_a_few_lines(solution):
    shown = repr(solution)
    assert shown == str(solution)
    assert len(shown) < 1000 and len(shown.splitlines()) <= 6
    assert solution.status.name in shown and solution.status.message in shown
    assert f"{solution.history['objective'][-1]:.6g} after 8 steps" in shown
    assert f"{solution.history['work_units'][-1]:.6g} work units" in shown
    assert f"{solution.history['seconds'][-1]:.3g} seconds" in shown
    assert "24 weights in 2 arrays" in shown and "(4, 2)" in shown
    assert isinstance(solution, tuple) and len(solution) == len(solution._fields)


def test_a_solution_without_weights_or_history_prints():
    assert "BUDGET" in repr(vp.Solution(None, None, {}, vp.Status.BUDGET, 0.5, None))


@pytest.mark.parametrize("status", vp.Status)
def test_every_status_has_a_sentence(status):
    assert status.message[0].isupper() and status.message.endswith(".")


# Budgets and status


def test_epochs_count_steps():
    theta, data = make()
    solution = vp.fit(GNVPRO, theta, data, epochs=2)
    assert len(solution.history["objective"]) == 3 and solution.status is vp.Status.BUDGET


@pytest.mark.parametrize("name", METHODS)
def test_max_work_ends_with_the_first_step_past_it(name):
    theta, data = make()
    work = vp.fit(METHODS[name], theta, data, max_work=40).history["work_units"]
    assert work[-2] < 40 <= work[-1]


def test_max_work_below_the_start_takes_no_step():
    theta, data = make()
    solution = vp.fit(GNVPRO, theta, data, max_work=0.5)
    assert len(solution.history["objective"]) == 1 and solution.status is vp.Status.BUDGET
    jax.tree.map(np.testing.assert_array_equal, solution.theta, theta)


def test_max_seconds_ends_with_the_first_step_past_it():
    theta, data = make()

    def slow(state, data):
        time.sleep(0.1)
        return GNVPRO.step(state, data)

    vp.fit(GNVPRO, theta, data, epochs=1)
    seconds = vp.fit(GNVPRO._replace(step=slow), theta, data, max_seconds=0.25).history["seconds"]
    assert len(seconds) >= 3 and seconds[-2] < 0.25 <= seconds[-1]


def test_the_first_budget_to_run_out_ends_the_run():
    theta, data = make()
    for budgets, length in (
        ({"epochs": 2, "max_work": 1e9}, 3),
        ({"epochs": 50, "max_work": 2}, 2),
    ):
        solution = vp.fit(GNVPRO, theta, data, max_seconds=1e9, **budgets)
        assert len(solution.history["objective"]) == length


def test_convergence_is_a_status():
    theta, data = make()
    ends = [
        vp.fit(vp.gnvpro(make_problem(), rank=6, tolerance=tolerance), theta, data, epochs=200)
        for tolerance in (0.1, 1e-5)
    ]
    assert [solution.status for solution in ends] == 2 * [vp.Status.CONVERGED]
    early, late = (solution.history["objective"] for solution in ends)
    assert len(early) < len(late) and late[-1] < early[-1] < late[-1] * 1.1


def undefined(limit, theta, inputs):
    """Not a number once the first weight has moved further than `limit` from where it starts."""
    moved = jnp.abs(theta["opening"][0, 0] - initial_theta(dtype=np.float32)["opening"][0, 0])
    return features(theta, inputs) * jnp.where(moved > limit, jnp.nan, 1.0)


@pytest.mark.parametrize("build", [vp.gnvpro, vp.lbfgsvpro])
def test_not_a_number_is_a_status_and_the_last_good_weights_return(build):
    theta, data = make()
    fn = jax.tree_util.Partial(undefined, np.float32(0))
    solution = vp.fit(build(make_problem(fn)), theta, data, epochs=20)
    assert solution.status in (vp.Status.STALLED, vp.Status.NON_FINITE)
    assert np.isfinite(solution.w).all()
    # A step so short that rounding leaves the first weight where it was is a good one.
    assert solution.theta["opening"][0, 0] == theta["opening"][0, 0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-7), solution.theta, theta)
    fn = jax.tree_util.Partial(undefined, np.float32(-1))
    solution = vp.fit(build(make_problem(fn)), theta, data, epochs=20)
    assert solution.status is vp.Status.NON_FINITE
    assert len(solution.history["objective"]) == 1
    jax.tree.map(np.testing.assert_array_equal, solution.theta, theta)


def test_not_a_number_on_the_validation_set_alone_stops_nothing():
    theta, data = make()
    solution = vp.fit(
        GNVPRO, theta, data, validation=VALIDATION, epochs=2,
        metrics={"nothing": lambda predictions, targets: jnp.nan},
    )  # fmt: skip
    assert len(solution.history["objective"]) == 3
    assert np.isnan(solution.history["train_nothing"]).all()


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_large_targets_is_finite(name):
    """In single precision, where their squares are near 1e20."""
    theta, (inputs, targets) = make()
    solution = vp.fit(METHODS[name], theta, (inputs, targets * np.float32(1e10)), epochs=2)
    assert np.isfinite(solution.history["train_loss"]).all()


# Time and progress


def test_compilation_is_timed_apart_from_the_run():
    theta, data = make()

    # The constant is another in every run, so that nothing compiled is found on disk.
    def anew(theta, inputs):
        return features(theta, inputs) * (1 + random.random())

    method = vp.gnvpro(make_problem(anew), rank=6)
    first = vp.fit(method, theta, data, epochs=2)
    second = vp.fit(method, theta, data, epochs=2)
    assert first.compile_seconds > 0.1
    assert 0 <= second.compile_seconds < 0.1 * first.compile_seconds
    assert first.history["seconds"][-1] < first.compile_seconds


def test_no_step_runs_twice():
    """Not even the one that is compiled."""
    theta, data = make()
    calls = []
    method = vp.gnvpro(make_problem(lambda *at: 2 * features(*at)), rank=6)

    def step(state, data):
        calls.append("step")
        return method.step(state, data)

    vp.fit(method._replace(step=step), theta, data, epochs=3)
    assert len(calls) == 3


def test_progress_is_shown_on_request_and_on_standard_error(capsys):
    theta, data = make()
    vp.fit(GNVPRO, theta, data, epochs=3)
    assert capsys.readouterr() == ("", "")
    solution = vp.fit(GNVPRO, theta, data, validation=VALIDATION, max_work=40, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    last = shown.err.split("\r")[-1]
    assert f"objective {solution.history['objective'][-1]:.4g}" in last
    assert "validation loss" in last and last.startswith("100%")
    lines = shown.err.split("\r")
    assert any("compiling" in line for line in lines)
    assert max(map(len, lines)) <= 80


# What is refused


def fit(method=GNVPRO, theta=None, data=None, **options):
    options = {"epochs": 1} | options
    start, good = make()
    return lambda: vp.fit(method, start if theta is None else theta, data or good, **options)


INPUTS, TARGETS = VALIDATION
SLIMTRAIN = vp.slimtrain(make_problem(), optax.sgd(0.05))

REFUSED = {
    "method a number": (fit(3), TypeError, "method", "varprox.gnvpro(problem), or a problem", "3"),
    "data of a problem": (fit(make_problem(), data=(INPUTS, TARGETS[1:])), ValueError, "inputs", "10 samples", "(11, 2)"),
    "method not called": (fit(vp.gnvpro), TypeError, "method", "varprox.gnvpro(problem)", "function gnvpro"),
    "no budget": (fit(epochs=None), ValueError, "fit", "max_work, max_seconds or epochs", "none"),
    "infinite budget": (fit(epochs=None, max_work=math.inf), ValueError, "fit", "max_work, max_seconds or epochs", "none"),
    "epochs zero": (fit(epochs=0), ValueError, "epochs", "positive", "0"),
    "epochs text": (fit(epochs="10"), ValueError, "epochs", "positive", "'10'"),
    "max_work negative": (fit(max_work=-5), ValueError, "max_work", "positive", "-5"),
    "max_work nan": (fit(max_work=math.nan), ValueError, "max_work", "positive", "nan"),
    "max_seconds bool": (fit(max_seconds=True), ValueError, "max_seconds", "positive", "True"),
    "data lengths": (fit(data=(INPUTS, TARGETS[1:])), ValueError, "inputs", "10 samples", "(11, 2)"),
    "theta empty": (fit(theta={}), ValueError, "theta", "at least one array", "empty"),
    "validation one array": (fit(validation=INPUTS), TypeError, "validation", "pair (inputs, targets)", "ndarray"),
    "validation lengths": (fit(validation=(INPUTS, TARGETS[1:])), ValueError, "validation", "10 samples", "(11, 2)"),
    "validation outputs": (fit(validation=(INPUTS, TARGETS[:, :1])), ValueError, "validation", "(batch, 2)", "(11, 1)"),
    "validation nan": (fit(validation=(INPUTS, TARGETS * np.nan)), ValueError, "validation", "finite", "NaN or Inf"),
    "batch size without batches": (fit(batch_size=4), ValueError, "batch_size", "None for a method", "4"),
    "no batch size": (fit(SLIMTRAIN), ValueError, "batch_size", "an integer ≥ 1", "None"),
    "batch size zero": (fit(SLIMTRAIN, batch_size=0), ValueError, "batch_size", "an integer ≥ 1", "0"),
    "batch size too large": (fit(SLIMTRAIN, batch_size=17), ValueError, "batch_size", "at most 16", "17"),
    "evaluations never": (fit(evaluate_every=0), ValueError, "evaluate_every", "an integer ≥ 1", "0"),
    "metrics named loss": (fit(metrics={"loss": worst}), ValueError, "metrics", "'loss', which the history has", "'loss'"),
    "metrics named by a number": (fit(metrics={3: worst}), ValueError, "metrics", "names", "3"),
    "metrics arrays": (fit(metrics={"gap": lambda p, t: p - t}), TypeError, "metrics", "a number from 'gap'", "Array"),
    "metrics nothing": (fit(metrics={"gap": lambda p, t: None}), TypeError, "metrics", "a number from 'gap'", "None"),
    "metrics text": (fit(metrics={"gap": lambda p, t: "x"}), TypeError, "metrics", "a number from 'gap'", "'x'"),
    "seed text": (fit(seed="a"), ValueError, "seed", "an integer ≥ 0", "'a'"),
    "patience without validation": (fit(patience=3), ValueError, "patience", "None without validation data", "3"),
    "patience zero": (fit(patience=0, validation=VALIDATION), ValueError, "patience", "an integer ≥ 1", "0"),
    "stop_when text": (fit(stop_when="low"), TypeError, "stop_when", "a number or None", "'low'"),
    "callback none": (fit(callback=3), TypeError, "callback", "a function", "3"),
    "every negative": (fit(every=-1), ValueError, "every", "a finite number ≥ 0", "-1"),
    "start weights": (fit(start=np.ones(3)), TypeError, "start", "a varprox.Solution", "array"),
    "traced": (lambda: jax.jit(lambda theta: fit(theta=theta)().theta)(make()[0]), TypeError, "fit", "arrays", "traced ones"),
    "progress text": (fit(progress="yes"), TypeError, "progress", "True or False", "'yes'"),
    "method none": (fit(None), TypeError, "method", "varprox.gnvpro(problem), or a problem", "None"),
    "validation half": (fit(validation=(INPUTS, TARGETS.astype(np.float16))), TypeError, "validation", "one floating dtype", "float16"),
    "metrics a function": (fit(metrics=worst), TypeError, "metrics", "mapping", "function worst"),
    "metrics not functions": (fit(metrics={"worst": 3}), TypeError, "metrics", "function", "3"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name(name):
    """The type of the exception, the argument, what was expected and what came."""
    call, error, argument, expected, came = REFUSED[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{argument}:"), message
    assert "expected" in message and expected in message, message
    assert came in message.split("got", 1)[1], message


def test_without_a_method_the_curvature_is_formed_where_it_can_be(x64, monkeypatch):
    theta, data = make()
    problem = make_problem()
    solution = vp.fit(problem, theta, data, epochs=2)
    expected = vp.fit(vp.gnvpro(problem, curvature="dense"), theta, data, epochs=2)
    np.testing.assert_array_equal(solution.history["objective"], expected.history["objective"])

    monkeypatch.setattr(form_choice, "LARGEST", 10)
    jax.clear_caches()  # the choice is made when a method is compiled
    for build in (vp.broydenvpro, vp.lbfgsvpro):
        solution = vp.fit(problem, theta, data, epochs=2)
        expected = vp.fit(build(problem), theta, data, epochs=2)
        np.testing.assert_array_equal(solution.history["objective"], expected.history["objective"])
        monkeypatch.setattr(choice, "WHOLE", 10)


def stalling(method, after, status=vp.Status.STALLED):
    """The method, which says that it has stalled from so many work units on."""

    def step(state, data):
        state, info = method.step(state, data)
        done = state.work_units >= after
        return state._replace(status=jnp.where(done, jnp.int32(status), state.status)), info

    return method._replace(step=step)


@pytest.mark.parametrize("loss", ["least_squares", "softmax_cross_entropy"])
def test_where_the_first_method_has_stalled_the_next_goes_on(loss, x64, monkeypatch):
    """From its weights, within the budgets of the whole run; and only then."""
    theta, data = initial_theta(), make_data(loss, 3)
    problem = vp.Problem(vp.Separable(features), getattr(vp, loss)(), ALPHA, W_PENALTY)
    first, last = vp.gnvpro(problem, curvature="krylov", rank=2), vp.broydenvpro(problem)

    def run(status, **budgets):
        methods = [stalling(first, 20, status), last]
        monkeypatch.setattr(loop, "default_methods", lambda *_: methods)
        alone = vp.fit(methods[0], theta, data, **budgets)
        return vp.fit(problem, theta, data, **budgets), alone

    whole, alone = run(vp.Status.STALLED, max_work=60)
    history, count = whole.history, len(alone.history["objective"])
    assert alone.status == vp.Status.STALLED and whole.status == vp.Status.BUDGET
    for name, column in alone.history.items():
        if name != "seconds":
            np.testing.assert_allclose(history[name][:count], column, rtol=1e-12)
    # W at the hand-over is as good as it was.
    scale = 1e-9 * history["objective"][0]
    assert (np.diff(history["objective"]) <= scale).all()
    assert history["objective"][-1] < history["objective"][count] - 100 * scale
    assert history["work_units"][count] == history["work_units"][count - 1] + 4
    assert (np.diff(history["work_units"][count:]) >= 2).all() and history["work_units"][-2] < 60
    assert (np.diff(history["seconds"]) > 0).all()
    assert np.isnan(history["radius"][count:]).all()
    for status, work in ((vp.Status.CONVERGED, 60), (vp.Status.STALLED, 10)):
        whole, alone = run(status, max_work=work)
        np.testing.assert_array_equal(whole.history["objective"], alone.history["objective"])
        assert whole.status == alone.status


def test_nothing_follows_where_the_gradient_vanishes(x64, monkeypatch):
    """A second method that finds nothing to do leaves what the first one said."""
    theta, data = make(np.float64)
    model = vp.Separable(lambda theta, inputs: jnp.tanh(inputs))
    problem = vp.Problem(model, vp.least_squares(), None, W_PENALTY)
    methods = [stalling(vp.gnvpro(problem, curvature="krylov", rank=2), 0), vp.broydenvpro(problem)]
    monkeypatch.setattr(loop, "default_methods", lambda *_: methods)
    solution = vp.fit(problem, theta, data, max_work=60)
    assert solution.status == vp.Status.STALLED and len(solution.history["objective"]) == 2


@pytest.mark.parametrize("number", [np.int64(2), np.float32(2), jnp.int32(2)])
def test_numpy_numbers_are_budgets(number):
    theta, data = make()
    assert len(vp.fit(GNVPRO, theta, data, epochs=number).history["objective"]) == 3


def test_a_stochastic_method_is_run_by_epochs(x64):
    """An entry an epoch, equal to epochs run by hand; the problem returned is the trained one."""
    theta, data = make(np.float64)
    problem = make_problem()
    method = vp.slimtrain(problem, optax.sgd(0.05))
    validation = make_data("least_squares", 2, samples=11, seed=5)
    solution = vp.fit(method, theta, data, validation=validation, epochs=3, batch_size=5, seed=4)
    state = method.init(theta, data, jax.random.key(4))
    for entry in range(1, 4):
        state, info = method.epoch(state, data, batch_size=5)
        for name in ("objective", "lambda_", "lambda_sum", "finite"):
            np.testing.assert_allclose(
                solution.history[name][entry], np.mean(getattr(info, name)), rtol=1e-9
            )
        predictions = vp.predict(problem, state.theta, state.w, validation[0])
        loss = loss_value("least_squares", np.asarray(predictions), validation[1])
        np.testing.assert_allclose(solution.history["validation_loss"][entry], loss, rtol=1e-9)
    np.testing.assert_allclose(solution.w, state.w, rtol=1e-9)
    assert np.isnan(solution.history["objective"][0])
    np.testing.assert_allclose(solution.history["work_units"], 2 * 15 / 16 * np.arange(4))
    assert solution.status == vp.Status.BUDGET
    predicted = vp.predict(solution.problem, solution.theta, solution.w, data[0])
    np.testing.assert_allclose(predicted, vp.predict(problem, state.theta, state.w, data[0]))


def test_features_may_need_no_inputs(x64):
    """Their grid being a constant of theirs. The end is the best of its neighbourhood by NumPy."""
    t = np.linspace(0, 5, 30)
    noise = np.random.default_rng(0).normal(size=(30, 1))
    targets = np.exp(-t[:, None] * [0.5, 3.0]) @ [[1.0], [2.0]] + 0.01 * noise
    decays = lambda rates, _: jnp.exp(-t[:, None] * jnp.exp(rates[None]))  # noqa: E731
    model = vp.Separable(decays, vp.dense(bias=False))
    problem, start = vp.Problem(model, vp.least_squares()), np.array([-1.0, 0.5])

    def plain(rates):
        z = np.exp(-t[:, None] * np.exp(rates))
        residual = z @ np.linalg.lstsq(z, targets)[0] - targets
        return 0.5 * np.sum(residual**2) / len(t)

    options = {"validation": (None, targets), "metrics": {"worst": worst}, "max_work": 200}
    krylov = vp.gnvpro(problem, curvature="krylov")
    for method in (problem, krylov, vp.lbfgsvpro(problem)):
        solution = vp.fit(method, start, (None, targets), **options)
        value = plain(np.asarray(solution.theta))
        np.testing.assert_allclose(solution.history["objective"][-1], value, rtol=1e-10)
        for step in (*np.eye(2), *-np.eye(2)):
            assert plain(solution.theta + 1e-3 * step) > value
    predicted = vp.predict(problem, solution.theta, solution.w, None)
    assert np.abs(predicted - targets).max() == solution.history["validation_worst"][-1]
    for curvature in ("dense", "kernel"):
        with pytest.raises(ValueError, match="'krylov' or 'forward' for features that depend on"):
            given = vp.Problem(model, vp.least_squares(), 1e-8)
            vp.fit(vp.gnvpro(given, curvature=curvature), start, (None, targets), epochs=1)


def test_levels_go_on_from_one_another(x64):
    """On finer and finer grids in time, with half of the penalty on each."""
    net = vp.networks.AntisymmetricResNet(2, 3, 1, steps=2, final_time=1.0, rngs=nnx.Rngs(0))
    theta, model = vp.nnx.split(net)
    inputs = np.random.default_rng(0).uniform(-1, 1, (40, 2))
    data = inputs, np.sin(3 * inputs[:, :1]) * inputs[:, 1:]
    seen = []

    def make(level, solution):
        seen.append(solution)
        return vp.gnvpro(vp.Problem(model, vp.least_squares(), 1e-6 / 2**level, 1e-6 / 2**level))

    options = {"levels": 3, "prolong": vp.networks.prolong, "max_work": (60, 50, 40)}
    solution = vp.fit_levels(make, theta, data, validation=data, **options)
    assert seen[0] is None and [len(s.theta["bias"]) for s in seen[1:]] == [5, 9]
    assert len(solution.theta["bias"]) == 17

    history = pandas.DataFrame(solution.history)
    assert (history.diff().dropna()[["work_units", "seconds", "level"]] >= 0).all(axis=None)
    levels = [part for _, part in history.groupby("level")]
    for part, alone, budget in zip(levels, [*seen[1:], None], (60, 50, 40), strict=True):
        spent = part["work_units"].iloc[-1] - (part["work_units"].iloc[0] - 1)
        assert budget <= spent < budget + 15
        if alone is not None:
            np.testing.assert_array_equal(part["objective"], alone.history["objective"])
    assert (
        history["objective"].iloc[-1]
        == vp.fit(make(2, None), vp.networks.prolong(seen[2].theta), data, max_work=40).history[
            "objective"
        ][-1]
    )


def test_a_level_without_a_step_has_its_rows_in_every_column():
    """Its budget being spent by the first evaluation, no step tells what it did."""
    options = {"levels": 2, "prolong": lambda theta: theta, "max_work": (1, 20)}
    history = vp.fit_levels(lambda *_: GNVPRO, *make(), **options).history
    assert list(history["level"][:2]) == [0, 1]
    assert {len(column) for column in history.values()} == {len(history["level"])}
    assert np.isnan(history["gradient_norm"][:2]).all()
    assert np.isfinite(history["gradient_norm"][2:]).all()


@pytest.mark.parametrize("wrong", [{"levels": 0}, {"max_work": (1, 2)}])
def test_levels_and_their_budgets_are_checked(wrong):
    options = {"levels": 3, "prolong": lambda theta: theta, "max_work": 10} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        vp.fit_levels(lambda *_: GNVPRO, *make(), **options)


def test_levels_want_a_function_that_makes_methods():
    with pytest.raises(TypeError, match="make: expected a function"):
        vp.fit_levels(GNVPRO, *make(), levels=2, prolong=lambda theta: theta, max_work=10)
