"""What stands for the inverse Hessian H in a quasi-Newton method, in flat variables.

Either the last pairs of steps and changes of the gradient, or the whole of H. Both take up what a
step has told, and give the descent −H g from its end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from varprox.precision import full_products

UPDATES = 32  # that are kept beside the matrix that they change


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

    def solve(self, gradient: jax.Array) -> jax.Array:
        """H times a vector. Source: Nocedal, Math. Comp. 35 (1980)."""
        memory = len(self.weights)
        newest_first = (self.added - 1 - jnp.arange(memory, dtype=jnp.int32)) % memory

        def take_out(q, i):
            along = self.weights[i] * (self.steps[i] @ q)
            return q - along * self.changes[i], along

        def put_back(r, pair):
            i, along = pair
            return r + (along - self.weights[i] * (self.changes[i] @ r)) * self.steps[i], None

        q, along = jax.lax.scan(take_out, gradient, newest_first)
        result, _ = jax.lax.scan(put_back, self.scale * q, (newest_first, along), reverse=True)
        return result

    def following(
        self,
        length: jax.Array,
        descent: jax.Array,
        change: jax.Array,
        gradient: jax.Array,
        keep: jax.Array,
        forget: jax.Array,
    ) -> tuple["Pairs", jax.Array]:
        """What the step length · descent leads to, and the descent −H g from there.

        The step changed the gradient by `change` to `gradient`. This is taken up if `keep` and if
        the objective bends upwards along the step. If `forget` all is forgotten but the scale.
        """
        step = length * descent
        product, square = step @ change, change @ change
        # A curvature below rounding of the change would weigh without bound.
        keep = keep & (product > jnp.finfo(step.dtype).eps * square) & (square > 0)
        place = self.added % len(self.weights)
        product, square = jnp.where(keep, product, 1), jnp.where(keep, square, 1)

        def put(old, new):
            return old.at[place].set(jnp.where(keep, new, old[place]))

        new = Pairs(
            put(self.steps, step),
            put(self.changes, change),
            jnp.where(forget, 0, put(self.weights, 1 / product)),
            jnp.where(keep, product / square, self.scale),
            self.added + keep.astype(jnp.int32),
        )
        return new, -new.solve(gradient)

    def without_root(self) -> "Pairs":
        """The pairs have none."""
        return self

    def after(self, before: "Pairs") -> "Pairs":
        """As for `Broyden`: nothing is to be done."""
        return self


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


def self_scaled_broyden(b: jax.Array, h: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The update of Broyden's class next to that of rank one which stays definite, and its scaling.

    On Peaks it came to 1e-6 in 980 work units, BFGS so scaled (θ = 0, τ = min(1, 1 / b)) in 1310,
    and BFGS not in 2500. Source: Urbán, Stefanou, Pons, J. Comput. Phys. 523 (2025), equations 13
    to 23, after Al-Baali, Comput. Optim. Appl. 9 (1998).
    """
    a = _tangent_square(b, h)
    least = jnp.minimum(1, h * (1 - jnp.sqrt(a / (1 + a))))
    theta = jnp.clip((1 - b) / b, (least - 1) / a, 1 / least)
    sigma = 1 + a * theta
    power = sigma ** (-1 / max(size - 1, 1))
    shrunk, grown = jnp.minimum(1, 1 / b), 1 / jnp.where(theta > 0, theta, 1)
    tau = jnp.where(
        theta > 0, shrunk * jnp.minimum(power, grown), jnp.minimum(shrunk * power, sigma)
    )
    return theta, tau


def _tangent_square(b, h):
    """b h − 1, which is the square of a tangent; not zero, since it divides."""
    return jnp.maximum(b * h - 1, jnp.finfo(b.dtype).tiny ** 0.5)


