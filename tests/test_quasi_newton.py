"""LBFGSvpro and Broydenvpro: what they cost, where they end and what they refuse.

The contract is in test_method.py, what stands for the inverse Hessian in test_inverse_hessian.py.
"""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree
from methods import METHODS, PAIRS, make_problem, reference, run
from problems import Case, dense_reference, features, products

import varprox as vp
from varprox.problem.model import objective

methods = pytest.mark.parametrize("name", ["lbfgsvpro", "broydenvpro"])
pairs = pytest.mark.parametrize(
    "name, loss", [pair for pair in PAIRS if pair[0] in ("lbfgsvpro", "broydenvpro")]
)


@pairs
def test_work_units_add_up(name, loss):
    """2 for the start, 2 for the whitening and 2 a trial point of the line search."""
    _, _, states, infos, *_ = run(name, loss)
    trials = np.array([int(info.trials) for info in infos])
    work = np.array([int(state.work_units) for state in states])
    assert work[0] == 4 and (trials >= 1).all()
    np.testing.assert_array_equal(np.diff(work), 2 * trials)
    assert np.median(trials) == 1


@pairs
def test_gradient_is_that_of_the_reduced_objective(name, loss, x64):
    """By the envelope theorem, the derivative of Φ in θ at the W of the state; how near this is to
    W(θ) is tested in test_method.py. Under least squares it is there."""
    case = Case(loss, 2, penalty="tikhonov", w_penalty=3e-2)
    _, data, states, infos, *_ = run(name, loss)
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


@pairs
def test_after_a_failure_it_stays_and_then_follows_the_gradient(name, loss, x64):
    """The whitened gradient, whatever was known before the failure."""
    _, data, states, *_ = run(name, loss)
    step = METHODS[name](make_problem(loss)).step
    failed = states[6]._replace(failures=states[6].failures + 1)
    stayed, _ = step(failed, data)
    jax.tree.map(np.testing.assert_array_equal, stayed.theta, failed.theta)
    moved, info = step(stayed, data)
    assert moved.objective < stayed.objective and info.trials >= 1
    for state in (stayed, moved):  # with a W that is exact
        assert abs(state.objective - reference(loss, state.theta, data)[0]) < 1e-13

    def direction(old, new):
        change = ravel_pytree(new.theta)[0] - ravel_pytree(old.theta)[0]
        return change / np.linalg.norm(change)

    whiten = stayed.whitening
    downhill = -ravel_pytree(whiten(whiten(stayed.gradient)))[0]
    downhill = downhill / np.linalg.norm(downhill)
    np.testing.assert_allclose(direction(stayed, moved), downhill, atol=1e-8)
    # Without a failure the pairs turn the step.
    assert np.linalg.norm(direction(states[6], states[7]) - downhill) > 1e-2


def test_w_is_no_more_accurate_than_steps_need():
    """Of its excess test_method.py has the other bound."""
    loss = "softmax_cross_entropy"
    _, data, states, *_ = run("lbfgsvpro", loss)
    excess = [state.objective - reference(loss, state.theta, data)[0] for state in states[1:6]]
    assert max(excess) > 1e-10


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


@methods
def test_what_is_not_a_problem_is_refused(name):
    with pytest.raises(TypeError, match=r"^problem: expected a varprox\.Problem, got"):
        METHODS[name](vp.Separable(features))


def test_more_weights_than_memory_allows_are_refused(x64):
    """Two weights in double precision make an inverse Hessian of 32 bytes."""
    start = np.array([-1.0, 0.5])
    with pytest.raises(ValueError, match=r"^theta: expected .*max_bytes=31 bytes, got one of 32"):
        vp.broydenvpro(of_curve(), max_bytes=31).init(start, curve())
    vp.broydenvpro(of_curve(), max_bytes=32).init(start, curve())
    with pytest.raises(ValueError, match=r"^max_bytes: expected an integer"):
        vp.broydenvpro(of_curve(), max_bytes=0)


# Other starts, units and features


def decays(theta, t):
    return jnp.exp(-t[:, None] * jnp.exp(theta[None]))


