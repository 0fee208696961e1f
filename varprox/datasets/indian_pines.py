"""Indian Pines: a hyperspectral image of farmland, each pixel to be classified by its spectrum.

The image: M. F. Baumgardner, L. L. Biehl, D. A. Landgrebe, 220 Band AVIRIS Hyperspectral Image Data
Set: June 12, 1992 Indian Pine Test Site 3, Purdue University Research Repository,
doi:10.4231/R7RX991C (CC BY 3.0), without its 20 bands of water absorption.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from varprox.datasets._cache import check_integer, find_file, float_dtype, one_hot

CLASS_NAMES = (
    "Alfalfa",
    "Corn-notill",
    "Corn-mintill",
    "Corn",
    "Grass-pasture",
    "Grass-trees",
    "Grass-pasture-mowed",
    "Hay-windrowed",
    "Oats",
    "Soybean-notill",
    "Soybean-mintill",
    "Soybean-clean",
    "Wheat",
    "Woods",
    "Buildings-Grass-Trees-Drives",
    "Stone-Steel-Towers",
)
CANDIDATES = 5000  # pixels drawn for training and testing
HELD_BACK = 10  # pixels of every class that stay in the validation set, at least
TEST_EVERY = 5  # of the candidates, every fifth is for testing


class Pixels(NamedTuple):
    """Where the samples of Indian Pines lie in the image.

    The entries are indices into the flattened `labels` of `IndianPines`.

    Attributes:
        train: Indices (4000,) of the training pixels.
        validation: Indices (5249,) of the validation pixels.
        test: Indices (1000,) of the test pixels.
        foreground: Indices (10249,) of all labelled pixels, in image order.

    Example:
        >>> import varprox as vp
        >>> data = vp.datasets.indian_pines()
        >>> classes = data.labels.ravel()[data.pixels.train]  # 1 … 16
        >>> bool((classes - 1 == data.train[1].argmax(axis=1)).all())
        True
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    foreground: np.ndarray


class IndianPines(NamedTuple):
    """The Indian Pines image and its split.

    Attributes:
        train: The pair (inputs (4000, 200), one-hot targets (4000, 16)) to train on.
        validation: Such a pair, (5249, 200) and (5249, 16), to validate on.
        test: Such a pair, (1000, 200) and (1000, 16), to test on.
        foreground: All three sets in image order, (10249, 200) and (10249, 16).
        labels: The image of labels, (145, 145) int32: 0 for background, 1 … 16 for the classes.
        pixels: Where the samples of each set lie in the image, a `Pixels`.
        class_names: The names of the 16 classes. ``class_names[k]`` belongs to column k of the
            targets and to label k + 1.

    Example:
        >>> import varprox as vp
        >>> data = vp.datasets.indian_pines()
        >>> data.labels.shape, data.class_names[0]
        ((145, 145), 'Alfalfa')
    """

    train: tuple[np.ndarray, np.ndarray]  # inputs (4000, 200), one-hot targets (4000, 16)
    validation: tuple[np.ndarray, np.ndarray]  # (5249, 200), (5249, 16)
    test: tuple[np.ndarray, np.ndarray]  # (1000, 200), (1000, 16)
    foreground: tuple[np.ndarray, np.ndarray]  # all three in image order: (10249, 200), (10249, 16)
    labels: np.ndarray  # (145, 145) int32, 0 for background, 1 … 16 for the classes
    pixels: Pixels  # where the samples of each set lie
    class_names: tuple[str, ...]  # 16; class_names[k] is column k of the targets and label k + 1


