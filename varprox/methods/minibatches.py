"""An epoch: one pass over the data in shuffled minibatches, by any step of a stochastic method."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

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

    Where the data are split over devices, so is every batch, if they divide its size. Its samples
    come from all devices, so that the batch, and no more, is sent.

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
    split = _split(data, batch_size)
    if not steps_one_by_one(step, fixed, options, state, data, batch_size):
        return _scanned(step, fixed, options, state, data, batch_size, split)
    state, order = _begun(state, samples, batch_size)
    infos = []
    for batch in np.arange(len(order), dtype=np.int32):
        state, info = _chosen(step, fixed, options, state, data, order, batch, split)
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


def _split(data, batch_size):
    """How each array of a batch is split over devices: as that of the data; None if it is not."""
    return tuple(_split_array(leaf, batch_size) for leaf in jax.tree.leaves(data))


def _split_array(leaf, batch_size):
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf.sharding, NamedSharding):
        return None
    shards = len(leaf) // leaf.sharding.shard_shape(leaf.shape)[0]
    if shards == 1 or batch_size % shards:
        return None
    return NamedSharding(leaf.sharding.mesh, PartitionSpec(leaf.sharding.spec[0]))


@partial(jax.jit, static_argnums=(0, 1, 7))
def _chosen(step, fixed, options, state, data, order, batch, split):
    leaves, structure = jax.tree.flatten(data)

    def chosen(leaf, sharding):
        taken = leaf[order[batch]]
        return taken if sharding is None else jax.lax.with_sharding_constraint(taken, sharding)

    batch = jax.tree.unflatten(structure, map(chosen, leaves, split))
    return step(fixed, options, state, batch)


@partial(jax.jit, static_argnums=(0, 1, 5, 6))
def _scanned(step, fixed, options, state, data, batch_size, split):
    state, order = _begun(state, len(data[1]), batch_size)

    def of_batch(state, batch):
        return _chosen(step, fixed, options, state, data, order, batch, split)

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
    split = len(jax.tree.leaves(data)) * (None,)
    traced = _chosen.trace(step, fixed, options, state, data, order, np.int32(0), split)
    return "conv_general_dilated" in str(traced.jaxpr)  # the text has what is nested, too
