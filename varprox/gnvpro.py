"""GNvpro: trust-region Gauss–Newton–Krylov on the reduced objective.

Source: Newman, Ruthotto, Hart, van Bloemen Waanders, arXiv:2007.13171, algorithm 3.1. Imports the
mathematics (quadratic, reduced, projection) and the trust region below it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from varprox import quadratic, trust_region
from varprox.checks import check_flag, check_integer, check_number
from varprox.krylov import norm
from varprox.method import Method, Status
from varprox.model import Problem, check_data, check_problem, derivatives, zero_w
from varprox.penalties import tikhonov_weight
from varprox.precision import full_products
from varprox.projection import (
    Projection,
    factorise,
    is_exact,
    project,
    rounding_of_predictions,
    start_projection,
    without_span,
)
from varprox.quadratic import Form
from varprox.reduced import hessian_factor

PATIENCE = 3  # iterations in a row with a low gain ratio, after which Newton products take over
IDLE = 3  # with a gain below rounding: the trust region begins anew, and after as many the run ends
LOW_RATIO = 0.5
MAX_TRIALS = 10
ACCURACY = 1e-6  # η² of `project`; a W-solve is cheap beside a Krylov space
# The most that the first radius may be, in lengths of θ: MINPACK takes 100, SciPy 1. Where two
# columns are nearly the same a longer step may gain much, and lead one of them away from the data.
FARTHEST, NEAREST = 10, 0.1  # the latter of what the objective allows, for θ next to nothing
ROUNDINGS = 10  # by which a prediction may be off


class State(NamedTuple):
    """The weights and what the next iteration starts from."""

    theta: Any
    w: jax.Array
    projection: Projection
    objective: jax.Array
    error: jax.Array  # of a prediction, by rounding
    decrease: jax.Array  # of the objective, in the last accepted step
    radius: jax.Array
    shift: jax.Array  # σ of the last step
    norm: Any  # of the trust region: see `varprox.quadratic`
    low: jax.Array  # iterations in a row whose gain ratio was low
    idle: jax.Array  # iterations in a row whose gain was below rounding of the objective
    newton: jax.Array  # have Newton products taken over?
    work_units: jax.Array  # so far
    status: jax.Array


class Info(NamedTuple):
    """What one iteration did; `objective` belongs to the weights after it, `gradient_norm` to those
    before."""

    objective: jax.Array
    gradient_norm: jax.Array
    radius: jax.Array
    ratio: jax.Array
    accepted: jax.Array
    products: jax.Array
    trials: jax.Array
    w_products: jax.Array
    newton: jax.Array
    curvature: jax.Array  # a number of `varprox.quadratic.Form`


class Options(NamedTuple):
    """Numbers that may change without recompiling; a `tolerance` of None depends on the dtype."""

    flat: float
    tolerance: float | None
    hand_over: bool


def gnvpro(
    problem: Problem,
    *,
    curvature: str = "auto",
    rank: int = 20,
    memory: int = 100,
    flat: float = 0.03,
    tolerance: float | None = None,
    hand_over: bool = True,
    whiten: bool = False,
    w_curvature: bool = True,
    kaufman: bool | None = None,
) -> Method:
    """The full-batch method of choice for small and medium problems.

    Each step minimises the Gauss–Newton model of the reduced objective in a trust region.
    `curvature` says how; inside the trust region all lead to the same step if the Krylov space is
    full, `kaufman` is False and nothing learnt is in use:

    - "krylov": in a Krylov space of at most `rank` dimensions, ending earlier when a further
      product adds less than the fraction `flat` of the model's decrease. Up to `memory` directions
      in which earlier Krylov spaces found the curvature large precondition the next one; each takes
      as much memory as θ. The trust region is a ball in the variables so preconditioned. They are
      whitened at the start of the run (see `varprox.whitening`) if `whiten`, which pays in the
      first steps where inputs are many and correlated, such as spectra. When gain ratios stay low,
      products with the full Hessian take over.
    - "dense": from the whole matrix, formed by rows, for each sample one an output or, where these
      are fewer, a column of the design rows; the features must treat every sample by itself. The
      trust region is an ellipsoid that follows the matrix's diagonal. For up to some thousand
      weights, and for high accuracy. A step that fails is tried once more with a second-order
      correction, which bends it along the valley, where the rows take at most 128 MiB and are kept.
    - "kernel": from the singular values of these rows, where they are fewer than the weights. It
      needs a Tikhonov penalty on all of θ, or none, and measures steps in θ itself. Steps that fail
      are corrected, too.
    - "forward": as "dense", but the matrix comes from forward passes of all samples together, one
      for each weight. For features that couple samples or have no derivative in reverse mode, and
      up to some hundred weights.
    - "auto": of those that the features allow the one with the fewest operations a step, where two
      steps in a Krylov space count as one of the others. The method's info holds the number it has
      in `varprox.quadratic.Form`.

    What the features allow is found out at the start, from three samples: "dense" and "kernel" ask
    that a sample have the same features alone as in the batch, and a derivative in reverse mode;
    "krylov" asks for both modes, "forward" for forward mode. A form that they do not allow is
    refused with a ValueError, which names those that they do.

    If `kaufman`, formed matrices leave out what the derivative of the projection adds where the
    residual is not zero, as Kaufman does. This spares passes where there are fewer outputs than
    columns of the design rows; None stands for True there and for False elsewhere. The rest of what
    vanishes with the residual "dense" and "forward" learn from gradients (see `varprox.secant`);
    they use it once three steps in a row have been predicted with a quarter of the error that there
    is without it, and for as long as it is the better of both.

    The Krylov space is that of the publication with `memory` 0, `flat` 0, `hand_over` False and
    `w_curvature` False, which leaves α₂ J_WᵀJ_W out of the Gauss–Newton matrix, as the authors'
    implementation does under cross entropy.

    The first radius is √(2 Φ) in variables in which the largest curvature is about one: no variable
    moves the residuals by more than their size. It is cut to ten lengths of θ, but to no less than
    a tenth of √(2 Φ). A first step is taken only if its gain ratio is at least ¼. Decreases in the
    size of rounding are measured by gradients.

    The run has converged when a model without what is learnt gains no more than the fraction
    `tolerance` of Φ within the distance that θ has from zero; or, if half of the digits of Φ are
    known, no more than rounding, there and where the residuals move by their size. The last step
    must not have gained more than this either. A `tolerance` of None stands for eps^¾, 2e-12 or
    6e-6. Where no step of ten is accepted the next iteration goes on with the shrunken radius.
    Where three steps in a row gain less than rounding of Φ the trust region begins anew, and after
    three more the run ends: CONVERGED if half of the digits are known, or the residual is next to
    nothing beside the targets. Else it has stalled, as it has when rounding swallows the steps.

    Work units: in a Krylov space 2 a step and 2 a product (4 with the full Hessian), and 2 for the
    whitening, an upper bound; with "forward" 1 a step and 1 a weight; with rows 1 a step and 1 a
    column of the design rows, or if `kaufman` 1 an output where these are fewer; 1 for the start
    and 1 a trial point. `data` is all of it at every step.
    """
    check_problem(problem)
    forms = ["auto", *(form.name.lower() for form in Form)]
    if curvature not in forms:
        raise ValueError(f"curvature: expected one of {forms}, got {curvature!r}")
    if curvature == "kernel" and tikhonov_weight(problem.theta_penalty) is None:
        raise ValueError(
            "curvature: expected 'kernel' only where the penalty on all of theta is Tikhonov's, or "
            f"none, got {curvature!r} with theta_penalty={problem.theta_penalty!r}"
        )
    rank = check_integer("rank", rank, least=1)
    memory = check_integer("memory", memory, least=0)
    flat = check_number("flat", flat, below=1)
    tolerance = None if tolerance is None else check_number("tolerance", tolerance)
    kaufman = None if kaufman is None else check_flag("kaufman", kaufman)
    whiten, w_curvature = check_flag("whiten", whiten), check_flag("w_curvature", w_curvature)
    options = Options(flat, tolerance, check_flag("hand_over", hand_over))
    static = {"rank": rank, "kaufman": kaufman}
    init = partial(_init, problem, curvature=curvature, memory=memory, whiten=whiten, **static)
    step = partial(_step, problem, options, w_curvature=w_curvature, **static)
    return Method(init, step, problem)


def _init(problem, theta, data, key=None, *, curvature, rank, kaufman, memory, whiten):
    check_data(problem, theta, data, full_batch=True)
    form = select_form(problem, theta, data, curvature, rank=rank, kaufman=kaufman)
    return _start(problem, theta, data, form=form, memory=memory, whiten=whiten, kaufman=kaufman)


def select_form(
    problem: Problem, theta: Any, data: tuple, curvature: str = "auto", *, rank=20, kaufman=None
) -> Form:
    """The form that this `curvature` of `gnvpro` stands for.

    Raises ValueError, with those that work, where the features do not allow it.
    """
    inputs, targets = data
    allowed = quadratic.usable(problem, theta, inputs)
    asked = Form if curvature == "auto" else (Form[curvature.upper()],)
    forms = tuple(form for form in allowed if form in asked)
    if not forms:
        names = [repr(form.name.lower()) for form in allowed]
        instead = f"curvature={' or '.join(names)}" if names else "varprox.broydenvpro"
        why = _why(problem, theta, inputs, curvature, allowed)
        raise ValueError(f"curvature: expected {instead} for features {why}, got {curvature!r}")
    z = jax.eval_shape(problem.model.features, theta, inputs)
    w = jax.eval_shape(lambda: zero_w(problem, z, targets))
    kaufman = _kaufman(w, kaufman)
    return quadratic.choose(forms, problem, theta, data, w, rank=rank, kaufman=kaufman)


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


@partial(jax.jit, static_argnames=("form", "memory", "whiten", "kaufman"))
@full_products
def _start(problem, theta, data, *, form, memory, whiten, kaufman):
    inputs, targets = data
    rows = problem.model.rows(theta, inputs)
    projection = project(problem, rows, targets, start_projection(problem, rows, targets))
    if form is Form.KRYLOV:
        projection = without_span(problem, projection)
    factor = _factor(problem, rows, projection.w, targets, form)
    value = projection.value + problem.penalty(theta)
    return State(
        theta=theta,
        w=projection.w,
        projection=projection._replace(factor=factor),
        objective=value,
        error=_error(problem, rows, projection.w),
        decrease=value,
        radius=jnp.full_like(value, jnp.inf),
        shift=jnp.zeros_like(value),
        norm=quadratic.start_norm(
            form,
            problem,
            theta,
            rows,
            projection.w,
            data,
            memory=memory,
            whiten=whiten,
            kaufman=_kaufman(projection.w, kaufman),
        ),
        low=jnp.zeros((), jnp.int32),
        idle=jnp.zeros((), jnp.int32),
        newton=jnp.array(False),
        work_units=jnp.int32(3 if form is Form.KRYLOV and whiten else 1),
        status=jnp.where(jnp.isfinite(value), Status.RUNNING, Status.NON_FINITE).astype(jnp.int32),
    )


def _kaufman(w, kaufman):
    columns, outputs = w.shape
    return outputs < columns if kaufman is None else kaufman


def _factor(problem, rows, w, targets, form):
    """That of ∇²_W Φ, which a formed model needs exactly even where W is large."""
    if form is Form.KRYLOV:
        return hessian_factor(problem, rows, w, targets)
    return factorise(problem, rows, w, targets, whole=True)


@partial(jax.jit, static_argnames=("rank", "kaufman", "w_curvature"))
@full_products
def _step(problem, options, state, data, *, rank, kaufman, w_curvature):
    inputs, targets = data
    theta, unravel = ravel_pytree(state.theta)
    kaufman = _kaufman(state.w, kaufman)
    form = quadratic.form_of(state.norm)
    at = state.projection
    if not problem.loss.quadratic:
        at = at._replace(factor=_factor(problem, at.rows, at.w, targets, form))
    of = problem, state.theta, data, at, state.norm
    if form is Form.KRYLOV:
        model = quadratic.krylov(
            *of, state.radius, state.newton, rank=rank, flat=options.flat, w_curvature=w_curvature
        )
    else:
        formed = quadratic.kernel if form is Form.KERNEL else quadratic.dense
        model = formed(*of, kaufman=kaufman)

    gradient_norm = norm(model.gradient)
    # The errors of predictions have nothing to do with one another.
    size = jnp.abs(state.objective)
    rounding = state.error * (jnp.sqrt(2 * size / len(targets)) + state.error)
    rounding = rounding + ROUNDINGS * jnp.finfo(size.dtype).eps * size
    first = jnp.isinf(state.radius)
    projection = at._replace(spent=jnp.int32(0))
    rows_at = lambda theta: problem.model.rows(theta, inputs)  # noqa: E731

    def evaluate(y, found):
        step = model.root(y)
        trial = unravel(theta + step)
        if form is Form.FORWARD:
            there, pullback = rows_at(trial), None
        else:
            there, pullback = jax.vjp(rows_at, trial)
        tolerance = ACCURACY * jnp.minimum(found.decrease, state.decrease)
        solved = project(problem, there, targets, projection, tolerance)
        if form is Form.KRYLOV:
            solved = without_span(problem, solved)
        value = solved.value + problem.penalty(trial)

        def by_gradients():
            """The trapezoidal rule, which measures the decrease below rounding, too."""
            if pullback is None:
                d_rows = jax.jvp(rows_at, (trial,), (unravel(step),))[1]
                along = jnp.sum(solved.slopes * (d_rows @ solved.w))
            else:
                (pulled,) = pullback(solved.slopes @ solved.w.T)
                along = ravel_pytree(pulled)[0] @ step
            penalty = jax.jvp(problem.penalty, (trial,), (unravel(step),))[1]
            return -0.5 * (model.gradient @ step + along + penalty)

        decrease = jax.lax.cond(
            found.decrease < rounding, by_gradients, lambda: state.objective - value
        )
        # A step that rounding swallows leads nowhere, whatever gradients say.
        moved = jnp.any(theta + step != theta)
        decrease = jnp.where(jnp.isfinite(value) & moved, decrease, jnp.nan)
        return decrease, (value, _error(problem, there, solved.w), solved)

    def corrected(correction, found, aux):
        *_, solved = aux
        return correction(found, solved.slopes, solved.w)

    # Moving one variable by the root of 2 Φ changes the residuals by about their own size.
    far = jnp.sqrt(2 * size / model.curvature)
    guess = jnp.clip(FARTHEST * model.reach, NEAREST * far, far)
    radius = jnp.where(first, guess, state.radius)
    # Where θ is next to nothing its length says nothing of what rounding hides.
    reach = jnp.stack([model.reach, jnp.maximum(model.reach, far)])
    result = trust_region.search(
        model.step,
        evaluate,
        jnp.zeros_like(theta),
        (state.objective, state.error, projection),
        radius,
        state.shift,
        max_trials=MAX_TRIALS,
        reach=reach,
        first=first,
        correct=model.correct and partial(corrected, model.correct),
    )
    value, error, projection = result.aux
    low = jnp.where(result.first_ratio < LOW_RATIO, state.low + 1, 0)
    idle = jnp.where(result.accepted & (result.decrease <= rounding), state.idle + 1, 0)
    newton = state.newton | (options.hand_over & (form is Form.KRYLOV) & (low >= PATIENCE))
    # The radius that the Gauss–Newton model could be trusted in says nothing of the Newton model.
    again = newton & ~state.newton
    # One that rounding has shrunk neither.
    again |= idle == IDLE
    next_radius = jnp.where(again, jnp.inf, result.radius)
    info = Info(
        objective=value,
        gradient_norm=gradient_norm,
        radius=radius,
        ratio=result.ratio,
        accepted=result.accepted,
        products=model.products,
        trials=result.trials,
        w_products=projection.products,
        newton=state.newton,
        curvature=jnp.int32(form),
    )
    # Variables of a model that is not a number lead nowhere, not even from zero.
    theta = jnp.where(result.accepted, theta + model.root(result.x), theta)
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = jnp.finfo(value.dtype).eps ** 0.75
    # A model without a minimiser promises nothing.
    near, far_off = result.promise
    promises = (near > 0) | (gradient_norm == 0)
    # Rounding of half the digits hides a lower point as well as it hides that there is none.
    known = rounding <= jnp.finfo(size.dtype).eps ** 0.5 * size
    converged = promises & ((near <= tolerance * size) | known & (far_off <= rounding))
    # A step that has gained more than this shows the model to be wrong.
    converged &= ~(result.decrease > tolerance * size + rounding)
    held = converged
    # What is only estimated does not end a run.
    converged &= ~model.estimated
    # Or nothing is left that the objective would show, or the residual is that of rounding.
    ended = idle >= 2 * IDLE
    exact = is_exact(value, targets)
    converged |= ended & (known | exact) | exact & (jnp.abs(value) <= error**2)
    finite = jnp.isfinite(value) & jnp.isfinite(gradient_norm) & jnp.isfinite(model.curvature)
    status = jnp.select(
        [
            ~finite,
            first & (gradient_norm == 0) & (state.objective > rounding),
            converged,
            ended
            | ~(result.accepted | model.estimated)
            & (result.radius <= jnp.finfo(value.dtype).eps * model.reach),
        ],
        [Status.NON_FINITE, Status.FLAT, Status.CONVERGED, Status.STALLED],
        Status.RUNNING,
    )
    state = State(
        theta=unravel(theta),
        w=projection.w,
        projection=projection,
        objective=value,
        error=error,
        decrease=jnp.where(result.accepted, state.objective - value, state.decrease),
        radius=next_radius,
        shift=result.shift,
        norm=model.following(result, projection.slopes, projection.w, held),
        low=low,
        idle=idle,
        newton=newton,
        work_units=state.work_units + model.work + result.trials,
        status=status.astype(jnp.int32),
    )
    return state, info


def _error(problem, rows, w):
    """How well predictions are known, and with them the objective."""
    return ROUNDINGS * rounding_of_predictions(problem, rows, w)
