"""The problems of the zoo: small, of every kind, each with a start for every seed.

They are made in double precision and cast, so both precisions have the same data and starts.
Problems whose names agree up to the first dash share their features and shapes, hence what is
compiled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

import varprox as vp
from benchmarks.zoo_features import (
    bells,
    bells_in_plane,
    collocated,
    convolved,
    decays,
    enzyme,
    extended,
    gated,
    hyperbolas,
    lorentzians,
    normalised,
    oscillator,
    rates,
    ridges,
    solved,
    steps,
    waves,
)
from varprox.datasets.peaks import peaks_function


class Start(NamedTuple):
    """A problem, the θ that every method starts from, and its data."""

    problem: vp.Problem
    theta: Any
    data: tuple


class Case(NamedTuple):
    """A problem of the zoo. If `coupled`, its features need the whole batch."""

    name: str
    family: str
    make: Callable[[int], Start]  # of a seed, under x64
    coupled: bool = False

    @property
    def group(self) -> str:
        """What the problems that share their compiled functions have in common."""
        return self.name.partition("-")[0]


def start(case: Case, seed: int) -> Start:
    """The start of a seed in JAX's default precision."""
    with jax.enable_x64(True):
        made = case.make(seed)
    return cast(made, jnp.result_type(float))


def cast(tree: Any, dtype: Any) -> Any:
    """Floating arrays as arrays of `dtype`; Python numbers stay what they are."""

    def leaf(x):
        floating = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(x, dtype) if floating else x

    return jax.tree.map(leaf, tree)


# What makes problems of features.


def least_squares(features, *, bias=False, theta_penalty=0.0, w_penalty=0.0):
    model = vp.Separable(features, head=vp.dense(bias=bias))
    return vp.Problem(model, vp.least_squares(), theta_penalty, w_penalty)


def curve(
    features,
    inputs,
    truth,
    weights,
    spread,
    *,
    noise=0.01,
    unit=1.0,
    offset=0.0,
    bias=False,
    penalty=0.0,
    centre=None,
):
    """A sum of features with known parameters; starts are normal about `centre`, by default the
    truth's mean over the terms."""
    truth, weights = np.asarray(truth, float), np.asarray(weights, float)
    if centre is None:
        centre = truth.mean(axis=-1, keepdims=True)

    def make(seed):
        rng = np.random.default_rng(1)
        clean = np.asarray(features(jnp.asarray(truth), jnp.asarray(inputs))) @ weights
        targets = unit * (clean + noise * rng.normal(size=clean.shape)) + offset
        theta = centre + spread * np.random.default_rng(seed).normal(size=truth.shape)
        problem = least_squares(features, bias=bias, theta_penalty=penalty, w_penalty=penalty)
        return Start(problem, theta, (inputs, targets))

    return make


def split(net):
    """θ and model of a network of flax."""

    def make(rng, seed):
        del rng
        return vp.nnx.split(net(nnx.Rngs(seed)))

    return make


def own(features, shapes):
    """θ of these shapes and its model: normal with deviation 1/√(inputs), but biases zero."""

    def make(rng, seed):
        del seed
        theta = {
            name: rng.normal(size=shape) / np.sqrt(shape[0]) if len(shape) > 1 else np.zeros(shape)
            for name, shape in shapes.items()
        }
        return theta, vp.Separable(features)

    return make


def network(
    start_weights,
    data,
    *,
    scale=1.0,
    penalty=1e-8,
    w_penalty=None,
    unit=1.0,
    offset=0.0,
    loss=None,
):
    """A network from start weights `scale` times as large as usual; targets in other units, with
    the penalty on θ that leaves the problem the same."""

    def make(seed):
        theta, model = start_weights(np.random.default_rng(seed), seed)
        theta = jax.tree.map(lambda x: scale * x, theta)
        inputs, targets = data(np.random.default_rng(2))
        on_w = penalty if w_penalty is None else w_penalty
        problem = vp.Problem(model, loss or vp.least_squares(), unit**2 * penalty, on_w)
        return Start(problem, theta, (inputs, unit * targets + offset))

    return make


def peaks(count, rng):
    x = rng.uniform(-3, 3, (count, 2))
    return x, peaks_function(x)


def three_surfaces(count, rng):
    x = rng.uniform(-1, 1, (count, 2))
    columns = np.sin(3 * x[:, 0] * x[:, 1]), np.exp(-3 * (x**2).sum(axis=1)), x[:, 0] ** 3
    return x, np.stack(columns, axis=1)


