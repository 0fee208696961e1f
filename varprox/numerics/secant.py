"""The curvature that a Gauss–Newton matrix leaves out, learnt from gradients.

It vanishes with the residual. Where the residual stays large, steps without it converge slowly.
Works on flat vectors. Source: Dennis, Gay, Welsch, ACM Trans. Math. Softw. 7
(1981), for the update and its sizing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from varprox.numerics.krylov import norm

# Used as soon as it is better, S makes the zoo's dense networks and collocation end ten times as
# high after 400 work units. 3 and 5 steps do them next to no harm; with 5 logistic problems gain
# less.
PATIENCE = 3  # steps in a row that must be predicted better with S than without, before it is used
# Of the error without S: the most that the error with it may be until then. With ½ Peaks takes up
# to 1.7 times the work to 1e-6; logistic and softmax problems and flows keep most of what S gains.
MARGIN = 0.25


class Secant(NamedTuple):
    """An estimate S of the rest of the Hessian, and the last step, from which it will learn."""

    matrix: jax.Array  # S, (size, size)
    gradient: jax.Array  # (size,), where the step began
    expected: jax.Array  # the gradient at its end, had the Jacobian of the residuals not changed
    step: jax.Array  # zero where there was none
    streak: jax.Array  # steps in a row that were predicted better with S than without

    @property
    def trusted(self) -> jax.Array:
        """Is S to be added to the model?"""
        return self.streak >= PATIENCE


def nothing_yet(like: jax.Array) -> Secant:
    """S = 0 for vectors such as `like`."""
    none = jnp.zeros_like(like)
    return Secant(jnp.zeros((like.size, like.size), like.dtype), none, none, none, jnp.int32(0))


def learn(old: Secant, gradient: jax.Array) -> Secant:
    """S after the last step s, given the gradient at its end.

    S first shrinks where it promises more curvature along s than there was; then it changes as
    little as it can, in a norm that y = Δg defines, to map s to `gradient` − `expected`. Where yᵀs
    is not positive there is no such norm, and S stays.
    """
    s, y = old.step, gradient - old.gradient
    wanted = gradient - old.expected
    promised = s @ (old.matrix @ s)
    shrinkage = jnp.minimum(1, jnp.abs(s @ wanted) / jnp.where(promised == 0, 1, jnp.abs(promised)))
    sized = jnp.where(promised == 0, 1, shrinkage) * old.matrix
    ys = y @ s
    usable = ys > jnp.finfo(ys.dtype).eps ** 0.5 * norm(y) * norm(s)
    ys = jnp.where(usable, ys, 1)
    error = (wanted - sized @ s) / ys
    across = jnp.outer(error, y)
    new = sized + across + across.T - jnp.outer((s @ error / ys) * y, y)
    usable &= jnp.isfinite(new).all()
    return old._replace(matrix=jnp.where(usable, new, old.matrix))


def judge(secant: Secant, without: jax.Array, more: jax.Array, decrease: jax.Array) -> jax.Array:
    """The streak after a step whose decrease was predicted as `without`, to which S adds `more`."""
    margin = jnp.where(secant.trusted, 1, MARGIN)
    better = jnp.abs(decrease - without - more) < margin * jnp.abs(decrease - without)
    return jnp.where(better, secant.streak + 1, 0)


def elsewhere(secant: Secant) -> Secant:
    """What is known at a point that the last step did not lead to."""
    return secant._replace(step=jnp.zeros_like(secant.step), streak=jnp.zeros_like(secant.streak))
