"""The quadratic model of the reduced objective at θ, whatever form it was found in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree

from varprox.numerics import trust_region
from varprox.problem.model import Problem
from varprox.reduced.matrix import Formed
from varprox.reduced.projection import Projection


class Quadratic(NamedTuple):
    """The model gᵀs + ½ sᵀHs of steps s = root(y) of θ, in variables y in which the trust region
    is a ball."""

    gradient: jax.Array  # (size,), in θ
    root: Callable[[jax.Array], jax.Array]
    step: Callable[[jax.Array, jax.Array], trust_region.Step]  # of radius and a guess at the shift
    curvature: jax.Array  # the largest of a direction y, or near it
    reach: jax.Array  # the length of θ in the variables y
    products: jax.Array
    work: jax.Array  # units spent
    # The form that the next model is found in, given what the search did, the projection where it
    # ended, and whether the test of convergence held: then the next model holds no estimate.
    following: Callable[[trust_region.Iteration, Projection, jax.Array], Any]
    estimated: jax.Array  # is a part of the curvature only estimated?
    # What to add to a step, given the projection at its end; None where K is not kept.
    correct: Callable[[trust_region.Step, Projection], jax.Array] | None = None


def with_correction(
    model: Quadratic,
    problem: Problem,
    theta: Any,
    formed: Formed,
    product: Callable[[jax.Array], jax.Array],
    solve: Callable[[jax.Array, jax.Array], jax.Array],
) -> Quadratic:
    """The model with its second-order correction, where `formed` has kept what this needs.

    `product` is with H, what J makes of the matrix, in θ; `solve` in the variables y, with all of
    the matrix and a shift. The correction a of a step s, at whose end the residuals are off from
    what the model promised, is with G and W there

        (H + S + σ I) a = −(Jᵀ G + α₂ J_Wᵀ W + ∇R(θ + s) − g − H s),

    S being what the matrix has beside H.

    It bends the step along the curved valley that s leaves on a tangent. This is the geodesic
    acceleration of Transtrum and Sethna, arXiv:1201.5885, with the second derivative as a
    difference that a trial point gives for nothing, J being at hand.
    """
    transposed = formed.transposed
    if transposed is None:
        return model

    def correct(found, end):
        flat, unravel = ravel_pytree(theta)
        s = model.root(found.step)
        there = transposed(end.slopes, end.w) + penalty_gradient(problem, unravel(flat + s))
        return -solve(model.root(there - model.gradient - product(s)), found.shift)

    return model._replace(correct=correct)


def penalty_gradient(problem: Problem, theta: Any) -> jax.Array:
    """∇R(θ), flat."""
    return ravel_pytree(jax.grad(problem.penalty)(theta))[0]
