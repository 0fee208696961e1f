"""The data sets: what is drawn, how it is split and scaled, and where files come from."""

import hashlib
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest

from varprox import datasets
from varprox.datasets import _cache

CLASS_SIZES = [46, 1428, 830, 237, 483, 730, 28, 478, 20, 972, 2455, 593, 205, 1265, 386, 93]
SETS = ["train", "validation", "test", "foreground"]
USER_CACHE = _cache._user_cache


@pytest.fixture(scope="module", autouse=True)
def isolated(tmp_path_factory):
    """Hides the files of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VARPROX_DATA", raising=False)
        empty = tmp_path_factory.mktemp("empty")
        patch.setattr(_cache, "_user_cache", lambda: empty)
        yield


@pytest.fixture(scope="module")
def tensorly(isolated):
    """The package that brings a copy of Indian Pines."""
    return pytest.importorskip("tensorly.datasets")


# What every data set promises


@pytest.fixture(params=["peaks", "ellipse", "indian_pines"])
def loader(request):
    """A function of the seed."""
    if request.param == "indian_pines":
        request.getfixturevalue("tensorly")
    return getattr(datasets, request.param)


def arrays(dataset):
    return [array for array in jax.tree.leaves(dataset) if isinstance(array, np.ndarray)]


def test_one_seed_gives_one_data_set_and_another_seed_another(loader):
    first, again, other = loader(seed=3), loader(seed=3), loader(seed=4)
    for a, b in zip(arrays(first), arrays(again), strict=True):
        np.testing.assert_array_equal(a, b)
    for split in first._fields[:2]:
        assert not np.array_equal(getattr(first, split)[0], getattr(other, split)[0])


def test_arrays_are_float32_by_default(loader):
    assert {a.dtype for pair in loader(seed=0)[:2] for a in pair} == {np.dtype(np.float32)}


def test_arrays_are_float64_under_x64_and_otherwise_the_same(loader, request):
    single = loader(seed=0)
    request.getfixturevalue("x64")
    double = loader(seed=0)
    assert {a.dtype for pair in double[:2] for a in pair} == {np.dtype(np.float64)}
    # A target of `peaks` is that of the rounded input, and no slope of peaks exceeds 30.
    for a, b in zip(arrays(single), arrays(double), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=3e-5)


@pytest.mark.parametrize("seed", [-1, np.int64(-5)])
def test_a_negative_seed_is_refused(loader, seed):
    with pytest.raises(ValueError, match=rf"^seed: expected an integer of at least 0, got {seed}$"):
        loader(seed=seed)


@pytest.mark.parametrize("seed", [1.0, None, True, "0"])
def test_a_seed_that_is_no_integer_is_refused(loader, seed):
    with pytest.raises(TypeError, match=rf"^seed: expected an integer, got {seed!r}$"):
        loader(seed=seed)


# Peaks and the ellipse


@pytest.mark.parametrize("name", ["n", "n_validation"])
@pytest.mark.parametrize("generate", [datasets.peaks, datasets.ellipse])
def test_sizes_that_are_no_positive_integers_are_refused(generate, name):
    for size in [0, -3]:
        message = rf"^{name}: expected an integer of at least 1, got {size}$"
        with pytest.raises(ValueError, match=message):
            generate(**{name: size})
    for size in [2.0, "7", False]:
        with pytest.raises(TypeError, match=rf"^{name}: expected an integer, got {size!r}$"):
            generate(**{name: size})


@pytest.mark.parametrize("generate, outputs", [(datasets.peaks, 1), (datasets.ellipse, 2)])
def test_the_sizes_are_those_asked_for_and_the_sets_differ(generate, outputs):
    train, validation = generate(np.int32(7), 5)
    assert [a.shape for a in train] == [(7, 2), (7, outputs)]
    assert [a.shape for a in validation] == [(5, 2), (5, outputs)]
    assert len(np.unique(np.concatenate([train[0], validation[0]]), axis=0)) == 12
    np.testing.assert_array_equal(train[0], generate(7, 50).train[0])


def test_peaks_function_matches_the_formula_at_hand_computed_points():
    e = np.exp(1.0)
    by_hand = {
        (0, 0): 3 / e - 1 / (3 * e),
        (1, 0): 8 / e - 1 / (3 * e**4),
        (-1, 0): 12 / e**2 - 8 / e - 1 / 3,
        (0, 1): 3 / e**4 + 10 / e - 1 / (3 * e**2),
        (0, -1): 3 - 10 / e - 1 / (3 * e**2),
        (1, 1): 18 / e**2 - 1 / (3 * e**5),
    }
    assert by_hand[0, 0] == pytest.approx(0.9810118431238462, rel=1e-15)
    values = datasets.peaks_function(np.array(list(by_hand), float))
    assert values.shape == (6, 1)
    np.testing.assert_allclose(values[:, 0], list(by_hand.values()), rtol=1e-14)


def test_peaks_function_keeps_shape_and_dtype():
    values = datasets.peaks_function(np.zeros((4, 5, 2), np.float32))
    assert values.shape == (4, 5, 1)
    assert values.dtype == np.float32


def test_peaks_targets_are_the_function_of_the_inputs_rounded_once():
    for inputs, targets in datasets.peaks():
        exact = datasets.peaks_function(inputs.astype(np.float64))
        np.testing.assert_array_equal(targets, exact.astype(np.float32))


def test_peaks_inputs_are_uniform_on_the_square():
    inputs, _ = datasets.peaks(n=20_000).train
    assert np.abs(inputs).max() <= 3
    cells = np.histogram2d(*inputs.T, bins=4, range=[(-3, 3)] * 2)[0]
    # Each cell is binomial with mean 1250 and standard deviation 34.
    assert np.abs(cells - 1250).max() < 5 * 34


def test_ellipse_targets_say_on_which_side_of_the_ellipse_a_point_lies():
    for inputs, targets in datasets.ellipse():
        x, y = inputs.astype(np.float64).T
        radius = np.sqrt(x**2 + (y / 0.4) ** 2)
        np.testing.assert_array_equal(targets[:, 0] == 1, radius < 1)
        np.testing.assert_array_equal(targets.sum(axis=1), 1)
        assert set(np.unique(targets)) == {0, 1}
        assert radius.max() < 2


def test_ellipse_points_have_uniform_radii_and_angles():
    inputs, _ = datasets.ellipse(n=20_000).train
    circle = inputs / np.array([1, 0.4], np.float32)
    radii = np.histogram(np.linalg.norm(circle, axis=1), bins=4, range=(0, 2))[0]
    angles = np.histogram(np.arctan2(circle[:, 1], circle[:, 0]), bins=4, range=(-np.pi, np.pi))[0]
    # Each bin is binomial with mean 5000 and standard deviation at most 61.
    assert np.abs(np.stack([radii, angles]) - 5000).max() < 5 * 61


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_ellipse_classes_have_half_the_points_each(n):
    _, targets = datasets.ellipse(n=n).train
    assert targets.sum(axis=0).tolist() == [(n + 1) // 2, n // 2]


def test_ellipse_classes_come_in_random_order():
    _, targets = datasets.ellipse(n=1000).train
    alike = np.count_nonzero(targets[1:, 0] == targets[:-1, 0])
    # About binomial with mean 499 and standard deviation 16; blocks give 998, alternation 0.
    assert abs(alike - 499) < 5 * 16


# Indian Pines


@pytest.fixture(scope="module")
def pines(tensorly):
    return datasets.indian_pines()


def test_indian_pines_labels_are_those_of_the_published_image(pines):
    assert pines.labels.shape == (145, 145)
    assert np.bincount(pines.labels.ravel()).tolist() == [145 * 145 - 10_249, *CLASS_SIZES]
    assert len(set(pines.class_names)) == 16


def test_indian_pines_sets_cover_the_foreground_without_overlap(pines):
    pixels = np.concatenate([pines.pixels.train, pines.pixels.validation, pines.pixels.test])
    np.testing.assert_array_equal(np.sort(pixels), pines.pixels.foreground)
    np.testing.assert_array_equal(pines.pixels.foreground, np.flatnonzero(pines.labels))
    assert [len(getattr(pines.pixels, name)) for name in SETS] == [4000, 5249, 1000, 10_249]


def test_indian_pines_samples_are_those_of_their_pixels(pines):
    everywhere = np.full((145 * 145, 200), np.nan, np.float32)
    everywhere[pines.pixels.foreground] = pines.foreground[0]
    for name in SETS:
        inputs, targets = getattr(pines, name)
        at = getattr(pines.pixels, name)
        np.testing.assert_array_equal(inputs, everywhere[at])
        np.testing.assert_array_equal(targets, np.eye(17)[pines.labels.ravel()[at], 1:])


def test_indian_pines_candidates_are_shared_evenly_among_the_classes_that_can_give(pines):
    tested = pines.test[1].sum(axis=0).astype(int)
    candidates = tested + pines.train[1].sum(axis=0).astype(int)
    spare = np.array(CLASS_SIZES) - 10
    assert candidates.sum() == 5000
    assert (candidates <= spare).all()
    # Even means: one number of pixels, give or take one, from each class that is not exhausted,
    # and no more from those that are.
    exhausted = candidates == spare
    even = candidates[~exhausted]
    assert even.max() - even.min() <= 1
    assert candidates[exhausted].max() <= even.min()


def test_indian_pines_tests_a_fifth_of_each_class(pines):
    tested = pines.test[1].sum(axis=0)
    candidates = tested + pines.train[1].sum(axis=0)
    assert np.abs(tested - candidates / 5).max() < 1


@pytest.mark.parametrize("name", SETS[:3])
def test_indian_pines_sets_are_in_random_order(pines, name):
    at = getattr(pines.pixels, name)
    labels = pines.labels.ravel()[at]
    for order in [at, labels]:  # neither row by row nor class by class
        assert abs(np.corrcoef(order, np.arange(len(at)))[0, 1]) < 5 / np.sqrt(len(at))


def test_indian_pines_band_statistics_are_those_of_the_training_pixels(pines):
    inputs = pines.train[0].astype(np.float64)
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(inputs.var(axis=0), 1, rtol=1e-5)
    # The other pixels had no say, so that their statistics are close, not equal.
    assert 1e-3 < np.abs(pines.test[0].mean(axis=0)).max() < 1


def test_indian_pines_normalisations_are_affine_in_the_raw_image(tensorly, pines, x64):
    raw = tensorly.load_indian_pines().tensor.reshape(-1, 200)[pines.pixels.foreground]
    by_band = datasets.indian_pines().foreground[0]
    by_spectrum = datasets.indian_pines(normalise="spectrum").foreground[0]
    # Correlation 1 with the raw numbers, band by band and spectrum by spectrum.
    for axis, inputs in [(0, by_band), (1, by_spectrum)]:
        standard = (raw - raw.mean(axis, keepdims=True)) / raw.std(axis, keepdims=True)
        centred = inputs - inputs.mean(axis, keepdims=True)
        np.testing.assert_allclose(centred / centred.std(axis, keepdims=True), standard, atol=1e-10)


def test_indian_pines_spectrum_statistics_are_those_of_each_pixel(tensorly):
    inputs = datasets.indian_pines(normalise="spectrum").foreground[0].astype(np.float64)
    np.testing.assert_allclose(inputs.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(inputs.var(axis=1), 1, rtol=1e-5)


def test_indian_pines_normalisation_does_not_change_the_split(pines):
    other = datasets.indian_pines(normalise="spectrum")
    for a, b in zip(pines.pixels, other.pixels, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_map_drawn_from_the_targets_is_the_labels_image(pines):
    image = np.zeros_like(pines.labels)
    image.flat[pines.pixels.foreground] = 1 + pines.foreground[1].argmax(axis=1)
    np.testing.assert_array_equal(image, pines.labels)


@pytest.mark.parametrize("normalise", ["bands", "", None])
def test_indian_pines_refuses_an_unknown_normalisation(normalise):
    message = rf'^normalise: expected "band" or "spectrum", got {normalise!r}$'
    with pytest.raises(ValueError, match=message):
        datasets.indian_pines(normalise=normalise)


@pytest.fixture
def mat_files(tensorly, tmp_path, monkeypatch):
    """The two files as published, in the folder that VARPROX_DATA names."""
    from scipy.io import savemat

    bunch = tensorly.load_indian_pines()
    image = bunch.tensor.astype(np.uint16)
    savemat(tmp_path / "Indian_pines_corrected.mat", {"indian_pines_corrected": image})
    savemat(tmp_path / "Indian_pines_gt.mat", {"indian_pines_gt": bunch.ticks[0]})
    monkeypatch.setenv("VARPROX_DATA", str(tmp_path))
    return tmp_path


def test_indian_pines_reads_the_published_files(pines, mat_files, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorly", None)
    for a, b in zip(arrays(datasets.indian_pines()), arrays(pines), strict=True):
        np.testing.assert_array_equal(a, b)


def test_indian_pines_refuses_files_that_do_not_hold_the_image(mat_files):
    from scipy.io import loadmat, savemat

    path = mat_files / "Indian_pines_gt.mat"
    labels = loadmat(path)["indian_pines_gt"]
    expected = r"gt.mat: expected the array indian_pines_gt of shape \(145, 145\) as published"

    def refused(found):
        return pytest.raises(ValueError, match=f"{expected}, got {found}.*; delete the file")

    savemat(path, {"indian_pines_gt": labels[:144]})
    with refused(r"shape \(144, 145\)"):
        datasets.indian_pines()
    savemat(path, {"indian_pines_gt": labels[::-1]})
    with refused("other values"):
        datasets.indian_pines()
    savemat(path, {"something": labels})
    with refused("a file that cannot be read: KeyError"):
        datasets.indian_pines()
    path.write_text("<html>Not found</html>" * 20)
    with refused("a file that cannot be read: ValueError"):
        datasets.indian_pines()


# Where files come from


CONTENT = b"the file on the server"
CHECKSUM = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty folders: the user's ($VARPROX_DATA), the cache, an installed package's."""
    pytest.importorskip("pooch")
    folders = {name: tmp_path / name for name in ["user", "cache", "package"]}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setenv("VARPROX_DATA", str(folders["user"]))
    monkeypatch.setattr(_cache, "_user_cache", lambda: folders["cache"])
    return folders


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a folder with one file, served on the loopback interface."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "file.bin").write_bytes(CONTENT)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_files_of_the_user_go_before_the_cache_a_package_and_a_download(places, server):
    def find():
        url = f"{server}/file.bin"
        installed = places["package"] / "file.bin"
        return _cache.find_file("file.bin", url, CHECKSUM, installed=installed)

    downloaded = find()
    assert downloaded == places["cache"] / "file.bin"
    assert downloaded.read_bytes() == CONTENT
    downloaded.unlink()
    for name in ["package", "cache", "user"]:  # each one goes before those that came earlier
        (places[name] / "file.bin").write_text(name)
        assert find() == places[name] / "file.bin"


