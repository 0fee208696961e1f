"""Direct current resistivity: the elements, the physics, the sets, and the authors' file."""

import sys
import threading
from functools import partial, reduce
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module

import numpy as np
import pytest

from varprox import datasets
from varprox.datasets import _cache

pytest.importorskip("skfem")
module = import_module("varprox.datasets.dc_resistivity")

PARAMETERS = np.random.default_rng(0).uniform(-1, 1, (4, 3))
TICKS = np.arange(-100.0, 101, 10)
RECEIVERS = np.stack(np.meshgrid(TICKS, TICKS, [0.0], indexing="ij"), -1).reshape(-1, 3)


@pytest.fixture(scope="module", autouse=True)
def isolated(tmp_path_factory):
    """Hides the files of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VARPROX_DATA", raising=False)
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(_cache, "_user_cache", lambda: cache)
        yield


@pytest.fixture(scope="module")
def ground():
    """The default grid."""
    return module._ground(module._axes())


@pytest.fixture(scope="module")
def data(isolated):
    return datasets.dc_resistivity(20)


# The elements


def small_box(cells):
    """A box with cells of unequal widths."""
    t = np.linspace(0, 1, cells + 1)
    graded = t + 0.5 * t * (1 - t)
    return module._ground((graded, 1.5 * graded, 0.8 * t))


def mass(axis):
    """∫ of the products of hat functions."""
    h = np.diff(axis)
    ends = np.concatenate([h, [0]]) + np.concatenate([[0], h])
    return (2 * np.diag(ends) + np.diag(h, 1) + np.diag(h, -1)) / 6


def integrate(ground, f):
    """∫ f v for every hat function v, of the nodal values f (x, y, z)."""
    return np.einsum("ai,bj,ck,ijk->abc", *map(mass, ground.axes), f, optimize=True)


def manufactured_error(cells):
    """In L2, for u = cos(πx) cos(πy/1.5) cos(πz/0.8), without flow through the sides; m varies."""
    ground = small_box(cells)
    points = np.meshgrid(*ground.axes, indexing="ij")
    k = np.pi / np.array([1.0, 1.5, 0.8])
    cosines = [np.cos(a * x) for a, x in zip(k, points, strict=True)]
    u = reduce(np.multiply, cosines)
    u_x = -k[0] * np.sin(k[0] * points[0]) * cosines[1] * cosines[2]
    u_z = -k[2] * np.sin(k[2] * points[2]) * cosines[0] * cosines[1]
    phase = points[0] + points[2]
    source = np.exp(np.sin(phase)) * ((k @ k) * u - np.cos(phase) * (u_x + u_z))

    m = np.exp(np.sin(ground.centres @ (1, 0, 1)))
    found = module._solve(ground, m, integrate(ground, source).reshape(-1, 1)).reshape(u.shape)
    return np.sqrt(((found - u) * integrate(ground, found - u)).sum())


def test_a_manufactured_solution_converges_with_second_order():
    errors = np.array([manufactured_error(cells) for cells in (8, 16, 32)])
    coarse, fine = np.log2(errors[:-1] / errors[1:])
    assert 1.9 < coarse < fine
    np.testing.assert_allclose(fine, 2, atol=0.02)


def test_separation_of_variables_solves_the_homogeneous_ground():
    ground = small_box(7)
    loads = np.random.default_rng(0).normal(size=(8**3, 2))
    loads -= loads.mean(axis=0)
    u = module._solve_homogeneous(ground, loads)
    matrix = module._stiffness(ground, np.ones(7**3))
    np.testing.assert_allclose(matrix @ u, loads, atol=1e-12)
    for column in u.T:
        np.testing.assert_allclose(integrate(ground, column.reshape(8, 8, 8)).sum(), 0, atol=1e-12)


def test_the_matrix_is_that_of_the_energy():
    """For u = x + 2y − 3z: ∫ m |grad u|² = 14 ∫ m, whatever m is; here m = 1 + x + z."""
    ground = small_box(5)
    x, y, z = np.meshgrid(*ground.axes, indexing="ij")
    u = (x + 2 * y - 3 * z).ravel()
    matrix = module._stiffness(ground, 1 + ground.centres @ (1, 0, 1))
    np.testing.assert_allclose(u @ matrix @ u, 14 * 1.2 * (1 + 0.5 + 0.4), rtol=1e-12)


def divided(parts):
    """A coarser ground, of cells of 40 m and wider, each divided into so many along every axis."""
    half = np.array([0.0, 40, 80, 120, 160, 320])
    half = np.interp(np.arange(5 * parts + 1) / parts, np.arange(6), half)
    across = np.concatenate([-half[:0:-1], half])
    return module._ground((across, across, -half[::-1]))


def test_observables_converge_with_second_order(monkeypatch):
    """Against cells of 10 m; order 2 is (1/4 − 1/16) / (1/9 − 1/16) = 3.86, order 1 would be 3."""
    monkeypatch.setattr(module, "SPACING", 40.0)
    monkeypatch.setattr(module, "SIDE", 5)
    electrodes = ((-120.0, 0.0), (120.0, 40.0)), ((0.0, -120.0), (-40.0, 120.0))
    two, three, four = (
        module._anomalies(divided(parts), np.array([[0.0, 1.0, 0.0]]), electrodes)
        for parts in (2, 3, 4)
    )
    ratio = np.linalg.norm(two - four) / np.linalg.norm(three - four)
    assert ratio > 3.5
    assert np.linalg.norm(three - four) < 0.01 * np.linalg.norm(four)


@pytest.mark.slow
def test_the_error_of_the_grid_is_below_a_hundredth_of_the_spread(data):
    refined = module._ground(module._axes(1))
    parameters = np.random.default_rng(0).uniform(-1, 1, (20, 3))  # those of `data`
    exact = module._anomalies(refined, parameters[:8], module.ELECTRODES)
    error = datasets.dcr_observables(parameters[:8]) - exact
    spread = np.concatenate([targets for _, targets in data[:3]]).std(axis=0)
    assert np.sqrt((error**2).mean()) < 0.01 * np.sqrt((spread**2).mean())


# The physics


def test_conductivity_is_that_of_an_ellipsoid_with_a_smooth_edge():
    """Depth 60 m, semi-axes 45, 33.75 and 22.5 m, contrast √40: midway on its surface."""
    parameters = np.array([-0.5, 0.0, 0.0])
    surface = [(45, 0, -60), (0, -33.75, -60), (0, 0, -37.5), (0, 0, -82.5)]
    found = module.conductivity(np.array([*surface, (0, 0, -60), (500, 0, -60)]), parameters)
    np.testing.assert_allclose(found[:4], 0.01 * 40**0.25, rtol=1e-12)
    np.testing.assert_allclose(found[4], 0.01 * 40 ** (0.5 / (1 + np.exp(-5))), rtol=1e-12)
    np.testing.assert_allclose(found[5], 0.01, rtol=1e-12)
    corner = module.conductivity(np.array([0, 0, -90.0]), np.ones(3))
    np.testing.assert_allclose(corner, 0.01 * 20 ** (1 / (1 + np.exp(-5))), rtol=1e-12)


def half_space(electrode, points):
    """The potential at the points of 1 A from an electrode on a half space, and its gradient."""
    away = points - (*electrode, 0.0)
    distance = np.linalg.norm(away, axis=-1, keepdims=True)
    scale = 1 / (2 * np.pi * 0.01)
    return scale / distance[..., 0], -scale * away / distance**3


def test_the_background_is_the_potential_of_a_half_space(ground):
    """To the per cent that the distant sides and cells of 10 m allow, 40 m from the electrodes."""
    for start, end in module.ELECTRODES:
        at = module._nodes(ground, np.array([start, end]))
        current = np.zeros((ground.reciprocals.size, 1))
        current[at, 0] = 1, -1
        u = module._solve_homogeneous(ground, current)[:, 0] / 0.01
        exact = half_space(start, RECEIVERS)[0] - half_space(end, RECEIVERS)[0]
        far = np.linalg.norm(RECEIVERS[:, None, :2] - (start, end), axis=-1).min(axis=1) > 40
        error = u[module._nodes(ground, RECEIVERS)] - exact
        assert np.linalg.norm(error[far]) < 0.01 * np.linalg.norm(exact[far])


def test_a_faint_body_adds_borns_approximation(ground, monkeypatch):
    """−∫ (m − m₀) grad u₀ · grad G, with the potentials of a half space, by the midpoint rule."""
    monkeypatch.setattr(module, "CONTRAST", (1.0, 1.0001))
    sample = np.array([-0.2, 0.1, 1.0])
    h = 7.5
    x, z = np.arange(-150, 150, h) + h / 2, np.arange(-195, 0, h) + h / 2
    points = np.stack(np.meshgrid(x, x, z, indexing="ij"), -1).reshape(-1, 3)
    added = module.conductivity(points, sample) - 0.01
    some = slice(None, None, 8)
    kernels = np.stack([half_space(receiver[:2], points)[1] for receiver in RECEIVERS[some]])
    found = module._anomalies(ground, sample[None], module.ELECTRODES).reshape(2, -1)[:, some]
    for (start, end), row in zip(module.ELECTRODES, found, strict=True):
        field = half_space(start, points)[1] - half_space(end, points)[1]
        born = -1000 * h**3 * np.einsum("rpd,pd,p->r", kernels, field, added, optimize=True)
        assert np.linalg.norm(row - born) < 0.01 * np.linalg.norm(born)


def test_sources_and_receivers_may_be_exchanged(ground):
    pairs = ((-100.0, 0.0), (-60.0, 20.0)), ((80.0, -40.0), (20.0, 60.0))
    potentials = module._anomalies(ground, PARAMETERS, pairs).reshape(-1, 2, 21, 21)

    def voltages(source, pair):
        start, end = (np.array(pair) / 10 + 10).astype(int)
        return potentials[:, source, *start] - potentials[:, source, *end]

    np.testing.assert_allclose(voltages(0, pairs[1]), voltages(1, pairs[0]), rtol=1e-6)


def test_mirrored_electrodes_give_mirrored_potentials(ground):
    """Each mirror image of a dipole, and one that is odd along x and even along y."""
    (start, end), _ = module.ELECTRODES
    pairs = [
        ((sx * start[0], sy * start[1]), (sx * end[0], sy * end[1]))
        for sx, sy in ((1, 1), (-1, 1), (1, -1))
    ]
    pairs.append(((-120.0, 0.0), (120.0, 0.0)))
    dipole, by_x, by_y, odd = np.moveaxis(
        module._anomalies(ground, PARAMETERS, pairs).reshape(-1, 4, 21, 21), 1, 0
    )
    atol = 1e-6 * np.abs(dipole).max()
    np.testing.assert_allclose(by_x, dipole[:, ::-1], atol=atol)
    np.testing.assert_allclose(by_y, dipole[:, :, ::-1], atol=atol)
    np.testing.assert_allclose(odd, -odd[:, ::-1], atol=atol)
    np.testing.assert_allclose(odd, odd[:, :, ::-1], atol=atol)


def test_observables_are_smooth_in_the_parameters():
    """Second differences shrink fourfold with half the step."""
    y, direction = np.array([0.2, -0.3, 0.1]), np.array([0.6, 0.6, 0.6])
    steps = np.array([-2, -1, 0, 1, 2]) / 10
    a, b, c, d, e = datasets.dcr_observables(y + steps[:, None] * direction)
    ratio = np.linalg.norm(a - 2 * c + e) / np.linalg.norm(b - 2 * c + d)
    np.testing.assert_allclose(ratio, 4, rtol=0.05)
    assert np.linalg.norm(b - 2 * c + d) > 1e-3 * np.linalg.norm(c)  # and it is no linear map


# The sets


def test_targets_are_the_observables_of_the_inputs_less_the_training_mean(data):
    assert [len(inputs) for inputs, _ in data[:3]] == [16, 2, 2]
    for inputs, targets in data[:3]:
        assert inputs.dtype == targets.dtype == data.mean.dtype == np.float32
        assert targets.shape == (len(inputs), 882)
    np.testing.assert_allclose(data.train[1].mean(axis=0), 0, atol=1e-5)
    inputs, targets = data.test
    # The inputs of single precision are not quite those that were simulated.
    np.testing.assert_allclose(targets + data.mean, datasets.dcr_observables(inputs), atol=1e-4)


def test_all_observables_are_finite_and_vary(data):
    observables = np.concatenate([targets for _, targets in data[:3]])
    assert np.isfinite(observables).all()
    spread = observables.std(axis=0)
    assert spread.min() > 0.005 * spread.max()


def test_inputs_fill_the_cube_and_depend_on_the_seed_alone(data):
    inputs = np.concatenate([inputs for inputs, _ in data[:3]])
    assert np.abs(inputs).max() <= 1 and (inputs.max(axis=0) - inputs.min(axis=0) > 1.5).all()
    again, other = datasets.dc_resistivity(20), datasets.dc_resistivity(10, seed=1)
    np.testing.assert_array_equal(again.train[1], data.train[1])
    assert not np.isin(other.train[0], data.train[0]).any()


def test_smaller_sets_are_part_of_larger_ones(data, x64):
    small, large = datasets.dc_resistivity(10), datasets.dc_resistivity(20)
    assert small.train[1].dtype == np.float64
    for (x, c), (inputs, targets) in zip(small[:3], large[:3], strict=True):
        np.testing.assert_array_equal(x, inputs[: len(x)])
        np.testing.assert_allclose(c + small.mean, (targets + large.mean)[: len(c)], atol=1e-12)


def test_what_was_simulated_is_kept_with_all_that_it_was_made_from(data, monkeypatch):
    def simulate(_):
        raise RuntimeError("simulated again")

    monkeypatch.setattr(module, "dcr_observables", simulate)
    datasets.dc_resistivity(20)
    constants = {name for name in vars(module) if name.isupper()}
    for name in constants - {"URL", "PUBLISHED"}:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="simulated again"):
            patch.setattr(module, name, "another")
            datasets.dc_resistivity(20)


# The authors' file


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """A function that writes arrays as the authors' file, which holds 50 samples here."""
    savemat = pytest.importorskip("scipy.io").savemat
    monkeypatch.setenv("VARPROX_DATA", str(tmp_path))
    monkeypatch.setattr(module, "PUBLISHED", 50)
    return lambda **arrays: savemat(tmp_path / "DCR_Data.mat", arrays)


