"""What a training method is: a pair of pure functions, and the words for how a run stands.

Imports nothing of the package.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple


class Status(IntEnum):
    """How a run stands; `state.status` holds the number, and `message` is its sentence."""

    RUNNING = 0
    CONVERGED = 1
    STALLED = 2
    NON_FINITE = 3
    BUDGET = 4
    FLAT = 5

    @property
    def message(self) -> str:
        """One sentence that says what the status means."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.RUNNING: "The run has not ended.",
    Status.CONVERGED: "What another step could gain is below the tolerance.",
    Status.STALLED: "No step lowers the objective, though the model promises a decrease above the "
    "tolerance.",
    Status.NON_FINITE: "The objective or its gradient is NaN or infinite; the weights are the last "
    "good ones.",
    Status.BUDGET: "The work, the seconds or the epochs allowed are used up.",
    Status.FLAT: "The gradient vanishes at the start to the last bit, as where no feature depends "
    "on theta or none is used, so no step can be found; start from other weights.",
}


class Method(NamedTuple):
    """A training method for a problem.

    `state = init(theta, data, key)` and `state, info = step(state, data)` are pure and may be used
    inside the caller's own `jit`, `vmap` or `scan`. A state has at least the fields `theta`, `w`,
    `objective` (Φ at these weights), `work_units` (spent so far) and `status`; `info` is a
    NamedTuple of scalars.

    A full-batch method has no `epoch`, and its `data` are all of the data. A stochastic one takes a
    minibatch in every step, and has `state, info = epoch(state, data, batch_size=…)`, whose info
    holds those of the steps along a leading axis; its state has the field `learned` too, what the
    features hold that learn from batches, as `varprox.slimtrain.with_learned` takes it.
    """

    init: Callable
    step: Callable
    problem: Any
    epoch: Callable | None = None
