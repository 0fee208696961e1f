"""A race: the time and the work that each method takes to bring the objective below given levels.

All start from the same θ and W(θ), those that train all weights but optax's and Adam also from a
random W, in the same dtype, and take turns within one run. Where a method has variants the best of
them counts, anew at every level.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import varprox as vp
from benchmarks import baselines, cost, indian_pines, options, peaks, plots
from benchmarks.entrants import (
    Entrant,
    Limit,
    adam,
    lbfgs_of_scipy,
    levenberg_marquardt,
    of_method,
    trust_region_reflective,
)
from benchmarks.experiment import Run, Task, by_method, by_seed, text_table, write
from benchmarks.preconditioning import products_saved
from benchmarks.starts import STARTS


def full_memory(make: Callable) -> dict[str, Entrant]:
    """A quasi-Newton method on all weights, from both starts of W."""
    return {f"from {name}": of_method(partial(make, start=start)) for name, start in STARTS.items()}


GNVPRO = {
    f"GNvpro {name}": {"": of_method(partial(vp.gnvpro, curvature=name))}
    for name in ("dense", "kernel", "krylov")
}
GRADIENTS = {
    "Broydenvpro": {"": of_method(vp.broydenvpro)},
    "LBFGSvpro": {"": of_method(vp.lbfgsvpro)},
    "L-BFGS (SciPy)": {f"from {start}": lbfgs_of_scipy(start) for start in STARTS},
    "L-BFGS (optax)": {"": of_method(baselines.lbfgs)},
    "Adam": {f"rate {rate:g}, constant": adam(rate, float("inf")) for rate in (1e-3, 3e-3, 1e-2)},
    "Adam, cosine": {
        f"rate {rate:g}, to {horizon}": adam(rate, horizon)
        for rate in (3e-3, 1e-2)
        for horizon in (300, 1000, 3000)
    },
}
FULL_MEMORY = {
    "Broyden": full_memory(baselines.broyden),
    "BFGS": full_memory(baselines.full_bfgs),
}
RESIDUALS = {
    "LM (optimistix)": {f"from {start}": levenberg_marquardt(start) for start in STARTS},
    "trf (SciPy)": {
        f"x_scale {scale}, from {start}": trust_region_reflective(scale, start)
        for scale in (1.0, "jac")
        for start in STARTS
    },
}
LEVELS = tuple(10.0**-k for k in range(2, 8))
OF_PIXELS = (1.0, 0.5, 0.2, 0.1, 0.05)


class Course(NamedTuple):
    """What is raced on: the task of a seed, who takes part, and where a run ends."""

    make: Callable[[int], Task]
    entrants: Mapping[str, Mapping[str, Entrant]]
    levels: Sequence[float]
    seconds: float
    seeds: int = 1


def exponentials(seed: int) -> Task:
    """500 points of a sum of four exponentials, whose rates are sought."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 10, 500)[:, None]
    targets = np.exp(-time * [0.2, 0.7, 2.0, 6.0]) @ rng.uniform(0.5, 2, (4, 1))
    model = vp.Separable(lambda theta, time: jnp.exp(-time * jnp.exp(theta)), vp.dense(bias=False))
    problem = vp.Problem(model, vp.least_squares(), vp.tikhonov(peaks.PENALTY), peaks.PENALTY)
    theta = jnp.asarray(rng.uniform(-2, 2, 4))
    data = jax.tree.map(lambda x: jnp.asarray(x, theta.dtype), (time, targets))
    return Task(problem, theta, data, data, {}, seed)


def pixels(normalise: str, seed: int) -> Task:
    """Indian Pines; `normalise` says what is standardised, bands or spectra."""
    return indian_pines.make_task(vp.datasets.indian_pines(normalise=normalise), seed)


def points(count: int, seed: int) -> Task:
    """Peaks with so many points."""
    return peaks.make_task(seed, count)


FORMED = (
    {name: GNVPRO[name] for name in ("GNvpro dense", "GNvpro krylov")}
    | GRADIENTS
    | FULL_MEMORY
    | RESIDUALS
)
WHITENED = of_method(partial(vp.gnvpro, curvature="krylov", whiten=True))
KRYLOV = {
    "GNvpro krylov": GNVPRO["GNvpro krylov"],
    "GNvpro krylov, whitened": {"": WHITENED},
} | GRADIENTS
COURSES = {
    "peaks, 2000 points": Course(partial(points, 2000), FORMED, LEVELS, 12, seeds=3),
    "Indian Pines, bands": Course(partial(pixels, "band"), KRYLOV, OF_PIXELS, 8),
    "Indian Pines, spectra": Course(partial(pixels, "spectrum"), KRYLOV, OF_PIXELS, 8),
    "exponentials": Course(exponentials, GNVPRO | FORMED, LEVELS, 1, seeds=3),
    "peaks, 500 points": Course(partial(points, 500), GNVPRO | FORMED, LEVELS, 5),
    "peaks, 20000 points": Course(partial(points, 20_000), FORMED, LEVELS, 10),
}


def add_options(parser: ArgumentParser) -> None:
    """Those of `run`."""
    options.add_common(parser)
    racers = dict.fromkeys(name for course in COURSES.values() for name in course.entrants)
    options.add_methods(parser, tuple(racers))


