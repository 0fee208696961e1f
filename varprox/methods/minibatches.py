"""An epoch: one pass over the data in shuffled minibatches, by any step of a stochastic method."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varprox.checks import check_integer
from varprox.methods.method import Status


def epoch(
    step: Callable, fixed: Any, options: Any, state: Any, data: Any, *, batch_size: int
) -> tuple[Any, Any]:
    """The state after the steps `step(fixed, options, state, batch)` of an epoch, and their infos
    along a leading axis.

    `fixed` is hashable and `options` a pytree. The state has a `key`, as data, an `objective` and a
    `status`, the info an `objective` and `finite`. After the epoch the objective is the mean of
    those of its finite batches. It has failed where there are none, or where more of them were
    followed by one that is not finite than by one that is: steps that throw a method off, from
    which it goes back.

    The steps are scanned. On CPU, XLA brings convolutions into the form that its fast kernels take
    only outside of loops (JAX issue 12868): there steps with convolutions are called one by one,
    which pays as they take much longer than a call.
    """
    samples = len(data[1])
    batch_size = check_integer("batch_size", batch_size, least=1)
    if batch_size > samples:
        raise ValueError(
            f"batch_size: expected at most {samples}, the number of samples, got {batch_size}"
        )
    data = jax.tree.map(jnp.asarray, data)  # once, not at every step
    if not steps_one_by_one(step, fixed, options, state, data, batch_size):
        return _scanned(step, fixed, options, state, data, batch_size)
    state, order = _begun(state, samples, batch_size)
    infos = []
    for batch in np.arange(len(order), dtype=np.int32):
        state, info = _chosen(step, fixed, options, state, data, order, batch)
        infos.append(info)
    infos = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *infos)
    return _ended(state, infos), infos


@partial(jax.jit, static_argnums=(1, 2))
def _begun(state, samples, batch_size):
    """The state with its next key, and the samples of every batch, (batches, batch_size)."""
    key, used = jax.random.split(jax.random.wrap_key_data(state.key))
    batches = samples // batch_size
    order = jax.random.permutation(used, samples)[: batches * batch_size]
    return state._replace(key=jax.random.key_data(key)), order.reshape(batches, batch_size)


@jax.jit
def _ended(state, infos):
    finite, before = infos.finite, infos.finite[:-1]
    followed = jnp.where(before, jnp.where(finite[1:], 1, -1), 0)
    well = finite.any() & (followed.sum() >= 0)
    mean = jnp.mean(infos.objective, where=finite)
    status = jnp.where(well, Status.RUNNING, Status.NON_FINITE).astype(jnp.int32)
    return state._replace(objective=jnp.where(finite.any(), mean, state.objective), status=status)


@partial(jax.jit, static_argnums=(0, 1))
def _chosen(step, fixed, options, state, data, order, batch):
    return step(fixed, options, state, jax.tree.map(lambda x: x[order[batch]], data))


@partial(jax.jit, static_argnums=(0, 1, 5))
def _scanned(step, fixed, options, state, data, batch_size):
    state, order = _begun(state, len(data[1]), batch_size)

    def of_batch(state, batch):
        return _chosen(step, fixed, options, state, data, order, batch)

    state, infos = jax.lax.scan(of_batch, state, np.arange(len(order), dtype=np.int32))
    return _ended(state, infos), infos


def steps_one_by_one(step, fixed, options, state, data, batch_size) -> bool:
    """Are the steps of this epoch called one by one? The arguments are those of `epoch`."""
    leaves, structure = jax.tree.flatten((options, state, data))
    if jax.default_backend() != "cpu" or any(isinstance(x, jax.core.Tracer) for x in leaves):
        return False
    return _step_convolves(step, fixed, structure, tuple(map(jax.typeof, leaves)), batch_size)


@lru_cache
def _step_convolves(step, fixed, structure, types, batch_size):
    like = (jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in types)
    options, state, data = jax.tree.unflatten(structure, like)
    _, order = jax.eval_shape(lambda state: _begun(state, len(data[1]), batch_size), state)
    traced = _chosen.trace(step, fixed, options, state, data, order, np.int32(0))
    return "conv_general_dilated" in str(traced.jaxpr)  # the text has what is nested, too
