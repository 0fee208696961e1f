"""Data sets of the papers' experiments, as NumPy arrays, batch first, in JAX's default float dtype.

They need nothing but NumPy and JAX until a file has to be downloaded or an equation solved. If a
package is then missing, the error names it.
"""

from varprox.datasets._cache import Dataset
from varprox.datasets.cifar10 import Cifar10, cifar10
from varprox.datasets.convection_diffusion_reaction import (
    ConvectionDiffusionReaction,
    cdr_observables,
    convection_diffusion_reaction,
)
from varprox.datasets.dc_resistivity import DcResistivity, dc_resistivity, dcr_observables
from varprox.datasets.ellipse import ellipse
from varprox.datasets.indian_pines import IndianPines, Pixels, indian_pines
from varprox.datasets.mnist import Mnist, mnist
from varprox.datasets.peaks import peaks, peaks_function

__all__ = [
    "Cifar10", "ConvectionDiffusionReaction", "Dataset", "DcResistivity", "IndianPines", "Mnist",
    "Pixels", "cdr_observables", "cifar10", "convection_diffusion_reaction", "dc_resistivity",
    "dcr_observables", "ellipse", "indian_pines", "mnist", "peaks", "peaks_function",
]  # fmt: skip
