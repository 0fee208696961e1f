"""A surrogate of a convection–diffusion–reaction equation: 55 reaction strengths to 72
observations."""

from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import plots, surrogate
from varprox.datasets import cdr_observables, convection_diffusion_reaction
from varprox.datasets.convection_diffusion_reaction import SENSORS, TIMES

SHOWN = 3  # test samples


def load(quick: bool) -> tuple:
    """400 samples for training, 200 for validation and 200 for testing, or a quarter of them."""
    return convection_diffusion_reaction(*((100, 50, 50) if quick else (400, 200, 200)))


def draw(path: Path, targets: np.ndarray, predicted: np.ndarray) -> None:
    """The observations of some test samples over time."""
    shape = SHOWN, len(SENSORS), len(TIMES)
    names = [f"({x:.2f}, {y:.2f})" for x, y in SENSORS]
    shown = (array[:SHOWN].reshape(shape) for array in (targets, predicted))
    plots.series(path, TIMES, names, *shown)


SETTING = surrogate.Setting(
    "cdr",
    load,
    cdr_observables,
    timed=20,
    work=200,
    curvatures={
        "krylov": 2 * ({"curvature": "krylov"},),
        "whitened": 2 * ({"curvature": "krylov", "whiten": True},),
        "krylov, then dense": ({"curvature": "krylov"}, {"curvature": "dense"}),
    },
    draw=draw,
)
run = partial(surrogate.run, SETTING)
add_options = partial(surrogate.add_options_of, (*surrogate.METHODS, "broyden"))
