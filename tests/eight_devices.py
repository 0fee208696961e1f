"""Data over eight devices, in a process that has as many: `python eight_devices.py`.

Prints what `test_devices.py` asserts, as JSON.
"""

import json
import math
import re
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import relative
from repository import snippets

import varprox as vp
from benchmarks.devices import compiled, gathered, operations, over
from varprox.methods import minibatches, slimtrain
from varprox.numerics.ridge import span
from varprox.reduced import matrix, w_hessian

SAMPLES, STEPS, BATCH = 2048, 10, 256


def features(theta, inputs):
    return jnp.tanh(inputs @ theta)


def make(loss, chunk=None):
    model = vp.Separable(features)
    return vp.Problem(model, loss, theta_penalty=1e-3, w_penalty=1e-3, chunk=chunk)


SQUARES, ENTROPY = make(vp.least_squares()), make(vp.softmax_cross_entropy())
METHODS = {
    "krylov": vp.gnvpro(SQUARES, curvature="krylov", rank=4, memory=2),
    "dense": vp.gnvpro(SQUARES, curvature="dense", kaufman=False),
    "kernel": vp.gnvpro(SQUARES, curvature="kernel"),
    "forward": vp.gnvpro(SQUARES, curvature="forward"),
    "lbfgsvpro": vp.lbfgsvpro(SQUARES),
    "broydenvpro": vp.broydenvpro(SQUARES),
    "entropy": vp.gnvpro(ENTROPY, curvature="krylov", rank=4, memory=2),
    "chunks": vp.lbfgsvpro(make(vp.least_squares(), chunk=300)),
    "slimtrain": vp.slimtrain(SQUARES, optax.sgd(1e-2)),
}


def data_for(method, samples=SAMPLES):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(samples, 2))
    score = np.sin(2 * inputs @ rng.normal(size=(2, 2))) + 0.3 * rng.normal(size=(samples, 2))
    if method.problem is ENTROPY:
        return inputs, np.eye(2)[score.argmax(axis=1)]
    return inputs, score


def theta():
    return np.random.default_rng(1).normal(size=(2, 3))


def trajectory(state, step, data):
    found = [float(state.objective)]
    for _ in range(STEPS):
        state, info = step(state, data)
        found.append(float(info.objective))
    return np.array(found), state.theta


def of_method(method):
    """How far eight devices lead from one, what they send, and their share of the operations."""
    here, there = over(1, data_for(method)), over(8, data_for(method))
    (one, step), (eight, parted) = compiled(method, theta(), here), compiled(method, theta(), there)
    values, end = trajectory(one, step, here)
    theirs, their_end = trajectory(eight, parted, there)
    return {
        "values": relative(theirs[1:], values[1:]),
        "theta": relative(their_end, np.asarray(end)),
        "decrease": values[1] - values[-1],
        "gathers": gathered(parted.as_text(), SAMPLES),
        "speed_up": operations(step) / operations(parted),
    }


def of_epochs():
    """The same of slimTrain's epochs, and the shapes of features: those of a batch are split."""
    method, found = METHODS["slimtrain"], []
    for devices in (1, 8):
        data = over(devices, data_for(method))
        state = method.init(theta(), data)
        for _ in range(2):
            state, infos = method.epoch(state, data, batch_size=BATCH)
        found.append((np.asarray(infos.objective), np.asarray(state.theta)))
    arguments = slimtrain._advance, *method.epoch.args, state, data, BATCH
    lowered = minibatches._scanned.lower(*arguments, minibatches._split(data, BATCH))
    text = lowered.compile().as_text()
    return {
        "values": max(relative(b, a) for a, b in zip(*found, strict=True)),
        "features": sorted({int(n) for n in re.findall(r"f64\[(\d+),3\]", text)}),
    }


def of_rows():
    """Solutions of rows that are ill-conditioned, or of two columns, against NumPy."""
    rng = np.random.default_rng(2)
    found = {}
    for samples in (SAMPLES, 500, 331, 40, 160):
        q, _ = np.linalg.qr(rng.normal(size=(samples, 6)))
        rows = q * np.geomspace(1, 1e-13, 6) @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
        spanned = jax.jit(span)(over(math.gcd(samples, 8), rows), 0.0)
        basis = np.asarray(spanned.basis)
        found[samples] = {
            "blocks": len(spanned.q),
            "orthonormal": np.abs(basis.T @ basis - np.eye(6)).max(),
            "spans": np.abs(basis @ (basis.T @ rows) - rows).max(),
        }
    rows[:, 2:] = rows[:, :1]
    together = jax.jit(jax.vmap(lambda rows: span(rows, 0.0).basis))
    basis = np.asarray(together(np.stack([rows, rows])))[1]
    found["deficient"] = np.abs(basis @ (basis.T @ rows) - rows).max()
    return found


