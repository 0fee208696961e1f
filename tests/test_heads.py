"""Design rows of convolutional heads against lax's convolutions and the authors' rows."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import varprox as vp

TRACE = dict(np.load(Path(__file__).parent / "reference" / "convt_trace.npz"))
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
KERNELS, STRIDES, PADDINGS = [(3, 2), (4, 4), (1, 2)], [(1, 1), (2, 3)], [(0, 0), (2, 1)]


def reference(transposed, z, kernel, stride, padding):
    """lax's convolution of z with kernel (height, width, channels, outputs), or its transpose."""
    if not transposed:
        pads = [(p, p) for p in padding]
        return jax.lax.conv_general_dilated(z, kernel, stride, pads, dimension_numbers=DIMENSIONS)
    pads = [(k - 1 - p,) * 2 for k, p in zip(kernel.shape[:2], padding, strict=True)]
    return jax.lax.conv_general_dilated(
        z, kernel[::-1, ::-1], (1, 1), pads, lhs_dilation=stride, dimension_numbers=DIMENSIONS
    )


@pytest.mark.parametrize("make", [vp.conv, vp.conv_transpose])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "size, stride, padding", list(itertools.product(KERNELS, STRIDES, PADDINGS))
)
def test_rows_times_weights_are_the_convolution(make, bias, size, stride, padding, x64):
    """And `gram` is the product of the rows, also where some pixels see no tap at all."""
    rng = np.random.default_rng(0)
    z, kernel = rng.normal(size=(2, 5, 6, 3)), rng.normal(size=(*size, 3, 2))
    head = make(size, stride=stride, padding=padding, bias=bias)
    expected = np.asarray(reference(make is vp.conv_transpose, z, kernel, stride, padding))
    w, shift = kernel.transpose(2, 0, 1, 3).reshape(-1, 2), rng.normal(size=2)
    if bias:
        w, expected = np.vstack([w, shift]), expected + shift
    rows = head.rows(z)
    np.testing.assert_allclose(rows @ w, expected.reshape(-1, 2), atol=1e-12)
    np.testing.assert_allclose(head.apply(z, w), expected, atol=1e-12)
    np.testing.assert_allclose(head.gram(z), rows.T @ rows, atol=1e-10)
    targets = rng.normal(size=expected.shape)
    residual = rows @ w - targets.reshape(-1, 2)
    moments = head.moments(z, w, targets)
    np.testing.assert_allclose(moments.gram, rows.T @ rows, atol=1e-10)
    np.testing.assert_allclose(moments.gradient, rows.T @ residual, atol=1e-10)
    np.testing.assert_allclose(moments.square, np.sum(residual**2), rtol=1e-12)
    np.testing.assert_array_equal(head.pack(*head.unpack(w)), w)


def test_transposed_rows_are_those_of_the_authors(x64):
    z = TRACE["x"].transpose(0, 2, 3, 1)
    head = vp.conv_transpose((4, 4), stride=(2, 2), padding=(1, 1))
    np.testing.assert_allclose(head.rows(z), TRACE["Z"], atol=1e-12)
    np.testing.assert_allclose(head.gram(z), TRACE["Z"].T @ TRACE["Z"], atol=1e-10)
    w = np.vstack([TRACE["W"].transpose(0, 2, 3, 1).reshape(-1, 1), TRACE["b"][:, None]])
    expected = TRACE["y"].transpose(0, 2, 3, 1).reshape(-1, 1)
    np.testing.assert_allclose(head.rows(z) @ w, expected, atol=1e-12)


def test_dense_gram_is_the_product_of_the_rows(x64):
    z = np.random.default_rng(0).normal(size=(7, 3))
    for head in (vp.dense(), vp.dense(bias=False)):
        rows = head.rows(z)
        np.testing.assert_allclose(head.gram(z), rows.T @ rows, atol=1e-14)
        w = np.arange(2.0 * rows.shape[1]).reshape(-1, 2)
        np.testing.assert_array_equal(head.apply(z, w), rows @ w)
        np.testing.assert_array_equal(head.pack(*head.unpack(w)), w)


def test_a_gram_matrix_takes_a_fraction_of_the_product_of_rows():
    """The decoder of the MNIST autoencoder: 25,088 rows of 257 columns a batch of 32."""
    z = jax.ShapeDtypeStruct((32, 14, 14, 16), jnp.float32)
    head = vp.conv_transpose((4, 4), stride=(2, 2), padding=(1, 1))
    operations = jax.jit(head.gram).lower(z).compile().cost_analysis()["flops"]
    assert operations < 2 * 25_088 * 257**2 / 100


