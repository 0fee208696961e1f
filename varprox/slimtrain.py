"""slimTrain: minibatch training in which slimTik finds W and any optimizer of optax moves θ.

Source: Newman, Chung, Chung, Ruthotto, arXiv:2109.14002, algorithm 1. Imports slimtik,
minibatches and model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from varprox.method import Method, Status
from varprox.minibatches import epoch
from varprox.model import Problem, check_data, check_problem, zero_w
from varprox.selection import proportional
from varprox.slimtik import State as Tikhonov
from varprox.slimtik import checked, start_tikhonov, tikhonov_step


class State(NamedTuple):
    """The weights and what the next step starts from."""

    problem: Problem  # its features have seen the batches so far
    theta: Any
    tikhonov: Tikhonov
    optimizer: Any  # the state of the one for θ
    objective: jax.Array  # Φ of the last batch, or the mean of those of the last epoch
    work_units: jax.Array  # so far
    unit: jax.Array  # samples that a pass of one work unit goes over
    key: jax.Array
    status: jax.Array

    @property
    def w(self) -> jax.Array:
        """The weights of the last layer, (columns, outputs)."""
        return self.tikhonov.w


class Info(NamedTuple):
    """What one step did; the losses are those of its batch, with the new W and the old θ."""

    objective: jax.Array
    lambda_: jax.Array
    lambda_sum: jax.Array
    selection: jax.Array  # the value of the selection function
    finite: jax.Array  # False where the batch was not; all weights then stay as they were


def slimtrain(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    memory: int = 5,
    selection: Callable | None = None,
    *,
    initial: float = 0.05,
    lower_bound: float = 1e-7,
) -> Method:
    """The method of choice for data that come in minibatches, under least squares.

    Each step takes one forward pass, updates W by `varprox.slimtik` from the features of this batch
    and the Gram matrices of `memory` batches before it, and moves θ by one reverse pass at the new
    W and the optimizer. W has no learning rate, and its regularisation parameter is chosen by
    `selection`: by default `proportional()`, where the paper has `sgcv()`, which looks at the batch
    that W is fitted to and so lets ΣΛ fall to its lower bound. Rows and targets go into slimTik
    divided by √batch; `initial` and `lower_bound` are those of ΣΛ, which takes the place of the
    problem's `w_penalty`: this is part of the objective that is reported, and of nothing else.

    The method has an `epoch(state, data, batch_size=…)` beside `init` and `step`, which passes over
    shuffled batches; samples that do not fill one are left out of this epoch. `init` and `step`
    take any pair (inputs, targets), with targets shaped like the predictions; that of `init` says
    how many samples make a work unit. Features that learn from the batches they see are kept in
    `state.problem`. A batch with NaN or Inf changes nothing but `info.finite`.
    """
    check_problem(problem)
    if not problem.loss.quadratic:
        raise TypeError(
            f"problem: expected the loss varprox.least_squares(), got {type(problem.loss).__name__}"
        )
    if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
        raise TypeError(
            f"optimizer: expected one of optax, such as optax.adam(1e-3), got {optimizer!r}"
        )
    selection = proportional() if selection is None else selection
    options = checked(memory, selection, initial, lower_bound)
    return Method(
        init=partial(_init, problem, optimizer, options),
        step=partial(_step, optimizer, options),
        problem=problem,
        epoch=partial(epoch, _step, optimizer, options),
    )


def _init(problem, optimizer, options, theta, data, key=None):
    check_data(problem, theta, data, images=True)
    inputs, targets = data
    w = zero_w(problem, jax.eval_shape(problem.model.features, theta, inputs), targets)
    # Leaves of a problem may be numbers; in a state they are arrays.
    problem, theta = jax.tree.map(jnp.asarray, (problem, theta))
    return State(
        problem=problem,
        theta=theta,
        tikhonov=start_tikhonov(options, w),
        optimizer=optimizer.init(theta),
        objective=jnp.full((), jnp.nan, w.dtype),
        work_units=jnp.zeros((), w.dtype),
        unit=jnp.full((), len(targets), w.dtype),
        key=jax.random.key(0) if key is None else key,
        status=jnp.int32(Status.RUNNING),
    )


@partial(jax.jit, static_argnums=0)
def _step(optimizer, options, state, batch):
    inputs, targets = batch
    head, loss = state.problem.model.head, state.problem.loss

    z, pullback, model = jax.vjp(
        lambda theta: state.problem.model.train(theta, inputs), state.theta, has_aux=True
    )
    moments = head.moments(z, state.w, targets).scaled(1 / len(targets))
    tikhonov, chosen = tikhonov_step(options, state.tikhonov, moments, targets.size)

    value, slope = jax.value_and_grad(lambda z: loss.value(head.apply(z, tikhonov.w), targets))(z)
    penalty, gradient = jax.value_and_grad(state.problem.penalty)(state.theta)
    penalty_on_w = 0.5 * state.problem.w_penalty * jnp.sum(tikhonov.w**2)
    gradient = jax.tree.map(jnp.add, gradient, *pullback(slope))
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.theta)

    objective = value + penalty + penalty_on_w
    all_finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)]
    finite = chosen.finite & jnp.isfinite(objective) & jnp.stack(all_finite).all()

    def choose(new, old):
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

    after = State(
        problem=choose(state.problem.with_model(model), state.problem),
        theta=choose(optax.apply_updates(state.theta, updates), state.theta),
        tikhonov=tikhonov,
        optimizer=choose(optimizer_state, state.optimizer),
        objective=choose(objective, state.objective),
        work_units=state.work_units + 2 * len(targets) / state.unit,
        unit=state.unit,
        key=state.key,
        status=choose(jnp.int32(Status.RUNNING), jnp.int32(Status.NON_FINITE)),
    )
    info = Info(
        objective=objective,
        lambda_=chosen.lambda_,
        lambda_sum=chosen.lambda_sum,
        selection=chosen.value,
        finite=finite,
    )
    return after, info
