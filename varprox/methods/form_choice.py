"""Which form of GNvpro's model suits a problem: what its features allow, and what a step costs."""

from typing import Any

import jax

from varprox.methods.forms import FORMS, Form, Sizes, takes_kaufman
from varprox.problem.data import zero_w
from varprox.problem.hosted import shapes_of
from varprox.problem.model import Problem
from varprox.problem.penalties import tikhonov_weight
from varprox.problem.traits import derivatives, treats_samples_alone
from varprox.reduced.matrix import dimensions, passes

LARGEST = 2**28  # entries of a matrix that is formed unasked


def select_form(
    problem: Problem,
    theta: Any,
    data: tuple,
    curvature: str = "auto",
    *,
    allowed: tuple[Form, ...] | None = None,
    rank: int = 20,
    kaufman: bool | None = None,
) -> Form:
    """The form that this `curvature` of `gnvpro` stands for; `allowed` are those that are `usable`,
    where this is known.

    Raises ValueError, with those that work, where the features do not allow it.
    """
    inputs, targets = data
    allowed = usable(problem, theta, inputs) if allowed is None else allowed
    asked = Form if curvature == "auto" else (Form[curvature.upper()],)
    forms = tuple(form for form in allowed if form in asked)
    if not forms:
        names = [repr(form.name.lower()) for form in allowed]
        instead = f"curvature={' or '.join(names)}" if names else "varprox.broydenvpro"
        why = _why(problem, theta, inputs, curvature, allowed)
        raise ValueError(f"curvature: expected {instead} for features {why}, got {curvature!r}")
    z = jax.eval_shape(problem.model.features, theta, shapes_of(inputs))
    w = jax.eval_shape(lambda: zero_w(problem, z, targets))
    kaufman = takes_kaufman(w, kaufman)
    return choose(forms, problem, theta, data, w, rank=rank, kaufman=kaufman)


def _why(problem, theta, inputs, curvature, allowed):
    """What the features are like, where a form cannot be had."""
    forward, reverse = derivatives(problem, theta, inputs)
    if not forward and not reverse:
        return "that cannot be differentiated"
    if not reverse and curvature != "forward":
        return "without a derivative in reverse mode"
    if curvature == "kernel" and Form.DENSE in allowed:
        return "whose penalty on theta is not Tikhonov's"
    if curvature in ("krylov", "forward"):
        return "without a derivative in forward mode"
    return "that depend on the other samples of the batch"


def usable(problem: Problem, theta: Any, inputs: Any) -> tuple[Form, ...]:
    """The forms that these features allow."""
    forward, reverse = derivatives(problem, theta, inputs)
    alone = reverse and treats_samples_alone(problem, theta, inputs)
    allowed = {
        Form.KRYLOV: forward and reverse,
        Form.DENSE: alone,
        Form.KERNEL: alone and tikhonov_weight(problem.theta_penalty) is not None,
        Form.FORWARD: forward,
    }
    return tuple(form for form in Form if allowed[form])


def choose(
    forms: tuple[Form, ...], problem: Problem, theta: Any, data: tuple, w: Any, *, rank, kaufman
) -> Form:
    """Of the forms the one that takes the fewest operations for what its steps are worth.

    Only the shapes of the arrays matter.
    """
    samples = len(data[1])
    sizes = Sizes(
        samples=samples,
        weights=sum(leaf.size for leaf in jax.tree.leaves(theta)),
        rows=(samples + len(w)) * dimensions(problem, w, data[1]) + (0 if kaufman else w.size),
        passes=passes(w, kaufman=kaufman),
        rank=rank,
    )
    small = [form for form in forms if FORMS[form].entries(sizes) <= LARGEST]
    return min(small or forms, key=lambda form: FORMS[form].operations(sizes))
