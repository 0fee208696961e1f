"""Methods against one another: each is given the same θ, work and time, and the rivals are tuned.

A baseline starts from W(θ) and, in a run of its own, from a small random W; tables show the better
of the two. They also show the better of optax's and SciPy's L-BFGS, and the best of the settings
tried of Adam, chosen with hindsight and anew at every budget.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product

import jax
import numpy as np

import varprox as vp
from benchmarks import baselines
from benchmarks.competitors import METHODS, Competitor, full_batch
from benchmarks.experiment import Run, Task, end, reading
from benchmarks.scipy_lbfgs import scipy_lbfgs
from benchmarks.starts import STARTS
from varprox import Method, Solution, Status

RATES, SIZES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (128,)  # of Adam's steps and batches
PILOT_RATES, PILOT_SIZES = (3e-3,), (128,)
FINALISTS = 2  # settings of Adam that are run from a random W and with shorter cosines, too


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

    With `equal_time` the others have at least as long as the fastest L-BFGS, which goes first:
    where one is through with its work earlier, its history goes on to then. The weights in a
    solution are always those at the end of the work. `quick` tries only a few settings of Adam.
    """
    work, entered = budgets[-1], full_batch(rank)
    runs, seconds = [], 0.0
    if "lbfgs" in methods:
        in_optax = [train(task, one, work) for one in entered.pop("lbfgs")]
        in_scipy = [train_scipy(task, name, work) for name in STARTS]
        runs += compiled_once(in_optax) + compiled_once(in_scipy)
        seconds = equal_seconds(runs, work) if equal_time else 0.0
    for name, variants in entered.items():
        if name in methods:
            runs += compiled_once([train(task, one, work, seconds) for one in variants])
    if "adam" in methods:
        runs += tune_adam(task, budgets, seconds, quick)
    order = list(METHODS.values())
    return sorted(runs, key=lambda run: order.index(run.method))


def equal_seconds(lbfgs_runs: Sequence[Run], work: float) -> float:
    """The time in which the fastest L-BFGS spent `work` units."""
    readings = [reading(run, "work_units", work) for run in lbfgs_runs]
    return min(row["seconds"] for row in readings)


def train(task: Task, competitor: Competitor, work: float, seconds: float = 0.0) -> Run:
    """One run for `work` units; if these take less than `seconds`, its history goes on to there."""
    method = competitor.make(task.problem)
    print(competitor, flush=True)
    solution = fit(task, method, work)
    history = solution.history
    spent = history["seconds"][-1]
    if solution.status == Status.BUDGET and spent < seconds:
        more = 1.1 * work * seconds / spent
        print(competitor, "on to equal time", flush=True)
        history = fit(task, method, more, solution).history
    return Run(competitor.method, competitor.variant, task.seed, solution, history)


def fit(task: Task, method: Method, work: float, start: Solution | None = None) -> Solution:
    """`vp.fit` for `work` units in all, with a progress bar."""
    return vp.fit(
        method,
        task.theta,
        task.train,
        start=start,
        validation=task.validation,
        metrics=task.metrics,
        max_work=work,
        seed=task.seed,
        progress=True,
    )


def train_scipy(task: Task, start: str, work: float) -> Run:
    """One run of SciPy's L-BFGS."""
    variant = f"SciPy from {start}"
    print("L-BFGS", variant, flush=True)
    key = jax.random.key(task.seed)
    solution = scipy_lbfgs(
        task.problem,
        task.theta,
        STARTS[start](task.problem, task.theta, task.train, key),
        task.train,
        stop=lambda objective, work_units, seconds: work_units >= work,
        validation=task.validation,
        metrics=task.metrics,
    )
    return Run("L-BFGS", variant, task.seed, solution, solution.history)


def tune_adam(task: Task, budgets: Sequence[float], seconds: float, quick: bool) -> list[Run]:
    """Runs of Adam over learning rates, batch sizes, schedules and starts.

    Every rate and batch size is run from W(θ) to the last budget, with a constant rate and with a
    cosine. The best two of the latter are run from a random W, too, and with cosines that end at
    the earlier budgets, where these are better than any other schedule. The times leave out the
    evaluation of Φ that ends an epoch.
    """
    rates, sizes = (PILOT_RATES, PILOT_SIZES) if quick else (RATES, SIZES)
    last = budgets[-1]
    w = vp.solve_w(task.problem, task.theta, task.train)
    evaluation = baselines.evaluation_seconds(task.problem, task.theta, w, task.train)
    compiling: dict[int, float] = {}

    def attempt(rate, size, horizon, start):
        constant = math.isinf(horizon)
        schedule = "constant" if constant else f"cosine to {horizon:g}"
        variant = f"rate {rate:g}, batch {size}, {schedule}, from {start}"
        options = {"batch_size": size, "horizon": horizon, "start": STARTS[start]}
        adam = Competitor("Adam", variant, partial(baselines.adam, learning_rate=rate, **options))
        run = train(task, adam, min(horizon, last), seconds if constant else 0.0)
        solution = run.solution._replace(
            history=net_of(evaluation, run.solution.history),
            # The first run with a batch size compiles for all.
            compile_seconds=compiling.setdefault(size, run.solution.compile_seconds),
        )
        return run._replace(solution=solution, history=net_of(evaluation, run.history))

    horizons = (last,) if quick else (math.inf, last)
    tried = {setting: attempt(*setting, "W(θ)") for setting in product(rates, sizes, horizons)}
    cosines = [setting for setting in tried if setting[2] == last]
    cosines.sort(key=lambda setting: end(tried[setting])["objective"])
    finals = [
        attempt(rate, size, horizon, start)
        for rate, size, _ in cosines[:FINALISTS]
        for horizon, start in product(budgets, STARTS)
        if (horizon, start) != (last, "W(θ)")  # ran above
    ]
    return [*tried.values(), *finals]


def compiled_once(runs: Sequence[Run]) -> list[Run]:
    """The runs, of which the first compiled for all, each with the time that this took."""
    longest = max(run.solution.compile_seconds for run in runs)
    return [run._replace(solution=run.solution._replace(compile_seconds=longest)) for run in runs]


def net_of(evaluation: float, history: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The history with `evaluation` seconds less for every step made so far."""
    seconds = history["seconds"] - evaluation * np.arange(len(history["seconds"]))
    # Times scatter, but never run backwards.
    return dict(history) | {"seconds": np.maximum.accumulate(seconds)}
