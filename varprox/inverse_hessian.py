"""What stands for the inverse Hessian H in a quasi-Newton method, in flat variables.

Either the last pairs of steps and changes of the gradient, or the whole of H. Both give the descent
−H g, follow what a step has told, and forget it. Imports nothing of the package.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pairs(NamedTuple):
    """Steps and what the gradient changed by along them, the newest over the oldest: L-BFGS."""

    steps: jax.Array  # (memory, size)
    changes: jax.Array  # (memory, size)
    weights: jax.Array  # (memory,), 1 / (step · change), 0 where there is no pair
    scale: jax.Array  # of H in directions that no pair tells of
    added: jax.Array  # how many pairs ever were

    @property
    def empty(self) -> jax.Array:
        """Is there no pair?"""
        return jnp.all(self.weights == 0)

    def descent(self, gradient: jax.Array) -> jax.Array:
        """−H g. Source: Nocedal, Math. Comp. 35 (1980)."""
        memory = len(self.weights)
        newest_first = (self.added - 1 - jnp.arange(memory, dtype=jnp.int32)) % memory

        def take_out(q, i):
            along = self.weights[i] * (self.steps[i] @ q)
            return q - along * self.changes[i], along

        def put_back(r, pair):
            i, along = pair
            return r + (along - self.weights[i] * (self.changes[i] @ r)) * self.steps[i], None

        q, along = jax.lax.scan(take_out, -gradient, newest_first)
        result, _ = jax.lax.scan(put_back, self.scale * q, (newest_first, along), reverse=True)
        return result

    def following(self, length, gradient, descent, change, keep) -> "Pairs":
        """With what the step length · descent from this gradient changed it by, if `keep` and if
        the objective bends upwards along the step."""
        step = length * descent
        product, square = step @ change, change @ change
        # A curvature below rounding of the change would weigh without bound.
        keep = keep & (product > jnp.finfo(step.dtype).eps * square) & (square > 0)
        place = self.added % len(self.weights)
        product, square = jnp.where(keep, product, 1), jnp.where(keep, square, 1)

        def put(old, new):
            return old.at[place].set(jnp.where(keep, new, old[place]))

        return Pairs(
            put(self.steps, step),
            put(self.changes, change),
            put(self.weights, 1 / product),
            jnp.where(keep, product / square, self.scale),
            self.added + keep.astype(jnp.int32),
        )

    def forget(self, when: jax.Array) -> "Pairs":
        """Without pairs, if `when`; the scale stays."""
        return self._replace(weights=jnp.where(when, 0, self.weights))


def no_pairs(memory: int, like: jax.Array) -> Pairs:
    """H = I, and room for `memory` pairs of vectors (size,) like the one given."""
    nothing = jnp.zeros((memory, like.size), like.dtype)
    return Pairs(
        nothing,
        nothing,
        jnp.zeros(memory, like.dtype),
        jnp.ones((), like.dtype),
        jnp.zeros((), jnp.int32),
    )


Rule = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


def bfgs(b: jax.Array, h: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """No part of DFP and no scaling."""
    return jnp.zeros_like(b), jnp.ones_like(b)


def self_scaled_bfgs(b: jax.Array, h: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """BFGS after a scaling that only lets H grow. Source: Al-Baali, Comput. Optim. Appl. 9
    (1998)."""
    return jnp.zeros_like(b), jnp.minimum(1, 1 / b)


def self_scaled_broyden(b: jax.Array, h: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The update of Broyden's class next to that of rank one which stays definite, and its scaling.

    Source: Urbán, Stefanou, Pons, J. Comput. Phys. 523 (2025), equations 13 to 23, after Al-Baali,
    Comput. Optim. Appl. 9 (1998).
    """
    a = _excess(b, h)
    least = jnp.minimum(1, h * (1 - jnp.sqrt(a / (1 + a))))
    theta = jnp.clip((1 - b) / b, (least - 1) / a, 1 / least)
    sigma = 1 + a * theta
    power = sigma ** (-1 / max(size - 1, 1))
    shrunk, grown = jnp.minimum(1, 1 / b), 1 / jnp.where(theta > 0, theta, 1)
    tau = jnp.where(
        theta > 0, shrunk * jnp.minimum(power, grown), jnp.minimum(shrunk * power, sigma)
    )
    return theta, tau


