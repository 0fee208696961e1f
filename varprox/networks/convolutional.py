"""A convolutional classifier of images."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from varprox.networks.dense import Network, check_counts, dtype_or_default


class Convolutional(Network):
    """Convolutions with ReLU and average pooling, then a linear head.

    After every convolution but the last, average pooling halves the image; after the last, it
    averages over what is left of the image. Inputs are (batch, height, width, channels[0]),
    features (batch, channels[-2]) and outputs (batch, channels[-1]). Images are padded with zeros,
    so that convolutions keep their size.

    The kernels of convolutions start Kaiming-normal, which keeps the size of signals behind a ReLU,
    the kernel of the head LeCun-normal, and biases at zero.

    Arguments:
        channels: The numbers of channels of the images and behind every convolution, and of
            outputs. For example, (3, 32, 64, 10) has two convolutions.
        taps: Height and width of the kernels.
        rngs: A `flax.nnx.Rngs`, from which the initial weights are drawn.
        param_dtype: The dtype of the weights; None, the default, means JAX's default float.

    Raises:
        ValueError: If there are fewer than three numbers of channels, or if one, or `taps`, is not
            a positive integer.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> net = vp.networks.Convolutional((3, 4, 8, 10), rngs=nnx.Rngs(0))
        >>> images = jnp.ones((5, 16, 16, 3))
        >>> net.features(images).shape, net(images).shape
        ((5, 8), (5, 10))

    Source:
        He, Zhang, Ren, Sun, arXiv:1502.01852, for the initial kernels.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        taps: int = 5,
        rngs: nnx.Rngs,
        param_dtype=None,
    ):
        if len(channels) < 3:
            raise ValueError(
                f"channels: expected those of images, of at least one convolution, and outputs, "
                f"got {channels!r}"
            )
        check_counts(taps=taps, **{f"channels[{i}]": count for i, count in enumerate(channels)})
        options = {"param_dtype": dtype_or_default(param_dtype), "rngs": rngs}
        kaiming = nnx.initializers.he_normal()

        def convolution(inputs, outputs):
            return nnx.Conv(inputs, outputs, (taps, taps), kernel_init=kaiming, **options)

        self.layers = nnx.List([convolution(m, n) for m, n in pairwise(channels[:-1])])
        self.head = nnx.Linear(*channels[-2:], **options)

    def features(self, inputs: jax.Array) -> jax.Array:
        """Images (batch, height, width, channels[0]) to features (batch, channels[-2])."""
        first, *others = self.layers
        z = nnx.relu(first(inputs))
        for layer in others:
            z = nnx.relu(layer(_halved(z)))
        return jnp.mean(z, axis=(1, 2))


def _halved(images):
    """Means over squares of 2 × 2 pixels; a last odd row or column is left out."""
    batch, height, width, channels = images.shape
    rows, columns = height // 2, width // 2
    squares = images[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels)
    return jnp.mean(squares, axis=(2, 4))
