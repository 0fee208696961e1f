"""Who takes part in the race: each entrant trains from a task's θ and W(θ) until told to stop.

Work is counted alike for all: a forward or a backward pass over the data is one unit.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jax.flatten_util import ravel_pytree
from scipy.optimize import least_squares

from benchmarks import baselines
from benchmarks.contest import net_of
from benchmarks.experiment import Task
from benchmarks.scipy_lbfgs import scipy_lbfgs
from benchmarks.starts import STARTS
from varprox import Method, Problem, Solution, Status
from varprox.problem.penalties import tikhonov_weight
from varprox.problem.prediction import predict
from varprox.training.clock import timed


class Limit(NamedTuple):
    """Where a run ends: at an objective, or after so many seconds."""

    objective: float
    seconds: float

    def reached(self, objective: float, work_units: float, seconds: float) -> bool:
        """Is it time to stop?"""
        return not objective > self.objective or seconds >= self.seconds


class Result(NamedTuple):
    """How a run went; its history has the columns `objective`, `work_units` and `seconds`."""

    solution: Solution
    megabytes: float  # that the process grew by after compilation, at most; NaN where not known


Entrant = Callable[[Task, Limit], Result]


def of_method(make: Callable[[Problem], Method]) -> Entrant:
    """Steps of a method."""

    def run(task, limit):
        method, data = make(task.problem), task.train
        state, seconds, compiling = timed(method.init, task.theta, data, _key(task))
        compile_seconds = compiling + timed(method.step, state, data)[2]
        memory = Memory()
        rows = [(float(state.objective), int(state.work_units), seconds)]
        while state.status == Status.RUNNING and not limit.reached(*rows[-1]):
            (state, _), elapsed, compiling = timed(method.step, state, data)
            seconds, compile_seconds = seconds + elapsed, compile_seconds + compiling
            rows.append((float(state.objective), int(state.work_units), seconds))
        return _result(task, (state.theta, state.w), rows, limit, compile_seconds, memory)

    return run


def adam(rate: float, horizon: float, batch_size: int = 128) -> Entrant:
    """Adam; the times leave out the evaluation of Φ that ends an epoch."""

    def run(task, limit):
        size = min(batch_size, len(task.train[1]))
        make = partial(baselines.adam, learning_rate=rate, batch_size=size, horizon=horizon)
        result = of_method(make)(task, limit)
        solution = result.solution
        evaluation = baselines.evaluation_seconds(
            task.problem, solution.theta, solution.w, task.train
        )
        history = net_of(evaluation, solution.history)
        return result._replace(solution=solution._replace(history=history))

    return run


def lbfgs_of_scipy(start: str) -> Entrant:
    """SciPy's L-BFGS-B with 20 pairs on a compiled value and gradient; `start` names that of W."""

    def run(task, limit):
        w = STARTS[start](task.problem, task.theta, task.train, _key(task))
        memory = Memory()
        found = scipy_lbfgs(task.problem, task.theta, w, task.train, stop=limit.reached)
        return Result(found, memory.growth())

    return run


def trust_region_reflective(scale: float | str, start: str) -> Entrant:
    """SciPy's `least_squares`, the Jacobian being formed by one reverse pass an output.

    Work units: 1 a value, and for the Jacobian 1 and 1 an output.
    """

    def run(task, limit):
        x, unravel, residuals, jacobian = _residuals(task, start)
        functions = residuals, jacobian
        compile_seconds = sum(timed(fn, x)[2] for fn in functions)
        memory = Memory()
        calls = [0, 0]  # of the residuals and of the Jacobian

        def counted(i):
            def call(point):
                calls[i] += 1
                return np.asarray(functions[i](jnp.asarray(point, x.dtype)), np.float64)

            return call

        begin = time.perf_counter()
        rows = [(float(0.5 * np.sum(counted(0)(x) ** 2)), 1, time.perf_counter() - begin)]

        def record(intermediate_result):
            work = calls[0] + (1 + task.train[1].shape[1]) * calls[1]
            rows.append((float(intermediate_result.cost), work, time.perf_counter() - begin))
            if limit.reached(*rows[-1]):
                raise StopIteration

        found = least_squares(
            counted(0),
            np.asarray(x, np.float64),
            jac=counted(1),
            method="trf",
            x_scale=scale,
            ftol=None,
            xtol=1e-15,
            gtol=None,
            max_nfev=10**6,
            callback=record,
        )
        weights = unravel(jnp.asarray(found.x, x.dtype))
        return _result(task, weights, rows, limit, compile_seconds, memory)

    return run


