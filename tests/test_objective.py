"""W(θ), the reduced objective and their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import (
    LOSSES,
    Case,
    assert_taylor,
    direction,
    features,
    initial_theta,
    loss_value,
    make_data,
    move,
    plain_rows,
    plain_w,
    products,
    relative,
    w_gradient,
)

import varprox as vp


def flat(tree):
    return ravel_pytree(tree)[0]


def scaled_inputs(theta, inputs):
    return theta * inputs


def identity_problem(loss, w_penalty, bias=False):
    """θ multiplies the inputs, so that at θ = 1 the rows are the inputs themselves."""
    model = vp.Separable(scaled_inputs, vp.dense(bias))
    return vp.Problem(model, loss, w_penalty=w_penalty)


def one(dtype=np.float64):
    return np.ones((), dtype)


GENERAL = [name for name in LOSSES if name != "least_squares"]


# Derivatives


FUNCTIONS = ["w", "reduced"]


@pytest.fixture(scope="module", params=LOSSES)
def derivatives(request):
    """Derivatives of c · W(θ), c fixed, and of Φ_red(θ), by every nesting of both modes."""
    with jax.enable_x64(True):
        case = Case(request.param, outputs=2)
        start, unravel = ravel_pytree(initial_theta())
        along = flat(direction())
        weights = np.random.default_rng(6).normal(size=(4, 2))

        def both(v):
            value, w = vp.reduced_objective(case.problem)(unravel(v), case.data)
            return jnp.stack([jnp.vdot(w, weights), value])

        @jax.jit
        def every(v):
            reverse = jax.jacrev(both)
            return {
                "forward": jax.jacfwd(both)(v),
                "reverse": reverse(v),
                "forward over reverse": jax.jvp(reverse, (v,), (along,))[1],
                "reverse over reverse": jax.jacrev(lambda v: reverse(v) @ along)(v),
            }

        @functools.cache
        def at(h):
            with jax.enable_x64(True):
                return jax.tree.map(np.asarray, every(start + h * along))

        return at


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_and_reverse_mode_agree(derivatives, function):
    row = FUNCTIONS.index(function)
    results = derivatives(0.0)
    assert relative(results["forward"][row], results["reverse"][row]) < 1e-9


@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_agree_and_are_those_of_the_gradient(derivatives, function):
    row = FUNCTIONS.index(function)
    second = derivatives(0.0)["forward over reverse"][row]
    assert relative(second, derivatives(0.0)["reverse over reverse"][row]) < 1e-9
    assert_taylor(lambda h: derivatives(h)["reverse"][row], second)


@pytest.mark.parametrize("loss", LOSSES)
def test_derivatives_in_targets_and_penalties(loss, x64):
    case = Case(loss, outputs=2)
    theta, (inputs, targets) = initial_theta(), case.data
    change = np.random.default_rng(7).normal(size=targets.shape)
    change -= change.mean(axis=1, keepdims=True)  # rows of probabilities still sum to 1

    @jax.jit
    def at(h):
        problem = vp.Problem(
            case.problem.model,
            case.problem.loss,
            vp.tikhonov(0.1 + h),
            case.w_penalty * (1 + 2 * h),
        )
        value, w = vp.reduced_objective(problem)(theta, (inputs, targets + 0.1 * h * change))
        return jnp.append(w.ravel(), value)

    both = jax.jit(lambda h: jax.jvp(at, (h,), (1.0,)))
    _, derivative = both(0.0)
    assert_taylor(lambda h: both(h)[0], np.asarray(derivative))


# Least squares


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("alpha", [0.0, 1e-10, 0.3])
def test_least_squares_equals_the_stacked_dense_problem(alpha, bias, x64):
    inputs, targets = make_data("least_squares", 2)
    problem = vp.Problem(vp.Separable(features, vp.dense(bias)), vp.least_squares(), None, alpha)
    theta = initial_theta()
    expected = plain_w("least_squares", plain_rows(theta, inputs, bias), targets, alpha)
    assert relative(vp.solve_w(problem, theta, (inputs, targets)), expected) < 1e-9


@pytest.mark.parametrize("shape, rank", [((20, 6), 4), ((4, 6), 4), ((1, 3), 1), ((20, 6), 0)])
def test_least_squares_without_penalty_gives_the_minimum_norm(shape, rank, x64):
    """Rank-deficient rows and fewer samples than columns: NumPy's lstsq is the reference."""
    rng = np.random.default_rng(8)
    rows = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    targets = rng.normal(size=(shape[0], 2))
    w = vp.solve_w(identity_problem(vp.least_squares(), 0.0), one(), (rows, targets))
    expected = np.linalg.lstsq(rows, targets, rcond=1e-10)[0]
    np.testing.assert_allclose(w, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("samples", [3, 16])
def test_derivative_of_the_minimum_norm_weights(samples, x64):
    """The null space of the rows turns with θ, and the minimum-norm W must turn with it."""

    def dependent(theta, inputs):
        z = features(theta, inputs)
        return jnp.concatenate([z, z[:, :1] * theta["opening"][0, 0]], axis=1)

    problem = vp.Problem(vp.Separable(dependent), vp.least_squares())
    inputs, targets = make_data("least_squares", 2)
    data, theta, along = (inputs[:samples], targets[:samples]), initial_theta(), direction()
    at = jax.jit(lambda theta: vp.solve_w(problem, theta, data))
    _, change = jax.jvp(at, (theta,), (along,))
    assert_taylor(lambda h: at(move(theta, h, along)), np.asarray(change))


def test_scaling_the_targets_scales_least_squares_weights(x64):
    case, theta = Case("least_squares"), initial_theta()
    inputs, targets = case.data
    w = vp.solve_w(case.problem, theta, (inputs, targets))
    scaled = vp.solve_w(case.problem, theta, (inputs, -1e3 * targets))
    assert relative(scaled, -1e3 * np.asarray(w)) < 1e-12


# Other losses


def stationarity(loss, rows, w, targets, alpha):
    """‖∇_W Φ‖ at W over max(1, ‖∇_W Φ(0)‖)."""
    w = np.asarray(w)
    start = np.linalg.norm(w_gradient(loss, rows, np.zeros_like(w), targets, alpha))
    return np.linalg.norm(w_gradient(loss, rows, w, targets, alpha)) / max(1, start)


@pytest.fixture(scope="module")
def solve_in_jit():
    """W for given rows, compiled once a loss and shape whatever the penalty."""
    return jax.jit(lambda problem, rows, targets: vp.solve_w(problem, one(), (rows, targets)))


def separable_classes(outputs, gap, samples=40):
    """Classes around the corners of a simplex, apart by `gap` in units of their spread."""
    rng = np.random.default_rng(9)
    labels = np.arange(samples) % outputs
    corners = np.eye(outputs) * gap
    inputs = corners[labels] + rng.normal(size=(samples, outputs))
    return np.hstack([inputs, np.ones((samples, 1))]), np.eye(outputs)[labels]


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "logistic"])
@pytest.mark.parametrize("gap", [1.0, 4.0, 20.0], ids=["overlapping", "nearly", "separable"])
@pytest.mark.parametrize("alpha", [1e-2, 1e-8])
def test_entropy_losses_are_solved_to_their_stated_accuracy(loss, gap, alpha, solve_in_jit, x64):
    rows, targets = separable_classes(3, gap)
    w = solve_in_jit(identity_problem(LOSSES[loss], alpha), rows, targets)
    assert stationarity(loss, rows, w, targets, alpha) <= 1e-10


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_badly_scaled_rows_are_solved_to_the_stated_accuracy(scale, solve_in_jit, x64):
    rows, targets = separable_classes(3, 2.0)
    rows = rows * np.array([scale, 1, 1, 1])
    for loss in ("softmax_cross_entropy", "logistic"):
        w = solve_in_jit(identity_problem(LOSSES[loss], 1e-6), rows, targets)
        assert stationarity(loss, rows, w, targets, 1e-6) <= 1e-10


