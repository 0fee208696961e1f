"""What a training method is: a pair of pure functions, and the words for how a run stands.

Imports nothing of the package.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple


class Status(IntEnum):
    """How a run stands; `state.status` holds the number."""

    RUNNING = 0
    CONVERGED = 1  # the gradient's norm is at most the method's tolerance
    STALLED = 2  # no step lowers the objective
    NON_FINITE = 3  # the objective or its gradient is NaN or Inf; the weights are the last good ones
    BUDGET = 4  # the work, the epochs or the steps allowed are used up


class Method(NamedTuple):
    """A training method for a problem.

    `state = init(theta, data, key)` and `state, info = step(state, data)` are pure and may be used inside the
    caller's own `jit`, `vmap` or `scan`. `state.theta`, `state.w` and `state.status` are the weights and how the
    run stands; `info` holds at least `objective`, that of the new weights, and `work_units`.
    """

    init: Callable
    step: Callable
    problem: Any
