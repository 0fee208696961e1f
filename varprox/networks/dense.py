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
    """The hyperbolic tangent, with a derivative that needs less memory.

    Its derivative keeps one array, 1 − tanh², and the derivative of `jnp.tanh` two. Values and
    derivatives are the same.

    Arguments:
        x: An array of any shape, of a floating dtype.

    Returns:
        tanh(x), an array like `x`.

    Example:
        >>> import jax
        >>> import varprox as vp
        >>> float(jax.grad(vp.networks.tanh)(0.0))
        1.0
    """
    return jnp.tanh(x)


@tanh.defjvp
def _tanh_jvp(primals, tangents):
    y = checkpoint_name(jnp.tanh(*primals), "tanh")  # for the policy of `jax.checkpoint` in flows
    return y, tangents[0] * (1 - y * y)


class Network(nnx.Module):
    """Features, and `head`, a linear layer."""

    head: nnx.Linear | nnx.ConvTranspose

    def features(self, inputs: jax.Array) -> jax.Array:
        """Inputs (…, in_features) to features (…, m)."""
        raise NotImplementedError

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Inputs (…, in_features) to outputs (…, out_features)."""
        return self.head(self.features(inputs))


class Dense(Network):
    """Fully connected layers: activation(z K + b) for each hidden layer, then a linear head.

    Inputs are (…, sizes[0]), features (…, sizes[-2]) and outputs (…, sizes[-1]). Kernels K start
    LeCun-normal and biases b at zero.

    Arguments:
        sizes: The numbers of inputs, of hidden units layer by layer, and of outputs. For example,
            (2, 4, 4, 2) has two hidden layers of width 4.
        activation: A function from arrays to arrays, by default `tanh`.
        rngs: A `flax.nnx.Rngs`, from which the initial weights are drawn.
        param_dtype: The dtype of the weights; None, the default, means JAX's default float.

    Raises:
        ValueError: If there are fewer than two sizes, or one is not a positive integer.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> net = vp.networks.Dense((2, 4, 4, 1), rngs=nnx.Rngs(0))
        >>> net.features(jnp.ones((5, 2))).shape, net(jnp.ones((5, 2))).shape
        ((5, 4), (5, 1))
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
