"""Design rows that are never held: made of a chunk of samples whenever they are needed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from varprox.problem.chunks import Blocks, blocks_of
from varprox.problem.hosted import leaves_of, shapes_of, taken


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["model", "theta", "inputs"],
    meta_fields=["chunk"],
)
@dataclass(frozen=True)
class Streamed:
    """The design rows of a model at θ. It is multiplied with as the array of them would be, at the
    cost of a forward pass each time."""

    model: Any  # a `Separable`
    theta: Any
    inputs: Any
    chunk: int  # samples, at most

    @property
    def shape(self) -> tuple[int, ...]:
        return jax.eval_shape(self.model.rows, self.theta, shapes_of(self.inputs)).shape

    @property
    def dtype(self) -> Any:
        return jnp.result_type(*jax.tree.leaves(self.theta))

    @property
    def blocks(self) -> Blocks:
        return blocks_of(len(self), self.chunk)

    def __len__(self) -> int:
        return len(leaves_of(self.inputs)[0])

    def __matmul__(self, w: jax.Array) -> jax.Array:
        return self.each(lambda z: z @ w)

    @property
    def T(self) -> "_Transposed":
        return _Transposed(self)

    def scan(self, fn: Callable[..., Any], start: Any, *trees: Any) -> tuple[Any, Any]:
        """`Blocks.scan` of a function that takes the rows of some samples in place of inputs."""

        def of_block(so_far, new, x, *rest):
            return fn(so_far, new, self.model.rows(self.theta, x), *rest)

        return self.blocks.scan(of_block, start, self.inputs, *trees)

    def each(self, fn: Callable[..., Any], *trees: Any) -> Any:
        """`fn` of the rows of some samples, and of what else belongs to them, for all samples."""
        return self.scan(lambda so_far, _, *parts: (so_far, fn(*parts)), None, *trees)[1]

    def total(self, fn: Callable[..., Any], start: Any, *trees: Any) -> Any:
        """`start`, and then what `fn` makes of this, of the rows of some samples, and of what else
        belongs to them; all of it is zero for samples that come again."""

        def add(so_far, new, *parts):
            once = lambda part: jnp.where(new[:, None], part, 0)  # noqa: E731
            return fn(so_far, *jax.tree.map(once, parts)), None

        return self.scan(add, start, *trees)[0]

    def of(self, indices: jax.Array) -> jax.Array:
        """Those of some samples."""
        return self.model.rows(self.theta, taken(self.inputs, indices))


@dataclass(frozen=True)
class _Transposed:
    rows: Streamed

    def __matmul__(self, u: jax.Array) -> jax.Array:
        start = jnp.zeros((self.rows.shape[1], u.shape[1]), u.dtype)
        return self.rows.total(lambda so_far, z, u: so_far + z.T @ u, start, u)


def rows_and_pullback(problem: Any, theta: Any, inputs: Any) -> tuple[Any, Callable]:
    """The design rows of a problem at θ, and (u, W) ↦ the pullback to θ of u Wᵀ, for u shaped like
    the predictions."""
    if problem.loss.quadratic and problem.chunked(inputs):

        def pulled(u, w):
            predictions_at = lambda theta: problem.rows(theta, inputs) @ w  # noqa: E731
            return jax.vjp(predictions_at, theta)[1](u)[0]

        return problem.rows(theta, inputs), pulled
    rows, pullback = jax.vjp(lambda theta: problem.rows(theta, inputs), theta)
    return rows, lambda u, w: pullback(u @ w.T)[0]
