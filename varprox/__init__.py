"""Variable projection for separable networks in JAX.

The prediction of a separable network is ``rows(θ) W``: nonlinear features followed by a linear last
layer. varprox solves for W at given θ and trains θ alone. What is left to minimise is the reduced
objective Φ_red(θ), the minimum of Φ(W, θ) over W.

What is minimised:

- ``Separable`` is the features and a head; ``Problem`` is a model, a loss and penalties, which make
  Φ; ``predict`` evaluates the model.
- Heads: ``dense``, ``conv``, ``conv_transpose``, or a ``Head`` of your own.
- Losses: ``least_squares``, ``softmax_cross_entropy``, ``logistic``, ``convex_loss``.
- Penalties on θ: a number, ``tikhonov``, ``smoothness_in_time``, or any smooth function.

Training:

- ``fit`` runs a method, or chooses one for a problem; ``fit_levels`` trains from coarse to fine.
  Both return a ``Solution``, whose ``Status`` says why the run ended.
- Full-batch methods: ``gnvpro``, ``broydenvpro``, ``lbfgsvpro``. For minibatches: ``slimtrain``.
- Each of them is a ``Method``, pure functions that also work in your own ``jit`` or ``scan``.
- ``covariance`` is how well the data determine the weights of a solution; with this ``Covariance``
  ``predict`` has error bars.

The pieces, for use on their own:

- ``solve_w`` is W(θ), ``reduced_objective`` is Φ_red(θ); both are differentiable.
- ``gauss_newton`` and ``newton`` give the ``Curvature`` of Φ_red.
- ``slimtik`` finds W from batches of design rows. Its regularisation is chosen by ``proportional``,
  ``sgcv``, ``supre``, ``sdp`` or ``constant``.

Submodules, loaded when they are first used:

- ``varprox.nnx`` takes flax models apart and puts the trained weights back, ``varprox.equinox``
  those of equinox, which has to be installed.
- ``varprox.transforms`` has slimTik and GNvpro as gradient transformations of optax.
- ``varprox.networks`` has networks as flax modules, ``varprox.datasets`` the data sets.

Data are (inputs, targets) or (inputs, targets, weights), with the batch first. Every function
follows the dtype of its inputs, float32 or float64. Work is counted in passes over the data,
forward or backward.
"""

import importlib
from typing import TYPE_CHECKING

from varprox.methods.gnvpro import gnvpro
from varprox.methods.method import Method, Status
from varprox.methods.quasi_newton import broydenvpro, lbfgsvpro
from varprox.methods.selection import constant, proportional, sdp, sgcv, supre
from varprox.methods.slimtik import slimtik
from varprox.methods.slimtrain import slimtrain
from varprox.problem.covariance import Covariance
from varprox.problem.heads import Head, conv, conv_transpose, dense
from varprox.problem.losses import convex_loss, least_squares, logistic, softmax_cross_entropy
from varprox.problem.model import Problem, Separable
from varprox.problem.penalties import smoothness_in_time, tikhonov
from varprox.problem.prediction import predict
from varprox.reduced.curvature import Curvature, gauss_newton, newton
from varprox.reduced.objective import reduced_objective, solve_w
from varprox.training.fit import fit
from varprox.training.levels import fit_levels
from varprox.training.many import fit_many
from varprox.training.solution import Solution, load
from varprox.training.uncertainty import covariance

__version__ = "0.1.0"
__all__ = [
    "Covariance", "Curvature", "Head", "Method", "Problem", "Separable", "Solution", "Status",
    "broydenvpro", "constant", "conv", "conv_transpose", "convex_loss", "covariance", "dense",
    "fit", "fit_levels", "fit_many", "gauss_newton", "gnvpro", "lbfgsvpro", "least_squares", "load",
    "logistic", "newton", "predict", "proportional", "reduced_objective", "sdp", "sgcv", "slimtik",
    "slimtrain", "smoothness_in_time", "softmax_cross_entropy", "solve_w", "supre", "tikhonov",
]  # fmt: skip


# These import other libraries, so only once they are used.
_EDGES = ("datasets", "equinox", "networks", "nnx", "transforms")

if TYPE_CHECKING:
    from varprox import datasets, equinox, networks, nnx, transforms  # noqa: F401


def __getattr__(name: str):
    if name in _EDGES:
        return importlib.import_module(f"varprox.{name}")
    raise AttributeError(f"module 'varprox' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_EDGES})
