"""CIFAR-10: the split, the normalisation, which files are refused, the download; the network; and
methods that see samples of the data."""

import gzip
import hashlib
import io
import os
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import correlate2d

import varprox as vp
from benchmarks import baselines, cifar10
from varprox import datasets, networks
from varprox.datasets import _cache

module = import_module("varprox.datasets.cifar10")
USER_CACHE = _cache._user_cache
COUNTS = dict(zip((*module.TRAIN, module.TEST), (13, 9, 11, 10, 7, 8), strict=True))


def records(count, seed):
    """Random photographs, (count, 3, 32, 32), and labels."""
    rng = np.random.default_rng(seed)
    planes = rng.integers(0, 256, (count, 3, 32, 32), np.uint8)
    return planes, rng.integers(0, 10, count).astype(np.uint8)


def batch(planes, labels):
    return b"".join(
        bytes([label]) + plane.tobytes() for plane, label in zip(planes, labels, strict=True)
    )


BATCHES = {name: records(count, seed) for seed, (name, count) in enumerate(COUNTS.items())}
CONTENTS = {name: batch(*content) for name, content in BATCHES.items()}
PLANES, LABELS = (
    np.concatenate(parts) for parts in zip(*(BATCHES[name] for name in module.TRAIN), strict=True)
)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty folders, the one that VARPROX_DATA names and the user's cache."""
    folders = tmp_path / "user", tmp_path / "cache"
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("VARPROX_DATA", str(folders[0]))
    monkeypatch.setattr(_cache, "_user_cache", lambda: folders[1])
    return folders


def fill(place, names=tuple(COUNTS), zipped=()):
    folder = place / module.FOLDER
    folder.mkdir(exist_ok=True)
    for name in names:
        if name in zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(CONTENTS[name], 1))
        else:
            (folder / name).write_bytes(CONTENTS[name])
    return folder


@pytest.fixture
def files(places):
    return fill(places[0])


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a[:3]), jax.tree.leaves(b[:3]), strict=True):
        np.testing.assert_array_equal(x, y)


# What is read


@pytest.fixture
def normalised():
    """Photographs as the formula has them, in float64, for images that are not validated on."""

    def of(planes, seen):
        pixels = seen.transpose(0, 2, 3, 1).reshape(-1, 3).astype(float)
        return (planes.transpose(0, 2, 3, 1) - pixels.mean(axis=0)) / pixels.std(axis=0)

    return of


def test_images_keep_their_labels_and_sets_do_not_overlap(files, normalised):
    data = datasets.cifar10(20, seed=3)
    order = np.random.default_rng(3).permutation(50)
    seen = PLANES[order[:40]]
    expected = {
        "train": (PLANES[order[:20]], LABELS[order[:20]]),
        "validation": (PLANES[order[40:]], LABELS[order[40:]]),
        "test": BATCHES[module.TEST],
    }
    for name, (planes, labels) in expected.items():
        images, targets = getattr(data, name)
        assert images.dtype == targets.dtype == np.float32
        np.testing.assert_allclose(images, normalised(planes, seen), atol=1e-6)
        np.testing.assert_array_equal(targets, np.eye(10)[labels])
    assert len(data.class_names) == 10


def test_colours_have_mean_zero_and_variance_one_over_all_that_may_be_trained_on(files, x64):
    images, _ = datasets.cifar10(seed=1).train
    assert images.shape == (40, 32, 32, 3) and images.dtype == np.float64
    np.testing.assert_allclose(images.mean(axis=(0, 1, 2)), 0, atol=1e-13)
    np.testing.assert_allclose(images.var(axis=(0, 1, 2)), 1, rtol=1e-13)


def test_smaller_training_sets_are_part_of_larger_ones(files):
    small, whole = datasets.cifar10(7), datasets.cifar10()
    assert len(whole.train[1]) == 40
    for part, all_of_it in zip(small.train, whole.train, strict=True):
        np.testing.assert_array_equal(part, all_of_it[:7])
    equal(small[1:], whole[1:])
    assert (datasets.cifar10(7, seed=1).train[0] != small.train[0]).any()


