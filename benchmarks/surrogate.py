"""How surrogates of simulators compare: excesses over the lowest loss, errors, times and pictures.

The training is in `levels`, the settings are in `cdr` and `dcr`.
"""

import math
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import varprox as vp
from benchmarks import levels, options, plots
from benchmarks.experiment import Run, best, by_method, by_seed, end, evaluate, text_table, write
from benchmarks.levels import LEVELS, SETS, STATE_STEPS, Surrogate, error, time_of

METHODS = ("gnvpro", "broydenvpro", "lbfgsvpro", "gn", "slimtrain", "adam")
WIDTHS = (8, 16)
CALLS = 1000  # of the network that are timed
RIDGES = tuple(10.0**k for k in range(-12, 5))


class Setting(NamedTuple):
    """What is learned, and for how long."""

    name: str
    load: Callable[[bool], tuple]  # of `quick`; train, validation and test first
    simulate: Callable[[np.ndarray], np.ndarray]
    timed: int  # samples that the simulator is timed with
    work: float  # units a level
    # The variants of GNvpro, by its options on the first level and on those after it.
    curvatures: Mapping[str, tuple[dict, dict]]
    draw: Callable[[Path, np.ndarray, np.ndarray], None]  # of true and predicted test targets


def add_options_of(methods: Sequence[str], parser: ArgumentParser) -> None:
    """Those of `run`, with these methods."""
    options.add_common(parser)
    options.add_methods(parser, methods)
    options.add_seeds(parser, 5)
    parser.add_argument(
        "--width",
        dest="widths",
        action="append",
        type=options.integer(2),
        help="of the networks; may be given several times, by default 8 and 16",
    )


