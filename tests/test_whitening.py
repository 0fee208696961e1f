"""The whitening of θ, against its formula in NumPy and by what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varprox as vp
from varprox.reduced import whitening as module
from varprox.reduced.whitening import DAMPING, LEAST, LONGEST, whitening


def linear(theta, inputs):
    """Features whose derivative is the same everywhere; nothing depends on `idle`."""
    return inputs @ theta["kernel"] + theta["shift"]


def make(samples=40, inputs=5, width=3, outputs=1, seed=0, dtype=np.float64):
    """A problem with correlated inputs, θ, rows, W and data."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, inputs)) @ rng.normal(size=(inputs, inputs)) ** 3
    theta = {
        "idle": np.zeros((2, 2)),
        "kernel": rng.normal(size=(inputs, width)),
        "shift": np.array(0.5),
    }
    w, targets = rng.normal(size=(width, outputs)), rng.normal(size=(samples, outputs))
    problem = vp.Problem(vp.Separable(linear, vp.dense(bias=False)), vp.least_squares())
    x, theta, w, targets = jax.tree.map(lambda a: jnp.asarray(a, dtype), (x, theta, w, targets))
    return problem, theta, linear(theta, x), w, (x, targets)


def matrix_of(whiten, theta):
    """M as a matrix on θ, flattened."""
    flat, unravel = jax.flatten_util.ravel_pytree(theta)
    columns = [
        jax.flatten_util.ravel_pytree(whiten(unravel(unit)))[0] for unit in np.eye(flat.size)
    ]
    return np.stack(columns, axis=1)


def power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


def test_it_equals_the_formula(x64):
    """One output and no more samples than buckets: then each row of the sketch is ± x wᵀ."""
    problem, theta, rows, w, data = make()
    found = matrix_of(whitening(problem, theta, rows, w, data), theta)

    x, v = np.asarray(data[0]), np.asarray(w)[:, 0]
    gradients = np.einsum("ni,j->nij", x, v) / len(x) ** 0.5
    curvature = np.sum(gradients**2) / 15, v.sum() ** 2
    mean = (15 * curvature[0] + curvature[1]) / 20  # of all of θ, of 20 entries
    roots = [
        np.einsum("nij,nkj->ik", gradients, gradients),
        np.einsum("nij,nik->jk", *[gradients] * 2),
    ]
    roots = [
        power(square / (np.trace(square) / len(square)) + DAMPING * np.eye(len(square)), -0.25)
        for square in roots
    ]
    expected = np.zeros((20, 20))
    expected[:4, :4] = np.eye(4) * DAMPING**-0.5 / np.sqrt(LEAST * mean)
    expected[4:19, 4:19] = np.kron(*roots) / np.sqrt(curvature[0] + LEAST * mean)
    expected[19, 19] = 1 / np.sqrt(curvature[1] + LEAST * mean)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_order_of_the_samples_does_not_matter(outputs, x64):
    problem, theta, rows, w, (x, targets) = make(samples=300, outputs=outputs)
    order = np.random.default_rng(1).permutation(300)
    one = matrix_of(whitening(problem, theta, rows, w, (x, targets)), theta)
    other = matrix_of(whitening(problem, theta, rows[order], w, (x[order], targets[order])), theta)
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_it_conditions_the_gauss_newton_matrix(x64):
    """For correlated inputs, and from a sketch of many samples.

    Where the matrix is one Kronecker product, the exponents leave the root of its spread.
    """
    problem, theta, rows, w, data = make(samples=1000, inputs=8, outputs=2)
    whiten = whitening(problem, {"kernel": theta["kernel"], "shift": theta["shift"]}, rows, w, data)
    m = matrix_of(whiten, {"kernel": theta["kernel"], "shift": theta["shift"]})
    x = np.asarray(data[0])
    jacobian = np.concatenate(
        [
            np.einsum("ni,jo->noij", x, w).reshape(2000, 24),
            np.broadcast_to(np.sum(w, axis=0), (1000, 2)).reshape(2000, 1),
        ],
        axis=1,
    )
    hessian = jacobian.T @ jacobian / 1000

    def spread(matrix):
        """Largest over median eigenvalue, of those that are not zero: W has two columns."""
        values = np.linalg.eigvalsh(matrix)[-16:]
        return values[-1] / np.median(values)

    assert spread(m @ hessian @ m) < 2 * spread(hessian) ** 0.5 < 0.2 * spread(hessian)


def test_long_axes_are_left_alone(x64):
    problem, theta, rows, w, data = make(inputs=LONGEST + 1)
    whiten = whitening(problem, theta, rows, w, data)
    _, (along_inputs, along_width) = whiten.arrays[1]
    assert along_inputs is None and along_width.shape == (3, 3)
    assert np.isfinite(whiten(theta)["kernel"]).all()


@pytest.mark.parametrize(
    "samples", [1, 2, 40, 127, module.BUCKETS + 1, 2 * module.BUCKETS, module.SAMPLES + 5]
)
def test_any_number_of_samples(samples, x64):
    """Some may be left over."""
    problem, theta, rows, w, data = make(samples=samples)
    m = matrix_of(whitening(problem, theta, rows, w, data), theta)
    np.testing.assert_allclose(m, m.T, atol=1e-12 * np.abs(m).max())
    assert np.linalg.eigvalsh(m)[0] > 0


def test_where_nothing_depends_on_theta_it_is_diagonal(x64):
    problem, theta, rows, w, data = make()
    m = matrix_of(whitening(problem, theta, rows, 0 * w, data), theta)
    assert np.isfinite(m).all() and np.linalg.eigvalsh(m)[0] > 0
    np.testing.assert_allclose(m, np.diag(np.diag(m)), atol=1e-12)


def test_single_precision_is_kept():
    problem, theta, rows, w, data = make(dtype=np.float32)
    whitened = whitening(problem, theta, rows, w, data)(theta)
    assert {leaf.dtype for leaf in jax.tree.leaves(whitened)} == {jnp.dtype(jnp.float32)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whitened))


def coupled(theta, inputs):
    """Not a number for a single sample."""
    z = linear(theta, inputs)
    return (z - z.mean(axis=0, keepdims=True)) / z.std(axis=0, keepdims=True)


def only_whole(theta, inputs):
    """Cannot be evaluated on a part of the data."""
    return linear(theta, inputs) + jnp.zeros((40, 1), inputs.dtype)


def raises(theta, inputs):
    """As above, with an error."""
    return linear(theta, inputs.reshape(40, 5))


@pytest.mark.parametrize(
    "samples, fn", [(40, coupled), (127, coupled), (130, coupled), (40, only_whole), (40, raises)]
)
def test_features_that_need_all_samples_are_left_as_they_are(samples, fn, x64):
    _, theta, _, w, data = make(samples=samples)
    problem = vp.Problem(vp.Separable(fn, vp.dense(bias=False)), vp.least_squares())
    found = jax.jit(lambda data: whitening(problem, theta, fn(theta, data[0]), w, data))(data)
    np.testing.assert_array_equal(matrix_of(found, theta), np.eye(20))


def test_arrays_without_entries(x64):
    problem, theta, rows, w, data = make()
    more = theta | {"none": np.zeros((0, 3)), "nothing": np.zeros((0,))}
    found = whitening(problem, more, rows, w, data)
    np.testing.assert_allclose(
        matrix_of(found, more), matrix_of(whitening(problem, theta, rows, w, data), theta)
    )
