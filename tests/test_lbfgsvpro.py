"""LBFGSvpro: what it costs and what it refuses; the contract is in test_method.py."""

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import Case, dense_reference, features
from test_method import losses, make_problem, run

import varprox as vp
from varprox.model import objective


@losses
def test_work_units_add_up(loss):
    """2 for the start, 2 for the whitening and 2 a trial point of the line search."""
    _, _, states, infos, *_ = run("lbfgsvpro", loss)
    trials = np.array([int(info.trials) for info in infos])
    work = np.array([int(state.work_units) for state in states])
    assert work[0] == 4 and (trials >= 1).all()
    np.testing.assert_array_equal(np.diff(work), 2 * trials)
    assert np.median(trials) == 1


@losses
def test_gradient_is_that_of_the_reduced_objective(loss, x64):
    """By the envelope theorem, the derivative of Φ in θ at the W of the state; how near this is to
    W(θ) is tested in test_method.py. Under least squares it is there."""
    case = Case(loss, 2, penalty="tikhonov", w_penalty=3e-2)
    _, data, states, infos, *_ = run("lbfgsvpro", loss)
    derivative = jax.jit(jax.grad(lambda theta, w: objective(make_problem(loss), theta, w, data)))
    for state, info in list(zip(states[1:], infos, strict=True))[:5]:
        gradient = ravel_pytree(state.gradient)[0]
        expected = ravel_pytree(derivative(state.theta, state.w))[0]
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-13)
        if loss == "least_squares":
            # The case penalises θ by 1e-2, the run by 3e-2.
            flat = np.asarray(ravel_pytree(state.theta)[0])
            expected = dense_reference(case, state.theta, data).gradient + 2e-2 * flat
            np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-11)
        assert abs(info.gradient_norm - np.linalg.norm(gradient)) < 1e-12
        assert info.objective == state.objective


@losses
def test_after_a_failure_it_stays_and_then_follows_the_gradient(loss, x64):
    """The whitened gradient, whatever the pairs before the failure were."""
    _, data, states, *_ = run("lbfgsvpro", loss)
    step = vp.lbfgsvpro(make_problem(loss), memory=8).step
    failed = states[6]._replace(decrease=0 * states[6].decrease)
    stayed, _ = step(failed, data)
    jax.tree.map(np.testing.assert_array_equal, stayed.theta, failed.theta)
    moved, info = step(stayed, data)
    assert moved.objective < stayed.objective and info.trials >= 1

    def direction(old, new):
        change = ravel_pytree(new.theta)[0] - ravel_pytree(old.theta)[0]
        return change / np.linalg.norm(change)

    whiten = stayed.whitening
    downhill = -ravel_pytree(whiten(whiten(stayed.gradient)))[0]
    downhill = downhill / np.linalg.norm(downhill)
    np.testing.assert_allclose(direction(stayed, moved), downhill, atol=1e-8)
    # Without a failure the pairs turn the step.
    assert np.linalg.norm(direction(states[6], states[7]) - downhill) > 1e-2


@pytest.mark.parametrize(
    "options, error, named, came",
    [
        ({"memory": 0}, ValueError, "memory", "0"),
        ({"memory": 2.5}, ValueError, "memory", "2.5"),
        ({"memory": True}, ValueError, "memory", "True"),
        ({"tolerance": -1e-3}, ValueError, "tolerance", "-0.001"),
        ({"tolerance": float("nan")}, ValueError, "tolerance", "nan"),
        ({"tolerance": "a"}, TypeError, "tolerance", "'a'"),
    ],
)
def test_bad_options_are_refused(options, error, named, came):
    with pytest.raises(error, match=f"^{named}: expected") as caught:
        vp.lbfgsvpro(make_problem(), **options)
    assert came in str(caught.value).split("got", 1)[1]


def test_what_is_not_a_problem_is_refused():
    with pytest.raises(TypeError, match=r"^problem: expected a varprox\.Problem, got"):
        vp.lbfgsvpro(vp.Separable(features))
