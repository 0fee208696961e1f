"""Penalties on the nonlinear weights θ, as functions of θ that carry their weight as a traced
number.

Each factory returns a `jax.tree_util.Partial`: a callable that is a pytree, so that changing the
weight of a penalty does not recompile what uses it. Imports checks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from varprox.checks import check_number


def _everything(theta):
    return theta


Penalty = Callable[[Any], jax.Array]


def tikhonov(alpha: float, where: Callable[[Any], Any] = _everything) -> Partial:
    """½ α ‖θ‖², over all leaves of the pytree θ, or over those of `where(theta)`."""
    return Partial(_tikhonov, _where(where), check_number("alpha", alpha))


def smoothness_in_time(
    alpha: float, step: float, where: Callable[[Any], Any] = _everything
) -> Partial:
    """½ α Σ_j ‖(θ_{j+1} − θ_j) / step‖² for weights that are values on a grid of layers in time.

    `where(theta)` picks the leaves that have time as their leading axis; `step` is the distance in
    time between two of their entries. Weights of the other layers want a penalty of their own, such
    as `tikhonov`: `Problem` takes a tuple of penalties. Source: arXiv:2007.13171, section 4.
    """
    step = check_number("step", step)
    if not isinstance(step, jax.core.Tracer) and step == 0:
        raise ValueError(f"step: expected a positive number, got {step!r}")
    return Partial(_smoothness, _where(where), check_number("alpha", alpha), step)


def as_penalty(name: str, penalty: Any) -> tuple[Penalty, ...]:
    """A number, a function or a sequence of both as a tuple of pytree callables."""
    if penalty is None:
        return ()
    if isinstance(penalty, tuple | list):
        return tuple(p for item in penalty for p in as_penalty(name, item))
    if isinstance(penalty, Partial):
        return (penalty,)
    if callable(penalty):
        return (Partial(penalty),)
    return (Partial(_tikhonov, Partial(_everything), check_number(name, penalty)),)


def tikhonov_weight(penalties: tuple[Partial, ...]) -> Any:
    """α, if the penalties add up to ½ α ‖θ‖² by their construction; else None."""
    if any(p.func is not _tikhonov or p.args[0].func is not _everything for p in penalties):
        return None
    return sum(p.args[1] for p in penalties)


def _where(where):
    if not callable(where):
        raise TypeError(f"where: expected a function of theta, got {where!r}")
    return Partial(where)


def _tikhonov(where, alpha, theta):
    leaves = jax.tree.leaves(where(theta))
    return 0.5 * sum(_like(alpha, leaf) * jnp.sum(leaf**2) for leaf in leaves)


def _smoothness(where, alpha, step, theta):
    slopes = [jnp.diff(leaf, axis=0) / _like(step, leaf) for leaf in jax.tree.leaves(where(theta))]
    return 0.5 * sum(_like(alpha, slope) * jnp.sum(slope**2) for slope in slopes)


def _like(number, leaf):
    """A number that may be under trace, or come from a file, in another precision."""
    return jnp.asarray(number, jnp.result_type(leaf))