def curve(seed=3, samples=60, dtype=np.float64):
    """Two decays with noise."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 5, samples)
    y = np.exp(-t[:, None] * [0.5, 3.0]) @ [[1.0], [2.0]] + 0.01 * rng.normal(size=(samples, 1))
    return t.astype(dtype), y.astype(dtype)


def of_curve(fn=decays, bias=False, **penalties):
    return vp.Problem(vp.Separable(fn, vp.dense(bias=bias)), vp.least_squares(), **penalties)


def solver(problem, build=vp.lbfgsvpro, work=3000):
    """`init` and the steps until the run ends, in one compiled function."""
    method = build(problem)

    @jax.jit
    def solve(theta, data):
        return jax.lax.while_loop(
            lambda state: (state.status == vp.Status.RUNNING) & (state.work_units < work),
            lambda state: method.step(state, data)[0],
            method.init(theta, data),
        )

    return solve


def nearby_minimum(problem, theta, data):
    """The reduced objective at θ, and what SciPy's BFGS goes down to from there."""
    reduced = vp.reduced_objective(problem)
    flat, unravel = ravel_pytree(theta)
    both = jax.jit(jax.value_and_grad(lambda flat: reduced(unravel(flat), data)[0]))

    def fun(flat):
        value, gradient = both(jnp.asarray(flat))
        return float(value), np.asarray(gradient)

    found = scipy.optimize.minimize(
        fun, np.asarray(flat), jac=True, method="BFGS", options={"gtol": 1e-12}
    )
    return fun(flat)[0], min(float(found.fun), fun(flat)[0])


both = pytest.mark.parametrize("build", [vp.lbfgsvpro, vp.broydenvpro])


@both
def test_a_curve_fit_converges_where_nothing_lower_is_near(build, x64):
    problem, data = of_curve(), curve()
    solve = solver(problem, build)
    for seed in range(6):
        start = np.random.default_rng(seed).uniform(-2, 2, 2)
        state = solve(start, data)
        assert state.status == vp.Status.CONVERGED and state.work_units < 300
        here, near = nearby_minimum(problem, state.theta, data)
        assert here - near <= 1e-6 * abs(here)
        assert abs(float(state.objective) - here) <= 1e-12 * here


@both
def test_a_fit_without_a_residual_converges(build, x64):
    t = np.linspace(0, 5, 60)
    data = t, np.exp(-t[:, None] * [0.5, 3.0]) @ [[1.0], [2.0]]
    state = solver(of_curve(), build)(np.array([-2.0, 1.5]), data)
    assert state.status == vp.Status.CONVERGED
    assert state.objective < 1e-25 and state.work_units < 300
    np.testing.assert_allclose(np.sort(np.exp(state.theta)), [0.5, 3.0], rtol=1e-10)


@both
def test_single_precision_goes_as_far_as_it_allows(build):
    """Near the minimum in double precision, and it knows that it is there."""
    state = solver(of_curve(), build)(jnp.array([-1.0, 0.5], jnp.float32), curve(dtype=np.float32))
    assert state.status == vp.Status.CONVERGED and state.work_units < 300
    with jax.enable_x64(True):
        exact = solver(of_curve())(np.array([-1.0, 0.5]), curve())
        reduced = vp.reduced_objective(of_curve())
        value = reduced(jnp.asarray(state.theta, jnp.float64), curve())[0]
        assert float(exact.objective) <= float(value) < float(exact.objective) * (1 + 1e-5)


SCALES = {np.float32: (1e-10, 1e10), np.float64: (1e-8, 1e8)}


@both
@pytest.mark.parametrize("dtype", SCALES)
def test_units_of_the_targets_do_not_matter(dtype, build):
    with jax.enable_x64(dtype is np.float64):
        problem, (t, y) = of_curve(), curve(dtype=dtype)
        method, start = build(problem), np.array([-1.0, 0.5], dtype)

        @jax.jit
        def steps(scale):
            data = t, scale * y
            state = method.init(start, data)
            return jax.lax.scan(lambda s, _: method.step(s, data), state, length=6)

        states, infos = zip(*[steps(dtype(s)) for s in (1, *SCALES[dtype])], strict=True)
        # A power of ten is rounded, and by the sixth step what this changes has grown.
        rtol = 1e6 * np.finfo(dtype).eps if dtype is np.float64 else 2e-2
        for state, info, scale in zip(states, infos, (1, *SCALES[dtype]), strict=True):
            np.testing.assert_array_equal(info.trials, infos[0].trials)
            np.testing.assert_allclose(state.theta, states[0].theta, rtol=rtol)
            relative = np.asarray(info.objective) / scale / scale
            np.testing.assert_allclose(relative, infos[0].objective, rtol=rtol)


