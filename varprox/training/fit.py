"""The loop a person runs: budgets, history, validation and progress around a method's ``init`` and
``step``.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from varprox.checks import check_flag, check_integer
from varprox.methods.forms import Form, usable
from varprox.methods.gnvpro import gnvpro, select_form
from varprox.methods.method import Method, Status
from varprox.methods.quasi_newton import MAX_BYTES, broydenvpro, bytes_of_inverse, lbfgsvpro
from varprox.methods.slimtrain import with_learned
from varprox.precision import full_products
from varprox.problem.model import Problem, check_data, derivatives, predict
from varprox.training.threads import one_blas_thread

BAR = "{desc} [{elapsed}, {rate_fmt}]"
# Bytes of an inverse Hessian that is kept unasked where pairs would be whitened. Its products take
# time: on Indian Pines steps of Broydenvpro were twice as long as those of LBFGSvpro with 4168
# weights, where it led in the end, and five times as long with 10,128.
WHOLE = 2**28
# Weights, up to which each may have its pass in every step where samples are coupled. In the zoo
# problems with 2 and 3 ended sooner so than by gradients, one with 40 two to three times as high.
FEW = 20
COMPILATION = "/jax/core/compile/backend_compile_duration"  # an event of `jax.monitoring`


class Solution(NamedTuple):
    """The trained weights, the history of the run and why it ended.

    ``history`` maps column names to float arrays with one entry per step, the first for the start.
    ``pandas.DataFrame(solution.history)`` makes a table of it. Under a stochastic method an entry
    is an epoch: its columns are means over the steps, and the start has no objective.

    ================================================  ==========================================
    Column                                            What it holds
    ================================================  ==========================================
    ``objective``                                     Φ(W, θ), penalties included
    ``train_loss``                                    the objective without penalties
    ``work_units``                                    work so far, in passes over the data
    ``seconds``                                       run time so far, without compilation and
                                                      evaluation
    the fields of the method's info                   such as ``gradient_norm``, see below
    ``validation_loss``                               the loss on the validation data, if given
    ``train_<name>``, ``validation_<name>``           your metrics, if given
    ================================================  ==========================================

    The fields of infos are explained in ``varprox.methods.gnvpro.Info``,
    ``varprox.methods.quasi_newton.Info`` and ``varprox.methods.slimtrain.Info``. An entry is NaN if
    its column was not evaluated there.

    A run continues from where it ended with ``method._replace(init=lambda *_: solution.state)``.

    Attributes:
        theta: The trained nonlinear weights θ, with the structure that ``fit`` was given.
        w: The trained last layer W, (columns, outputs), its last row the bias if the head has one.
        history: The mapping from column names to arrays.
        status: Why the run ended, a ``Status``; ``status.message`` is a sentence.
        compile_seconds: The seconds spent on tracing and compiling ``init`` and ``step``.
        problem: The problem of the method, with what its features have learned from batches. Pass
            this one to ``predict``.
        state: The last state of the method. If ``fit`` was given a problem, it is the state of the
            last method that ran: ``gnvpro`` if it has a field ``radius``, otherwise ``lbfgsvpro``
            or ``broydenvpro``.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> data = inputs, 2 * jnp.exp(-3 * inputs)
        >>> method = vp.lbfgsvpro(problem)
        >>> solution = vp.fit(method, jnp.ones(1), data, epochs=3)
        >>> solution
        Solution: BUDGET. The work, the seconds or the epochs allowed are used up.
          objective ... after 3 steps
          ...
        >>> solution.history["objective"].shape
        (4,)
        >>> method = method._replace(init=lambda *_: solution.state)
        >>> vp.fit(method, solution.theta, data, max_work=200).status.name
        'CONVERGED'
    """

    theta: Any
    w: jax.Array
    history: Mapping[str, np.ndarray]
    status: Status
    compile_seconds: float
    problem: Problem
    state: Any = None

    def __repr__(self) -> str:
        """How the run ended, in a few lines; the arrays are left to those who ask for them."""
        last = {name: column[-1] for name, column in self.history.items() if len(column)}
        steps = max(max(map(len, self.history.values()), default=0) - 1, 0)
        theta = jax.tree.leaves(self.theta)
        size = sum(map(np.size, theta))
        spent = [
            f"{last['work_units']:.6g} work units" if "work_units" in last else "",
            f"{last['seconds']:.3g} seconds" if "seconds" in last else "",
            f"{self.compile_seconds:.3g} seconds to compile",
        ]
        return "\n".join(
            [
                f"Solution: {self.status.name}. {self.status.message}",
                f"  objective {last.get('objective', math.nan):.6g} after {steps} steps",
                f"  {', '.join(filter(None, spent))}",
                f"  theta: {size} weights in {len(theta)} arrays; w: {np.shape(self.w)}",
                f"  history: {', '.join(self.history)}",
            ]
        )


@one_blas_thread()
def fit(
    method: Method | Problem,
    theta: Any,
    data: tuple,
    *,
    validation: tuple | None = None,
    metrics: Mapping[str, Callable] | None = None,
    evaluate_every: int = 1,
    max_work: float | None = None,
    max_seconds: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Solution:
    """Trains until the method ends or a budget is used up, whichever comes first.

    ``fit`` is a loop around the pure functions of a method: ``step``, or ``epoch`` if the method is
    stochastic. It keeps a history, evaluates validation data and metrics, measures run time apart
    from compile time and stops at a budget. The end of a budget, a stall and a non-finite objective
    are statuses, not exceptions; the last good weights are returned.

    If ``method`` is a problem, ``fit`` chooses among the full-batch methods:

    - ``gnvpro`` if its cheapest form, ``curvature="auto"``, is one that forms the curvature. The
      form ``"forward"``, which serves features that couple samples and takes one pass per weight,
      is used for at most 20 weights.
    - ``broydenvpro`` otherwise, and also after ``gnvpro`` if that stalls. It may stall in single
      precision or if the features have kinks.
    - ``lbfgsvpro`` in place of ``broydenvpro`` if the inverse Hessian would take more than 256 MiB
      (5,792 weights in double precision), or more than 1 GiB (11,585 weights) if the features
      couple samples.

    Features without a derivative in reverse mode are trained by ``gnvpro`` alone. If a second
    method takes over, its start adds an entry to the history; the budgets cover both methods.

    A call that triggers compilation is executed a second time, to separate run time from compile
    time. Usually only the first step is affected. On CPU, BLAS is limited to one thread while
    ``fit`` runs (see ``varprox.training.threads``).

    Arguments:
        method: A ``Method`` such as ``vp.gnvpro(problem)``, or a ``Problem``, for which ``fit``
            chooses.
        theta: The initial nonlinear weights θ, a pytree of float32 or float64 arrays.
        data: A pair (inputs, targets), batch first. Inputs are an array or a pytree of arrays.
            Targets are (batch, outputs); under a convolutional head, which only ``slimtrain``
            trains, they are images (batch, height, width, outputs).
        validation: A pair like ``data``, or None. Its loss is the column ``validation_loss``.
        metrics: A mapping from names to functions ``(predictions, targets) -> scalar``, or None.
            Each is evaluated on ``data`` and on ``validation`` and fills the columns
            ``train_<name>`` and ``validation_<name>``. The name ``"loss"`` is taken.
        evaluate_every: The number of steps or epochs between evaluations of the metrics and the
            validation loss, an integer ≥ 1. They are also evaluated at the start and at the end;
            elsewhere they are NaN.
        max_work: The budget in work units, a positive number or None. One unit is a forward or a
            backward pass over the data.
        max_seconds: The budget in seconds of run time, a positive number or None. Compilation and
            evaluation do not count.
        epochs: The budget in epochs, or in steps of a full-batch method, a positive number or None.
            At least one of the three budgets must be given. The run ends after the first step that
            reaches one.
        batch_size: The number of samples per batch, an integer ≥ 1, for a stochastic method; None
            for a full-batch method.
        seed: The seed of the random key for ``init``, an integer ≥ 0. It fixes the batches of a
            stochastic method; full-batch methods draw nothing.
        progress: Whether to show a progress bar.

    Returns:
        A ``Solution`` with the weights, the history, the status and the last state.

    Raises:
        TypeError: If ``method`` is neither a method nor a problem, if data, θ or features have the
            wrong type or dtype, if a metric does not return a number, or if a run is continued by
            another method.
        ValueError: If no budget is given, if an option is out of its range, or if the data do not
            fit the problem or are not finite. Also if a run is continued with θ of other shapes or,
            under a full-batch method, with other data or penalties. Bad data are refused before
            anything runs.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> data = inputs, 2 * jnp.exp(-3 * inputs)
        >>> solution = vp.fit(problem, jnp.ones(1), data, max_work=100)
        >>> print(solution.theta.round(2), solution.w.round(2), solution.status.name)
        [3.] [[2.]] CONVERGED
    """
    following: list[Method] = []
    if isinstance(method, Problem):
        method, *following = _default_methods(method, theta, data)
    if not isinstance(method, Method):
        raise TypeError(
            f"method: expected one such as varprox.gnvpro(problem), or a problem, "
            f"got {method!r:.80}"
        )
    budgets = {"max_work": max_work, "max_seconds": max_seconds, "epochs": epochs}
    limits = {name: _limit(name, value) for name, value in budgets.items()}
    if all(limit == math.inf for limit in limits.values()):
        raise ValueError("fit: expected a budget, max_work, max_seconds or epochs; got none")
    advance = _by_epochs(method, batch_size)
    check_data(method.problem, theta, data, images=method.epoch is not None)
    sets = {"train": data}
    if validation is not None:
        _check_validation(method, theta, data, validation)
        sets["validation"] = validation
    metrics = _check_metrics(metrics)
    evaluate_every = check_integer("evaluate_every", evaluate_every, least=1)
    progress = check_flag("progress", progress)

    key = jax.random.key(check_integer("seed", seed, least=0))
    state, seconds, compile_seconds = _timed_apart(method.init, theta, data, key)
    if not _is_own(method.init):
        _check_state(method, theta, data, state)
    table: list[dict] = []
    work_before = 0.0  # of the methods before this one

    def enter(state, info):
        """Adds a row to the table. Is it the last, by the status and by a budget?"""
        problem = _problem(method, state)
        row = info | _row(problem, state) | {"seconds": seconds}
        row["work_units"] += work_before
        used = {"max_work": row["work_units"], "max_seconds": seconds, "epochs": len(table)}
        ended, spent = state.status != Status.RUNNING, any(used[n] >= limits[n] for n in limits)
        if ended or spent or len(table) % evaluate_every == 0:
            row |= _evaluations(problem, state, sets, metrics)
        table.append(row)
        return ended, spent

    ended, spent = enter(state, {})
    with tqdm(disable=not progress, unit=" steps", bar_format=BAR) as bar:
        while True:
            while not (ended or spent):
                (state, info), elapsed, compiling = _timed_apart(advance, state, data)
                seconds, compile_seconds = seconds + elapsed, compile_seconds + compiling
                means = {k: float(np.mean(v)) for k, v in info._asdict().items()}
                ended, spent = enter(state, means)
                bar.set_description_str(_summary(table[-1], limits), refresh=False)
                bar.update()
            if spent or state.status != Status.STALLED or not following:
                break
            after = following.pop(0)
            init = partial(after.init, projection=state.projection)
            begun, elapsed, compiling = _timed_apart(init, state.theta, data, key)
            seconds, compile_seconds = seconds + elapsed, compile_seconds + compiling
            if begun.status != Status.RUNNING:
                break
            method, advance, state = after, after.step, begun
            work_before = table[-1]["work_units"]
            ended, spent = enter(state, {})

    status = Status(int(state.status))
    columns = dict.fromkeys(name for row in reversed(table) for name in row)
    history = {n: np.array([row.get(n, math.nan) for row in table]) for n in columns}
    return Solution(
        state.theta,
        state.w,
        history,
        Status.BUDGET if status == Status.RUNNING else status,
        compile_seconds,
        _problem(method, state),
        state,
    )


def fit_levels(
    make: Callable[[int, Solution | None], Method],
    theta: Any,
    data: tuple,
    *,
    levels: int,
    prolong: Callable[[Any], Any],
    max_work: float | Sequence[float] | None = None,
    **options,
) -> Solution:
    """Trains from coarse to fine: runs ``fit`` level by level and prolongs θ in between.

    A network that is a flow in time can be trained with few time steps, and so with few weights,
    first. Each level starts from the prolonged weights of the level before. The problems of the
    levels may differ in their penalties, not in their model.

    The history concatenates the levels, with a column ``level`` that counts from zero. Work units
    and seconds accumulate, although a work unit costs more on a finer level. The first entry of
    each level is its start, where the columns of the method's info are NaN. A level whose budget
    allows no step has no other entry. If a level ends with a non-finite objective, no further level
    runs.

    Arguments:
        make: A function ``(level, solution) -> method``. It gets the ``Solution`` of the level
            before, or None on level 0, and returns a ``Method``.
        theta: The initial nonlinear weights θ of level 0, a pytree.
        data: A pair (inputs, targets), as for ``fit``.
        levels: The number of levels, an integer ≥ 1.
        prolong: A function that maps the θ of one level to the next, such as
            ``varprox.networks.prolong``, which doubles the time steps of a network.
        max_work: The budget of each level in work units, or a sequence with one budget per level.
        **options: The other options of ``fit``. ``max_seconds`` and ``epochs`` also are budgets of
            each level.

    Returns:
        The ``Solution`` of the last level, with the history and the compile time of all levels.

    Raises:
        TypeError: If ``make`` is not a function, and as ``fit`` does.
        ValueError: If ``levels`` is not an integer ≥ 1, if ``max_work`` is a sequence with another
            number of entries, and as ``fit`` does.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> def features(theta, z):  # one Euler step per weight
        ...     for weight in theta:
        ...         z = z + jnp.tanh(weight * z) / len(theta)
        ...     return z
        >>> problem = vp.Problem(vp.Separable(features), vp.least_squares(), theta_penalty=1e-3)
        >>> inputs = jnp.linspace(-1, 1, 20)[:, None]
        >>> solution = vp.fit_levels(
        ...     lambda level, before: vp.lbfgsvpro(problem), jnp.ones(1), (inputs, inputs**3),
        ...     levels=2, prolong=lambda theta: jnp.repeat(theta, 2), epochs=2,
        ... )
        >>> solution.theta.shape, solution.history["level"].tolist()
        ((2,), [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    """
    if not callable(make):
        raise TypeError(f"make: expected a function (level, solution) -> Method, got {make!r:.80}")
    levels = check_integer("levels", levels, least=1)
    budgets = list(max_work) if isinstance(max_work, Sequence) else levels * [max_work]
    if len(budgets) != levels:
        raise ValueError(f"max_work: expected {levels} numbers, one a level, got {max_work!r}")
    found: list[Solution] = []
    for level, budget in enumerate(budgets):
        before = found[-1] if found else None
        start = theta if before is None else prolong(before.theta)
        found.append(fit(make(level, before), start, data, max_work=budget, **options))
        if found[-1].status == Status.NON_FINITE:
            break
    return join(found)


def join(levels: Sequence[Solution]) -> Solution:
    """The solution of the last of several levels with the history of them all, as `fit_levels` has
    it. The first may be a solution of `fit_levels` itself."""
    histories, level, spent = [], 0.0, {"work_units": 0.0, "seconds": 0.0}
    for solution in levels:
        own = {"level": np.zeros(len(solution.history["seconds"]))} | dict(solution.history)
        own["level"] = own["level"] + level
        level = own["level"][-1] + 1
        own |= {name: own[name] + before for name, before in spent.items()}
        spent = {name: own[name][-1] for name in spent}
        histories.append(own)
    columns = dict.fromkeys(name for own in reversed(histories) for name in own)

    def whole(name):  # a level without a step has no columns of what steps do
        parts = [own.get(name, np.full(len(own["level"]), math.nan)) for own in histories]
        return np.concatenate(parts)

    return levels[-1]._replace(
        history={name: whole(name) for name in columns},
        compile_seconds=sum(solution.compile_seconds for solution in levels),
    )


def _by_epochs(method, batch_size):
    """What takes a state and the data one entry of the history further."""
    if method.epoch is None:
        if batch_size is not None:
            raise ValueError(
                f"batch_size: expected None for a method that takes all of the data in every step, "
                f"got {batch_size!r}"
            )
        return method.step
    if batch_size is None:
        raise ValueError("batch_size: expected an integer ≥ 1 for a stochastic method, got None")
    return partial(method.epoch, batch_size=batch_size)


def _problem(method, state):
    """That of the method, with what its features have learned."""
    if method.epoch is None:
        return method.problem
    return with_learned(method.problem, state.learned)


def _default_methods(problem, theta, data):
    """What is run where no method is named: the next of these where one has stalled."""
    check_data(problem, theta, data, full_batch=True)
    _, reverse = derivatives(problem, theta, data[0])
    forms = usable(problem, theta, data[0])
    # Where samples are coupled pairs are not whitened, and the whole is worth more.
    most = WHOLE if Form.DENSE in forms else MAX_BYTES
    by_gradients = broydenvpro if bytes_of_inverse(theta) <= most else lbfgsvpro
    if reverse and not forms:
        return [by_gradients(problem)]
    form = select_form(problem, theta, data)
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    if reverse and (form is Form.KRYLOV or (form is Form.FORWARD and size > FEW)):
        return [by_gradients(problem)]
    return [gnvpro(problem), by_gradients(problem)] if reverse else [gnvpro(problem)]


def _timed(fn, *args):
    begin = time.perf_counter()
    result = jax.block_until_ready(fn(*args))
    return result, time.perf_counter() - begin


def _timed_apart(fn, *args):
    """The result, the run time and the time to compile; what has to be compiled is run twice."""
    compiled = False

    def listen(event, duration_secs, **_):
        nonlocal compiled
        compiled |= event == COMPILATION

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        result, first = _timed(fn, *args)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if not compiled:
        return result, first, 0.0
    result, second = _timed(fn, *args)
    return result, second, max(first - second, 0.0)


def _row(problem, state):
    """The columns of the history that every state has."""
    penalties = float(_penalties(problem, state.theta, state.w))
    return {
        "objective": float(state.objective),
        "work_units": float(state.work_units),
        "train_loss": float(state.objective) - penalties,
    }


def _evaluations(problem, state, sets, metrics):
    """The columns of the history for which the network is evaluated."""
    row = {}
    for name, (inputs, targets) in sets.items():
        if name == "train" and not metrics:
            continue  # one forward pass less
        predictions = _predict(problem, state.theta, state.w, inputs)
        if name == "validation":
            row["validation_loss"] = _loss(problem, predictions, targets)
        for metric, fn in metrics.items():
            row[f"{name}_{metric}"] = _scalar(metric, fn(predictions, targets))
    return {name: float(value) for name, value in row.items()}


def _scalar(metric, value):
    try:
        if np.shape(value) == ():
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"metrics: expected a number from {metric!r}, got {value!r:.80}")


@jax.jit
def _penalties(problem, theta, w):
    return problem.penalty(theta) + problem.penalty_on_w(w)


@jax.jit
def _loss(problem, predictions, targets):
    return problem.loss.value(predictions, targets)


_predict = jax.jit(full_products(predict))


def _summary(row, limits):
    """The line of the progress bar: how much of the budget is spent, and how the run stands."""
    shown = [f"objective {row['objective']:.4g}"]
    shown += [f"{k.replace('_', ' ')} {row[k]:.4g}" for k in row if k.startswith("validation")]
    if limits["max_work"] < math.inf:
        shown.append(f"{row['work_units']:.0f} of {limits['max_work']:.0f} work units")
    return ", ".join(shown)


def _limit(name, value):
    if value is None:
        return math.inf
    number = not isinstance(value, bool) and hasattr(value, "__float__") and np.ndim(value) == 0
    if not number or not float(value) > 0:
        raise ValueError(f"{name}: expected a positive number or None, got {value!r}")
    return float(value)


def _check_metrics(metrics):
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics: expected a mapping of names to functions, got {metrics!r}")
    for name, metric in (metrics or {}).items():
        if not isinstance(name, str) or name == "loss":
            raise ValueError(
                f"metrics: expected names other than 'loss', which the history has, got {name!r}"
            )
        if not callable(metric):
            raise TypeError(f"metrics: expected a function for {name!r}, got {metric!r}")
    return dict(metrics or {})


def _is_own(init):
    """Does a function of the package make the state from what it is given?"""
    return getattr(getattr(init, "func", None), "__module__", "").startswith("varprox.")


def _check_state(method, theta, data, state):
    """Refuses a state that belongs to other data, to another problem or another method."""
    needed = ("theta", "w", "objective", "status", *("learned",) * (method.epoch is not None))
    if missing := [name for name in needed if not hasattr(state, name)]:
        raise TypeError(
            "method: expected the one whose state is taken up, got another: this state has no "
            f"{missing[0]!r}"
        )
    if _shapes(state.theta) != _shapes(theta):
        raise ValueError(
            "theta: expected arrays like those of the state that is taken up, got others"
        )
    if method.epoch is not None or state.status == Status.NON_FINITE:
        return
    try:
        fits = _shapes(jax.eval_shape(method.step, state, data)[0]) == _shapes(state)
    except (TypeError, ValueError) as error:
        if str(error).startswith("state:"):
            raise
        fits = False
    except AttributeError as error:  # of a state that has not the fields that the step reads
        raise TypeError(
            f"method: expected the one whose state is taken up, got another: {error}"
        ) from error
    if not fits:
        raise ValueError("data: expected shapes as those of the state that is taken up, got others")
    inputs, targets = data
    predictions = _predict(method.problem, state.theta, state.w, inputs)
    now = float(_loss(method.problem, predictions, targets))
    now += float(_penalties(method.problem, state.theta, state.w))
    zero = float(_loss(method.problem, jnp.zeros_like(targets), targets))
    then = float(state.objective)
    # Where the rows are badly conditioned, rounding may move predictions by √eps of the targets,
    # and the objective by twice the geometric mean of itself and of eps times that for W = 0.
    rounding = float(jnp.finfo(predictions.dtype).eps) * max(map(abs, (zero, now, then)))
    tolerance = 2 * math.sqrt(rounding * max(abs(now), abs(then))) + rounding
    if not (math.isfinite(now) and abs(now - then) <= tolerance):
        raise ValueError(
            "data: expected those of the state that is taken up, and the same problem; with these "
            f"its objective is {now:g}, got a state that says {then:g}"
        )


def _shapes(tree):
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _check_validation(method, theta, data, validation):
    try:
        check_data(method.problem, theta, validation, images=method.epoch is not None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"validation: {error}") from None
    expected = data[1].shape[1:]
    if validation[1].shape[1:] != expected:
        sizes = ", ".join(map(str, expected))
        raise ValueError(
            f"validation: expected targets of shape (batch, {sizes}), as the data have, "
            f"got {validation[1].shape}"
        )
