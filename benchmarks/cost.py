"""What variable projection adds to the cost of the network's own passes, measured."""

import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import varprox as vp
from varprox.methods.quasi_newton import ACCURACY
from varprox.problem.model import Problem
from varprox.reduced.curvature import linearise
from varprox.reduced.projection import project, start_projection
from varprox.reduced.w_hessian import hessian_factor

PRODUCTS = 10
REPEATS = 11


def product_ratio(problem: Problem, theta: Any, data: tuple) -> float:
    """The time of a Krylov product of GNvpro over that of one jvp and one vjp of the features.

    Both are loops over products in one compiled function of θ, of which the time of an empty loop,
    that of the linearisation, is subtracted. They are measured in turns; the ratio is the median of
    the ratios of single turns.
    """
    at = _projection(problem, theta, data)
    ours = partial(_curvature_products, problem, theta, at, data)
    features = partial(_feature_products, problem, theta, data)
    for products in (ours, features):
        _seconds(products, 0)  # compiles

    ratios = []
    for _ in range(REPEATS):
        spent, spent_by_features = (
            _seconds(products, PRODUCTS) - _seconds(products, 0) for products in (ours, features)
        )
        ratios.append(spent / spent_by_features)
    return statistics.median(ratios)


def solve_ratio(problem: Problem, theta: Any, data: tuple, work: float) -> float:
    """What a W-solve inside an LBFGSvpro run costs, as a multiple of one forward and reverse pass.

    The solve of every step of a run of `work` units, the making of factors included, is done again
    from the same start to the same accuracy and timed, and beside it one forward and one reverse
    pass of the features at the same θ. So is the solve the run begins with, but to full accuracy,
    which the run does not ask for. The ratio is that of the sums over all steps.
    """
    method = vp.lbfgsvpro(problem)
    inputs, targets = data
    rows = _rows(problem, theta, inputs)
    start = start_projection(problem, rows, targets)
    tolerance = 0.0
    _seconds(_solve, problem, rows, targets, start, tolerance)  # compiles
    _seconds(_forward_reverse, problem, theta, start.w, data)

    state = jax.block_until_ready(method.init(theta, data, jax.random.key(0)))
    in_solves = in_passes = 0.0
    while True:
        in_solves += _seconds(_solve, problem, rows, targets, start, tolerance)
        in_passes += _seconds(_forward_reverse, problem, state.theta, state.w, data)
        if state.status != vp.Status.RUNNING or state.work_units >= work:
            return in_solves / in_passes
        start, tolerance = state.projection, ACCURACY * state.decrease
        state, _ = method.step(state, data)
        # What is still being computed must not be counted as part of the solve.
        rows = jax.block_until_ready(_rows(problem, state.theta, inputs))
        jax.block_until_ready(state)


def dense_iteration(problem: Problem, theta: Any, data: tuple) -> dict:
    """The time of an iteration of GNvpro with curvature "dense", and what it takes at least.

    That is the product of the rows with themselves and one factorisation at the rate of the former
    alone, and the bytes of the rows, written and read once, and of the matrix, written, scaled,
    read and factorised, at the bandwidth of adding one to a large array. The passes of the network
    are not part of it. The times are medians.
    """
    method = vp.gnvpro(problem, curvature="dense")
    state = method.init(theta, data)
    for _ in range(5):
        state, _ = method.step(state, data)
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    rows = jax.random.normal(jax.random.key(0), (data[1].size, size), data[1].dtype)
    large = jnp.ones(2**24, rows.dtype)
    product, addition = jax.jit(lambda rows: rows.T @ rows), jax.jit(lambda x: x + 1)
    times = [
        (
            _seconds(method.step, state, data),
            _seconds(product, rows),
            _seconds(addition, large),
        )
        for _ in range(REPEATS + 1)
    ][1:]  # the first turn compiles
    seconds, in_product, in_addition = map(statistics.median, zip(*times, strict=True))
    operations = 2 * rows.size * size + size**3 / 3
    matrix_bytes = size**2 * rows.itemsize
    rate, bandwidth = 2 * rows.size * size / in_product, 2 * large.nbytes / in_addition
    moved = 2 * rows.nbytes + 6 * matrix_bytes
    return {
        "seconds": seconds,
        "floor_seconds": operations / rate + moved / bandwidth,
        "operations": operations,
        "operations_per_second": rate,
        "bytes": moved,
        "bytes_per_second": bandwidth,
    }


def _seconds(fn, *args):
    begin = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - begin


@jax.jit
def _rows(problem, theta, inputs):
    return problem.model.rows(theta, inputs)


_solve = jax.jit(project)


@jax.jit
def _projection(problem, theta, data):
    inputs, targets = data
    rows = problem.model.rows(theta, inputs)
    at = project(problem, rows, targets, start_projection(problem, rows, targets))
    return at._replace(factor=hessian_factor(problem, rows, at.w, targets))


@jax.jit
def _curvature_products(problem, theta, at, data, count):
    curvature = linearise(problem, theta, data, at)
    return jax.lax.fori_loop(0, count, lambda _, v: _unit(curvature.matvec(v)), curvature.gradient)


@jax.jit
def _feature_products(problem, theta, data, count):
    _, forward = jax.linearize(lambda theta: problem.model.features(theta, data[0]), theta)
    transposed = jax.linear_transpose(forward, theta)
    return jax.lax.fori_loop(0, count, lambda _, v: _unit(transposed(forward(v))[0]), theta)


def _unit(tree):
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: leaf / norm, tree)


@jax.jit
def _forward_reverse(problem, theta, w, data):
    """One pass each way through the features, from the cotangent that W gives."""
    inputs, targets = data
    rows, pullback = jax.vjp(lambda theta: problem.model.rows(theta, inputs), theta)
    return pullback(problem.loss.gradient(rows @ w, targets) @ w.T)
