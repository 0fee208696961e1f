"""Direct current resistivity: what a conductive body in the ground adds to potentials.

Two dipoles in turn send 1 A through the ground, −div(m grad u) = q, from one electrode at the
surface to another: from (−120, 0) to (120, 60) m, and from (0, −120) to (−60, 120) m. The
electrodes are outside an array of 21 × 21 receivers, 10 m apart, that covers x and y from −100 to
100 m. The ground is a box of 1520 × 1520 × 760 m without flow through its sides
(Neumann conditions). Its conductivity is m = m₀ c^χ with m₀ = 0.01 S/m, where χ = 1 / (1 +
exp((r − 1) / 0.2)) falls smoothly from 1 inside to 0 outside the ellipsoid r = 1 below the centre
of the array.

The parameters y, uniform in [−1, 1]³, are the depth of the ellipsoid's centre, 50 … 90 m, its
largest semi-axis, 30 … 60 m (along x; the others are 3/4 of it along y and 1/2 of it in depth),
and, on a logarithmic scale, its contrast c, 2 … 20. An observable is what the body adds to the
potential at a receiver, in mV: v = u − u₀, where u₀ is the potential for m = m₀, the same for all
samples. It solves −div(m grad v) = div((m − m₀) grad u₀), which is free of the singularities at the
electrodes. Its mean over the box is zero, which fixes the constant. Trilinear finite elements, 10 m
wide near the array and wider outwards, discretise both u₀ and v; with elements of half the width
observables change by 0.4 % of their spread over the samples.

The equation, the three kinds of parameters, the two dipoles and the array are taken from Newman,
Ruthotto, Hart and van Bloemen Waanders, arXiv:2007.13171; lengths and conductivities are chosen
here.
"""

from functools import reduce
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from varprox.datasets._cache import _require, check_integer, find_file, float_dtype, simulated

URL = "http://www.mathcs.emory.edu/~lruthot/pubs/2020-GNvpro/DCR_Data.mat"
PUBLISHED = 10_000  # samples in the authors' file

SPACING, SIDE = 10.0, 21  # m between receivers, receivers along a side of the array
UNIFORM = 130.0  # m, half the width of the part where cells are `SPACING` wide, and its depth
PADDING = (20.0, 40.0, 80.0, 160.0, 320.0)  # m, the cells from there to the sides and the bottom
ELECTRODES = (((-120.0, 0.0), (120.0, 60.0)), ((0.0, -120.0), (-60.0, 120.0)))  # m; from, to
CURRENT, BACKGROUND = 1.0, 0.01  # A, S/m
DEPTH, SEMI_AXIS, CONTRAST = (50.0, 90.0), (30.0, 60.0), (2.0, 20.0)  # m, m, ratio
PROPORTIONS = (1.0, 0.75, 0.5)  # of the semi-axes along x, y and in depth
EDGE = 0.2  # of the logistic edge, relative to the semi-axes
TOLERANCE = 1e-8  # of conjugate gradients, relative, in the energy norm
VERSION = 1  # to be raised whenever a change below changes the numbers


class DcResistivity(NamedTuple):
    """Samples of the direct current resistivity problem.

    Targets are observables less their mean over the training set.

    Attributes:
        train: The pair (parameters (n, 3), targets (n, 882)) to train on.
        validation: Such a pair to validate on.
        test: Such a pair to test on.
        mean: The mean (882,) of the training set's observables, which the targets lack.

    Example:
        >>> import varprox as vp
        >>> data = vp.datasets.dc_resistivity(100)  # doctest: +SKIP
        >>> data.train[1].shape, data.mean.shape  # doctest: +SKIP
        ((80, 882), (882,))
    """

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    mean: np.ndarray  # (882,) of the training observables


