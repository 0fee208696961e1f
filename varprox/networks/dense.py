"""Fully connected layers, and what all networks share."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name


@jax.custom_jvp
def tanh(x: jax.Array) -> jax.Array:
    """The hyperbolic tangent, whose derivative keeps one array, 1 − tanh²; `jnp.tanh` keeps two."""
    return jnp.tanh(x)


@tanh.defjvp
def _tanh_jvp(primals, tangents):
    y = checkpoint_name(jnp.tanh(*primals), "tanh")  # for the policy of `jax.checkpoint` in flows
    return y, tangents[0] * (1 - y * y)


class Network(nnx.Module):
    """Features, and `head`, a linear layer."""

    head: nnx.Linear | nnx.ConvTranspose

    def features(self, inputs: jax.Array) -> jax.Array:
        raise NotImplementedError

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Inputs (…, in_features) to outputs (…, out_features)."""
        return self.head(self.features(inputs))


class Dense(Network):
    """Fully connected layers: activation(z K + b) for each hidden layer, then the head.

    `sizes` counts inputs, hidden units layer by layer, and outputs: (2, 4, 4, 2) has two hidden
    layers of width 4. Raises ValueError for fewer than two sizes or one that is no positive
    integer.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Callable[[jax.Array], jax.Array] = tanh,
        rngs: nnx.Rngs,
        param_dtype=None,
    ):
        if len(sizes) < 2:
            raise ValueError(f"sizes: expected at least inputs and outputs, got {sizes!r}")
        check_counts(**{f"sizes[{i}]": size for i, size in enumerate(sizes)})
        linear = partial(nnx.Linear, param_dtype=dtype_or_default(param_dtype), rngs=rngs)
        self.activation = activation
        self.layers = nnx.List([linear(m, n) for m, n in pairwise(sizes[:-1])])
        self.head = linear(*sizes[-2:])

    def features(self, inputs: jax.Array) -> jax.Array:
        """Inputs (…, sizes[0]) to features (…, sizes[-2])."""
        z = inputs
        for layer in self.layers:
            z = self.activation(layer(z))
        return z


def dtype_or_default(param_dtype):
    """`param_dtype`, or JAX's default float for None."""
    return jnp.result_type(float) if param_dtype is None else param_dtype


def check_counts(**counts):
    """Raises ValueError for one that is no positive integer."""
    for name, count in counts.items():
        if not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"{name}: expected a positive integer, got {count!r}")
