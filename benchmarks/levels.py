"""Surrogates of simulators: networks that learn a map from parameters to observables, in levels.

The protocol is that of arXiv:2007.13171, section 4: an antisymmetric ResNet with weights for 2
steps in time is trained with penalties of 1e-10, prolonged to 4 and then to 8, the penalties being
halved each time. States take 8 steps throughout, so that prolongation is free of losses. Here are
the network, the rivals and their training; `surrogate` draws up the results.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import varprox as vp
from benchmarks import baselines, minibatch
from benchmarks.competitors import Competitor, from_starts
from benchmarks.experiment import Run, by_method, end, reading
from benchmarks.starts import solved_w
from varprox import Method, Problem
from varprox.training.solution import join

LEVELS, STEPS, FINAL_TIME, PENALTY = 3, 2, 1.0, 1e-10
STATE_STEPS = STEPS * 2 ** (LEVELS - 1)
SIZES = (16, 64, 256)  # of Adam's batches
SLIM_SIZE = 16  # of slimTrain's
EVALUATED = 5  # every so many epochs, which takes about as long as one of large batches
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FINALISTS = 2  # variants of a method that go on to further seeds, for each way to compare them
SETS = ("train", "validation", "test")


class Surrogate(NamedTuple):
    """The data, targets in units of their root mean square, and a network for them."""

    sets: Mapping[str, tuple]
    theta: Any
    model: vp.Separable
    seed: int


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
    singular = np.linalg.svd(targets - targets.mean(axis=0, keepdims=True), compute_uv=False)
    return float(0.5 * np.sum(singular[width:] ** 2) / len(targets))


def error(predicted: jax.Array, targets: jax.Array) -> jax.Array:
    """The relative error, in the Frobenius norm."""
    return jnp.linalg.norm(predicted - targets) / jnp.linalg.norm(targets)


def compete(
    surrogates: Sequence[Surrogate],
    entered: Sequence[Competitor],
    work: float,
    floor: float,
    levels: int = LEVELS,
) -> list[Run]:
    """The runs of all methods from every seed: of all their variants from the first, and from the
    others of those that were among the best there. The first method sets the time for the others,
    which have at least as long as the fastest of its variants took."""
    runs: list[Run] = []
    groups = by_method(entered)
    for surrogate in surrogates:
        seconds = 0.0
        for method, variants in groups.items():
            found = []
            for one in variants:
                print(f"seed {surrogate.seed}: {one}", flush=True)
                trained = train(surrogate, one, work, floor, seconds, levels)
                found.append(Run(method, one.variant, surrogate.seed, *trained))
            seconds = seconds or time_of(found)
            if surrogate is surrogates[0]:
                of = {one.variant: one for one in variants}
                groups[method] = [of[name] for name in finalists(found, levels * work, seconds)]
            runs += found
    return runs


def finalists(runs: Sequence[Run], work: float, seconds: float) -> list[str]:
    """The variants of a method that came nearest to the floor, `FINALISTS` of them in so much work
    and as many in so many seconds, and those with the lowest validation errors after the work."""

    def first(column, axis, limit):
        rows = [reading(run, axis, limit) for run in runs]
        return sorted(rows, key=lambda row: row[column])[:FINALISTS]

    rows = first("objective", "work_units", work) + first("objective", "seconds", seconds)
    rows += first("validation_error", "work_units", work)
    return list(dict.fromkeys(row["variant"] for row in rows))


def time_of(runs: Sequence[Run]) -> float:
    """The seconds in which the fastest of the runs spent its work."""
    return min(end(run)["seconds"] for run in runs)


def entrants(curvatures: Mapping[str, tuple[dict, dict]], quick: bool) -> list[Competitor]:
    """The variants of every method, which are made of a level's problem and the W before it, None
    at first. If `quick` one for each, and what compiles once for two."""
    rates, sizes = (RATES[1:2], SIZES[:1]) if quick else (RATES, SIZES)
    curvatures = dict(list(curvatures.items())[:1]) if quick else curvatures

    def gnvpro(first, after, problem, w):
        return vp.gnvpro(problem, **(first if w is None else after))

    def jointly(make, problem, w, start=solved_w):
        return make(problem, start=going_on(start, w))

    return [
        *(Competitor("GNvpro", name, partial(gnvpro, *kw)) for name, kw in curvatures.items()),
        Competitor("Broydenvpro", "", lambda problem, w: vp.broydenvpro(problem)),
        Competitor("LBFGSvpro", "", lambda problem, w: vp.lbfgsvpro(problem)),
        *from_starts("GN", partial(jointly, baselines.gn)),
        *from_starts("Broyden", partial(jointly, baselines.broyden)),
        *(
            Competitor("slimTrain", f"rate {rate:g}", partial(slimtrain, rate), SLIM_SIZE)
            for rate in rates
        ),
        *(
            Competitor(
                "Adam",
                f"rate {rate:g}, batch {size}",
                partial(jointly, partial(minibatch.adam, rate=rate)),
                size,
            )
            for rate in rates
            for size in sizes
        ),
    ]


def going_on(start: Callable, w: jax.Array | None) -> Callable:
    """`start`, or where there is a W from the level before, this one."""
    return start if w is None else lambda problem, theta, data, key: w


def slimtrain(rate: float, problem: Problem, w: jax.Array | None) -> Method:
    """slimTrain beginning at W(θ) or at the W from the level before, as its rivals do."""
    method = minibatch.at_rate(rate, vp.slimtrain(problem, minibatch.ADAM))

    def init(theta, data, key):
        state = method.init(theta, data, key)
        start = going_on(solved_w, w)(problem, theta, data, key)
        return state.with_w(start)

    return method._replace(init=init)


def train(
    surrogate: Surrogate,
    competitor: Competitor,
    work: float,
    floor: float,
    seconds: float,
    levels: int = LEVELS,
) -> tuple[vp.Solution, dict[str, np.ndarray]]:
    """The solution after `work` units on every level, and a history that goes on from there, on the
    last level, if this took less than `seconds`. Its `objective` is the excess of the training loss
    over the floor, and its entries are those that were evaluated."""
    theta, train = surrogate.theta, surrogate.sets["train"]
    square = float(jnp.sum(train[1] ** 2) / len(train[1]))
    options = {
        "validation": surrogate.sets["validation"],
        "metrics": {"error": jax.jit(error)},
        "evaluate_every": 1 if competitor.batch_size is None else EVALUATED,
        "batch_size": competitor.batch_size,
        "seed": surrogate.seed,
    }

    def level(k, before):
        penalty = PENALTY / 2**k
        problem = Problem(surrogate.model, vp.least_squares(), vp.tikhonov(penalty), penalty)
        return competitor.make(problem, None if before is None else before.w)

    prolong, last = vp.networks.prolong, levels - 1
    before = vp.fit_levels(
        level, theta, train, levels=last, prolong=prolong, max_work=work, **options
    )
    start = prolong(before.theta)

    def fit(budget, found=None):
        method = level(last, before)
        return vp.fit(method, start, train, start=found, max_work=budget, **options)

    def whole(found):
        solution = join([before, found])
        evaluated = np.isfinite(solution.history["train_error"])
        history = {name: column[evaluated] for name, column in solution.history.items()}
        history["objective"] = 0.5 * square * history["train_error"] ** 2 - floor
        return solution._replace(history=history)

    found = fit(work)
    solution = whole(found)
    spent, in_level = solution.history["seconds"][-1], found.history["seconds"][-1]
    if spent >= seconds or found.status != vp.Status.BUDGET:
        return solution, solution.history
    step_more = found.history["work_units"][-1] + 1
    budget = max(step_more, work * (1 + 1.1 * (seconds - spent) / in_level))
    return solution, whole(fit(budget, found)).history
