"""What the Krylov spaces of earlier steps are worth to the next one, in products."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import varprox as vp
from benchmarks.experiment import Task
from varprox.numerics.recycling import nothing_yet
from varprox.numerics.trust_region import krylov_space
from varprox.reduced.curvature import linearise

RANK, STEPS = 20, 15


def products_saved(task: Task) -> dict:
    """How many products a recycled Krylov space takes to the model decrease of a plain one of
    `RANK` products: for every step of a run of GNvpro from the second on, and their median.

    Both spaces are those of the Gauss–Newton matrix at the same θ, and the decrease is that of
    their unconstrained minimisers. None stands for more than `RANK`.
    """
    method = vp.gnvpro(task.problem, curvature="krylov", rank=RANK)
    state = method.init(task.theta, task.train)
    plain = nothing_yet(0, ravel_pytree(task.theta)[0])
    counts = []
    for _ in range(STEPS):
        state, _ = method.step(state, task.train)
        target, found = (
            np.asarray(_decreases(task.problem, state.theta, task.train, recycled))
            for recycled in (plain, state.form.recycled)
        )
        (reached,) = np.nonzero(found >= target[-1])
        counts.append(int(reached[0]) + 1 if len(reached) else None)
    known = [RANK + 1 if count is None else count for count in counts]
    return {"plain": RANK, "recycled": counts, "median": float(np.median(known))}


@jax.jit
def _decreases(problem, theta, data, recycled):
    """Of the model, after each product."""
    _, unravel = ravel_pytree(theta)
    curvature = linearise(problem, theta, data)
    root = recycled.root

    def matvec(v):
        return root(ravel_pytree(curvature.matvec(unravel(root(v))))[0])

    gradient = root(ravel_pytree(curvature.gradient)[0])
    space = krylov_space(matvec, gradient, jnp.inf, rank=RANK, flat=-jnp.inf)
    t = space.tridiagonal
    matrix = jnp.diag(t.diagonal) + jnp.diag(t.off_diagonal[:-1], 1)
    matrix = matrix + jnp.diag(t.off_diagonal[:-1], -1)
    start = space.start_norm * jnp.eye(RANK)[0]

    def decrease(size):
        used = jnp.arange(RANK) < size
        of_space = jnp.where(used[:, None] & used, matrix, jnp.eye(RANK))
        return 0.5 * start @ jnp.linalg.solve(of_space, start)

    return jnp.stack([decrease(size) for size in range(1, RANK + 1)])
