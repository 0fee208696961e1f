"""One run of one method from one start of the zoo, and what is recorded of it.

The value at the end is computed anew in double precision from the weights, alike for all: what a
method says of itself does not count. The peers, which train θ and W together, start at W(θ) or at a
small random W: where W(θ) is large, this is a much better start.
"""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.optimize import least_squares

import varprox as vp
from benchmarks import baselines
from benchmarks.scipy_lbfgs import scipy_lbfgs
from benchmarks.starts import random_w
from benchmarks.zoo_problems import CASES, Case, Start, cast, start
from varprox.methods.forms import Form
from varprox.problem.model import objective
from varprox.problem.penalties import tikhonov_weight
from varprox.reduced.projection import rounding_of_predictions
from varprox.training.clock import timed

ULPS = 10  # of the targets, that a value may be off by rounding
PRECISIONS = {True: "float64", False: "float32"}
BY_NAME = {case.name: case for case in CASES}


class Budget(NamedTuple):
    """Where a run ends, if it does not end by itself."""

    work: float
    seconds: float


AFTERWARDS = Budget(60, 1.0)  # for the search of lower points near the end of a run
NEARBY = 0.1  # of θ's norm


class Job(NamedTuple):
    """A run to be made."""

    x64: bool
    case: str
    seed: int
    method: str
    budget: Budget

    @property
    def precision(self) -> str:
        return PRECISIONS[self.x64]

    @property
    def group(self) -> str:
        return BY_NAME[self.case].group


class Record(NamedTuple):
    """What is kept of a run. `values` are its objectives; none lies below that at its end, which is
    computed anew in double precision from the weights."""

    job: Job
    status: str
    message: str  # why there is no number, where there is none
    start: float  # the objective there
    floor: float  # what rounding leaves of it
    end: float
    values: np.ndarray
    work_units: np.ndarray
    seconds: np.ndarray
    compile_seconds: float
    gain: float  # that a converged run leaves nearby, relative to its value


class Prepared(NamedTuple):
    """A start and what all methods share there."""

    case: Case
    start: Start
    w: jax.Array  # W(θ)
    value: float
    floor: float


def run(job: Job) -> Record:
    """Makes a run; what goes wrong in it is recorded."""
    prepared = _prepare(job.case, job.seed, job.x64)
    try:
        solution = METHODS[job.method](prepared, job.budget)
    except (TypeError, ValueError) as error:
        return without_end(job, "REFUSED", str(error), prepared)
    except Exception as error:  # the zoo goes on
        return without_end(job, "RAISED", f"{type(error).__name__}: {error}", prepared)
    end = _value(prepared.start.problem, solution.theta, solution.w, prepared.start.data)
    if not np.isfinite(end):
        return without_end(job, "NaN", "the weights give no finite objective", prepared)
    history = solution.history
    values = np.maximum(np.nan_to_num(history["objective"], nan=np.inf), end)
    values[-1] = end
    gain = 0.0
    if solution.status == vp.Status.CONVERGED and job.method in OURS:
        gain = _left(prepared, solution, end)
    return Record(
        job,
        solution.status.name,
        "",
        prepared.value,
        prepared.floor,
        end,
        values,
        history["work_units"],
        history["seconds"],
        solution.compile_seconds,
        gain,
    )


def without_end(job: Job, status: str, message: str, prepared: Prepared | None = None) -> Record:
    """The record of a run that gives no weights."""
    value, floor = (np.nan, np.nan) if prepared is None else (prepared.value, prepared.floor)
    none = np.empty(0)
    message = message.partition("\n")[0][:160]
    return Record(job, status, message, value, floor, np.nan, none, none, none, 0.0, 0.0)


def forget() -> None:
    """Lets go of what is compiled: Linux maps only so much memory a process."""
    _prepare.cache_clear()
    jax.clear_caches()


@lru_cache(maxsize=4)
def _prepare(name, seed, x64):
    """The start in the precision that JAX is set to, which `x64` tells the cache."""
    case = BY_NAME[name]
    made = start(case, seed)
    w = _solved_w(made)
    value = _value(made.problem, made.theta, w, made.data)
    targets = np.asarray(made.data[1], np.float64)
    rounding = ULPS * float(jnp.finfo(w.dtype).eps)
    floor = 0.5 * rounding**2 * (targets**2).sum(axis=1).mean()
    return Prepared(case, made, w, value, floor)


