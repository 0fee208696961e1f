"""What a training method is: a pair of pure functions, and the words for how a run stands."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

from varprox.checks import is_result, kind
from varprox.problem.data import check_inputs, check_pair, where_they_stay
from varprox.problem.model import Problem
from varprox.problem.weighted import alike


class Status(IntEnum):
    """How a run stands, or why it has ended.

    `state.status` of a method holds the number, `Solution.status` the member; `message` is a
    sentence that explains it.

    Attributes:
        RUNNING: The run has not ended.
        CONVERGED: What another step could gain is below the tolerance.
        STALLED: No step lowers the objective, though the model of the objective promises a decrease
            above the tolerance.
        NON_FINITE: The objective or its gradient is NaN or infinite. The weights are the last good
            ones.
        BUDGET: The work, the seconds or the epochs allowed are used up.
        FLAT: The gradient is exactly zero at the start, so no step can be found. This happens if no
            feature depends on θ, or if the last layer uses none. Start from other weights.
        STOPPED: ``stop_when``, ``patience`` or a callback of `fit` has ended the run.
        INTERRUPTED: Ctrl-C has ended the run.

    Example:
        >>> import varprox as vp
        >>> vp.Status(1)
        <Status.CONVERGED: 1>
        >>> vp.Status.CONVERGED.message
        'What another step could gain is below the tolerance.'
    """

    RUNNING = 0
    CONVERGED = 1
    STALLED = 2
    NON_FINITE = 3
    BUDGET = 4
    FLAT = 5
    STOPPED = 6
    INTERRUPTED = 7

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
    Status.STOPPED: "What was asked for is there: stop_when, patience or a callback ended the run.",
    Status.INTERRUPTED: "Ctrl-C ended the run.",
}


class Method(NamedTuple):
    """A training method for a problem: a pair of pure functions, `init` and `step`.

    Factories such as `gnvpro` and `slimtrain` make methods, and `fit` runs them. In a loop of your
    own, `init` and `step` can be called inside `jit`, `vmap` or `scan`.

    A state is a NamedTuple and a pytree of arrays. Every state has the fields `theta`, `w`,
    `objective` (Φ at these weights), `work_units` (spent so far) and `status`
    (a number of `Status`).

    Attributes:
        init: A function ``state = init(theta, data, key)``. `data` are (inputs, targets) or
            (inputs, targets, weights), as for `fit`, and `key` is a random key, which may be left
            out.
        step: A function ``state, info = step(state, data)``; `info` is a NamedTuple of scalars. A
            full-batch method takes all of the data at every step, a stochastic one a minibatch.
        problem: The `Problem` that is solved.
        epoch: None for a full-batch method. For a stochastic one it is a function
            ``state, info = epoch(state, data, batch_size=…)`` that passes once over shuffled
            minibatches; the entries of `info` have one number per step. Its state also has the
            field `learned`: whatever the features have learned from batches, such as the statistics
            of batch norm.
        name: What the method is called, such as ``"gnvpro"``; `Solution` and its files say it.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> inputs = jnp.linspace(-1, 1, 20)[:, None]
        >>> data = inputs, 3 * jnp.tanh(2 * inputs) + 1
        >>> model = vp.Separable(lambda theta, inputs: jnp.tanh(theta * inputs))
        >>> method = vp.lbfgsvpro(vp.Problem(model, vp.least_squares()))
        >>> state = method.init(jnp.array([1.5]), data)
        >>> after, info = method.step(state, data)
        >>> bool(after.objective < state.objective)
        True
    """

    init: Callable
    step: Callable
    problem: Any
    epoch: Callable | None = None
    name: str = ""


def check_state(name: str, own: bool, state: Any) -> None:
    """Refuses a state that is not the method's own with a TypeError."""
    if not own:
        came = "that of another method" if hasattr(state, "work_units") else kind(state)
        pair = isinstance(state, tuple) and state and is_result(state[0])
        hint = "; method.step returns a pair, state and info" if pair else ""
        raise TypeError(f"state: expected one of {name}, got {came}{hint}")


def check_all(problem: Problem, state: Any, data: Any) -> tuple:
    """Inputs and targets, as `check_pair` has them. Refuses data that are not shaped like those
    that `init` of a full-batch method was given with a TypeError or ValueError. Looks at no
    number."""
    inputs, targets = check_pair(data)
    expected = state.projection.slopes.shape
    if targets.shape != expected:
        raise ValueError(
            f"targets: expected shape {expected}, that of the data that init was given, as every "
            f"step takes all of them, got {targets.shape}"
        )
    check_inputs(inputs, targets)
    if problem.loss.quadratic and alike(targets) != (len(state.projection.factor.blocks) == 1):
        raise ValueError(
            "weights: expected one for each entry of the targets if, and only if, the data that "
            "init was given had these, got others"
        )
    return where_they_stay(problem, inputs), targets