def levenberg_marquardt(start: str) -> Entrant:
    """optimistix's, which forms the Jacobian by a forward pass, a work unit, for each weight."""

    def run(task, limit):
        x, unravel, residuals, _ = _residuals(task, start)
        solver = optimistix.LevenbergMarquardt(rtol=0.0, atol=0.0)
        fn, tags = lambda x, _: (residuals(x), None), frozenset()
        shape = jax.eval_shape(residuals, x)
        state = solver.init(fn, x, None, {}, shape, None, tags)
        step = equinox.filter_jit(lambda x, state: solver.step(fn, x, None, {}, state, tags)[:2])
        *_, compile_seconds = timed(step, x, state)
        memory = Memory()
        seconds = 0.0
        rows: list[tuple[float, int, float]] = []
        while not rows or not limit.reached(*rows[-1]):
            (x, state), elapsed, _ = timed(step, x, state)
            seconds += elapsed
            value = float(0.5 * jnp.sum(state.f_info.residual**2))
            rows.append((value, (len(rows) + 1) * (1 + x.size), seconds))
        return _result(task, unravel(x), rows, limit, compile_seconds, memory)

    return run


def _residuals(task, start):
    """For least squares: the weights at the start, flat, and the map back; all residuals as a
    function of them, such that Φ is half their sum of squares; the derivative of this function."""
    problem, (inputs, targets) = task.problem, task.train
    w = STARTS[start](problem, task.theta, task.train, _key(task))
    x, unravel = ravel_pytree((task.theta, w))
    alphas = tikhonov_weight(problem.theta_penalty), problem.w_penalty
    sizes = [ravel_pytree(part)[0].size for part in unravel(x)]
    roots = np.sqrt(np.repeat(np.array(alphas, x.dtype), sizes))

    def of_samples(x, inputs, targets):
        return (predict(problem, *unravel(x), inputs) - targets) / len(task.train[1]) ** 0.5

    @jax.jit
    def residuals(x):
        return jnp.concatenate([of_samples(x, inputs, targets).reshape(-1), roots * x])

    @jax.jit
    def jacobian(x):
        of_sample = jax.jacrev(lambda x, y, c: of_samples(x, y[None], c[None])[0])
        rows = jax.vmap(of_sample, (None, 0, 0))(x, inputs, targets)
        return jnp.concatenate([rows.reshape(-1, x.size), jnp.diag(roots)])

    return x, unravel, residuals, jacobian


def _result(task, weights, rows, limit, compile_seconds, memory):
    columns = zip(("objective", "work_units", "seconds"), zip(*rows, strict=True), strict=True)
    history = {name: np.array(column, float) for name, column in columns}
    status = Status.BUDGET if limit.reached(*rows[-1]) else Status.STALLED
    solution = Solution(*weights, history, status, compile_seconds, task.problem)
    return Result(solution, memory.growth())


class Memory:
    """How much the memory of this process has grown at most; the kernel of Linux keeps count."""

    STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self):
        library = ctypes.CDLL(None)
        self.known = self.CLEAR.exists() and hasattr(library, "malloc_trim")
        if self.known:
            gc.collect()
            library.malloc_trim(0)  # what is free would be used again without growth
            self.CLEAR.write_text("5")
            self.before = self.read("VmRSS")

    def read(self, name: str) -> float:
        """A line of the process's status, in megabytes."""
        lines = self.STATUS.read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith(name + ":"))
        return int(line.split()[1]) / 1000

    def growth(self) -> float:
        """Megabytes of the peak since the start over what there was then."""
        return self.read("VmHWM") - self.before if self.known else float("nan")


def _key(task):
    return jax.random.key(task.seed)
