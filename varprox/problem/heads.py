"""Linear last layers, each as a map from features to design rows.

A head turns features z into design rows Z with ``prediction = Z @ w``. Whatever solves for W, or
differentiates W(θ), is written once, for design rows. A head overrides the products with its rows,
and their Gram matrix, if its structure makes them cheaper.
"""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varprox.checks import check_integer
from varprox.problem.weighted import Targets, Weighted, plain, rooted, rooted_rows, weighed


class Moments(NamedTuple):
    """Of a batch with rows A, targets c, r = A w − c and weights Ω."""

    gram: jax.Array  # AᵀΩA; one for each output where they have weights of their own
    gradient: jax.Array  # AᵀΩr
    square: jax.Array  # rᵀΩr

    def scaled(self, factor) -> "Moments":
        """Those of √factor times the rows and targets."""
        return Moments(factor * self.gram, factor * self.gradient, factor * self.square)


class Head:
    """A linear last layer, given by its design rows.

    The library's own heads are made by `dense`, `conv` and `conv_transpose`. For another one, such
    as a linear operator that acts on the features, subclass `Head` and write `rows`; the other
    methods follow from it. The training methods ask that `rows` maps features (batch, m) to rows
    (batch, columns), and that a row depends only on the features of its own sample.

    Heads with equal settings should be equal and hashable, as instances of a frozen dataclass are.
    Otherwise a new head makes everything compile again.

    Example:
        >>> from dataclasses import dataclass
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> @dataclass(frozen=True)
        ... class Quadratic(vp.Head):
        ...     def rows(self, z):
        ...         return jnp.concatenate([z, z**2], axis=1)
        >>> z, w = jnp.ones((5, 3)), jnp.ones((6, 1))
        >>> Quadratic().apply(z, w).shape
        (5, 1)
    """

    def rows(self, z: jax.Array) -> jax.Array:
        """Design rows (batch, columns) of the features z."""
        raise NotImplementedError

    def apply(self, z: jax.Array, w: jax.Array) -> jax.Array:
        """The predictions ``rows @ w``, shaped like the targets: (batch, outputs)."""
        return self.rows(z) @ w

    def adjoint(self, z: jax.Array, y: jax.Array) -> jax.Array:
        """rowsᵀ y, (columns, outputs), for y shaped like the predictions."""
        rows = self.rows(z)
        return rows.T @ y.reshape(len(rows), -1)

    def gram(self, z: jax.Array) -> jax.Array:
        """The Gram matrix rowsᵀ rows, (columns, columns)."""
        rows = self.rows(z)
        return rows.T @ rows

    def moments(self, z: jax.Array, w: jax.Array, targets: Targets) -> Moments:
        """What a step for W needs to know of a batch at `w`; targets are shaped like
        predictions."""
        residual = self.apply(z, w) - plain(targets)
        return Moments(
            self._weighted_gram(z, targets) if isinstance(targets, Weighted) else self.gram(z),
            self.adjoint(z, weighed(targets, residual)),
            jnp.sum(rooted(targets, residual) ** 2),
        )

    def _weighted_gram(self, z, targets):
        each = targets.weights.shape[-1]  # 1, or the number of outputs
        of_rows = jnp.broadcast_to(targets.weights, (*targets.shape[:-1], each)).reshape(-1, each)
        rows = rooted_rows(Weighted(of_rows, of_rows), self.rows(z))
        return rows.mT @ rows


