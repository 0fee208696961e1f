"""The covariance of θ and W, and standard deviations of predictions."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from jax.flatten_util import ravel_pytree
from problems import LOSSES, Case, initial_theta, loss_hessian, products, relative

import varprox as vp
from varprox.problem.covariance import deviations


def decays(theta, times):
    return jnp.exp(-jnp.exp(theta[None]) * times)


def peak(theta, x):
    return jnp.exp(-(((x - theta["centre"][None]) / theta["width"][None]) ** 2))


def at(theta, w):
    """Weights that no run has found."""
    return SimpleNamespace(theta=theta, w=w)


def noisy(rows, w, seed=0, size=0.05):
    curves = np.asarray(rows) @ w
    return curves + size * np.random.default_rng(seed).normal(size=curves.shape)


def flattened(problem, theta, w, inputs):
    """All weights as one vector, and the predictions and their Jacobian as functions of it."""
    flat, unravel = ravel_pytree((theta, w))
    predictions = jax.jit(lambda flat: vp.predict(problem, *unravel(flat), inputs).reshape(-1))
    return flat, predictions, jax.jit(jax.jacrev(predictions))


def by_scipy(problem, solution, data):
    """All targets below one another, and all weights as one vector."""
    inputs, targets = data
    flat, predictions, jacobian = flattened(problem, solution.theta, solution.w, inputs)
    tight = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
    found, matrix = scipy.optimize.curve_fit(
        lambda _, *x: np.asarray(predictions(jnp.array(x))),
        np.zeros(targets.size),
        np.asarray(targets).ravel(),
        np.asarray(flat),
        jac=lambda _, *x: np.asarray(jacobian(jnp.array(x))),
        **tight,
    )
    np.testing.assert_allclose(found, flat, rtol=1e-5)
    return matrix


CURVES = {
    "decays, no bias, three outputs": (
        decays,
        np.log([0.5, 3.0]),
        np.array([[2.0, 0.5, 1.0], [1.0, 1.5, -1.0]]),
        False,
    ),
    "a peak, a bias, one output": (
        peak,
        {"centre": np.array([1.5]), "width": np.array([0.6])},
        np.array([[2.0], [0.3]]),
        True,
    ),
}


@pytest.mark.parametrize("curve", CURVES)
def test_without_penalties_it_is_that_of_curve_fit(curve, x64):
    features, theta, w, bias = CURVES[curve]
    problem = vp.Problem(vp.Separable(features, vp.dense(bias)), vp.least_squares())
    inputs = np.linspace(0, 4, 40)[:, None]
    data = inputs, noisy(problem.model.rows(theta, inputs), w)
    solution = vp.fit(problem, theta, data, epochs=100)
    found = vp.covariance(problem, solution, data)
    expected = by_scipy(problem, solution, data)
    assert np.abs(found.matrix / expected - 1).max() < 1e-6

    deviations = ravel_pytree((found.theta_std, found.w_std))[0]
    np.testing.assert_allclose(deviations, np.sqrt(np.diag(expected)), rtol=1e-6)
    assert jax.tree.structure(found.theta_std) == jax.tree.structure(theta)
    assert found.w_std.shape == w.shape
    scaled = found.axes * found.spreads[None]
    np.testing.assert_allclose(scaled @ scaled.T, found.matrix, rtol=1e-10)
    assert 0.03 < found.noise_std < 0.07

    fine = np.linspace(-1, 6, 15)[:, None]
    flat, predictions, jacobian = flattened(problem, solution.theta, solution.w, fine)
    values, std = vp.predict(problem, solution.theta, solution.w, fine, covariance=found)
    np.testing.assert_array_equal(values.ravel(), predictions(flat))
    g = np.asarray(jacobian(flat))
    expected = np.sqrt(np.einsum("ni,ij,nj->n", g, expected, g))
    np.testing.assert_allclose(std.ravel(), expected, rtol=1e-6)


def test_intervals_cover_the_truth(x64):
    """Over repeated experiments, each refitted by Gauss–Newton steps from the truth."""
    samples, repeats, noise = 30, 400, 0.1
    theta, w = np.log([0.4]), np.array([[2.0, -1.0], [0.5, 1.0]])
    problem = vp.Problem(vp.Separable(decays), vp.least_squares())
    inputs, fine = np.linspace(0, 5, samples)[:, None], np.linspace(-0.5, 8, 7)[:, None]
    truth, unravel = ravel_pytree((theta, w))
    exact = vp.predict(problem, theta, w, inputs)
    targets = np.asarray(exact) + noise * np.random.default_rng(0).normal(
        size=(repeats, *exact.shape)
    )

    @jax.jit
    @jax.vmap
    def repeat(targets):
        def residuals(x):
            return (vp.predict(problem, *unravel(x), inputs) - targets).reshape(-1)

        x = truth
        for _ in range(6):
            x = x - jnp.linalg.lstsq(jax.jacfwd(residuals)(x), residuals(x))[0]
        solution = at(*unravel(x))
        found = vp.covariance(problem, solution, (inputs, targets))
        curve, std = vp.predict(problem, *unravel(x), fine, covariance=found)
        weights = (x - truth) / ravel_pytree((found.theta_std, found.w_std))[0]
        return weights, (curve - vp.predict(problem, theta, w, fine)) / std, found.noise_std

    weights, curves, found = repeat(targets)
    limit = scipy.stats.t.ppf(0.975, 2 * samples - truth.size)
    covered = {
        "theta": np.abs(weights[:, :1]) < limit,
        "w": np.abs(weights[:, 1:]) < limit,
        "predictions": np.abs(curves) < limit,
    }
    for name, inside in covered.items():
        assert abs(np.mean(inside) - 0.95) < 0.03, (name, np.mean(inside))
    np.testing.assert_allclose(np.mean(found**2), noise**2, rtol=0.03)


def objective_of(problem, data):
    """N Φ of all weights as one vector, by the formula."""
    inputs, targets = data

    def value(flat, unravel):
        theta, w = unravel(flat)
        rows = problem.model.rows(theta, inputs)
        loss = problem.loss.value(rows @ w, targets)
        return len(targets) * (loss + problem.penalty(theta) + problem.penalty_on_w(w))

    return value


def negative_part(penalty, theta):
    """Of the second derivative of a penalty, without its sign."""
    flat, unravel = ravel_pytree(theta)
    values, vectors = np.linalg.eigh(jax.hessian(lambda flat: penalty(unravel(flat)))(flat))
    return (vectors * np.maximum(-values, 0)) @ vectors.T


CASES = [
    Case("logistic", 1),
    Case("softmax_cross_entropy", 3, penalty="smoothness"),
    Case("pseudo_huber", 2, penalty="tuple"),
    Case("least_squares", 2, bias=False, w_penalty=0.3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_inverts_the_hessian_where_targets_are_what_is_predicted(case, x64):
    """Where the loss has no slope Gauss and Newton leave nothing out."""
    problem, theta = case.problem, initial_theta()
    inputs = case.data[0]
    w = np.random.default_rng(3).normal(size=(3 + case.bias, case.outputs))
    predictions = vp.predict(problem, theta, w, inputs)
    links = {"logistic": jax.nn.sigmoid, "softmax_cross_entropy": jax.nn.softmax}
    targets = links.get(case.loss, lambda x: x)(predictions)
    noise = 1.0
    if case.loss == "least_squares":  # residuals that every derivative is orthogonal to
        _, _, jacobian = flattened(problem, theta, w, inputs)
        span = np.linalg.qr(np.asarray(jacobian(ravel_pytree((theta, w))[0])))[0]
        r = np.random.default_rng(4).normal(size=targets.size)
        r = r - span @ (span.T @ r)
        targets = targets + 1e-9 * r.reshape(targets.shape)
    found = vp.covariance(problem, at(theta, w), (inputs, targets))
    flat, unravel = ravel_pytree((theta, w))
    hessian = jax.jit(jax.hessian(objective_of(problem, (inputs, targets))), static_argnums=1)
    hessian = np.array(hessian(flat, unravel))
    of_theta = slice(0, flat.size - w.size)
    hessian[of_theta, of_theta] += len(targets) * negative_part(problem.penalty, theta)
    inverse = np.linalg.inv(hessian)
    if case.loss == "least_squares":
        j = np.asarray(jacobian(flat))
        noise = 1e-9 * np.linalg.norm(r) / np.sqrt(r.size - np.trace(j @ inverse @ j.T))
    assert abs(found.noise_std / noise - 1) < 1e-6
    assert relative(found.matrix, noise**2 * inverse) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_elsewhere_it_inverts_the_matrix_of_gauss_and_newton(loss, x64):
    case = Case(loss, 2, bias=False)
    problem, (inputs, targets), theta = case.problem, case.data, initial_theta()
    w = vp.solve_w(problem, theta, case.data)
    flat, predictions, jacobian = flattened(problem, theta, w, inputs)
    values = np.asarray(predictions(flat)).reshape(targets.shape)
    j = np.asarray(jacobian(flat)).reshape(*targets.shape, flat.size)
    blocks = loss_hessian(loss, values, targets)
    matrix = np.einsum("noi,nop,npj->ij", j, blocks, j)
    matrix += np.diag([*(1e-2,) * (flat.size - w.size), *(case.w_penalty,) * w.size])
    inverse = np.linalg.inv(len(targets) * matrix)
    if loss == "least_squares":
        counted = np.einsum("noi,ij,noj->", j, inverse, j)
        inverse *= np.sum((values - targets) ** 2) / (targets.size - counted)
    found = vp.covariance(problem, at(theta, w), case.data)
    assert relative(found.matrix, inverse) < 1e-8
    _, std = vp.predict(problem, theta, w, inputs, covariance=found)
    np.testing.assert_allclose(std**2, np.einsum("noi,ij,noj->no", j, inverse, j), rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_the_data_leave_open_is_infinite_and_nothing_else_is(dtype, x64):
    """A feature twice, in another unit, and a weight that nothing depends on: as without them."""

    def doubled(theta, x):
        z = decays(theta["rate"], x)
        return jnp.concatenate([z, 1000 * z], axis=1) + 0 * theta["idle"][None]

    inputs = np.linspace(0, 3, 25, dtype=dtype)[:, None]
    rate = np.log([0.7]).astype(dtype)
    plain = vp.Problem(vp.Separable(decays), vp.least_squares())
    once = np.array([[2.0], [0.3]], dtype)
    targets = noisy(plain.model.rows(rate, inputs), once).astype(dtype)
    expected = vp.covariance(plain, at(rate, once), (inputs, targets))
    problem = vp.Problem(vp.Separable(doubled), vp.least_squares())
    theta = {"rate": rate, "idle": np.zeros(1, dtype)}
    w = np.array([[1.0], [0.001], [0.3]], dtype)
    found = vp.covariance(problem, at(theta, w), (inputs, targets))

    close = {"rtol": 1e-10 if dtype == np.float64 else 1e-3}
    assert found.theta_std["idle"] == found.w_std[0, 0] == found.w_std[1, 0] == np.inf
    np.testing.assert_allclose(found.theta_std["rate"], expected.theta_std, **close)
    np.testing.assert_allclose(found.w_std[2], expected.w_std[1], **close)
    np.testing.assert_allclose(found.noise_std, expected.noise_std, **close)
    known = [1, 4]  # the rate and the bias
    np.testing.assert_allclose(
        found.matrix[np.ix_(known, known)], expected.matrix[::2, ::2], **close
    )
    assert np.isinf(found.matrix).sum() == 25 - 4
    at_inputs = {"theta": theta, "w": w, "inputs": inputs, "covariance": found}
    _, std = vp.predict(problem, **at_inputs)
    _, without = vp.predict(plain, rate, once, inputs, covariance=expected)
    np.testing.assert_allclose(std, without, **close)
    # Elsewhere the two features may differ.
    apart = vp.Separable(lambda theta, x: doubled(theta, x).at[:, 0].multiply(1 + x[:, 0]))
    _, std = vp.predict(problem.with_model(apart), **at_inputs)
    assert np.isinf(std[1:]).all()


@pytest.mark.parametrize("spread", [0.3, np.inf])
def test_what_does_not_depend_on_the_weights_is_certain(spread, x64):
    """Such as a prediction from features of zero without a bias, whatever the data leave open."""
    along = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    found = deviations(np.array([0.5, spread]), along)
    np.testing.assert_allclose(found, [0, 1, spread])


def test_weights_may_have_any_units(x64):
    """Rates and amplitudes in units 1e8 and 1e-9 times as large."""
    inputs = np.linspace(0, 3, 25)[:, None]
    theta, w = np.log([0.7, 2.0]), np.array([[2.0], [-1.0], [0.3]])
    plain = vp.Problem(vp.Separable(decays), vp.least_squares())
    scaled = vp.Problem(
        vp.Separable(lambda theta, x: 1e9 * decays(theta * 1e-8, x)), vp.least_squares()
    )
    data = inputs, noisy(plain.model.rows(theta, inputs), w)
    expected = vp.covariance(plain, at(theta, w), data)
    units = np.array([[1e9], [1e9], [1.0]])
    found = vp.covariance(scaled, at(1e8 * theta, w / units), data)
    np.testing.assert_allclose(found.theta_std, 1e8 * expected.theta_std, rtol=1e-8)
    np.testing.assert_allclose(found.w_std, expected.w_std / units, rtol=1e-8)


def test_as_many_weights_as_residuals_tell_no_noise_from_the_curve(x64):
    inputs = np.linspace(0, 1, 3)[:, None]
    problem = vp.Problem(vp.Separable(decays), vp.least_squares())
    theta, w = np.zeros(1), np.ones((2, 1))
    found = vp.covariance(problem, at(theta, w), (inputs, np.cos(inputs)))
    assert np.isinf(found.matrix).all() and np.isinf(found.noise_std)
    # A penalty holds them: fewer are counted.
    held = vp.Problem(vp.Separable(decays), vp.least_squares(), theta_penalty=1.0, w_penalty=1.0)
    assert np.isfinite(vp.covariance(held, at(theta, w), (inputs, np.cos(inputs))).matrix).all()


def test_single_precision(x64):
    case = Case("logistic", 2)
    problem, (inputs, targets), theta = case.problem, case.data, initial_theta()
    w = vp.solve_w(problem, theta, case.data)
    found = vp.covariance(problem, at(theta, w), case.data)
    single = jax.tree.map(lambda x: np.asarray(x, np.float32), (theta, w, inputs, targets))
    low = vp.covariance(problem, at(*single[:2]), single[2:])
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {np.dtype(np.float32)}
    assert relative(low.matrix, np.asarray(found.matrix)) < 1e-4
    _, std = vp.predict(problem, *single[:3], covariance=low)
    assert std.dtype == np.float32
    _, expected = vp.predict(problem, theta, w, inputs, covariance=found)
    np.testing.assert_allclose(std, expected, rtol=1e-4)


@jax.custom_vjp
def backwards(theta, x):
    return decays(theta, x)


backwards.defvjp(
    lambda theta, x: (decays(theta, x), (theta, x)),
    lambda kept, slope: (jax.vjp(decays, *kept)[1](slope)[0], jnp.zeros_like(kept[1])),
)


def forwards(theta, x):
    """A loop whose length depends on the inputs."""
    rounds = jnp.where(jnp.max(x) > 1e9, 1, 2)
    once = lambda state: (state[0] + 1, state[1] * jnp.exp(-jnp.exp(theta[None]) * x / 2))  # noqa: E731
    state = jnp.zeros((), rounds.dtype), jnp.ones((len(x), len(theta)), x.dtype)
    return jax.lax.while_loop(lambda state: state[0] < rounds, once, state)[1]


@pytest.mark.parametrize("features", [backwards, forwards])
def test_one_mode_of_differentiation_suffices(features, x64):
    inputs = np.linspace(0, 3, 25)[:, None]
    theta, w = np.log([0.7, 2.0]), np.array([[2.0, 1.0], [-1.0, 1.0], [0.3, 0.0]])
    both, one = (
        vp.Problem(vp.Separable(fn), vp.least_squares(), w_penalty=1e-3)
        for fn in (decays, features)
    )
    data = inputs, noisy(both.model.rows(theta, inputs), w)
    expected = vp.covariance(both, at(theta, w), data)
    found = vp.covariance(one, at(theta, w), data)
    np.testing.assert_allclose(found.matrix, expected.matrix, rtol=1e-8)
    _, std = vp.predict(one, theta, w, inputs, covariance=found)
    _, expected = vp.predict(both, theta, w, inputs, covariance=expected)
    np.testing.assert_allclose(std, expected, rtol=1e-8)


def test_every_product_is_in_full_precision():
    problem = vp.Problem(vp.Separable(lambda theta, x: jnp.tanh(x @ theta)), vp.logistic(), 0.1, 1)
    theta, w = np.ones((2, 3), np.float32), np.ones((4, 2), np.float32)
    data = np.ones((5, 2), np.float32), np.ones((5, 2), np.float32)

    def both(theta, w):
        found = vp.covariance(problem, at(theta, w), data)
        return vp.predict(problem, theta, w, data[0], covariance=found)

    found = products(both, theta, w)
    assert len(found) > 5 and all(full for _, full in found)


def test_states_and_the_best_weights_have_covariances(x64):
    inputs = np.linspace(0, 3, 25)[:, None]
    problem = vp.Problem(vp.Separable(decays), vp.least_squares(), 0.1, 0.1)
    data = inputs, np.cos(inputs)
    solution = vp.fit(vp.lbfgsvpro(problem), np.zeros(1), data, epochs=2, validation=data)
    for found in (solution, solution.state, solution.best):
        assert vp.covariance(problem, found, data).matrix.shape == (3, 3)


INPUTS, THETA, W = np.linspace(0, 3, 9)[:, None], np.zeros(1), np.ones((2, 1))
DATA = INPUTS, np.cos(INPUTS)
PROBLEM = vp.Problem(vp.Separable(decays), vp.least_squares())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((None, at(THETA, W), DATA), TypeError, "problem: expected a varprox.Problem"),
        ((PROBLEM, (THETA, W), DATA), TypeError, "solution: expected .* got tuple"),
        ((PROBLEM, at(THETA, W), INPUTS), TypeError, "data: expected a pair"),
        ((PROBLEM, at(THETA, W[:1]), DATA), ValueError, r"w: expected shape \(2, 1\).*\(1, 1\)"),
        ((PROBLEM, at(THETA, W * np.nan), DATA), ValueError, "w: expected finite numbers"),
        ((PROBLEM, at(THETA, W.astype(np.float32)), DATA), TypeError, "w: expected dtype float64"),
        ((PROBLEM, at(THETA, W.tolist()), DATA), TypeError, "w: expected arrays of NumPy or JAX"),
    ],
)
def test_covariance_refuses(arguments, error, message, x64):
    with pytest.raises(error, match=message):
        vp.covariance(*arguments)


def test_predict_refuses_other_covariances(x64):
    found = vp.covariance(PROBLEM, at(THETA, W), DATA)
    with pytest.raises(TypeError, match=r"covariance: expected what varprox.covariance returns"):
        vp.predict(PROBLEM, THETA, W, INPUTS, covariance=found.matrix)
    with pytest.raises(ValueError, match=r"covariance: expected that of 5 weights.*got that of 3"):
        vp.predict(PROBLEM, THETA, np.ones((2, 2)), INPUTS, covariance=found)


def test_features_without_a_derivative_are_refused(x64):
    @jax.custom_vjp
    def closed(theta, x):
        return decays(theta, x)

    def refuse(*_):
        raise ValueError

    closed.defvjp(lambda theta, x: (decays(theta, x), None), refuse)
    problem = vp.Problem(vp.Separable(closed), vp.least_squares())
    with pytest.raises(TypeError, match="problem: expected features with a derivative"):
        vp.covariance(problem, at(THETA, W), DATA)