def ripples(count, rng):
    x = rng.uniform(-1, 1, (count, 2))
    return x, np.sin(6 * x[:, :1] + 2 * x[:, 1:]) + 0.5 * np.cos(5 * x[:, 1:] ** 2)


def sequences(count, rng):
    x = rng.uniform(-1, 1, (count, 10))
    return x, np.sin(2 * x) @ 0.8 ** np.arange(10)[::-1, None] + x[:, -1:] * x[:, -3:-2]


def cube(count, rng):
    x = rng.uniform(-1, 1, (count, 3))
    return x, np.sin(3 * x[:, :1] * x[:, 1:2]) + 0.5 * x[:, 2:] ** 2


def rings(count, rng):
    """Inside or outside of a ring, a twentieth of the labels being wrong."""
    x = rng.uniform(-1, 1, (count, 2))
    radius = np.hypot(*x.T)
    wrong = rng.uniform(size=count) < 0.05
    return x, (((radius > 0.4) & (radius < 0.8)) ^ wrong)[:, None].astype(float)


def spirals(count, rng):
    """Three arms that wind about the origin."""
    arm = rng.integers(3, size=count)
    radius = np.sqrt(rng.uniform(0.02, 1, count))
    angle = 2 * np.pi * arm / 3 + 4 * radius + 0.25 * rng.normal(size=count)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), np.eye(3)[arm]


