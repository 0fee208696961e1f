"""Segmentation of a hyperspectral image: 200 bands, 16 classes, 4000 training pixels.

Network, penalties and split are those of arXiv:2007.13171, section 5.
"""

from argparse import ArgumentParser
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import varprox as vp
from benchmarks import cost, options, plots, remedies
from benchmarks.competitors import METHODS
from benchmarks.contest import compete, equal_seconds
from benchmarks.experiment import (
    PROJECTED,
    Task,
    accuracy,
    at_limits,
    by_method,
    end,
    evaluate,
    limit_table,
    spend,
    text_table,
    write,
)

BUDGETS, QUICK_BUDGETS = (100, 250, 500, 1000), (100, 250)  # work units
PENALTY = 1e-3  # on the opening layer, on the flow's weights in time and on W
STEPS, FINAL_TIME = 3, 4.0
RANK = 20
SETS = ("train", "validation", "test")


def add_options(parser: ArgumentParser) -> None:
    """Those of `run`."""
    options.add_common(parser)
    options.add_methods(parser, METHODS)
    options.add_budget(parser)
    parser.add_argument(
        "--normalise",
        choices=("band", "spectrum"),
        default="band",
        help="what to standardise: each band over the training pixels (the default), or each "
        "pixel's spectrum",
    )


def run(
    *,
    quick: bool,
    seed: int,
    methods: tuple[str, ...],
    output: Path,
    budget: float | None,
    normalise: str,
) -> None:
    """Trains with every method, and writes tables, the predicted map and convergence plots."""
    budgets = spend(QUICK_BUDGETS if quick else BUDGETS, budget)
    image = vp.datasets.indian_pines(normalise=normalise)
    task = make_task(image, seed)
    runs = compete(task, methods, budgets, rank=RANK, quick=quick, equal_time=True)
    groups = by_method(runs)

    finalists = [min(group, key=lambda run: end(run)["objective"]) for group in groups.values()]
    sets = dict(zip(SETS, (task.train, task.validation, image.test), strict=True))
    ends = [
        end(run) | evaluate(task.problem, run.solution.theta, run.solution.w, sets, task.metrics)
        for run in finalists
    ]
    results = {"ends": ends, "at_work": at_limits(groups, "work_units", budgets)}
    tables = [
        end_table(ends),
        limit_table(f"{WHAT} after so many work units", results["at_work"], budgets, cell),
    ]
    if "lbfgs" in methods:
        times = [equal_seconds(groups["L-BFGS"], budget) for budget in budgets]
        results["seconds"], results["at_seconds"] = times, at_limits(groups, "seconds", times)
        title = f"{WHAT} after so many seconds, in which L-BFGS does these work units"
        tables.append(limit_table(title, results["at_seconds"], times, cell))

    print("measuring products and W-solves", flush=True)
    results["costs"] = costs = {
        "product_ratio": cost.product_ratio(task.problem, task.theta, task.train),
        "solve_ratio": cost.solve_ratio(task.problem, task.theta, task.train, budgets[-1]),
    }
    tables.append(
        f"A Krylov product takes {costs['product_ratio']:.2f} times as long as one jvp and one vjp "
        f"of the features,\na W-solve inside a run {costs['solve_ratio']:.2f} times as long as one "
        "forward and one reverse pass."
    )
    if not quick:
        variants = remedies.compare(task, budgets[-1])
        results["remedies"] = at_limits(by_method(variants), "work_units", budgets)
        tables.append(limit_table(remedies.TITLE, results["remedies"], budgets, cell))
        runs = [*runs, *variants]

    winner = min(finalists, key=lambda run: (run.method not in PROJECTED, end(run)["objective"]))
    output.mkdir(parents=True, exist_ok=True)
    plots.segmentation(output / "map.png", image, task.problem, winner)
    plots.convergence(output / "convergence.png", groups, budgets[-1], "validation_accuracy")
    settings = {
        "quick": quick,
        "seed": seed,
        "budgets": budgets,
        "normalise": normalise,
        "penalty": PENALTY,
        "rank": RANK,
        "theta_entries": sum(leaf.size for leaf in jax.tree.leaves(task.theta)),
    }
    write(output, "indian_pines", tables, settings, results, runs)


def make_task(image: vp.datasets.IndianPines, seed: int) -> Task:
    """The problem on the training pixels, its network drawn from `seed`."""
    net = vp.networks.AntisymmetricResNet(
        image.train[0].shape[1], 32, 16, steps=STEPS, final_time=FINAL_TIME, rngs=nnx.Rngs(seed)
    )
    theta, model = vp.nnx.split(net)
    penalties = (
        vp.tikhonov(PENALTY, where=opening_weights),
        vp.smoothness_in_time(PENALTY, FINAL_TIME / (2 * STEPS), where=flow_weights),
    )
    problem = vp.Problem(model, vp.softmax_cross_entropy(), penalties, PENALTY)
    train, validation = jax.tree.map(jnp.asarray, (image.train, image.validation))
    return Task(problem, theta, train, validation, {"accuracy": accuracy}, seed)


def opening_weights(theta):
    return theta["opening"]


def flow_weights(theta):
    return theta["lower"], theta["bias"]


WHAT = "Objective [validation accuracy in %]"


def cell(row: dict) -> str:
    return f"{row['objective']:.4f} [{100 * row['validation_accuracy']:.1f}]"


def end_table(ends: list[dict]) -> str:
    """One line a method: accuracies and losses of the three sets, and what they cost."""
    columns = ["", *(f"{name} %" for name in SETS), *(f"{name} loss" for name in SETS)]
    columns += ["objective", "work units", "compile s", "run s"]
    lines = [
        [
            row["method"],
            *(f"{100 * row[f'{name}_accuracy']:.2f}" for name in SETS),
            *(f"{row[f'{name}_loss']:.4f}" for name in SETS),
            f"{row['objective']:.4f}",
            f"{row['work_units']:.0f}",
            f"{row['compile_seconds']:.1f}",
            f"{row['seconds']:.1f}",
        ]
        for row in ends
    ]
    variants = "; ".join(f"{row['method']}: {row['variant']}" for row in ends if row["variant"])
    table = text_table("Accuracy, loss (cross entropy) and cost", columns, lines)
    return f"{table}\n{variants}".rstrip()
