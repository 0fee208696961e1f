"""CIFAR-10: 60,000 photographs of 32 × 32 pixels in 10 classes.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, University of Toronto
(2009), https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from varprox.datasets._cache import check_integer, find_folder, float_dtype, one_hot

FOLDER = "cifar-10-batches-bin"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
HASH = "md5:c32a1d4ab5d03f1284b67883e8d87530"
TRAIN = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
TEST = "test_batch.bin"
CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SIDE = 32
RECORD = 1 + 3 * SIDE**2  # bytes: the label, then the planes red, green and blue, row by row
VALIDATION = 5  # one image in so many that are not for testing


class Cifar10(NamedTuple):
    """The CIFAR-10 images, normalised, and their classes.

    Attributes:
        train: The pair (images (n, 32, 32, 3), one-hot targets (n, 10)) to train on.
        validation: Such a pair to validate on.
        test: Such a pair to test on.
        class_names: The 10 classes; ``class_names[k]`` is column k of the targets.

    Example:
        >>> import varprox as vp
        >>> data = vp.datasets.cifar10(1000)  # doctest: +SKIP
        >>> images, targets = data.test  # doctest: +SKIP
        >>> images.shape, targets.shape  # doctest: +SKIP
        ((10000, 32, 32, 3), (10000, 10))
    """

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    class_names: tuple[str, ...]


def cifar10(n: int | None = None, *, seed: int = 0) -> Cifar10:
    """The CIFAR-10 photographs, 32 × 32 pixels in three colours and 10 classes.

    The 50,000 images that are not for testing are put in an order drawn from the seed. The last
    fifth is for validation and the first `n` are for training, so smaller training sets are part of
    larger ones. Each colour is shifted and scaled to mean 0 and variance 1 over all images that are
    not for validation or testing, whatever `n` is.

    The binary files data_batch_1.bin to data_batch_5.bin and test_batch.bin, which may be gzipped,
    are looked for in the folder `cifar-10-batches-bin` inside the folder that the environment
    variable VARPROX_DATA names, then inside the user's cache. A folder that holds the test batch
    and at least one of the others is taken, with as many images as there are. If there is none, the
    archive (about 170 MB) is downloaded and the six files are unpacked into the cache.

    Arguments:
        n: The number of training images; None, the default, means all that are not for validation,
            40,000 of the published files.
        seed: An integer ≥ 0, which fixes the order.

    Returns:
        A `Cifar10`, its images and targets in JAX's default float dtype.

    Raises:
        TypeError: If `n` or `seed` is not an integer.
        ValueError: If `n` is below 1 or above the number of images that are not for validation,
            `seed` is below 0, or a file does not hold the data.
        ImportError: If pooch, which downloads, is missing.
        NotADirectoryError: If VARPROX_DATA names no folder.
        OSError: If the download fails.

    Example:
        >>> import varprox as vp
        >>> vp.datasets.cifar10(1000).train[0].shape  # doctest: +SKIP
        (1000, 32, 32, 3)
    """
    n = None if n is None else check_integer("n", n, least=1)
    rng = np.random.default_rng(check_integer("seed", seed, least=0))
    folder = find_folder(FOLDER, (*TRAIN, TEST), URL, HASH, holds=_holds_enough)
    parts = [read_batch(path) for name in TRAIN for path in _paths(folder, name)]
    planes, labels = map(np.concatenate, zip(*parts, strict=True))
    order = rng.permutation(len(labels))
    most = len(order) - len(order) // VALIDATION
    if n is not None and n > most:
        raise ValueError(f"n: expected an integer of at most {most}, got {n}")
    levels = _levels(planes[order[:most]])

    def samples(planes, labels):
        images = np.stack([levels[k][planes[:, k]] for k in range(3)], axis=-1)
        return images.reshape(-1, SIDE, SIDE, 3), one_hot(labels, len(CLASS_NAMES))

    return Cifar10(
        train=samples(planes[order[:most][:n]], labels[order[:most][:n]]),
        validation=samples(planes[order[most:]], labels[order[most:]]),
        test=samples(*read_batch(_paths(folder, TEST)[0])),
        class_names=CLASS_NAMES,
    )


def _paths(folder: Path, name: str) -> list[Path]:
    """Where the file `name` lies in the folder, plain or else gzipped: one path, or none."""
    return [path for end in ("", ".gz") if (path := folder / f"{name}{end}").is_file()][:1]


def _holds_enough(folder: Path) -> bool:
    return bool(_paths(folder, TEST)) and any(_paths(folder, name) for name in TRAIN)


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The colour planes (n, 3, 1024) and the labels (n,) in a binary file, gzipped or not, as
    bytes; ValueError for any other."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path.name}: expected a gzipped file ({error})") from error
    if not content or len(content) % RECORD:
        raise ValueError(
            f"{path.name}: expected records of {RECORD} bytes, got {len(content)} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    labels = records[:, 0]
    if labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"{path.name}: expected labels from 0 to 9, got {labels.max()}")
    return records[:, 1:].reshape(-1, 3, SIDE**2), labels


def _levels(planes: np.ndarray) -> np.ndarray:
    """What each of the 256 levels of a colour becomes, (3, 256): such that these planes have mean 0
    and variance 1. A table takes the place of arithmetic on all pixels in double precision."""
    level = np.arange(256)
    rows = []
    for k in range(3):
        counts = np.bincount(planes[:, k].ravel(), minlength=256)
        centred = level - np.average(level, weights=counts)
        rows.append(centred / np.sqrt(np.average(centred**2, weights=counts)))
    return np.array(rows, float_dtype())