def published():
    rng = np.random.default_rng(0)
    return {"Y": rng.normal(size=(3, 50)), "C": rng.normal(size=(882, 50))}


def test_the_authors_samples_are_split_in_an_order_drawn_from_the_seed(publish, x64):
    arrays = published()
    publish(**arrays)
    data = datasets.dc_resistivity(50, seed=2, source="original")
    assert [len(inputs) for inputs, _ in data[:3]] == [40, 5, 5]
    order = [np.flatnonzero(arrays["Y"][0] == y) for x, _ in data[:3] for y in x[:, 0]]
    order = np.concatenate(order)
    assert sorted(order) == list(range(50)) and list(order) != list(range(50))
    for of, rows in [("Y", [x for x, _ in data[:3]]), ("C", [c + data.mean for _, c in data[:3]])]:
        np.testing.assert_allclose(np.concatenate(rows), arrays[of].T[order], atol=1e-14)
    np.testing.assert_allclose(data.mean, arrays["C"].T[order[:40]].mean(axis=0), atol=1e-14)
    other = datasets.dc_resistivity(50, seed=3, source="original")
    assert not np.array_equal(other.train[0], data.train[0])
    small = datasets.dc_resistivity(20, seed=2, source="original")
    np.testing.assert_array_equal(small.train[0], data.train[0][:16])