def test_a_name_may_begin_with_folders(places, server):
    found = _cache.find_file("folder/file.bin", f"{server}/file.bin", CHECKSUM)
    assert found == places["cache"] / "folder" / "file.bin"
    (places["user"] / "folder").mkdir()
    (places["user"] / "folder" / "file.bin").write_bytes(b"the user's own")
    assert _cache.find_file("folder/file.bin", server, CHECKSUM).parent.parent == places["user"]


def test_a_file_in_the_cache_is_not_downloaded_again(places, server):
    first = _cache.find_file("file.bin", f"{server}/file.bin", CHECKSUM)
    assert _cache.find_file("file.bin", "http://127.0.0.1:1/gone", CHECKSUM) == first


def test_without_varprox_data_the_cache_comes_first(places, monkeypatch):
    monkeypatch.setenv("VARPROX_DATA", "")
    (places["cache"] / "file.bin").touch()
    assert _cache.find_file("file.bin", "unused", CHECKSUM) == places["cache"] / "file.bin"


def test_indian_pines_is_downloaded_where_it_lies_nowhere(
    pines, mat_files, places, server, tmp_path, monkeypatch
):
    monkeypatch.setattr(import_module("varprox.datasets.indian_pines"), "_SERVER", server)
    monkeypatch.setitem(sys.modules, "tensorly", None)
    for name in ["6/67/Indian_pines_corrected.mat", "c/c4/Indian_pines_gt.mat"]:
        served = tmp_path / "server" / name
        served.parent.mkdir(parents=True)
        (mat_files / served.name).rename(served)
    for a, b in zip(arrays(datasets.indian_pines()), arrays(pines), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(list(places["cache"].iterdir())) == 2


def test_a_download_with_a_wrong_checksum_is_refused_and_discarded(places, server):
    with pytest.raises(ValueError, match="does not match the known hash"):
        _cache.find_file("file.bin", f"{server}/file.bin", "sha256:" + "0" * 64)
    assert list(places["cache"].iterdir()) == []


def test_a_failed_download_says_how_to_go_on(places, server):
    message = r"^file.bin: could not be downloaded from .*/missing .*VARPROX_DATA$"
    with pytest.raises(OSError, match=message):
        _cache.find_file("file.bin", f"{server}/missing", CHECKSUM)


def test_the_cache_is_the_users_own():
    pooch = pytest.importorskip("pooch")
    assert Path(pooch.os_cache("varprox")) == USER_CACHE()


def test_a_varprox_data_that_is_no_folder_is_refused(monkeypatch):
    monkeypatch.setenv("VARPROX_DATA", "no such folder")
    message = "^VARPROX_DATA: expected a folder, got 'no such folder'$"
    with pytest.raises(NotADirectoryError, match=message):
        datasets.indian_pines()


def test_without_optional_packages_a_download_names_the_extra_to_install(monkeypatch):
    monkeypatch.setattr(_cache, "_user_cache", USER_CACHE)
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.setitem(sys.modules, "tensorly", None)
    message = r"^downloading Indian_.*.mat needs pooch: pip install 'varprox-jax\[data\]'$"
    with pytest.raises(ImportError, match=message):
        datasets.indian_pines()


def test_generated_data_sets_need_no_optional_package():
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['tensorly', 'pooch', 'matplotlib']));"
        "from varprox import datasets; datasets.peaks(); datasets.ellipse()"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
