"""The zoo: its arithmetic against values by hand, its referees against derivatives and known
minima, and a part of it as a test of the methods."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import relative
from scipy.optimize import least_squares

import varprox as vp
from benchmarks import profiles, zoo, zoo_processes, zoo_runs
from benchmarks.profiles import Scale
from benchmarks.zoo_problems import CASES, start
from benchmarks.zoo_runs import BY_NAME, METHODS, Budget, Job, Record
from varprox.problem.model import objective

pytestmark = pytest.mark.usefixtures("rank_promotion")  # its features are written as in the papers

# Profiles.

SCALE = Scale(start=100.0, best=1.0, floor=1e-3)


def test_targets_by_hand():
    assert profiles.by_decrease(SCALE, 0.1) == pytest.approx(1 + 0.1 * 99 + 1e-3)
    assert profiles.by_value(SCALE, 0.1) == pytest.approx(1.1 + 1e-3)


def test_spent_is_where_the_target_is_first_reached():
    values, work = np.array([5.0, 3.0, 4.0, 1.0]), np.array([1.0, 10.0, 20.0, 40.0])
    assert profiles.spent(values, work, 3.0) == 10
    assert profiles.spent(values, work, 2.9) == 40
    assert profiles.spent(values, work, 0.9) == np.inf
    assert profiles.spent(np.empty(0), np.empty(0), 3.0) == np.inf


def test_shares_by_hand():
    costs = [10.0, 30.0, np.inf, 100.0]
    np.testing.assert_array_equal(profiles.shares(costs, [5, 10, 99, 100]), [0, 0.25, 0.5, 0.75])


def record(case, method, values, status="BUDGET", gain=0.0):
    """Of a run from value 10 that took ten units and a second a step."""
    steps = np.arange(1.0, len(values) + 1)
    job = Job(True, case, 0, method, Budget(400, 2))
    end = values[-1] if values else np.nan
    values = np.array(values)
    return Record(job, status, "", 10.0, 1e-12, end, values, 10 * steps, steps, 0.0, gain)


def test_a_report_by_hand(tmp_path):
    """Two problems, of which the default solves one, SciPy's both, one of them earlier."""
    records = [
        record("exp2", "default", [10.0, 5.0, 1.0], "CONVERGED", gain=1e-3),
        record("exp2", "trf (SciPy)", [10.0, 1.0 - 1e-9]),
        record("exp3", "default", [10.0, 3.0], "CONVERGED"),
        record("exp3", "trf (SciPy)", [10.0, 9.0, 2.0]),
    ]
    problems = zoo.gather(records, {})
    assert [p.scale.best for p in problems] == [1 - 1e-9, 2]
    assert zoo.gather(records, {"exp3, 0": 0.5})[1].scale.best == 0.5
    assert [zoo._false(p.runs["default"]) for p in problems] == [True, False]
    assert [zoo._above(p, p.runs["default"]) for p in problems] == [False, True]
    tables, results = zoo.report("float64", problems, ("default", "trf (SciPy)"), tmp_path)
    text = "\n".join(tables)
    shares = results["profiles"]["to 1e-06 of the decrease that is known (Moré, Wild)"]
    np.testing.assert_array_equal(shares["default"]["work_units"], [0, 0.5, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(shares["trf (SciPy)"]["work_units"], [0, 1, 1, 1, 1])
    assert [zoo._settled(p) for p in problems] == [True, False]
    assert (
        "the default solves 1 of 2 problems, where the best of all, trf (SciPy), solves 2" in text
    )
    assert "and 1 of the 1 at whose best value one of these runs converged" in text
    assert "-50.0 points" in text
    assert (tmp_path / "profiles_float64.png").stat().st_size > 0


def test_patterns_choose_and_bad_ones_are_refused():
    everything = {"exp2": 1, "exp3": 2, "dense": 3}
    assert zoo._chosen("problem", None, everything) == [1, 2, 3]
    assert zoo._chosen("problem", ["dense", "exp*"], everything) == [1, 2, 3]
    assert zoo._chosen("problem", ["*3"], everything) == [2]
    with pytest.raises(SystemExit, match=r"--problem: expected a pattern of exp2, .* got 'exp4'"):
        zoo._chosen("problem", ["exp4"], everything)


# Problems.


def test_the_problems_are_many_and_of_every_kind():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 60
    assert set(zoo.QUICK) <= set(names)
    assert {case.family for case in CASES} >= {
        *("exponentials", "Gaussians", "rationals", "dense", "flow", "residual", "gru", "relu"),
        *("multi-output", "rank-deficient", "n < weights", "logistic", "softmax", "coupled", "ODE"),
        *("collocation", "units", "penalties"),
    }


def test_both_precisions_start_alike(x64):
    double = start(BY_NAME["dense-scale1"], 1)
    with jax.enable_x64(False):
        single = start(BY_NAME["dense-scale1"], 1)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(single.theta)} == {"float32"}
    for ours, theirs in zip(jax.tree.leaves(double[1:]), jax.tree.leaves(single[1:]), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs)


def test_collocation_applies_its_operator(x64):
    """Rows inside are the operator of the features, by automatic differentiation."""
    problem, theta, ((x, within, weight), _) = start(BY_NAME["square-heat"], 0)
    rows = problem.model.rows(theta, (x, within, weight))
    values = lambda y: jnp.tanh(y @ theta["kernel"] + theta["bias"])  # noqa: E731
    y = x[5]
    in_time = jax.jacfwd(values)(y)[:, 1]
    in_space = jax.jacfwd(jax.jacfwd(values))(y)[:, 0, 0]
    assert relative(rows[5, :-1], in_time - 0.2 * in_space) < 1e-12 and rows[5, -1] == 0
    edge = len(x) - 1
    assert relative(rows[edge, :-1], 10 * values(x[edge])) < 1e-12 and rows[edge, -1] == 10


# Runs.


@pytest.mark.parametrize("name", ["global", "convolved"])
def test_the_peers_residuals_and_jacobian(name, x64):
    """Several outputs in reverse, coupled samples forward."""
    prepared = zoo_runs._prepare(name, 0, True)
    problem, theta, data = prepared.start
    problem = vp.Problem(problem.model, problem.loss, 0.3, 0.2)
    weights = theta, prepared.w
    flat, unravel = ravel_pytree(weights)
    residuals = lambda x: zoo_runs._residuals(problem, weights, x, data)  # noqa: E731
    expected = float(objective(problem, *unravel(flat), data))
    assert abs(0.5 * np.sum(residuals(flat) ** 2) - expected) < 1e-12 * expected
    reference = jax.jacfwd(residuals)(flat)
    for forward in (True, False)[: 1 if prepared.case.coupled else 2]:
        jacobian = zoo_runs._jacobian(problem, weights, flat, data, forward=forward)
        assert relative(jacobian, reference) < 1e-12


def test_a_search_nearby_finds_what_is_left(x64):
    """From a point off the minimum SciPy gains, from the minimum nothing."""
    prepared = zoo_runs._prepare("exp2", 0, True)
    problem, _, data = prepared.start
    truth = jnp.log(jnp.array([0.5, 3.0]))
    lowest = zoo_runs.trust_region_reflective(
        prepared._replace(start=prepared.start._replace(theta=truth)), Budget(400, 60)
    )
    end = zoo_runs._value(problem, lowest.theta, lowest.w, data)
    assert zoo_runs._left(prepared, lowest, end) < 1e-9
    off = lowest._replace(theta=lowest.theta + 0.01)
    value = zoo_runs._value(problem, off.theta, off.w, data)
    assert zoo_runs._left(prepared, off, value) == pytest.approx((value - end) / value, rel=1e-6)
    # From afar SciPy's first step is long; what is nearby is lower all the same.
    far = lowest._replace(theta=lowest.theta + 1.0)
    far = far._replace(w=zoo_runs._solved_w(prepared.start._replace(theta=far.theta)))
    value = zoo_runs._value(problem, far.theta, far.w, data)
    assert 1e-3 < zoo_runs._left(prepared, far, value) < (value - end) / value


def test_what_goes_wrong_is_recorded(x64, monkeypatch):
    budget = Budget(20, 60)
    trf = zoo_runs.run(Job(True, "logistic-scale1", 0, "trf (SciPy)", budget))
    assert (trf.status, len(trf.values)) == ("REFUSED", 0) and "least squares" in trf.message
    assert np.isfinite(trf.start)

    def broken(prepared, budget):
        history = {name: np.array([1.0, 0.0]) for name in ("objective", "work_units", "seconds")}
        theta = jnp.full_like(prepared.start.theta, jnp.nan)
        return vp.Solution(theta, prepared.w, history, vp.Status.STALLED, 0.0, None)

    def boastful(prepared, budget):
        return broken(prepared, budget)._replace(theta=prepared.start.theta)

    monkeypatch.setitem(METHODS, "broken", broken)
    monkeypatch.setitem(METHODS, "boastful", boastful)
    assert zoo_runs.run(Job(True, "exp2", 0, "broken", budget)).status == "NaN"
    boast = zoo_runs.run(Job(True, "exp2", 0, "boastful", budget))
    assert (boast.values >= boast.end).all() and boast.end == pytest.approx(boast.start)


def test_a_process_that_dies_is_replaced():
    """What the worker does with a job it knows nothing of is to die."""
    worker = zoo_processes._Worker(None, "")
    timer = threading.Timer(60, worker.process.kill)
    timer.start()
    try:
        died = worker.process
        fate = worker.ask(Job(True, "nothing", 0, "default", Budget(1, 1))).status
        assert fate == "CRASHED"
        assert worker.process is not died and worker.process.is_alive()
    finally:
        timer.cancel()
        worker.process.kill()


# A part of the zoo.

CURVES = {
    "exp2": lambda p, t: np.exp(-t[:, None] * np.exp(p)),
    "hyperbolas": lambda p, x: 1 / (1 + x[:, None] * np.exp(p)),
}
TRUTH = {"exp2": np.log([0.5, 3.0]), "hyperbolas": np.log([0.3, 6.0])}


def lowest_value(name, data):
    """By SciPy from the truth, on the projected residuals in NumPy."""
    x, y = (np.asarray(part, np.float64) for part in data)

    def residuals(p):
        rows = CURVES[name](p, x)
        return (rows @ np.linalg.lstsq(rows, y, rcond=None)[0] - y).ravel()

    found = least_squares(residuals, TRUTH[name], ftol=1e-15, xtol=1e-15, gtol=None)
    return found.cost / len(y)


@pytest.mark.parametrize("name", CURVES)
def test_methods_reach_the_minimum(name, x64):
    """Every method of ours ends within 1e-6 of it."""
    best = lowest_value(name, start(BY_NAME[name], 0).data)
    for method in zoo_runs.OURS:
        found = zoo_runs.run(Job(True, name, 0, method, Budget(400, 60)))
        assert found.end < best * (1 + 1e-6), (method, found.status, found.message)
