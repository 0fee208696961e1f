"""The loop a person runs: budgets, history, validation and progress around a method's `init` and
`step`.

Imports the methods, for the one it takes where none is named, and what is below them.
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
from varprox.gnvpro import gnvpro, select_form
from varprox.method import Method, Status
from varprox.model import Problem, check_data, derivatives, predict
from varprox.precision import full_products
from varprox.quadratic import Form, usable
from varprox.quasi_newton import MAX_BYTES, broydenvpro, bytes_of_inverse, lbfgsvpro
from varprox.slimtrain import with_learned
from varprox.threads import one_blas_thread

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
    """What a run ends with.

    `history` maps column names to float arrays with one entry a step, the first being the start:
    `objective`, `train_loss` (the objective without penalties), `work_units` and `seconds`
    (cumulative; compilation and evaluation are left out), the fields of the method's info, and
    `validation_loss` and metrics where asked for, NaN in entries where they were not evaluated.
    `status` says why the run ended; `compile_seconds` is the time to trace and compile `init` and
    `step`. `problem` is that of the method, its features having seen the batches they were trained
    on: what `predict` wants. `state` is the method's: a run goes on where it ended with
    `method._replace(init=lambda *_: state)`. Of a problem given in place of a method it is the
    state of the last method, `gnvpro` if it has a `radius`, `lbfgsvpro` or `broydenvpro` else.

    Of a stochastic method an entry is an epoch: its columns are means over the steps, and that of
    the start has no objective.
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

    In place of a method a problem may be given. It is trained with `gnvpro` where θ is small enough
    for the curvature to be formed, in a way that the features allow and, where they couple samples,
    by few passes. Where this has stalled, as it may in single precision and where the features have
    kinks, and elsewhere from the start, it is trained by gradients: with `broydenvpro` up to some
    thousand weights, and beyond with `lbfgsvpro`. The first entry of the history that belongs to a
    second method is that of its start.

    `data` and `validation` are pairs (inputs, targets). Budgets: `max_work` in work units (one
    forward or one backward pass over the data is one), `max_seconds` of run time, `epochs`, which
    are the steps of a full-batch method; at least one must be given. Stochastic methods, and no
    others, want a `batch_size`. `metrics` maps names to functions
    (predictions, targets) -> scalar, evaluated on the data and on `validation`, to the columns
    `train_<name>` and `validation_<name>`. These and the validation loss are evaluated at the
    start, after every `evaluate_every` steps, or epochs, and at the end, and are NaN elsewhere.

    A step, or epoch, that has to be compiled is run twice, as the first one mostly has. On CPU the
    threads of BLAS are limited to one while `fit` runs (see `varprox.threads`). Bad data raise
    TypeError or ValueError before anything runs, and so does a state that is taken up, by a method
    that sees all of the data in every step, with other data or penalties than it was made with. The
    end of the budget, a stall and a non-finite objective are statuses, not exceptions; the last
    good weights come back.
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
    """`fit` from level to level, each beginning at the weights of the one before, prolonged.

    On level k the method is `make(k, solution)` with the solution of level k − 1, None on level 0:
    problems may differ in their penalties, not in their model. `prolong` carries θ over, such as
    `varprox.networks.prolong`, which doubles the steps of a network in time. Options are those of
    `fit`, and so are the budgets, on every level anew; of `max_work` there may be one for each.

    The history is that of all levels, one below the other, with a column `level`; work units and
    seconds add up, though a work unit costs more on a finer level. The first entry of each level
    belongs to the prolonged weights, with NaN for what steps report; a level whose budget allows no
    step has no other. A level that ends with a non-finite objective is the last.
    Raises as `fit` does, TypeError for a `make` that cannot be called, and ValueError for `levels`
    below one or not as many budgets as levels.
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
