"""CIFAR-10: a small convolutional network classifies photographs, and GNvpro sees samples of them.

A step of GNvpro takes a few dozen passes over the data that it sees. Of 40,000 photographs it sees
one sample after the other, each a problem of its own, and keeps θ, the radius of its trust region
and what it has learned of the curvature. GN on all weights is run on the same samples; LBFGSvpro
sees all of the data in every step, and Adam minibatches.
"""

import math
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import varprox as vp
from benchmarks import baselines, minibatch, options, plots
from benchmarks.competitors import METHODS, Competitor
from benchmarks.contest import compiled_once, equal_seconds
from benchmarks.experiment import (
    PROJECTED,
    Run,
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
from benchmarks.starts import solved_w

BUDGETS, QUICK_BUDGETS = (25, 50, 100, 200), (8, 15, 22)  # work units
CHANNELS = (3, 32, 64, 10)
PENALTY = 5e-4  # on θ and on W
QUICK_IMAGES, QUICK_VALIDATION = 1600, 500
# Of GNvpro and GN: the size of the samples, the steps on each, and the rank of Krylov spaces.
SAMPLES = ((1024, 1, 5), (4096, 1, 5), (4096, 1, 20), (4096, 4, 20))
QUICK_SAMPLES = ((800, 1, 5),)
EVALUATED = 10  # times in a pass over the data methods that see samples are evaluated, at most
RATES, QUICK_RATES = (3e-4, 1e-3, 3e-3, 1e-2), (1e-3, 3e-3)  # of Adam
BATCH_SIZE, QUICK_BATCH_SIZE = 128, 32
SETS = ("train", "validation", "test")
SHOWN = 8  # photographs of every row of a figure


class Setting(NamedTuple):
    """A task, a problem equal to that of the task, and where W starts in methods that train it.

    The features of `in_loops` are the faster ones inside of loops, and slower outside.
    """

    task: Task
    in_loops: vp.Problem
    w: jax.Array


def add_options(parser: ArgumentParser) -> None:
    """Those of `run`."""
    options.add_common(parser, double=False)
    options.add_methods(parser, ("gnvpro", "lbfgsvpro", "adam", "gn"))
    options.add_budget(parser)


def run(
    *, quick: bool, seed: int, methods: Sequence[str], output: Path, budget: float | None
) -> None:
    """Trains with every method, and writes tables, convergence plots and some predictions."""
    budgets = spend(QUICK_BUDGETS if quick else BUDGETS, budget)
    data = vp.datasets.cifar10(QUICK_IMAGES if quick else None, seed=seed)
    setting = make_setting(data, seed, QUICK_VALIDATION if quick else None)
    task = setting.task
    runs = compete(setting, methods, budgets, quick=quick)
    groups = by_method(runs)

    finalists = [min(group, key=last_loss) for group in groups.values()]
    sets = dict(zip(SETS, (task.train, task.validation, data.test), strict=True))
    ends = [
        end(run) | evaluate(task.problem, run.solution.theta, run.solution.w, sets, task.metrics)
        for run in finalists
    ]
    stopped = by_method(map(stopped_early, runs))
    results = {"ends": ends, "at_work": at_limits(stopped, "work_units", budgets)}
    tables = [
        end_table(ends),
        limit_table(f"{WHAT} after so many work units", results["at_work"], budgets, cell),
    ]
    if "adam" in methods:
        clock = finished(groups["Adam"])
        times = [equal_seconds(clock, budget) for budget in budgets]
        results["seconds"], results["at_seconds"] = times, at_limits(stopped, "seconds", times)
        title = f"{WHAT} after so many seconds, in which the fastest Adam does these work units"
        tables.append(limit_table(title, results["at_seconds"], times, cell))

    winner = min(finalists, key=lambda run: (run.method not in PROJECTED, last_loss(run)))
    output.mkdir(parents=True, exist_ok=True)
    plots.convergence(
        output / "convergence.png",
        groups,
        budgets[-1],
        "validation_accuracy",
        ylabel="validation loss",
        yscale="linear",
    )
    draw_predictions(output / "predictions.png", data, task.problem, winner)
    settings = {
        "quick": quick,
        "seed": seed,
        "budgets": budgets,
        "images": {name: len(targets) for name, (_, targets) in sets.items()},
        "channels": CHANNELS,
        "penalty": PENALTY,
        "theta_entries": sum(leaf.size for leaf in jax.tree.leaves(task.theta)),
    }
    write(output, "cifar10", tables, settings, results, runs)


def make_setting(data: vp.datasets.Cifar10, seed: int, validated: int | None) -> Setting:
    """The problem on the training images, its network drawn from `seed`; the number of images that
    are validated on, all of them if None."""
    net = vp.networks.Convolutional(CHANNELS, rngs=nnx.Rngs(seed))
    w = vp.nnx.initial_w(net)
    theta, model = vp.nnx.split(net)
    if jax.default_backend() == "cpu":
        for layer in net.layers:
            layer.conv_general_dilated = by_patches
    _, model_in_loops = vp.nnx.split(net)
    problem, in_loops = (
        vp.Problem(m, vp.softmax_cross_entropy(), PENALTY, PENALTY) for m in (model, model_in_loops)
    )
    validation = tuple(x[:validated] for x in data.validation)
    train, validation = jax.tree.map(jnp.asarray, (data.train, validation))
    task = Task(problem, theta, train, validation, {"accuracy": accuracy}, seed)
    return Setting(task, in_loops, w)


def by_patches(images, kernel, *_, **__):
    """A convolution with a kernel of odd size, stride 1 and as many zeros around the images as keep
    their size, as a product of what each pixel sees with the kernel.

    Inside of loops XLA has no fast kernels for the derivatives of convolutions on CPU (JAX issue
    12868), and Krylov spaces and line searches are loops.
    """
    height, width = images.shape[1:3]
    taps, margin = len(kernel), len(kernel) // 2
    padded = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    rows = jnp.concatenate([padded[:, :, j : j + width] for j in range(taps)], axis=-1)
    patches = jnp.concatenate([rows[:, i : i + height] for i in range(taps)], axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


# ------------------------------------------------------------------------------- sample by sample


class State(NamedTuple):
    """The weights, the state that the method has left them in, and how many samples it has seen."""

    theta: Any
    w: jax.Array
    objective: jax.Array  # on the last sample
    work_units: jax.Array
    status: jax.Array
    learned: list  # as stochastic methods have; nothing
    inner: Any
    key: jax.Array
    count: jax.Array


def on_samples(
    method: vp.Method, problem: vp.Problem, size: int, steps: int, take_up: Callable
) -> vp.Method:
    """A full-batch method on one sample of the data after the other, with so many steps on each.

    It is a stochastic method, in whose history an entry is a sample. The samples are the blocks of
    a permutation of the data, and then of others. `take_up(state, sample)` is the state with which
    the method goes on to the next sample. `problem` is the one that
    is evaluated.
    """

    def init(theta, data, key):
        drawing, key = jax.random.split(key)
        count = jnp.zeros((), jnp.int32)
        inner = method.init(theta, sample(key, count, data, size), drawing)
        work = units(inner, data, size)
        return State(*_outer(inner), work, inner.status, [], inner, jax.random.key_data(key), count)

    def units(inner, data, size):
        return inner.work_units.astype(inner.objective.dtype) * size / len(data[1])

    @partial(jax.jit, static_argnames="batch_size")
    def epoch(state, data, *, batch_size):
        drawn = sample(jax.random.wrap_key_data(state.key), state.count, data, batch_size)
        begun = take_up(state.inner, drawn)
        inner, infos = jax.lax.scan(lambda s, _: method.step(s, drawn), begun, length=steps)
        work = units(inner, data, batch_size)
        failed = inner.status == vp.Status.NON_FINITE
        status = jnp.where(failed, vp.Status.NON_FINITE, vp.Status.RUNNING).astype(jnp.int32)
        return State(*_outer(inner), work, status, [], inner, state.key, state.count + 1), infos

    return vp.Method(init, method.step, problem, epoch)


def _outer(inner):
    return inner.theta, inner.w, inner.objective


def sample(key: jax.Array, count: jax.Array, data: tuple, size: int) -> tuple:
    """The sample number `count` of so many images."""
    samples = len(data[1]) // size
    order = jax.random.permutation(jax.random.fold_in(key, count // samples), len(data[1]))
    chosen = jax.lax.dynamic_slice_in_dim(order, count % samples * size, size)
    return jax.tree.map(lambda x: x[chosen], data)


def gnvpro(size: int, steps: int, rank: int, setting: Setting) -> vp.Method:
    """GNvpro, which takes W, its radius and the curvature along from sample to sample."""
    method = vp.gnvpro(setting.in_loops, curvature="krylov", rank=rank)

    def take_up(state, sample):
        return method.init(state.theta, sample, before=state)

    return on_samples(method, setting.task.problem, size, steps, take_up)


def adam(rate: float, horizon: float, setting: Setting) -> vp.Method:
    """Adam on θ and W, which begins at the W that the network has at the start."""
    return minibatch.adam(setting.task.problem, rate, lambda *_: setting.w, horizon)


def lbfgsvpro(setting: Setting) -> vp.Method:
    """LBFGSvpro on all of the data."""
    return vp.lbfgsvpro(setting.in_loops)._replace(problem=setting.task.problem)


def gn(size: int, steps: int, rank: int, start: Callable, setting: Setting) -> vp.Method:
    """GN on θ and W, which keeps both from sample to sample."""
    method = baselines.gn(setting.in_loops, rank=rank, start=start)
    return on_samples(method, setting.task.problem, size, steps, lambda state, sample: state)


# ------------------------------------------------------------------------------------ competition


def entrants(setting: Setting, work: float, quick: bool) -> dict[str, list[Competitor]]:
    """The variants of every method, which are made of the setting."""
    starts = {"Kaiming W": lambda *_: setting.w, "W(θ)": solved_w}
    starts = dict(list(starts.items())[: 1 if quick else None])
    rates, batch_size = (QUICK_RATES, QUICK_BATCH_SIZE) if quick else (RATES, BATCH_SIZE)
    schedules = {"constant": math.inf, "cosine": work}
    samples = {
        f"samples of {size}, {steps} step{'s' * (steps > 1)}, rank {rank}": (size, steps, rank)
        for size, steps, rank in (QUICK_SAMPLES if quick else SAMPLES)
    }
    return {
        "adam": [
            Competitor(
                "Adam", f"rate {rate:g}, {schedule}", partial(adam, rate, horizon), batch_size
            )
            for rate in rates
            for schedule, horizon in schedules.items()
        ],
        "gnvpro": [
            Competitor("GNvpro", name, partial(gnvpro, *of), of[0]) for name, of in samples.items()
        ],
        "gn": [
            Competitor("GN", f"{name}, from {start}", partial(gn, *of, w), of[0])
            for name, of in samples.items()
            for start, w in starts.items()
        ],
        "lbfgsvpro": [Competitor("LBFGSvpro", "", lbfgsvpro)],
    }


def compete(
    setting: Setting, methods: Sequence[str], budgets: Sequence[float], *, quick: bool
) -> list[Run]:
    """Runs the chosen methods for the last of the budgets, in work units.

    Adam, which goes first, is run with every rate, constant and along a cosine; GNvpro and GN are
    run on every kind of samples, and GN from the W that the network has at the start, and from
    W(θ). Runs that are through with their work in less time than the fastest Adam go on to then.
    """
    runs: list[Run] = []
    seconds = 0.0
    for name, variants in entrants(setting, budgets[-1], quick).items():
        if name not in methods:
            continue
        found = [train(setting, one, budgets[-1], seconds) for one in variants]
        if name == "adam":
            found = compiled_once(found)
            seconds = equal_seconds(finished(found), budgets[-1])
        runs += found
    order = list(METHODS.values())
    return sorted(runs, key=lambda run: order.index(run.method))


def train(setting: Setting, competitor: Competitor, work: float, seconds: float) -> Run:
    """One run for `work` units; if these take less than `seconds`, its history goes on to there.

    The `objective` in the history of the run is the validation loss, by which tables choose among
    the variants of a method; its entries are those that were evaluated.
    """
    print(competitor, flush=True)
    task, method = setting.task, competitor.make(setting)
    every = 1
    if competitor.method in ("GNvpro", "GN"):
        every = max(1, len(task.train[1]) // (EVALUATED * competitor.batch_size))

    def fit(budget, start=None):
        return vp.fit(
            method,
            task.theta,
            task.train,
            start=start,
            validation=task.validation,
            metrics=task.metrics,
            evaluate_every=every,
            max_work=budget,
            batch_size=competitor.batch_size,
            seed=task.seed,
            progress=True,
        )

    solution = found = fit(work)
    spent = {axis: found.history[axis][-1] for axis in plots.AXES}
    if found.status == vp.Status.BUDGET and spent["seconds"] < seconds:
        budget = max(work * (1 + 1.1 * (seconds / spent["seconds"] - 1)), spent["work_units"] + 1)
        found = fit(budget, solution)
    evaluated = np.isfinite(found.history["validation_accuracy"])
    history = {column: values[evaluated] for column, values in found.history.items()}
    history["objective"] = np.nan_to_num(history["validation_loss"], nan=np.inf)
    return Run(competitor.method, competitor.variant, task.seed, solution, history)


def stopped_early(run: Run) -> Run:
    """The run, as if it had kept the weights with the lowest validation loss so far."""
    loss = run.history["objective"]
    lowest = np.where(loss <= np.minimum.accumulate(loss), np.arange(len(loss)), 0)
    at = np.maximum.accumulate(lowest)
    kept = {name: run.history[name][at] for name in ("objective", "validation_accuracy")}
    return run._replace(history=dict(run.history) | kept)


def finished(runs: Sequence[Run]) -> list[Run]:
    """The runs that did not end before their budget."""
    return [run for run in runs if run.solution.status == vp.Status.BUDGET]


def last_loss(run: Run) -> float:
    """The validation loss of a run's solution."""
    return float(np.nan_to_num(end(run)["validation_loss"], nan=np.inf))


# ---------------------------------------------------------------------------- tables and figures

WHAT = "Lowest validation loss [validation accuracy there, in %]"


def cell(row: dict) -> str:
    return f"{row['objective']:.3f} [{100 * row['validation_accuracy']:.1f}]"


def end_table(ends: Sequence[dict]) -> str:
    """One line a method: accuracies and losses of the three sets, and what they cost."""
    columns = ["", *(f"{name} %" for name in SETS), *(f"{name} loss" for name in SETS)]
    columns += ["work units", "compile s", "run s"]
    lines = [
        [
            row["method"],
            *(f"{100 * row[f'{name}_accuracy']:.1f}" for name in SETS),
            *(f"{row[f'{name}_loss']:.3f}" for name in SETS),
            f"{row['work_units']:.0f}",
            f"{row['compile_seconds']:.1f}",
            f"{row['seconds']:.1f}",
        ]
        for row in ends
    ]
    variants = "; ".join(f"{row['method']}: {row['variant']}" for row in ends if row["variant"])
    table = text_table("Accuracy, loss (cross entropy) and cost", columns, lines)
    return f"{table}\n{variants}".rstrip()


def draw_predictions(path: Path, data: vp.datasets.Cifar10, problem: vp.Problem, run: Run) -> None:
    """The first photographs for testing, under the classes that the run's solution predicts; where
    these are wrong, also the right ones."""
    images, targets = (x[: 2 * SHOWN] for x in data.test)
    solution = run.solution
    logits = vp.predict(problem, solution.theta, solution.w, jnp.asarray(images))
    lowest, highest = data.test[0].min(axis=(0, 1, 2)), data.test[0].max(axis=(0, 1, 2))
    colours = (images - lowest) / (highest - lowest)
    figure, grid = plt.subplots(2, SHOWN, figsize=(1.35 * SHOWN, 3.6), layout="constrained")
    classes = zip(np.asarray(logits).argmax(axis=1), targets.argmax(axis=1), strict=True)
    for ax, image, (predicted, true) in zip(grid.flat, colours, classes, strict=True):
        right = predicted == true
        title = data.class_names[predicted] + ("\n" if right else f"\n({data.class_names[true]})")
        ax.imshow(image)
        ax.set_title(title, fontsize=9, color="black" if right else plots.COLOURS["LBFGSvpro"])
        ax.set(xticks=[], yticks=[])
    figure.suptitle(f"{run.method}: predicted classes, and the right ones where these are wrong")
    plots.save(figure, path)
