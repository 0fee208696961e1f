"""Variable projection for separable networks in JAX."""

from varprox.curvature import gauss_newton, newton
from varprox.gnvpro import gnvpro
from varprox.heads import dense
from varprox.lbfgsvpro import lbfgsvpro
from varprox.losses import convex_loss, least_squares, logistic, softmax_cross_entropy
from varprox.model import Problem, Separable, predict
from varprox.penalties import smoothness_in_time, tikhonov
from varprox.reduced import reduced_objective, solve_w