def test_the_authors_file_is_downloaded_where_it_lies_nowhere(publish, tmp_path, monkeypatch):
    pytest.importorskip("pooch")
    publish(**published())
    expected = datasets.dc_resistivity(50, source="original")
    monkeypatch.delenv("VARPROX_DATA")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as http:
        url = f"http://127.0.0.1:{http.server_port}/DCR_Data.mat"
        monkeypatch.setattr(module, "URL", url)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        found = datasets.dc_resistivity(50, source="original")
        http.shutdown()
        thread.join()
    np.testing.assert_array_equal(found.train[1], expected.train[1])


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda a: {"Y": a["Y"]}, r"a file that cannot be read: KeyError\('C'\)"),
        (lambda a: a | {"Y": a["Y"].T}, r"shapes \(50, 3\) and \(882, 50\)"),
        (lambda a: a | {"C": a["C"][:441]}, r"shapes \(3, 50\) and \(441, 50\)"),
        (lambda a: a | {"C": np.where(a["C"] > 2, np.nan, a["C"])}, "NaN or Inf"),
    ],
)
def test_a_file_that_does_not_hold_the_samples_is_refused(change, found, publish):
    publish(**change(published()))
    message = r"DCR_Data.mat: expected the arrays Y \(3, 50\) and C \(882, 50\) as published, got "
    with pytest.raises(ValueError, match=message + found + "; delete the file"):
        datasets.dc_resistivity(50, source="original")


