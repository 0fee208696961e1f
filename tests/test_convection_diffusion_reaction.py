"""Convection–diffusion–reaction: the simulator against closed forms, and what the data promise."""

import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

from varprox import datasets
from varprox.datasets import _cache

pytest.importorskip("skfem")
module = import_module("varprox.datasets.convection_diffusion_reaction")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Hides the files of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VARPROX_DATA", raising=False)
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(_cache, "_user_cache", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def small(cache):
    return datasets.convection_diffusion_reaction(6, 3, 2, seed=3)


def strengths(samples, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (samples, 55))


# The equation


def at_all_nodes(system, **changes):
    from scipy import sparse

    return system._replace(sensors=sparse.eye_array(system.nodes.shape[1]), **changes)


def test_a_stationary_solution_is_approached_with_order_four_at_the_nodes():
    """w = 1 + ½ cos πx₁ cos πx₂ + ⅕ cos 2πx₁, whose normal derivatives vanish on the boundary, is
    stationary under the source −∇·(D∇w) + v·∇w − (y · r(w)); y makes the rates negative, hence w
    stable."""
    d, rate = module.DIFFUSION, module.RATE
    y = np.zeros((1, 55))
    y[0, 0], y[0, 1] = -1, 0.8  # the modes (0, 0) and (0, 1)
    errors = []
    for cells in (6, 12):
        system = module._system(cells)
        x1, x2 = np.pi * system.nodes
        w = 1 + np.cos(x1) * np.cos(x2) / 2 + np.cos(2 * x1) / 5
        laplacian = -(np.pi**2) * (np.cos(x1) * np.cos(x2) + 4 / 5 * np.cos(2 * x1))
        slope1 = -np.pi * (np.sin(x1) * np.cos(x2) / 2 + 2 / 5 * np.sin(2 * x1))
        slope2 = -np.pi * np.cos(x1) * np.sin(x2) / 2
        convection = np.sin(x1) * np.cos(x2) * slope1 - np.cos(x1) * np.sin(x2) * slope2
        rates = rate * (-1 + 0.8 * np.cos(x2) / 2**module.DECAY)
        source = -d * laplacian + convection - rates * w / (1 + w)
        system = at_all_nodes(system, source=source)
        u = module._observe(system, y, times=[100.0], rtol=1e-9, atol=1e-11)[0, :, 0]
        errors.append(np.abs(u - w).max())
    assert 3.8 < np.log2(errors[0] / errors[1]) < 4.2


def test_without_reactions_an_eigenfunction_of_diffusion_decays_as_it_should(monkeypatch):
    """u = (1 − exp(−λt)) / λ φ under the source φ = cos πx₁ cos 2πx₂, with λ = 5 π² D."""
    monkeypatch.setattr(module, "SPEED", 0.0)
    system = module._system(12)
    x1, x2 = np.pi * system.nodes
    phi, eigenvalue = np.cos(x1) * np.cos(2 * x2), 5 * np.pi**2 * module.DIFFUSION
    system = at_all_nodes(system, source=phi)
    u = module._observe(system, np.zeros((1, 55)), rtol=1e-9, atol=1e-11)[0]
    expected = (1 - np.exp(-eigenvalue * module.TIMES)) / eigenvalue * phi[:, None]
    np.testing.assert_allclose(u, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("rtol", [1e-5, 1e-7])
def test_a_uniform_state_follows_its_ordinary_differential_equation(rtol):
    """u' = 1 − u / (1 + u) from zero has the solution √(1 + 2t) − 1; u' = 1 + u / (1 + u) has one
    that solves 2u + log(1 + 2u) = 4t."""
    system = module._system(2)
    system = system._replace(source=np.ones_like(system.source))
    y = np.zeros((2, 55))
    y[:, 0] = np.array([-1, 1]) / module.RATE
    consumed, produced = module._observe(system, y, rtol=rtol, atol=rtol / 10)
    t = np.broadcast_to(module.TIMES, consumed.shape)
    np.testing.assert_allclose(consumed, np.sqrt(1 + 2 * t) - 1, rtol=20 * rtol)
    np.testing.assert_allclose(2 * produced + np.log1p(2 * produced), 4 * t, rtol=20 * rtol)


def test_the_vortex_moves_the_substance_and_keeps_its_amount():
    """The integral of u grows as t ∫ f; f is symmetric in x₁ and x₂, and v leads to larger x₁."""
    system = module._system(8)
    weights = _simpson_weights(system.nodes, 8)
    u = module._observe(at_all_nodes(system), np.zeros((1, 55)), rtol=1e-8, atol=1e-10)[0]
    amount = module.TIMES * (weights @ system.source)
    np.testing.assert_allclose(weights @ u, amount, rtol=1e-3)
    x1, x2 = system.nodes @ (weights[:, None] * u) / amount
    assert (x1 > x2 + 0.02).all()


def _simpson_weights(nodes, cells):
    index = np.rint(nodes * 2 * cells).astype(int)
    ends = (index == 0) | (index == 2 * cells)
    return np.where(index % 2, 4, np.where(ends, 1, 2)).prod(axis=0) / (6 * cells) ** 2


def test_observations_are_those_of_the_points_named():
    system = module._system(4)
    x1, x2 = system.nodes
    points = (system.sensors @ np.stack([x1, x2, x1 * x2], axis=1)).T
    expected_x1, expected_x2 = [1 / 6, 1 / 2, 5 / 6] * 2, [1 / 4] * 3 + [3 / 4] * 3
    np.testing.assert_allclose(points[0], expected_x1, atol=1e-12)
    np.testing.assert_allclose(points[1], expected_x2, atol=1e-12)
    np.testing.assert_allclose(points[2], points[0] * points[1], atol=1e-12)


def test_reactions_are_ordered_by_degree_and_scaled():
    system = module._system(2)
    modes = [(k, d - k) for d in range(10) for k in range(d + 1)]
    x1, x2 = system.nodes
    for rates, (k, m) in zip(system.rates, modes, strict=True):
        expected = module.RATE / (1 + k**2 + m**2) ** 1.5 * np.cos(k * np.pi * x1)
        np.testing.assert_allclose(rates, expected * np.cos(m * np.pi * x2), atol=1e-13)


@pytest.mark.parametrize("y0", [0.3, 0.9])
def test_the_map_is_far_from_affine(y0):
    """An affine map would have as its value at zero the mean of those at y and −y."""
    y = np.zeros((3, 55))
    y[:, 0] = -y0, 0, y0
    low, middle, high = datasets.cdr_observables(y)[:, 11::12]
    assert (low < middle).all() and (middle < high).all()
    assert ((low + high) / 2 - middle > y0 / 4 * (high - low) / 2).all()


def test_grid_and_solver_err_by_less_than_a_percent_of_the_spread():
    """For each of the 72 observables by itself, in each of three samples."""
    y = strengths(20)
    observed = datasets.cdr_observables(y)
    finer = module._observe(module._system(2 * module.CELLS), y[:3], rtol=1e-6, atol=1e-8)
    error = np.abs(observed[:3] - finer.reshape(3, 72))
    assert (error < 0.01 * observed.std(axis=0)).all()


# The data


def test_the_group_a_sample_is_in_matters_within_the_tolerance(monkeypatch):
    y = strengths(4, seed=1)
    together = datasets.cdr_observables(y)
    monkeypatch.setattr(module, "GROUP", 1)
    alone = datasets.cdr_observables(y)
    # The solver bounds the error of a step, of which there are about a hundred.
    np.testing.assert_allclose(together, alone, rtol=10 * module.RTOL, atol=10 * module.ATOL)


def test_memory_that_is_not_yet_set_has_no_part_in_it(monkeypatch):
    """SciPy's BDF subtracts from such memory, whose content is chance, and warns of signalling
    NaNs."""
    y = strengths(1, seed=1)
    expected = datasets.cdr_observables(y)
    signalling = lambda shape, dtype: np.full(shape, 0x7FF0000000000001).view(dtype)  # noqa: E731
    poisoned = SimpleNamespace(**vars(np) | {"empty": signalling})
    monkeypatch.setattr("scipy.integrate._ivp.bdf.np", poisoned)
    np.testing.assert_array_equal(datasets.cdr_observables(y), expected)


def test_shapes_dtypes_and_ranges(small):
    for (inputs, targets), size in zip(small, (6, 3, 2), strict=True):
        assert inputs.shape == (size, 55) and targets.shape == (size, 72)
        assert inputs.dtype == targets.dtype == np.float32
        assert np.abs(inputs).max() < 1 and targets.min() > 0
    everything = np.concatenate([targets for _, targets in small])
    assert np.isfinite(everything).all()
    assert (everything.std(axis=0) > 1e-3 * everything.mean(axis=0)).all()


def test_targets_are_the_observables_of_the_inputs_in_double_precision(small, x64):
    data = datasets.convection_diffusion_reaction(6, 3, 2, seed=3)
    for (inputs, targets), (inputs32, targets32) in zip(data, small, strict=True):
        np.testing.assert_array_equal(targets, datasets.cdr_observables(inputs))
        np.testing.assert_array_equal(inputs.astype(np.float32), inputs32)
        np.testing.assert_array_equal(targets.astype(np.float32), targets32)


def test_no_set_depends_on_the_size_of_another_and_seeds_differ(small):
    other = datasets.convection_diffusion_reaction(6, 1, 4, seed=3)
    for a, b in zip(small.train, other.train, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(small.validation[0][:1], other.validation[0])
    np.testing.assert_array_equal(small.test[0], other.test[0][:2])
    rows = np.concatenate([inputs for inputs, _ in small])
    assert len(np.unique(rows, axis=0)) == 11
    reseeded = datasets.convection_diffusion_reaction(1, 1, 1, seed=4)
    assert not np.array_equal(reseeded.train[0], small.train[0][:1])


def test_a_simulation_is_kept_and_shows_its_progress(small, monkeypatch, capfd):
    def again(size):
        return datasets.convection_diffusion_reaction(size, 3, 2, seed=3).train[1]

    with monkeypatch.context() as patch:
        patch.setattr(module, "cdr_observables", None)
        np.testing.assert_array_equal(again(6), small.train[1])
    assert capfd.readouterr() == ("", "")
    again(1)
    out, err = capfd.readouterr()
    assert out == "" and "convection–diffusion–reaction: 100%" in err


def test_another_discretisation_is_another_data_set(small, monkeypatch):
    monkeypatch.setattr(module, "CELLS", 4)
    coarse = datasets.convection_diffusion_reaction(6, 3, 2, seed=3)
    np.testing.assert_array_equal(coarse.train[0], small.train[0])
    assert (coarse.train[1] != small.train[1]).any()


BAD = {
    "no size": ({"n": 0}, ValueError, "n: expected an integer of at least 1, got 0"),
    "a float": ({"n_test": 2.0}, TypeError, "n_test: expected an integer, got 2.0"),
    "a string": ({"n_validation": "7"}, TypeError, "n_validation: expected an integer, got '7'"),
    "a seed": ({"seed": -1}, ValueError, "seed: expected an integer of at least 0, got -1"),
    "a source": (
        {"source": "mat"},
        ValueError,
        'source: expected "simulated" or "original", got \'mat\'',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error) as caught:
        datasets.convection_diffusion_reaction(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "parameters, message",
    [
        (np.zeros(55), r"expected shape \(n, 55\), got \(55,\)"),
        (np.zeros((2, 54)), r"expected shape \(n, 55\), got \(2, 54\)"),
        (np.zeros((0, 55)), r"expected shape \(n, 55\), got \(0, 55\)"),
        (np.full((1, 55), np.nan), "expected finite numbers, got NaN or Inf"),
    ],
)
def test_bad_parameters_are_refused(parameters, message):
    with pytest.raises(ValueError, match=f"^parameters: {message}$"):
        datasets.cdr_observables(parameters)


def test_without_scikit_fem_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "skfem", None)
    message = r"^the convection–diffusion–reaction data set needs skfem: pip install 'varprox"
    with pytest.raises(ImportError, match=message):
        datasets.cdr_observables(strengths(1))


# The published file


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file in the layout of the authors', whose sample i has y = i and c = 1000 + i."""
    from scipy.io import savemat

    path = tmp_path_factory.mktemp("published") / "CDR_Data.mat"
    index = np.arange(800.0)
    arrays = {"Y": np.tile(index, (55, 1)), "C": np.tile(1000 + index, (72, 1))}
    savemat(path, arrays)
    return path


@pytest.fixture
def downloaded(published, monkeypatch):
    """The file is where it would lie after its download."""
    monkeypatch.setenv("VARPROX_DATA", str(published.parent))


def test_the_published_samples_are_split_by_the_seed(downloaded):
    def original(*sizes, seed=0):
        return datasets.convection_diffusion_reaction(*sizes, seed=seed, source="original")

    data = original(400, 200, 200)
    for (inputs, targets), size in zip(data, (400, 200, 200), strict=True):
        assert inputs.shape == (size, 55) and targets.shape == (size, 72)
        np.testing.assert_array_equal(inputs[:, :1] + 1000, targets[:, :1])
    np.testing.assert_array_equal(np.sort(np.concatenate([y[:, 0] for y, _ in data])), range(800))
    np.testing.assert_array_equal(original(10, 5, 1).train[0], data.train[0][:10])
    assert not np.array_equal(original(400, 200, 200, seed=1).train[0], data.train[0])
    message = r"^n \+ n_validation \+ n_test: expected at most 800, got 801$"
    with pytest.raises(ValueError, match=message):
        original(401, 200, 200)


def test_the_published_file_is_downloaded_once(published, cache, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=published.parent)
    ) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(module, "URL", f"http://127.0.0.1:{server.server_port}/CDR_Data.mat")
        first = datasets.convection_diffusion_reaction(source="original")
        server.shutdown()
        thread.join()
    again = datasets.convection_diffusion_reaction(source="original")
    np.testing.assert_array_equal(first.train[1], again.train[1])
    assert (cache / "CDR_Data.mat").read_bytes() == published.read_bytes()
    (cache / "CDR_Data.mat").unlink()
    with pytest.raises(OSError, match=r"^CDR_Data.mat: could not be downloaded from http://127"):
        datasets.convection_diffusion_reaction(source="original")


@pytest.mark.parametrize(
    "arrays, found",
    [
        ({"Y": np.ones((800, 55)), "C": np.ones((72, 800))}, r"shapes \{'Y': \(800, 55\)"),
        ({"Y": np.ones((55, 800)), "C": np.full((72, 800), np.inf)}, "NaN or Inf"),
        ({"Y": np.ones((55, 800))}, r"a file that cannot be read: KeyError\('C'\)"),
    ],
)
def test_another_file_is_refused(arrays, found, tmp_path, monkeypatch):
    from scipy.io import savemat

    savemat(tmp_path / "CDR_Data.mat", arrays)
    monkeypatch.setenv("VARPROX_DATA", str(tmp_path))
    message = (
        r"CDR_Data.mat: expected finite arrays Y \(55, 800\) and C \(72, 800\) as published, "
        f"got {found}.*; delete the file"
    )
    with pytest.raises(ValueError, match=message):
        datasets.convection_diffusion_reaction(source="original")
