"""The forms of GNvpro's model: they agree, and "auto" picks the cheapest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import Case, dense_reference, initial_theta, relative

import varprox as vp
from varprox import quadratic, trust_region
from varprox.projection import factorise
from varprox.quadratic import Form
from varprox.recycling import nothing_yet

RADII = (np.inf, 0.3, 1e-3)


@jax.jit
def steps(problem, theta, data, w):
    """Of every form, the Krylov space being full, the steps for all radii."""
    inputs, targets = data
    factor = factorise(problem, problem.model.rows(theta, inputs), w, targets, whole=True)
    like = ravel_pytree(theta)[0]
    arguments = problem, theta, data, w, factor, nothing_yet(0, like)
    options = {"rank": like.size, "flat": 0.0, "w_curvature": True}
    models = {
        "krylov": quadratic.krylov(*arguments, jnp.inf, jnp.array(False), **options),
        "dense": quadratic.dense(*arguments),
        "kernel": quadratic.kernel(*arguments),
    }
    return {
        name: [model.step(jnp.array(radius), jnp.array(0.0)) for radius in RADII]
        for name, model in models.items()
    }


@pytest.mark.parametrize("samples", [5, 16])
@pytest.mark.parametrize("loss", ["least_squares", "softmax_cross_entropy", "pseudo_huber"])
def test_all_forms_give_the_same_steps(loss, samples, x64, monkeypatch):
    """Inside the ball and on its boundary, with fewer rows than the 24 weights and with more."""
    monkeypatch.setattr(trust_region, "CLOSE", 1e-13)
    case, theta = Case(loss, outputs=2), initial_theta()
    data = tuple(x[:samples] for x in case.data)
    w = dense_reference(case, theta, data).w
    found = steps(case.problem, theta, data, w)
    for krylov, dense, kernel in zip(*found.values(), strict=True):
        for other in (dense, kernel):
            assert relative(other.step, krylov.step) < 1e-8
            assert abs(other.decrease - krylov.decrease) < 1e-8 * krylov.decrease
            assert other.on_boundary == krylov.on_boundary
    assert [bool(step.on_boundary) for step in found["dense"]] == [False, True, True]


def choose(samples, size, outputs=1, columns=9, penalty=1e-10):
    problem = vp.Problem(vp.Separable(lambda theta, x: x), vp.least_squares(), penalty, 1e-10)
    theta, w, targets = (
        jax.ShapeDtypeStruct(shape, np.float64)
        for shape in ((size,), (columns, outputs), (samples, outputs))
    )
    return quadratic.choose(problem, theta, w, targets, rank=20)


def test_the_cheapest_form_is_chosen():
    assert choose(2000, 556) is Form.DENSE
    assert choose(4000, 10_128, outputs=16, columns=33) is Form.KRYLOV
    assert choose(50, 5000) is Form.KERNEL
    assert choose(50, 5000, penalty=vp.smoothness_in_time(1e-3, 1.0)) is not Form.KERNEL
    assert choose(10**6, 10**5) is Form.KRYLOV


def test_no_matrix_is_formed_that_is_too_large(monkeypatch):
    monkeypatch.setattr(quadratic, "LARGEST", 10**4)
    assert choose(2000, 556) is Form.KRYLOV


@pytest.mark.parametrize("curvature", ["auto", "krylov", "dense", "kernel"])
def test_history_says_which_form_was_used(curvature, x64):
    case = Case("least_squares", outputs=1)
    method = vp.gnvpro(case.problem, curvature=curvature)
    solution = vp.fit(method, initial_theta(), case.data, epochs=2)
    expected = Form.DENSE if curvature == "auto" else Form[curvature.upper()]
    assert list(solution.history["curvature"][1:]) == [expected, expected]
