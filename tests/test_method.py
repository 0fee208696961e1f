"""The contract of a method, run over every full-batch method: what `init` and `step` promise."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Case, features, initial_theta, make_data, plain_rows, plain_w, relative

import varprox as vp

METHODS = {
    "gnvpro": lambda problem, **options: vp.gnvpro(problem, **({"rank": 8} | options)),
    "lbfgsvpro": lambda problem, **options: vp.lbfgsvpro(problem, **({"memory": 8} | options)),
}
PENALTY, W_PENALTY = 3e-2, 3e-2

methods = pytest.mark.parametrize("name", METHODS)


def make_problem(loss="least_squares", fn=features, penalty=PENALTY, w_penalty=W_PENALTY):
    losses = {"least_squares": vp.least_squares(), "softmax": vp.softmax_cross_entropy()}
    return vp.Problem(vp.Separable(fn), losses[loss], penalty, w_penalty)


def make(loss="least_squares", dtype=np.float64):
    kind = "softmax_cross_entropy" if loss == "softmax" else loss
    return initial_theta(dtype=dtype), make_data(kind, 2, dtype=dtype)


def signature(tree):
    """Structure, shapes, dtypes and weak types, which together decide whether a step is compiled again."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [jax.typeof(leaf) for leaf in leaves]


class Run(NamedTuple):
    """A run to convergence: the states, the infos, and how often a step traced the features."""

    problem: vp.Problem
    data: tuple
    states: list
    infos: list
    traces: list


@functools.cache
def run(name, loss, steps=200, tolerance=1e-6):
    traces = []

    def counted(theta, inputs):
        traces[-1] += 1
        return features(theta, inputs)

    with jax.enable_x64(True):
        theta, data = make(loss)
        problem = make_problem(loss, counted)
        method = METHODS[name](problem, tolerance=tolerance)
        traces.append(0)
        states, infos = [method.init(theta, data)], []
        while states[-1].status == vp.Status.RUNNING and len(infos) < steps:
            traces.append(0)
            state, info = method.step(states[-1], data)
            states.append(state)
            infos.append(info)
        # Other numbers in the problem and the options, same functions.
        traces.append(0)
        other = make_problem(loss, counted, 2 * PENALTY, 3 * W_PENALTY)
        METHODS[name](other, tolerance=2 * tolerance).step(states[1], data)
        return Run(problem, data, states, infos, traces)


runs = pytest.fixture(
    scope="module",
    params=[(name, loss) for name in METHODS for loss in ("least_squares", "softmax")],
    ids="-".join,
)(lambda request: run(*request.param))


def test_a_step_traces_once(runs):
    """Whatever it does to the features while it is compiled, it never comes back to Python."""
    init, first, *later, other = runs.traces
    assert len(runs.infos) >= 8
    assert init > 0 and first > 0
    assert later == [0] * len(later)
    assert other == 0  # penalties and tolerance are numbers, not constants of the compiled step


def test_a_step_keeps_structure_shapes_and_dtypes(runs):
    expected = signature(runs.states[0])
    for state in runs.states[1:]:
        assert signature(state) == expected
    for info in runs.infos[1:]:
        assert signature(info) == signature(runs.infos[0])
    assert all(jnp.ndim(field) == 0 for field in runs.infos[0])


def test_the_objective_never_increases(runs):
    objective = np.array([float(state.objective) for state in runs.states])
    assert (np.diff(objective) <= 1e-14 * np.abs(objective[:-1])).all()
    assert objective[-1] < 0.95 * objective[0]


def test_the_run_converges(runs):
    assert runs.states[-1].status == vp.Status.CONVERGED
    assert runs.infos[-1].gradient_norm <= 1e-6


def test_status_is_running_until_the_end(runs):
    assert {int(state.status) for state in runs.states[:-1]} == {vp.Status.RUNNING}