def _solved_w(made):
    """W(θ); that of least squares is NumPy's, of minimum norm."""
    problem, theta, (inputs, targets) = made
    if not problem.loss.quadratic:
        return vp.solve_w(problem, theta, made.data)
    rows = np.asarray(_rows(problem, theta, inputs), np.float64)
    ridge = np.sqrt(len(rows) * problem.w_penalty) * np.eye(rows.shape[1])
    padded = np.concatenate([np.asarray(targets, np.float64), 0 * ridge[:, :1] * targets[:1]])
    w = np.linalg.lstsq(np.concatenate([rows, ridge]), padded, rcond=None)[0]
    return jnp.asarray(w, targets.dtype)


@jax.jit
def _rows(problem, theta, inputs):
    return problem.model.rows(theta, inputs)


def _value(problem, theta, w, data) -> float:
    """Φ in double precision."""
    with jax.enable_x64(True):
        return float(_objective(*cast((problem, theta, w, data), jnp.float64)))


_objective = jax.jit(objective)


def _left(prepared, solution, end):
    """What a run leaves, relative to its value: what W(θ) gains nearby, on the way to where SciPy
    goes from its end."""
    at = prepared.start._replace(theta=solution.theta)
    peer = trust_region_reflective if at.problem.loss.quadratic else l_bfgs_b
    found = peer(prepared._replace(start=at, w=solution.w), AFTERWARDS)
    (here, unravel), (there, _) = (ravel_pytree(s.theta) for s in (solution, found))
    way = there - here
    # A long step may end in another valley.
    length = jnp.linalg.norm(way)
    reach = NEARBY * jnp.linalg.norm(here)
    theta = unravel(here + way * jnp.minimum(1, reach / jnp.where(length > 0, length, 1)))
    value = _value(at.problem, theta, _solved_w(at._replace(theta=theta)), at.data)
    # Large weights lose what they cancel.
    rows = _rows(at.problem, solution.theta, at.data[0])
    rounding = ULPS * float(rounding_of_predictions(at.problem, rows, solution.w, at.data[1]))
    floor = max(prepared.floor, 0.5 * rounding**2)
    return (end - value - floor) / max(end, floor)


# The methods.


def of_library(make: Callable[[vp.Problem], Any], prepared: Prepared, budget: Budget):
    """`vp.fit` with the method that is made of the problem."""
    problem, theta, data = prepared.start
    return vp.fit(make(problem), theta, data, max_work=budget.work, max_seconds=budget.seconds)


def l_bfgs_b(prepared: Prepared, budget: Budget) -> vp.Solution:
    """SciPy's L-BFGS-B with 20 pairs on all weights; 2 work units a value and gradient."""
    problem, theta, data = prepared.start

    def stop(value, work_units, seconds):
        return work_units >= budget.work or seconds >= budget.seconds

    with jax.default_matmul_precision("highest"):
        return scipy_lbfgs(problem, theta, prepared.w, data, stop=stop)


def trust_region_reflective(prepared: Prepared, budget: Budget) -> vp.Solution:
    """SciPy's `least_squares` by trf on all weights, scaled by the Jacobian.

    Work units: 1 a value; for the Jacobian 1, and 1 an output where samples are taken one by one,
    else 1 a weight of θ, whichever are fewer.
    """
    problem, theta, data = prepared.start
    if not problem.loss.quadratic:
        raise TypeError("loss: expected least squares, which is what trf is for")
    outputs = data[1].shape[1]
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    forward = prepared.case.coupled or size <= outputs
    weights = theta, prepared.w
    flat, unravel = ravel_pytree(weights)
    calls = {"values": 0, "jacobians": 0}
    functions = {"values": _residuals, "jacobians": partial(_jacobian, forward=forward)}

    def counted(name):
        def call(x):
            calls[name] += 1
            x = jnp.asarray(x, flat.dtype)
            return np.asarray(functions[name](problem, weights, x, data), np.float64)

        return call

    rows: list[tuple] = []

    def record(intermediate_result):
        work = calls["values"] + (1 + (size if forward else outputs)) * calls["jacobians"]
        found = intermediate_result
        rows.append((float(found.cost), work, time.perf_counter() - begin))
        if work >= budget.work or rows[-1][2] >= budget.seconds:
            raise StopIteration

    with jax.default_matmul_precision("highest"):
        compile_seconds = sum(
            timed(fn, problem, weights, flat, data)[2] for fn in functions.values()
        )
        begin = time.perf_counter()
        rows.append((0.5 * float(np.sum(counted("values")(flat) ** 2)), 1, 0.0))
        found = least_squares(
            counted("values"),
            np.asarray(flat, np.float64),
            jac=counted("jacobians"),
            method="trf",
            x_scale="jac",
            ftol=1e-15,
            xtol=1e-15,
            gtol=None,  # an absolute one
            max_nfev=10**6,
            callback=record,
        )
    status = vp.Status.CONVERGED if found.status > 0 else vp.Status.BUDGET
    columns = zip(*rows, strict=True)
    names = ("objective", "work_units", "seconds")
    history = {name: np.array(c, float) for name, c in zip(names, columns, strict=True)}
    theta, w = unravel(jnp.asarray(found.x, flat.dtype))
    return vp.Solution(theta, w, history, status, compile_seconds, problem)


