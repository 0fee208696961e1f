"""The contract of a method: what `init` and `step` promise.

It is run over every full-batch method; and, as far as it is the same, over slimTrain, whose steps
are given all of the data here, and over the methods that the benchmarks compare with.
"""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
from methods import (
    ALL,
    METHODS,
    NUMBERS,
    OTHERS,
    PAIRS,
    begin,
    finish,
    make,
    make_problem,
    methods,
    plain_problem,
    reference,
    run,
    signature,
    value,
)
from problems import features, initial_theta, relative

import varprox as vp
from varprox.methods.quasi_newton import ACCURACY

EVERY = PAIRS + OTHERS
DESCENDING = [pair for pair in EVERY if pair[0] not in ("adam", "slimtrain")]
every = pytest.mark.parametrize("name, loss", EVERY)
# With one loss each.
once = pytest.mark.parametrize("name, loss", [*product(METHODS, ["least_squares"]), *OTHERS])


def runs_of(pairs):
    return pytest.fixture(scope="module", params=pairs, ids="-".join)(
        lambda request: run(*request.param)
    )


runs, descents, projections = map(runs_of, (EVERY, DESCENDING, PAIRS))


def test_a_step_traces_once(runs):
    """Whatever it does to the features while it is compiled, it never comes back to Python."""
    _, *later, other = runs.traces
    assert len(later) >= 8
    assert later == [0] * len(later)
    assert other == 0  # penalties and tolerance are numbers, not constants of the compiled step


def test_a_step_keeps_structure_shapes_and_dtypes(runs):
    for signatures in runs.signatures:
        assert all(s == signatures[0] for s in signatures[1:])
    assert all(np.ndim(field) == 0 for field in runs.infos[0])


def test_the_objective_never_increases(descents):
    objective = np.array([state.objective for state in descents.states])
    assert (np.diff(objective) <= 1e-14 * np.abs(objective[:-1])).all()
    assert objective[-1] < 0.95 * objective[0]


def test_the_objective_is_that_of_the_weights(descents):
    for state in descents.states:
        np.testing.assert_allclose(state.objective, value(descents, state), rtol=1e-12)


def test_the_run_converges(projections):
    assert projections.states[-1].status == vp.Status.CONVERGED
    assert projections.infos[-1].gradient_norm <= 1e-6
    assert {int(state.status) for state in projections.states[:-1]} == {vp.Status.RUNNING}


def test_w_and_the_objective_belong_to_theta(projections):
    """Φ exceeds Φ_red by no more than promised, a fraction of a step's decrease (an estimate)."""
    objective = np.array([state.objective for state in projections.states])
    decrease = np.append(objective[0], -np.diff(objective))
    allowed = 3 * ACCURACY * np.maximum(decrease, np.append(objective[0], decrease[:-1])) + 1e-13
    for state, excess in zip(projections.states, allowed, strict=True):
        expected, w = reference(projections.loss, state.theta, projections.data)
        assert -1e-13 <= state.objective - expected <= excess
    assert relative(projections.states[-1].w, w) < 1e-4


@once
def test_permuting_the_batch_gives_the_same_run(name, loss, x64):
    theta, (inputs, targets) = make(loss)
    order = np.random.default_rng(0).permutation(len(inputs))
    method = ALL[name](make_problem(loss), **NUMBERS[name])
    states = []
    for data in ((inputs, targets), (inputs[order], targets[order])):
        state = begin(method, theta, data)
        for _ in range(6):
            state, _ = method.step(state, data)
        states.append(state)
    assert states[0].work_units == states[1].work_units
    assert abs(states[0].objective - states[1].objective) < 1e-10
    for a, b in zip(*(jax.tree.leaves(state.theta) for state in states), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)