def test_gzipped_files_are_read_too(places):
    fill(places[0])
    plain = datasets.cifar10()
    for path in (places[0] / module.FOLDER).iterdir():
        path.unlink()
    fill(places[0], zipped=(module.TRAIN[1], module.TEST))
    equal(datasets.cifar10(), plain)


def test_as_many_batches_as_there_are_make_the_set(places):
    fill(places[0], [module.TRAIN[1], module.TRAIN[3], module.TEST])
    data = datasets.cifar10()
    assert [len(targets) for _, targets in data[:3]] == [16, 3, 8]
    with pytest.raises(ValueError, match=r"^n: expected an integer of at most 16, got 17$"):
        datasets.cifar10(17)


def test_the_users_folder_goes_before_the_cache_if_it_holds_enough(places):
    user, cache = places
    fill(cache)
    whole = datasets.cifar10()
    fill(user, module.TRAIN)  # nothing to test on
    equal(datasets.cifar10(), whole)
    fill(user, [module.TEST])
    for name in module.TRAIN[1:]:
        (user / module.FOLDER / name).unlink()
    assert len(datasets.cifar10().train[1]) == 13 - 2


def test_the_published_files_hold_photographs(x64):
    place = os.environ.get("VARPROX_DATA")
    if not place or not module._holds_enough(Path(place, module.FOLDER)):
        pytest.skip("the files of CIFAR-10 are not in the folder that VARPROX_DATA names")
    planes, labels = module.read_batch(*module._paths(Path(place, module.FOLDER), module.TEST))
    assert np.bincount(labels, minlength=10).min() > 0.08 * len(labels)
    images = planes.reshape(-1, 3, 32, 32) / 255
    # The published training set has these means. Neighbours in an image are alike.
    np.testing.assert_allclose(images.mean(axis=(0, 2, 3)), (0.491, 0.482, 0.447), atol=0.01)
    for axis in (2, 3):
        steps = np.diff(images, axis=axis)
        assert np.std(steps) < 0.5 * np.std(images)


# What is refused

WHOLE = CONTENTS[module.TEST]
REFUSED = {
    "cut short": (WHOLE[:-1], "expected records of 3073 bytes, got 24583 bytes"),
    "empty": (b"", "expected records of 3073 bytes, got 0 bytes"),
    "another label": (bytes([10]) + WHOLE[1:], "expected labels from 0 to 9, got 10"),
}
REFUSED_GZIPPED = {
    "cut short": (gzip.compress(WHOLE, 1)[:-20], "expected a gzipped file"),
    "not gzipped": (WHOLE, "expected a gzipped file"),
    "damaged": (
        gzip.compress(WHOLE, 1)[:200] + bytes(100) + gzip.compress(WHOLE, 1)[300:],
        "expected a gzipped file",
    ),
    "records cut short": (
        gzip.compress(WHOLE[:-1], 1),
        "expected records of 3073 bytes, got 24583 bytes",
    ),
}


@pytest.mark.parametrize(
    "end, content, message",
    [("", *case) for case in REFUSED.values()] + [(".gz", *c) for c in REFUSED_GZIPPED.values()],
    ids=[*REFUSED, *(f"gzipped, {name}" for name in REFUSED_GZIPPED)],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(end, content, message, files):
    name = f"{module.TEST}{end}"
    (files / module.TEST).unlink()
    (files / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        datasets.cifar10()
    assert str(caught.value).startswith(f"{name}: {message}")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"n": 0}, ValueError, "n: expected an integer of at least 1, got 0"),
        ({"n": 12.0}, TypeError, "n: expected an integer, got 12.0"),
        ({"n": 41}, ValueError, "n: expected an integer of at most 40, got 41"),
        ({"seed": -1}, ValueError, "seed: expected an integer of at least 0, got -1"),
        ({"seed": None}, TypeError, "seed: expected an integer, got None"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message, files):
    with pytest.raises(error) as caught:
        datasets.cifar10(**arguments)
    assert str(caught.value) == message


