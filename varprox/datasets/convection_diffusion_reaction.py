"""A convection–diffusion–reaction equation: from 55 reaction strengths to 72 observations.

In the closed unit square a source sets a substance free, a vortex stirs it, and it feeds
reactions::

    ∂u/∂t = ∇·(D ∇u) − v·∇u + f + Σ_j y_j r_j(u),   D ∂u/∂n = 0 on the boundary,   u = 0 at t = 0,

with D = 0.1, v = (sin πx₁ cos πx₂, −cos πx₁ sin πx₂) and f = 2 exp(−‖x − (0.3, 0.3)‖² / 0.08).
There are 55 reactions j = (k, l), those with k + l ≤ 9::

    r_j(u)(x) = 6 (1 + k² + l²)^(−3/2) cos(kπx₁) cos(lπx₂) u / (1 + u)

So Σ_j y_j r_j(u) is a smooth random field of rates times u / (1 + u), the law of Michaelis and
Menten: it is proportional to u for small u and saturates for large u. Where the rate is positive u
multiplies, at first exponentially; where it is negative u stays low. The strengths y_j are uniform
in (−1, 1); coarse reactions matter most. u is observed at 6 points, x₁ in {1/6, 1/2, 5/6} and x₂ in
{1/4, 3/4}, and at 12 times, 1/12, 2/12, …, 1. No quantity has a unit.

Space is discretised by biquadratic finite elements on 12 × 12 squares with Simpson's rule. Under
this rule the mass matrix is diagonal, and the values at the nodes, among them the points of
observation, converge with order 4. Time is discretised by SciPy's BDF. Both together err by less
than 1% of the standard deviation of each observation.

The setting is taken from Newman, Ruthotto, Hart and van Bloemen Waanders, arXiv:2007.13171; D, v,
f, the reactions, the points and the times are chosen here.
"""

from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from varprox.datasets._cache import _require, check_integer, find_file, float_dtype, simulated

URL = "http://www.mathcs.emory.edu/~lruthot/pubs/2020-GNvpro/CDR_Data.mat"

DIFFUSION = 0.1
SPEED = 1.0
STRENGTH, CENTRE, WIDTH = 2.0, (0.3, 0.3), 0.2  # of the source
RATE, DECAY = 6.0, 1.5  # of the reactions
MODES = np.array([(k, degree - k) for degree in range(10) for k in range(degree + 1)])
SENSORS = np.array([(x1, x2) for x2 in (1 / 4, 3 / 4) for x1 in (1 / 6, 1 / 2, 5 / 6)])
TIMES = np.arange(1, 13) / 12

CELLS = 12  # squares a side; the points of observation are then nodes
GROUP = 20  # samples integrated together
RTOL, ATOL = 1e-5, 1e-7


class ConvectionDiffusionReaction(NamedTuple):
    """Samples of the convection–diffusion–reaction equation.

    Attributes:
        train: The pair (inputs (n, 55), targets (n, 72)) to train on.
        validation: Such a pair to validate on.
        test: Such a pair to test on.

    Example:
        >>> import varprox as vp
        >>> data = vp.datasets.convection_diffusion_reaction(40, 20, 20)  # doctest: +SKIP
        >>> data.train[1].shape, data.validation[1].shape  # doctest: +SKIP
        ((40, 72), (20, 72))
    """

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def convection_diffusion_reaction(
    n: int = 400,
    n_validation: int = 200,
    n_test: int = 200,
    *,
    seed: int = 0,
    source: str = "simulated",
) -> ConvectionDiffusionReaction:
    """Regression of the observations of a convection–diffusion–reaction equation.

    Inputs are the strengths of 55 reactions, and targets the 72 observations that `cdr_observables`
    makes of them. Neither is shifted or scaled.

    With ``source="simulated"`` inputs are uniform in (−1, 1). Each set is drawn and simulated by
    itself, so none depends on the size of another, and a smaller set is the beginning of a larger
    one: exactly in its inputs, and to the solver's tolerance in its targets. The first call takes
    about a minute on two cores; the arrays are then kept in the user's cache.

    With ``source="original"`` the samples are the 800 that the authors of arXiv:2007.13171
    published, in an order drawn from the seed: first the training set, then the validation set,
    then the test set. Their file CDR_Data.mat is looked for in the folder that the environment
    variable VARPROX_DATA names, then in the user's cache, and is downloaded if it is in neither.

    Arguments:
        n: The number of training samples, an integer ≥ 1.
        n_validation: The number of validation samples, an integer ≥ 1.
        n_test: The number of test samples, an integer ≥ 1.
        seed: An integer ≥ 0, which fixes the samples.
        source: "simulated" or "original".

    Returns:
        A `ConvectionDiffusionReaction` with inputs (n, 55) and targets (n, 72) in JAX's default
        float dtype.

    Raises:
        TypeError: If a size or `seed` is not an integer.
        ValueError: If a size is below 1, `seed` is below 0, `source` is another one, more than 800
            original samples are asked for, or a file does not hold the data.
        ImportError: If scikit-fem, which simulates, or pooch, which downloads, is missing.
        NotADirectoryError: If VARPROX_DATA names no folder.
        OSError: If the download fails.

    Example:
        >>> import varprox as vp
        >>> data = vp.datasets.convection_diffusion_reaction(40, 20, 20)  # doctest: +SKIP
        >>> data.train[0].shape, data.train[1].shape  # doctest: +SKIP
        ((40, 55), (40, 72))
    """
    sizes = {"n": n, "n_validation": n_validation, "n_test": n_test}
    sizes = {name: check_integer(name, size, least=1) for name, size in sizes.items()}
    seed = check_integer("seed", seed, least=0)
    if source == "simulated":
        pairs = _simulated(list(sizes.values()), seed)
    elif source == "original":
        pairs = _original(list(sizes.values()), seed)
    else:
        raise ValueError(f'source: expected "simulated" or "original", got {source!r}')
    dtype = float_dtype()
    return ConvectionDiffusionReaction(*((y.astype(dtype), c.astype(dtype)) for y, c in pairs))


