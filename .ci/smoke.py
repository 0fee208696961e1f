"""Trains a network with the installed package, whose version must be the argument."""

import sys

import jax
import jax.numpy as jnp
from flax import nnx

import varprox as vp

assert vp.__version__ == sys.argv[1], (vp.__version__, sys.argv[1])

inputs = jax.random.uniform(jax.random.key(0), (200, 2), minval=-1)
targets = jnp.sin(3 * inputs[:, :1] * inputs[:, 1:])
theta, model = vp.nnx.split(vp.networks.Dense((2, 8, 1), rngs=nnx.Rngs(0)))
problem = vp.Problem(model, vp.least_squares(), theta_penalty=1e-4, w_penalty=1e-4)
solution = vp.fit(problem, theta, (inputs, targets), max_work=2000)
print(solution)
assert solution.status == vp.Status.CONVERGED, solution
