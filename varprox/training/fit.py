"""The loop a person runs: budgets, history, validation, checkpoints and progress around a method's
``init`` and ``step``.
"""

import importlib
import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from varprox.checks import check_flag, check_integer, check_number
from varprox.methods.method import Method, Status
from varprox.problem.data import check_data
from varprox.problem.hosted import shapes_of
from varprox.problem.model import Problem
from varprox.training import storage
from varprox.training.arguments import (
    check_concrete,
    check_function,
    check_limits,
    check_metrics,
    check_start,
    check_state,
    check_stop_when,
    check_validation,
    epoch_or_step,
)
from varprox.training.choice import default_methods
from varprox.training.clock import timed
from varprox.training.evaluation import evaluations, problem_at, row_of
from varprox.training.history import History
from varprox.training.solution import Best, Solution, load
from varprox.training.threads import one_blas_thread

BAR, COLUMNS = "{percentage:3.0f}%|{bar:10}| {elapsed} {desc}", 80


@one_blas_thread()
def fit(
    method: Method | Problem,
    theta: Any,
    data: tuple,
    *,
    start: Solution | None = None,
    validation: tuple | None = None,
    metrics: Mapping[str, Callable] | None = None,
    evaluate_every: int = 1,
    max_work: float | None = None,
    max_seconds: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    stop_when: float | None = None,
    patience: int | None = None,
    callback: Callable | None = None,
    checkpoint: str | os.PathLike | None = None,
    every: float = 600.0,
    seed: int = 0,
    progress: bool = False,
) -> Solution:
    """Trains until the method ends or a budget is used up, whichever comes first.

    ``fit`` is a loop around the pure functions of a method: ``step``, or ``epoch`` if the method is
    stochastic. It keeps a history, evaluates validation data and metrics, measures run time apart
    from compile time and stops at a budget. The end of a budget, a stall, a non-finite objective
    and Ctrl-C are statuses, not exceptions; the last good weights are returned. An exception of a
    metric, a callback or the features has the attribute ``solution``: what the run had found.

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

    Seconds are those of ``init`` and ``step``, less what JAX says that it spent on compiling them.
    Compilation, metrics, validation and callbacks do not count, so that a run ends at the same step
    whatever is watched, and whether or not its functions had been compiled before. The first call
    of a compiled function still takes some milliseconds more than later ones. On CPU, BLAS is
    limited to one thread while ``fit`` runs (see ``varprox.training.threads``).

    A run that goes on, from ``start`` or from a ``checkpoint``, takes the steps that it would have
    taken without the break, to the last bit, minibatches included. Its history and its budgets are
    those of the whole run.

    Arguments:
        method: A ``Method`` such as ``vp.gnvpro(problem)``, or a ``Problem``, for which ``fit``
            chooses.
        theta: The initial nonlinear weights θ, a pytree of float32 or float64 arrays.
        data: A pair (inputs, targets), or (inputs, targets, weights), batch first. Inputs are an
            array or a pytree of arrays. Targets are (batch, outputs); under a convolutional head,
            which only ``slimtrain`` trains, they are images (batch, height, width, outputs).
            Weights are numbers ≥ 0, or True and False, by which the terms of the loss are
            multiplied before their mean over all samples is taken: one for each sample, (batch,),
            or, under ``least_squares`` and ``logistic``, one for each entry, shaped like the
            targets. A weight of 0 leaves a gap, where the target may be NaN.
        start: The ``Solution`` to go on from, of the same method, problem and data; None begins at
            ``theta``. Budgets count from the beginning of that run, so a larger one is needed to go
            on. For other data see ``method.init``.
        validation: Data like ``data``, or None. Their loss is the column ``validation_loss``.
        metrics: A mapping from names to functions ``(predictions, targets) -> scalar``, or None.
            If the data have weights, they are a third argument, (batch, 1) or shaped like the
            targets.
            Each is evaluated on ``data`` and on ``validation`` and fills the columns
            ``train_<name>`` and ``validation_<name>``. The name ``"loss"`` is taken.
        evaluate_every: The number of steps or epochs between evaluations of the metrics and the
            validation loss, an integer ≥ 1. They are also evaluated at the start and at the end;
            elsewhere they are NaN.
        max_work: The budget in work units, a positive number or None. One unit is a forward or a
            backward pass over the data.
        max_seconds: The budget in seconds of run time, a positive number or None. Compilation,
            evaluation and callbacks do not count.
        epochs: The budget in epochs, or in steps of a full-batch method, a positive number or None.
            At least one of the three budgets must be given. The run ends after the first step that
            reaches one.
        batch_size: The number of samples per batch, an integer ≥ 1, for a stochastic method; None
            for a full-batch method.
        stop_when: The objective at which the run ends with the status STOPPED, a number or None.
        patience: The number of evaluations without a lower validation loss after which the run ends
            with the status STOPPED, an integer ≥ 1, or None. ``solution.best`` has the weights with
            the lowest validation loss, with or without ``patience``.
        callback: A function ``(row, solution) -> stop`` that is called with every new entry of the
            history, a dict, and with the ``Solution`` so far; first for the start. The run ends
            with the status STOPPED once it returns something true.
        checkpoint: The path of a folder in which the run is kept while it lasts; None keeps
            nothing. A run that finds an earlier one there goes on from it: a process that was
            killed is simply started again. See ``Solution.save`` for what the folder may hold.
        every: The seconds between two checkpoints, a number ≥ 0. There is one at the end, too.
        seed: The seed of the random key for ``init``, an integer ≥ 0. It fixes the batches of a
            stochastic method; full-batch methods draw nothing.
        progress: Whether to show a progress bar: the share of the nearest budget that is spent, and
            how the run stands.

    Returns:
        A ``Solution`` with the weights, the history, the status and the last state.

    Raises:
        FileExistsError: If the folder for checkpoints has something else in it.
        TypeError: If ``method`` is neither a method nor a problem, if data, θ or features have the
            wrong type or dtype, if data or θ are traced, as inside ``jit``, if a metric does not
            return a number, or if a run is continued by another method.
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
    check_concrete(theta, data)
    methods = default_methods(method, theta, data) if isinstance(method, Problem) else [method]
    if not isinstance(methods[0], Method):
        raise TypeError(
            f"method: expected one such as varprox.gnvpro(problem), or a problem, "
            f"got {method!r:.80}"
        )
    limits = check_limits("fit", max_work=max_work, max_seconds=max_seconds, epochs=epochs)
    stochastic = methods[0].epoch is not None
    theta, data = check_data(methods[0].problem, theta, data, stochastic=stochastic)
    sets = {"train": data}
    if validation is not None:
        sets["validation"] = check_validation(methods[0], theta, data, validation)
    elif patience is not None:
        raise ValueError(f"patience: expected None without validation data, got {patience!r}")
    asked = _Asked(
        data=data,
        sets=sets,
        metrics=check_metrics(metrics),
        evaluate_every=check_integer("evaluate_every", evaluate_every, least=1),
        limits=limits,
        stop_when=check_stop_when(stop_when),
        patience=None if patience is None else check_integer("patience", patience, least=1),
        callback=callback if callback is None else check_function("callback", callback),
        key=jax.random.key(check_integer("seed", seed, least=0)),
    )
    every = check_number("every", every)
    run = _Run(methods, batch_size, asked)
    if checkpoint is not None and storage.exists(checkpoint):
        start = load(checkpoint, methods[0].problem, theta)
    with _bar(check_flag("progress", progress)) as bar:
        if start is None:
            run.begin(theta)
        else:
            run.take_up(check_start(start), theta)
        if checkpoint is not None:
            run.solution().save(checkpoint)  # a folder that cannot be used is refused at once
        saved = time.monotonic()
        try:
            try:
                while run.status == Status.RUNNING:
                    run.step()
                    _show(bar, run, asked)
                    if checkpoint is not None and time.monotonic() - saved >= every:
                        run.solution().save(checkpoint)
                        saved = time.monotonic()
            except KeyboardInterrupt:
                run.status = Status.INTERRUPTED
            run.evaluate()
        except Exception as error:  # of a metric, a callback or the features
            attach(error, run.solution())
            raise
        if checkpoint is not None:
            run.solution().save(checkpoint)
    return run.solution()


def attach(error: Exception, solution: Solution) -> None:
    """Gives an exception the attribute `solution`: what has been found by then."""
    if not hasattr(error, "solution"):
        error.add_note("What the run had found is the attribute `solution` of this exception.")
    error.solution = solution  # type: ignore[attr-defined]


class _Asked(NamedTuple):
    """The arguments of `fit`, once they have been checked."""

    data: tuple
    sets: Mapping[str, tuple]  # that the network is evaluated on
    metrics: Mapping[str, Callable]
    evaluate_every: int
    limits: Mapping[str, float]
    stop_when: float
    patience: int | None
    callback: Callable | None
    key: jax.Array


class _Run:
    """A run of the first of some methods, and of the next of them where it has stalled."""

    def __init__(self, methods: list[Method], batch_size: int | None, asked: _Asked) -> None:
        self.method, *self.following = methods
        self.advance = epoch_or_step(self.method, batch_size)
        self.asked = asked
        self.status = Status.RUNNING
        self.state: Any = None
        self.history = History()
        self.seconds = self.compile_seconds = 0.0
        self.work_before = 0.0  # of the methods before this one
        self.best: Best | None = None
        self.evaluated = -1  # the last entry that was

    def begin(self, theta: Any) -> None:
        """The start at θ, which is the first entry of the history."""
        asked = self.asked
        state = self._timed(self.method.init, theta, asked.data, asked.key)
        self._enter(state, {})

    def take_up(self, start: Solution, theta: Any) -> None:
        """The end of another run; θ shows the shapes that are expected."""
        while self.following and self.method.name != start.method:
            self.method = self.following.pop(0)
            self.advance = self.method.step
        check_state(self.method, theta, self.asked.data, start.state)
        self.state, self.best = start.state, start.best
        self.history = History(start.history)
        self.evaluated = len(self.history) - 1
        last = self.history.last()
        self.seconds, self.compile_seconds = last["seconds"], start.compile_seconds
        self.work_before = last["work_units"] - float(self.state.work_units)
        self.status = self._status()

    def step(self) -> None:
        """One more entry of the history: a step, an epoch, or the start of the next method."""
        if int(self.state.status) == Status.STALLED:
            self._hand_over()
            return
        state, info = self._timed(self.advance, self.state, self.asked.data)
        self._enter(state, {k: float(np.mean(v)) for k, v in info._asdict().items()})

    def evaluate(self) -> None:
        """The validation loss and the metrics of the last entry, unless it has them."""
        step = len(self.history) - 1
        if self.evaluated == step:
            return
        state, problem = self.state, problem_at(self.method, self.state)
        found = evaluations(problem, state, self.asked.sets, self.asked.metrics)
        self.history.update(found)
        self.evaluated = step
        loss = found.get("validation_loss", math.inf)
        if loss < (math.inf if self.best is None else self.best.validation_loss):
            self.best = Best(state.theta, state.w, problem, loss, step)

    def solution(self) -> Solution:
        """What has been found so far."""
        return Solution(
            self.state.theta,
            self.state.w,
            self.history.columns(),
            self.status,
            self.compile_seconds,
            problem_at(self.method, self.state),
            self.state,
            self.method.name,
            self.best,
            shapes_of(self.asked.data[0]),
        )

    def _hand_over(self):
        """To the next method, unless it ends where it begins."""
        after = self.following.pop(0)
        init = partial(after.init, projection=self.state.projection)
        begun = self._timed(init, self.state.theta, self.asked.data, self.asked.key)
        if begun.status != Status.RUNNING:
            self.status = Status.STALLED
            return
        self.method, self.advance = after, after.step
        self.work_before = self.history.last()["work_units"]
        self._enter(begun, {})

    def _timed(self, fn, *args):
        result, seconds, compiling = timed(fn, *args)
        self.seconds += seconds
        self.compile_seconds += compiling
        return result

    def _enter(self, state, info):
        row = info | row_of(problem_at(self.method, state), state) | {"seconds": self.seconds}
        row["work_units"] += self.work_before
        self.state = state
        self.history.append(row)
        if (len(self.history) - 1) % self.asked.evaluate_every == 0:
            self.evaluate()
        self.status = self._status()
        callback = self.asked.callback
        if callback is not None and callback(self.history.last(), self.solution()):
            self.status = Status.STOPPED if self.status == Status.RUNNING else self.status

    def _status(self):
        """Why the last entry is the end of the run, or that it is not."""
        asked, row, step = self.asked, self.history.last(), len(self.history) - 1
        status = Status(int(self.state.status))
        spent = any(used >= asked.limits[name] for name, used in spending(row, step).items())
        if status != Status.RUNNING and (spent or status != Status.STALLED or not self.following):
            return status
        if spent:
            return Status.BUDGET
        waited = step - (0 if self.best is None else self.best.step)
        idle = asked.patience is not None and waited >= asked.patience * asked.evaluate_every
        stopped = idle or row["objective"] <= asked.stop_when
        return Status.STOPPED if stopped else Status.RUNNING


def spending(row: Mapping[str, float], step: int) -> dict[str, float]:
    """How much of each budget is spent with an entry of the history."""
    return {"max_work": row["work_units"], "max_seconds": row["seconds"], "epochs": step}


def _bar(shown):
    """A progress bar that says so while the first step is being compiled."""
    # `tqdm.auto` warns on import in a notebook that has no widgets.
    tqdm = importlib.import_module("tqdm.auto" if shown else "tqdm").tqdm
    bar = tqdm(disable=not shown, total=100, ncols=COLUMNS, bar_format=BAR)
    bar.set_description_str("compiling")
    return bar


def _show(bar, run, asked):
    """How much of the budget is spent, and how the run stands."""
    row = run.history.last()
    spent = spending(row, len(run.history) - 1)
    share = max(spent[name] / limit for name, limit in asked.limits.items())
    shown = [f"objective {row['objective']:.4g}"]
    shown += [f"{k.replace('_', ' ')} {row[k]:.4g}" for k in row if k.startswith("validation")]
    bar.set_description_str(", ".join(shown), refresh=False)
    bar.n = 100 if run.status != Status.RUNNING else min(100 * share, 100)
    bar.refresh()
