"""Surrogates in levels: the floor, the excess over it, equal work and equal time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import varprox as vp
from benchmarks import baselines, cdr, dcr, levels, minibatch, surrogate
from benchmarks.competitors import Competitor
from benchmarks.experiment import Run, by_method
from benchmarks.starts import solved_w

WORK = 20


def data(samples=40, outputs=5):
    """A map from 3 parameters that is not linear; 20 samples each for validation and testing."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(3, outputs))
    inputs = [rng.uniform(-1, 1, (n, 3)) for n in (samples, 20, 20)]
    return [(y, 3 * np.sin(2 * y) @ mix + 1) for y in inputs]


@pytest.fixture
def small(x64):
    return levels.make(data(), 2, seed=0)


def test_the_floor_is_that_of_the_best_features(x64):
    """With the leading singular vectors as features W(θ) has just this loss, and with random ones
    of the same number more."""
    targets = data()[0][1]
    floor = levels.lowest_loss(targets, 2)
    best = np.linalg.svd(targets - targets.mean(axis=0))[0][:, :2]
    problem = vp.Problem(vp.Separable(lambda theta, z: theta * z), vp.least_squares())

    def loss(z):
        w = vp.solve_w(problem, jnp.ones(()), (z, targets))
        return problem.loss.value(problem.model.rows(jnp.ones(()), z) @ w, targets)

    np.testing.assert_allclose(loss(best), floor, rtol=1e-10)
    assert loss(np.random.default_rng(1).normal(size=best.shape)) > 1.5 * floor


def test_targets_are_in_units_of_their_root_mean_square(small):
    np.testing.assert_allclose(jnp.mean(small.sets["train"][1] ** 2), 1, rtol=1e-12)
    ratio = small.sets["test"][1] / data()[2][1]
    np.testing.assert_allclose(ratio, 1 / levels.unit(data()), rtol=1e-12)


def test_ridge_regression_finds_what_is_affine(x64):
    (y, _), *_ = data()
    affine = [(y, y @ np.ones((3, 2)) + 5)] * 3
    assert max(surrogate.ridge(affine).values()) < 1e-8
    curved = surrogate.ridge(data())
    assert all(0.05 < curved[name] < 0.8 for name in levels.SETS)


@pytest.fixture
def floor(small):
    return levels.lowest_loss(small.sets["train"][1], 2)


@pytest.fixture
def run(small, floor):
    """Trains by GN, which compiles fastest, for at least so many seconds."""

    def make(problem, w):
        return baselines.gn(problem, rank=4, start=levels.going_on(solved_w, w))

    return partial(levels.train, small, Competitor("GN", "", make), WORK, floor)


@pytest.fixture
def trained(small, floor, run):
    """For work alone and for a second."""
    return small, floor, run(0.0), run(1.0)


def test_training_goes_through_the_levels_and_on_to_equal_time(trained):
    _small, _floor, (solution, history), (again, longer) = trained
    assert solution.history is history
    level, work = history["level"], history["work_units"]
    assert set(level) == {0, 1, 2} and len(solution.theta["bias"]) == 17
    for k in range(3):
        spent = work[level == k][-1] - (work[level < k][-1] if k else 0)
        assert WORK <= spent < WORK + 12
    # The rest of a longer run comes on the last level; what comes before is the same.
    jax.tree.map(np.testing.assert_array_equal, again.theta, solution.theta)
    np.testing.assert_array_equal(longer["objective"][: len(level)], history["objective"])
    assert len(longer["objective"]) > len(level) and set(longer["level"][len(level) :]) == {2}


def entrant(method, variant):
    """The one of this name."""
    entered = levels.entrants({}, quick=False)
    (found,) = (one for one in entered if (one.method, one.variant) == (method, variant))
    return found


def test_rare_evaluations_leave_out_epochs_not_levels(small, floor, standard_promotion):
    """Of 11 epochs a level, each of 2 work units, every fifth, and the last."""
    adam = entrant("Adam", "rate 0.003, batch 16")._replace(batch_size=20)
    solution, history = levels.train(small, adam, 22, floor, 0.0, 2)
    np.testing.assert_array_equal(history["work_units"], [0, 10, 20, 22, 22, 32, 42, 44])
    np.testing.assert_array_equal(history["level"], [0, 0, 0, 0, 1, 1, 1, 1])
    assert all(np.isfinite(history[name]).all() for name in ("objective", "validation_error"))
    assert len(solution.theta["bias"]) == 9