def dc_resistivity(n: int = 1000, *, seed: int = 0, source: str = "simulated") -> DcResistivity:
    """Regression of surface potentials from the parameters of a body in the ground.

    Inputs are the 3 parameters of a body, and targets its 882 observables, less their mean over the
    training set. Of ten samples in a row the first eight are for training, the ninth for validation
    and the tenth for testing. So 10,000 samples give 8000, 1000 and 1000 as in the paper, and the
    sets of a smaller `n` are part of the sets of a larger one.

    With ``source="simulated"`` parameters are drawn from the seed, and `dcr_observables` computes
    the observables in about 0.05 s per sample. The arrays are then kept in the user's cache.

    With ``source="original"`` the samples come from the authors' file DCR_Data.mat, in an order
    drawn from the seed, with parameters and columns as published. The file is looked for in the
    folder that the environment variable VARPROX_DATA names, then in the user's cache, and is
    downloaded if it is in neither.

    Arguments:
        n: The number of samples in all, an integer ≥ 10; at most 10,000 original ones.
        seed: An integer ≥ 0, which fixes the samples.
        source: "simulated" or "original".

    Returns:
        A `DcResistivity`, its arrays in JAX's default float dtype.

    Raises:
        TypeError: If `n` or `seed` is not an integer.
        ValueError: If `n` is below 10, `seed` is below 0, `source` is another one, more than 10,000
            original samples are asked for, or a file does not hold the data.
        ImportError: If scikit-fem, which simulates, or pooch, which downloads, is missing.
        NotADirectoryError: If VARPROX_DATA names no folder.
        OSError: If the download fails.

    Example:
        >>> import varprox as vp
        >>> data = vp.datasets.dc_resistivity(100)  # doctest: +SKIP
        >>> data.train[0].shape, data.train[1].shape  # doctest: +SKIP
        ((80, 3), (80, 882))
    """
    n = check_integer("n", n, least=10)
    seed = check_integer("seed", seed, least=0)
    rng = np.random.default_rng(seed)
    if source == "simulated":
        parameters = _generating_parameters() | {"n": n, "seed": seed}
        arrays = simulated("dc_resistivity", parameters, lambda: _simulate(rng, n))
        inputs, observables = arrays["inputs"], arrays["observables"]
    elif source == "original":
        if n > PUBLISHED:
            raise ValueError(f"n: expected an integer of at most {PUBLISHED}, got {n}")
        order = rng.permutation(PUBLISHED)[:n]
        inputs, observables = (array[order] for array in _read_published())
    else:
        raise ValueError(f'source: expected "simulated" or "original", got {source!r}')
    return _split(inputs, observables)


def dcr_observables(parameters: np.ndarray) -> np.ndarray:
    """The potentials, in mV, that bodies of given parameters add at the surface.

    The docstring of the module `varprox.datasets.dc_resistivity` states the problem. A progress bar
    runs on stderr.

    Arguments:
        parameters: The parameters (n, 3), numbers between −1 and 1.

    Returns:
        The observables (n, 882), float64. Column 441 s + 21 i + j belongs to source s and to the
        receiver at x = 10 (i − 10) m and y = 10 (j − 10) m.

    Raises:
        ValueError: If `parameters` has another shape, or numbers outside [−1, 1].
        ImportError: If scikit-fem is missing.

    Example:
        >>> import numpy as np
        >>> import varprox as vp
        >>> vp.datasets.dcr_observables(np.zeros((1, 3))).shape  # doctest: +SKIP
        (1, 882)
    """
    parameters = np.asarray(parameters, np.float64)
    if parameters.ndim != 2 or parameters.shape[1] != 3:
        raise ValueError(f"parameters: expected shape (n, 3), got {parameters.shape}")
    outside = ~(np.abs(parameters) <= 1)
    if outside.any():
        found = parameters[outside][0]
        raise ValueError(f"parameters: expected numbers between -1 and 1, got {found}")
    return _anomalies(_ground(_axes()), parameters, ELECTRODES)


def _simulate(rng, n) -> dict[str, np.ndarray]:
    inputs = rng.uniform(-1, 1, (n, 3))
    return {"inputs": inputs, "observables": dcr_observables(inputs)}


def _generating_parameters() -> dict:
    return {
        "spacing": SPACING, "side": SIDE, "uniform": UNIFORM, "padding": PADDING,
        "electrodes": ELECTRODES, "current": CURRENT, "background": BACKGROUND, "depth": DEPTH,
        "semi_axis": SEMI_AXIS, "contrast": CONTRAST, "proportions": PROPORTIONS, "edge": EDGE,
        "tolerance": TOLERANCE, "version": VERSION,
    }  # fmt: skip


def _split(inputs, observables) -> DcResistivity:
    tenth = np.arange(len(inputs)) % 10
    mean = observables[tenth < 8].mean(axis=0)
    inputs, targets = inputs.astype(float_dtype()), (observables - mean).astype(float_dtype())
    train, validation, test = (
        (inputs[at], targets[at]) for at in (tenth < 8, tenth == 8, tenth == 9)
    )
    return DcResistivity(train, validation, test, mean.astype(float_dtype()))