def run(*, quick: bool, seed: int, methods: tuple[str, ...], output: Path) -> None:
    """Runs every method on every course, and writes times and work to all levels after each."""
    courses = dict(COURSES)
    if quick:
        courses = {
            name: courses[name]._replace(seconds=courses[name].seconds / 4, seeds=1)
            for name in ("exponentials", "peaks, 500 points")
        }
    settings: dict = {"quick": quick, "seed": seed, "courses": {}}
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}
    costs: dict[str, dict] = {}
    groups: dict[str, dict[str, list[Run]]] = {}
    tables: list[str] = []
    runs: list[Run] = []
    for name, course in courses.items():
        settings["courses"][name] = {
            "levels": course.levels,
            "seconds": course.seconds,
            "seeds": course.seeds,
        }
        found, growth = hold(name, course, seed, methods)
        groups[name] = by_method(found)
        results[name] = {
            method: summary(group, course.levels, growth[method])
            for method, group in groups[name].items()
        }
        tables += course_tables(name, course, results[name])
        runs += [one._replace(variant=f"{name}; {one.variant}") for one in found]
        if "peaks" in name:
            costs[name] = cost_of_curvature(course.make(seed))
            tables.append(cost_text(costs[name]))
        plots.race(output / "race.png", groups)
        write(output, "race", tables, settings, results | {"costs": costs}, runs)


def hold(
    name: str, course: Course, seed: int, methods: Sequence[str]
) -> tuple[list[Run], dict[str, float]]:
    """The runs on one course, and the megabytes that each method grew by at most.

    From seed to seed another method begins.
    """
    entrants = [
        (method, variant, entrant)
        for method, variants in course.entrants.items()
        for variant, entrant in variants.items()
        if method in methods
    ]
    limit = Limit(course.levels[-1], course.seconds)
    runs: list[Run] = []
    growth: dict[str, float] = {}
    for s in range(seed, seed + course.seeds):
        task = course.make(s)
        first = s % len(entrants)
        for method, variant, entrant in entrants[first:] + entrants[:first]:
            print(f"{name}, seed {s}: {method} {variant}".rstrip(), flush=True)
            solution, megabytes = entrant(task, limit)
            runs.append(Run(method, variant, s, solution, solution.history))
            growth[method] = max(growth.get(method, 0.0), megabytes)
    order = list(course.entrants)
    return sorted(runs, key=lambda run: (order.index(run.method), run.seed)), growth


def summary(runs: Sequence[Run], levels: Sequence[float], megabytes: float) -> dict:
    """Medians over the seeds of what the method's best variant took to each level, None where it
    did not get there."""

    def median(axis, compiling=0.0):
        spent = [
            [min(to(run, axis, level) for run in group) for group in by_seed(runs).values()]
            for level in levels
        ]
        return [float(np.median(of_level)) + compiling for of_level in spent]

    compile_seconds = max(run.solution.compile_seconds for run in runs)
    return {
        "seconds": median("seconds"),
        "work_units": median("work_units"),
        "compile_seconds": compile_seconds,
        "seconds_with_compilation": median("seconds", compile_seconds),
        "megabytes": megabytes,
        "lowest": min(float(np.min(run.history["objective"])) for run in runs),
    }


def to(run: Run, axis: str, level: float) -> float:
    """What a run had spent of `axis` when its objective first reached the level."""
    (reached,) = np.nonzero(run.history["objective"] <= level)
    return float(run.history[axis][reached[0]]) if len(reached) else np.inf


def course_tables(name: str, course: Course, results: Mapping[str, dict]) -> list[str]:
    """Two tables of one course: seconds and work units to every level."""
    medians = f", median of {course.seeds} seeds" if course.seeds > 1 else ""
    levels = [f"{level:g}" for level in course.levels]

    def cells(values):
        return [f"{value:.3g}" if np.isfinite(value) else "–" for value in values]

    seconds = text_table(
        f"{name}: seconds to objective{medians}, of at most {course.seconds:g}",
        ["", *levels, "compile s", "MB", "lowest"],
        [
            [
                method,
                *cells(row["seconds"]),
                f"{row['compile_seconds']:.1f}",
                f"{row['megabytes']:.0f}",
                f"{row['lowest']:.1e}",
            ]
            for method, row in results.items()
        ],
    )
    work = text_table(
        f"{name}: work units to objective{medians}",
        ["", *levels],
        [[method, *cells(row["work_units"])] for method, row in results.items()],
    )
    return [seconds, work]


def cost_of_curvature(task: Task) -> dict:
    """What a Krylov space is spared by those before it, and an iteration with the whole matrix."""
    return {
        "preconditioning": products_saved(task),
        "dense_iteration": cost.dense_iteration(task.problem, task.theta, task.train),
    }


def cost_text(costs: dict) -> str:
    """The same in words."""
    saved, spent = costs["preconditioning"], costs["dense_iteration"]
    return (
        f"A recycled Krylov space reaches with {saved['median']:g} products, the median of "
        f"{len(saved['recycled'])} steps,\nthe model decrease of a plain one with "
        f"{saved['plain']}.\n"
        f"An iteration of GNvpro dense takes {1e3 * spent['seconds']:.1f} ms, "
        f"{spent['seconds'] / spent['floor_seconds']:.2f} times its floor of "
        f"{1e3 * spent['floor_seconds']:.1f} ms:\n"
        f"{spent['operations'] / 1e9:.2f} Gflop at {spent['operations_per_second'] / 1e9:.0f} "
        f"Gflop/s and {spent['bytes'] / 1e6:.0f} MB at {spent['bytes_per_second'] / 1e9:.1f} GB/s."
    )
