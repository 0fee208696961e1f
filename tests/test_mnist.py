"""MNIST: the split, the normalisation, and which files are refused."""

import gzip
import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from varprox import datasets
from varprox.datasets.mnist import read_idx

module = import_module("varprox.datasets.mnist")


def idx(array, magic=0x800):
    header = np.array([magic + array.ndim, *array.shape], ">u4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes(), 1)


@pytest.fixture(scope="module")
def files():
    folder = Path(os.environ.get("VARPROX_DATA", "."), "mnist")
    if not all((folder / name).is_file() for name in module.HASHES):
        pytest.skip("the files of MNIST are not in the folder that VARPROX_DATA names")
    return folder


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Files of the right shape with few different images: image i of either kind is all i % 251."""
    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("VARPROX_DATA", str(tmp_path))
    for kind, count in (("train", 60_000), ("t10k", 10_000)):
        grey = np.arange(count) % 251
        images = np.broadcast_to(grey[:, None, None], (count, 28, 28))
        (tmp_path / "mnist" / f"{kind}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (tmp_path / "mnist" / f"{kind}-labels-idx1-ubyte.gz").write_bytes(idx(grey % 10))
    return tmp_path / "mnist"


def raw(images):
    return np.round((images * module.SCALE + module.MEAN) * 255).astype(int)


def test_images_keep_their_labels_and_sets_do_not_overlap(small):
    data = datasets.mnist(1000, seed=3)
    for (images, labels), count in zip(data, (1000, 10_000, 10_000), strict=True):
        assert images.shape == (count, 28, 28, 1) and labels.shape == (count,)
        assert images.dtype == np.float32 and labels.dtype == np.int32
        grey = raw(images[:, 0, 0, 0])
        np.testing.assert_array_equal(grey % 10, labels)
    order = np.random.default_rng(3).permutation(60_000)
    np.testing.assert_array_equal(raw(data.train[0][:, 0, 0, 0]), order[:1000] % 251)
    np.testing.assert_array_equal(raw(data.validation[0][:, 5, 9, 0]), order[50_000:] % 251)
    np.testing.assert_array_equal(raw(data.test[0][:, 0, 0, 0]), np.arange(10_000) % 251)


def test_smaller_training_sets_are_part_of_larger_ones(files):
    small, large = datasets.mnist(128), datasets.mnist(512)
    np.testing.assert_array_equal(small.train[0], large.train[0][:128])
    np.testing.assert_array_equal(small.validation[1], large.validation[1])
    other = datasets.mnist(128, seed=1)
    assert (other.train[1] != small.train[1]).any()


def test_the_files_are_mnist(files, x64):
    """Mean and deviation of the published training set; its first test digit is a seven."""
    images, labels = read_idx(files / "train-images-idx3-ubyte.gz", (60_000, 28, 28)), None
    assert abs(images.mean() / 255 - 0.1307) < 1e-4 and abs(images.std() / 255 - 0.3081) < 1e-4
    data = datasets.mnist(128)
    assert data.train[0].dtype == np.float64
    images, labels = data.test
    assert list(labels[:5]) == [7, 2, 1, 0, 4]
    np.testing.assert_allclose(images.min(), -0.1307 / 0.3013)
    np.testing.assert_allclose(images.max(), (1 - 0.1307) / 0.3013)


REFUSED = {
    "another shape": (idx(np.zeros((3, 28, 28))), "expected shape (2, 28, 28), got (3, 28, 28)"),
    "another kind": (idx(np.zeros((2, 28, 28)), 0xD00), "expected an idx file of 3 axes of bytes"),
    "fewer axes": (idx(np.zeros(2)), "expected an idx file of 3 axes of bytes"),
    "cut short": (
        gzip.compress(gzip.decompress(idx(np.zeros((2, 28, 28))))[:-1]),
        "expected an idx",
    ),
    "empty": (gzip.compress(b""), "expected an idx file of 3 axes of bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_what_it_should_be_is_refused(name, tmp_path):
    content, message = REFUSED[name]
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_idx(path, (2, 28, 28))
    assert str(caught.value).startswith(f"images.gz: {message}")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"n": 0}, ValueError, "n: expected an integer of at least 1, got 0"),
        ({"n": 128.0}, TypeError, "n: expected an integer, got 128.0"),
        ({"n": 50_001}, ValueError, "n: expected an integer of at most 50000, got 50001"),
        ({"seed": -1}, ValueError, "seed: expected an integer of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message, small):
    with pytest.raises(error) as caught:
        datasets.mnist(**arguments)
    assert str(caught.value) == message