@pytest.mark.parametrize("outlier", [10.0, 1e4])
def test_a_robust_loss_is_solved_where_its_curvature_vanishes(outlier, solve_in_jit, x64):
    rng = np.random.default_rng(10)
    rows, targets = rng.normal(size=(40, 4)), rng.normal(size=(40, 3))
    targets[::2] += outlier
    w = solve_in_jit(identity_problem(LOSSES["pseudo_huber"], 1e-6), rows, targets)
    assert stationarity("pseudo_huber", rows, w, targets, 1e-6) <= 1e-10


@pytest.mark.parametrize("seed", range(4))
def test_the_ellipse_problem_is_solved_to_the_stated_accuracy(seed, solve_in_jit, x64):
    """Near this optimum the predicted decrease falls below rounding of the objective."""
    rng = np.random.default_rng(seed)
    angle, radius = rng.uniform(0, 2 * np.pi, 200), rng.uniform(0, 2, 200)
    inputs = np.stack([radius * np.cos(angle), 0.4 * radius * np.sin(angle)], axis=1)
    targets = np.eye(2)[(radius > 1).astype(int)]
    theta = [rng.normal(size=s) for s in ((3, 4), (5, 4))]

    def network(theta, inputs):
        for kernel in theta:
            inputs = jnp.tanh(inputs @ kernel[:-1] + kernel[-1:])
        return inputs

    z = np.asarray(network(theta, inputs))
    rows = np.hstack([z, np.ones((200, 1))])
    w = solve_in_jit(identity_problem(vp.softmax_cross_entropy(), 1e-8), rows, targets)
    assert stationarity("softmax_cross_entropy", rows, w, targets, 1e-8) <= 1e-10


