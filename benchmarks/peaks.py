"""Regression of MATLAB's peaks function by a small antisymmetric ResNet, over several seeds.

Network, penalties and rank are those of arXiv:2007.13171, section 4.
"""

from argparse import ArgumentParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import varprox as vp
from benchmarks import options, peaks_minibatches, plots
from benchmarks.competitors import METHODS
from benchmarks.contest import compete
from benchmarks.experiment import (
    PROJECTED,
    Run,
    Task,
    best,
    by_method,
    by_seed,
    end,
    spend,
    text_table,
    write,
)

BUDGETS, QUICK_BUDGETS = (300, 600, 1050), (300, 600)  # work units
SEEDS = 5
PENALTY = 1e-10  # on θ and on W
RANK = 20


def add_options(parser: ArgumentParser) -> None:
    """Those of `run`."""
    options.add_common(parser)
    options.add_methods(parser, (*METHODS, "slimtrain"))
    options.add_budget(parser)


def run(
    *, quick: bool, seed: int, methods: tuple[str, ...], output: Path, budget: float | None
) -> None:
    """Trains with every method from every seed, and writes medians, convergence and a surface."""
    budgets = spend(QUICK_BUDGETS if quick else BUDGETS, budget)
    seeds = range(seed, seed + (1 if quick else SEEDS))
    tasks = {s: make_task(s) for s in seeds}
    settings = {
        "quick": quick,
        "seeds": list(seeds),
        "budgets": budgets,
        "penalty": PENALTY,
        "rank": RANK,
        "theta_entries": sum(leaf.size for leaf in jax.tree.leaves(tasks[seed].theta)),
    }
    output.mkdir(parents=True, exist_ok=True)
    results, tables, runs = {}, [], []
    in_minibatches = "slimtrain" in methods
    full_batch = tuple(method for method in methods if method != "slimtrain")
    if full_batch:
        for s, task in tasks.items():
            print(f"seed {s}", flush=True)
            runs += compete(task, full_batch, budgets, rank=RANK, quick=quick)
        groups = by_method(runs)
        results = {method: summary(group, budgets) for method, group in groups.items()}
        tables.append(summary_table(results, budgets))
        first = [run for run in runs if run.seed == seed]
        winner = min(first, key=lambda run: (run.method not in PROJECTED, end(run)["objective"]))
        draw_surface(output / "surface.png", tasks[seed].problem, winner)
        plots.convergence(output / "convergence.png", groups, budgets[-1])
    if in_minibatches:
        found = [run for task in tasks.values() for run in peaks_minibatches.train(task, quick)]
        groups = by_method(found)
        results["minibatches"] = {m: peaks_minibatches.summary(g) for m, g in groups.items()}
        tables.append(peaks_minibatches.table(results["minibatches"]))
        plots.minibatches(output / "minibatches.png", groups, "validation loss")
        runs += found
    write(output, "peaks", tables, settings, results, runs)


def make_task(seed: int, points: int = 2000) -> Task:
    """So many points and a network, both drawn from `seed`."""
    data = vp.datasets.peaks(points, seed=seed)
    net = vp.networks.AntisymmetricResNet(
        2, 8, 1, steps=7, final_time=5.0, bias_scale=2.0, rngs=nnx.Rngs(seed)
    )
    theta, model = vp.nnx.split(net)
    problem = vp.Problem(model, vp.least_squares(), vp.tikhonov(PENALTY), PENALTY)
    train, validation = jax.tree.map(jnp.asarray, tuple(data))
    return Task(problem, theta, train, validation, {}, seed)


def summary(runs: list[Run], budgets: tuple[float, ...]) -> dict:
    """Of one method: the objectives at the budgets over the seeds, and the time to the last."""
    at_budgets = [
        [best(group, "work_units", budget) for group in by_seed(runs).values()]
        for budget in budgets
    ]
    objectives = [[row["objective"] for row in rows] for rows in at_budgets]
    return {
        "median": [float(np.median(values)) for values in objectives],
        "range": [[min(values), max(values)] for values in objectives],
        "seconds": float(np.median([row["seconds"] for row in at_budgets[-1]])),
        "compile_seconds": max(run.solution.compile_seconds for run in runs),
        "at_budgets": at_budgets,
    }


def summary_table(results: dict[str, dict], budgets: tuple[float, ...]) -> str:
    """A line a method: the median objective at each budget with its range, and the times."""
    columns = ["", *(f"{budget:g}" for budget in budgets), "compile s", "run s"]
    lines = []
    for method, row in results.items():
        ranges = zip(row["median"], row["range"], strict=True)
        cells = [f"{median:.2e} [{low:.1e}, {high:.1e}]" for median, (low, high) in ranges]
        lines.append([method, *cells, f"{row['compile_seconds']:.1f}", f"{row['seconds']:.1f}"])
    title = "Objective after so many work units: median [lowest, highest] over the seeds"
    return text_table(title, columns, lines)


def draw_surface(path: Path, problem: vp.Problem, run: Run) -> None:
    """The fit that a run ended with, beside the function it was to fit."""
    x = np.linspace(-3, 3, 201)
    points = np.stack(np.meshgrid(x, x), axis=-1)
    inputs = jnp.asarray(points.reshape(-1, 2), run.solution.w.dtype)
    fitted = vp.predict(problem, run.solution.theta, run.solution.w, inputs)
    truth = vp.datasets.peaks_function(points)[..., 0]
    plots.surface(path, x, truth, np.asarray(fitted).reshape(truth.shape), f"fit by {run.method}")
