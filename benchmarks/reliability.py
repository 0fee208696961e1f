"""Runs that are killed, taken up again, long, many, or of more data than one device holds: what is
lost, and what it costs.

Every run here fits a function of two variables with a small network. `python -m
benchmarks.reliability METHOD FOLDER` is one that keeps every step in a folder until it is killed,
`python -m benchmarks.reliability METHOD` one that is split over all devices of the process.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import varprox as vp
from benchmarks import devices, options
from benchmarks.experiment import text_table, write

METHODS = ("krylov", "dense", "broydenvpro", "lbfgsvpro", "slimtrain")
SAMPLES, UNITS, PENALTY = 100, 8, 1e-8
KILLS, QUICK_KILLS = 20, 2
STEPS = 60  # of a run that is killed, each of which is kept
LONG, QUICK_LONG = {"slimtrain": 1000, "dense": 500}, {"slimtrain": 120, "dense": 120}
RUNS = 7  # long ones
MANY, MANY_STEPS, REPEATS = 16, 60, 5
DATA_SETS, QUICK_DATA_SETS = 1000, 100
NOISE = 0.05
BATCH_SIZE = 10
DEVICES, SPLIT_SAMPLES, SPLIT_STEPS = 8, 2**18, 10
DEEP_SAMPLES, WIDTH, LAYERS, CHUNKS = 100_000, 32, 4, (None, 16384, 1024)


def add_options(parser: ArgumentParser) -> None:
    """Those of `run`."""
    options.add_common(parser)
    options.add_methods(parser, METHODS)


def run(*, quick: bool, seed: int, methods: Sequence[str], output: Path) -> None:
    """Measures every line of the table, method by method."""
    results = {
        "killed": {name: killed(name, QUICK_KILLS if quick else KILLS, seed) for name in methods},
        "many": {name: many(name) for name in methods},
        "long": {
            name: long(name, steps)
            for name, steps in (QUICK_LONG if quick else LONG).items()
            if name in methods
        },
        "coverage": coverage(QUICK_DATA_SETS if quick else DATA_SETS, seed),
        "devices": {name: over_devices(name) for name in methods},
        "chunks": {name: in_chunks(name) for name in methods if name in ("krylov", "lbfgsvpro")},
    }
    settings = {
        "quick": quick,
        "seed": seed,
        "samples": SAMPLES,
        "units": UNITS,
        "steps": STEPS,
        "many": MANY,
        "split samples": SPLIT_SAMPLES,
        "deep network": [DEEP_SAMPLES, WIDTH, LAYERS],
    }
    write(output, "reliability", tables(results), settings, results, [])


def task(samples: int = SAMPLES) -> tuple:
    """θ, and the data."""
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1, 1, (samples, 2))
    targets = np.sin(3 * inputs[:, :1]) * inputs[:, 1:]
    theta = {"kernel": rng.normal(size=(2, UNITS)), "bias": rng.normal(size=UNITS)}
    return jax.tree.map(jnp.asarray, (theta, (inputs, targets)))


def features(theta: dict, inputs: jax.Array) -> jax.Array:
    """One layer."""
    return jnp.tanh(inputs @ theta["kernel"] + theta["bias"][None])


def make(name: str, fn: Callable = features, **more) -> tuple[vp.Method, dict]:
    """A method, and the options that `fit` needs with it."""
    problem = vp.Problem(vp.Separable(fn), vp.least_squares(), PENALTY, **more)
    if name == "slimtrain":
        return vp.slimtrain(problem, optax.adam(1e-2)), {"batch_size": BATCH_SIZE}
    if name in ("krylov", "dense"):
        return vp.gnvpro(problem, curvature=name, tolerance=0.0), {}
    return {"broydenvpro": vp.broydenvpro, "lbfgsvpro": vp.lbfgsvpro}[name](problem), {}


# ------------------------------------------------------------------------------------------- kills


def keep(name: str, folder: str | None, **more) -> vp.Solution:
    """The run that is killed; without a folder the one that is not."""
    theta, data = task()
    method, options = make(name)
    return vp.fit(method, theta, data, epochs=STEPS, checkpoint=folder, every=0, **options, **more)


def killed(name: str, kills: int, seed: int) -> dict:
    """How a run ends that is killed so many times, at random moments between its first step and
    its last, also while it is being kept."""
    print(f"{name}: {kills} kills", flush=True)
    rng = np.random.default_rng(seed)
    landed = 0
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent, "run"))
        command = [sys.executable, "-m", "benchmarks.reliability", name, folder]
        environment = os.environ | {
            "JAX_ENABLE_X64": "1",
            "JAX_COMPILATION_CACHE_DIR": str(Path(parent, "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for _ in range(kills):
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env=environment
            ) as process:
                process.stdout.readline()  # of its first entry
                time.sleep(rng.exponential(0.005))
                process.kill()
                landed += process.wait() != 0
        ended = keep(name, folder)
    expected = keep(name, None)
    same = jax.tree.map(np.array_equal, ended.state, expected.state)
    columns = {n for n in expected.history if n != "seconds"}
    histories = all(
        np.array_equal(ended.history[n], expected.history[n], equal_nan=True) for n in columns
    )
    return {
        "kills": landed,
        "equal": all(jax.tree.leaves(same)) and histories,
        "steps": len(ended.history["objective"]) - 1,
    }


# ------------------------------------------------------------------------------------ many and long


def many(name: str) -> dict:
    """The time of 16 runs one after the other over that of all at once, without compilation."""
    print(f"{name}: {MANY} networks", flush=True)
    theta, data = task()
    method, options = make(name)
    options |= {"epochs": MANY_STEPS}
    rng = np.random.default_rng(1)
    thetas = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=(MANY, *x.shape)), theta)
    single = [jax.tree.map(lambda x, i=i: x[i], thetas) for i in range(MANY)]

    def together():
        vp.fit_many(method, thetas, data, **options)

    def one_by_one():
        for start in single:
            vp.fit(method, start, data, **options)

    together(), one_by_one()  # compile
    ratios = [_seconds(one_by_one) / _seconds(together) for _ in range(REPEATS)]
    return {"speed_up": statistics.median(ratios)}


def long(name: str, steps: int) -> dict:
    """How time and memory of a step change along long runs, as fractions per 100 steps: the median
    of some runs, since others are at work on a machine, too."""
    print(f"{name}: {steps} steps", flush=True)
    found = [_long(name, steps) for _ in range(RUNS)]
    return {key: statistics.median(run[key] for run in found) for key in found[0]}


def _long(name, steps):
    theta, data = task()
    method, options = make(name)
    seconds, megabytes = [], []

    def watch(row, _):
        seconds.append(row["seconds"])
        megabytes.append(_megabytes())

    vp.fit(method, theta, data, epochs=steps, callback=watch, **options)
    settled = len(seconds) // 10  # from there on
    times, sizes = np.diff(seconds)[settled:], np.array(megabytes)[settled:]
    return {
        "steps": len(seconds) - 1,
        "time_slope": _slope(times) / np.median(times),
        "memory_slope": _slope(sizes) / np.median(sizes),
        "megabytes": float(sizes[-1]),
    }


def _slope(values):
    """The change per 100 entries, by the median of blocks, since single steps are interrupted."""
    blocks = [np.median(block) for block in np.array_split(values, 10)]
    centres = (np.arange(10) + 0.5) * len(values) / 10
    return 100 * np.polyfit(centres, blocks, 1)[0]


def _seconds(fn):
    begin = time.perf_counter()
    fn()
    return time.perf_counter() - begin


def _megabytes():
    """The memory that this process holds."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    except OSError:  # known on Linux only
        return float("nan")
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