# What is refused


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"n": 9}, ValueError, "n: expected an integer of at least 10, got 9"),
        ({"n": 100.0}, TypeError, "n: expected an integer, got 100.0"),
        ({"seed": -1}, ValueError, "seed: expected an integer of at least 0, got -1"),
        (
            {"n": 10_001, "source": "original"},
            ValueError,
            "n: expected an integer of at most 10000, got 10001",
        ),
        (
            {"source": "mine"},
            ValueError,
            'source: expected "simulated" or "original", got \'mine\'',
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error) as caught:
        datasets.dc_resistivity(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "parameters, message",
    [
        (np.zeros(3), "expected shape (n, 3), got (3,)"),
        (np.zeros((2, 4)), "expected shape (n, 3), got (2, 4)"),
        ([[0, 0, 1.01]], "expected numbers between -1 and 1, got 1.01"),
        ([[0, 0, 0], [0, np.nan, 0]], "expected numbers between -1 and 1, got nan"),
    ],
)
def test_parameters_outside_the_cube_are_refused(parameters, message):
    with pytest.raises(ValueError) as caught:
        datasets.dcr_observables(parameters)
    assert str(caught.value) == f"parameters: {message}"


def test_without_scikit_fem_the_simulation_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skfem", None)
    message = r"^simulating direct current resistivity needs skfem: pip install .*\[data\]'$"
    with pytest.raises(ImportError, match=message):
        datasets.dcr_observables(np.zeros((1, 3)))
