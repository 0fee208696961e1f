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
    NON_FINITE = (
        3  # the objective or its gradient is NaN or Inf; the weights are the last good ones
    )
    BUDGET = 4  # the work, the epochs or the steps allowed are used up


class Method(NamedTuple):
    """A training method for a problem.

    `state = init(theta, data, key)` and `state, info = step(state, data)` are pure and may be used
    inside the caller's own `jit`, `vmap` or `scan`. A state has at least the fields `theta`, `w`,
    `objective` (Φ at these weights), `work_units` (spent so far) and `status`; `info` is a
    NamedTuple of scalars.

    A full-batch method has no `epoch`, and its `data` are all of the data. A stochastic one takes a
    minibatch in every step, and has `state, info = epoch(state, data, batch_size=…)`, whose info
    holds those of the steps along a leading axis; its state has the field `problem`, the problem
    with features that have seen the batches, too.
    """

    init: Callable
    step: Callable
    problem: Any
    epoch: Callable | None = None