def test_a_run_goes_on_however_little_time_it_is_short_of(run, monkeypatch):
    """By a clock by which every step takes a second, whatever is compiled."""
    monkeypatch.setattr("varprox.training.fit.timed", lambda fn, *args: (fn(*args), 1.0, 0.0))
    _, history = run(0.0)
    spent = history["seconds"][-1]
    _, longer = run(spent + 1e-3)
    assert longer["seconds"][-1] > spent + 1e-3
    assert {len(column) for column in longer.values()} == {len(history["seconds"]) + 1}


def test_the_objective_of_a_history_is_the_excess_of_the_loss(trained):
    small, floor, (solution, history), _ = trained
    inputs, targets = small.sets["train"]
    predictions = vp.predict(solution.problem, solution.theta, solution.w, inputs)
    loss = solution.problem.loss.value(predictions, targets)
    np.testing.assert_allclose(history["objective"][-1] + floor, loss, rtol=1e-10)
    assert 0 < history["objective"][-1] < history["objective"][0]


def test_the_summary_reads_at_equal_work_and_at_equal_seconds(trained):
    small, floor, (solution, history), (_, longer) = trained
    runs = [Run("first", "", 0, solution, history), Run("second", "", 0, solution, longer)]
    result = surrogate.summary(by_method(runs), [small], 3 * WORK, floor)
    within = history["objective"][history["work_units"] <= 3 * WORK][-1]
    seconds = history["seconds"][history["work_units"] <= 3 * WORK][-1]
    assert result["methods"]["first"]["seconds"] == seconds
    for row in result["methods"].values():
        assert row["excess"]["work_units"] == [within]
        (error,) = row["errors"]["test"]
        inputs, targets = small.sets["test"]
        predicted = vp.predict(solution.problem, solution.theta, solution.w, inputs)
        relative = np.linalg.norm(predicted - targets) / np.linalg.norm(targets)
        np.testing.assert_allclose(error, relative, rtol=1e-10)
    late = dict(history) | {"seconds": history["seconds"] + 1e6}
    runs_and_late = [*runs, Run("late", "", 0, solution, late)]
    result = surrogate.summary(by_method(runs_and_late), [small], 3 * WORK, floor)
    assert result["methods"]["late"]["excess"]["seconds"] == [np.inf]
    assert result["seconds"] == history["seconds"][-1]
    assert result["methods"]["first"]["excess"]["seconds"] == [history["objective"][-1]]
    changes = surrogate.prolonged(runs[0], floor)
    assert len(changes) == 2 and result["prolongation"] == changes
    np.testing.assert_allclose(changes, 0, atol=1e-5)  # the states' steps stay the same
    theta = solution.theta

    def least(theta):
        rows = np.asarray(solution.problem.model.rows(theta, small.sets["train"][0]))
        c = np.asarray(small.sets["train"][1])
        return np.sum((rows @ np.linalg.lstsq(rows, c, rcond=None)[0] - c) ** 2)

    change = least(vp.networks.prolong(theta)) / least(theta) - 1
    np.testing.assert_allclose(result["refinement"], [change], rtol=1e-3)
    assert abs(change) > 1e-6


def test_one_answer_is_held_against_one_simulation_and_many_against_many(trained, monkeypatch):
    """By a clock that goes on by a millisecond when it is read and by 3 s in a simulation, however
    many samples this is given."""
    small, _, (solution, _), _ = trained
    now, given = [0.0], []

    def read():
        now[0] += 1e-3
        return now[0]

    def simulate(inputs):
        now[0] += 3
        given.append(len(inputs))

    monkeypatch.setattr(surrogate.time, "perf_counter", read)
    setting = cdr.SETTING._replace(simulate=simulate, timed=10)
    found = surrogate.speed(setting, solution, small.sets["test"][0])
    assert given == 10 * [1] + [10]
    np.testing.assert_allclose(list(found["simulator"].values()), [3.001, 0.3001], rtol=1e-9)
    np.testing.assert_allclose(list(found["network"].values()), [1e-3, 1e-3 / 20], rtol=1e-9)
    assert "1/3001 and 1/6002 of that" in surrogate.speed_text(found)


