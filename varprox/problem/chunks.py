"""Samples in blocks that are worked on one after the other, each with as many of every device.

Where the batch is split over devices, each has neighbouring samples: a block of neighbours would be
one device's work, or be sent to all.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varprox.problem.hosted import Hosted


class Blocks(NamedTuple):
    """Some number of samples in blocks of one size: the last one begins with samples of the one
    before where they do not divide."""

    samples: int
    size: int  # the samples of a block that belong to one device

    @property
    def devices(self) -> int:
        """That the samples may be split over."""
        return _devices(self.samples)

    @property
    def number(self) -> int:
        return -(-self.samples // (self.devices * self.size))

    @property
    def _of_device(self) -> int:
        return self.samples // self.devices

    @property
    def places(self) -> np.ndarray:
        """What `take` takes, to loop over."""
        return np.arange(self.number, dtype=np.int32)

    def take(self, tree: Any, place) -> Any:
        """The samples of a block, from arrays that have all along their first axis."""

        def of(x):
            if isinstance(x, Hosted):
                return x.take(place, self.devices * self.size, self._indices)
            x = jnp.asarray(x)
            x = x.reshape(self.devices, -1, *x.shape[1:])
            part = jax.lax.dynamic_slice_in_dim(x, place * self.size, self.size, axis=1)
            return part.reshape(-1, *part.shape[2:])

        return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, Hosted))

    def new(self, place) -> jax.Array:
        """Which samples of a block the one before does not have."""
        within = self._begin(place) + np.arange(self.size, dtype=np.int32)
        return jnp.tile(within >= place * self.size, self.devices)

    def scan(self, fn: Callable[..., Any], start: Any, *trees: Any) -> tuple[Any, Any]:
        """Block for block ``so_far, found = fn(so_far, new, *samples)``, with what `take` has of
        the trees and `new`; at last `so_far`, and for all samples what was found for each.

        What lies between is not kept for derivatives, which compute it anew.
        """

        @jax.checkpoint
        def at(so_far, place):
            return fn(so_far, self.new(place), *self.take(trees, place))

        so_far, found = jax.lax.scan(at, start, self.places)
        return so_far, jax.tree.map(self._joined, found)

    def _joined(self, parts: jax.Array) -> jax.Array:
        """What belongs to all samples, from what belongs to those of each block, one after
        another."""
        parts = parts.reshape(self.number, self.devices, self.size, *parts.shape[2:])
        parts = parts.swapaxes(0, 1)
        before = parts[:, :-1].reshape(self.devices, -1, *parts.shape[3:])
        last = parts[:, -1, before.shape[1] - self._of_device :]
        return jnp.concatenate([before, last], axis=1).reshape(self.samples, *parts.shape[3:])

    def _begin(self, place):
        # Where XLA moves a slice to that would go beyond the end.
        return jnp.minimum(place * self.size, self._of_device - self.size)

    def _indices(self, place):
        """Of a block, on the host."""
        begin = min(int(place) * self.size, self._of_device - self.size)
        begins = np.arange(self.devices) * self._of_device + begin
        return (begins[:, None] + np.arange(self.size)).reshape(-1)


def blocks_of(samples: int, most: int) -> Blocks:
    """The fewest blocks, of nearly one size, of at most so many samples, or of one per device."""
    of_device = samples // _devices(samples)
    number = -(-of_device // max(1, most // _devices(samples)))
    return Blocks(samples, -(-of_device // number))


def _devices(samples):
    return math.gcd(samples, jax.device_count())
