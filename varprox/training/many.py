"""Many runs of one method at once, by `vmap`: from many starts, or on many sets of data."""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varprox.checks import check_flag, check_integer
from varprox.methods.method import Method, Status
from varprox.problem.data import automatic, check_data
from varprox.problem.hosted import shapes_of
from varprox.training.arguments import check_concrete, check_limits, epoch_or_step
from varprox.training.clock import timed
from varprox.training.evaluation import penalties, problem_at
from varprox.training.solution import Solution
from varprox.training.threads import one_blas_thread


@one_blas_thread()
def fit_many(
    method: Method,
    thetas: Any,
    data: tuple,
    *,
    own_data: bool = False,
    max_work: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[Solution]:
    """Trains from many starts, or on many sets of data, at once.

    All runs take their steps together, in one compiled function. A run that has ended stays as it
    is while others go on. Where most of the time goes into calls and not into arithmetic, this is
    faster than one run after the other: on one core 16 networks with 100 samples and 8 units took a
    fifth to a twelfth of the time, and half of it under ``gnvpro`` in Krylov spaces; with 200
    samples and 16 units a half to a seventh. Rounding differs from that of ``fit``.

    Arguments:
        method: A ``Method``, such as ``vp.gnvpro(problem)``.
        thetas: The initial nonlinear weights of all runs, a pytree whose arrays have one more axis
            in front, of the number of runs.
        data: The data for all runs, as for ``fit``; if ``own_data``, the arrays have one more axis
            in front, too.
        own_data: Whether each run has its own data.
        max_work: The budget of each run in work units, a positive number or None.
        epochs: The budget of each run in epochs, or in steps of a full-batch method, a positive
            number or None. At least one of the two budgets must be given.
        batch_size: The number of samples per batch, for a stochastic method; None for a full-batch
            method.
        seed: The seed of the random keys, of which each run has its own, an integer ≥ 0.

    Returns:
        A list with the ``Solution`` of each run. Its history and its status are its own;
        ``compile_seconds`` and the column ``seconds`` are those of all runs together.

    Raises:
        TypeError: If ``method`` is not a method, and as ``fit`` does.
        ValueError: If the arrays do not have the same number of runs in front, if no budget is
            given, and as ``fit`` does.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> method = vp.lbfgsvpro(vp.Problem(model, vp.least_squares()))
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> rates = jnp.array([2.0, 3.0, 4.0])  # one set of targets for each
        >>> targets = 2 * jnp.exp(-rates[:, None, None] * inputs)
        >>> data = jnp.broadcast_to(inputs, (3, 20, 1)), targets
        >>> found = vp.fit_many(method, jnp.ones((3, 1)), data, own_data=True, max_work=200)
        >>> [round(float(solution.theta[0]), 2) for solution in found]
        [2.0, 3.0, 4.0]
        >>> {solution.status.name for solution in found}
        {'CONVERGED'}
    """
    if not isinstance(method, Method):
        raise TypeError(f"method: expected one such as varprox.gnvpro(problem), got {method!r:.80}")
    check_concrete(thetas, data)
    thetas, data = automatic((thetas, data))
    own_data = check_flag("own_data", own_data)
    limits = check_limits("fit_many", max_work=max_work, epochs=epochs)
    epoch_or_step(method, batch_size)  # refuses a size of batches that does not suit the method
    count = _runs(thetas, data if own_data else ())
    stochastic = method.epoch is not None
    for run in range(count if own_data else 1):
        of_run = _member(data, run) if own_data else data
        check_data(method.problem, _member(thetas, run), of_run, stochastic=stochastic)

    keys = jax.random.split(jax.random.key(check_integer("seed", seed, least=0)), count)
    begin, step = _compiled(method.init, method.epoch or method.step, batch_size, own_data)
    state, seconds, compile_seconds = timed(begin, thetas, data, keys)
    rows = [_row(method, state) | {"seconds": np.full(count, seconds)}]
    ends = np.full(count, np.iinfo(int).max)  # the last entry of each run
    while True:
        spent = rows[-1]["work_units"] >= limits["max_work"]
        spent |= len(rows) - 1 >= limits["epochs"]
        ended = spent | (np.asarray(state.status) != Status.RUNNING)
        ends = np.where(ended, np.minimum(ends, len(rows) - 1), ends)
        if ended.all():
            break
        (state, info), elapsed, compiling = timed(step, state, data, jnp.asarray(~ended))
        seconds, compile_seconds = seconds + elapsed, compile_seconds + compiling
        means = {k: np.asarray(v).reshape(count, -1).mean(1) for k, v in info._asdict().items()}
        rows.append(means | _row(method, state) | {"seconds": np.full(count, seconds)})
    of_run = _member(data, 0) if own_data else data
    inputs = shapes_of(of_run[0])
    return [
        _solution(method, _member(state, run), rows[: ends[run] + 1], run, compile_seconds, inputs)
        for run in range(count)
    ]


@lru_cache(maxsize=8)
def _compiled(init, advance, batch_size, own_data):
    """`init` and a step or an epoch of all runs, compiled once for the functions of a method."""
    axis = 0 if own_data else None
    options = {} if batch_size is None else {"batch_size": batch_size}
    together = jax.vmap(partial(advance, **options), in_axes=(0, axis))

    @jax.jit
    def step(state, data, goes_on):
        after, info = together(state, data)
        return jax.vmap(_chosen)(goes_on, after, state), info

    return jax.jit(jax.vmap(init, in_axes=(0, axis, 0))), step


def _runs(thetas, data):
    """How many there are."""
    counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves((thetas, data))}
    if len(counts) != 1 or counts == {()} or counts == {(0,)}:
        sizes = ", ".join(map(str, sorted(counts)))
        raise ValueError(
            "thetas: expected arrays, with those of data of one's own, whose first axis is the "
            f"number of runs, the same for all; got first axes {sizes or 'of no array'}"
        )
    ((count,),) = counts
    return count


def _member(tree, run):
    return jax.tree.map(lambda leaf: leaf[run], tree)


def _chosen(condition, new, old):
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


_all_penalties = jax.jit(jax.vmap(penalties, in_axes=(None, 0, 0)))


def _row(method, state):
    """The columns that every state has, of all runs."""
    extra = _all_penalties(method.problem, state.theta, state.w)
    objective = np.asarray(state.objective, float)
    return {
        "objective": objective,
        "work_units": np.asarray(state.work_units, float),
        "train_loss": objective - np.asarray(extra, float),
    }


def _solution(method, state, rows, run, compile_seconds, inputs):
    columns = dict.fromkeys(name for row in rows for name in row)
    missing = np.full(run + 1, np.nan)
    history = {n: np.array([row.get(n, missing)[run] for row in rows]) for n in columns}
    status = Status(int(state.status))
    return Solution(
        state.theta,
        state.w,
        history,
        Status.BUDGET if status == Status.RUNNING else status,
        compile_seconds,
        problem_at(method, state),
        state,
        method.name,
        inputs=inputs,
    )
