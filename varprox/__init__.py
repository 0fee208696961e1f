"""Variable projection for separable networks in JAX: see README.md and the docstrings below."""

import importlib

from varprox.curvature import Curvature, gauss_newton, newton
from varprox.fit import Solution, fit, fit_levels
from varprox.gnvpro import gnvpro
from varprox.heads import Head, conv, conv_transpose, dense
from varprox.losses import convex_loss, least_squares, logistic, softmax_cross_entropy
from varprox.method import Method, Status
from varprox.model import Problem, Separable, predict
from varprox.penalties import smoothness_in_time, tikhonov
from varprox.quasi_newton import broydenvpro, lbfgsvpro
from varprox.reduced import reduced_objective, solve_w
from varprox.selection import constant, proportional, sdp, sgcv, supre
from varprox.slimtik import slimtik
from varprox.slimtrain import slimtrain

__version__ = "0.1.0"
__all__ = [
    "Curvature", "Head", "Method", "Problem", "Separable", "Solution", "Status", "broydenvpro",
    "constant", "conv", "conv_transpose", "convex_loss", "dense", "fit", "fit_levels",
    "gauss_newton", "gnvpro", "lbfgsvpro", "least_squares", "logistic", "newton", "predict",
    "proportional", "reduced_objective", "sdp", "sgcv", "slimtik", "slimtrain",
    "smoothness_in_time", "softmax_cross_entropy", "solve_w", "supre", "tikhonov",
]  # fmt: skip


def __getattr__(name: str):
    """Loads the edges, which import flax, when they are first used."""
    if name in ("datasets", "networks", "nnx", "transforms"):
        return importlib.import_module(f"varprox.{name}")
    raise AttributeError(f"module 'varprox' has no attribute {name!r}")