@once
def test_scan_vmap_jit_and_a_loop_give_the_same_run(name, loss, x64):
    """In the caller's own jit, a scan over steps for each of three starts at once; the loop twice,
    bit for bit."""
    _, data = make(loss)
    method = ALL[name](make_problem(loss), **NUMBERS[name])

    def scanned(theta):
        state = begin(method, theta, data)
        return jax.lax.scan(lambda state, _: method.step(state, data), state, length=5)

    def looped(theta):
        state, infos = begin(method, theta, data), []
        for _ in range(5):
            state, info = method.step(state, data)
            infos.append(info)
        return state, infos

    starts = [initial_theta(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *starts)
    states, histories = jax.jit(jax.vmap(scanned))(stacked)
    for i, theta in enumerate(starts):
        state, infos = looped(theta)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        assert states.work_units[i] == state.work_units and states.status[i] == state.status
        np.testing.assert_allclose(
            histories.objective[i], [info.objective for info in infos], rtol=1e-9
        )
        np.testing.assert_allclose(states.w[i], state.w, rtol=1e-6)
        np.testing.assert_allclose(states.theta["opening"][i], state.theta["opening"], atol=1e-6)
    again, _ = looped(theta)
    jax.tree.map(np.testing.assert_array_equal, state, again)


@pytest.mark.parametrize("name, loss, enabled", [
    ("gnvpro-krylov", "least_squares", False),
    ("gnvpro-krylov", "softmax_cross_entropy", True),
    ("gnvpro-dense", "least_squares", False),
    ("gnvpro-dense", "softmax_cross_entropy", True),
    ("gnvpro-kernel", "softmax_cross_entropy", False),
    ("gnvpro-kernel", "least_squares", True),
    ("lbfgsvpro", "softmax_cross_entropy", False),
    ("lbfgsvpro", "least_squares", True),
    ("lbfgsvpro", "softmax_cross_entropy", True),
    ("broydenvpro", "least_squares", False),
    ("gn", "softmax_cross_entropy", False),
    ("lbfgs", "softmax_cross_entropy", False),
    ("broyden", "least_squares", True),
    ("adam", "softmax_cross_entropy", True),
])  # fmt: skip
def test_single_precision_is_kept(name, loss, enabled):
    """Also where double precision is enabled."""
    with jax.enable_x64(enabled):
        theta, data = make(loss, np.float32)
        method = ALL[name](make_problem(loss, dtype=np.float32), **NUMBERS[name])
        start = state = begin(method, theta, data)
        for _ in range(6):
            state, _ = method.step(state, data)
        assert signature(state) == signature(start)
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.theta, state.w)))
    if name == "adam":  # whose random W is another one
        return
    exact = [float(s.objective) for s in run(name, loss).states]
    assert abs(float(start.objective) - exact[0]) < 1e-5
    assert float(start.objective) - float(state.objective) > 0.9 * (exact[0] - exact[6])


# What is refused