def square(operator, source, value, *, sides, penalty=1e-12):
    """Collocation on the unit square; `value` is the solution on the first `sides` of left, right,
    lower and upper edge, which weigh ten times as much as the inside."""

    def make(seed):
        line = (np.arange(12) + 0.5) / 12
        inside = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
        ends = np.linspace(0, 1, 60 // sides)
        edges = [(0 * ends, ends), (0 * ends + 1, ends), (ends, 0 * ends), (ends, 0 * ends + 1)]
        x = np.concatenate([inside, *(np.stack(edge, axis=1) for edge in edges[:sides])])
        within = np.arange(len(x))[:, None] < len(inside)
        weight = np.where(within, 1.0, 10.0)
        targets = weight * np.where(within, source(x), value(x))
        rng = np.random.default_rng(seed)
        theta = {"kernel": rng.normal(size=(2, 16)), "bias": rng.normal(size=16)}
        features = Partial(collocated, tuple(np.array(order, float) for order in operator))
        problem = least_squares(features, theta_penalty=penalty, w_penalty=penalty)
        return Start(problem, theta, ((x, within, weight), targets))

    return make


def instrument(count):
    """The response of an instrument, and the times."""
    t = np.arange(count) * 0.05
    response = np.exp(-0.5 * ((t - 1) / 0.12) ** 2)
    return Partial(convolved, response / response.sum()), t


def dense(sizes, **options):
    return split(lambda rngs: vp.networks.Dense(sizes, rngs=rngs, **options))


def _scales(name, family, make, scales=(1, 3, 10)):
    """From start weights of several sizes."""
    return [Case(f"{name}-scale{scale}", family, make(scale=float(scale))) for scale in scales]


def _penalties(name, family, make, penalties):
    return [Case(f"{name}-penalty{p:g}", family, make(penalty=p)) for p in penalties]


def _units(name, make, offset):
    """Targets in other units; an offset wants a bias."""
    units = [Case(f"{name}-times{unit:g}", "units", make(unit=unit)) for unit in (1e-6, 1e6)]
    return units + [Case(f"{name}-plus1e4", "units", make(offset=1e4))] * offset


def _noises(name, family, make):
    """Targets with a little noise, none and much."""
    noises = {"": 0.01, "-exact": 0.0, "-noisy": 0.2}
    return [Case(name + suffix, family, make(noise=noise)) for suffix, noise in noises.items()]


SHORT, MIDDLE, LONG = np.linspace(0, 5, 30), np.linspace(0, 10, 100), np.linspace(0, 10, 500)
CENTRED = np.linspace(-1, 1, 200)


def exponentials() -> list[Case]:
    two, three, four = np.log([0.5, 3.0]), np.log([0.15, 0.9, 5.0]), np.log([0.2, 0.7, 2.0, 6.0])
    exp2 = partial(curve, decays, SHORT, two, [[1.0], [2.0]])
    exp3 = partial(curve, decays, MIDDLE, three, [[1.0], [2.0], [2.0]], 1.5)
    exp4 = partial(curve, decays, LONG, four, np.ones((4, 1)), 1.0)
    fast = curve(decays, 1e-6 * SHORT, two + np.log(1e6), [[1.0], [2.0]], 1.0)
    mixed = np.random.default_rng(0).normal(size=(3, 5))
    damped = [np.log([0.1, 0.3]), [1.0, 2.5]]
    name = "exponentials"
    return [
        *_noises("exp2", name, partial(exp2, spread=1.0)),
        Case("exp2-fast", name, fast),
        Case("exp2-equal", name, exp2(spread=1e-3)),
        *_noises("exp3", name, exp3),
        *_units("exp3", exp3, offset=False),
        *_penalties("exp3", "penalties", exp3, (1e-14, 1e-8, 1e-3)),
        Case("exp4", name, exp4()),
        Case("exp4-exact", name, exp4(noise=0.0)),
        Case("rates", name, curve(rates, SHORT, np.exp(two), [[1.0], [2.0]], 0.01, centre=1.0)),
        Case("waves", name, curve(waves, MIDDLE, damped, np.ones((4, 1)), 0.4)),
        Case("global", "multi-output", curve(decays, MIDDLE, three, mixed, 1.0)),
    ]


def bumps() -> list[Case]:
    """Gaussians and rationals."""
    three = [[-0.5, 0.1, 0.5], np.log([0.1, 0.2, 0.15])]
    gauss3 = partial(curve, bells, CENTRED, three, [[1.0], [2.0], [1.5]], [[0.4], [0.5]], bias=True)
    plane = np.random.default_rng(3).uniform(-2, 2, (300, 2))
    hills = [[-1.0, 1.0, 0.2], [-0.5, 0.3, 1.0], np.log([0.5, 0.6, 0.4])]
    two = [[-0.3, 0.4], np.log([0.1, 0.2])]
    four = [[-0.7, -0.2, 0.2, 0.6], np.log([0.1, 0.1, 0.2, 0.05])]
    near = [four[0], 4 * [np.log(0.15)]]
    steep = [[-0.5, 1.5], np.log([0.5, 0.3])]
    many = np.linspace(-1, 1, 400)
    lorentz2 = partial(curve, lorentzians, CENTRED[::2], two, [[1.0], [2.0]], 0.3)
    lorentz4 = partial(
        curve, lorentzians, many, four, np.ones((4, 1)), [[0.2], [0.3]], centre=near, bias=True
    )
    ratios = partial(curve, hyperbolas, MIDDLE, np.log([0.3, 6.0]), [[1.0], [2.0]], 1.0)
    return [
        *_noises("gauss3", "Gaussians", gauss3),
        *_units("gauss3", gauss3, offset=True),
        Case(
            "plane", "Gaussians", curve(bells_in_plane, plane, hills, [[1.0], [-2.0], [1.5]], 0.5)
        ),
        *_noises("lorentz2", "rationals", lorentz2),
        Case("lorentz4", "rationals", lorentz4()),
        Case("hyperbolas", "rationals", ratios()),
        Case("hyperbolas-exact", "rationals", ratios(noise=0.0)),
        Case("steps", "rationals", curve(steps, SHORT - 2, steep, [[1.0], [0.5]], 0.3, bias=True)),
    ]


def deficient() -> list[Case]:
    """Columns that depend on one another, and fewer samples than columns."""
    two, family = np.log([0.5, 3.0]), "rank-deficient"

    def column(multiple, constant):
        features = Partial(extended, np.array([multiple, constant]))
        return partial(curve, features, MIDDLE, two, [[1.0], [2.0], [0.5]], 1.0, bias=True)

    rng = np.random.default_rng(4)
    wide = partial(
        curve, ridges, SHORT[:20] - 2, rng.normal(size=(2, 40)), rng.normal(size=(40, 1)), 1.0
    )
    return [
        Case("column-twice", family, column(1.0, 0.0)()),
        Case("column-twice-exact", family, column(1.0, 0.0)(noise=0.0)),
        Case("column-zero", family, column(0.0, 0.0)()),
        Case("column-one", family, column(0.0, 1.0)()),
        Case("column-nearly", family, column(1.0, 1e-7)()),
        *_penalties("wide", family, wide, (1e-8, 1e-3)),
    ]


def networks() -> list[Case]:
    surface, few = partial(peaks, 200), partial(peaks, 40)
    net = partial(network, dense((2, 10, 10, 1)), surface)
    rectified = dense((2, 10, 10, 1), activation=nnx.relu)
    flow = split(
        lambda rngs: vp.networks.AntisymmetricResNet(2, 5, 1, steps=3, final_time=3.0, rngs=rngs)
    )
    residual = split(lambda rngs: vp.networks.ResNet(2, 5, 1, steps=4, final_time=3.0, rngs=rngs))
    gru = own(gated, {"outer": (1, 18), "inner": (6, 18), "bias": (18,)})
    wide = dense((2, 14, 14, 1))
    several = network(dense((2, 8, 8, 3)), partial(three_surfaces, 200))
    return [
        *_scales("dense", "dense", net),
        *_penalties("dense", "penalties", net, (0.0, 1e-14, 1e-3)),
        *_units("dense", net, offset=True),
        Case("dense-ripples", "dense", network(net.args[0], partial(ripples, 200))),
        *_scales("relu", "relu", partial(network, rectified, surface)),
        *_scales("flow", "flow", partial(network, flow, surface)),
        *_scales("residual", "residual", partial(network, residual, surface)),
        *_scales("gru", "gru", partial(network, gru, partial(sequences, 150))),
        Case("surfaces", "multi-output", several),
        Case("few", "n < weights", network(wide, few)),
        Case("few-penalty0", "n < weights", network(wide, few, penalty=0.0)),
    ]


def classes() -> list[Case]:
    weak, strong = {"penalty": 1e-6, "w_penalty": 1e-4}, {"penalty": 1e-3, "w_penalty": 1e-2}
    ring = partial(network, dense((2, 8, 8, 1)), partial(rings, 200), loss=vp.logistic())
    cross_entropy = vp.softmax_cross_entropy()
    spiral = partial(network, dense((2, 8, 8, 3)), partial(spirals, 240), loss=cross_entropy)
    return [
        *_scales("logistic", "logistic", partial(ring, **weak), (1, 3)),
        Case("logistic-strong", "logistic", ring(**strong)),
        *_scales("softmax", "softmax", partial(spiral, **weak), (1, 3)),
        Case("softmax-strong", "softmax", spiral(**strong)),
    ]


def whole_batches() -> list[Case]:
    """Features that couple samples: convolutions, normalisation over the batch, solutions of
    ordinary differential equations."""
    seen, times = instrument(128)
    convolution = partial(curve, seen, times, np.log([0.4, 2.5]), [[1.0], [3.0]], 1.0)
    batch = own(normalised, {"kernel": (3, 8), "shift": (8,), "scale": (8,)})
    grid, initial = np.linspace(0, 8, 60), np.array([1.0, 0.0])
    reaction = Partial(solved, Partial(enzyme), initial)
    oscillation = Partial(solved, Partial(oscillator), initial)
    made = {
        "convolved": ("coupled", convolution()),
        "convolved-exact": ("coupled", convolution(noise=0.0)),
        "normalised": ("coupled", network(batch, partial(cube, 100))),
        "enzyme": ("ODE", curve(reaction, grid, np.log([0.8, 0.3, 0.5]), np.eye(2), 0.5)),
        "enzyme-exact": (
            "ODE",
            curve(reaction, grid, np.log([0.8, 0.3, 0.5]), np.eye(2), 0.5, noise=0.0),
        ),
        "oscillator": ("ODE", curve(oscillation, grid, np.log([0.5, 1.5]), [[1.0], [0.3]], 0.2)),
    }
    return [Case(name, family, make, coupled=True) for name, (family, make) in made.items()]


def equations() -> list[Case]:
    """Linear partial differential equations: Poisson's; of (x, t), heat and advection."""

    def wave(x):
        return np.sin(np.pi * x[:, :1])

    def bump(x):
        return wave(x) * wave(x[:, 1:])

    def cooled(x):
        return wave(x) * np.exp(-0.2 * np.pi**2 * x[:, 1:])

    def moved(x):
        return np.sin(2 * np.pi * (x[:, :1] - x[:, 1:]))

    def zero(x):
        return np.zeros((len(x), 1))

    laplacian, diffusion = ([0, 0], [1, 1]), ([0, 1], [-0.2, 0])
    poisson = partial(square, laplacian, lambda x: -2 * np.pi**2 * bump(x), bump, sides=4)
    heat = partial(square, diffusion, zero, cooled, sides=3)
    advection = partial(square, ([1, 1], [0, 0]), zero, moved, sides=3)
    made = {"poisson": poisson, "heat": heat, "advection": advection}
    weak = [Case(f"square-{name}", "collocation", make()) for name, make in made.items()]
    return [*weak, Case("square-poisson-penalised", "collocation", poisson(penalty=1e-6))]


CASES = (
    exponentials() + bumps() + deficient() + networks() + classes() + whole_batches() + equations()
)
