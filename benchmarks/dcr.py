"""A surrogate of direct current resistivity: 3 parameters of a body to 882 potentials."""

from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import plots, surrogate
from varprox.datasets import dc_resistivity, dcr_observables
from varprox.datasets.dc_resistivity import SIDE, SPACING


def load(quick: bool) -> tuple:
    """800 samples, or 100."""
    return dc_resistivity(100 if quick else 800)


def draw(path: Path, targets: np.ndarray, predicted: np.ndarray) -> None:
    """The potentials of the first test sample for either source, less their training mean."""
    x = SPACING * (np.arange(SIDE) - SIDE // 2)
    shown = (array[0].reshape(2, SIDE, SIDE) for array in (targets, predicted))
    plots.maps(path, x, ("first source", "second source"), *shown)


SETTING = surrogate.Setting(
    "dcr",
    load,
    dcr_observables,
    timed=4,
    work=400,
    curvatures={
        "krylov": 2 * ({"curvature": "krylov"},),
        "dense": 2 * ({"curvature": "dense"},),
    },
    draw=draw,
)
run = partial(surrogate.run, SETTING)
# W alone has 15,000 entries, too many for Broyden on all weights.
add_options = partial(surrogate.add_options_of, surrogate.METHODS)
