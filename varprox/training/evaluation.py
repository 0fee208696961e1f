"""What the history tells of a state: the objective and its parts, validation, metrics."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from varprox.methods.method import Method
from varprox.methods.slimtrain import with_learned
from varprox.precision import full_products
from varprox.problem.model import Problem
from varprox.problem.prediction import predict
from varprox.problem.weighted import Targets, Weighted, plain, weights_of


def problem_at(method: Method, state: Any) -> Problem:
    """The problem of the method, with what its features have learned."""
    if method.epoch is None:
        return method.problem
    return with_learned(method.problem, state.learned)


def row_of(problem: Problem, state: Any) -> dict[str, float]:
    """The columns that every state has."""
    return {
        "objective": float(state.objective),
        "work_units": float(state.work_units),
        "train_loss": float(state.objective) - float(penalties(problem, state.theta, state.w)),
    }


def evaluations(
    problem: Problem, state: Any, sets: Mapping[str, tuple], metrics: Mapping[str, Callable]
) -> dict[str, float]:
    """The columns for which the network is evaluated, on each of the sets of data."""
    weighted = any(isinstance(targets, Weighted) for _, targets in sets.values())
    row = {}
    for name, (inputs, targets) in sets.items():
        if name == "train" and not metrics:
            continue  # one forward pass less
        predictions = predictions_of(problem, state.theta, state.w, inputs)
        if name == "validation":
            row["validation_loss"] = float(loss_of(problem, predictions, targets))
        for metric, fn in metrics.items():
            given = (weights_of(targets),) if weighted else ()
            row[f"{name}_{metric}"] = _scalar(metric, fn(predictions, plain(targets), *given))
    return row


def _scalar(metric, value):
    try:
        if np.shape(value) == ():
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"metrics: expected a number from {metric!r}, got {value!r:.80}")


@jax.jit
def penalties(problem: Problem, theta: Any, w: jax.Array) -> jax.Array:
    """What the objective has beside the loss."""
    return problem.penalty(theta) + problem.penalty_on_w(w)


@jax.jit
def loss_of(problem: Problem, predictions: jax.Array, targets: Targets) -> jax.Array:
    """The loss, without penalties."""
    return problem.loss.value(predictions, targets)


predictions_of = jax.jit(full_products(predict))