def test_a_varprox_data_that_is_no_folder_is_refused(monkeypatch):
    monkeypatch.setenv("VARPROX_DATA", "no such folder")
    with pytest.raises(NotADirectoryError, match=r"^VARPROX_DATA: expected a folder"):
        datasets.cifar10()


# Where files come from


@pytest.fixture
def serve(tmp_path, places, monkeypatch):
    """Serves an archive on the loopback interface, in the place of the published one."""
    pytest.importorskip("pooch")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "server"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def of(content, known_hash=None):
            (folder / "cifar.tar.gz").write_bytes(content)
            monkeypatch.setattr(module, "URL", f"http://127.0.0.1:{http.server_port}/cifar.tar.gz")
            monkeypatch.setattr(
                module, "HASH", known_hash or f"md5:{hashlib.md5(content).hexdigest()}"
            )

        yield of
        http.shutdown()
        thread.join()


def archive(contents, links=()):
    """A gzipped tar archive; `links` are pairs (name, target) of symbolic links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return buffer.getvalue()


MEMBERS = {f"{module.FOLDER}/{name}": content for name, content in CONTENTS.items()}


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_archive_is_downloaded_once_and_only_its_batches_are_unpacked(serve, places, tmp_path):
    user, cache = places
    strangers = {
        "../outside.txt": b"outside",
        str(tmp_path / "absolute.txt"): b"absolute",
        f"{module.FOLDER}/../../outside.txt": b"outside",
        f"{module.FOLDER}/readme.html": b"read me",
    }
    serve(archive(MEMBERS | strangers, [(f"{module.FOLDER}/link", str(tmp_path))]))
    before = tree(tmp_path)
    downloaded = datasets.cifar10()
    assert tree(tmp_path) - before == {f"cache/{name}" for name in MEMBERS}
    for name, content in MEMBERS.items():
        assert (cache / name).read_bytes() == content
    fill(user)
    equal(datasets.cifar10(), downloaded)

    serve(b"something else", "md5:" + "0" * 32)  # not asked for any more
    for name in COUNTS:
        (user / module.FOLDER / name).unlink()
    equal(datasets.cifar10(), downloaded)


def test_without_varprox_data_the_archive_is_downloaded_too(serve, places, monkeypatch):
    monkeypatch.delenv("VARPROX_DATA")
    serve(archive(MEMBERS))
    assert len(datasets.cifar10().train[1]) == 40


def test_a_download_with_a_wrong_checksum_is_refused_and_discarded(serve, places):
    serve(archive(MEMBERS), "md5:" + "0" * 32)
    with pytest.raises(ValueError, match="does not match the known hash"):
        datasets.cifar10()
    assert list(places[1].iterdir()) == []


LAST = f"{module.FOLDER}/{module.TEST}"


@pytest.mark.parametrize("links", [(), [(LAST, "data_batch_1.bin")]], ids=["missing", "a link"])
def test_an_archive_without_a_batch_is_refused(links, serve, places):
    serve(archive({name: MEMBERS[name] for name in MEMBERS if name != LAST}, links))
    with pytest.raises(
        ValueError, match=f"expected an archive with a file {LAST}, got one without"
    ):
        datasets.cifar10()
    with pytest.raises(ValueError):  # and what is there already is not taken for the whole
        datasets.cifar10()


def test_a_failed_download_says_how_to_go_on(serve, places, monkeypatch):
    serve(archive(MEMBERS))
    monkeypatch.setattr(module, "URL", module.URL + ".missing")
    message = r"^cifar-10-batches-bin: could not be downloaded from .*missing .*VARPROX_DATA$"
    with pytest.raises(OSError, match=message):
        datasets.cifar10()


def test_without_pooch_a_download_names_the_extra_to_install(places, monkeypatch):
    monkeypatch.setattr(_cache, "_user_cache", USER_CACHE)
    monkeypatch.setitem(sys.modules, "pooch", None)
    message = r"^downloading cifar-10-batches-bin needs pooch: pip install 'varprox-jax\[data\]'$"
    with pytest.raises(ImportError, match=message):
        datasets.cifar10()


# The network

CHANNELS = (2, 3, 4, 5)


def convolutional(**options):
    return networks.Convolutional(CHANNELS, **{"rngs": nnx.Rngs(0)} | options)


def formula(net, images):
    """The features in NumPy, one image and one channel at a time."""

    def convolved(layer, image):
        kernel, bias = np.asarray(layer.kernel), np.asarray(layer.bias)
        maps = [
            sum(
                correlate2d(image[..., i], kernel[..., i, o], "same")
                for i in range(image.shape[-1])
            )
            for o in range(kernel.shape[-1])
        ]
        return np.maximum(np.stack(maps, axis=-1) + bias, 0)

    def features(image):
        z = convolved(net.layers[0], image)[:8, :6]
        z = (z[::2, ::2] + z[1::2, ::2] + z[::2, 1::2] + z[1::2, 1::2]) / 4
        return convolved(net.layers[1], z).mean(axis=(0, 1))

    return np.stack([features(image) for image in images])


def randomised(net):
    rng = np.random.default_rng(1)
    weights = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    nnx.update(net, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), weights))
    return net


@pytest.mark.parametrize("taps", [3, 5])
def test_features_are_those_of_the_formula(taps, x64):
    net = randomised(convolutional(taps=taps))
    images = np.random.default_rng(2).normal(size=(2, 9, 7, 2))
    expected = formula(net, images)
    np.testing.assert_allclose(net.features(images), expected, rtol=1e-12, atol=1e-12)
    outputs = expected @ np.asarray(net.head.kernel) + np.asarray(net.head.bias)
    np.testing.assert_allclose(net(images), outputs, rtol=1e-12, atol=1e-12)


def test_kernels_start_as_those_of_he():
    net = networks.Convolutional((3, 32, 64, 10), rngs=nnx.Rngs(0))
    for layer in net.layers:
        kernel = np.asarray(layer.kernel)
        seen = kernel[..., 0].size
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / seen), rtol=0.05)
        np.testing.assert_array_equal(layer.bias, 0)
    sizes = [leaf.size for leaf in jax.tree.leaves(vp.nnx.split(net)[0])]
    assert sum(sizes) == 32 * (75 + 1) + 64 * (800 + 1)


def test_weights_are_of_the_default_float():
    def dtypes(**options):
        leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(convolutional(**options), nnx.Param)))
        return {str(leaf.dtype) for leaf in leaves}

    assert dtypes() == {"float32"}
    with jax.enable_x64(True):
        assert dtypes() == {"float64"}
        assert dtypes(param_dtype=jnp.float32) == {"float32"}


@pytest.mark.parametrize(
    "channels, taps, message",
    [
        ((3, 10), 5, r"channels: expected those of images, .* got \(3, 10\)"),
        ((3, 0, 10), 5, r"channels\[1\]: expected a positive integer, got 0"),
        ((3, 4, 10), 2.5, "taps: expected a positive integer, got 2.5"),
    ],
)
def test_the_network_refuses_sizes(channels, taps, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        networks.Convolutional(channels, taps=taps, rngs=nnx.Rngs(0))


# Sample by sample


def test_patches_give_the_same_network_and_derivatives(x64):
    net = randomised(convolutional())
    images = np.random.default_rng(2).normal(size=(2, 8, 6, 2))
    theta, model = vp.nnx.split(net)
    for layer in net.layers:
        layer.conv_general_dilated = cifar10.by_patches
    _, by_patches = vp.nnx.split(net)

    def value_and_gradient(model):
        return jax.value_and_grad(lambda t: jnp.sum(model.features(t, images) ** 2))(theta)

    for a, b in zip(
        *(jax.tree.leaves(value_and_gradient(m)) for m in (model, by_patches)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-11)


def test_samples_are_the_blocks_of_permutations():
    data = jnp.arange(10), jnp.arange(10)
    key = jax.random.key(0)
    drawn = [cifar10.sample(key, jnp.int32(count), data, 3)[0] for count in range(6)]
    first, second = np.concatenate(drawn[:3]), np.concatenate(drawn[3:])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 9
    assert (first != second).any()


@pytest.fixture
def small(x64):
    """A problem in two classes: the setting of the experiment with dense features, and data."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(24, 2)))
    targets = jnp.eye(2)[(inputs[:, 0] * inputs[:, 1] > 0).astype(int)]
    net = networks.Dense((2, 3, 2), rngs=nnx.Rngs(0))
    theta, model = vp.nnx.split(net)
    problem = vp.Problem(model, vp.softmax_cross_entropy(), 1e-3, 1e-3)
    data = inputs, targets
    task = cifar10.Task(problem, theta, data, data, {}, 0)
    return cifar10.Setting(task, problem, vp.nnx.initial_w(net))


