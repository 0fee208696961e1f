"""A convolutional autoencoder, whose features learn the statistics of their batches."""

import math
from functools import partial

import jax
from flax import nnx

from varprox.networks.dense import Network, check_counts, dtype_or_default


class Autoencoder(Network):
    """A convolutional autoencoder of images, whose head is a transposed convolution.

    =======  =====================================================================
    part     layers
    =======  =====================================================================
    encoder  convolution, ReLU, convolution, linear layer to `latent` numbers
    decoder  linear layer, batch norm, transposed convolution, ReLU, batch norm
    head     transposed convolution
    =======  =====================================================================

    Kernels are 4 × 4 with stride 2: a convolution halves the image, a transposed one doubles it.
    The encoder's convolutions have `channels` and twice as many output channels, and the features
    are images of half the size with `channels` channels. The features learn the statistics of their
    batches and the head is convolutional, so the network is trained by `varprox.slimtrain`.

    All weights start uniform within ±1/√n, where n is the number of inputs that an output of the
    layer sees; for transposed convolutions it is the number of outputs times the number of taps.

    Arguments:
        size: Height and width of the images, multiples of 4.
        image_channels: The number of channels of the images.
        channels: The number of channels of the features.
        latent: The number of entries of a code, to which the encoder maps an image.
        rngs: A `flax.nnx.Rngs`, from which the initial weights are drawn.
        param_dtype: The dtype of the weights; None, the default, means JAX's default float.

    Raises:
        ValueError: If a count is not a positive integer, or if the height or width is not a
            positive multiple of 4.

    Example:
        >>> from flax import nnx
        >>> import varprox as vp
        >>> net = vp.networks.Autoencoder((8, 8), channels=2, latent=3, rngs=nnx.Rngs(0))
        >>> theta, model = vp.nnx.split(net)
        >>> type(model.head).__name__
        'ConvTransposeHead'

    Source:
        Newman, Chung, Chung, Ruthotto, arXiv:2109.14002, section 5.2.
    """

    def __init__(
        self,
        size: tuple[int, int],
        image_channels: int = 1,
        *,
        channels: int = 16,
        latent: int = 50,
        rngs: nnx.Rngs,
        param_dtype=None,
    ):
        check_counts(image_channels=image_channels, channels=channels, latent=latent)
        if len(size) != 2 or any(n < 4 or n % 4 for n in size):
            raise ValueError(f"size: expected two positive multiples of 4, got {size!r}")
        dtype = dtype_or_default(param_dtype)
        self.smallest = size[0] // 4, size[1] // 4, 2 * channels
        flat = math.prod(self.smallest)

        def layer(kind, inputs, outputs, *taps, **options):
            seen = (outputs if kind is nnx.ConvTranspose else inputs) * math.prod(taps)
            draw = nnx.initializers.uniform(2 / math.sqrt(seen))
            centred = lambda *args: draw(*args) - 1 / math.sqrt(seen)  # noqa: E731
            inits = {"kernel_init": centred, "bias_init": centred, "param_dtype": dtype}
            where = (taps,) if taps else ()
            return kind(inputs, outputs, *where, rngs=rngs, **inits, **options)

        def convolution(kind, inputs, outputs):
            return layer(kind, inputs, outputs, 4, 4, strides=(2, 2), padding="SAME")

        self.narrowing = nnx.List(
            [
                convolution(nnx.Conv, image_channels, channels),
                convolution(nnx.Conv, channels, 2 * channels),
            ]
        )
        self.encoded = layer(nnx.Linear, flat, latent)
        self.decoded = layer(nnx.Linear, latent, flat)
        self.widening = convolution(nnx.ConvTranspose, 2 * channels, channels)
        norm = partial(nnx.BatchNorm, momentum=0.9, param_dtype=dtype, rngs=rngs)
        self.norms = nnx.List([norm(2 * channels), norm(channels)])
        for normalise in self.norms:  # flax has float32 always
            normalise.mean = nnx.BatchStat(normalise.mean[...].astype(dtype))
            normalise.var = nnx.BatchStat(normalise.var[...].astype(dtype))
        self.head = convolution(nnx.ConvTranspose, channels, image_channels)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images (batch, height, width, image_channels) to codes (batch, latent)."""
        first, second = self.narrowing
        z = second(nnx.relu(first(images)))
        return self.encoded(z.reshape(len(z), -1))

    def features(self, inputs: jax.Array) -> jax.Array:
        """Images (batch, height, width, image_channels) to features (batch, height / 2, width / 2,
        channels)."""
        first, second = self.norms
        z = first(self.decoded(self.encode(inputs)).reshape(-1, *self.smallest))
        return second(nnx.relu(self.widening(z)))
