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
    """Pairs (images (n, 28, 28, 1), labels (n,) int32) for training, validation and testing."""

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]  # 10,000
    test: tuple[np.ndarray, np.ndarray]  # 10,000


def mnist(n: int = 50_000, *, seed: int = 0) -> Mnist:
    """`n` training images, the 10,000 validation images that go with the seed, and the test images.

    Pixels p between 0 and 1 become (p − 0.1307) / 0.3013. Of the 60,000 images to train on, in an
    order drawn from the seed, the last 10,000 are for validation and the first `n` for training, so
    that smaller training sets are part of larger ones.

    The four files in idx format are looked for in the folder `mnist` of the one that VARPROX_DATA
    names and of the user's cache, and else downloaded. Raises TypeError or ValueError unless `n`
    and `seed` are integers with 1 ≤ n ≤ 50,000 and seed ≥ 0, ValueError where a file is not in idx
    format or has another shape, and what `find_file` raises where one cannot be had.
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
