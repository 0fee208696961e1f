"""Data over many devices, of one process and of two: what the scripts beside this one have found.

JAX makes several devices of one CPU, but only at the start of a process.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

pytestmark = pytest.mark.xdist_group("devices")  # whose processes take long, and run once

HERE = Path(__file__).parent
FULL_BATCH = (
    "krylov",
    "dense",
    "kernel",
    "forward",
    "lbfgsvpro",
    "broydenvpro",
    "entropy",
    "chunks",
)


def start(config, devices, script, *arguments):
    """The script in a process with as many devices, as conftest.py sets tests up."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    quick = {
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(config.cache.mkdir("jax")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PLATFORMS": "cpu",
        # Threads: each device blocks as many as it has collectives in flight, and JAX by default
        # has one for each device, so that they may wait for one another for ever.
        "NPROC": "64",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": flags,
    }
    warnings = ("error", "ignore:Error reading persistent", "ignore:Error writing persistent")
    options = [argument for warning in warnings for argument in ("-W", warning)]
    return subprocess.Popen(
        [sys.executable, *options, HERE / script, *map(str, arguments)],
        env=os.environ | quick,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*processes):
    """What each of them has printed; where one fails the others would wait for it."""
    try:
        for process in processes:
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, out + errors
            yield json.loads(out.splitlines()[-1])
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def eight(pytestconfig):
    (found,) = ended(start(pytestconfig, 8, "eight_devices.py"))
    return found


@pytest.fixture(scope="module")
def two(pytestconfig):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(pytestconfig, 2, "two_processes.py", rank, port) for rank in range(2)]
    return list(ended(*processes))


@pytest.mark.parametrize("name", [*FULL_BATCH, "slimtrain"])
def test_eight_devices_go_the_way_of_one(eight, name):
    assert eight[name]["values"] < 1e-9
    assert eight[name]["decrease"] > 1e-3


@pytest.mark.parametrize("name", [*FULL_BATCH, "slimtrain"])
def test_nothing_of_the_size_of_the_batch_is_gathered(eight, name):
    assert eight[name]["gathers"] == []


@pytest.mark.parametrize("name", [*FULL_BATCH, "slimtrain"])
def test_each_device_does_its_share_of_the_operations(eight, name):
    assert eight[name]["speed_up"] > 6


def test_batches_of_an_epoch_are_split_too(eight):
    """A device has features of 32 of 256 samples, three of each, as θ has for two inputs."""
    assert eight["epochs"] == {"values": pytest.approx(0, abs=1e-9), "features": [2, 32]}


def test_blocks_of_rows_have_one_orthonormal_basis(eight):
    found = eight["rows"]
    assert found.pop("deficient") < 1e-13
    assert {samples: of["blocks"] for samples, of in found.items()} == {
        "2048": 8, "500": 4, "331": 1, "160": 8, "40": 1
    }  # fmt: skip
    for of in found.values():
        assert of["orthonormal"] < 1e-14
        assert of["spans"] < 1e-14


def test_samples_need_not_be_divisible_by_anything(eight):
    assert len(eight["sizes"]) == 6
    for distance, gathers in eight["sizes"].values():
        assert distance < 1e-9
        assert gathers == []


def test_samples_of_weight_zero_make_their_number_divisible(eight):
    assert max(eight["padding"]) < 1e-9


def test_the_default_meshes_of_jax_are_taken(eight):
    found = eight["explicit"]
    refused = found.pop("refused")
    assert refused.startswith("data: expected over a mesh with automatic axes, inside jit")
    assert len(found) == 8
    assert max(found.values()) < 1e-9


def test_the_page_tells_how(eight):
    begin, end = eight["page"]
    assert end < 1e-2 * begin


def test_two_processes_go_the_way_of_one(two):
    assert two[0] == two[1] | {"refused": two[0]["refused"]}
    refusals = [found.pop("refused") for found in two]
    for rank, refused in enumerate(refusals):
        assert refused == (
            "targets: expected finite numbers, got 1 NaN or Inf in float64, the first at "
            f"[{5 + 32 * rank}, 0]"
        )
    begin, end = two[0].pop("page")
    assert end < 1e-2 * begin
    assert set(two[0]) == {"chosen", "lbfgsvpro", "slimtrain"}
    assert max(two[0].values()) < 1e-9
