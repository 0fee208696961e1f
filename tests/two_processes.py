"""One of two processes with two devices each: `python two_processes.py PROCESS PORT`.

Prints what `test_devices.py` asserts, as JSON.
"""

import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from problems import relative
from repository import snippets

import varprox as vp

SAMPLES = 64


def features(theta, inputs):
    return jnp.tanh(inputs @ theta)


def run(process):
    """How far runs with data of both processes lead from those with all of it in one."""
    inputs = np.linspace(-1, 1, 2 * SAMPLES).reshape(SAMPLES, 2)
    data = inputs, np.sin(3 * inputs[:, :1]) + inputs[:, 1:] ** 2
    split = NamedSharding(jax.make_mesh((4,), ("batch",)), PartitionSpec("batch"))
    half = slice(SAMPLES // 2 * process, SAMPLES // 2 * (process + 1))

    def ours(array):
        return jax.make_array_from_process_local_data(split, array[half])

    both, theta = tuple(map(ours, data)), np.array([[1.0, 0.5, 2.0], [0.3, -1.0, 0.5]])
    problem = vp.Problem(vp.Separable(features), vp.least_squares(), 1e-3, 1e-3)
    found = {}
    for name, method, options in (
        ("chosen", problem, {}),
        ("lbfgsvpro", vp.lbfgsvpro(problem), {}),
        ("slimtrain", vp.slimtrain(problem, optax.sgd(1e-2)), {"batch_size": 16}),
    ):
        one, two = (
            vp.fit(method, theta, some, epochs=3, validation=some, **options)
            for some in (data, both)
        )
        objective, loss = (
            relative(two.history[column][1:], one.history[column][1:])
            for column in ("objective", "validation_loss")
        )
        found[name] = max(objective, loss, relative(two.theta, np.asarray(one.theta)))
    bad = np.where(np.arange(SAMPLES)[:, None] % 32 == 5, np.nan, data[1])
    try:
        vp.solve_w(problem, theta, (both[0], ours(bad)))
    except ValueError as error:
        found["refused"] = str(error)
    return found


if __name__ == "__main__":
    process, port = map(int, sys.argv[1:])
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    found, page = run(process), {}
    with mock.patch.object(jax.distributed, "initialize"):  # which needs no arguments on a cluster
        exec(snippets("devices")[1], page)
    found["page"] = page["solution"].history["objective"][[0, -1]].tolist()
    print(json.dumps(found))