class Broyden(NamedTuple):
    """H = Z Zᵀ as a whole, changed in every step by an update of Broyden's class.

    With B = H⁻¹, a step s and a change y of the gradient, updates depend on two numbers, b = sᵀBs /
    yᵀs and h = yᵀHy / yᵀs, whose product is at least one. A rule gives θ, the part of DFP in the
    update of B (0: BFGS, 1: DFP), and τ, a factor for B before the update. In the variables in
    which H is the identity, with unit vectors e along Zᵀy and f orthogonal to it in the plane of
    Zᵀy and Z⁻¹s, the new H is F Fᵀ with

        F = (I − e eᵀ + (√ω − 1) f fᵀ) / √τ + Z⁻¹s eᵀ / √yᵀs,    ω = b h / (1 + θ (b h − 1)),

    and Z F takes the place of Z: H stays semidefinite whatever rounding does. The first pair scales
    the identity.

    Z is kept as factor · (root + leftᵀ right), and added up when `left` and `right` are full: to
    write a matrix of some thousand rows to new memory takes as long as ten products with it.
    """

    root: Any  # (size, size); None as long as it is that of the object before
    left: jax.Array  # (2 · UPDATES, size)
    right: jax.Array  # (2 · UPDATES, size)
    used: jax.Array  # rows of the two
    factor: jax.Array
    scaled: jax.Array  # Zᵀ g at the present gradient
    scale: jax.Array  # of H = scale · I where nothing is known
    empty: jax.Array  # is nothing known?
    forgotten: jax.Array  # is the root to be the identity?

    def following(
        self,
        length: jax.Array,
        descent: jax.Array,
        change: jax.Array,
        gradient: jax.Array,
        keep: jax.Array,
        forget: jax.Array,
        rule: Rule = self_scaled_broyden,
    ) -> tuple["Broyden", jax.Array]:
        """What the step length · descent leads to, and the descent from there: see
        `Pairs.following`. Two products with Z."""
        step = length * descent
        scaled = self.factor * (gradient @ self.root + (self.left @ gradient) @ self.right)
        ahead = self.factor * (self.root @ scaled + (self.right @ scaled) @ self.left)  # H g
        s, y, z_y = -length * self.scaled, scaled - self.scaled, ahead + descent
        s_size, y_size, product = jnp.sqrt(s @ s), jnp.sqrt(y @ y), s @ y
        # Where the cosine of their angle is below eps, its sign is a matter of rounding.
        keep = keep & (product > jnp.finfo(s.dtype).eps * s_size * y_size)
        product, s_size, y_size = (jnp.where(keep, x, 1) for x in (product, s_size, y_size))
        b, h = s_size**2 / product, y_size**2 / product
        theta, tau = rule(b, h, len(s))
        a = _tangent_square(b, h)
        tau = jnp.where(self.empty, h / (1 + a * theta), tau)
        tau = jnp.where(keep, tau, 1)

        e, z_e = y / y_size, z_y / y_size
        away = s - (s @ e) * e
        distance = jnp.sqrt(away @ away)
        distance = jnp.where(distance > 0, distance, 1)
        f, z_f = away / distance, (step - (s @ e) * z_e) / distance
        wide = jnp.sqrt((1 + a) / (1 + a * theta)) - 1
        long = jnp.sqrt(tau / product)
        # F = (I + insideᵀ right) / √τ, and Z F = (Z + leftᵀ right) / √τ.
        right = jnp.where(keep, jnp.stack([e, f]), 0)
        inside = jnp.where(keep, jnp.stack([long * s - e, wide * f]), 0)
        left = jnp.where(keep, jnp.stack([long * step - z_e, wide * z_f]), 0)

        narrow = jax.lax.rsqrt(tau)
        along = inside @ scaled
        scaled = narrow * (scaled + along @ right)
        ahead = narrow * (ahead + along @ jnp.stack([z_e, z_f]))
        ahead = narrow * (ahead + (right @ scaled) @ left)

        def put(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.used, 0)

        scale = jnp.where(keep, (step @ change) / (change @ change), self.scale)
        factor = jnp.where(forget, jnp.sqrt(scale), self.factor * narrow)
        new = self._replace(
            left=jnp.where(forget, 0, put(self.left, left / self.factor)),
            right=put(self.right, right),
            used=self.used + jnp.where(keep, 2, 0),
            factor=factor,
            scaled=jnp.where(forget, factor * gradient, scaled),
            scale=scale,
            empty=(self.empty & ~keep) | forget,
            forgotten=forget,
        )
        return new, -jnp.where(forget, scale * gradient, ahead)

    def without_root(self) -> "Broyden":
        """A compiled function that gave the root back would copy it."""
        return self._replace(root=None)

    def after(self, before: "Broyden") -> "Broyden":
        """With the root of the object before the step, written anew where this is due."""
        due = self.forgotten | (self.used == len(self.left))
        new = self._replace(root=before.root)
        if isinstance(due, jax.core.Tracer):
            return jax.lax.cond(due, _added_up, lambda inverse: inverse, new)
        return _added_up(new) if due else new


@jax.jit
@full_products
def _added_up(inverse: Broyden) -> Broyden:
    """The same with room for further updates."""
    identity = jnp.eye(len(inverse.root), dtype=inverse.root.dtype)
    root = jnp.where(inverse.forgotten, identity, inverse.root) + inverse.left.T @ inverse.right
    nothing = jnp.zeros_like(inverse.left)
    return inverse._replace(
        root=inverse.factor * root,
        left=nothing,
        right=nothing,
        used=jnp.zeros_like(inverse.used),
        factor=jnp.ones_like(inverse.factor),
        forgotten=jnp.zeros_like(inverse.forgotten),
    )


def start_broyden(gradient: jax.Array) -> Broyden:
    """H = I at the first gradient (size,)."""
    one, false = jnp.ones((), gradient.dtype), jnp.array(False)
    nothing = jnp.zeros((2 * UPDATES, gradient.size), gradient.dtype)
    return Broyden(
        root=jnp.eye(gradient.size, dtype=gradient.dtype),
        left=nothing,
        right=nothing,
        used=jnp.zeros((), jnp.int32),
        factor=one,
        scaled=gradient,
        scale=one,
        empty=~false,
        forgotten=false,
    )