def _excess(b, h):
    """b h − 1, which is the square of a tangent; not zero, since it divides."""
    return jnp.maximum(b * h - 1, jnp.finfo(b.dtype).tiny ** 0.5)


class Broyden(NamedTuple):
    """H = Z Zᵀ as a whole, changed in every step by an update of Broyden's class of rank two.

    With B = H⁻¹, a step s and a change y of the gradient the updates depend on two numbers, b =
    sᵀBs / yᵀs and h = yᵀHy / yᵀs, whose product is at least one. A rule gives θ, the part of DFP in
    the update of B (0: BFGS, 1: DFP), and τ, which B is multiplied with before. In the variables in
    which H is the identity, with the unit vectors e along Zᵀy and f orthogonal to it in the plane of
    Zᵀy and Z⁻¹s, the new H is F Fᵀ where

        F = (I − e eᵀ + (√ω − 1) f fᵀ) / √τ + Z⁻¹s eᵀ / √yᵀs,    ω = b h / (1 + θ (b h − 1)),

    so that Z F takes the place of Z: H stays definite whatever rounding does. The identity is scaled
    by the first pair.
    """

    root: jax.Array  # (size, size), Z
    scale: jax.Array  # of H = scale · I where nothing is known
    empty: jax.Array  # is nothing known?

    def descent(self, gradient: jax.Array) -> jax.Array:
        """−H g."""
        return -(self.root @ (self.root.T @ gradient))

    def following(
        self, length, gradient, descent, change, keep, rule: Rule = self_scaled_broyden
    ) -> "Broyden":
        """With what the step length · descent from this gradient changed it by, if `keep` and if
        the objective bends upwards along the step."""
        dtype = change.dtype
        s = -length * (self.root.T @ gradient)  # Z⁻¹ times the step
        y = self.root.T @ change
        product, s_square, y_square = s @ y, s @ s, y @ y
        # The cosine of the angle between s and y: below eps its sign is a matter of rounding.
        keep = keep & (product > jnp.finfo(dtype).eps * jnp.sqrt(s_square) * jnp.sqrt(y_square))
        product, y_square = jnp.where(keep, product, 1), jnp.where(keep, y_square, 1)
        b, h = jnp.where(keep, s_square, 1) / product, y_square / product
        theta, tau = rule(b, h, len(s))
        a = _excess(b, h)
        tau = jnp.where(self.empty, h / (1 + a * theta), tau)
        narrow = jax.lax.rsqrt(tau)

        e = y / jnp.sqrt(y_square)
        rest = s - (s @ e) * e
        away = jnp.sqrt(rest @ rest)
        away = jnp.where(away > 0, away, 1)
        f = rest / away
        root_e = self.root @ e
        root_f = (length * descent - (s @ e) * root_e) / away
        wide = jnp.sqrt((1 + a) / (1 + a * theta)) - 1
        along_e = length * descent * jax.lax.rsqrt(product) - narrow * root_e
        along_f = wide * narrow * root_f
        root = narrow * self.root + along_e[:, None] * e + along_f[:, None] * f
        return Broyden(
            jnp.where(keep, root, self.root),
            jnp.where(keep, (length * descent) @ change / (change @ change), self.scale),
            self.empty & ~keep,
        )

    def forget(self, when: jax.Array) -> "Broyden":
        """A multiple of the identity, if `when`."""
        identity = jnp.sqrt(self.scale) * jnp.eye(len(self.root), dtype=self.root.dtype)
        return self._replace(
            root=jnp.where(when, identity, self.root), empty=self.empty | when
        )


def identity(like: jax.Array) -> Broyden:
    """H = I, for vectors (size,) like the one given."""
    return Broyden(
        jnp.eye(like.size, dtype=like.dtype), jnp.ones((), like.dtype), jnp.array(True)
    )
