"""Many runs at once are those alone."""

# ruff: noqa: E501

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import features, initial_theta, make_data

import varprox as vp

PROBLEM = vp.Problem(vp.Separable(features), vp.least_squares(), 3e-2, 1e-2)
METHODS = {
    "dense": (vp.gnvpro(PROBLEM, curvature="dense"), {}),
    "broydenvpro": (vp.broydenvpro(PROBLEM), {}),
    "slimtrain": (vp.slimtrain(PROBLEM, optax.sgd(0.05)), {"batch_size": 8}),
}
THETAS = [initial_theta(seed) for seed in range(3)]
DATA = [make_data("least_squares", 2, seed=seed) for seed in range(3)]


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@pytest.mark.parametrize("name", ["dense", "broydenvpro"])
def test_each_run_is_the_run_alone(name, x64):
    """With its own status and its own length."""
    method, _ = METHODS[name]
    found = vp.fit_many(method, stacked(THETAS), DATA[0], max_work=40, epochs=9)
    for theta, many in zip(THETAS, found, strict=True):
        alone = vp.fit(method, theta, DATA[0], max_work=40, epochs=9)
        assert many.status == alone.status and many.method == alone.method
        for column, values in alone.history.items():
            if column in ("objective", "train_loss", "work_units"):
                np.testing.assert_allclose(many.history[column], values, rtol=1e-7)
        assert set(many.history) == set(alone.history)
        assert jax.tree.structure(many.state) == jax.tree.structure(alone.state)
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4),
            (many.theta, many.w), (alone.theta, alone.w),
        )  # fmt: skip


def test_runs_end_each_at_its_own_time(x64):
    """One starts where another has ended, and takes no more steps than it needs."""
    method, _ = METHODS["dense"]
    end = vp.fit(method, THETAS[0], DATA[0], max_work=500)
    assert end.status == vp.Status.CONVERGED
    near, far = vp.fit_many(method, stacked([end.theta, THETAS[0]]), DATA[0], max_work=500)
    assert near.status == far.status == vp.Status.CONVERGED
    assert len(near.history["objective"]) < 5 < len(far.history["objective"])
    np.testing.assert_allclose(near.history["objective"][-1], far.history["objective"][-1])
    assert int(near.state.work_units) == near.history["work_units"][-1]


def test_every_run_may_have_its_own_data(x64):
    method, _ = METHODS["broydenvpro"]
    found = vp.fit_many(method, stacked(THETAS), stacked(DATA), own_data=True, epochs=4)
    for theta, data, many in zip(THETAS, DATA, found, strict=True):
        alone = vp.fit(method, theta, data, epochs=4).history["objective"]
        np.testing.assert_allclose(many.history["objective"], alone, rtol=1e-7)


def test_batches_differ_from_run_to_run(x64):
    method, options = METHODS["slimtrain"]
    same = stacked([THETAS[0]] * 2)
    one, other = vp.fit_many(method, same, DATA[0], epochs=2, **options)
    assert one.status == vp.Status.BUDGET and np.isfinite(one.history["objective"][1:]).all()
    assert not np.array_equal(one.theta["opening"], other.theta["opening"])
    again, _ = vp.fit_many(method, same, DATA[0], epochs=2, **options)
    np.testing.assert_array_equal(again.theta["opening"], one.theta["opening"])


def test_a_solution_goes_on_alone(x64, tmp_path):
    method, _ = METHODS["broydenvpro"]
    *_, last = vp.fit_many(method, stacked(THETAS), DATA[0], epochs=3)
    last.save(tmp_path / "run")
    kept = vp.load(tmp_path / "run", PROBLEM)
    went_on = vp.fit(method, kept.theta, DATA[0], start=kept, epochs=6)
    whole = vp.fit(method, THETAS[-1], DATA[0], epochs=6)
    np.testing.assert_allclose(went_on.history["objective"], whole.history["objective"], rtol=1e-7)


BROYDEN = METHODS["broydenvpro"][0]
REFUSED = {
    "no method": (lambda: vp.fit_many(PROBLEM, stacked(THETAS), DATA[0], epochs=1), TypeError, "^method: expected"),
    "no budget": (lambda: vp.fit_many(BROYDEN, stacked(THETAS), DATA[0]), ValueError, "^fit_many: expected a budget, max_work or epochs; got none"),
    "counts": (lambda: vp.fit_many(BROYDEN, {"a": np.ones((2, 3)), "b": np.ones(3)}, DATA[0], epochs=1), ValueError, "^thetas: expected arrays.* got first axes"),
    "a number": (lambda: vp.fit_many(BROYDEN, np.ones(()), DATA[0], epochs=1), ValueError, "^thetas: expected arrays"),
    "counts of data": (lambda: vp.fit_many(BROYDEN, stacked(THETAS), stacked(DATA[:2]), own_data=True, epochs=1), ValueError, "^thetas: expected arrays"),
    "data": (lambda: vp.fit_many(BROYDEN, stacked(THETAS), (DATA[0][0], DATA[0][1][1:]), epochs=1), ValueError, "^inputs: expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name(name, x64):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
