"""Methods against one another: each is given the same start, work and time, and Adam is tuned."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

import varprox as vp
from benchmarks import baselines
from benchmarks.experiment import Run, Task, reading
from benchmarks.scipy_lbfgs import scipy_lbfgs
from varprox import Method, Solution, Status

METHODS = {
    "gnvpro": "GNvpro",
    "lbfgsvpro": "LBFGSvpro",
    "adam": "Adam",
    "lbfgs": "L-BFGS",
    "gn": "GN",
}
RATES, BATCH_SIZES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (32, 128)  # of Adam
FINALISTS = 2  # settings of Adam that are run with shorter cosines, too


def compete(
    task: Task,
    methods: Sequence[str],
    budgets: Sequence[float],
    *,
    rank: int,
    quick: bool,
    equal_time: bool = False,
) -> list[Run]:
    """Runs the chosen methods for the last of the budgets, in work units.

    L-BFGS goes first, once in optax's form and once in SciPy's. With `equal_time` the others have
    at least as long as the faster of the two: where one is through with its work earlier, its
    history goes on to then. The weights in a solution are always those at the end of the work.
    `quick` tunes Adam over a few settings only.
    """
    work = budgets[-1]
    runs, seconds = [], 0.0
    if "lbfgs" in methods:
        runs = [
            train(task, "L-BFGS", "optax", baselines.lbfgs(task.problem), work),
            _scipy(task, work),
        ]
        seconds = equal_seconds(runs, work) if equal_time else 0.0
    others = {
        "gnvpro": lambda: vp.gnvpro(task.problem, rank=rank),
        "lbfgsvpro": lambda: vp.lbfgsvpro(task.problem),
        "gn": lambda: baselines.gn(task.problem, rank=rank),
    }
    for name, method in others.items():
        if name in methods:
            runs.append(train(task, METHODS[name], "", method(), work, seconds))
    if "adam" in methods:
        runs += tune_adam(task, budgets, seconds, quick)
    order = list(METHODS.values())
    return sorted(runs, key=lambda run: order.index(run.method))


def equal_seconds(lbfgs_runs: Sequence[Run], work: float) -> float:
    """The time in which the faster L-BFGS spent `work` units."""
    readings = [reading(run, "work_units", work) for run in lbfgs_runs]
    return min(row["seconds"] for row in readings)


def train(
    task: Task, name: str, variant: str, method: Method, work: float, seconds: float = 0.0
) -> Run:
    """One run for `work` units; if these take less than `seconds`, its history goes on to there."""
    solution = fit(task, name, variant, method, work)
    history = solution.history
    spent = history["seconds"][-1]
    if solution.status == Status.BUDGET and spent < seconds:
        more = 1.1 * work * seconds / spent
        history = fit(task, name, f"{variant} on to equal time", method, more).history
    return Run(name, variant, task.seed, solution, history)


def fit(task: Task, name: str, variant: str, method: Method, work: float) -> Solution:
    """`vp.fit` for `work` units, announced by one line and with a progress bar."""
    print(" ".join(filter(None, (name, variant))), flush=True)
    return vp.fit(
        method,
        task.theta,
        task.train,
        validation=task.validation,
        metrics=task.metrics,
        max_work=work,
        seed=task.seed,
        progress=True,
    )


def _scipy(task, work):
    print("L-BFGS SciPy", flush=True)
    w = baselines.start_w(task.problem, task.theta, task.train, jax.random.key(task.seed))
    solution = scipy_lbfgs(
        task.problem,
        task.theta,
        w,
        task.train,
        max_work=work,
        validation=task.validation,
        metrics=task.metrics,
    )
    return Run("L-BFGS", "SciPy", task.seed, solution, solution.history)


def tune_adam(task: Task, budgets: Sequence[float], seconds: float, quick: bool) -> list[Run]:
    """Runs of Adam over learning rates, batch sizes and schedules; tables show the best of them.

    Every rate and batch size is run to the last budget with a constant rate and with a cosine. A
    cosine that ends at an earlier budget is better there than either, so the best two settings are
    also run with cosines of these lengths. The times leave out the evaluation of Φ in an epoch.
    """
    rates = RATES[2:4] if quick else RATES
    batch_sizes = [
        min(size, len(task.train[1])) for size in (BATCH_SIZES[1:] if quick else BATCH_SIZES)
    ]
    w = vp.solve_w(task.problem, task.theta, task.train)
    evaluation = baselines.evaluation_seconds(task.problem, task.theta, w, task.train)
    compiling = {}

    def attempt(rate, size, horizon):
        constant = math.isinf(horizon)
        schedule = "constant" if constant else f"cosine to {horizon:g}"
        variant = f"rate {rate:g}, batch {size}, {schedule}"
        method = baselines.adam(task.problem, rate, batch_size=size, horizon=horizon)
        work = min(horizon, budgets[-1])
        run = train(task, "Adam", variant, method, work, seconds if constant else 0.0)
        # One compilation serves all runs with a batch size.
        solution = run.solution._replace(
            history=net_of(evaluation, run.solution.history),
            compile_seconds=compiling.setdefault(size, run.solution.compile_seconds),
        )
        return run._replace(solution=solution, history=net_of(evaluation, run.history))

    horizons = (budgets[-1],) if quick else (math.inf, budgets[-1])
    runs = {
        (rate, size, horizon): attempt(rate, size, horizon)
        for size in batch_sizes
        for rate in rates
        for horizon in horizons
    }
    full = [setting for setting in runs if setting[2] == budgets[-1]]
    full.sort(key=lambda setting: runs[setting].solution.history["objective"][-1])
    shorter = [
        attempt(rate, size, horizon)
        for rate, size, _ in full[:FINALISTS]
        for horizon in budgets[:-1]
    ]
    return [*runs.values(), *shorter]


def net_of(evaluation: float, history: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The history with `evaluation` seconds less for every step made so far."""
    steps = np.arange(len(history["seconds"]))
    return dict(history) | {"seconds": history["seconds"] - evaluation * steps}
