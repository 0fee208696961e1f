"""Targets with weights: how much each sample, or each entry of the targets, counts in the loss.

A loss sees targets as an array, or as a `Weighted`, which is shaped like one. The functions here do
the same for both, and are all that the rest of the library needs to know of weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["values", "weights"], meta_fields=[])
@dataclass(frozen=True)
class Weighted:
    """Targets, and the weights ≥ 0 by which the terms of the loss are multiplied.

    A weight of zero stands for a gap; no value there is NaN.
    """

    values: jax.Array  # (batch, outputs), or (batch, height, width, outputs)
    weights: jax.Array  # of as many axes: (batch, 1) for samples, (batch, outputs) for entries

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype

    @property
    def size(self) -> int:
        return self.values.size

    def __len__(self) -> int:
        return len(self.values)


Targets = jax.Array | Weighted


def plain(targets: Targets) -> jax.Array:
    """The targets without their weights."""
    return targets.values if isinstance(targets, Weighted) else targets


def weights_of(targets: Targets) -> jax.Array:
    """The weights, which are ones where there are none."""
    if isinstance(targets, Weighted):
        return targets.weights
    return jnp.ones((len(targets), *(targets.ndim - 1) * (1,)), targets.dtype)


def mapped(fn: Callable, targets: Targets) -> Targets:
    """`fn` of the targets, with the same weights."""
    if isinstance(targets, Weighted):
        return Weighted(fn(targets.values), targets.weights)
    return fn(targets)


def shifted(targets: Targets, centre: jax.Array) -> Targets:
    """The targets less a centre (outputs,)."""
    return mapped(lambda values: values - jnp.broadcast_to(centre, values.shape), targets)


def weighed(targets: Targets, x: jax.Array) -> jax.Array:
    """What is shaped like the targets, times their weights."""
    return x * targets.weights if isinstance(targets, Weighted) else x


def rooted(targets: Targets, x: jax.Array) -> jax.Array:
    """What is shaped like the targets, times the roots of their weights."""
    return x * jnp.sqrt(targets.weights) if isinstance(targets, Weighted) else x


def rooted_rows(targets: Targets, rows: jax.Array) -> jax.Array:
    """Rows (batch, columns) times the roots of the weights; (outputs, batch, columns) where the
    outputs have weights of their own."""
    if not isinstance(targets, Weighted):
        return rows
    if alike(targets):
        return jnp.sqrt(targets.weights) * rows
    return jnp.sqrt(targets.weights).T[:, :, None] * rows[None]


def alike(targets: Targets) -> bool:
    """Have all outputs the same weights?"""
    return not isinstance(targets, Weighted) or targets.weights.shape[-1] == 1


def means(targets: Targets) -> jax.Array:
    """The weighted mean of each output, (outputs,)."""
    values = plain(targets)
    axes = tuple(range(values.ndim - 1))
    if not isinstance(targets, Weighted):
        return jnp.mean(values, axis=axes)
    weights = jnp.broadcast_to(targets.weights, values.shape)
    largest = jnp.max(weights, axis=axes, keepdims=True)  # so that no sum overflows
    weights = weights / jnp.where(largest > 0, largest, 1)
    total = jnp.sum(weights, axis=axes)
    return jnp.sum(weights * values, axis=axes) / jnp.where(total > 0, total, 1)


def counted(targets: Targets) -> jax.Array | int:
    """The number of entries that are not gaps."""
    if not isinstance(targets, Weighted):
        return targets.size
    present = jnp.broadcast_to(targets.weights > 0, targets.shape)
    return jnp.sum(present, dtype=targets.dtype)


def gapless(values: jax.Array, weights: jax.Array) -> Weighted:
    """Targets with these weights, of one number of axes, and in gaps what another sample has, as
    any loss can take that."""
    present = jnp.broadcast_to(weights > 0, values.shape)
    others = jnp.take_along_axis(values, jnp.argmax(present, axis=0)[None], axis=0)
    others = jnp.where(jnp.isfinite(others), others, 0)  # where no sample has any
    return Weighted(jnp.where(present, values, others), weights)
