"""Functions of samples, evaluated for so many of them at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_chunks(fn: Callable[[Any], jax.Array], inputs: Any, chunk: int | None) -> jax.Array:
    """`fn` of samples, an array with them along its first axis; `chunk` samples are taken at a
    time, and all of them if it is None.

    What lies between the inputs and the result is not kept for derivatives: they compute it anew,
    also for so many samples at a time.
    """
    if chunk is None or (samples := len(jax.tree.leaves(inputs)[0])) <= chunk:
        return fn(inputs)
    chunks, rest = divmod(samples, chunk)
    whole = samples - rest

    def dealt(x):
        # In turn, so that samples that are spread over devices are so in every chunk.
        return jnp.asarray(x)[:whole].reshape(chunk, chunks, *x.shape[1:]).swapaxes(0, 1)

    fn = jax.checkpoint(fn)
    found = jax.lax.map(fn, jax.tree.map(dealt, inputs))
    found = found.swapaxes(0, 1).reshape(whole, *found.shape[2:])
    if rest:
        found = jnp.concatenate([found, fn(jax.tree.map(lambda x: x[whole:], inputs))])
    return found
