"""Surrogates of simulators: networks that learn a map from parameters to observables, in levels.

The protocol is that of arXiv:2007.13171, section 4: an antisymmetric ResNet with weights for 2
steps in time is trained with penalties of 1e-10, prolonged to 4 and then to 8, the penalties being
halved each time. States take 8 steps throughout, so that prolongation is free of losses. The
settings are in `cdr` and `dcr`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import varprox as vp
from benchmarks import baselines, minibatch, plots
from benchmarks.experiment import Run, best, by_method, by_seed, end, evaluate, text_table, write
from varprox import Method, Problem
from varprox.fit import join

LEVELS, STEPS, FINAL_TIME, PENALTY = 3, 2, 1.0, 1e-10
STATE_STEPS = STEPS * 2 ** (LEVELS - 1)
WIDTHS, SEEDS = (8, 16), 5
SIZES = (16, 64, 256)  # of Adam's batches
SLIM_SIZE = 16  # of slimTrain's
ADAM = {rate: optax.adam(rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2)}  # one compilation each
STARTS = {"W(θ)": baselines.solved_w, "random W": baselines.random_w}
RIDGES = tuple(10.0**k for k in range(-12, 5))
SETS = ("train", "validation", "test")
Make = Callable[[Problem, Any], Method]  # of a level's problem and the W before it, None at first


class Setting(NamedTuple):
    """What is learned, and for how long."""

    name: str
    load: Callable[[bool], tuple]  # of `quick`; train, validation and test first
    simulate: Callable[[np.ndarray], np.ndarray]
    timed: int  # samples that the simulator is timed with
    work: float  # units a level
    curvatures: Mapping[str, dict]  # the variants of GNvpro, by their options
    draw: Callable[[Path, np.ndarray, np.ndarray], None]  # of true and predicted test targets


class Surrogate(NamedTuple):
    """The data, targets in units of their root mean square, and a network for them."""

    sets: Mapping[str, tuple]
    theta: Any
    model: vp.Separable
    seed: int


def run(
    setting: Setting, *, quick: bool, seed: int, methods: tuple[str, ...], output: Path
) -> None:
    """Trains networks of both widths from every seed, and writes excesses, errors and pictures."""
    work = setting.work / 4 if quick else setting.work
    widths, seeds = (WIDTHS[:1], 1) if quick else (WIDTHS, SEEDS)
    data = setting.load(quick)
    settings = {
        "quick": quick, "seeds": list(range(seed, seed + seeds)), "widths": widths,
        "work_units_a_level": work, "levels": LEVELS, "steps": STEPS, "state_steps": STATE_STEPS,
        "final_time": FINAL_TIME,
        "penalty": PENALTY, "samples": [len(pair[1]) for pair in data[:3]],
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {"ridge": ridge(data)}
    tables: list[str] = []
    runs: list[Run] = []
    panels: dict[str, dict[str, list[Run]]] = {}
    for width in widths:
        surrogates = [make(data, width, s) for s in range(seed, seed + seeds)]
        floor = lowest_loss(surrogates[0].sets["train"][1], width)
        entered = entrants(setting.curvatures, quick)
        entered = {name: entered[name] for name in entered if name.lower() in methods}
        found = [one for s in surrogates for one in compete(s, entered, work, floor)]
        title = f"{setting.name}, width {width}"
        panels[title] = by_method(found)
        results[title] = summary(panels[title], surrogates, LEVELS * work, floor)
        tables += describe(title, results[title], results["ridge"], LEVELS * work)
        runs += [one._replace(variant=f"width {width}; {one.variant}") for one in found]
        plots.race(output / "convergence.png", panels, "excess of the training loss")
        write(output, setting.name, tables, settings, results, runs)
    surrogate, first = surrogates[0], found[0].solution
    inputs, targets = data[2]
    predicted = vp.predict(first.problem, first.theta, first.w, surrogate.sets["test"][0])
    setting.draw(output / "predictions.png", targets, np.asarray(predicted) * unit(data))
    results["speed"] = speed(setting, first, inputs)
    tables.append(speed_text(results["speed"]))
    write(output, setting.name, tables, settings, results, runs)


def unit(data: tuple) -> float:
    """The root mean square of the training targets, in units of which networks see them."""
    return float(np.sqrt(np.mean(data[0][1] ** 2)))


def make(data: tuple, width: int, seed: int) -> Surrogate:
    """A network drawn from the seed."""
    (inputs, targets), *_ = data
    net = vp.networks.AntisymmetricResNet(
        inputs.shape[1], width, targets.shape[1], steps=STEPS, final_time=FINAL_TIME,
        min_steps=STATE_STEPS, rngs=nnx.Rngs(seed),
    )  # fmt: skip
    sets = {
        name: (jnp.asarray(y), jnp.asarray(c / unit(data)))
        for name, (y, c) in zip(SETS, data[:3], strict=True)
    }
    theta, model = vp.nnx.split(net)
    return Surrogate(sets, theta, model, seed)


def lowest_loss(targets: jax.Array, width: int) -> float:
    """The loss that no network with so many features and a bias falls below: that of the best
    approximation of the targets, less their mean, of this rank.

    It is between those of the best approximations of the targets themselves of rank `width` and
    `width` + 1.
    """
    singular = np.linalg.svd(targets - targets.mean(axis=0), compute_uv=False)
    return float(0.5 * np.sum(singular[width:] ** 2) / len(targets))


def error(predicted: jax.Array, targets: jax.Array) -> jax.Array:
    """The relative error, in the Frobenius norm."""
    return jnp.linalg.norm(predicted - targets) / jnp.linalg.norm(targets)


def compete(surrogate: Surrogate, entered: Mapping, work: float, floor: float) -> list[Run]:
    """The runs of all methods from one seed. The first method sets the time for the others, which
    have at least as long as the fastest of its variants took."""
    runs: list[Run] = []
    seconds = 0.0
    for method, variants in entered.items():
        for variant, (make_method, batch_size) in variants.items():
            print(f"seed {surrogate.seed}: {method} {variant}".rstrip(), flush=True)
            trained = train(surrogate, make_method, batch_size, work, floor, seconds)
            runs.append(Run(method, variant, surrogate.seed, *trained))
        seconds = seconds or time_of(runs)
    return runs


def time_of(runs: Sequence[Run]) -> float:
    """The seconds in which the fastest of the runs spent its work."""
    return min(end(run)["seconds"] for run in runs)


def entrants(curvatures: Mapping[str, dict], quick: bool) -> dict[str, dict[str, tuple]]:
    """The variants of every method: how it is made, and the size of its batches if it has such."""
    rates, sizes = (list(ADAM)[1:2], SIZES[:1]) if quick else (list(ADAM), SIZES)

    def gnvpro(options, problem, w):
        return vp.gnvpro(problem, **options)

    def gn(start, problem, w):
        return baselines.gn(problem, start=going_on(start, w))

    def adam(rate, problem, w):
        return minibatch.jointly(problem, ADAM[rate], going_on(baselines.solved_w, w))

    return {
        "GNvpro": {name: (partial(gnvpro, kw), None) for name, kw in curvatures.items()},
        "LBFGSvpro": {"": (lambda problem, w: vp.lbfgsvpro(problem), None)},
        "GN": {f"from {name}": (partial(gn, start), None) for name, start in STARTS.items()},
        "slimTrain": {f"rate {rate:g}": (partial(slimtrain, rate), SLIM_SIZE) for rate in rates},
        "Adam": {
            f"rate {rate:g}, batch {size}": (partial(adam, rate), size)
            for rate in rates
            for size in sizes
        },
    }


def going_on(start: Callable, w: jax.Array | None) -> Callable:
    """`start`, or where there is a W from the level before, this one."""
    return start if w is None else lambda problem, theta, data, key: w


def slimtrain(rate: float, problem: Problem, w: jax.Array | None) -> Method:
    """slimTrain beginning at W(θ) or at the W from the level before, as its rivals do."""
    method = vp.slimtrain(problem, ADAM[rate])

    def init(theta, data, key):
        state = method.init(theta, data, key)
        start = going_on(baselines.solved_w, w)(problem, theta, data, key)
        return state._replace(tikhonov=state.tikhonov._replace(w=start))

    return method._replace(init=init)


def train(
    surrogate: Surrogate,
    make_method: Make,
    batch_size: int | None,
    work: float,
    floor: float,
    seconds: float,
) -> tuple[vp.Solution, dict[str, np.ndarray]]:
    """The solution after `work` units on every level, and a history that goes on, on the last level
    and from the same start, if this took less than `seconds`. Its `objective` is the excess of the
    training loss over the floor."""

    theta, train = surrogate.theta, surrogate.sets["train"]
    square = float(jnp.sum(train[1] ** 2) / len(train[1]))
    options = {
        "validation": surrogate.sets["validation"],
        "metrics": {"error": jax.jit(error)},
        "batch_size": batch_size,
        "seed": surrogate.seed,
    }

    def level(k, before):
        penalty = PENALTY / 2**k
        problem = Problem(surrogate.model, vp.least_squares(), vp.tikhonov(penalty), penalty)
        return make_method(problem, None if before is None else before.w)

    prolong, last = vp.networks.prolong, LEVELS - 1
    before = vp.fit_levels(
        level, theta, train, levels=last, prolong=prolong, max_work=work, **options
    )

    def fit(budget):
        found = vp.fit(
            level(last, before), prolong(before.theta), train, max_work=budget, **options
        )
        solution = join([before, found])
        loss = 0.5 * square * solution.history["train_error"] ** 2
        return solution._replace(history=dict(solution.history) | {"objective": loss - floor})

    solution = fit(work)
    spent, earlier = solution.history["seconds"][-1], before.history["seconds"][-1]
    if spent >= seconds:
        return solution, solution.history
    return solution, fit(work * (1 + 1.1 * (seconds - spent) / (spent - earlier))).history


def summary(
    groups: Mapping[str, Sequence[Run]], surrogates: Sequence[Surrogate], work: float, floor: float
) -> dict:
    """Excesses at equal work and seconds, relative errors, and what prolongation changed, between
    levels and if there is one more, to finer steps of the states."""
    first = next(iter(groups.values()))  # GNvpro's, unless it was not asked for
    limits = {seed: time_of(group) for seed, group in by_seed(first).items()}
    methods = {}
    for method, runs in groups.items():
        excess: dict[str, list[float]] = {"work_units": [], "seconds": []}
        errors: dict[str, list[float]] = {name: [] for name in SETS}
        for surrogate in surrogates:
            group = by_seed(runs)[surrogate.seed]
            for axis, limit in (("work_units", work), ("seconds", limits[surrogate.seed])):
                excess[axis].append(best(group, axis, limit)["objective"])
            chosen = min(group, key=lambda one: end(one)["validation_error"]).solution
            found = evaluate(
                chosen.problem, chosen.theta, chosen.w, surrogate.sets, {"error": error}
            )
            for name in SETS:
                errors[name].append(found[f"{name}_error"])
        methods[method] = {
            "excess": excess,
            "errors": errors,
            "seconds": float(np.median([end(one)["seconds"] for one in runs])),
            "compile_seconds": max(one.solution.compile_seconds for one in runs),
        }
    return {
        "floor": floor,
        "seconds": float(np.median(list(limits.values()))),
        "methods": methods,
        "prolongation": [change for one in first for change in prolonged(one, floor)],
        "refinement": [refined(one, surrogates[0].sets["train"]) for one in first],
    }


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

    def loss(theta):
        w = vp.solve_w(problem, theta, train)
        return problem.loss.value(vp.predict(problem, theta, w, train[0]), train[1])

    return float(loss(vp.networks.prolong(theta)) / loss(theta) - 1)


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
        for _ in range(51):
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