# ---------------------------------------------------------------------------------------- coverage


def coverage(data_sets: int, seed: int) -> dict:
    """How often intervals of 1.96 standard errors hold the truth, over noisy sets of data."""
    print(f"{data_sets} noisy sets of data", flush=True)
    rng = np.random.default_rng(seed)
    inputs = np.linspace(0, 2, 60)[:, None]
    truth, w = np.array([1.0, 4.0]), np.array([[1.0], [2.0]])
    model = vp.Separable(lambda theta, x: jnp.exp(-x * theta), vp.dense(bias=False))
    problem = vp.Problem(model, vp.least_squares())
    clean = np.exp(-inputs * truth) @ w
    noise = NOISE * rng.normal(size=(data_sets, *clean.shape))
    many_inputs = np.broadcast_to(inputs, (data_sets, *inputs.shape))
    data = jnp.asarray(many_inputs), jnp.asarray(clean + noise)
    starts = jnp.broadcast_to(truth, (data_sets, 2))
    method = vp.gnvpro(problem, curvature="dense")
    found = vp.fit_many(method, starts, data, own_data=True, max_work=400)

    @jax.jit
    def held(theta, fitted_w, data):
        solution = vp.Solution(theta, fitted_w, {}, vp.Status.CONVERGED, 0.0, problem)
        spread = vp.covariance(problem, solution, data)
        at = problem, theta, fitted_w, data[0]
        predictions, std = vp.predict(*at, covariance=spread)
        return (
            jnp.abs(theta - truth) <= 1.96 * spread.theta_std,
            jnp.abs(fitted_w - w) <= 1.96 * spread.w_std,
            jnp.abs(predictions - clean) <= 1.96 * std,
        )

    shares = [
        held(run.theta, run.w, jax.tree.map(lambda x, i=i: x[i], data))
        for i, run in enumerate(found)
    ]
    names = "theta", "w", "predictions"
    return {
        name: float(np.mean([share[place] for share in shares])) for place, name in enumerate(names)
    }