@pytest.mark.parametrize("name", ALL)
def test_the_start_refuses_bad_data(name, x64):
    theta, (inputs, targets) = make()
    method = ALL[name](make_problem())
    for given, error, message in (
        (inputs, TypeError, r"data: expected a pair \(inputs, targets\), or .*, got ndarray of"),
        ((pandas.DataFrame(inputs), targets), TypeError, r"inputs: .*DataFrame; \.to_numpy\(\)"),
        ((inputs, targets[:, 0]), ValueError, r"targets: expected shape .*, got \(16,\)"),
        ((inputs, np.nan * targets), ValueError, "targets: expected finite numbers, got 32 NaN"),
        ((inputs[:0], targets[:0]), ValueError, "targets: expected at least one sample, got none"),
        ((inputs[1:], targets), ValueError, r"inputs: expected 16 samples.*got shape \(15, 2\)"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            begin(method, theta, given)


OWN = [*METHODS, "slimtrain"]


@pytest.mark.parametrize("name", OWN)
def test_a_step_refuses_what_is_not_its_own(name, x64):
    """A state that the method has not made, and data that `init` was not given."""
    theta, data = make()
    inputs, targets = data
    method = ALL[name](make_problem())
    state = method.init(theta, data)
    others = (METHODS[other] for other in METHODS if other[:3] != name[:3])
    foreign = next(others)(make_problem()).init(theta, data)
    own = name.split("-")[0]
    for given, came in (
        (None, "NoneType"),
        ({"theta": theta}, "dict"),
        (foreign, "that of another method"),
        ((state, None), "tuple; method.step returns a pair, state and info"),
    ):
        with pytest.raises(TypeError) as caught:
            method.step(given, data)
        assert str(caught.value) == f"state: expected one of {own}, got {came}"
    of_any = (
        (inputs, TypeError, r"data: expected a pair \(inputs, targets\), or .*, got ndarray of"),
        ((pandas.DataFrame(inputs), targets), TypeError, r"inputs: .*DataFrame; \.to_numpy\(\)"),
    )
    of_all_samples = (
        ((inputs, targets[:, 0]), ValueError, r"targets: expected shape \(16, 2\).*got \(16,\)"),
        ((inputs[1:], targets[1:]), ValueError, r"targets: expected shape \(16, 2\), that of"),
        ((inputs[1:], targets), ValueError, r"inputs: expected 16 samples.*got shape \(15, 2\)"),
    )
    for given, error, message in of_any + of_all_samples * (name in METHODS):
        with pytest.raises(error, match=f"^{message}"):
            method.step(state, given)


# Where the features are not defined


@every
def test_weights_stay_good_at_a_wall_of_nan(name, loss, x64):
    """The minimiser lies where the features are not a number; the run ends this side of it."""
    theta, data = make(loss)
    method = ALL[name](make_problem(loss, radius=0.3), **NUMBERS[name])
    states = finish(method, theta, data, 30)
    last = states[-1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((last.theta, last.w)))
    assert last.status in (vp.Status.RUNNING, vp.Status.STALLED, vp.Status.NON_FINITE)
    objective = np.array([float(state.objective) for state in states])
    if (name, loss) in DESCENDING:
        assert (np.diff(objective) <= 1e-14).all() and objective[-1] < objective[0]
    if name in METHODS:
        expected, _ = reference(loss, jax.tree.map(np.asarray, last.theta), data)
        decreases = -np.diff(objective)
        allowed = 3 * ACCURACY * decreases[decreases > 0][-2:].max()
        assert -1e-13 <= float(last.objective) - expected <= max(allowed, 1e-6)


@every
def test_where_no_step_is_finite_the_start_comes_back(name, loss, x64):
    theta, data = make(loss)
    states = finish(ALL[name](make_problem(loss, radius=0.0), **NUMBERS[name]), theta, data)
    last = states[-1]
    assert last.status in (vp.Status.STALLED, vp.Status.NON_FINITE) and len(states) <= 4
    jax.tree.map(np.testing.assert_array_equal, last.theta, theta)
    if (name, loss) in DESCENDING:
        assert last.objective <= states[0].objective + 1e-14
    if name in METHODS:  # W alone may have been solved for again
        expected, w = reference(loss, jax.tree.map(np.asarray, theta), data)
        assert abs(last.objective - expected) < 1e-13 and relative(last.w, w) < 1e-8


@every
def test_a_start_that_is_not_finite_says_so(name, loss, x64):
    """slimTrain, which looks at no batch before its first step, after this."""
    theta, data = make(loss)
    states = finish(ALL[name](make_problem(loss, radius=-1.0), **NUMBERS[name]), theta, data)
    before = [vp.Status.RUNNING] * (name == "slimtrain")
    assert [int(state.status) for state in states] == [*before, vp.Status.NON_FINITE]
    jax.tree.map(np.testing.assert_array_equal, states[-1].theta, theta)


@methods
def test_a_gradient_that_is_not_finite_ends_the_run(name, x64):
    """The objective is finite where the square root of zero is; its derivative is not."""
    theta, data = make()
    theta["layers"] = np.zeros_like(theta["layers"])

    def roots(theta, inputs):
        return features(theta, inputs) + jnp.sqrt(jnp.sum(theta["layers"] ** 2))

    states = finish(METHODS[name](plain_problem(roots)), theta, data)
    assert states[-1].status == vp.Status.NON_FINITE and len(states) <= 2
    jax.tree.map(np.testing.assert_array_equal, states[-1].theta, theta)
    assert np.isfinite(states[-1].objective)


@methods
def test_a_start_where_the_rows_do_not_move_is_told(name, x64):
    """Features that do not depend on θ, and a start from which all derivatives vanish."""
    theta, data = make()
    still = jax.tree.map(np.zeros_like, theta)
    for fn, start in ((lambda theta, inputs: jnp.tanh(inputs), theta), (features, still)):
        states = finish(METHODS[name](plain_problem(fn, None)), start, data)
        assert len(states) <= 2 and states[-1].status == vp.Status.FLAT
        jax.tree.map(np.testing.assert_array_equal, states[-1].theta, start)
    assert "start from other weights" in vp.Status.FLAT.message


def test_status_compares_with_numbers():
    assert vp.Status(0) is vp.Status.RUNNING
    assert {s.name for s in vp.Status} == {
        "RUNNING",
        "CONVERGED",
        "STALLED",
        "NON_FINITE",
        "BUDGET",
        "FLAT",
        "STOPPED",
        "INTERRUPTED",
    }
