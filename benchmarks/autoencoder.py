"""An autoencoder of MNIST: slimTrain against Adam, on all images for one epoch or more, and on few.

The setting is that of arXiv:2109.14002, section 5.2; losses are sums of squares an image, of pixels
normalised to variance one. Adam starts its last layer as PyTorch does, and smaller, which suits it
better.
"""

import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import varprox as vp
from benchmarks import minibatch, options, plots
from benchmarks.competitors import Competitor
from benchmarks.entrants import Memory
from benchmarks.experiment import Run, Task, by_method, by_seed, text_table, write
from benchmarks.minibatch import ADAM, at_rate
from varprox.methods.selection import minimise
from varprox.methods.slimtrain import with_learned

BATCH_SIZE, MEMORY = 32, 5
SIZES = tuple(2**k for k in range(7, 15))  # images in the limited regime
EPOCHS = 50
VALIDATION = 2000  # of the 10,000 images, since a curve takes many evaluations
PART = 2000  # images between two evaluations in the full regime
SPREAD, SPREAD_OF_PYTORCH = 0.0625, 0.25  # of the last layer at Adam's start
SELECTED = 1000  # images up to which selections are compared
RATES = (1e-3, 3e-3, 1e-2)
SUMS = (1e2, 1e3, 1e4)  # ΣΛ of the runs that keep it constant
NEVER = vp.constant(0.0)
LABEL = "validation loss, sum of squares an image"


def slim(rate: float, selection=None, initial: float = 0.05) -> Callable:
    """slimTrain with Adam for θ."""
    options = {"selection": selection, "initial": initial}
    return lambda problem: at_rate(rate, vp.slimtrain(problem, ADAM, MEMORY, **options))


def adam(rate: float, spread: float) -> Callable:
    """Adam on all weights, those of the last layer being uniform within ±spread at the start."""
    start = partial(uniform_w, spread)
    return lambda problem: minibatch.adam(problem, rate, start)


def uniform_w(spread, problem, theta, data, key):
    """A start for W."""
    z = jax.eval_shape(problem.model.features, theta, data[0])
    rows = jax.eval_shape(problem.model.head.rows, z)
    return jax.random.uniform(key, (rows.shape[1], 1), rows.dtype, -spread, spread)


def sgcv_of_images(fit, count):
    """sGCV as the authors' code has it, with the number of images for that of residuals."""
    return fit.residual / (BATCH_SIZE - fit.trace) ** 2


ENTRIES = {
    "slimtrain": [Competitor("slimTrain", f"rate {rate:g}", slim(rate)) for rate in RATES],
    "adam": [
        *(Competitor("Adam", f"rate {rate:g}", adam(rate, SPREAD)) for rate in RATES),
        Competitor("Adam, PyTorch's start", "rate 0.001", adam(1e-3, SPREAD_OF_PYTORCH)),
    ],
    "selections": [
        Competitor("slimTrain, sGCV", "rate 0.001", slim(1e-3, vp.sgcv())),
        Competitor("slimTrain, sGCV, N = 32", "rate 0.001", slim(1e-3, minimise(sgcv_of_images))),
        Competitor("slimTrain, Λ = 0", "rate 0.001", slim(1e-3, NEVER, 0.0)),
        *(
            Competitor("slimTrain, constant ΣΛ", f"rate 0.001, {total:g}", slim(1e-3, NEVER, total))
            for total in SUMS
        ),
    ],
}


def add_options(parser: ArgumentParser) -> None:
    """Those of `run`."""
    options.add_common(parser, double=False)
    options.add_methods(parser, ("slimtrain", "adam", "selections"))
    options.add_seeds(parser, 3)
    parser.add_argument(
        "--epochs",
        type=options.integer(1),
        default=50,
        help="over all 50,000 images; 50 by default",
    )
    parser.add_argument(
        "--size",
        dest="sizes",
        action="append",
        type=options.integer(1),
        help="train on so many images for 50 epochs, too; may be given several times, by default "
        "128, 256, …, 16384",
    )