@dataclass(frozen=True)
class DenseHead(Head):
    """A fully connected last layer: see `dense`."""

    bias: bool

    def rows(self, z: jax.Array) -> jax.Array:
        """Design rows (batch, m + 1) of features (batch, m); without bias they are the features."""
        return _with_ones(z) if self.bias else z

    def pack(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """W of a kernel (m, outputs) and a bias (outputs,) or None."""
        return kernel if bias is None else jnp.vstack([kernel, bias])

    def unpack(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The kernel and the bias of W, the inverse of `pack`."""
        return (w[:-1], w[-1]) if self.bias else (w, None)


@dataclass(frozen=True)
class ConvHead(Head):
    """A convolution as last layer: see `conv`."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    bias: bool

    def rows(self, z: jax.Array) -> jax.Array:
        """Design rows (batch · height' · width', columns) of features (batch, height, width,
        channels), pixels in row-major order."""
        return self._rows(_patches(_padded(z, self.padding), self.kernel_size, self.stride))

    def apply(self, z: jax.Array, w: jax.Array) -> jax.Array:
        """The predictions ``rows @ w`` as images, (batch, height', width', outputs)."""
        return self._images(z, w, self.padding, self.stride)

    def pack(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """W of a kernel (height, width, channels, outputs) and a bias (outputs,) or None."""
        w = jnp.moveaxis(kernel, 2, 0).reshape(-1, kernel.shape[-1])
        return w if bias is None else jnp.vstack([w, bias])

    def unpack(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The kernel and the bias of W, the inverse of `pack`."""
        w, bias = (w[:-1], w[-1]) if self.bias else (w, None)
        return jnp.moveaxis(w.reshape(-1, *self.kernel_size, w.shape[1]), 0, 2), bias

    def _rows(self, patches):
        rows = patches.reshape(np.prod(patches.shape[:3]), np.prod(patches.shape[3:]))
        return _with_ones(rows) if self.bias else rows

    def _images(self, z, w, padding, stride, dilation=(1, 1)):
        _check_images(z)
        kernel, bias = self.unpack(w)
        images = jax.lax.conv_general_dilated(
            z,
            kernel,
            stride,
            [(p, p) for p in padding],
            lhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return images if bias is None else images + jnp.broadcast_to(bias, images.shape)


@dataclass(frozen=True)
class ConvTransposeHead(ConvHead):
    """The transpose of a convolution as last layer: see `conv_transpose`."""

    def rows(self, z: jax.Array) -> jax.Array:
        """Design rows (batch · height' · width', columns) of features (batch, height, width,
        channels), pixels in row-major order."""
        spread = _padded(z, self._margins(), self.stride)
        return self._rows(_patches(spread, self.kernel_size, (1, 1))[..., ::-1])

    def apply(self, z: jax.Array, w: jax.Array) -> jax.Array:
        """The predictions ``rows @ w`` as images, (batch, height', width', outputs)."""
        return self._images(z, w, self._margins(), (1, 1), self.stride)

    def adjoint(self, z: jax.Array, y: jax.Array) -> jax.Array:
        """rowsᵀ y for images y (batch, height', width', outputs), shaped like W."""
        patches = _patches(_padded(y, self.padding), self.kernel_size, self.stride)
        w = jnp.einsum("bhwc,bhwot->cto", z, patches).reshape(-1, y.shape[-1])
        return jnp.vstack([w, y.sum((0, 1, 2))]) if self.bias else w

    def gram(self, z: jax.Array) -> jax.Array:
        """The Gram matrix rowsᵀ rows, (columns, columns).

        If the padding cut off no pixels, the entries for two taps would depend only on the
        difference of the taps: they would be products of features with the features so far beside
        them, summed over all pixels. There are few such sums. Features near the edges contribute to
        them through pixels that are cut off; these contributions are subtracted. For stride 2 and
        kernels of 4 × 4 this takes an eighth of the operations of the product of the rows without
        their zeros.
        """
        _check_images(z)
        images, *size, channels = z.shape
        shifts, edges, signs = self._correlations(size)
        beside = jnp.stack([_shifted(z, shift) for shift in shifts], axis=3)
        sums = []
        for place in product(*([slice(None), *places] for places in edges)):
            some, theirs = z[:, *place], beside[:, *place]
            some, theirs = some.reshape(-1, channels), theirs.reshape(-1, len(shifts), channels)
            sums.append(jnp.einsum("xc,xsd->scd", some, theirs))
        # Sums are subtracted: in full precision, whatever is the default for products.
        blocks = jnp.tensordot(signs.astype(z.dtype), jnp.stack(sums), 2, precision="highest")
        half = blocks.transpose(2, 0, 3, 1).reshape(2 * [channels * np.prod(self.kernel_size)])
        gram = half + half.T
        if not self.bias:
            return gram
        axes = zip(size, self.kernel_size, self.stride, self.padding, strict=True)
        ones = jnp.ones((1, *((n - 1) * s + k - 2 * p for n, k, s, p in axes), 1), z.dtype)
        border = images * self.adjoint(z.mean(0, keepdims=True), ones)
        return jnp.block([[gram, border[:-1]], [border.T]])

    def pack(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """W of a kernel (height, width, channels, outputs) and a bias (outputs,) or None.

        The taps come in flax's order, which is the reverse of PyTorch's.
        """
        return super().pack(kernel[::-1, ::-1], bias)

    def unpack(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The kernel and the bias of W, the inverse of `pack`."""
        kernel, bias = super().unpack(w)
        return kernel[::-1, ::-1], bias

    def _margins(self):
        return [k - 1 - p for k, p in zip(self.kernel_size, self.padding, strict=True)]

    def _correlations(self, size):
        """What the Gram matrix is put together from: shifts (vertical, horizontal), one of each
        pair of opposites; for either axis the places of features from which pixels are cut off; and
        how often the block of two taps has each product, (taps, taps, places, shifts), where the
        first place along either axis stands for all of it. Opposite shifts give the transpose."""
        axes = zip(size, self.kernel_size, self.stride, self.padding, strict=True)
        places, signs = zip(*(_overlaps(*axis) for axis in axes), strict=True)
        reach = [s.shape[2] // 2 for s in signs]
        shifts = [d for d in product(*(range(-r, r + 1) for r in reach)) if d >= (0, 0)]
        vertical, horizontal = (
            s[:, :, [r + d for d in along]]
            for s, r, along in zip(signs, reach, zip(*shifts, strict=True), strict=True)
        )
        both = np.einsum("abxi,cdxj->acbdijx", vertical, horizontal)
        both[..., 0] /= 2  # at no shift a block is its own transpose
        taps = np.prod(self.kernel_size)
        return shifts, places, both.reshape(taps, taps, -1, len(shifts))


def has_bias(head: Head) -> bool:
    """Is the last row of w added to all predictions?"""
    return isinstance(head, DenseHead | ConvHead) and head.bias


def _overlaps(n, k, s, p):
    """Along an axis: the places of features from which pixels are cut off, and how often the block
    of two taps has each product, (k, k, shifts, 1 + places)."""
    pixels = s * np.arange(n) + np.arange(k)[:, None]  # where taps lead to
    lost = (pixels < p) | (pixels >= (n - 1) * s + k - p)
    places = np.flatnonzero(lost.any(axis=0))
    reach = (k - 1) // s
    signs = np.zeros((k, k, 2 * reach + 1, 1 + len(places)))
    for a, b in product(range(k), repeat=2):
        shift, rest = divmod(a - b, s)
        if rest == 0:  # both lead to the same pixels, from features so far apart
            signs[a, b, reach + shift] = [1, *np.where(lost[a, places], -1, 0)]
    return places, signs


def _padded(images, margins, strides=(1, 1)):
    """Images with zeros around them, or less of them, and with zeros between pixels a stride
    apart."""
    _check_images(images)
    axes = [(m, m, s - 1) for m, s in zip(margins, strides, strict=True)]
    return jax.lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *axes, (0, 0, 0)])


def _shifted(images, shift):
    """At every pixel what lies so far below it and to its right."""
    axes = [(-d, d, 0) for d in shift]
    return jax.lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *axes, (0, 0, 0)])


def _patches(images, kernel_size, stride):
    """What a kernel meets as it moves over images, (batch, height', width', channels, taps)."""
    slices = [
        [slice(tap, n - k + tap + 1, s) for tap in range(k)]
        for n, k, s in zip(images.shape[1:3], kernel_size, stride, strict=True)
    ]
    return jnp.stack([images[:, *place] for place in product(*slices)], axis=-1)


def _check_images(z):
    if jnp.ndim(z) != 4:
        raise ValueError(
            f"features: expected shape (batch, height, width, channels), got {jnp.shape(z)}"
        )


def _with_ones(rows):
    return jnp.concatenate([rows, jnp.ones((len(rows), 1), rows.dtype)], axis=1)


def dense(bias: bool = True) -> DenseHead:
    """A fully connected last layer, ``prediction = z @ kernel + bias``.

    Its weights are one array W of shape (m + 1, outputs), whose last row is the bias; without bias
    the shape is (m, outputs). The head's ``pack(kernel, bias)`` and ``unpack(w)`` convert between
    the two forms.

    Arguments:
        bias: True, the default, for a layer with a bias; False for one without.

    Returns:
        The head, which turns features (batch, m) into design rows (batch, m + 1), or (batch, m)
        without bias.

    Raises:
        TypeError: If `bias` is neither True nor False.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> print(vp.dense().rows(jnp.array([[2.0, 3.0]])))
        [[2. 3. 1.]]
    """
    if not isinstance(bias, bool):
        raise TypeError(f"bias: expected True or False, got {bias!r}")
    return DenseHead(bias)


def conv(
    kernel_size: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    bias: bool = True,
) -> ConvHead:
    """A convolution as the last layer.

    It acts on features (batch, height, width, channels) and does not flip its kernel, as in flax
    and PyTorch. An axis of n pixels gives ⌊(n + 2 · padding − kernel size) / stride⌋ + 1 output
    pixels.

    Every output pixel has a design row: the features that the kernel covers there, ordered by
    channel, kernel row and kernel column, then a one for the bias. So W has shape (channels · taps
    + 1, outputs), where taps = kernel height · kernel width. The head's ``pack(kernel, bias)`` and
    ``unpack(w)`` convert between W and a kernel (height, width, channels, outputs) with a bias
    (outputs,).

    Models with this head are trained by `slimtrain`. Full-batch methods and `solve_w` refuse them.

    Arguments:
        kernel_size: Height and width of the kernel, integers ≥ 1.
        stride: Pixels from one output to the next, along height and width, integers ≥ 1.
        padding: Zeros added on both sides, along height and width, integers ≥ 0.
        bias: True, the default, for a layer with a bias; False for one without.

    Returns:
        The head, whose predictions are images (batch, height', width', outputs).

    Raises:
        TypeError: If `kernel_size`, `stride` or `padding` is not a pair, or if `bias` is neither
            True nor False.
        ValueError: If a number in a pair is not an integer, or is too small.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> head = vp.conv((3, 3), padding=(1, 1))
        >>> head.rows(jnp.zeros((2, 4, 4, 1))).shape  # 2 · 4 · 4 output pixels, 9 taps and the bias
        (32, 10)
    """
    return ConvHead(*_checked(kernel_size, stride, padding, bias))


def conv_transpose(
    kernel_size: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    bias: bool = True,
) -> ConvTransposeHead:
    """A transposed convolution as the last layer.

    It is the transpose of `conv`, for features (batch, height, width, channels): tap k of the
    kernel leads from input pixel i to output pixel i · stride − padding + k, as in PyTorch. An axis
    of n pixels gives (n − 1) · stride − 2 · padding + kernel size output pixels.

    Every output pixel has a design row, with columns ordered as for `conv`. So W has shape
    (channels · taps + 1, outputs), where taps = kernel height · kernel width. The head's
    ``pack(kernel, bias)`` and ``unpack(w)`` convert between W and flax's kernel (height, width,
    channels, outputs) with a bias (outputs,); flax orders taps in reverse of PyTorch.

    Models with this head are trained by `slimtrain`. Full-batch methods and `solve_w` refuse them.

    Arguments:
        kernel_size: Height and width of the kernel, integers ≥ 1.
        stride: Output pixels from one input to the next, along height and width, integers ≥ 1.
        padding: Output pixels cut off on both sides, along height and width, integers ≥ 0.
        bias: True, the default, for a layer with a bias; False for one without.

    Returns:
        The head, whose predictions are images (batch, height', width', outputs).

    Raises:
        TypeError: If `kernel_size`, `stride` or `padding` is not a pair, or if `bias` is neither
            True nor False.
        ValueError: If a number in a pair is not an integer, or is too small.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> head = vp.conv_transpose((4, 4), stride=(2, 2), padding=(1, 1))
        >>> z, w = jnp.zeros((2, 4, 4, 3)), jnp.zeros((3 * 16 + 1, 1))
        >>> head.apply(z, w).shape  # twice the height and width
        (2, 8, 8, 1)
    """
    return ConvTransposeHead(*_checked(kernel_size, stride, padding, bias))


def _checked(kernel_size, stride, padding, bias):
    pairs = {"kernel_size": (kernel_size, 1), "stride": (stride, 1), "padding": (padding, 0)}
    for name, (pair, least) in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"{name}: expected a pair of integers, got {pair!r}")
        for value in pair:
            check_integer(name, value, least)
    if not isinstance(bias, bool):
        raise TypeError(f"bias: expected True or False, got {bias!r}")
    return tuple(kernel_size), tuple(stride), tuple(padding), bias