@pytest.mark.parametrize("loss", GENERAL)
def test_one_sample_fewer_than_columns(loss, x64):
    inputs, targets = make_data(loss, 2)
    data = (inputs[1:2], targets[1:2])
    theta, problem = initial_theta(), Case(loss, 2).problem
    w = jax.jit(vp.solve_w)(problem, theta, data)
    rows = plain_rows(theta, data[0], bias=True)
    assert stationarity(loss, rows, w, data[1], 3e-2) <= 1e-10


def test_a_convex_loss_that_is_a_square_gives_least_squares(x64):
    case, theta = Case("least_squares"), initial_theta()
    square = vp.convex_loss(lambda p, t: 0.5 * jnp.sum((p - t) ** 2))
    problem = vp.Problem(case.problem.model, square, vp.tikhonov(1e-2), case.w_penalty)
    value, w = vp.reduced_objective(problem)(theta, case.data)
    expected_value, expected_w = vp.reduced_objective(case.problem)(theta, case.data)
    assert relative(w, np.asarray(expected_w)) < 1e-9
    assert abs(value - expected_value) < 1e-12


# Invariances and transformations


@pytest.mark.parametrize("loss", LOSSES)
def test_permuting_the_batch_changes_nothing(loss, x64):
    case, theta = Case(loss, 2), initial_theta()
    order = np.random.default_rng(11).permutation(len(case.data[0]))
    value, w = vp.reduced_objective(case.problem)(theta, case.data)
    shuffled = vp.reduced_objective(case.problem)(theta, tuple(part[order] for part in case.data))
    assert abs(shuffled[0] - value) < 1e-13
    assert relative(shuffled[1], np.asarray(w)) < 1e-8


