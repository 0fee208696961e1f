"""What the data sets share: their form, their dtype, their checks, and where files are found."""

import hashlib
import importlib
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


class Dataset(NamedTuple):
    """A data set for training and validation.

    Attributes:
        train: The pair (inputs (n, …), targets (n, …)) to train on.
        validation: Such a pair to validate on.

    Example:
        >>> import varprox as vp
        >>> data = vp.datasets.peaks(100, n_validation=20)
        >>> inputs, targets = data.validation
        >>> inputs.shape, targets.shape
        ((20, 2), (20, 1))
    """

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]


def float_dtype() -> np.dtype:
    """jax's default float dtype: float32, or float64 where x64 is enabled."""
    return jax.dtypes.canonicalize_dtype(float)


def one_hot(classes: np.ndarray, count: int) -> np.ndarray:
    """Class numbers 0 … count − 1, (n,), as rows of the identity, (n, count)."""
    return np.eye(count, dtype=float_dtype())[classes]


def check_integer(name: str, value, *, least: int) -> int:
    """`value` as an int; TypeError where it is no integer, ValueError where it is below `least`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")
    return int(value)


def find_file(
    name: str, url: str, known_hash: str | None, *, installed: Path | None = None
) -> Path:
    """Where the file `name` lies on this machine, after downloading it if need be.

    `name` may begin with folders. Looks in the folder that the environment variable VARPROX_DATA
    names, in the user's cache, at `installed` (a copy that some package brings), and then downloads
    `url` into the cache. A download whose hash is not `known_hash` ("sha256:…" or "md5:…") is
    discarded; with None nothing is compared, and the caller checks what it reads. Files that are
    found are taken as they are.

    Raises NotADirectoryError where VARPROX_DATA names no folder, ImportError where pooch, which
    downloads, is missing, OSError where the download fails, ValueError where its hash is wrong.
    """
    cache = _user_cache()
    for path in (*_places(name), installed):
        if path is not None and path.is_file():
            return path

    pooch = _require("pooch", purpose=f"downloading {name}")
    assert cache is not None  # pooch knows it
    return _download(pooch, name, url, known_hash, cache / name)


def find_folder(
    name: str, members: Sequence[str], url: str, known_hash: str, *, holds: Callable[[Path], bool]
) -> Path:
    """Where a folder `name` that `holds` what is asked for lies, after downloading it if need be.

    Looks in the folder that the environment variable VARPROX_DATA names and in the user's cache,
    and then downloads the tar archive `url`. Its files `name`/<member> are written into the folder
    `name` of the cache, in the order of `members`. Nothing else is unpacked, and no name in the
    archive decides where a file is written.

    Raises what `find_file` raises, and ValueError where the archive does not hold a member.
    """
    for folder in _places(name):
        if holds(folder):
            return folder

    pooch = _require("pooch", purpose=f"downloading {name}")
    cache = _user_cache()
    assert cache is not None  # pooch knows it
    target = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    # Unpacked apart and moved, so that no run ever finds half a file.
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        archive = _download(pooch, name, url, known_hash, Path(scratch, "archive"))
        target.mkdir(exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in members:
                unpacked = Path(scratch, "member")
                with unpacked.open("wb") as file:
                    shutil.copyfileobj(_file_in(tar, f"{name}/{member}", url), file)
                unpacked.replace(target / member)
    return target


def _file_in(tar, path, url):
    """The plain file at `path` in the archive, to read from."""
    try:
        member = tar.getmember(path)
    except KeyError:
        member = None
    if member is None or not member.isfile():
        raise ValueError(f"{url}: expected an archive with a file {path}, got one without")
    return tar.extractfile(member)


def _download(pooch, name, url, known_hash, target) -> Path:
    try:
        return Path(pooch.retrieve(url, known_hash, fname=target.name, path=target.parent))
    except OSError as error:
        raise OSError(
            f"{name}: could not be downloaded from {url} ({error}); "
            f"put it by hand into a folder and name that folder in VARPROX_DATA"
        ) from error


def simulated(
    name: str, parameters: Mapping, simulate: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What `simulate()` returns, computed once and then read from disk.

    The file `name`-<hash of the parameters>.npz is looked for in the folder that the environment
    variable VARPROX_DATA names and in the user's cache, and written into the cache. It holds the
    arrays and, as JSON text under "parameters", all that they were made from: `parameters`, which
    must determine them.

    Raises NotADirectoryError where VARPROX_DATA names no folder, ValueError where a file of that
    name holds other parameters or is no such file.
    """
    text = json.dumps(dict(parameters), sort_keys=True)
    file = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.npz"
    places = _places(file)
    for path in places:
        if path.is_file():
            return _read_simulated(path, text)
    arrays = simulate()
    content: dict[str, Any] = arrays | {"parameters": np.array(text)}
    if _user_cache() is not None:
        target = places[-1]
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written apart and moved, so that no run ever finds half a file.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            written = Path(folder, target.name)
            np.savez_compressed(written, **content)
            written.replace(target)
    return arrays


def _read_simulated(path, text):
    try:
        with np.load(path) as content:
            arrays = dict(content)
        found = str(arrays.pop("parameters"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected simulated data ({error}); delete it") from error
    if found != text:
        raise ValueError(f"{path}: expected data made from {text}, got {found}; delete it")
    return arrays


def _places(name) -> list[Path]:
    """Where `name` may lie: in VARPROX_DATA, in the user's cache."""
    folder = os.environ.get("VARPROX_DATA")
    if folder and not Path(folder).is_dir():
        raise NotADirectoryError(f"VARPROX_DATA: expected a folder, got {folder!r}")
    folders = (folder, _user_cache())
    return [Path(place, name) for place in folders if place]


def _user_cache() -> Path | None:
    """The folder that downloads are kept in; None where pooch, which knows it, is missing."""
    try:
        return Path(importlib.import_module("pooch").os_cache("varprox"))
    except ImportError:
        return None


def _require(package: str, *, purpose: str):
    """The optional `package`; where it is missing, an ImportError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {package}: pip install 'varprox-jax[data]'") from error