@pytest.mark.parametrize("name", ["gnvpro", "gn"])
def test_a_method_goes_on_from_sample_to_sample(name, small):
    """Against the steps of the method, called on the same samples by hand."""
    size, steps, rank, task = 8, 2, 4, small.task

    def start(*_):
        return small.w

    if name == "gnvpro":
        method = cifar10.gnvpro(size, steps, rank, small)
        inner = vp.gnvpro(task.problem, curvature="krylov", rank=rank)
    else:
        method = cifar10.gn(size, steps, rank, start, small)
        inner = baselines.gn(task.problem, rank=rank, start=start)
    state = method.init(task.theta, task.train, jax.random.key(1))
    key = jax.random.wrap_key_data(state.key)
    mine, unit = state.inner, size / len(task.train[1])  # a pass over a sample
    np.testing.assert_allclose(state.work_units, unit, rtol=1e-12)
    for count in range(4):
        drawn = cifar10.sample(key, jnp.int32(count), task.train, size)
        if name == "gnvpro":
            mine = inner.init(mine.theta, drawn, before=mine)
        for _ in range(steps):
            mine, _ = inner.step(mine, drawn)
        state, infos = method.epoch(state, task.train, batch_size=size)
        assert len(infos.objective) == steps
        # Solves for W end when they are accurate enough, where rounding has a say.
        np.testing.assert_allclose(state.w, mine.w, rtol=1e-2)
        np.testing.assert_allclose(state.objective, mine.objective, rtol=1e-4)
        np.testing.assert_allclose(state.work_units, int(mine.work_units) * unit, rtol=1e-12)
        assert int(state.status) == vp.Status.RUNNING
        mine = state.inner  # as Krylov spaces under cross entropy amplify rounding


def test_a_run_stopped_early_keeps_the_lowest_loss():
    history = {
        "objective": np.array([3.0, 2.0, np.inf, 2.5, 1.0]),
        "validation_accuracy": np.array([0.1, 0.3, 0.2, 0.6, 0.5]),
        "work_units": np.arange(5.0),
    }
    stopped = cifar10.stopped_early(cifar10.Run("GNvpro", "", 0, None, history)).history
    np.testing.assert_array_equal(stopped["objective"], [3, 2, 2, 2, 1])
    np.testing.assert_array_equal(stopped["validation_accuracy"], [0.1, 0.3, 0.3, 0.3, 0.5])
    np.testing.assert_array_equal(stopped["work_units"], np.arange(5))
