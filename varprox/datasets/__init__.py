"""Data sets of the papers' experiments, as NumPy arrays, batch first, in jax's default float dtype.

Nothing but NumPy and jax is needed until a file has to be fetched or an equation solved; what is
then missing is named in the error.
"""

from varprox.datasets._cache import Dataset
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
    "ConvectionDiffusionReaction", "Dataset", "DcResistivity", "IndianPines", "Mnist", "Pixels",
    "cdr_observables", "convection_diffusion_reaction", "dc_resistivity", "dcr_observables",
    "ellipse", "indian_pines", "mnist", "peaks", "peaks_function",
]  # fmt: skip
