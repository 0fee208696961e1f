"""The figures of the experiment on reliability; test_runs.py has what it measures, in small."""

import numpy as np
import pytest

from benchmarks import reliability

FOUND = {
    "killed": {"dense": {"kills": 20, "equal": True}, "krylov": {"kills": 19, "equal": False}},
    "many": {"dense": {"speed_up": 5.44}, "krylov": {"speed_up": 1.5}},
    "long": {"dense": {"steps": 500, "time_slope": 0.0012, "memory_slope": -0.00001}},
    "coverage": {"theta": 0.951},
    "devices": {"dense": {"speed_up": 7.96, "devices": 8, "difference": 2.6e-11}},
    "chunks": {"krylov": {"None": {"megabytes": 1667.4, "difference": 0.0}}},
}


def test_tables_say_what_was_found():
    kills, long, coverage, devices, chunks = reliability.tables(FOUND)
    assert kills.splitlines()[-2].split() == ["dense", "20", "yes", "5.4"]
    assert kills.splitlines()[-1].split() == ["krylov", "19", "NO", "1.5"]
    assert long.splitlines()[-1].split() == ["dense", "500", "+0.12", "%", "-0.001", "%"]
    assert coverage.splitlines()[-1].split() == ["theta", "95.1", "%"]
    assert devices.splitlines()[-1].split() == ["dense", "8.0", "of", "8", "3e-11"]
    assert chunks.splitlines()[-1].split() == ["krylov", "None", "1667", "MB", "0e+00"]


def test_a_slope_is_that_per_hundred_steps_whatever_single_steps_do():
    values = 2 + 0.003 * np.arange(1000)
    values[::50] += 100
    assert reliability._slope(values) == pytest.approx(0.3, rel=0.02)


def test_a_chunk_takes_less_memory_and_leads_to_the_same_objective(x64, monkeypatch):
    monkeypatch.setattr(reliability, "DEEP_SAMPLES", 2000)
    monkeypatch.setattr(reliability, "WIDTH", 8)
    monkeypatch.setattr(reliability, "CHUNKS", (None, 100))
    whole, parts = reliability.in_chunks("lbfgsvpro").values()
    assert parts["megabytes"] < 0.6 * whole["megabytes"]
    assert parts["difference"] < 1e-12


@pytest.mark.parametrize("name", reliability.METHODS)
def test_every_method_takes_the_task(name, x64):
    theta, data = reliability.task()
    method, options = reliability.make(name)
    state = method.init(theta, data)
    assert state.w.shape == (reliability.UNITS + 1, 1)
    assert (method.epoch is None) == (not options)