def run(
    *,
    quick: bool,
    seed: int,
    seeds: int,
    methods: Sequence[str],
    output: Path,
    epochs: int,
    sizes: Sequence[int] | None,
) -> None:
    """Times a step, trains on all images for `epochs` and on `sizes` of them for 50, from so many
    seeds, and writes tables and figures after each part; if `quick` from one, on few images for
    five epochs only."""
    drawn = range(seed, seed + (1 if quick else seeds))
    sizes = sizes or SIZES[: 1 if quick else None]
    limited_epochs = 5 if quick else EPOCHS
    settings: dict = {
        "quick": quick,
        "seeds": list(drawn),
        "sizes": [],
        "epochs": {"full": 0 if quick else epochs, "limited": limited_epochs},
    }
    results: dict[str, dict] = {"step": cost(make_task(512, seed))}
    tables, runs = [cost_table(results["step"])], []
    output.mkdir(parents=True, exist_ok=True)

    full = [] if quick else full_regime(methods, drawn, epochs)
    if full:
        runs += full
        results["full"] = {name: summary(group) for name, group in by_method(full).items()}
        tables.append(table(f"50,000 images, {epochs} epochs", results["full"]))
        plots.minibatches(output / "full.png", by_method(full), LABEL)
        draw(output / "reconstructions.png", make_task(1, seed), lowest(full))
        write(output, "autoencoder", tables, settings, results, runs)
    for size in sizes:
        found = limited_regime(methods, size, drawn, limited_epochs)
        settings["sizes"].append(size)
        runs += [r._replace(variant=f"{size} images; {r.variant}") for r in found]
        results[str(size)] = {name: summary(group) for name, group in by_method(found).items()}
        tables.append(table(f"{size} images, {limited_epochs} epochs", results[str(size)]))
        plots.minibatches(output / f"limited_{size}.png", by_method(found), LABEL)
        write(output, "autoencoder", tables, settings, results, runs)


def make_task(size: int, seed: int) -> Task:
    """So many images, and a network, both drawn from `seed`."""
    data = vp.datasets.mnist(size, seed=seed)
    theta, model = vp.nnx.split(vp.networks.Autoencoder((28, 28), rngs=nnx.Rngs(seed)))
    train = jnp.asarray(data.train[0])
    validation = jnp.asarray(data.validation[0][:VALIDATION])
    problem = vp.Problem(model, vp.least_squares())
    return Task(problem, theta, (train, train), (validation, validation), {}, seed)


def limited_regime(
    methods: Sequence[str], size: int, seeds: Sequence[int], epochs: int
) -> list[Run]:
    """So many images by all rates and, where they are few, selections; validated every epoch."""
    runs = []
    few = size <= SELECTED
    entries = [e for name in methods if few or name != "selections" for e in ENTRIES[name]]
    for seed in seeds:
        task = make_task(size, seed)
        for one in entries:
            print(f"{size} images, seed {seed}: {one}", flush=True)
            solution = vp.fit(
                one.make(task.problem),
                task.theta,
                task.train,
                validation=task.validation,
                epochs=epochs,
                batch_size=min(BATCH_SIZE, size),
                seed=seed,
            )
            runs.append(Run(one.method, one.variant, seed, solution, doubled(solution.history)))
    return runs


def full_regime(methods: Sequence[str], seeds: Sequence[int], epochs: int) -> list[Run]:
    """All rates, and sGCV of the selections, on 50,000 images, validated after every `PART` of
    them; from seed to seed another entry begins."""
    runs = []
    used = {name: ENTRIES[name][: 1 if name == "selections" else None] for name in methods}
    entries = [entry for group in used.values() for entry in group]
    for seed in seeds:
        task = make_task(50_000, seed)
        first = seed % len(entries)
        for one in entries[first:] + entries[:first]:
            print(f"50,000 images, seed {seed}: {one}", flush=True)
            solution = by_parts(one.make(task.problem), task, epochs)
            runs.append(Run(one.method, one.variant, seed, solution, doubled(solution.history)))
    return sorted(runs, key=lambda run: (run.method, run.seed))


def by_parts(method: vp.Method, task: Task, epochs: int) -> vp.Solution:
    """The epochs of a stochastic method, part by part."""
    key = jax.random.key(task.seed)
    images = task.train[0]
    shuffled = jax.random.split(key, epochs)
    parts = [jax.random.permutation(k, len(images)).reshape(-1, PART) for k in shuffled]
    parts = jnp.concatenate(parts)
    state, seconds, rows = method.init(task.theta, task.train, key), 0.0, []

    def train(state, chosen):
        part = (images[chosen],) * 2
        begin = time.perf_counter()
        after, info = jax.block_until_ready(method.epoch(state, part, batch_size=BATCH_SIZE))
        return after, info, time.perf_counter() - begin

    first = train(state, parts[0])[-1]
    for count, chosen in enumerate(parts, 1):
        state, info, elapsed = train(state, chosen)
        seconds += elapsed
        row = {name: float(np.mean(column)) for name, column in info._asdict().items()}
        row |= {"validation_loss": validation(method, state, task), "seconds": seconds}
        rows.append(row | {"epoch": count * PART / len(images)})
    history = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    compiling = max(first - history["seconds"][0], 0.0)
    status = vp.Status(int(state.status))
    return vp.Solution(state.theta, state.w, history, status, compiling, trained(method, state))


_predict = jax.jit(vp.predict)


def trained(method, state) -> vp.Problem:
    """The problem with what its features have learned."""
    return with_learned(method.problem, state.learned)


def validation(method, state, task: Task) -> float:
    """The problem's loss on the images for validation."""
    images, targets = task.validation
    predictions = _predict(trained(method, state), state.theta, state.w, images)
    return float(method.problem.loss.value(predictions, targets))