def _read_published() -> tuple[np.ndarray, np.ndarray]:
    """Parameters (10000, 3) and observables (10000, 882) from the authors' file."""
    path = find_file("DCR_Data.mat", URL, None)
    loadmat = _require("scipy.io", purpose=f"reading {path.name}").loadmat
    try:
        content = loadmat(path)
        inputs, observables = (np.asarray(content[key].T, np.float64) for key in ("Y", "C"))
    except Exception as error:  # the reader promises no type for a damaged file
        raise _wrong(path, f"a file that cannot be read: {error!r}") from error
    if inputs.shape != (PUBLISHED, 3) or observables.shape != (PUBLISHED, 2 * SIDE**2):
        raise _wrong(path, f"shapes {inputs.T.shape} and {observables.T.shape}")
    if not (np.isfinite(inputs).all() and np.isfinite(observables).all()):
        raise _wrong(path, "NaN or Inf")
    return inputs, observables


def _wrong(path, found) -> ValueError:
    return ValueError(
        f"{path}: expected the arrays Y (3, {PUBLISHED}) and C ({2 * SIDE**2}, {PUBLISHED}) as "
        f"published, got {found}; delete the file to have it fetched again"
    )


# The physics


def conductivity(points: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """m in S/m at the points (…, 3), in m and z upwards from the surface, for parameters (3,)."""
    low, high = np.array([DEPTH, SEMI_AXIS, np.log(CONTRAST)]).T
    depth, size, exponent = low + (high - low) * (1 + parameters) / 2
    below = points + np.array([0, 0, depth])
    r = np.linalg.norm(below / (size * np.array(PROPORTIONS)), axis=-1)
    return BACKGROUND * np.exp(exponent * (1 - np.tanh((r - 1) / (2 * EDGE))) / 2)


def _anomalies(ground: "_Ground", parameters, electrodes) -> np.ndarray:
    """Observables of the parameters (n, 3), for any pairs of electrodes."""
    start, end = (_nodes(ground, np.array(points)) for points in zip(*electrodes, strict=True))
    columns = np.arange(len(electrodes))
    currents = np.zeros((ground.reciprocals.size, len(electrodes)))
    currents[start, columns], currents[end, columns] = CURRENT, -CURRENT
    background = _solve_homogeneous(ground, currents) / BACKGROUND
    ticks = SPACING * (np.arange(SIDE) - SIDE // 2)
    receivers = _nodes(ground, np.stack(np.meshgrid(ticks, ticks, indexing="ij"), -1))

    observables = np.empty((len(parameters), len(electrodes), receivers.size))
    for row, sample in zip(observables, tqdm(parameters, unit=" samples"), strict=True):
        m = conductivity(ground.centres, sample)
        added = -(_stiffness(ground, m - BACKGROUND) @ background)
        row[:] = 1000 * _solve(ground, m, added)[receivers.ravel()].T
    return observables.reshape(len(parameters), -1)


# Finite elements on a box whose cells are a product of intervals; nodes in C order of (x, y, z)


class _Ground(NamedTuple):
    """A grid, and what depends on it alone."""

    axes: tuple[np.ndarray, ...]  # the nodes' coordinates
    centres: np.ndarray  # of the cells, (cells, 3)
    assembly: object  # sparse (entries of the matrix, cells): entries = assembly @ conductivity
    sparsity: tuple[np.ndarray, np.ndarray]  # indices and indptr of the matrix
    modes: tuple[np.ndarray, ...]  # for each axis, the functions that diagonalise K for m = 1
    reciprocals: np.ndarray  # of the eigenvalues that go with them; 0 for that of the constant
    diagonal: np.ndarray  # of K for m = 1, (nodes,)
    weights: np.ndarray  # the mean of u over the box is weights @ u, (nodes,)


def _axes(refinements: int = 0) -> tuple[np.ndarray, ...]:
    """The default grid's nodes along x, y and z, with every interval halved so many times."""
    inner = np.arange(0, UNIFORM + SPACING / 2, SPACING)
    half = np.concatenate([inner, UNIFORM + np.cumsum(PADDING)])
    for _ in range(refinements):
        half = np.sort(np.concatenate([half, (half[1:] + half[:-1]) / 2]))
    across = np.concatenate([-half[:0:-1], half])
    return across, across, -half[::-1]


def _ground(axes: tuple[np.ndarray, ...]) -> _Ground:
    purpose = "simulating direct current resistivity"
    skfem = _require("skfem", purpose=purpose)
    models = _require("skfem.models.poisson", purpose=purpose)
    sparse = _require("scipy.sparse", purpose=purpose)
    linalg = _require("scipy.linalg", purpose=purpose)

    mesh = skfem.MeshHex.init_tensor(*axes)
    # Two Gauss points a direction integrate products of trilinear functions on bricks exactly.
    local = models.laplace.coo_data(skfem.Basis(mesh, skfem.ElementHex1(), intorder=3))
    position = np.argsort(np.lexsort(mesh.p[::-1]))
    size = mesh.p.shape[1]
    rows, columns = position[local.indices].astype(np.int64)
    pairs, entry = np.unique(rows * size + columns, return_inverse=True)
    indptr = np.searchsorted(pairs, size * np.arange(size + 1)).astype(np.int32)
    cells = mesh.t.shape[1]
    cell = np.tile(np.arange(cells), len(entry) // cells)
    assembly = sparse.csr_array((local.data, (entry, cell)), shape=(len(pairs), cells))

    lines = [skfem.Basis(skfem.MeshLine(axis), skfem.ElementLineP1()) for axis in axes]
    forms = models.laplace, models.mass
    pencils = [[form.assemble(line).toarray() for form in forms] for line in lines]
    eigenvalues, modes = zip(*(linalg.eigh(*pencil) for pencil in pencils), strict=True)
    total = reduce(np.add.outer, eigenvalues)
    reciprocals = np.zeros_like(total)
    reciprocals.flat[1:] = 1 / total.flat[1:]
    weights = reduce(np.multiply.outer, [mass.sum(axis=0) for _, mass in pencils]).ravel()
    return _Ground(
        axes=tuple(axes),
        centres=mesh.p[:, mesh.t].mean(axis=1).T,
        assembly=assembly,
        sparsity=((pairs % size).astype(np.int32), indptr),
        modes=modes,
        reciprocals=reciprocals,
        diagonal=assembly.sum(axis=1)[pairs // size == pairs % size],
        weights=weights / weights.sum(),
    )


def _nodes(ground: _Ground, points) -> np.ndarray:
    """The numbers (…,) of the nodes that lie at the points (…, 2) of the surface."""
    x, y, z = ground.axes
    i, j = np.searchsorted(x, points[..., 0]), np.searchsorted(y, points[..., 1])
    return np.ravel_multi_index((i, j, np.full_like(i, len(z) - 1)), (len(x), len(y), len(z)))


def _stiffness(ground: _Ground, conductivity):
    """The matrix K of ∫ m grad u · grad v, with m (cells,) constant in every cell."""
    from scipy.sparse import csr_array  # here, because SciPy is optional

    size = ground.reciprocals.size
    return csr_array((ground.assembly @ conductivity, *ground.sparsity), shape=(size, size))


def _solve_homogeneous(ground: _Ground, loads: np.ndarray) -> np.ndarray:
    """Solutions u (nodes, k) of K u = loads for m = 1, of mean zero, by separation of variables."""
    x, y, z = ground.modes
    field = loads.T.reshape(-1, *ground.reciprocals.shape)
    field = ground.reciprocals * _transform(field, x.T, y.T, z.T)
    return _transform(field, x, y, z).reshape(loads.T.shape).T


def _transform(field, x, y, z):
    """The matrices x, y and z along the last three axes of the field (k, x, y, z)."""
    # As many small products, for which no library starts threads that would wait for one another.
    return (x @ (y @ (field @ z.T)).swapaxes(1, 2)).swapaxes(1, 2)


def _solve(ground: _Ground, conductivity, loads: np.ndarray) -> np.ndarray:
    """Solutions u (nodes, k) of K u = loads of mean zero, by conjugate gradients.

    The preconditioner is the homogeneous ground between two scalings by 1/√m, which is close to K
    where m is smooth: the number of steps, 7 to 16, depends little on the grid. Source: Concus,
    Golub, SIAM J. Numer. Anal. 10, 1973.
    """
    matrix = _stiffness(ground, conductivity)
    scale = np.sqrt(ground.diagonal / matrix.diagonal())[:, None]

    def precondition(residual):
        return scale * _solve_homogeneous(ground, scale * residual)

    u, residual = np.zeros_like(loads), loads
    z = direction = precondition(residual)
    energy = start = (residual * z).sum(axis=0)
    while (energy > TOLERANCE**2 * start).any():
        image = matrix @ direction
        step = energy / (direction * image).sum(axis=0)
        u = u + step * direction
        residual = residual - step * image
        z = precondition(residual)
        energy, previous = (residual * z).sum(axis=0), energy
        direction = z + energy / previous * direction
    return u - ground.weights @ u
