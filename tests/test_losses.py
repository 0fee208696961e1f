"""Losses: values from their formulas, derivatives by automatic differentiation of these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import LOSSES, loss_gradient, loss_hessian, loss_value, make_data, pseudo_huber

import varprox as vp

OUTPUTS = 3


def sample(loss):
    _, targets = make_data(loss, OUTPUTS, samples=6)
    return 2 * np.random.default_rng(0).normal(size=targets.shape), targets


losses = pytest.mark.parametrize("loss", LOSSES)


@losses
def test_value_gradient_and_curvature_equal_the_formulas(loss, x64):
    predictions, targets = sample(loss)
    expected = loss_value(loss, predictions, targets)
    assert abs(LOSSES[loss].value(predictions, targets) - expected) < 1e-13
    gradient = LOSSES[loss].gradient(predictions, targets)
    np.testing.assert_allclose(gradient, loss_gradient(loss, predictions, targets), atol=1e-14)
    v = np.random.default_rng(1).normal(size=predictions.shape)
    product = LOSSES[loss].curvature(predictions, targets)(v)
    blocks = loss_hessian(loss, predictions, targets)
    np.testing.assert_allclose(product, np.einsum("nop,np->no", blocks, v), atol=1e-14)


@losses
def test_gradient_and_curvature_are_derivatives_of_the_value(loss, x64):
    predictions, targets = sample(loss)
    value = lambda p: LOSSES[loss].value(p, targets)  # noqa: E731
    gradient, hessian = jax.grad(value)(predictions), jax.hessian(value)(predictions)
    np.testing.assert_allclose(LOSSES[loss].gradient(predictions, targets), gradient, atol=1e-14)
    unit = np.eye(predictions.size).reshape(-1, *predictions.shape)
    products = jax.vmap(LOSSES[loss].curvature(predictions, targets))(unit)
    np.testing.assert_allclose(
        products, np.asarray(hessian).reshape(unit.shape[:1] + hessian.shape[:2]), atol=1e-14
    )


@losses
def test_curvature_root_squared_is_the_curvature(loss, x64):
    predictions, targets = sample(loss)
    units = np.broadcast_to(np.eye(OUTPUTS)[:, None], (OUTPUTS, *predictions.shape))
    columns = jax.vmap(lambda v: LOSSES[loss].curvature_root(predictions, targets, v))(units)
    squared = np.einsum("kno,knp->nop", columns, columns)
    np.testing.assert_allclose(squared, loss_hessian(loss, predictions, targets), atol=1e-14)


@losses
def test_losses_are_means(loss, x64):
    predictions, targets = sample(loss)
    single = [
        LOSSES[loss].value(p[None], t[None]) for p, t in zip(predictions, targets, strict=True)
    ]
    assert abs(LOSSES[loss].value(predictions, targets) - np.mean(single)) < 1e-14


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "logistic"])
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_large_predictions_overflow_nothing(loss, size):
    """In float32: right labels cost nothing, wrong ones as much as the prediction is large."""
    predictions = np.float32(size) * np.array([[1, -1]], np.float32)
    right, wrong = np.array([[1, 0]], np.float32), np.array([[0, 1]], np.float32)
    per_wrong = 2  # outputs, or the difference of two logits
    assert LOSSES[loss].value(predictions, right) == 0
    np.testing.assert_allclose(LOSSES[loss].value(predictions, wrong), per_wrong * size, rtol=1e-6)
    for targets in (right, wrong):
        assert np.isfinite(LOSSES[loss].gradient(predictions, targets)).all()
        curved = LOSSES[loss].curvature(predictions, targets)(np.ones_like(predictions))
        np.testing.assert_array_equal(curved, 0)


def test_softmax_ignores_a_shift_of_all_logits(x64):
    loss = vp.softmax_cross_entropy()
    predictions, targets = sample("softmax_cross_entropy")
    shifted = loss.value(predictions + 7.0, targets)
    assert abs(shifted - loss.value(predictions, targets)) < 1e-13
    product = loss.curvature(predictions, targets)(np.ones_like(predictions))
    np.testing.assert_allclose(product, 0, atol=1e-15)


def test_two_classes_of_softmax_are_one_of_logistic(x64):
    """Logits (p, 0) against the probability of the first class."""
    p = np.random.default_rng(2).normal(size=(5, 1))
    t = np.random.default_rng(3).uniform(size=(5, 1))
    both = vp.softmax_cross_entropy().value(np.hstack([p, 0 * p]), np.hstack([t, 1 - t]))
    assert abs(both - vp.logistic().value(p, t)) < 1e-14


def test_losses_are_hashable_and_equal_when_built_alike():
    """So that functions compiled for one problem serve the next."""
    for build in (vp.least_squares, vp.softmax_cross_entropy, vp.logistic):
        assert build() == build() and hash(build()) == hash(build())
    assert vp.convex_loss(pseudo_huber) == vp.convex_loss(pseudo_huber)
    assert vp.convex_loss(pseudo_huber) != vp.convex_loss(lambda p, t: jnp.sum(p))
    assert vp.logistic() != vp.least_squares()


@pytest.mark.parametrize(
    "loss, good",
    [
        ("softmax_cross_entropy", [[0.0, 1.0], [0.25, 0.75]]),
        ("logistic", [[0.0, 1.0], [0.25, 0.5]]),
        ("least_squares", [[-1e9, 1e9]]),
    ],
)
def test_targets_within_range_are_accepted(loss, good):
    for dtype in (np.float32, np.float64):
        LOSSES[loss].check(np.array(good, dtype))


@pytest.mark.parametrize(
    "loss, bad, named",
    [
        ("softmax_cross_entropy", [[0.5, 0.6]], "1.1"),
        ("softmax_cross_entropy", [[1.5, -0.5]], "-0.5"),
        ("softmax_cross_entropy", [[0.0, 0.0]], "0"),
        ("logistic", [[-1.0, 1.0]], "-1"),
        ("logistic", [[0.0, 1.01]], "1.01"),
    ],
)
def test_targets_out_of_range_are_refused_with_what_came(loss, bad, named):
    with pytest.raises(ValueError, match="targets: expected") as caught:
        LOSSES[loss].check(np.array(bad))
    assert named in str(caught.value)


# What `convex_loss` refuses


CONVEX = {
    "pseudo-Huber": pseudo_huber,
    "Poisson": lambda p, t: jnp.sum(jnp.exp(p) - t * p),
    "Huber": lambda p, t: jnp.sum(jnp.where(jnp.abs(p - t) < 1, (p - t) ** 2 / 2, jnp.abs(p - t))),
    "logsumexp": lambda p, t: jax.nn.logsumexp(p) - jnp.sum(p * t),
    "norm": lambda p, t: jnp.linalg.norm(p - t),
    "linear": lambda p, t: jnp.sum(p * t),
}
NOT_CONVEX = {
    "Cauchy": lambda p, t: jnp.sum(jnp.log1p((p - t) ** 2)),
    "Tukey": lambda p, t: -jnp.sum(jnp.exp(-((p - t) ** 2))),
    "concave": lambda p, t: -jnp.sum((p - t) ** 2),
    "product": lambda p, t: p[0] * p[1],
    "saddle": lambda p, t: (p[0] - t[0]) ** 2 - (p[1] - t[1]) ** 2,
}


@pytest.mark.parametrize("unit", [1e-6, 1, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_loss_must_be_convex(unit, dtype):
    """In whatever units the targets are, the function is told by its second derivatives."""
    targets = (unit * np.random.default_rng(4).normal(size=(9, 2))).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        for fn in CONVEX.values():
            vp.convex_loss(fn).check(targets)
        for fn in NOT_CONVEX.values():
            with pytest.raises(ValueError, match="fn: expected a function that is convex"):
                vp.convex_loss(fn).check(targets)


def test_targets_may_be_constants_under_a_trace():
    targets = np.ones((4, 2), np.float32)

    @jax.jit
    def traced(x):
        vp.convex_loss(pseudo_huber).check(targets)
        with pytest.raises(ValueError, match="convex"):
            vp.convex_loss(NOT_CONVEX["Cauchy"]).check(targets)
        return x

    jax.vmap(traced)(np.ones(2, np.float32))


@pytest.mark.parametrize(
    "fn, came",
    [
        (lambda p, t: jnp.sum((p - t) ** 2)[None], "(1,)"),
        (lambda p, t: (p - t) ** 2, "(2,)"),
        (lambda p, t: (1.0, 2.0), "tuple"),
        (lambda p, t: jnp.sum(p > t), "int32"),
        (lambda p, t: jnp.sum(p - t).astype(jnp.float16), "float16"),
        (lambda p, t: 0.0 if p[0] > 0 else 1.0, "TracerBoolConversionError"),
        (lambda p, t: float(p[0]), "ConcretizationTypeError"),
        (lambda p: jnp.sum(p), "takes 1 positional argument"),
        (lambda p, t: p @ np.ones(3, np.float32), "TypeError"),
    ],
)
def test_functions_that_are_no_losses_are_refused(fn, came):
    with pytest.raises(TypeError, match=r"^fn: expected") as caught:
        vp.convex_loss(fn).check(np.ones((4, 2), np.float32))
    assert came in str(caught.value).split("got", 1)[1]