def test_w_and_the_objective_belong_to_theta(runs):
    """W is W(θ) as accurately as the method promises: the excess of Φ is 1e-6 of the last decrease."""
    loss = "least_squares" if runs.problem.loss == vp.least_squares() else "softmax_cross_entropy"
    with jax.enable_x64(True):
        for before, after in zip(runs.states[:-1], runs.states[1:], strict=True):
            objective, _ = reference(loss, after.theta, runs.data)
            allowed = 1e-6 * abs(float(before.objective) - float(after.objective)) + 1e-13
            # One step further back: a solve inside a step only knows the decrease before it.
            assert -1e-13 <= after.objective - objective <= max(allowed, 1e-7)
        objective, w = reference(loss, runs.states[-1].theta, runs.data)
        assert relative(runs.states[-1].w, w) < 1e-4
        start = runs.states[0]
        assert relative(start.w, reference(loss, start.theta, runs.data)[1]) < 1e-8


def reference(loss, theta, data):
    """Φ_red and W at θ in plain NumPy."""
    rows = plain_rows(theta, data[0], bias=True)
    w = plain_w(loss, rows, data[1], W_PENALTY)
    value = Case(loss, 2).problem.loss.value(rows @ w, data[1])
    squares = sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(theta))
    return value + 0.5 * W_PENALTY * np.sum(w**2) + 0.5 * PENALTY * squares, w


@methods
def test_permuting_the_batch_gives_the_same_run(name, x64):
    theta, (inputs, targets) = make()
    order = np.random.default_rng(0).permutation(len(inputs))
    method = METHODS[name](make_problem())
    states = []
    for data in ((inputs, targets), (inputs[order], targets[order])):
        state = method.init(theta, data)
        for _ in range(6):
            state, _ = method.step(state, data)
        states.append(state)
    assert states[0].work_units == states[1].work_units
    assert abs(states[0].objective - states[1].objective) < 1e-10
    for a, b in zip(*(jax.tree.leaves(state.theta) for state in states), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)


@methods
def test_scan_jit_and_a_loop_give_the_same_run(name, x64):
    """Inside the caller's own jit, with init and a scan over steps; and the loop twice, bit for bit."""
    theta, data = make()
    method = METHODS[name](make_problem())

    @jax.jit
    def scanned(theta, data):
        state = method.init(theta, data)
        return jax.lax.scan(lambda state, _: method.step(state, data), state, length=5)

    def looped():
        state, infos = method.init(theta, data), []
        for _ in range(5):
            state, info = method.step(state, data)
            infos.append(info)
        return state, infos

    state, infos = looped()
    again, _ = looped()
    jax.tree.map(np.testing.assert_array_equal, state, again)
    in_scan, history = scanned(theta, data)
    assert in_scan.work_units == state.work_units and in_scan.status == state.status
    np.testing.assert_allclose(history.objective, [i.objective for i in infos], rtol=1e-9)
    np.testing.assert_allclose(in_scan.w, state.w, rtol=1e-6)


@methods
def test_vmap_over_starts_equals_a_loop(name, x64):
    _, data = make()
    starts = [initial_theta(seed) for seed in range(3)]
    method = METHODS[name](make_problem())
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *starts)
    states = jax.vmap(lambda theta: method.init(theta, data))(stacked)
    step = jax.jit(jax.vmap(lambda state: method.step(state, data)))
    for _ in range(3):
        states, _ = step(states)
    for i, theta in enumerate(starts):
        state = method.init(theta, data)
        for _ in range(3):
            state, _ = method.step(state, data)
        assert abs(states.objective[i] - state.objective) < 1e-9
        assert states.work_units[i] == state.work_units
        np.testing.assert_allclose(states.theta["opening"][i], state.theta["opening"], atol=1e-6)


@methods
@pytest.mark.parametrize("loss", ["least_squares", "softmax"])
@pytest.mark.parametrize("enabled", [False, True], ids=["x32", "x64"])
def test_single_precision_is_kept(name, loss, enabled):
    with jax.enable_x64(enabled):
        theta, data = make(loss, np.float32)
        method = METHODS[name](make_problem(loss))
        start = state = method.init(theta, data)
        for _ in range(10):
            state, _ = method.step(state, data)
        assert signature(state) == signature(start)
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.theta, state.w)))
    exact = run(name, loss).states
    assert abs(start.objective - float(exact[0].objective)) < 1e-5
    gain = float(exact[0].objective - exact[10].objective)
    assert float(start.objective - state.objective) > 0.9 * gain


