"""Linear last layers, each as a map from features to design rows.

A head turns features `z` into rows `Z` with `prediction = Z @ w`; everything that solves for or
differentiates through `w` is written once, for rows. Imports nothing of the package.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class DenseHead:
    """A fully connected last layer: see `dense`."""

    bias: bool = True

    def rows(self, z: jax.Array) -> jax.Array:
        """Features (batch, m) to design rows (batch, m + 1), or (batch, m) without bias."""
        if not self.bias:
            return z
        return jnp.concatenate([z, jnp.ones_like(z[:, :1])], axis=1)


def dense(bias: bool = True) -> DenseHead:
    """A fully connected last layer, `prediction = z @ kernel + bias`.

    Its weights are one array `w` of shape (m + 1, outputs), the bias being the last row, or
    (m, outputs) without bias.
    """
    if not isinstance(bias, bool):
        raise TypeError(f"bias: expected True or False, got {bias!r}")
    return DenseHead(bias)