def test_an_offset_of_the_targets_does_not_matter(x64):
    t, y = curve()
    ends = [
        solver(of_curve(bias=True))(np.array([-1.0, 0.5]), (t, y + offset)) for offset in (0, 1e4)
    ]
    assert ends[1].status == vp.Status.CONVERGED
    np.testing.assert_allclose(ends[1].objective, ends[0].objective, rtol=1e-6)


@pytest.mark.parametrize("penalty", [None, 1e-3])
def test_a_start_without_derivatives_is_told(penalty, x64):
    """All weights zero in a network of tanh."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2))
    theta = {"a": np.zeros((2, 5)), "b": np.zeros((5, 4))}
    net = lambda theta, x: jnp.tanh(jnp.tanh(x @ theta["a"]) @ theta["b"])  # noqa: E731
    state = vp.lbfgsvpro(of_curve(net, True, theta_penalty=penalty)).init(theta, (x, np.sin(x)))
    assert state.status == vp.Status.FLAT
    # Where the rows fit the targets, nothing is missing.
    state = vp.lbfgsvpro(of_curve(net, True)).init(theta, (x, 0 * x))
    assert state.status == vp.Status.CONVERGED


def test_the_first_step_gains_much_of_what_it_promises(x64):
    """It is no longer than where the slope has been used up, whatever the start."""
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (80, 2))
    data = x, np.sin(3 * x[:, :1] * x[:, 1:])
    net = lambda theta, x: jnp.tanh(jnp.tanh(x @ theta["a"]) @ theta["b"])  # noqa: E731
    method = vp.lbfgsvpro(of_curve(net, True))
    for scale in (0.1, 1.0, 3.0, 10.0):
        theta = {"a": scale * rng.normal(size=(2, 6)), "b": scale * rng.normal(size=(6, 4))}
        before = method.init(theta, data)
        after, _ = method.step(before, data)
        moved, gradient = (
            ravel_pytree(tree)[0]
            for tree in (jax.tree.map(jnp.subtract, after.theta, before.theta), before.gradient)
        )
        promised = -float(moved @ gradient)
        assert promised > 0
        assert float(before.objective - after.objective) >= 0.24 * promised


def convolved(theta, t):
    """Features that couple samples: decays seen through a response in time."""
    k = len(t)
    response = jnp.exp(-0.5 * ((jnp.arange(k, dtype=t.dtype) - 8) / 2) ** 2)
    through = lambda column: jnp.convolve(column, response)[:k]  # noqa: E731
    return jax.vmap(through, 1, 1)(decays(theta, t))


def normalised(theta, x):
    """Not a number on a single sample."""
    z = jnp.tanh(x[:, None] * theta[None, :2] + theta[None, 2:])
    return (z - z.mean(axis=0, keepdims=True)) / z.std(axis=0, keepdims=True)


@both
@pytest.mark.parametrize("fn, start", [(convolved, [-2.0, 0.0]), (normalised, [1.0, 2.0, 0.5, 0])])
def test_features_that_couple_samples(fn, start, build, x64):
    start, t = np.array(start), np.linspace(0, 5, 48)
    y = np.asarray(fn(start + 0.4, t)) @ [[1.0], [3.0]]
    data = t, y + 0.003 * np.random.default_rng(0).normal(size=y.shape)
    state = solver(of_curve(fn), build)(start, data)
    assert state.status == vp.Status.CONVERGED
    here, near = nearby_minimum(of_curve(fn), state.theta, data)
    assert here - near <= 1e-6 * here and here < 1e-5
    for scale, roots in state.whitening.arrays:
        assert scale > 0
        for root in roots:
            np.testing.assert_array_equal(root, np.eye(len(root)))


def test_features_with_only_a_reverse_rule(x64):
    @jax.custom_vjp
    def rates(theta):
        return jnp.exp(theta)

    rates.defvjp(lambda theta: (jnp.exp(theta),) * 2, lambda rate, g: (rate * g,))
    fn = lambda theta, t: jnp.exp(-t[:, None] * rates(theta)[None])  # noqa: E731
    start = np.array([-1.0, 0.5])
    state = solver(of_curve(fn))(start, curve())
    np.testing.assert_allclose(state.objective, solver(of_curve())(start, curve()).objective)


def test_features_without_a_reverse_rule_are_refused(x64):
    def fn(theta, t):
        return jax.lax.while_loop(
            lambda at: at[1] < 3,
            lambda at: (at[0] * decays(theta, t), at[1] + 1),
            (1.0 + 0 * t[:, None] * theta[None], 0),
        )[0]

    with pytest.raises(TypeError, match=r"^features: expected .*curvature=\"forward\".*while_loop"):
        vp.lbfgsvpro(of_curve(fn)).init(np.array([-1.0, 0.5]), curve())


def test_a_penalty_that_is_not_convex(x64):
    """θ goes to a minimum, from where the penalty bends downwards."""
    waves = lambda theta: 1e-2 * jnp.sum(jnp.cos(3 * theta))  # noqa: E731
    problem = of_curve(theta_penalty=waves)
    state = solver(problem)(np.array([0.05, 0.9]), curve())
    assert state.status == vp.Status.CONVERGED
    here, near = nearby_minimum(problem, state.theta, curve())
    assert here - near <= 1e-6 * abs(here)
    reduced = vp.reduced_objective(problem)
    gradient = jax.grad(lambda theta: reduced(theta, curve())[0])
    hessian = np.array(
        [(gradient(state.theta + d) - gradient(state.theta - d)) / 2e-4 for d in 1e-4 * np.eye(2)]
    )
    assert np.linalg.eigvalsh(hessian)[0] > 0


@both
def test_many_fits_at_once_equal_single_ones(build, x64):
    solve, t = solver(of_curve(), build), curve()[0]
    y = np.stack([curve(seed)[1] for seed in range(8)])
    start = np.array([-1.0, 0.5])
    together = jax.vmap(solve, (None, (None, 0)))(start, (t, y))
    for i in range(8):
        alone = solve(start, (t, y[i]))
        assert together.status[i] == alone.status == vp.Status.CONVERGED
        np.testing.assert_allclose(together.objective[i], alone.objective, rtol=1e-12)
        np.testing.assert_allclose(together.theta[i], alone.theta, rtol=1e-6)


@pairs
def test_all_products_ask_for_full_precision(name, loss):
    """Whatever the device's default is, the network's own products included."""
    _, data, states, *_ = run(name, loss)
    data, state = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32) if np.issubdtype(x.dtype, np.floating) else x,
        (data, states[0]),
    )
    method = METHODS[name](make_problem(loss, dtype=np.float32))
    found = products(method.init, state.theta, data) + products(method.step, state, data)
    low = [place for place, full in found if not full]
    assert len(found) > 20 and not low, low


@both
def test_a_state_can_be_kept(build, x64):
    problem, data = of_curve(), curve()
    method = build(problem)
    state, _ = method.step(method.init(np.array([-1.0, 0.5]), data), data)
    kept = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))
    one, other = (jax.tree.leaves(method.step(s, data)) for s in (state, kept))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@methods
@pytest.mark.parametrize("noise, status", [(1e-2, vp.Status.CONVERGED), (1e-4, vp.Status.STALLED)])
def test_a_run_that_rounding_ends_has_converged_if_half_of_the_digits_are_left(name, noise, status):
    """In single precision, with a residual of which rounding leaves more than half, or less."""
    times = np.linspace(0, 2, 30, dtype=np.float32)
    errors = np.random.default_rng(0).normal(size=times.shape)
    targets = np.exp(-times) + np.exp(-4 * times) + (noise * errors).astype(np.float32)
    problem = vp.Problem(vp.Separable(decays, vp.dense(bias=False)), vp.least_squares())
    method = getattr(vp, name)(problem)
    start = np.log(np.array([0.5, 6], np.float32))
    solution = vp.fit(method, start, (times, targets[:, None]), max_work=400)
    assert solution.status is status
    np.testing.assert_allclose(np.exp(solution.theta), [1, 4], rtol=20 * noise)