def run(
    setting: Setting,
    *,
    quick: bool,
    seed: int,
    seeds: int,
    widths: Sequence[int] | None,
    methods: tuple[str, ...],
    output: Path,
) -> None:
    """Trains networks of each width from each of `seeds` seeds, and writes excesses, errors and
    pictures; if `quick` from one seed, on one level less, for less work, with fewer variants of the
    methods, and of one width unless some are given."""
    work = setting.work / 4 if quick else setting.work
    trained = LEVELS - 1 if quick else LEVELS
    widths = widths or WIDTHS[: 1 if quick else None]
    drawn = range(seed, seed + (1 if quick else seeds))
    data = setting.load(quick)
    settings = {
        "quick": quick, "seeds": list(drawn), "widths": widths,
        "work_units_a_level": work, "levels": trained, "steps": levels.STEPS,
        "state_steps": STATE_STEPS, "final_time": levels.FINAL_TIME, "penalty": levels.PENALTY,
        "samples": [len(pair[1]) for pair in data[:3]],
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {"ridge": ridge(data)}
    tables: list[str] = []
    runs: list[Run] = []
    panels: dict[str, dict[str, list[Run]]] = {}
    for width in widths:
        surrogates = [levels.make(data, width, s) for s in drawn]
        floor = levels.lowest_loss(surrogates[0].sets["train"][1], width)
        entered = levels.entrants(setting.curvatures, quick)
        entered = [one for one in entered if one.method.lower() in methods]
        found = levels.compete(surrogates, entered, work, floor, trained)
        title = f"{setting.name}, width {width}"
        panels[title] = by_method(found)
        results[title] = summary(panels[title], surrogates, trained * work, floor)
        tables += describe(title, results[title], results["ridge"], trained * work)
        runs += [one._replace(variant=f"width {width}; {one.variant}") for one in found]
        plots.race(output / "convergence.png", panels, "excess of the training loss")
        write(output, setting.name, tables, settings, results, runs)
    surrogate, first = surrogates[0], most_valid(by_seed(found)[seed])
    inputs, targets = data[2]
    predicted = vp.predict(first.problem, first.theta, first.w, surrogate.sets["test"][0])
    setting.draw(output / "predictions.png", targets, np.asarray(predicted) * levels.unit(data))
    results["speed"] = speed(setting, first, inputs)
    tables.append(speed_text(results["speed"]))
    write(output, setting.name, tables, settings, results, runs)


def summary(
    groups: Mapping[str, Sequence[Run]], surrogates: Sequence[Surrogate], work: float, floor: float
) -> dict:
    """Excesses at equal work and seconds, the seconds that the lowest at equal work took, relative
    errors, and what prolongation changed, between levels and if there is one more, to finer steps
    of the states."""
    first = next(iter(groups.values()))  # GNvpro's, unless it was not asked for
    limits = {seed: time_of(group) for seed, group in by_seed(first).items()}
    methods = {}
    for method, runs in groups.items():
        excess: dict[str, list[float]] = {"work_units": [], "seconds": []}
        errors: dict[str, list[float]] = {name: [] for name in SETS}
        spent = []
        for surrogate in surrogates:
            group = by_seed(runs)[surrogate.seed]
            for axis, limit in (("work_units", work), ("seconds", limits[surrogate.seed])):
                row = best(group, axis, limit)  # None where nothing is through its start yet
                excess[axis].append(math.inf if row is None else row["objective"])
            spent.append(best(group, "work_units", work)["seconds"])
            chosen = most_valid(group)
            found = evaluate(
                chosen.problem, chosen.theta, chosen.w, surrogate.sets, {"error": error}
            )
            for name in SETS:
                errors[name].append(found[f"{name}_error"])
        methods[method] = {
            "excess": excess,
            "errors": errors,
            "seconds": float(np.median(spent)),
            "compile_seconds": max(one.solution.compile_seconds for one in runs),
        }
    return {
        "floor": floor,
        "seconds": float(np.median(list(limits.values()))),
        "methods": methods,
        "prolongation": [change for one in first for change in prolonged(one, floor)],
        "refinement": [refined(one, surrogates[0].sets["train"]) for one in first],
    }


def most_valid(runs: Sequence[Run]) -> vp.Solution:
    """The solution with the lowest validation error."""
    return min(runs, key=lambda one: end(one)["validation_error"]).solution


def prolonged(run: Run, floor: float) -> list[float]:
    """The relative changes of the training loss where one level goes over to the next."""
    history = run.solution.history
    (new,) = np.nonzero(np.diff(history["level"]))
    loss = history["objective"] + floor
    return (loss[new + 1] / loss[new] - 1).tolist()


def refined(run: Run, train: tuple) -> float:
    """The relative change of the training loss, with the best W each time, where the trained
    network is prolonged once more and its states take twice the steps."""
    problem, theta = run.solution.problem, run.solution.theta
    return float(
        _lowest(problem, vp.networks.prolong(theta), train) / _lowest(problem, theta, train) - 1
    )


@jax.jit
def _lowest(problem, theta, train):
    w = vp.solve_w(problem, theta, train)
    return problem.loss.value(vp.predict(problem, theta, w, train[0]), train[1])


def ridge(data: tuple) -> dict:
    """The relative errors of an affine map, its penalty being the best for validation."""
    ones = [np.concatenate([y, np.ones((len(y), 1))], axis=1) for y, _ in data[:3]]
    (a, *_), c = ones, [pair[1] for pair in data[:3]]

    def errors(penalty):
        w = np.linalg.solve(a.T @ a / len(a) + penalty * np.eye(a.shape[1]), a.T @ c[0] / len(a))
        pairs = zip(SETS, ones, c, strict=True)
        return {name: float(error(y @ w, targets)) for name, y, targets in pairs}

    return min((errors(penalty) for penalty in RIDGES), key=lambda found: found["validation"])


def describe(title: str, result: dict, affine: dict, work: float) -> list[str]:
    """Two tables: excesses, medians over the seeds, and errors."""
    excesses = [
        [
            method,
            *(f"{np.median(row['excess'][axis]):.2e}" for axis in ("work_units", "seconds")),
            f"{row['seconds']:.1f}",
            f"{row['compile_seconds']:.1f}",
        ]
        for method, row in result["methods"].items()
    ]
    between, after = (100 * np.abs(result[name]) for name in ("prolongation", "refinement"))
    columns = ["", f"{work:g} units", f"{result['seconds']:.2g} s", "run s", "compile s"]
    head = (
        f"{title}: excess of the training loss over its floor of {result['floor']:.2e}, medians\n"
        f"(prolongation changes that of {next(iter(result['methods']))} by {between.max():.1g} % "
        f"at most, once more, to {2 * STATE_STEPS} steps, by {np.median(after):.2g} %, the median)"
    )
    errors = [
        [method, *(spread(row["errors"][name]) for name in SETS)]
        for method, row in result["methods"].items()
    ]
    errors.append(["ridge regression", *(f"{100 * affine[name]:.3g}" for name in SETS)])
    return [
        text_table(head, columns, excesses),
        text_table(
            f"{title}: relative errors in % after {work:g} units, mean ± std [lowest, highest]",
            ["", *SETS],
            errors,
        ),
    ]


def spread(errors: Sequence[float]) -> str:
    """Of relative errors, in %."""
    values = 100 * np.array(errors)
    return f"{values.mean():.3g} ± {values.std():.2g} [{values.min():.3g}, {values.max():.3g}]"


def speed(setting: Setting, solution: vp.Solution, inputs: np.ndarray) -> dict:
    """Seconds a sample of the simulator and of the network, for one alone and among many."""
    predict = jax.jit(partial(vp.predict, solution.problem, solution.theta, solution.w))

    def seconds(samples):
        samples, times = jnp.asarray(samples, solution.w.dtype), []
        for _ in range(CALLS + 1):
            begin = time.perf_counter()
            predict(samples).block_until_ready()
            times.append(time.perf_counter() - begin)
        return float(np.median(times[1:])) / len(samples)  # the first one compiles

    def simulating(samples):
        begin = time.perf_counter()
        setting.simulate(np.asarray(samples, float))
        return (time.perf_counter() - begin) / len(samples)

    alone = [simulating(inputs[k : k + 1]) for k in range(setting.timed)]
    return {
        "simulator": {"one": float(np.median(alone)), "many": simulating(inputs[: setting.timed])},
        "network": {"one": seconds(inputs[:1]), "many": seconds(inputs)},
    }


def speed_text(times: dict) -> str:
    """The same in words."""
    (one, many), (fast, faster) = ((times[who]["one"], times[who]["many"]) for who in times)
    return (
        f"A sample takes the simulator {one:.3g} s alone and {many:.3g} s among many, the network "
        f"{1e6 * fast:.3g} µs\nalone and {1e6 * faster:.3g} µs among many: 1/{one / fast:.0f} and "
        f"1/{many / faster:.0f} of that."
    )
