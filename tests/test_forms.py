"""The forms of GNvpro's model: they agree, and "auto" picks the cheapest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import Case, dense_reference, features, initial_theta, projection_at, relative

import varprox as vp
from varprox.methods import form_choice
from varprox.methods.forms import EVEN, FORMS, Form, Settings
from varprox.numerics import trust_region

RADII = (np.inf, 1e-2, 1e-4)
CASE = Case("softmax_cross_entropy", outputs=2)


class End(NamedTuple):
    """What the correction reads of a projection."""

    slopes: jax.Array
    w: jax.Array


def make_model(form, problem, theta, rows, w, data, at, *, rank=1, whiten=False):
    begun = FORMS[form].start(problem, theta, rows, w, data, memory=0, whiten=whiten, kaufman=False)
    settings = Settings(rank, 0.0, w_curvature=True, kaufman=False)
    return begun.model(problem, theta, data, at, settings, jnp.inf, jnp.array(False))


@jax.jit
def steps(problem, theta, data, w):
    """Of every form the steps s for all radii, what it measures their length by, and the length of
    θ; the Krylov space is full."""
    rows = problem.model.rows(theta, data[0])
    at = projection_at(problem, theta, data, w)
    size = ravel_pytree(theta)[0].size
    found = {}
    for form in Form:
        model = make_model(form, problem, theta, rows, w, data, at, rank=size, whiten=True)
        made = [model.step(jnp.array(radius), jnp.array(0.0)) for radius in RADII]
        root = jax.vmap(model.root, out_axes=1)(jnp.eye(size))
        inside = [step._replace(step=model.root(step.step)) for step in made]
        found[form] = inside, root, model.reach
    return found


@pytest.mark.parametrize(
    "loss, samples",
    [("least_squares", 5), ("softmax_cross_entropy", 5), ("pseudo_huber", 5), ("pseudo_huber", 16)],
)
def test_all_forms_solve_the_same_problem(loss, samples, x64, monkeypatch):
    """With fewer rows than the 24 weights and with more. Where the ball is large enough all steps
    are the same; elsewhere each is the best in its own norm: (H + σ R⁻ᵀR⁻¹) s = −g for s = R y."""
    monkeypatch.setattr(trust_region, "CLOSE", 1e-13)
    case, theta = Case(loss, outputs=2), initial_theta()
    data = tuple(x[:samples] for x in case.data)
    reference = dense_reference(case, theta, data)
    newton = np.linalg.solve(reference.gauss_newton, -reference.gradient)
    for (inside, *shorter), root, _ in steps(case.problem, theta, data, reference.w).values():
        assert relative(inside.step, newton) < 1e-8
        assert abs(inside.decrease + 0.5 * reference.gradient @ newton) < 1e-8 * inside.decrease
        assert not inside.on_boundary
        metric = np.linalg.inv(root @ root.T)
        for step, radius in zip(shorter, RADII[1:], strict=True):
            assert step.on_boundary
            assert abs(step.step @ metric @ step.step - radius**2) < 1e-8 * radius**2
            shifted = reference.gauss_newton + step.shift * metric
            assert relative(shifted @ step.step, -reference.gradient) < 1e-7


@pytest.mark.parametrize("form", [Form.DENSE, Form.KERNEL, Form.FORWARD])
@pytest.mark.parametrize("loss", ["least_squares", "softmax_cross_entropy"])
def test_a_correction_leaves_an_error_of_third_order(loss, form, x64):
    """In Jᵀ G + α₂ J_Wᵀ W + ∇R − g − H s with J at θ, where that of a step is of second order."""
    case, theta = Case(loss, outputs=2), initial_theta()
    problem, (inputs, targets) = case.problem, case.data
    reference = dense_reference(case, theta, case.data)
    flat, unravel = ravel_pytree(theta)
    rows = problem.model.rows(theta, inputs)
    at = projection_at(problem, theta, case.data, reference.w)
    model = make_model(form, problem, theta, rows, reference.w, case.data, at)

    def end(s):
        there = unravel(flat + s)
        w = vp.solve_w(problem, there, case.data)
        slopes = problem.loss.gradient(problem.model.rows(there, inputs) @ w, targets)
        return slopes, w, ravel_pytree(jax.grad(problem.penalty)(there))[0]

    def error(s, promised):
        slopes, w, penalty = end(s)
        found = reference.jacobian.T @ slopes.ravel() + penalty
        found += case.w_penalty * reference.w_jacobian.T @ w.ravel()
        return np.linalg.norm(found - reference.gradient - reference.gauss_newton @ promised)

    y = np.random.default_rng(0).normal(size=flat.size)
    y /= np.linalg.norm(model.root(y))
    errors = []
    for length in (1e-2, 5e-3, 2.5e-3):
        zero = jnp.zeros(())
        step = trust_region.Step(length * y, zero + 1, jnp.array(False), zero, zero)
        s = np.asarray(model.root(step.step))
        slopes, w, _ = end(s)
        a = model.root(model.correct(step, End(slopes, w)))
        errors.append((error(s, s), error(s + a, s)))
    orders = np.diff(np.log2(errors), axis=0)
    assert (abs(orders[:, 0] + 2) < 0.1).all() and (orders[:, 1] < -2.8).all()


@pytest.mark.parametrize("form", [Form.DENSE, Form.KERNEL, Form.FORWARD])
def test_a_correction_is_solved_for_with_the_shift_of_its_step(form, x64):
    """(H + σ R⁻ᵀR⁻¹) a = −(Jᵀ G + α₂ J_Wᵀ W + ∇R − g − H s) with G and W as given."""
    theta, rng = initial_theta(), np.random.default_rng(0)
    problem, data, reference = CASE.problem, CASE.data, dense_reference(CASE, theta, CASE.data)
    flat, _ = ravel_pytree(theta)
    rows = problem.model.rows(theta, data[0])
    at = projection_at(problem, theta, data, reference.w)
    model = make_model(form, problem, theta, rows, reference.w, data, at)
    zero, shift = jnp.zeros(()), jnp.array(0.3)
    step = trust_region.Step(rng.normal(size=flat.size), zero + 1, zero > 1, shift, shift)
    slopes, w = rng.normal(size=data[1].shape), rng.normal(size=reference.w.shape)
    s, a = model.root(step.step), model.root(model.correct(step, End(slopes, w)))

    there = reference.jacobian.T @ slopes.ravel() + 1e-2 * (flat + s)
    there += CASE.w_penalty * reference.w_jacobian.T @ w.ravel()
    root = jax.vmap(model.root, out_axes=1)(jnp.eye(flat.size))
    shifted = reference.gauss_newton + shift * np.linalg.inv(root @ root.T)
    error = there - reference.gradient - reference.gauss_newton @ s
    assert relative(shifted @ a, -error) < 1e-8


def test_the_dense_norm_follows_the_diagonal_and_its_mean(x64):
    """And only ever grows."""
    theta, reference = initial_theta(), dense_reference(CASE, initial_theta(), CASE.data)
    _, root, _ = steps(CASE.problem, theta, CASE.data, reference.w)[Form.DENSE]
    diagonal = np.diag(reference.gauss_newton)
    expected = (diagonal + EVEN * diagonal.mean()) ** -0.5
    np.testing.assert_allclose(np.diag(root), expected, rtol=1e-8)

    method = vp.gnvpro(CASE.problem, curvature="dense")
    states = [method.init(theta, CASE.data)]
    for _ in range(6):
        states.append(method.step(states[-1], CASE.data)[0])
    norms = np.array([state.form.diagonal for state in states])
    assert (np.diff(norms, axis=0) >= 0).all() and (norms[-1] > norms[1]).any()


def test_theta_is_as_long_as_in_the_variables_of_the_model(x64):
    """Of whitened variables only a bound is known, by Cauchy and Schwarz."""
    theta = initial_theta()
    flat, _ = ravel_pytree(theta)
    w = dense_reference(CASE, theta, CASE.data).w
    for form, (_, root, reach) in steps(CASE.problem, theta, CASE.data, w).items():
        expected = np.linalg.norm(np.linalg.solve(root, flat))
        if form is Form.KRYLOV:
            bound = flat @ flat / np.linalg.norm(root.T @ flat)
            assert bound < expected
            expected = bound
        assert abs(reach - expected) < 1e-8 * expected


def choose(samples, size, outputs=1, columns=9, penalty=1e-10, allowed=tuple(Form)):
    problem = vp.Problem(vp.Separable(lambda theta, x: x), vp.least_squares(), penalty, 1e-10)
    theta, w, inputs, targets = (
        jax.ShapeDtypeStruct(shape, np.float64)
        for shape in (
            (size,),
            (columns, outputs),
            (samples, columns - 1),
            (samples, outputs),
        )
    )
    return form_choice.choose(allowed, problem, theta, (inputs, targets), w, rank=20, kaufman=True)


def test_the_cheapest_form_is_chosen():
    assert choose(2000, 556) is Form.DENSE
    assert choose(4000, 10_128, outputs=16, columns=33) is Form.KRYLOV
    assert choose(50, 5000) is Form.KERNEL
    assert choose(10**6, 10**5) is Form.KRYLOV
    assert choose(100, 4, allowed=(Form.KRYLOV, Form.FORWARD)) is Form.FORWARD


def coupled(theta, inputs):
    return jnp.cumsum(features(theta, inputs), 0)


@pytest.mark.parametrize("fn", [features, coupled])
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_features_are_known_where_a_penalty_is_traced(fn, transform, x64):
    data, theta, seen = CASE.data, initial_theta(), []

    def traced(alpha):
        problem = vp.Problem(vp.Separable(fn), CASE.problem.loss, alpha, alpha)
        seen.append(form_choice.usable(problem, theta, data[0]))
        if fn is coupled:
            with pytest.raises(ValueError, match="that depend on the other samples of the batch"):
                vp.gnvpro(problem, curvature="dense").init(theta, data)
        return alpha

    transform(traced)(np.ones(2) if transform is jax.vmap else 1.0)
    assert seen == [tuple(Form) if fn is features else (Form.KRYLOV, Form.FORWARD)]


@pytest.mark.parametrize("inputs", [(), None, {}], ids=str)
def test_without_inputs_samples_cannot_be_taken_apart(inputs, x64):
    theta, (given, _) = initial_theta(), CASE.data
    problem = vp.Problem(vp.Separable(lambda theta, _: features(theta, given)), vp.least_squares())
    assert form_choice.usable(problem, theta, inputs) == (Form.KRYLOV, Form.FORWARD)


def test_no_matrix_is_formed_that_is_too_large(monkeypatch):
    monkeypatch.setattr(form_choice, "LARGEST", 10**4)
    assert choose(2000, 556) is Form.KRYLOV


@pytest.mark.parametrize("curvature", ["auto", "krylov", "dense", "kernel", "forward"])
def test_history_says_which_form_was_used(curvature, x64):
    case = Case("least_squares", outputs=1)
    method = vp.gnvpro(case.problem, curvature=curvature)
    solution = vp.fit(method, initial_theta(), case.data, epochs=2)
    expected = Form.DENSE if curvature == "auto" else Form[curvature.upper()]
    assert list(solution.history["curvature"][1:]) == [expected, expected]
