"""The arguments of `fit`, checked at the door."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varprox.checks import kind
from varprox.methods.method import Method, Status
from varprox.problem.data import check_data
from varprox.training.evaluation import loss_of, penalties, predictions_of
from varprox.training.solution import Solution

ROUNDINGS = 100  # times the square of what rounding does to a prediction, in an objective


def check_concrete(theta: Any, data: Any) -> None:
    """Refuses arrays that are traced with a TypeError."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((theta, data))):
        raise TypeError(
            "fit: expected arrays, got traced ones: fit is a loop in Python; inside of jit, vmap "
            "or grad call the method's init and step"
        )


def check_start(start: Any) -> Solution:
    """The solution to go on from, where it is one; else TypeError."""
    if not isinstance(start, Solution) or start.state is None:
        raise TypeError(f"start: expected a varprox.Solution with its state, got {kind(start)}")
    return start


def check_stop_when(value: Any) -> float:
    """The objective to stop at, −∞ for None; TypeError for what is not a number."""
    if value is None:
        return -math.inf
    if isinstance(value, bool) or not hasattr(value, "__float__") or np.ndim(value) != 0:
        raise TypeError(f"stop_when: expected a number or None, got {value!r:.80}")
    return float(value)


def check_function(name: str, value: Any) -> Callable:
    """`value`, where it can be called; else TypeError."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {value!r:.80}")
    return value


def epoch_or_step(method: Method, batch_size: int | None) -> Callable:
    """What takes a state and the data one entry of the history further."""
    if method.epoch is None:
        if batch_size is not None:
            raise ValueError(
                f"batch_size: expected None for a method that takes all of the data in every step, "
                f"got {batch_size!r}"
            )
        return method.step
    if batch_size is None:
        raise ValueError("batch_size: expected an integer ≥ 1 for a stochastic method, got None")
    return partial(method.epoch, batch_size=batch_size)


def check_limits(caller: str, **budgets: Any) -> dict[str, float]:
    """The budgets, ∞ for None; ValueError where one is not a positive number or none is given."""
    limits = {name: _limit(name, value) for name, value in budgets.items()}
    if all(limit == math.inf for limit in limits.values()):
        *names, last = budgets
        raise ValueError(f"{caller}: expected a budget, {', '.join(names)} or {last}; got none")
    return limits


def _limit(name, value):
    if value is None:
        return math.inf
    number = not isinstance(value, bool) and hasattr(value, "__float__") and np.ndim(value) == 0
    if not number or not float(value) > 0:
        raise ValueError(f"{name}: expected a positive number or None, got {value!r}")
    return float(value)


def check_metrics(metrics: Any) -> dict[str, Callable]:
    """The metrics by name; TypeError or ValueError for what is not a mapping of functions."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics: expected a mapping of names to functions, got {metrics!r}")
    for name, metric in (metrics or {}).items():
        if not isinstance(name, str) or name == "loss":
            raise ValueError(
                f"metrics: expected names other than 'loss', which the history has, got {name!r}"
            )
        if not callable(metric):
            raise TypeError(f"metrics: expected a function for {name!r}, got {metric!r}")
    return dict(metrics or {})


def check_state(method: Method, theta: Any, data: tuple, state: Any) -> None:
    """Refuses a state that belongs to other data, to another problem or another method; `data` are
    as `check_data` returns them."""
    needed = ("theta", "w", "objective", "status", *("learned",) * (method.epoch is not None))
    if missing := [name for name in needed if not hasattr(state, name)]:
        raise TypeError(
            "method: expected the one whose state is taken up, got another: this state has no "
            f"{missing[0]!r}"
        )
    if _shapes(state.theta) != _shapes(theta):
        raise ValueError(
            "theta: expected arrays like those of the state that is taken up, got others"
        )
    if method.epoch is not None or state.status == Status.NON_FINITE:
        return
    try:
        fits = _shapes(jax.eval_shape(method.step, state, data)[0]) == _shapes(state)
    except (TypeError, ValueError) as error:
        if str(error).startswith("state:"):
            raise
        fits = False
    except AttributeError as error:  # of a state that has not the fields that the step reads
        raise TypeError(
            f"method: expected the one whose state is taken up, got another: {error}"
        ) from error
    if not fits:
        raise ValueError("data: expected shapes as those of the state that is taken up, got others")
    inputs, targets = data
    predictions = predictions_of(method.problem, state.theta, state.w, inputs)
    now = float(loss_of(method.problem, predictions, targets))
    now += float(penalties(method.problem, state.theta, state.w))
    zero = float(loss_of(method.problem, jnp.zeros_like(predictions), targets))
    then = float(state.objective)
    # Where the rows are badly conditioned, rounding may move predictions by √eps of the targets,
    # and the objective by twice the geometric mean of itself and of eps times that for W = 0; where
    # W is large, by more.
    rounding = float(jnp.finfo(predictions.dtype).eps) * max(map(abs, (zero, now, then)))
    if hasattr(state, "projection"):
        rounding += ROUNDINGS * float(state.projection.error) ** 2
    tolerance = 2 * math.sqrt(rounding * max(abs(now), abs(then))) + rounding
    if not (math.isfinite(now) and abs(now - then) <= tolerance):
        raise ValueError(
            "data: expected those of the state that is taken up, and the same problem; with these "
            f"its objective is {now:g}, got a state that says {then:g}"
        )


def _shapes(tree):
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def check_validation(method: Method, theta: Any, data: tuple, validation: Any) -> tuple:
    """Validation data as `check_data` returns them. Refuses those that are not like the data."""
    try:
        _, validation = check_data(
            method.problem, theta, validation, stochastic=method.epoch is not None
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"validation: {error}") from None
    expected = data[1].shape[1:]
    if validation[1].shape[1:] != expected:
        sizes = ", ".join(map(str, expected))
        raise ValueError(
            f"validation: expected targets of shape (batch, {sizes}), as the data have, "
            f"got {validation[1].shape}"
        )
    return validation