def of_sizes():
    """How far uneven blocks lead from a single one, or from a single device."""
    found = {}
    for samples, devices in ((8 * 251, 8), (4 * 511, 4), (1021, 1)):
        for problem in (SQUARES, ENTROPY):
            method = vp.gnvpro(problem, curvature="dense", kaufman=False)
            data, ended = data_for(method, samples), []
            for split in (False, True):
                held, chunk = (2**14, 100) if split else (2**30, samples)
                with (
                    mock.patch.multiple(matrix, KEPT_BYTES=0, BLOCK_BYTES=held),
                    mock.patch.object(w_hessian, "CHUNK", chunk),
                ):
                    jax.clear_caches()
                    given = over(devices, data) if split else data
                    state, step = compiled(method, theta(), given)
                    ended.append(step(state, given)[0])
            name = f"{samples} {type(problem.loss).__name__}"
            found[name] = (
                relative(ended[1].theta, np.asarray(ended[0].theta)),
                gathered(step.as_text(), SAMPLES),
            )
    return found


def of_explicit_meshes():
    """How far data over JAX's default meshes lead from the same over one device."""
    data, start = data_for(METHODS["dense"]), theta()
    explicit = over(8, data, AxisType.Explicit)
    replicated = jax.device_put(start, NamedSharding(explicit[0].sharding.mesh, PartitionSpec()))
    w = vp.solve_w(SQUARES, start, data)
    found = {
        "solve_w": relative(vp.solve_w(SQUARES, replicated, explicit), w),
        "predict": relative(
            vp.predict(SQUARES, replicated, w, explicit[0]), vp.predict(SQUARES, start, w, data[0])
        ),
    }
    (of_one, _), (of_eight, _) = (
        jax.value_and_grad(vp.reduced_objective(SQUARES), has_aux=True)(start, some)
        for some in (data, explicit)
    )
    found["reduced_objective"] = relative(of_eight[0], of_one[0])
    one = vp.gauss_newton(SQUARES, start, data).matvec(start)
    found["gauss_newton"] = relative(
        vp.gauss_newton(SQUARES, replicated, explicit).matvec(start), one
    )
    for name in ("lbfgsvpro", "slimtrain"):
        options = {"epochs": 2, "batch_size": BATCH if name == "slimtrain" else None}
        one, eight = (
            vp.fit(METHODS[name], first, some, validation=some, **options)
            for first, some in ((start, data), (replicated, explicit))
        )
        for column in ("objective", "validation_loss"):
            there = eight.history[column][1:]
            found[f"{name} {column}"] = relative(there, one.history[column][1:])
    try:
        jax.jit(partial(vp.solve_w, SQUARES))(start, explicit)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def of_padding():
    """How far samples of weight zero, which make their number divisible, lead from the others."""
    method, start = METHODS["dense"], theta()
    inputs, targets = data_for(method, SAMPLES - 3)
    weights = np.append(np.full(SAMPLES - 3, SAMPLES / (SAMPLES - 3)), 3 * [0.0])
    padded = np.vstack([inputs, inputs[:3]]), np.vstack([targets, 3 * [2 * [np.nan]]]), weights
    solutions = [
        vp.fit(method, start, data, epochs=STEPS)
        for data in ((inputs, targets), over(8, padded), over(8, padded, AxisType.Explicit))
    ]
    one, *eight = (solution.history["objective"] for solution in solutions)
    return [relative(found, one) for found in eight]


def of_page():
    """What the page's snippet for one host ends with."""
    found = {}
    exec(snippets("devices")[0], found)
    return found["solution"].history["objective"][[0, -1]].tolist()


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    found = {name: of_method(method) for name, method in METHODS.items()}
    found |= {"epochs": of_epochs(), "rows": of_rows(), "explicit": of_explicit_meshes()}
    found |= {"page": of_page(), "sizes": of_sizes(), "padding": of_padding()}
    print(json.dumps(found, default=float))