def cdr_observables(parameters: np.ndarray) -> np.ndarray:
    """The solution at 6 points and 12 times, for each row of strengths of the 55 reactions.

    The docstring of the module `varprox.datasets.convection_diffusion_reaction` states the
    equation. Rows are integrated 20 at a time, with a progress bar on stderr. The other rows of a
    group change a result within the solver's tolerance.

    Arguments:
        parameters: The strengths y, (n, 55), of reactions ordered by k + l and then by k.

    Returns:
        The observations (n, 72), float64. Reshaped to (n, 6, 12) they have points and times as
        axes, with points ordered so that x₁ runs fastest.

    Raises:
        ValueError: If `parameters` has another shape, or holds NaN or Inf.
        ImportError: If scikit-fem is missing.
        RuntimeError: If the solver fails.

    Example:
        >>> import numpy as np
        >>> import varprox as vp
        >>> u = vp.datasets.cdr_observables(np.zeros((1, 55))).reshape(1, 6, 12)
        >>> bool((np.diff(u[0, 0]) > 0).all())  # without reactions u rises with time
        True
    """
    y = np.asarray(parameters, float)
    if y.ndim != 2 or y.shape[1] != len(MODES) or not len(y):
        raise ValueError(f"parameters: expected shape (n, {len(MODES)}), got {y.shape}")
    if not np.isfinite(y).all():
        raise ValueError("parameters: expected finite numbers, got NaN or Inf")
    system = _system(CELLS)
    groups = np.split(y, range(GROUP, len(y), GROUP))
    bar = tqdm(groups, desc="convection–diffusion–reaction", unit=" groups")
    return np.concatenate([_observe(system, group).reshape(len(group), -1) for group in bar])


class _System(NamedTuple):
    """The semi-discrete equation u' = transport u + source + (y rates) u / (1 + u) at N nodes."""

    transport: Any  # sparse (N, N)
    source: np.ndarray  # (N,)
    rates: np.ndarray  # (55, N)
    sensors: Any  # sparse (6, N), from the nodes to the points of observation
    nodes: np.ndarray  # (2, N)


def _system(cells: int) -> _System:
    """Biquadratic elements on `cells` × `cells` squares, under Simpson's rule."""
    skfem = _require("skfem", purpose="the convection–diffusion–reaction data set")
    from scipy import sparse  # which comes with skfem
    from skfem.helpers import dot, grad

    at, weights = np.array([0, 0.5, 1]), np.array([1, 4, 1]) / 6
    simpson = np.stack(np.meshgrid(at, at)).reshape(2, -1), np.outer(weights, weights).ravel()
    ticks = np.linspace(0, 1, cells + 1)
    mesh = skfem.MeshQuad.init_tensor(ticks, ticks)
    basis = skfem.Basis(mesh, skfem.ElementQuad2(), quadrature=simpson)

    def transport(u, test, w):
        x1, x2 = np.pi * w.x
        velocity = SPEED * np.stack([np.sin(x1) * np.cos(x2), -np.cos(x1) * np.sin(x2)])
        return DIFFUSION * dot(grad(u), grad(test)) + dot(velocity, grad(u)) * test

    mass = skfem.BilinearForm(lambda u, test, _: u * test).assemble(basis).diagonal()
    flux = skfem.BilinearForm(transport).assemble(basis)
    nodes = basis.doflocs
    distance = np.sum((nodes - np.array(CENTRE)[:, None]) ** 2, axis=0)
    scales = RATE * (1 + np.sum(MODES**2, axis=1)) ** -DECAY
    return _System(
        transport=sparse.csr_array(-sparse.diags_array(1 / mass) @ flux),
        source=STRENGTH * np.exp(-distance / (2 * WIDTH**2)),
        rates=scales[:, None] * np.cos(np.pi * MODES[:, :, None] * nodes).prod(axis=1),
        sensors=basis.probes(SENSORS.T),
        nodes=nodes,
    )