def test_a_gram_matrix_from_differences_keeps_single_precision():
    """Features at the edges are a hundred times those inside, and their pixels mostly cut off."""
    z = np.random.default_rng(0).normal(size=(8, 6, 7, 4)).astype(np.float32)
    z[:, [0, -1]] *= 100
    z[:, :, [0, -1]] *= 100
    head = vp.conv_transpose((4, 4), stride=(2, 2), padding=(2, 3))
    rows = np.asarray(head.rows(z), np.float64)
    expected, eps = rows.T @ rows, np.finfo(np.float32).eps
    np.testing.assert_allclose(head.gram(z), expected, atol=4 * eps * np.trace(expected), rtol=0)


def test_slimtik_takes_the_rows_of_a_convolution(x64):
    """With memory for both batches it solves for the kernel of the authors' transposed
    convolution."""
    head = vp.conv_transpose((4, 4), stride=(2, 2), padding=(1, 1))
    method = vp.slimtik(1, vp.constant(1e-12), initial=0.0, lower_bound=0.0)
    state = method.init(np.zeros((49, 1)))
    for x, y in zip(TRACE["x"], TRACE["y"], strict=True):
        state, _ = method.update(state, head.rows(x.transpose(1, 2, 0)[None]), y.reshape(-1, 1))
    w = np.vstack([TRACE["W"].transpose(0, 2, 3, 1).reshape(-1, 1), TRACE["b"][:, None]])
    np.testing.assert_allclose(state.w, w, atol=1e-8)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"kernel_size": 4}, TypeError, "kernel_size: expected a pair of integers, got 4"),
        ({"kernel_size": (4, 0)}, ValueError, "kernel_size: expected an integer ≥ 1, got 0"),
        ({"stride": (1,)}, TypeError, "stride: expected a pair of integers, got (1,)"),
        ({"stride": (0, 1)}, ValueError, "stride: expected an integer ≥ 1, got 0"),
        ({"padding": (-1, 0)}, ValueError, "padding: expected an integer ≥ 0, got -1"),
        ({"padding": "same"}, TypeError, "padding: expected a pair of integers, got 'same'"),
        ({"bias": 1}, TypeError, "bias: expected True or False, got 1"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error) as caught:
        vp.conv(**({"kernel_size": (2, 2)} | options))
    assert str(caught.value) == message


def test_features_that_are_no_images_are_refused():
    for call in (vp.conv((2, 2)).rows, vp.conv_transpose((2, 2)).gram):
        with pytest.raises(ValueError) as caught:
            call(jnp.ones((4, 3)))
        assert str(caught.value) == (
            "features: expected shape (batch, height, width, channels), got (4, 3)"
        )


@dataclass(frozen=True)
class Doubled(vp.Head):
    """Every feature, and its square: the user's own rows."""

    def rows(self, z):
        return jnp.concatenate([z, z**2], axis=1)


def test_a_head_of_ones_own_needs_no_more_than_its_rows(x64):
    """It trains and predicts with both methods."""
    rng = np.random.default_rng(0)
    inputs, theta = rng.normal(size=(24, 3)), {"scale": jnp.ones(3)}
    model = vp.Separable(lambda theta, y: jnp.tanh(theta["scale"][None] * y), head=Doubled())
    w = rng.normal(size=(6, 2))
    data = inputs, np.asarray(model.rows({"scale": jnp.array([1.5, 0.5, 2.0])}, inputs) @ w)
    problem = vp.Problem(model, vp.least_squares(), 1e-12, 1e-12)
    solution = vp.fit(vp.gnvpro(problem), theta, data, epochs=20)
    np.testing.assert_allclose(abs(solution.theta["scale"]), [1.5, 0.5, 2.0], rtol=1e-4)
    predicted = vp.predict(problem, solution.theta, solution.w, inputs)
    np.testing.assert_allclose(predicted, data[1], atol=1e-4)

    method = vp.slimtrain(problem, optax.sgd(1e-2), selection=vp.sgcv())
    state, before = method.step(method.init(theta, data), data)
    for _ in range(20):
        state, after = method.step(state, data)
    assert after.objective < before.objective / 2
