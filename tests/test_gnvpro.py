"""GNvpro: what it costs, what it finds and what it refuses; the contract is in test_method.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from methods import METHODS, finish, losses, make, make_problem, plain_problem, reference, run
from problems import (
    Case,
    dense_reference,
    direction,
    features,
    initial_theta,
    make_data,
    move,
    relative,
)
from scipy.optimize import least_squares, minimize

import varprox as vp
from varprox.methods.forms import EVEN, Form, Kernel
from varprox.methods.gnvpro import PATIENCE
from varprox.numerics import secant, trust_region
from varprox.problem.model import objective
from varprox.reduced.projection import WORN


@losses
def test_work_units_add_up(loss):
    """1 for the start; then 2 a step, 2 a product, 4 with the full Hessian, 1 a trial point."""
    _, _, states, infos, *_ = run("gnvpro-krylov", loss)
    expected = 1
    assert states[0].work_units == expected
    for state, info in zip(states[1:], infos, strict=True):
        expected += 2 + (4 if info.newton else 2) * int(info.products) + int(info.trials)
        assert state.work_units == expected
        assert 1 <= info.products <= 8 and info.trials >= 1


@pytest.mark.parametrize("name", ["gnvpro-dense", "gnvpro-kernel"])
@losses
def test_work_units_of_formed_models_add_up(name, loss):
    """1 for the start; then 1 a step, 1 a trial point and, with Kaufman's approximation, 1 an
    output."""
    _, _data, states, infos, *_ = run(name, loss)
    assert states[0].work_units == 1
    for before, after, info in zip(states, states[1:], infos, strict=False):
        columns, outputs = before.w.shape
        assert outputs < columns
        spent = 1 + outputs + int(info.trials)
        assert after.work_units == before.work_units + spent
        assert info.products == 0 and not info.newton


def test_rows_that_are_made_twice_count_twice(x64, monkeypatch):
    monkeypatch.setattr("varprox.reduced.matrix.KEPT_BYTES", 0)
    case, theta = Case("least_squares"), initial_theta()
    method = vp.gnvpro(case.problem, curvature="dense", kaufman=True)
    state = method.init(theta, case.data)
    after, info = method.step(state, case.data)
    outputs = case.data[1].shape[1]
    assert after.work_units == 1 + 2 * (1 + outputs) + info.trials


FORMS = [name for name in METHODS if name.startswith("gnvpro")]
forms = pytest.mark.parametrize("name", FORMS)


@forms
@losses
def test_the_start_has_the_exact_w(name, loss):
    _, data, (start, *_), *_ = run(name, loss)
    assert relative(start.w, reference(loss, start.theta, data)[1]) < 1e-8


@forms
def test_solves_for_w_start_with_the_factor_of_the_step(name):
    """So a factor has only been used by the last solve, and by moving on to its rows."""
    _, _, states, infos, *_ = run(name, "softmax_cross_entropy")
    used = [int(state.projection.spent) for state in states[1:]]
    assert max(int(info.w_products) for info in infos) > 0
    for spent, info in zip(used, infos, strict=True):
        assert spent in (info.w_products + 1, WORN + 1) or not info.accepted


@forms
@losses
def test_gain_ratio_is_actual_over_predicted_and_accepts(name, loss):
    _, _, states, infos, *_ = run(name, loss)
    for before, after, info in zip(states, states[1:], infos, strict=False):
        if info.accepted:
            assert after.objective <= before.objective * (1 + 1e-13) and info.ratio > 0
        assert info.objective == after.objective


@forms
@losses
def test_gradient_norm_is_that_of_the_weights_before_the_step(name, loss, x64):
    """At the W of the state; how near this is to W(θ) is tested in test_method.py."""
    _, data, states, infos, *_ = run(name, loss)
    derivative = jax.jit(jax.grad(lambda theta, w: objective(make_problem(loss), theta, w, data)))
    for state, info in list(zip(states, infos, strict=False))[:5]:
        expected = np.linalg.norm(ravel_pytree(derivative(state.theta, state.w))[0])
        assert abs(info.gradient_norm - expected) < 1e-10 * expected


def length(step, form):
    """Of a step, in the norm of the dense form, whose state this is, or in that of θ."""
    flat = ravel_pytree(step)[0]
    if isinstance(form, Kernel):
        return np.linalg.norm(flat)
    return np.sqrt(np.sum((form.diagonal + EVEN * form.diagonal.mean()) * flat**2))


@pytest.mark.parametrize("name, slack", [("gnvpro-kernel", 1 + 1e-8), ("gnvpro-dense", 1.1)])
@losses
def test_no_step_leaves_the_trust_region(name, slack, loss, x64):
    """But for the tenth by which `matrix_step` may miss the radius, and for a correction, which is
    tried where a step alone has failed."""
    _, _, states, infos, *_ = run(name, loss)
    for before, after, info in zip(states, states[1:], infos, strict=False):
        moved = jax.tree.map(np.subtract, after.theta, before.theta)
        corrected = 1 + trust_region.SHORT if info.trials > 1 else 1
        assert length(moved, after.form) <= float(info.radius) * slack * corrected


@losses
def test_no_step_of_the_published_form_leaves_the_trust_region(loss, x64):
    theta, data = make(loss)
    method = vp.gnvpro(make_problem(loss), curvature="krylov", rank=8, memory=0, whiten=False)
    state = method.init(theta, data)
    assert state.work_units == 1
    for _ in range(8):
        after, info = method.step(state, data)
        moved = jax.tree.map(jnp.subtract, after.theta, state.theta)
        assert np.linalg.norm(ravel_pytree(moved)[0]) <= float(info.radius) * (1 + 1e-8)
        state = after


@pytest.mark.parametrize("name", METHODS)
def test_the_minimum_is_that_of_scipy(name, x64):
    """BFGS on value and gradient from the dense formulas, from the same start."""
    case = Case("least_squares", 2, penalty="tikhonov", w_penalty=3e-2)
    start, unravel = jax.flatten_util.ravel_pytree(initial_theta())

    def value_and_gradient(t):
        dense = dense_reference(case, unravel(t), case.data)
        shrink = 0.5 * 9e-2 * t @ t, 9e-2 * t  # the penalty is 0.1 in all, to leave one minimum
        return dense.value + shrink[0], dense.gradient + shrink[1]

    found = minimize(value_and_gradient, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    problem = make_problem(penalty=0.1)
    method = METHODS[name](problem, tolerance=1e-13)
    states = finish(method, initial_theta(), case.data, 250)
    assert states[-1].status == vp.Status.CONVERGED
    assert abs(states[-1].objective - found.fun) < 1e-8 * found.fun


def bowl():
    """A problem and data with an objective that only the residual curves: J vanishes at its bottom,
    the Hessian does not."""

    def features(theta, inputs):
        height = 0.05 * jnp.sum(jnp.array([1.0, 2.0, 4.0]) * theta**2)
        return inputs[:, :1] + height * inputs[:, 1:]

    along, residual = np.ones(4), np.array([1.0, -1.0, 1.0, -1.0])
    data = (np.stack([along, -residual], axis=1), (along + residual)[:, None])
    return vp.Problem(vp.Separable(features, vp.dense(bias=False)), vp.least_squares()), data


def test_newton_takes_over_where_gauss_newton_misjudges_the_curvature(x64):
    """With products of the Gauss–Newton matrix every first trial overshoots; those of the Hessian,
    four work units each, then converge quadratically."""
    problem, data = bowl()
    method = vp.gnvpro(problem, curvature="krylov", rank=3, whiten=False, tolerance=1e-12)
    states, infos = [method.init(np.array([1.0, -0.7, 0.4]), data)], []
    while states[-1].status == vp.Status.RUNNING and len(infos) < 30:
        state, info = method.step(states[-1], data)
        states.append(state)
        infos.append(info)
        cost = 2 + (4 if info.newton else 2) * int(info.products) + int(info.trials)
        assert state.work_units == states[-2].work_units + cost
    newton = [bool(info.newton) for info in infos]
    assert not newton[0] and newton[-1] and newton == sorted(newton)
    # The start and the hand-over leave the radius to be chosen anew.
    first = newton.index(True)
    unset = [k for k, state in enumerate(states) if np.isinf(state.radius)]
    assert unset[:2] == [0, first] and states[first].low == PATIENCE
    assert states[-1].status == vp.Status.CONVERGED
    norms = [float(info.gradient_norm) for info in infos][newton.index(True) :]
    assert norms[1] < 1e-3 * norms[0] and norms[2] < 1e-9 * norms[1]
    assert abs(states[-1].objective - 0.5) < 1e-14


@pytest.mark.parametrize("curvature", ["dense", "forward"])
def test_gradients_teach_what_a_formed_matrix_leaves_out(curvature, x64):
    """Such as all of the curvature at the bottom of the bowl. What is learnt makes the last steps
    faster than linear; and a run does not end by it."""
    problem, data = bowl()
    method = vp.gnvpro(problem, curvature=curvature)
    states = finish(method, np.array([1.0, -0.7, 0.4]), data, 40)
    assert states[-1].status == vp.Status.CONVERGED
    assert abs(states[-1].objective - 0.5) < 1e-14
    streaks = [int(state.form.secant.streak) for state in states]
    assert max(streaks) >= secant.PATIENCE > streaks[-2]  # the last model is that of streaks[-2]
    hessian = 0.1 * np.diag([1.0, 2.0, 4.0])  # of the height, as the residual is one and so is W
    learnt = states[-1].form.secant.matrix
    assert relative(learnt, hessian) < 0.02


@pytest.mark.parametrize("curvature", ["dense", "kernel"])
@pytest.mark.parametrize("tiny", [1e-20, 1e-8, 1e-2])
def test_a_start_next_to_nothing_is_no_end(curvature, tiny):
    """The length of θ measures steps and tests only where there is some. In Krylov spaces a start
    that is symmetric up to rounding, as this is, stays so."""
    t = np.linspace(0, 5, 60, dtype=np.float32)
    targets = np.exp(-t[:, None] * [0.5, 3.0]) @ np.array([[1.0], [2.0]])
    problem = plain_problem(lambda p, t: jnp.exp(-t[:, None] * jnp.exp(p[None])), None, 0.0)
    method = vp.gnvpro(problem, curvature=curvature)
    data = t, targets.astype(np.float32)
    states = finish(method, np.array([0.0, tiny], np.float32), data, 60)
    assert states[-1].objective < 1e-6


def on_products(theta, t):
    return jnp.exp(-t[:, None] * theta[None, :2] * theta[None, 2:])


def with_scales(theta, t):
    return decays(theta[:2], t) * theta[None, 2:]


def with_unused(theta, t):
    return decays(theta[:2], t)


@pytest.mark.parametrize(
    "curvature, fn, start",
    [
        ("dense", on_products, [0.5, 1.0, 0.6, 1.5]),
        ("dense", with_unused, [-1.0, 0.5, 7.0, -3.0]),
        ("kernel", with_scales, [-1.0, 0.5, 3.0, 1e-3]),
        ("forward", on_products, [0.5, 1.0, 0.6, 1.5]),
    ],
)
def test_directions_on_which_nothing_depends_are_no_hindrance(curvature, fn, start, x64):
    """The end is that of two decays, each of whose rates is one weight, and is known to be one."""
    rng = np.random.default_rng(5)
    t = np.linspace(0, 5, 60)
    y = np.exp(-t[:, None] * [0.5, 3.0]) @ [[1.0], [2.0]] + 0.01 * rng.normal(size=(60, 1))

    def residuals(rates):
        rows = np.exp(-t[:, None] * rates)
        return (rows @ np.linalg.lstsq(rows, y, rcond=None)[0] - y).ravel()

    best = least_squares(residuals, [0.4, 2.0], xtol=1e-15, ftol=1e-15).cost / 60
    problem = vp.Problem(vp.Separable(fn, vp.dense(bias=False)), vp.least_squares())
    solution = vp.fit(vp.gnvpro(problem, curvature=curvature), np.array(start), (t, y), epochs=60)
    assert solution.status == vp.Status.CONVERGED
    np.testing.assert_allclose(solution.history["objective"][-1], best, rtol=1e-9)


def test_columns_that_become_one_are_an_end(x64):
    """Where a lower minimum is far, two frequencies meet, and W grows without bound: rounding
    decides whether half of the digits are known there, and so which of two statuses tells it."""
    t = np.linspace(0.02, 5, 60)
    waves = lambda theta, t: jnp.concatenate(  # noqa: E731
        [jnp.sin(t[:, None] * theta[None]), jnp.cos(t[:, None] * theta[None])], axis=1
    )
    y = np.asarray(waves(np.array([1.3, 2.9]), t)) @ [[1.0], [2.0], [0.5], [1.0]]
    y = y + 0.01 * np.random.default_rng(7).normal(size=(60, 1))
    problem = vp.Problem(vp.Separable(waves, vp.dense(bias=False)), vp.least_squares())
    method = vp.gnvpro(problem, curvature="dense")
    solution = vp.fit(method, np.array([3.25, 3.4]), (t, y), epochs=250)
    assert solution.status in (vp.Status.CONVERGED, vp.Status.STALLED)
    assert abs(solution.theta[0] - solution.theta[1]) < 1e-2
    rates = np.linspace(3.0, 3.7, 15)
    around = [  # no pair of frequencies near the end is lower
        np.linalg.lstsq(np.asarray(waves(np.array([a, b]), t)), y, rcond=None)[1][0] / 120
        for a in rates
        for b in rates
        if b - a > 0.04
    ]
    assert solution.history["objective"][-1] < min(around)


@pytest.mark.parametrize("unit", [1.0, 1e8])
def test_whitening_takes_units_as_they_come(unit):
    _, (inputs, targets) = make()
    data = np.float32(inputs), np.float32(unit * targets)
    theta = jax.tree.map(np.float32, initial_theta())
    problem = plain_problem(features, None, 0.0)
    method = vp.gnvpro(problem, curvature="krylov", whiten=True)
    states = finish(method, theta, data, 20)
    assert states[-1].objective < 0.5 * states[0].objective


def test_a_quadratic_problem_is_solved_in_one_step(x64):
    """Features that θ does not move leave ½ α ‖θ‖² to be minimised."""
    theta, data = make()
    problem = plain_problem(lambda theta, inputs: jnp.tanh(inputs), 0.3)
    states = finish(vp.gnvpro(problem, tolerance=1e-10), theta, data)
    assert len(states) == 3 and states[-1].status == vp.Status.CONVERGED
    assert max(np.abs(leaf).max() for leaf in states[1].theta.values()) < 1e-12


def test_without_residual_it_converges_faster_than_linearly(x64):
    """Gauss–Newton is then Newton near the solution: full steps square the distance to it."""
    theta, (inputs, _) = initial_theta(), make_data("least_squares", 2, samples=40)
    w = np.random.default_rng(0).normal(size=(4, 2))
    problem = plain_problem(features, None, 0.0)
    targets = np.asarray(vp.predict(problem, theta, w, inputs))
    start = move(theta, 1e-4, direction())
    states = finish(vp.gnvpro(problem, rank=24, flat=0.0), start, (inputs, targets), 2)
    residual = np.sqrt([float(state.objective) for state in states])
    assert residual[1] < 1e-2 * residual[0] and residual[2] < 1e-5 * residual[0]


@pytest.mark.parametrize("seed", range(4))
def test_it_does_not_stall_on_the_ellipse(seed, x64):
    """A W-solve that divides noise by noise stalls here: penalties of 1e-6 and 1e-8."""
    result = ellipse_run(seed)
    assert result.status in (vp.Status.RUNNING, vp.Status.CONVERGED)
    inputs, targets = ELLIPSE
    predictions = vp.predict(ellipse_problem, result.theta, result.w, inputs)
    accuracy = np.mean(np.argmax(predictions, axis=1) == targets.argmax(axis=1))
    assert accuracy > 0.95


def ellipse_data(samples=150):
    rng = np.random.default_rng(0)
    angle, radius = rng.uniform(0, 2 * np.pi, samples), rng.uniform(0, 2, samples)
    inputs = np.stack([radius * np.cos(angle), 0.4 * radius * np.sin(angle)], axis=1)
    return inputs, np.eye(2)[(radius > 1).astype(int)]


ELLIPSE = ellipse_data()


def two_layers(theta, inputs):
    for kernel in theta:
        inputs = jnp.tanh(inputs @ kernel[:-1] + kernel[-1:])
    return inputs


ellipse_problem = vp.Problem(
    vp.Separable(two_layers), vp.softmax_cross_entropy(), vp.tikhonov(1e-6), 1e-8
)


def ellipse_run(seed):
    rng = np.random.default_rng(seed)
    theta = [rng.normal(size=s) for s in ((3, 4), (5, 4))]
    return finish(vp.gnvpro(ellipse_problem, rank=10), theta, ELLIPSE, 40)[-1]


@pytest.mark.parametrize(
    "options, error, named, came",
    [
        ({"curvature": "full"}, ValueError, "curvature", "'full'"),
        ({"curvature": None}, ValueError, "curvature", "None"),
        ({"rank": 0}, ValueError, "rank", "0"),
        ({"rank": 2.5}, ValueError, "rank", "2.5"),
        ({"rank": True}, ValueError, "rank", "True"),
        ({"rank": "20"}, ValueError, "rank", "'20'"),
        ({"memory": -1}, ValueError, "memory", "-1"),
        ({"memory": 2.5}, ValueError, "memory", "2.5"),
        ({"flat": -0.1}, ValueError, "flat", "-0.1"),
        ({"flat": 1.0}, ValueError, "flat", "1.0"),
        ({"flat": float("nan")}, ValueError, "flat", "nan"),
        ({"flat": "a"}, TypeError, "flat", "'a'"),
        ({"tolerance": -1e-3}, ValueError, "tolerance", "-0.001"),
        ({"tolerance": float("nan")}, ValueError, "tolerance", "nan"),
        ({"tolerance": "a"}, TypeError, "tolerance", "'a'"),
        ({"whiten": "yes"}, TypeError, "whiten", "'yes'"),
        ({"hand_over": 1}, TypeError, "hand_over", "1"),
        ({"kaufman": "no"}, TypeError, "kaufman", "'no'"),
    ],
)
def test_bad_options_are_refused(options, error, named, came):
    with pytest.raises(error, match=f"^{named}: expected") as caught:
        vp.gnvpro(make_problem(), **options)
    assert came in str(caught.value).split("got", 1)[1]


@pytest.mark.parametrize("name", ["gnvpro-dense", "gnvpro-kernel"])
def test_without_kaufmans_approximation_every_column_costs_a_pass(name, x64):
    theta, data = make()
    method = METHODS[name](make_problem(), kaufman=False)
    state = method.init(theta, data)
    after, info = method.step(state, data)
    spent = 1 + len(state.w) + int(info.trials)
    assert after.work_units == state.work_units + spent
    assert after.objective < state.objective


@pytest.mark.parametrize("kaufman, passes", [(None, 4), (False, 4), (True, 4)])
def test_many_outputs_cost_no_more_passes_than_there_are_columns(kaufman, passes, x64):
    case = Case("least_squares", outputs=7)
    method = vp.gnvpro(case.problem, curvature="dense", kaufman=kaufman)
    state = method.init(initial_theta(), case.data)
    assert len(state.w) == passes
    after, info = method.step(state, case.data)
    assert after.work_units == state.work_units + 1 + passes + int(info.trials)
    assert after.objective < state.objective


def test_a_kernel_needs_a_multiple_of_the_identity():
    for penalty in (vp.smoothness_in_time(1e-3, 1.0), [1e-3, lambda theta: 0.0]):
        with pytest.raises(ValueError, match=r"^curvature: expected 'kernel' only where") as caught:
            vp.gnvpro(make_problem(penalty=penalty), curvature="kernel")
        assert "'kernel' with theta_penalty=" in str(caught.value).split("got", 1)[1]
    vp.gnvpro(make_problem(penalty=[1e-3, vp.tikhonov(1e-2)]), curvature="kernel")
    vp.gnvpro(make_problem(penalty=None), curvature="kernel")


def test_what_is_not_a_problem_is_refused():
    with pytest.raises(TypeError, match=r"^problem: expected a varprox\.Problem, got"):
        vp.gnvpro(vp.Separable(features))


def test_another_rank_is_another_program_and_stays_within_it(x64):
    theta, data = make()
    for rank in (1, 3):
        method = vp.gnvpro(make_problem(), curvature="krylov", rank=rank, flat=0.0)
        _, info = method.step(method.init(theta, data), data)
        assert info.products == rank


# Features of other kinds


def decays(theta, time):
    return jnp.exp(-time[:, None] * jnp.exp(theta[None]))


def smoothed(theta, time):
    """Every row depends on those before it."""
    return jnp.cumsum(decays(theta, time), axis=0) / len(time)


def looped(theta, time):
    """A loop of unknown length has no derivative in reverse mode."""

    def body(carry):
        step, z = carry
        return step + 1, z * jnp.exp(-time[:, None] * jnp.exp(theta[None]) / 4)

    start = 0, jnp.ones((len(time), len(theta)), time.dtype)
    return jax.lax.while_loop(lambda carry: carry[0] < 4, body, start)[1]


@jax.custom_vjp
def reversible(theta, time):
    return decays(theta, time)


reversible.defvjp(
    lambda theta, time: (decays(theta, time), (theta, time)),
    lambda saved, y: jax.vjp(decays, *saved)[1](y),
)


def curve(features, dtype=np.float64):
    """A problem, a start, noisy data and the weights that SciPy finds for them."""
    time = np.linspace(0, 4, 40)
    rates = np.log([0.4, 2.5])
    rows = jax.jit(features)
    noise = 0.01 * np.random.default_rng(0).normal(size=(40, 1))
    targets = np.asarray(rows(rates, time)) @ [[1.0], [3.0]] + noise

    def residual(theta):
        z = np.asarray(rows(theta, time))
        return (z @ np.linalg.lstsq(z, targets)[0] - targets).ravel()

    rates = np.sort(least_squares(residual, rates, xtol=1e-14, gtol=1e-14).x)
    time, targets = time.astype(dtype), targets.astype(dtype)
    problem = vp.Problem(vp.Separable(features, vp.dense(bias=False)), vp.least_squares())
    return problem, np.log([0.1, 1.0]).astype(dtype), (time, targets), rates


ALLOWED = {
    smoothed: {Form.KRYLOV, Form.FORWARD},
    looped: {Form.FORWARD},
    reversible: {Form.DENSE, Form.KERNEL},
    decays: set(Form),
}


@pytest.mark.parametrize("fn", ALLOWED, ids=lambda fn: getattr(fn, "__name__", "reversible"))
def test_features_get_a_form_that_is_right_for_them(fn, x64):
    """By default; and the others are refused with the names of these."""
    problem, start, data, rates = curve(fn)
    solution = vp.fit(problem, start, data, max_work=300)
    np.testing.assert_allclose(np.sort(solution.theta), rates, rtol=1e-5)
    assert solution.status == vp.Status.CONVERGED
    assert Form(int(solution.history["curvature"][-1])) in ALLOWED[fn]
    for form in set(Form) - ALLOWED[fn]:
        name = form.name.lower()
        with pytest.raises(ValueError, match=r"^curvature: expected curvature=") as caught:
            vp.gnvpro(problem, curvature=name).init(start, data)
        assert all(repr(other.name.lower()) in str(caught.value) for other in ALLOWED[fn])
        with pytest.raises(ValueError, match=r"^curvature: expected curvature="):
            jax.jit(vp.gnvpro(problem, curvature=name).init)(start, data)


@pytest.mark.parametrize("name", ["dense", "kernel", "krylov", "forward"])
def test_first_steps_are_finite_and_good(name, x64):
    """Whatever the units of θ and of the targets, from a start far away."""
    problem, _, (time, targets), _ = curve(decays)
    method = vp.gnvpro(problem, curvature=name)
    radii = []
    for unit in (1.0, 1e-6, 1e6):
        data = (time, unit * targets)
        start = method.init(np.log([1e-3, 40.0]), data)
        state, info = method.step(start, data)
        assert info.ratio >= trust_region.POOR and state.objective < start.objective
        radii.append(info.radius / unit if name in ("dense", "forward") else info.radius)
    np.testing.assert_allclose(radii, radii[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["dense", "kernel", "krylov", "forward"])
def test_units_make_no_difference_in_single_precision(name):
    """Nor does an offset, as there is a bias."""
    time = np.linspace(0, 4, 40, dtype=np.float32)
    noise = np.random.default_rng(0).normal(size=(40, 1))
    targets = np.exp(-time[:, None] * [0.4, 2.5]) @ [[1.0], [3.0]] + 0.05 * noise
    problem = vp.Problem(vp.Separable(decays), vp.least_squares())
    start = np.log([0.1, 1.0]).astype(np.float32)
    method, objectives = vp.gnvpro(problem, curvature=name), []
    for unit, offset in ((1.0, 0.0), (1e10, 0.0), (1e-10, 0.0), (1.0, 1e4)):
        data = time, (unit * targets + offset).astype(np.float32)
        solution = vp.fit(method, start, data, max_work=200)
        assert solution.status == vp.Status.CONVERGED
        objectives.append(solution.history["objective"][-1] / unit**2)
    np.testing.assert_allclose(objectives, objectives[0], rtol=2e-3)


def products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"]
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@forms
@losses
def test_every_product_asks_for_full_precision(name, loss):
    """Those of the features, too: on an accelerator the default is less."""
    theta, data = make(loss, np.float32)
    method = METHODS[name](make_problem(loss, dtype=np.float32))
    state = jax.eval_shape(method.init, theta, data)
    for fn, *at in ((method.init, theta, data), (method.step, state, data)):
        found = list(products(jax.make_jaxpr(fn)(*at).jaxpr))
        assert found and all(p is not None and set(p) == {jax.lax.Precision.HIGHEST} for p in found)


@forms
def test_a_state_goes_on_with_other_data(name, x64):
    """W is the minimiser for these data; the rest of what a state knows stays."""
    loss = "softmax_cross_entropy"
    theta, data = make(loss)
    method = METHODS[name](make_problem(loss))
    state = finish(method, theta, data, 3)[-1]
    other = make_data(loss, data[1].shape[1], seed=5)
    begun, fresh = method.init(state.theta, other, before=state), method.init(state.theta, other)
    assert relative(begun.w, fresh.w) < 1e-6
    assert begun.objective == pytest.approx(float(fresh.objective), rel=1e-9)
    assert begun.radius == state.radius and begun.work_units == state.work_units + 1
    after, info = method.step(begun, other)
    assert info.radius == state.radius and after.objective < begun.objective
    fewer = jax.tree.map(lambda x: x[3:], other)
    types = jax.eval_shape(lambda theta: method.init(theta, fewer, before=state), state.theta)
    assert len(types.projection.rows) == len(fewer[1])


def test_a_state_goes_on_at_the_same_weights_and_data_as_if_nothing_had_been(x64):
    theta, data = make()
    method = METHODS["gnvpro-krylov"](make_problem())
    *_, state, expected = finish(method, theta, data, 4)
    after, _ = method.step(method.init(state.theta, data, before=state), data)
    np.testing.assert_allclose(after.objective, expected.objective, rtol=1e-12)


def test_a_state_of_another_method_does_not_go_on(x64):
    theta, data = make()
    other = METHODS["lbfgsvpro"](make_problem()).init(theta, data)
    with pytest.raises(TypeError, match=r"^state: expected one of gnvpro, got that of another"):
        METHODS["gnvpro-krylov"](make_problem()).init(theta, data, before=other)


def test_ten_failed_trials_carry_the_radius_on(x64):
    """A wall of NaN so near that the first iteration finds no step, and the second does."""
    theta, data = make()
    states = finish(METHODS["gnvpro-dense"](make_problem(radius=1e-8)), theta, data, 4)
    moved = [np.any(s.theta["opening"] != theta["opening"]) for s in states]
    assert not moved[1] and moved[2] and states[1].status == vp.Status.RUNNING
    assert 0 < states[1].radius < 1e-5


@forms
def test_many_fits_at_once_are_those_alone(name, x64):
    """In jaxlib two batched factorisations at once waited for ever."""
    problem, start, (time, targets), _ = curve(decays)
    many = targets.T + 0.01 * np.random.default_rng(0).normal(size=(20, len(time)))
    method = METHODS[name](problem)

    def solve(targets):
        data = time, targets[:, None]
        state = method.init(start, data)
        goes_on = lambda s: (s.status == 0) & (s.work_units < 200)  # noqa: E731
        return jax.lax.while_loop(goes_on, lambda s: method.step(s, data)[0], state).objective

    together = jax.jit(jax.vmap(solve))(many)
    alone = [jax.jit(solve)(targets) for targets in many[:3]]
    np.testing.assert_allclose(together[:3], alone, rtol=1e-9)
    assert (together < 1e-3).all()