def indian_pines(*, normalise: str = "band", seed: int = 0) -> IndianPines:
    """The 10,249 labelled pixels of Indian Pines, 200 bands and 16 classes, with the papers' split.

    5000 pixels drawn at random are candidates for training and testing. Every class gives the same
    number, but 10 pixels of each class are always left; what small classes cannot give is shared
    evenly among the others. Class by class, every fifth candidate is for testing (1000) and the
    others are for training (4000). The rest of the labelled image is for validation (5249). Each
    set is in random order.

    The files Indian_pines_corrected.mat and Indian_pines_gt.mat are looked for in the folder that
    the environment variable VARPROX_DATA names and in the user's cache. If they are in neither, the
    copy in the package tensorly is used; if tensorly is not installed, the files are downloaded.

    Arguments:
        normalise: "band", the default, shifts and scales each band to mean 0 and variance 1 over
            the training pixels. "spectrum" shifts each pixel's spectrum by its mean over the bands
            and divides it by its standard deviation over the bands, as the papers do. Variances are
            sums divided by the number of values, not by one less.
        seed: An integer ≥ 0, which fixes the split.

    Returns:
        An `IndianPines`, its inputs and targets in JAX's default float dtype.

    Raises:
        TypeError: If `seed` is not an integer.
        ValueError: If `normalise` is another one, `seed` is below 0, or a file does not hold the
            image.
        ImportError: If pooch, which downloads, is missing.
        NotADirectoryError: If VARPROX_DATA names no folder.
        OSError: If the download fails.

    Example:
        >>> import numpy as np
        >>> import varprox as vp
        >>> data = vp.datasets.indian_pines()
        >>> inputs, targets = data.foreground  # in image order, for a map
        >>> image = np.zeros_like(data.labels)
        >>> image.flat[data.pixels.foreground] = 1 + targets.argmax(axis=1)  # or predictions
        >>> bool((image == data.labels).all())
        True

    Source:
        Newman, Ruthotto, Hart, van Bloemen Waanders, arXiv:2007.13171. Their published script takes
        at most ⌊5000 / 16⌋ = 312 candidates from a class, hence 3689 in all instead of 5000, and
        reads the image with all 220 bands.
    """
    if normalise not in ("band", "spectrum"):
        raise ValueError(f'normalise: expected "band" or "spectrum", got {normalise!r}')
    rng = np.random.default_rng(check_integer("seed", seed, least=0))

    spectra, labels = _read(_IMAGE), _read(_LABELS)
    spectra, classes = spectra.reshape(labels.size, -1), labels.ravel()
    pixels = _split(classes, rng)

    if normalise == "band":
        seen = spectra[pixels.train]
        inputs = (spectra - seen.mean(axis=0)) / seen.std(axis=0)
    else:
        centred = spectra - spectra.mean(axis=1, keepdims=True)
        inputs = centred / spectra.std(axis=1, keepdims=True)
    inputs = inputs.astype(float_dtype())

    def samples(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return inputs[at], one_hot(classes[at] - 1, len(CLASS_NAMES))

    return IndianPines(
        train=samples(pixels.train),
        validation=samples(pixels.validation),
        test=samples(pixels.test),
        foreground=samples(pixels.foreground),
        labels=labels.astype(np.int32),
        pixels=pixels,
        class_names=CLASS_NAMES,
    )


def _split(classes: np.ndarray, rng: np.random.Generator) -> Pixels:
    """Draws the sets from the classes (pixels,), where 0 is background."""
    members = [rng.permutation(np.flatnonzero(classes == k)) for k in range(1, classes.max() + 1)]
    counts = _shares([len(m) - HELD_BACK for m in members], CANDIDATES)
    drawn = np.concatenate([m[:count] for m, count in zip(members, counts, strict=True)])
    others = np.concatenate([m[count:] for m, count in zip(members, counts, strict=True)])
    # The pixels drawn lie class by class, so that every fifth of them is a fifth of each class.
    testing = np.arange(CANDIDATES) % TEST_EVERY == TEST_EVERY - 1
    return Pixels(
        train=rng.permutation(drawn[~testing]),
        validation=rng.permutation(others),
        test=rng.permutation(drawn[testing]),
        foreground=np.flatnonzero(classes),
    )


def _shares(limits: list[int], total: int) -> np.ndarray:
    """Parts of `total`, as equal as their limits allow; an odd one goes to the largest limits."""
    shares = np.zeros(len(limits), int)
    # From the smallest limit up, so that whatever one cannot take is shared among those to come.
    for rank, k in enumerate(np.argsort(limits, kind="stable")):
        shares[k] = min(limits[k], (total - shares.sum()) // (len(limits) - rank))
    return shares


class _File(NamedTuple):
    """One of the two files, and how to tell that it holds what it should.

    The published .mat files come without checksums, so what is compared is the array they hold,
    which is the same whatever file it was read from.
    """

    name: str
    folder: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str  # of the array in C order, with that dtype


_SERVER = "https://www.ehu.eus/ccwintco/uploads"
_IMAGE = _File(
    name="Indian_pines_corrected",
    folder="6/67",
    shape=(145, 145, 200),
    dtype="<u2",
    sha256="36468dd7336c8bd37a80cced54362ea426f226703f3797ba494556fd8134e77f",
)
_LABELS = _File(
    name="Indian_pines_gt",
    folder="c/c4",
    shape=(145, 145),
    dtype="|u1",
    sha256="ebf20cfe0bce98f01885f0ab4fd1857925db3ef0a1f1624bbee3ffcb92425103",
)


def _read(file: _File) -> np.ndarray:
    """The array that `file` holds, wherever it lies."""
    path = find_file(
        f"{file.name}.mat",
        f"{_SERVER}/{file.folder}/{file.name}.mat",
        known_hash=None,
        installed=_in_tensorly(f"{file.name}.npy"),
    )
    try:
        array = np.load(path) if path.suffix == ".npy" else _load_mat(path)[file.name.lower()]
    except Exception as error:  # the readers promise no type for a damaged file
        raise _wrong(path, file, f"a file that cannot be read: {error!r}") from error
    if array.shape != file.shape:
        raise _wrong(path, file, f"shape {array.shape}")
    array = np.ascontiguousarray(array, dtype=file.dtype)
    if hashlib.sha256(array.tobytes()).hexdigest() != file.sha256:
        raise _wrong(path, file, "other values")
    return array


def _load_mat(path: Path) -> dict[str, np.ndarray]:
    from scipy.io import loadmat  # here, because it is slow to import and few need it

    return loadmat(path)


def _in_tensorly(name: str) -> Path | None:
    """Where the package tensorly keeps its copy; None where it is not installed."""
    spec = importlib.util.find_spec("tensorly")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "datasets" / "data" / name


def _wrong(path: Path, file: _File, found: str) -> ValueError:
    return ValueError(
        f"{path}: expected the array {file.name.lower()} of shape {file.shape} as published, "
        f"got {found}; delete the file to have it fetched again"
    )
