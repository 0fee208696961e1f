"""GNvpro: trust-region Gauss–Newton–Krylov on the reduced objective."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from varprox.checks import check_flag, check_integer, check_number, named
from varprox.methods.form_choice import select_form
from varprox.methods.forms import FORMS, Form, Settings, elsewhere, takes_kaufman
from varprox.methods.method import Method, Status, check_all, check_state
from varprox.numerics import trust_region
from varprox.numerics.krylov import norm
from varprox.precision import full_products
from varprox.problem.data import check_data
from varprox.problem.model import Problem, check_problem
from varprox.problem.penalties import tikhonov_weight
from varprox.reduced.projection import (
    Projection,
    is_exact,
    project,
    start_projection,
)

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
    """The weights of GNvpro and what its next step starts from.

    Attributes:
        theta: The nonlinear weights θ.
        w: The last layer W(θ), (columns, outputs).
        projection: W(θ) and what speeds up the next solve for it.
        objective: Φ at these weights.
        decrease: The decrease of Φ in the last accepted step; Φ itself at the start.
        radius: The trust-region radius for the next step; infinite if it has to be chosen anew.
        shift: The multiplier σ of the last step, for which (H + σ I) s = −g.
        form: The form of the model, with the variables in which the trust region is a ball.
        low: The number of steps in a row with a low gain ratio at their first trial.
        idle: The number of steps in a row that gained less than rounding of Φ.
        newton: Whether products with the full Hessian are in use.
        work_units: The work units so far.
        status: The number of a ``Status``.
    """

    theta: Any
    w: jax.Array
    projection: Projection
    objective: jax.Array
    decrease: jax.Array  # of the objective, in the last accepted step
    radius: jax.Array
    shift: jax.Array  # σ of the last step
    form: Any  # of the model: see `varprox.methods.forms`
    low: jax.Array  # iterations in a row whose gain ratio was low
    idle: jax.Array  # iterations in a row whose gain was below rounding of the objective
    newton: jax.Array  # have Newton products taken over?
    work_units: jax.Array  # so far
    status: jax.Array


class Info(NamedTuple):
    """What one step of GNvpro did.

    Attributes:
        objective: Φ at the weights after the step.
        gradient_norm: ‖∇Φ_red‖ at the weights before the step.
        radius: The trust-region radius of the first trial point.
        ratio: The gain ratio of the last trial point, the actual over the promised decrease.
        accepted: Whether a trial point was accepted. If not, the weights have not changed.
        products: The number of products with the curvature; 0 if the curvature is formed.
        trials: The number of trial points, each with a forward pass and a solve for W.
        w_products: The number of products in the last solve for W; 0 under least squares.
        newton: Whether the products were with the full Hessian.
        curvature: The form of the model, a number of ``varprox.methods.forms.Form``.
    """

    objective: jax.Array
    gradient_norm: jax.Array
    radius: jax.Array
    ratio: jax.Array
    accepted: jax.Array
    products: jax.Array
    trials: jax.Array
    w_products: jax.Array
    newton: jax.Array
    curvature: jax.Array  # a number of `varprox.methods.forms.Form`


class _Trial(NamedTuple):
    """What is found at a trial point."""

    objective: jax.Array
    projection: Projection


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
    """Trust-region Gauss–Newton on the reduced objective, for small and medium problems.

    Each step minimises a Gauss–Newton model of Φ_red(θ) in a trust region. The model accounts for
    the change of W with θ. Every step uses all data. This is the full-batch method of choice for
    high accuracy and for few or expensive samples, up to some thousand weights. ``lbfgsvpro`` and
    ``broydenvpro`` take cheaper steps, from gradients alone.

    ``curvature`` selects the form of the model:

    - ``"krylov"`` uses products with the curvature, in a Krylov space of at most ``rank``
      dimensions. Up to ``memory`` directions in which earlier Krylov spaces found large curvature
      precondition the next one. The trust region is a ball in the preconditioned variables. If the
      first trial point of three steps in a row has a gain ratio below ½, products with the full
      Hessian take over. The features need derivatives in forward and in reverse mode.
    - ``"dense"`` assembles the full Gauss–Newton matrix sample by sample, with one row per output
      (under least squares one per column of the design rows, if those are fewer). The trust region
      is an ellipsoid that follows the diagonal of the matrix. This form suits high accuracy and up
      to some thousand weights. The features must act on each sample independently and have a
      derivative in reverse mode.
    - ``"kernel"`` takes the singular values of these rows, which is cheaper if there are fewer rows
      than weights. Steps are measured in θ itself. The penalty on θ must be Tikhonov's on all of θ,
      or none. The features must be as for ``"dense"``.
    - ``"forward"`` is ``"dense"`` with a matrix from forward passes of all samples together, one
      pass per weight. This form suits features that couple samples or have no derivative in reverse
      mode, up to some hundred weights. The features need a derivative in forward mode.
    - ``"auto"`` selects, among the forms that the features allow, the one with the fewest
      operations per step. Krylov spaces are counted at their full dimension, and two steps in them
      count as one step of another form. A matrix with more than 2²⁸ entries is formed only if every
      form that the features allow has one. ``info.curvature`` tells the selected form.

    ``init`` finds out what the features allow: it traces them, and it compares three samples
    evaluated alone with the same samples in the batch. Inside the trust region all forms lead to
    the same step if the Krylov space is full, ``kaufman`` is False and no learnt curvature is in
    use.

    All forms but ``"krylov"`` retry a rejected trial point once with a second-order correction,
    which bends the step along the curved valley. The correction itself takes no pass over the data.
    ``"dense"`` has it only if the rows take at most 128 MiB.

    The Gauss–Newton matrix omits a part of the Hessian that vanishes with the residual. ``"dense"``
    and ``"forward"`` estimate this part from gradients (see ``varprox.numerics.secant``) if the
    estimate takes at most 128 MiB and, under ``"dense"``, the rows do, too. The estimate enters the
    model once it has predicted the decrease of three steps in a row with less than a quarter of the
    error without it. It stays as long as it predicts better.

    The first radius is r = √(2 Φ / κ), where κ is the largest curvature of the model. A step of
    this length changes the residuals by about their own size. If ten lengths of θ are shorter, the
    radius is ten lengths of θ, but at least r / 10. The first step is accepted only with a gain
    ratio above ¼. A step tries at most ten points; if it accepts none, the next step continues with
    the shrunken radius. Decreases below rounding of Φ are measured by gradients.

    The run ends with one of these statuses:

    - CONVERGED if the model, without the learnt estimate, promises a decrease of at most
      ``tolerance`` · Φ within a distance of ‖θ‖, and the last step gained no more than that, up to
      rounding.
    - CONVERGED if rounding leaves at least half of the digits of Φ, the model promises no more than
      rounding within ‖θ‖ and within r, and the last step gained no more than ``tolerance`` · Φ.
    - CONVERGED if the residual is at the level of rounding and negligible beside the targets.
    - CONVERGED or STALLED after six steps in a row that gained less than rounding of Φ. After the
      first three of them the trust region is reset. The status is CONVERGED if rounding leaves at
      least half of the digits of Φ or if the residual is negligible beside the targets.
    - STALLED if the radius has shrunk to rounding of θ.
    - FLAT if the gradient is zero at the start and the objective is not.
    - NON_FINITE if the objective, the gradient or the curvature is not finite.

    Work units, one being a forward or a backward pass over the data:

    =================================  ========================================================
    Part                               Work units
    =================================  ========================================================
    start                              1
    whitening, with ``whiten``         2, an upper bound
    trial point                        1
    step, ``"krylov"``                 2, and 2 per product (4 per product with the Hessian)
    step, ``"dense"``, ``"kernel"``    1, and 1 per column of the design rows; with ``kaufman``
                                       1 per output if these are fewer
    step, ``"forward"``                1, and 1 per weight
    =================================  ========================================================

    If the rows of ``"dense"`` take more than 128 MiB, they are computed twice per step, and a step
    takes twice the units.

    Arguments:
        problem: The problem to train. The head must be dense, and the features must not learn from
            batches.
        curvature: The form of the model, ``"auto"``, ``"krylov"``, ``"dense"``, ``"kernel"`` or
            ``"forward"``. Changing it recompiles.
        rank: The largest dimension of the Krylov space, an integer ≥ 1. Only ``"krylov"`` uses it,
            and ``"auto"`` to count operations. Changing it recompiles.
        memory: The number of directions that precondition ``"krylov"``, an integer ≥ 0. Each takes
            as much memory as θ. Changing it recompiles.
        flat: The Krylov space ends if a further product adds less than this fraction of the model's
            decrease, a number ≥ 0 and below 1. Changing it does not recompile.
        tolerance: The relative decrease at which the run has converged, a number ≥ 0. None stands
            for eps^¾, which is 2e-12 in double and 6e-6 in single precision. Changing a number does
            not recompile.
        hand_over: Whether ``"krylov"`` may hand over to products with the full Hessian. Changing it
            does not recompile.
        whiten: Whether ``"krylov"`` whitens its variables at the start of the run (see
            ``varprox.reduced.whitening``). This helps in the first steps if the inputs are many and
            correlated, such as spectra. Changing it recompiles.
        w_curvature: Whether the Gauss–Newton products of ``"krylov"`` include α₂ J_Wᵀ J_W, where α₂
            is the ``w_penalty`` and J_W the derivative of W(θ). Changing it recompiles.
        kaufman: Whether the forms other than ``"krylov"`` use Kaufman's approximation. It drops the
            part of the projection's derivative that is proportional to the residual, and so saves
            passes if there are fewer outputs than columns of the design rows. None stands for True
            in this case and for False otherwise. Changing it recompiles.

    Returns:
        A full-batch ``Method``, a pair of pure functions. ``state = method.init(theta, data)``
        checks the data and solves for the first W. ``state, info = method.step(state, data)`` takes
        one step. The state is a ``varprox.methods.gnvpro.State``, the info a
        ``varprox.methods.gnvpro.Info``. ``method.init(theta, data, before=state)`` goes on from a
        state with other data, of which there may be more or fewer, or at other weights: it keeps
        the radius and what is known of the curvature, starts its solve for W from the W before, and
        counts its work on.

    Raises:
        TypeError: If ``problem`` is not a ``Problem``, ``flat`` or ``tolerance`` is not a number,
            or a flag is not a bool. ``init`` raises it for data, θ or features of the wrong type,
            ``step`` for the state of another method and for data that are not a pair of arrays.
        ValueError: If an option is out of its range, or if ``curvature`` is ``"kernel"`` and the
            penalty on θ is not Tikhonov's. ``init`` raises it for data that do not fit the problem,
            and for a form that the features do not allow; the message names the forms that they
            allow. ``step`` raises it for data of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> data = inputs, 2 * jnp.exp(-3 * inputs)
        >>> method = vp.gnvpro(problem, curvature="dense")
        >>> state = method.init(jnp.ones(1), data)
        >>> state, info = method.step(state, data)
        >>> bool(info.accepted), state.w.shape
        (True, (1, 1))
        >>> solution = vp.fit(method, jnp.ones(1), data, max_work=100)
        >>> print(solution.theta.round(2), solution.w.round(2))
        [3.] [[2.]]

    Source:
        Newman, Ruthotto, Hart, van Bloemen Waanders, arXiv:2007.13171, algorithm 3.1. The Krylov
        space of the publication is ``"krylov"`` with ``memory=0``, ``flat=0``, ``hand_over=False``
        and ``w_curvature=False``; the authors' implementation omits α₂ J_Wᵀ J_W under cross
        entropy. Kaufman, BIT 15 (1975), for the approximation; Transtrum, Sethna, arXiv:1201.5885,
        for the correction; Dennis, Gay, Welsch, ACM Trans. Math. Softw. 7 (1981), for the learnt
        curvature.
    """
    check_problem(problem)
    forms = ["auto", *(form.name.lower() for form in Form)]
    if curvature not in forms:
        raise ValueError(f"curvature: expected one of {forms}, got {curvature!r}")
    if curvature == "kernel" and tikhonov_weight(problem.theta_penalty) is None:
        penalties = " + ".join(map(named, problem.theta_penalty))
        raise ValueError(
            "curvature: expected 'kernel' only where the penalty on all of theta is Tikhonov's, or "
            f"none, got {curvature!r} with theta_penalty={penalties}"
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
    return Method(init, step, problem, name="gnvpro")


def _init(
    problem, theta, data, key=None, before=None, form=None,
    *, curvature, rank, kaufman, memory, whiten,
):  # fmt: skip
    """`form` is the one that `curvature` stands for, where this is known."""
    theta, data = check_data(problem, theta, data, full_batch=True)
    static = {"memory": memory, "whiten": whiten, "kaufman": kaufman}
    if before is None:
        if form is None:
            form = select_form(problem, theta, data, curvature, rank=rank, kaufman=kaufman)
        return _start(problem, theta, data, None, form=form, **static)
    check_state("gnvpro", isinstance(before, State), before)
    fresh = _start(problem, theta, data, before.w, form=before.form.kind, **static)
    kept = ("radius", "shift", "low", "newton")
    return fresh._replace(
        form=elsewhere(before.form),
        work_units=before.work_units + fresh.work_units,
        **{name: getattr(before, name) for name in kept},
    )


@partial(jax.jit, static_argnames=("form", "memory", "whiten", "kaufman"))
@full_products
def _start(problem, theta, data, w, *, form, memory, whiten, kaufman):
    """The first state; `w` is one to start the solve for W from, or None."""
    inputs, targets = data
    rows = problem.rows(theta, inputs)
    start = start_projection(problem, rows, targets)
    start = start if w is None else start._replace(w=w, rows=rows)
    projection = project(problem, rows, targets, start)
    kind = FORMS[form]
    factor = projection.factor
    if not problem.loss.quadratic:
        factor = kind.factor(problem, rows, projection.w, targets)
    value = projection.value + problem.penalty(theta)
    return State(
        theta=theta,
        w=projection.w,
        projection=kind.trimmed(problem, projection)._replace(factor=factor),
        objective=value,
        decrease=value,
        radius=jnp.full_like(value, jnp.inf),
        shift=jnp.zeros_like(value),
        form=kind.start(
            problem,
            theta,
            rows,
            projection.w,
            data,
            memory=memory,
            whiten=whiten,
            kaufman=takes_kaufman(projection.w, kaufman),
        ),
        low=jnp.zeros((), jnp.int32),
        idle=jnp.zeros((), jnp.int32),
        newton=jnp.array(False),
        work_units=jnp.int32(3 if form is Form.KRYLOV and whiten else 1),
        status=jnp.where(jnp.isfinite(value), Status.RUNNING, Status.NON_FINITE).astype(jnp.int32),
    )


def _step(problem, options, state, data, **static):
    check_state("gnvpro", isinstance(state, State), state)
    data = check_all(problem, state, data)
    return _advance(problem, options, state, data, **static)


@partial(jax.jit, static_argnames=("rank", "kaufman", "w_curvature"))
@full_products
def _advance(problem, options, state, data, *, rank, kaufman, w_curvature):
    # The model at θ, with the exact W(θ) ...
    form, at = state.form, state.projection
    if not problem.loss.quadratic:
        at = at._replace(factor=form.factor(problem, at.rows, at.w, data[1]))
    settings = Settings(rank, options.flat, w_curvature, takes_kaufman(state.w, kaufman))
    model = form.model(problem, state.theta, data, at, settings, state.radius, state.newton)

    # ... is minimised in smaller and smaller balls, until the objective follows.
    theta, unravel = ravel_pytree(state.theta)
    rounding = _rounding(state, data[1])
    radius, reach = _radius_and_reach(state, model)
    start = at._replace(spent=jnp.int32(0))
    result = trust_region.search(
        model.step,
        partial(_trial, problem, state, data, model, start, rounding),
        jnp.zeros_like(theta),
        _Trial(state.objective, start),
        radius,
        state.shift,
        max_trials=MAX_TRIALS,
        reach=reach,
        first=jnp.isinf(state.radius),
        correct=model.correct and partial(_corrected, model.correct),
    )
    ended = result.aux
    # Variables of a model that is not a number lead nowhere, not even from zero.
    theta = jnp.where(result.accepted, theta + model.root(result.x), theta)

    low = jnp.where(result.first_ratio < LOW_RATIO, state.low + 1, 0)
    idle = jnp.where(result.accepted & (result.decrease <= rounding), state.idle + 1, 0)
    newton = state.newton | (options.hand_over & (form.kind is Form.KRYLOV) & (low >= PATIENCE))
    # The radius that the Gauss–Newton model could be trusted in says nothing of the Newton model,
    # and one that rounding has shrunk says nothing at all.
    anew = newton & ~state.newton | (idle == IDLE)
    status, held = _status(options.tolerance, state, model, result, idle, rounding, data[1])
    info = Info(
        objective=ended.objective,
        gradient_norm=norm(model.gradient),
        radius=radius,
        ratio=result.ratio,
        accepted=result.accepted,
        products=model.products,
        trials=result.trials,
        w_products=ended.projection.products,
        newton=state.newton,
        curvature=jnp.int32(form.kind),
    )
    state = State(
        theta=unravel(theta),
        w=ended.projection.w,
        projection=ended.projection,
        objective=ended.objective,
        decrease=jnp.where(result.accepted, state.objective - ended.objective, state.decrease),
        radius=jnp.where(anew, jnp.inf, result.radius),
        shift=result.shift,
        form=model.following(result, ended.projection, held),
        low=low,
        idle=idle,
        newton=newton,
        work_units=state.work_units + model.work + result.trials,
        status=status,
    )
    return state, info


def _rounding(state, targets):
    """Of the objective. The errors of predictions have nothing to do with one another."""
    size = jnp.abs(state.objective)
    error = ROUNDINGS * state.projection.error
    of_predictions = error * (jnp.sqrt(2 * size / len(targets)) + error)
    return of_predictions + ROUNDINGS * jnp.finfo(size.dtype).eps * size


def _radius_and_reach(state, model):
    """The radius to begin with, and the two distances within which the model is asked what it
    promises."""
    # Moving one variable by the root of 2 Φ changes the residuals by about their own size.
    far = jnp.sqrt(2 * jnp.abs(state.objective) / model.curvature)
    first = jnp.clip(FARTHEST * model.reach, NEAREST * far, far)
    # Where θ is next to nothing its length says nothing of what rounding hides.
    reach = jnp.stack([model.reach, jnp.maximum(model.reach, far)])
    return jnp.where(jnp.isinf(state.radius), first, state.radius), reach


def _trial(problem, state, data, model, start, rounding, y, found):
    """The decrease of the objective at a trial point, and what is found there."""
    inputs, targets = data
    theta, unravel = ravel_pytree(state.theta)
    step = model.root(y)
    trial = unravel(theta + step)
    rows, along = state.form.rows_at(problem, trial, inputs)
    tolerance = ACCURACY * jnp.minimum(found.decrease, state.decrease)
    solved = state.form.trimmed(problem, project(problem, rows, targets, start, tolerance))
    value = solved.value + problem.penalty(trial)

    def by_gradients():
        """The trapezoidal rule, which measures the decrease below rounding, too."""
        penalty = jax.jvp(problem.penalty, (trial,), (unravel(step),))[1]
        slope = along(solved.slopes, solved.w, step) + penalty
        return -0.5 * (model.gradient @ step + slope)

    decrease = jax.lax.cond(
        found.decrease < rounding, by_gradients, lambda: state.objective - value
    )
    # A step that rounding swallows leads nowhere, whatever gradients say.
    moved = jnp.any(theta + step != theta)
    decrease = jnp.where(jnp.isfinite(value) & moved, decrease, jnp.nan)
    return decrease, _Trial(value, solved)


def _corrected(correct, found, trial):
    return correct(found, trial.projection)


def _status(tolerance, state, model, result, idle, rounding, targets):
    """Why the run ends, if it does; and whether the test of convergence holds."""
    value, error = result.aux.objective, ROUNDINGS * result.aux.projection.error
    size, eps = jnp.abs(state.objective), jnp.finfo(value.dtype).eps
    if tolerance is None:
        tolerance = eps**0.75
    gradient_norm = norm(model.gradient)
    # A model without a minimiser promises nothing.
    near, far_off = result.promise
    promises = (near > 0) | (gradient_norm == 0)
    # Rounding of half the digits hides a lower point as well as it hides that there is none.
    known = rounding <= eps**0.5 * size
    held = promises & ((near <= tolerance * size) | known & (far_off <= rounding))
    # A step that has gained more than this shows the model to be wrong.
    held &= ~(result.decrease > tolerance * size + rounding)
    # Nothing is left that the objective would show, or the residual is that of rounding.
    ended = idle >= 2 * IDLE
    exact = is_exact(value, targets)
    rounded = ended & (known | exact) | exact & (jnp.abs(value) <= error**2)
    shrunk = ~(result.accepted | model.estimated) & (result.radius <= eps * model.reach)
    finite = jnp.isfinite(value) & jnp.isfinite(gradient_norm) & jnp.isfinite(model.curvature)
    cases = {
        Status.NON_FINITE: ~finite,
        Status.FLAT: jnp.isinf(state.radius) & (gradient_norm == 0) & (state.objective > rounding),
        # What is only estimated does not end a run.
        Status.CONVERGED: held & ~model.estimated | rounded,
        Status.STALLED: ended | shrunk,
    }
    status = jnp.select(list(cases.values()), list(cases), Status.RUNNING)
    return status.astype(jnp.int32), held
