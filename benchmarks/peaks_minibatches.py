"""Peaks in minibatches of five points: slimTrain, with and without memory, against Adam.

The setting is that of arXiv:2109.14002, section 5.1, 50 epochs, learning rate 1e-3 and λ = 1e-10,
and for slimTrain's default and Adam other rates, too.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

import varprox as vp
from benchmarks import minibatch
from benchmarks.competitors import Competitor, from_starts
from benchmarks.experiment import Run, Task, by_seed, text_table
from benchmarks.minibatch import ADAM, at_rate

BATCH_SIZE, EPOCHS, QUICK_EPOCHS = 5, 50, 5
RATES = (1e-3, 3e-3, 1e-2)  # the first is that of the paper
SHOWN = (1, 2, 5, 10, 20, 50)  # epochs
CONSTANT = 1e-10
OF_THE_PAPER = {"sGCV": vp.sgcv(), "constant": vp.constant(CONSTANT)}
DEFAULT = "slimTrain proportional, r = 5"


def competitors(rates: Sequence[float]) -> list[Competitor]:
    """slimTrain with Λ chosen in three ways, and Adam, whose variants are rates and starts of W."""
    found = [
        slim(f"slimTrain {name}, r = {memory}", rate, memory, selection)
        for name, selection in OF_THE_PAPER.items()
        for memory in (0, 5)
        for rate in (rates if name == "sGCV" and memory == 5 else rates[:1])
    ]
    for rate in rates:
        found.append(slim(DEFAULT, rate, 5))
        found += from_starts("Adam", partial(minibatch.adam, rate=rate), f"rate {rate:g}, ")
    return found


def slim(name: str, rate: float, *options) -> Competitor:
    """slimTrain with Adam for θ."""
    return Competitor(
        name,
        f"rate {rate:g}",
        lambda problem: at_rate(rate, vp.slimtrain(problem, ADAM, *options)),
    )


def train(task: Task, quick: bool) -> list[Run]:
    """The runs of all methods from one seed."""
    runs = []
    for one in competitors(RATES[:1] if quick else RATES):
        solution = vp.fit(
            one.make(task.problem),
            task.theta,
            task.train,
            validation=task.validation,
            epochs=QUICK_EPOCHS if quick else EPOCHS,
            batch_size=BATCH_SIZE,
            seed=task.seed,
        )
        runs.append(Run(one.method, one.variant, task.seed, solution, solution.history))
    return runs


def losses(runs: Sequence[Run]) -> np.ndarray:
    """Of one method, the median over the seeds of its best variant's validation loss after each
    epoch, the variant being chosen anew for each."""
    seeds = [
        np.min([run.history["validation_loss"] for run in group], axis=0)
        for group in by_seed(runs).values()
    ]
    return np.median(seeds, axis=0)


def summary(runs: Sequence[Run]) -> dict:
    """Of one method: validation losses epoch by epoch, and the time an epoch takes."""
    seconds = [run.history["seconds"] for run in runs]
    return {
        "validation_loss": losses(runs),
        "seconds_an_epoch": float(np.median([s[-1] / (len(s) - 1) for s in seconds])),
        "compile_seconds": max(run.solution.compile_seconds for run in runs),
    }


def table(results: Mapping[str, dict]) -> str:
    """A line a method: its losses after some epochs, and its time."""
    length = max(len(row["validation_loss"]) for row in results.values())
    shown = [epoch for epoch in SHOWN if epoch < length]
    lines = [
        [
            method,
            *(f"{row['validation_loss'][epoch]:.2e}" for epoch in shown),
            f"{row['seconds_an_epoch']:.2f}",
            f"{row['compile_seconds']:.1f}",
        ]
        for method, row in results.items()
    ]
    title = f"Validation loss after epochs in batches of {BATCH_SIZE}: median over the seeds"
    return text_table(title, ["", *map(str, shown), "s an epoch", "compile s"], lines)