# --------------------------------------------------------------------------------------- more data


def over_devices(name: str) -> dict:
    """`devices.compare` for so many devices, in a process that has as many."""
    print(f"{name}: {DEVICES} devices", flush=True)
    environment = os.environ | {
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "64",  # threads, so that devices do not wait for one another for ever
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    command = [sys.executable, "-m", "benchmarks.reliability", name]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def deep(theta: dict, inputs: jax.Array) -> jax.Array:
    """Several layers."""
    z = jnp.tanh(inputs @ theta["opening"])
    for kernel in theta["layers"]:
        z = z + 0.5 * jnp.tanh(z @ kernel)
    return z


def in_chunks(name: str) -> dict:
    """The memory that a compiled step takes beside its arguments, and how far its objective leads
    from that of all samples together."""
    print(f"{name}: chunks", flush=True)
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1, 1, (DEEP_SAMPLES, 2))
    data = jax.tree.map(jnp.asarray, (inputs, np.sin(3 * inputs[:, :1]) * inputs[:, 1:]))
    theta = {
        "opening": jnp.asarray(rng.normal(size=(2, WIDTH))),
        "layers": jnp.asarray(0.3 * rng.normal(size=(LAYERS, WIDTH, WIDTH))),
    }
    found, values = {}, []
    for chunk in CHUNKS:
        method, _ = make(name, deep, chunk=chunk)
        state, step = devices.compiled(method, theta, data)
        values.append(float(step(state, data)[0].objective))
        found[str(chunk)] = {
            "megabytes": step.memory_analysis().temp_size_in_bytes / 1e6,
            "difference": abs(values[-1] / values[0] - 1),
        }
    return found


def tables(results: dict) -> list[str]:
    """What is printed."""
    lines = [
        [name, str(row["kills"]), "yes" if row["equal"] else "NO", f"{found['speed_up']:.1f}"]
        for (name, row), found in zip(
            results["killed"].items(), results["many"].values(), strict=True
        )
    ]
    columns = ["", "kills", "ends with the same bits", f"{MANY} at once, times as fast"]
    found = [text_table("Runs that are killed, and runs together", columns, lines)]
    lines = [
        [
            name,
            str(row["steps"]),
            f"{100 * row['time_slope']:+.2f} %",
            f"{100 * row['memory_slope']:+.3f} %",
        ]
        for name, row in results["long"].items()
    ]
    columns = ["", "steps", "time of a step", "memory"]
    if lines:
        found.append(text_table("Long runs: change per 100 steps", columns, lines))
    lines = [[name, f"{100 * share:.1f} %"] for name, share in results["coverage"].items()]
    found.append(text_table("Intervals of 1.96 standard errors", ["", "hold the truth"], lines))
    lines = [
        [name, f"{row['speed_up']:.1f} of {row['devices']}", f"{row['difference']:.0e}"]
        for name, row in results["devices"].items()
    ]
    columns = ["", "operations shared", "objectives differ by"]
    found.append(text_table("A step over devices, and ten steps", columns, lines))
    lines = [
        [name, chunk, f"{row['megabytes']:.0f} MB", f"{row['difference']:.0e}"]
        for name, rows in results["chunks"].items()
        for chunk, row in rows.items()
    ]
    columns = ["", "chunk", "memory of a step", "objectives differ by"]
    if lines:
        found.append(text_table("Samples that are taken at a time", columns, lines))
    return found


if __name__ == "__main__":
    if len(sys.argv) == 3:
        keep(*sys.argv[1:], callback=lambda *_: print("entry", flush=True))
    else:
        method, _ = make(sys.argv[1])
        print(json.dumps(devices.compare(method, *task(SPLIT_SAMPLES), SPLIT_STEPS)))
