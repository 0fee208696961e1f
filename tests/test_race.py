"""The race: its entrants report what they did, and its figures are what they are called."""

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import Case, dense_reference, initial_theta, relative

import varprox as vp
from benchmarks import entrants, preconditioning, race
from benchmarks.experiment import Run
from varprox.numerics.recycling import nothing_yet
from varprox.problem.model import objective

pytestmark = pytest.mark.usefixtures("rank_promotion")  # optimistix needs it, and the features

ENTRANTS = {
    "GNvpro": entrants.of_method(vp.gnvpro),
    "Adam": entrants.adam(1e-2, 100),
    "L-BFGS": entrants.lbfgs_of_scipy("random W"),
    "trf": entrants.trust_region_reflective("jac", "random W"),
    "LM": entrants.levenberg_marquardt("random W"),
}


@pytest.mark.parametrize("name", ENTRANTS)
def test_an_entrant_reports_its_run(name, x64):
    """The last objective is that of the weights it returns, and the run ends at its limit."""
    task = race.exponentials(0)
    limit = entrants.Limit(objective=1e-3, seconds=0.3)
    solution, megabytes = ENTRANTS[name](task, limit)
    value = objective(task.problem, solution.theta, solution.w, task.train)
    history = solution.history
    assert abs(value - history["objective"][-1]) < 1e-9 * value
    for column in ("work_units", "seconds"):
        assert (np.diff(history[column]) >= 0).all()
    assert np.isnan(megabytes) or megabytes >= 0
    assert solution.status == vp.Status.BUDGET
    if name == "Adam":
        assert 0 < history["seconds"][-1] <= 0.6
    else:
        assert history["objective"][-1] <= 1e-3 and (history["objective"][:-1] > 1e-3).all()


def test_residuals_square_to_the_objective(x64):
    task = race.exponentials(1)
    x, unravel, residuals, jacobian = entrants._residuals(task, "random W")
    value = objective(task.problem, *unravel(x), task.train)
    assert abs(0.5 * np.sum(residuals(x) ** 2) - value) < 1e-12 * value
    assert relative(jacobian(x), jax.jacfwd(residuals)(x)) < 1e-12


def made_up(seed, objectives):
    steps = np.arange(1.0, len(objectives) + 1)
    columns = {"objective": np.array(objectives), "work_units": 10 * steps, "seconds": steps}
    solution = vp.Solution(None, None, columns, vp.Status.BUDGET, 0.5, None)
    return Run("method", "", seed, solution, columns)


def test_the_best_variant_counts_and_the_median_seed():
    runs = [
        *(made_up(0, [1.0, 0.1, 0.01]), made_up(0, [1.0, 0.5, 0.1])),
        *(made_up(1, [1.0, 1.0, 0.2]), made_up(1, [0.1, 0.1, 0.1])),
        made_up(2, [1.0, 0.3, 0.3]),
    ]
    row = race.summary(runs, (0.5, 0.1, 0.01), 7.0)
    assert row["seconds"] == [2, 2, np.inf]
    assert row["work_units"] == [20, 20, np.inf]
    assert row["seconds_with_compilation"] == [2.5, 2.5, np.inf]
    assert row["lowest"] == 0.01 and row["megabytes"] == 7.0


def test_decreases_of_a_plain_space_are_those_of_its_minimisers(x64):
    case, theta = Case("least_squares"), initial_theta()
    reference = dense_reference(case, theta, case.data)
    h, g = reference.gauss_newton, reference.gradient
    plain = nothing_yet(0, ravel_pytree(theta)[0])
    found = preconditioning._decreases(case.problem, theta, case.data, plain)
    power, space = g, []
    for size in range(1, 7):
        space.append(power / np.linalg.norm(power))
        q, _ = np.linalg.qr(np.array(space).T)
        inside = q.T @ g
        expected = 0.5 * inside @ np.linalg.solve(q.T @ h @ q, inside)
        assert abs(found[size - 1] - expected) < 1e-8 * expected
        power = h @ space[-1]