# Where the features are not defined


def bounded(limit):
    """Features that are not a number once ‖θ‖ exceeds the limit."""

    def fn(theta, inputs):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(theta))
        return features(theta, inputs) * jnp.where(squares > limit, jnp.nan, 1.0)

    return fn


def finish(method, theta, data, steps=60):
    state = method.init(theta, data)
    states = [state]
    while state.status == vp.Status.RUNNING and len(states) <= steps:
        state, _ = method.step(state, data)
        states.append(state)
    return states


@methods
@pytest.mark.parametrize("loss", ["least_squares", "softmax"])
def test_weights_stay_good_at_a_wall_of_nan(name, loss, x64):
    """The minimiser lies where the features are not a number; the run ends this side of it."""
    theta, data = make(loss)
    squares = sum(np.sum(leaf**2) for leaf in theta.values())
    problem = make_problem(loss, bounded(squares * 1.05), penalty=1e-8)
    states = finish(METHODS[name](problem), theta, data)
    objective = np.array([float(state.objective) for state in states])
    assert (np.diff(objective) <= 1e-14).all() and objective[-1] < objective[0]
    last = states[-1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((last.theta, last.w)))
    assert abs(vp.reduced_objective(problem)(last.theta, data)[0] - last.objective) < 1e-6
    assert last.status in (vp.Status.RUNNING, vp.Status.STALLED, vp.Status.NON_FINITE)


@methods
@pytest.mark.parametrize("loss", ["least_squares", "softmax"])
def test_where_no_step_is_finite_the_start_comes_back(name, loss, x64):
    theta, data = make(loss)
    start = theta["opening"][0, 0]

    def only_here(theta, inputs):
        return features(theta, inputs) * jnp.where(theta["opening"][0, 0] == start, 1.0, jnp.nan)

    states = finish(METHODS[name](make_problem(loss, only_here)), theta, data)
    last = states[-1]
    assert last.status in (vp.Status.STALLED, vp.Status.NON_FINITE) and len(states) <= 3
    jax.tree.map(np.testing.assert_array_equal, last.theta, theta)
    assert last.objective == states[0].objective
    np.testing.assert_array_equal(last.w, states[0].w)


@methods
@pytest.mark.parametrize("loss", ["least_squares", "softmax"])
def test_a_start_that_is_not_finite_says_so(name, loss, x64):
    theta, data = make(loss)
    states = finish(METHODS[name](make_problem(loss, bounded(0.0))), theta, data)
    assert [int(state.status) for state in states] == [vp.Status.NON_FINITE]
    jax.tree.map(np.testing.assert_array_equal, states[0].theta, theta)


@methods
def test_a_gradient_that_is_not_finite_ends_the_run(name, x64):
    """The objective is finite where the square root of zero is; its derivative is not."""
    theta, data = make()
    theta["layers"] = np.zeros_like(theta["layers"])

    def roots(theta, inputs):
        return features(theta, inputs) + jnp.sqrt(jnp.sum(theta["layers"] ** 2))

    states = finish(METHODS[name](make_problem(fn=roots)), theta, data)
    assert states[-1].status in (vp.Status.STALLED, vp.Status.NON_FINITE) and len(states) <= 2
    jax.tree.map(np.testing.assert_array_equal, states[-1].theta, theta)
    assert np.isfinite(states[-1].objective)


@methods
def test_a_stationary_start_has_converged(name, x64):
    """Nothing to gain: features that do not depend on θ and no penalty."""
    theta, data = make()
    problem = make_problem(fn=lambda theta, inputs: jnp.tanh(inputs), penalty=None)
    states = finish(METHODS[name](problem), theta, data)
    assert len(states) <= 2 and states[-1].status == vp.Status.CONVERGED
    jax.tree.map(np.testing.assert_array_equal, states[-1].theta, theta)


def test_status_compares_with_numbers():
    assert vp.Status(0) is vp.Status.RUNNING
    assert {s.name for s in vp.Status} == {"RUNNING", "CONVERGED", "STALLED", "NON_FINITE", "BUDGET"}
