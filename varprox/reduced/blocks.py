"""Samples in blocks that are worked on one after the other, each with as many of every device.

Where the batch is split over devices, each has neighbouring samples: a block of neighbours would be
one device's work, or be sent to all.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Blocks(NamedTuple):
    """Some number of samples in some number of blocks, all of one size: the last one begins with
    samples of the one before where they do not divide."""

    samples: int
    number: int

    @property
    def devices(self) -> int:
        """That the samples may be split over."""
        return math.gcd(self.samples, jax.device_count())

    @property
    def size(self) -> int:
        """The samples of a block that belong to one device."""
        return -(-self.samples // (self.devices * self.number))

    def take(self, tree: Any, place) -> Any:
        """The samples of a block, from arrays that have all along their first axis."""

        def of(x):
            rest = x.shape[1:]
            x = x.reshape(self.devices, -1, *rest)
            part = jax.lax.dynamic_slice_in_dim(x, place * self.size, self.size, axis=1)
            return part.reshape(-1, *rest)

        return jax.tree.map(lambda leaf: of(jnp.asarray(leaf)), tree)

    def new(self, place) -> jax.Array:
        """Which samples of a block the one before does not have."""
        begin = place * self.size
        # Where XLA moves a slice to that would go beyond the end.
        begins = jnp.minimum(begin, self.samples // self.devices - self.size)
        return jnp.tile(begins + np.arange(self.size, dtype=np.int32) >= begin, self.devices)
