"""Penalties on the nonlinear weights θ.

Each factory returns a `jax.tree_util.Partial`: a callable that is a pytree, so that changing the
weight of a penalty does not recompile what uses it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from varprox.checks import check_number, shown


def _everything(theta):
    return theta


Penalty = Callable[[Any], jax.Array]


def tikhonov(alpha: float, where: Callable[[Any], Any] = _everything) -> Partial:
    """The Tikhonov penalty ½ α ‖θ‖².

    ``Problem(…, theta_penalty=alpha)`` means the same for a number α. Use `tikhonov` to penalise
    only a part of θ, or parts with different weights.

    Arguments:
        alpha: The weight α, a finite number ≥ 0.
        where: A function from θ to the part that is penalised, any pytree of arrays. The default
            penalises all of θ.

    Returns:
        The penalty, a function from θ to a scalar. It is also a pytree with the leaf α, so another
        α does not recompile.

    Raises:
        TypeError: If `alpha` is not a number, or if `where` is not callable.
        ValueError: If `alpha` is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> theta = {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)}
        >>> float(vp.tikhonov(2.0)(theta)), float(vp.tikhonov(2.0, lambda t: t["kernel"])(theta))
        (4.0, 3.0)
    """
    return Partial(_tikhonov, _where(where), check_number("alpha", alpha))


def smoothness_in_time(
    alpha: float, step: float, where: Callable[[Any], Any] = _everything
) -> Partial:
    """A penalty on changes in time, ½ α Σ_j ‖(θ_{j+1} − θ_j) / step‖².

    It is for networks that are flows in time, such as `varprox.networks.ResNet`, whose weights are
    values on a time grid. Weights without a time axis need another penalty, such as `tikhonov`:
    `Problem` takes a tuple of penalties.

    Arguments:
        alpha: The weight α, a finite number ≥ 0.
        step: The time between neighbouring entries along the time axis, a positive number. For
            `ResNet` and `HamiltonianNet` it is final_time / steps. For `AntisymmetricResNet`, which
            has weights at midpoints too, it is half of this.
        where: A function from θ to the part that is penalised: any pytree of arrays whose leading
            axis is time. The default takes all of θ.

    Returns:
        The penalty, a function from θ to a scalar. It is also a pytree with the leaves α and step,
        so other numbers do not recompile.

    Raises:
        TypeError: If `alpha` or `step` is not a number, or if `where` is not callable.
        ValueError: If `alpha` is negative, if `step` is not positive, or if one of them is not
            finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> theta = {"opening": jnp.ones(2), "bias": jnp.array([[0.0], [1.0], [2.0]])}
        >>> penalty = vp.smoothness_in_time(1.0, step=0.5, where=lambda theta: theta["bias"])
        >>> float(penalty(theta))  # ½ (2² + 2²)
        4.0

    Source:
        Newman, Ruthotto, Hart, van Bloemen Waanders, arXiv:2007.13171, section 4.
    """
    step = check_number("step", step)
    if not isinstance(step, jax.core.Tracer) and step == 0:
        raise ValueError(f"step: expected a positive number, got {step!r}")
    return Partial(_smoothness_in_time, _where(where), check_number("alpha", alpha), step)


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
    try:
        alpha = check_number(name, penalty)
    except TypeError:
        raise TypeError(
            f"{name}: expected a finite number ≥ 0, a function of theta such as "
            f"varprox.tikhonov(alpha, where), or a tuple of these, got {shown(penalty)}"
        ) from None
    return (Partial(_tikhonov, Partial(_everything), alpha),)


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


def _smoothness_in_time(where, alpha, step, theta):
    slopes = [jnp.diff(leaf, axis=0) / _like(step, leaf) for leaf in jax.tree.leaves(where(theta))]
    return 0.5 * sum(_like(alpha, slope) * jnp.sum(slope**2) for slope in slopes)


def _like(number, leaf):
    """A number that may be under trace, or come from a file, in another precision."""
    return jnp.asarray(number, jnp.result_type(leaf))
