"""Linear last layers, each as a map from features to design rows.

A head turns features `z` into rows `Z` with `prediction = Z @ w`; everything that solves for or
differentiates through `w` is written once, for rows. What the structure of a head makes cheaper
than its rows, the product with `w` and the Gram matrix, it does itself. Imports checks.
"""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varprox.checks import check_integer


class Moments(NamedTuple):
    """Of a batch with rows A, targets c and r = A w − c."""

    gram: jax.Array  # AᵀA
    gradient: jax.Array  # Aᵀ r
    square: jax.Array  # ‖r‖²

    def scaled(self, factor) -> "Moments":
        """Those of √factor times the rows and targets."""
        return Moments(factor * self.gram, factor * self.gradient, factor * self.square)


class Head:
    """A last layer given by its design rows. For one of your own, such as a linear operator that
    acts on the features, write `rows`; heads of equal settings should be equal, as those of a
    frozen dataclass are, so that nothing compiles twice."""

    def rows(self, z: jax.Array) -> jax.Array:
        """Features to design rows (rows, columns)."""
        raise NotImplementedError

    def apply(self, z: jax.Array, w: jax.Array) -> jax.Array:
        """rows @ w, shaped like the targets, (rows, outputs)."""
        return self.rows(z) @ w

    def gram(self, z: jax.Array) -> jax.Array:
        """rowsᵀ rows, (columns, columns)."""
        rows = self.rows(z)
        return rows.T @ rows

    def moments(self, z: jax.Array, w: jax.Array, targets: jax.Array) -> Moments:
        """What a step for W has to know of the batch at `w`, for targets like the predictions."""
        rows = self.rows(z)
        residual = rows @ w - targets
        return Moments(rows.T @ rows, rows.T @ residual, jnp.sum(residual**2))


