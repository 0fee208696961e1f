"""MNIST: 70,000 handwritten digits, 28 × 28 pixels.

Source: LeCun, Bottou, Bengio, Haffner, Proceedings of the IEEE 86 (1998).
"""

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from varprox.datasets._cache import check_integer, find_file, float_dtype

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
HASHES = {
    "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
}
MEAN, SCALE = 0.1307, 0.3013  # of the pixels, which lie between 0 and 1
VALIDATION = 10_000  # of the 60,000 images to train on


class Mnist(NamedTuple):
    """The MNIST images, normalised, and their labels.

    Attributes:
        train: The pair (images (n, 28, 28, 1), labels (n,) int32) to train on.
        validation: Such a pair of 10,000 to validate on.
        test: Such a pair of 10,000 to test on.

    Example:
        >>> import varprox as vp
        >>> images, labels = vp.datasets.mnist(1000).validation  # doctest: +SKIP
        >>> images.shape, labels.shape  # doctest: +SKIP
        ((10000, 28, 28, 1), (10000,))
    """

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]  # 10,000
    test: tuple[np.ndarray, np.ndarray]  # 10,000


def mnist(n: int = 50_000, *, seed: int = 0) -> Mnist:
    """The MNIST images of handwritten digits, 28 × 28 pixels.

    Pixels p between 0 and 1 become (p − 0.1307) / 0.3013. The 60,000 images that are not for
    testing are put in an order drawn from the seed. The last 10,000 are for validation and the
    first `n` for training, so smaller training sets are part of larger ones.

    The four files in idx format are looked for in the folder `mnist` inside the folder that the
    environment variable VARPROX_DATA names, then inside the user's cache, and are downloaded if
    they are in neither.

    Arguments:
        n: The number of training images, from 1 to 50,000.
        seed: An integer ≥ 0, which fixes the order.

    Returns:
        An `Mnist`, its images in JAX's default float dtype.

    Raises:
        TypeError: If `n` or `seed` is not an integer.
        ValueError: If `n` is below 1 or above 50,000, `seed` is below 0, or a file does not hold
            the data.
        ImportError: If pooch, which downloads, is missing.
        NotADirectoryError: If VARPROX_DATA names no folder.
        OSError: If the download fails.

    Example:
        >>> import varprox as vp
        >>> vp.datasets.mnist(1000).train[0].shape  # doctest: +SKIP
        (1000, 28, 28, 1)
    """
    n = check_integer("n", n, least=1)
    rng = np.random.default_rng(check_integer("seed", seed, least=0))
    images, labels = _read("train", 60_000)
    order = rng.permutation(len(images))
    if n > len(order) - VALIDATION:
        raise ValueError(f"n: expected an integer of at most {len(order) - VALIDATION}, got {n}")
    sets = {
        "train": (images, labels, order[:n]),
        "validation": (images, labels, order[-VALIDATION:]),
        "test": (*_read("t10k", 10_000), slice(None)),
    }
    return Mnist(**{name: (_normalised(x[i]), y[i]) for name, (x, y, i) in sets.items()})


def _read(kind, count):
    files = [name for name in HASHES if name.startswith(kind)]
    paths = [find_file(f"mnist/{name}", URL + name, HASHES[name]) for name in files]
    shapes = (count, 28, 28), (count,)
    images, labels = (read_idx(*pair) for pair in zip(paths, shapes, strict=True))
    return images, labels.astype(np.int32)


def _normalised(images):
    return ((images[..., None] / 255 - MEAN) / SCALE).astype(float_dtype())


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes in a gzipped idx file as an array of the given shape; ValueError for any other."""
    content = gzip.decompress(path.read_bytes())
    header = 4 * (1 + len(shape))
    found = np.frombuffer(content[:header], ">u4") if len(content) >= header else np.array([0])
    # Two zeros, 8 for unsigned bytes, the number of axes; then their lengths.
    if found[0] != 0x800 + len(shape) or len(content) != header + math.prod(found[1:].tolist()):
        raise ValueError(f"{path.name}: expected an idx file of {len(shape)} axes of bytes")
    if tuple(found[1:].tolist()) != shape:
        raise ValueError(f"{path.name}: expected shape {shape}, got {tuple(found[1:].tolist())}")
    return np.frombuffer(content[header:], np.uint8).reshape(shape)