@pytest.mark.parametrize("loss", LOSSES)
def test_vmap_over_starts_equals_a_loop(loss, x64):
    case = Case(loss, 2)
    starts = [initial_theta(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *starts)
    reduced = vp.reduced_objective(case.problem)
    values, w = jax.jit(jax.vmap(lambda theta: reduced(theta, case.data)))(stacked)
    for i, theta in enumerate(starts):
        rows = plain_rows(theta, case.data[0], bias=True)
        expected = plain_w(loss, rows, case.data[1], case.w_penalty)
        assert relative(w[i], expected) < 1e-8
        value = loss_value(loss, rows @ expected, case.data[1])
        value += 0.5 * case.w_penalty * np.sum(expected**2)
        value += 0.5 * 1e-2 * sum(np.sum(leaf**2) for leaf in jax.tree.leaves(theta))
        assert abs(values[i] - value) < 1e-12


# Single precision


@pytest.mark.parametrize("loss", LOSSES)
def test_all_products_ask_for_full_precision(loss):
    """Whatever the device's default is; also those of derivatives, which are traced outside."""
    case, theta = Case(loss, 2), initial_theta(dtype=np.float32)
    data = make_data(loss, 2, dtype=np.float32)
    reduced = lambda theta: vp.reduced_objective(case.problem)(theta, data)[0]  # noqa: E731
    solved = lambda theta: jnp.sum(vp.solve_w(case.problem, theta, data) ** 2)  # noqa: E731
    for fn in (reduced, solved):
        hessians = jax.hessian(fn), jax.jacfwd(jax.jacfwd(fn)), jax.jacrev(jax.grad(fn))
        for derivative in (fn, jax.grad(fn), *hessians):
            found = products(derivative, theta)
            low = [place for place, full in found if not full]
            assert len(found) > 5 and not low, low


@pytest.mark.parametrize("loss", LOSSES)
def test_single_precision_follows_the_inputs(loss):
    case, dtype = Case(loss, 2), np.float32
    data = make_data(loss, 2, dtype=dtype)
    value, w = vp.reduced_objective(case.problem)(initial_theta(dtype=dtype), data)
    assert value.dtype == w.dtype == jnp.float32
    rows = plain_rows(initial_theta(dtype=dtype), data[0], bias=True).astype(np.float64)
    assert relative(w, plain_w(loss, rows, data[1].astype(np.float64), case.w_penalty)) < 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_single_precision_is_kept_where_double_is_enabled(loss, x64):
    case = Case(loss, 2)
    data, theta = make_data(loss, 2, dtype=np.float32), initial_theta(dtype=np.float32)
    value, w = vp.reduced_objective(case.problem)(theta, data)
    assert value.dtype == w.dtype == jnp.float32


def test_single_precision_does_not_square_the_condition_number():
    """Singular values down to 1e-5: normal equations lose them in float32, a factor does not."""
    rng = np.random.default_rng(12)
    q, _ = np.linalg.qr(rng.normal(size=(60, 6)))
    p, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    rows = q * np.logspace(0, -5, 6) @ p
    targets = rows @ np.ones((6, 1))
    single = rows.astype(np.float32), targets.astype(np.float32)
    w = vp.solve_w(identity_problem(vp.least_squares(), 0.0), one(np.float32), single)
    exact = np.linalg.lstsq(single[0].astype(np.float64), single[1].astype(np.float64))[0]
    gram = single[0].T @ single[0]
    normal = np.linalg.solve(gram, single[0].T @ single[1])
    assert relative(w, exact) < 0.05
    assert relative(normal, exact) > 10 * relative(w, exact)


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "logistic"])
@pytest.mark.parametrize("alpha", [1e-3, 1e-8])
def test_single_precision_on_nearly_separable_data(loss, alpha, solve_in_jit):
    rows, targets = separable_classes(3, 4.0)
    w = solve_in_jit(
        identity_problem(LOSSES[loss], alpha), rows.astype(np.float32), targets.astype(np.float32)
    )
    assert w.dtype == jnp.float32
    assert stationarity(loss, rows, np.asarray(w, np.float64), targets, alpha) < 1e-4