def draw(path: Path, task: Task, runs: Mapping[str, Run]) -> None:
    """The first ten images for validation, and what the runs make of them."""
    images = task.validation[0][:10]
    made = {
        name: np.asarray(vp.predict(s.problem, s.theta, s.w, images))
        for name, s in ((name, run.solution) for name, run in runs.items())
    }
    plots.reconstructions(path, np.asarray(images), made)


def doubled(history: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The history with sums of squares for losses, which have half of them."""
    losses = ("objective", "train_loss", "validation_loss")
    return {k: 2 * v if k in losses else v for k, v in history.items()}


def lowest(runs: Sequence[Run]) -> dict[str, Run]:
    """Of every method the run that ended with the lowest validation loss, from the first seed."""
    last = lambda run: run.history["validation_loss"][-1]  # noqa: E731
    return {
        name: min(next(iter(by_seed(group).values())), key=last)
        for name, group in by_method(runs).items()
    }


def summary(runs: Sequence[Run]) -> dict:
    """Of one method: for each variant the medians over the seeds of the lowest and the last
    validation loss, and of the time."""

    def of(group):
        column = [run.history["validation_loss"] for run in group]
        return {
            "lowest": float(np.median([np.nanmin(c) for c in column])),
            "range": [float(f([np.nanmin(c) for c in column])) for f in (min, max)],
            "last": float(np.median([c[-1] for c in column])),
            "seconds": float(np.median([run.history["seconds"][-1] for run in group])),
        }

    variants: dict[str, list[Run]] = {}
    for one in runs:
        variants.setdefault(one.variant, []).append(one)
    return {variant: of(group) for variant, group in variants.items()}


def table(title: str, results: Mapping[str, dict]) -> str:
    """A line a variant: its lowest validation loss with the range over the seeds, the last, and the
    time."""
    lines = [
        [
            f"{method}, {variant}",
            f"{row['lowest']:.1f} [{row['range'][0]:.1f}, {row['range'][1]:.1f}]",
            f"{row['last']:.1f}",
            f"{row['seconds']:.1f}",
        ]
        for method, variants in results.items()
        for variant, row in variants.items()
    ]
    columns = ["", "lowest [range]", "last", "run s"]
    return text_table(f"Validation loss, {title}: medians over the seeds", columns, lines)


def cost(task: Task, repeats: int = 60) -> dict:
    """Milliseconds a step, the methods taking turns; the same in an epoch; memory it grows by."""
    batch = jax.tree.map(lambda x: x[:BATCH_SIZE], task.train)
    entries = {"Adam": "adam", "slimTrain": "slimtrain", "sGCV": "selections"}
    methods = {name: ENTRIES[group][0].make(task.problem) for name, group in entries.items()}
    key = jax.random.key(task.seed)
    states = {name: m.init(task.theta, task.train, key) for name, m in methods.items()}
    found = {name: {"step": [], "loop": [], "epoch": []} for name in methods}

    def timed(name, kind, fn):
        begin = time.perf_counter()
        states[name] = jax.block_until_ready(fn(states[name]))
        found[name][kind].append(1e3 * (time.perf_counter() - begin))

    def loop(method, state):
        order = jax.random.permutation(key, len(task.train[0])).reshape(-1, BATCH_SIZE)
        for chosen in order:
            state, _ = method.step(state, jax.tree.map(lambda x: x[chosen], task.train))  # noqa: B023
        return state

    def epoch(method, state):
        return method.epoch(state, task.train, batch_size=BATCH_SIZE)[0]

    for name, method in methods.items():  # compiles
        states[name] = epoch(method, method.step(states[name], batch)[0])
    memory = {}
    for _ in range(repeats):
        for name, method in methods.items():
            timed(name, "step", lambda state: method.step(state, batch)[0])  # noqa: B023
    for _ in range(repeats // 10):
        for name, method in methods.items():
            timed(name, "loop", partial(loop, method))
            grown = Memory()
            timed(name, "epoch", partial(epoch, method))
            memory[name] = max(memory.get(name, 0.0), grown.growth())
    steps = len(task.train[0]) // BATCH_SIZE
    for row in found.values():
        row |= {
            "loop": [t / steps for t in row["loop"]],
            "epoch": [t / steps for t in row["epoch"]],
        }
    medians = {
        name: {kind: float(np.median(times)) for kind, times in row.items()}
        for name, row in found.items()
    }
    return {
        name: row | {"ratio": row["step"] / medians["Adam"]["step"], "megabytes": memory[name]}
        for name, row in medians.items()
    }


def cost_table(results: Mapping[str, dict]) -> str:
    """A line a method."""
    columns = ["", "step", "to Adam's", "in a loop", "in an epoch", "MB"]
    lines = [
        [
            name,
            f"{row['step']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['loop']:.1f}",
            f"{row['epoch']:.1f}",
            f"{row['megabytes']:.0f}",
        ]
        for name, row in results.items()
    ]
    return text_table(f"Milliseconds a step of {BATCH_SIZE} images", columns, lines)