def test_slimtrain_begins_at_the_w_it_is_given(small):
    problem = vp.Problem(small.model, vp.least_squares(), 1e-10, 1e-10)
    train = small.sets["train"]
    w = np.ones((3, 5))
    for given, expected in ((w, w), (None, vp.solve_w(problem, small.theta, train))):
        state = levels.slimtrain(1e-3, problem, given).init(small.theta, train, None)
        np.testing.assert_allclose(state.w, expected, rtol=1e-13)


@pytest.mark.parametrize("name, variant", [("slimTrain", ""), ("Adam", ", batch 16")])
def test_rates_that_share_a_compilation_are_those_of_adam(small, standard_promotion, name, variant):
    """Three steps are those of an Adam that is made with this rate."""
    problem = vp.Problem(small.model, vp.least_squares(), 1e-10, 1e-10)
    train, w, rate = small.sets["train"], np.ones((3, 5)), 1e-2
    if name == "Adam":
        plain = minibatch.jointly(problem, optax.adam(rate), lambda *_: w)
        expected = plain.init(small.theta, train, jax.random.key(0))
    else:
        plain = vp.slimtrain(problem, optax.adam(rate))
        expected = plain.init(small.theta, train, jax.random.key(0))
        expected = expected.with_w(w)
    method = entrant(name, f"rate {rate:g}{variant}").make(problem, w)
    state = method.init(small.theta, train, jax.random.key(0))
    for _ in range(3):
        state, _ = method.step(state, train)
        expected, _ = plain.step(expected, train)
    for found, wanted in zip(*map(jax.tree.leaves, (state.theta, expected.theta)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("module", [cdr, dcr])
def test_the_pictures_of_a_surrogate_are_drawn(module, tmp_path):
    outputs = {cdr: 72, dcr: 882}[module]
    targets = np.random.default_rng(0).normal(size=(4, outputs))
    module.SETTING.draw(tmp_path / "predictions.png", targets, targets + 0.1)
    assert (tmp_path / "predictions.png").stat().st_size > 10_000


def test_the_best_of_the_first_seed_go_on_to_the_others(small, monkeypatch):
    """Variant k of eight is nearer to the floor the larger k is, takes k + 1 seconds, and has the
    lower validation error the nearer k is to 3."""
    monkeypatch.setattr(levels, "FINALISTS", 2)

    def train(surrogate, competitor, work, floor, seconds, levels):
        assert seconds == {"first": 0, "second": 3}[competitor.method]
        k = competitor.make
        history = {
            "work_units": np.array([0, 3 * WORK]),
            "seconds": np.array([0.0, k + 1]),
            "objective": np.array([10.0 + k, 9.0 - k]),
            "validation_error": np.array([1.0, abs(k - 3.1)]),
        }
        return vp.Solution(None, None, history, vp.Status.BUDGET, 0.0, None), history

    monkeypatch.setattr(levels, "train", train)
    entered = [
        Competitor("first", "a", 2),
        Competitor("first", "b", 3),
        *(Competitor("second", f"{k}", k) for k in range(8)),
    ]
    other = small._replace(seed=1)
    runs = levels.compete([small, other], entered, WORK, 0.0)
    tried = {seed: [r.variant for r in runs if r.seed == seed] for seed in (0, 1)}
    assert tried[0] == ["a", "b", *map(str, range(8))]
    # In three seconds the first three are through, and the others where they began.
    assert tried[1] == ["b", "a", "7", "6", "2", "1", "3", "4"]


def test_every_variant_of_a_method_makes_one(small):
    problem = vp.Problem(small.model, vp.least_squares(), 1e-10, 1e-10)
    for setting in (cdr.SETTING, dcr.SETTING):
        for one in levels.entrants(setting.curvatures, quick=False):
            method = one.make(problem, None)
            assert isinstance(method, vp.Method)
            assert (method.epoch is None) == (one.batch_size is None)