@jax.jit
def _residuals(problem, like, x, data):
    """All residuals at the flat vector x, in the order of the weights `like`: Φ is half the sum of
    their squares."""
    theta, w = ravel_pytree(like)[1](x)
    inputs, targets = data
    errors = (problem.model.rows(theta, inputs) @ w - targets) / len(targets) ** 0.5
    return jnp.concatenate([errors.reshape(-1), _roots(problem, like).astype(x.dtype) * x])


@partial(jax.jit, static_argnames="forward")
def _jacobian(problem, like, x, data, *, forward):
    """The derivative of `_residuals`: forward over θ, or in reverse for each sample alone."""
    theta, w = ravel_pytree(like)[1](x)
    inputs, targets = data
    flat, unravel = ravel_pytree(theta)

    def predictions(flat, inputs):
        return problem.model.rows(unravel(flat), inputs) @ w

    if forward:
        of_theta = jax.jacfwd(predictions)(flat, inputs)
    else:
        of_sample = jax.jacrev(lambda flat, y: predictions(flat, jax.tree.map(_alone, y))[0])
        of_theta = jax.vmap(of_sample, (None, 0))(flat, inputs)
    rows = problem.model.rows(theta, inputs)
    of_w = jnp.einsum("ic,op->iocp", rows, jnp.eye(w.shape[1], dtype=rows.dtype))
    count = targets.size
    both = [of_theta.reshape(count, -1), of_w.reshape(count, -1)]
    jacobian = jnp.concatenate(both, axis=1) / len(targets) ** 0.5
    return jnp.concatenate([jacobian, jnp.diag(_roots(problem, like).astype(x.dtype))])


def _alone(x):
    return x[None]


def _roots(problem, like):
    """Square roots of the penalties on every weight."""
    alphas = tikhonov_weight(problem.theta_penalty), problem.w_penalty
    sizes = [ravel_pytree(part)[0].size for part in like]
    return jnp.concatenate([jnp.full(n, jnp.sqrt(a)) for n, a in zip(sizes, alphas, strict=True)])


def _of_form(form):
    return partial(of_library, partial(vp.gnvpro, curvature=form.name.lower()))


def _at_random_w(method, prepared, budget):
    """`method`, which trains all weights, from a small random W."""
    w = random_w(*prepared.start, jax.random.key(0))
    return method(prepared._replace(w=w), budget)


OURS: dict[str, Callable[[Prepared, Budget], vp.Solution]] = {
    "default": partial(of_library, lambda problem: problem),
    **{f"GNvpro {form.name.lower()}": _of_form(form) for form in Form},
    "Broydenvpro": partial(of_library, vp.broydenvpro),
    "LBFGSvpro": partial(of_library, vp.lbfgsvpro),
}
PEERS: dict[str, Callable[[Prepared, Budget], vp.Solution]] = {
    "trf (SciPy)": trust_region_reflective,
    "trf (SciPy), random W": partial(_at_random_w, trust_region_reflective),
    "L-BFGS-B (SciPy)": l_bfgs_b,
    "L-BFGS-B (SciPy), random W": partial(_at_random_w, l_bfgs_b),
    "Broyden": partial(of_library, baselines.broyden),
    "Broyden, random W": partial(of_library, partial(baselines.broyden, start=random_w)),
}
METHODS = OURS | PEERS
