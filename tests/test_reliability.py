"""The figures of the experiment on reliability; test_runs.py has what it measures, in small."""

import numpy as np
import pytest

from benchmarks import reliability

FOUND = {
    "killed": {"dense": {"kills": 20, "equal": True}, "krylov": {"kills": 19, "equal": False}},
    "many": {"dense": {"speed_up": 5.44}, "krylov": {"speed_up": 1.5}},
    "long": {"dense": {"steps": 500, "time_slope": 0.0012, "memory_slope": -0.00001}},
    "coverage": {"theta": 0.951},
}


def test_tables_say_what_was_found():
    kills, long, coverage = reliability.tables(FOUND)
    assert kills.splitlines()[-2].split() == ["dense", "20", "yes", "5.4"]
    assert kills.splitlines()[-1].split() == ["krylov", "19", "NO", "1.5"]
    assert long.splitlines()[-1].split() == ["dense", "500", "+0.12", "%", "-0.001", "%"]
    assert coverage.splitlines()[-1].split() == ["theta", "95.1", "%"]


def test_a_slope_is_that_per_hundred_steps_whatever_single_steps_do():
    values = 2 + 0.003 * np.arange(1000)
    values[::50] += 100
    assert reliability._slope(values) == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("name", reliability.METHODS)
def test_every_method_takes_the_task(name, x64):
    theta, data = reliability.task()
    method, options = reliability.make(name)
    state = method.init(theta, data)
    assert state.w.shape == (reliability.UNITS + 1, 1)
    assert (method.epoch is None) == (not options)
