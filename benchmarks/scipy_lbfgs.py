"""SciPy's L-BFGS-B on all weights, the strongest rival on small problems.

It cannot be taken apart into steps, so it has a loop of its own and reports what `vp.fit` would.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

from benchmarks.baselines import MEMORY
from benchmarks.experiment import evaluate
from varprox import Problem, Solution, Status
from varprox.problem.model import objective


@jax.jit
def _value_and_gradient(problem, like, x, data):
    """Φ and its gradient at the flat vector x, in the order of the weights `like`."""
    _, unravel = ravel_pytree(like)
    return jax.value_and_grad(lambda x: objective(problem, *unravel(x), data))(x)


def scipy_lbfgs(
    problem: Problem,
    theta: Any,
    w: jax.Array,
    data: tuple,
    *,
    stop: Callable[[float, float, float], bool],
    validation: tuple | None = None,
    metrics: Mapping[str, Callable] | None = None,
) -> Solution:
    """L-BFGS-B with 20 pairs on (θ, W) from the given weights, with the history that `fit` keeps,
    until `stop(objective, work units, seconds)`.

    Φ and its gradient are one compiled function, 2 work units a call, in the dtype of θ; SciPy's
    own arithmetic is in double precision. `seconds` counts both; the columns that need further
    evaluations are made when the run is over.
    """
    weights = theta, w
    flat, unravel = ravel_pytree(weights)
    start = np.asarray(flat, np.float64)
    evaluations = 0

    def value_and_gradient(x):
        nonlocal evaluations
        evaluations += 1
        value, gradient = _value_and_gradient(problem, weights, x.astype(flat.dtype), data)
        value, gradient = float(value), np.asarray(gradient, np.float64)
        if evaluations == 1:
            path.append((start, value, 2, time.perf_counter() - begin))
        return value, gradient

    def record(intermediate_result):
        spent = time.perf_counter() - begin
        found = intermediate_result
        path.append((found.x.copy(), float(found.fun), 2 * evaluations, spent))
        if stop(*path[-1][1:]):
            raise StopIteration

    times = [time.perf_counter()]
    for _ in range(2):  # the first call compiles
        jax.block_until_ready(_value_and_gradient(problem, weights, flat, data))
        times.append(time.perf_counter())
    first, second = np.diff(times)

    path: list[tuple] = []
    begin = time.perf_counter()
    minimize(
        value_and_gradient,
        start,
        jac=True,
        method="L-BFGS-B",
        callback=record,
        options={"maxcor": MEMORY, "maxiter": 10**9, "maxfun": 10**9, "ftol": 0.0, "gtol": 0.0},
    )

    sets = {"train": data} | ({} if validation is None else {"validation": validation})
    rows = []
    for x, value, work_units, seconds in path:
        weights = unravel(jnp.asarray(x, flat.dtype))
        row = {"objective": value, "work_units": work_units, "seconds": seconds}
        rows.append(row | evaluate(problem, *weights, sets, metrics or {}))
    history = {name: np.array([row[name] for row in rows], float) for name in rows[0]}
    status = Status.BUDGET if stop(*path[-1][1:]) else Status.STALLED
    return Solution(*weights, history, status, max(first - second, 0.0), problem)