def _observe(system: _System, y: np.ndarray, times=TIMES, rtol=RTOL, atol=ATOL) -> np.ndarray:
    """Observations (samples, points, times) for y (samples, 55), integrated as one system."""
    from scipy import sparse
    from scipy.integrate import BDF, solve_ivp

    rates = (y @ system.rates).T
    source = system.source[:, None]
    linear = sparse.csc_array(sparse.kron(system.transport, sparse.eye_array(len(y))))

    def derivative(_, u):
        u = u.reshape(rates.shape)
        return (system.transport @ u + source + rates * u / (1 + u)).ravel()

    def jacobian(_, u):
        return linear + sparse.diags_array(rates.ravel() / (1 + u) ** 2, format="csc")

    class Clean(BDF):
        """SciPy's, whose first step subtracts a row of differences that is not yet set: without
        consequence, but a warning where this memory happens to hold a signalling NaN."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.D[2:] = 0

    found = solve_ivp(
        derivative,
        (0, times[-1]),
        np.zeros(rates.size),
        method=Clean,
        t_eval=times,
        jac=jacobian,
        rtol=rtol,
        atol=atol,
    )
    if not found.success:
        raise RuntimeError(f"the simulation failed: {found.message}")
    states = found.y.reshape(*rates.shape, len(times))
    return np.stack([system.sensors @ states[:, i] for i in range(len(y))])


def _simulated(sizes, seed):
    """A pair (inputs, targets) for each size, from the cache or new."""

    def simulate():
        arrays: dict[str, np.ndarray] = {}
        # A stream of random numbers for each set: their sizes do not touch one another.
        streams = np.random.default_rng(seed).spawn(len(sizes))
        for i, (size, rng) in enumerate(zip(sizes, streams, strict=True)):
            y = rng.uniform(-1, 1, (size, len(MODES)))
            arrays |= {f"inputs_{i}": y, f"targets_{i}": cdr_observables(y)}
        return arrays

    parameters = {
        "version": 1,  # to be raised with every change of the code that changes a result
        "sizes": sizes,
        "seed": seed,
        "diffusion": DIFFUSION,
        "speed": SPEED,
        "source": [STRENGTH, CENTRE, WIDTH],
        "rate": [RATE, DECAY],
        "modes": MODES.tolist(),
        "sensors": SENSORS.tolist(),
        "times": TIMES.tolist(),
        "cells": CELLS,
        "group": GROUP,
        "tolerances": [RTOL, ATOL],
    }
    arrays = simulated("convection_diffusion_reaction", parameters, simulate)
    return [(arrays[f"inputs_{i}"], arrays[f"targets_{i}"]) for i in range(len(sizes))]


def _original(sizes, seed):
    """A pair (inputs, targets) for each size, from the file that the authors published."""
    if sum(sizes) > 800:
        raise ValueError(f"n + n_validation + n_test: expected at most 800, got {sum(sizes)}")
    loadmat = _require("scipy.io", purpose="reading CDR_Data.mat").loadmat
    path = find_file("CDR_Data.mat", URL, known_hash=None)
    expected = {"Y": (55, 800), "C": (72, 800)}
    try:
        content = loadmat(path)
        arrays = {name: np.asarray(content[name], float) for name in expected}
    except Exception as error:  # the reader promises no type for a damaged file
        raise _wrong(path, f"a file that cannot be read: {error!r}") from error
    shapes = {name: array.shape for name, array in arrays.items()}
    if shapes != expected:
        raise _wrong(path, f"shapes {shapes}")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise _wrong(path, "NaN or Inf")
    order = np.random.default_rng(seed).permutation(800)
    parts = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    return [(arrays["Y"].T[part], arrays["C"].T[part]) for part in parts]


def _wrong(path, found):
    return ValueError(
        f"{path}: expected finite arrays Y (55, 800) and C (72, 800) as published, got {found}; "
        f"delete the file to have it fetched again"
    )