@dataclass(frozen=True)
class DenseHead(Head):
    """A fully connected last layer: see `dense`."""

    bias: bool = True

    def rows(self, z: jax.Array) -> jax.Array:
        """Features (batch, m) to design rows (batch, m + 1), or (batch, m) without bias."""
        return _with_ones(z) if self.bias else z

    def pack(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """`w` from a kernel (m, outputs) and a bias (outputs,), or None without bias."""
        return kernel if bias is None else jnp.vstack([kernel, bias])

    def unpack(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Kernel and bias, the inverse of `pack`."""
        return (w[:-1], w[-1]) if self.bias else (w, None)


class _Phase(NamedTuple):
    """What outputs see that lie a stride apart along one axis."""

    taps: range  # of the kernel, in the order of the inputs they meet
    start: int  # the input that the first output's first tap meets
    outputs: int  # their number


@dataclass(frozen=True)
class ConvHead(Head):
    """A convolution or, if `transposed`, its transpose as last layer: see `conv`.

    A transposed convolution of stride s is s · s convolutions of stride one side by side, its
    phases: pixels (s·u + i, s·v + j) for a phase (i, j) see the same taps of the kernel, a fraction
    of 1/s² of all. A convolution is a single phase. Rows are put together from the phases, and the
    Gram matrix is the sum of theirs, at a fraction of the cost of the rows' product.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    bias: bool
    transposed: bool

    def rows(self, z: jax.Array) -> jax.Array:
        """Features (batch, height, width, channels) to design rows (batch · height' · width',
        columns), pixels in row-major order."""
        batch, *size, channels = _shape_of_images(z)
        axes = self._axes(size)
        shape = [sum(phase.outputs for phase in axis) for axis in axes]
        columns = channels * np.prod(self.kernel_size)
        rows = jnp.zeros((batch, *shape, columns), z.dtype)
        for i, j in np.ndindex(*map(len, axes)):
            patches, places = self._patches(z, axes[0][i], axes[1][j])
            if len(places):
                rows = rows.at[:, i :: len(axes[0]), j :: len(axes[1]), places].set(patches)
        rows = rows.reshape(-1, columns)
        return _with_ones(rows) if self.bias else rows

    def apply(self, z: jax.Array, w: jax.Array) -> jax.Array:
        """rows @ w as images, (batch, height', width', outputs)."""
        _shape_of_images(z)
        kernel, bias = self.unpack(w)
        pads, strides, dilation = list(self.padding), self.stride, (1, 1)
        if self.transposed:
            pads = [k - 1 - p for k, p in zip(self.kernel_size, pads, strict=True)]
            strides, dilation = dilation, strides
        images = jax.lax.conv_general_dilated(
            z,
            kernel,
            strides,
            [(p, p) for p in pads],
            lhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return images if bias is None else images + bias

    def pack(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """`w` from a kernel (height, width, channels, outputs) and a bias (outputs,), or None
        without bias. The taps of a transposed convolution come in flax's order, which is the
        reverse of PyTorch's."""
        kernel = kernel[::-1, ::-1] if self.transposed else kernel
        w = jnp.moveaxis(kernel, 2, 0).reshape(-1, kernel.shape[-1])
        return w if bias is None else jnp.vstack([w, bias])

    def unpack(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Kernel and bias, the inverse of `pack`."""
        w, bias = (w[:-1], w[-1]) if self.bias else (w, None)
        kernel = w.reshape(-1, *self.kernel_size, w.shape[1])
        kernel = jnp.moveaxis(kernel, 0, 2)
        return (kernel[::-1, ::-1] if self.transposed else kernel), bias

    def gram(self, z: jax.Array) -> jax.Array:
        """rowsᵀ rows, (columns, columns)."""
        columns = _shape_of_images(z)[-1] * np.prod(self.kernel_size) + self.bias
        gram = jnp.zeros((columns, columns), z.dtype)
        for rows, places, _ in self._phases(z):
            gram = gram.at[np.ix_(places, places)].add(rows.T @ rows)
        return gram

    def moments(self, z: jax.Array, w: jax.Array, targets: jax.Array) -> Moments:
        """What a step for W has to know of the batch at `w`, for targets like the predictions."""
        residual = self.apply(z, w) - targets
        columns, outputs = w.shape
        # With the residuals as further columns one product of the rows gives all.
        total = jnp.zeros((columns + outputs, columns + outputs), z.dtype)
        for rows, places, pixels in self._phases(z):
            beside = residual[:, *pixels].reshape(len(rows), outputs)
            rows = jnp.concatenate([rows, beside], axis=1)
            places = np.append(places, columns + np.arange(outputs))
            total = total.at[np.ix_(places, places)].add(rows.T @ rows)
        square = jnp.trace(total[columns:, columns:])
        return Moments(total[:columns, :columns], total[:columns, columns:], square)

    def _phases(self, z):
        """For each pair of phases its own rows (batch · pixels'', columns''), the places of their
        columns, and the pixels that they belong to."""
        vertical, horizontal = self._axes(_shape_of_images(z)[1:3])
        columns = z.shape[3] * np.prod(self.kernel_size)
        for i, j in np.ndindex(len(vertical), len(horizontal)):
            patches, places = self._patches(z, vertical[i], horizontal[j])
            rows = patches.reshape(np.prod(patches.shape[:3]), len(places))
            if self.bias:
                rows, places = _with_ones(rows), np.append(places, columns)
            pixels = slice(i, None, len(vertical)), slice(j, None, len(horizontal))
            yield rows, places, pixels

    def _axes(self, size):
        """The phases along both axes."""
        axes = []
        for n, k, s, p in zip(size, self.kernel_size, self.stride, self.padding, strict=True):
            if not self.transposed:
                axes.append([_Phase(range(k), -p, (n + 2 * p - k) // s + 1)])
                continue
            outputs, phases = (n - 1) * s - 2 * p + k, []
            for phase in range(min(s, outputs)):
                first = (phase + p) % s
                taps = range(first, k, s)
                start = (phase + p - first) // s - (len(taps) - 1)
                phases.append(_Phase(taps[::-1], start, -(-(outputs - phase) // s)))
            axes.append(phases)
        return axes

    def _patches(self, z, *phases):
        """What the outputs of a phase see, (batch, height'', width'', channels · taps), and the
        columns of the rows that this belongs in."""
        strides = (1, 1) if self.transposed else self.stride
        padding, slices = [(0, 0, 0)], []
        for n, (taps, start, outputs), s in zip(z.shape[1:3], phases, strides, strict=True):
            last = start + (outputs - 1) * s + len(taps) - 1
            padding.append((-start, max(last, start) - n + 1, 0))
            slices.append([slice(t, t + (outputs - 1) * s + 1, s) for t in range(len(taps))])
        padded = jax.lax.pad(z, jnp.zeros((), z.dtype), [*padding, (0, 0, 0)])
        nothing = jnp.zeros((len(z), *(phase.outputs for phase in phases), z.shape[3], 0), z.dtype)
        seen = [padded[:, rows, columns, :, None] for rows, columns in product(*slices)]
        patches = jnp.concatenate([nothing, *seen], axis=-1)
        index = np.arange(z.shape[3] * np.prod(self.kernel_size))
        index = index.reshape(-1, *self.kernel_size)[:, phases[0].taps][:, :, phases[1].taps]
        return patches.reshape(*nothing.shape[:3], -1), index.reshape(-1)


def _shape_of_images(z):
    if jnp.ndim(z) != 4:
        raise ValueError(
            f"features: expected shape (batch, height, width, channels), got {jnp.shape(z)}"
        )
    return z.shape


def _with_ones(rows):
    return jnp.concatenate([rows, jnp.ones((len(rows), 1), rows.dtype)], axis=1)


def dense(bias: bool = True) -> DenseHead:
    """A fully connected last layer, `prediction = z @ kernel + bias`.

    Its weights are one array `w` of shape (m + 1, outputs), the bias being the last row, or
    (m, outputs) without bias.
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
    """A convolution over features (batch, height, width, channels), zeros beyond their edges.

    `padding` is the number of these zeros on both sides of either axis. A row is what one output
    pixel sees: its columns are ordered by channel, kernel row and kernel column, and the last one
    belongs to the bias. So `w` is (channels · taps + 1, outputs).
    """
    return _conv(kernel_size, stride, padding, bias, False)


def conv_transpose(
    kernel_size: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    bias: bool = True,
) -> ConvHead:
    """The transpose of `conv`: tap k of the kernel leads from input pixel i to output pixel
    i · stride − padding + k, as in PyTorch.

    Outputs have (n − 1) · stride − 2 · padding + kernel size pixels along an axis of n. Columns are
    ordered as in `conv`.
    """
    return _conv(kernel_size, stride, padding, bias, True)


def _conv(kernel_size, stride, padding, bias, transposed):
    pairs = {"kernel_size": (kernel_size, 1), "stride": (stride, 1), "padding": (padding, 0)}
    for name, (pair, least) in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"{name}: expected a pair of integers, got {pair!r}")
        for value in pair:
            check_integer(name, value, least)
    if not isinstance(bias, bool):
        raise TypeError(f"bias: expected True or False, got {bias!r}")
    return ConvHead(tuple(kernel_size), tuple(stride), tuple(padding), bias, transposed)
