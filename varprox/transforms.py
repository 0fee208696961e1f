"""slimTik and GNvpro as gradient transformations of optax, for a training loop of one's own.

Imports optax, the methods and what is below them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from varprox import quadratic
from varprox.gnvpro import gnvpro as full_batch
from varprox.heads import ConvHead, DenseHead, dense, has_bias
from varprox.model import Problem
from varprox.precision import full_products
from varprox.selection import proportional
from varprox.slimtik import State as Tikhonov
from varprox.slimtik import (
    centre_and_unit,
    check_dtype,
    checked,
    raised,
    start_tikhonov,
    tikhonov_step,
)


class SlimTikState(NamedTuple):
    """That of the optimizer for θ and that of slimTik, with W as it was last seen."""

    optimizer: Any
    tikhonov: Tikhonov  # its W predicts targets less `centre`
    batches: jax.Array  # seen so far
    centre: jax.Array  # the mean of the targets of the first one, (outputs,), where there is a bias
    unit: jax.Array  # the root mean square of all targets so far, less `centre`


def slimtik(
    optimizer: optax.GradientTransformation,
    head: str = "head",
    memory: int = 5,
    selection: Callable | None = None,
    *,
    layer: DenseHead | ConvHead | None = None,
    initial: float = 0.05,
    lower_bound: float = 1e-7,
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer for θ, and slimTik for the last layer among the parameters.

    `update(gradients, state, params, features=z, targets=c)` wants the features z of the batch,
    those that the last layer takes, and its targets, shaped like the predictions. Gradients of θ
    pass through `optimizer`; those of the last layer, which may be anything, make way for the step
    of `varprox.slimtik` with rows and targets divided by √batch. Where a batch, a gradient or an
    update is not finite nothing moves.

    The units of the targets do not matter where the gradients are those of a loss in their square,
    as a mean of squares is: these are divided by the square of the root mean square of the targets
    so far, about the mean of the first batch where the last layer has a bias. The first batch only
    finds W, because gradients at a W that has seen no targets say nothing; a W that predicts this
    batch worse than their mean, as one drawn at random does, is forgotten.

    `head` is the path of the last layer in the parameters, such as "head" or "decoder.out". There
    stand flax's "kernel" and, with bias, "bias", or else an array W (columns, outputs). `layer`
    says what they mean: `varprox.dense()` if it is None, with a bias where there is one. The other
    options are those of `varprox.slimtrain`; under `optax.inject_hyperparams`, `memory` is a static
    argument.

    Raises ValueError if there is no such path, or if the last layer has other entries, and
    TypeError if they are neither in float32 nor in float64; `update` does where features or targets
    do not fit it.
    """
    selection = proportional() if selection is None else selection
    options = checked(memory, selection, initial, lower_bound)

    def init(params):
        last = _Last(params, head, layer)
        return SlimTikState(
            optimizer=optax.masked(optimizer, last.others).init(params),
            tikhonov=start_tikhonov(options, last.w),
            batches=jnp.zeros((), jnp.int32),
            centre=jnp.zeros_like(last.w[-1]),
            unit=jnp.zeros((), last.w.dtype),
        )

    @full_products
    def update(gradients, state, params=None, *, features, targets, **extra):
        if params is None:
            raise ValueError("params: expected those that the gradients belong to, got None")
        last = _Last(params, head, layer)
        _check_fit(last, features, targets)
        first, seen = state.batches == 0, state.batches.astype(last.w.dtype)
        centre, _ = centre_and_unit(targets, has_bias(last.layer))
        centre = jnp.where(first, centre, state.centre)
        centred = targets - centre
        unit = jnp.where(jnp.any(centred != 0), centre_and_unit(centred, bias=False)[1], 0)
        unit = jnp.hypot(state.unit * jnp.sqrt(seen), unit) / jnp.sqrt(seen + 1)
        divisor = jnp.where(unit > 0, unit, 1)

        w = raised(last.w, -centre)
        lost = jnp.sum((last.layer.apply(features, w) - centred) ** 2) > jnp.sum(centred**2)
        before = state.tikhonov._replace(w=jnp.where(first & lost, 0, w))
        moments = last.layer.moments(features, before.w, centred).scaled(1 / len(targets))
        tikhonov, chosen = tikhonov_step(options, before, moments, targets.size)

        others = optax.with_extra_args_support(optax.masked(optimizer, last.others))
        scaled = jax.tree.map(lambda gradient: gradient / divisor / divisor, gradients)
        updates, inner = others.update(scaled, state.optimizer, params, **extra)
        others = zip(*map(jax.tree.leaves, (updates, last.others)), strict=True)
        moves = [jnp.isfinite(move).all() for move, other in others if other]
        finite = jnp.stack([chosen.finite, *moves]).all()

        def choose(condition, new, old):
            return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)

        updates = choose(finite & ~first, updates, jax.tree.map(jnp.zeros_like, updates))
        after = SlimTikState(
            choose(finite & ~first, inner, state.optimizer),
            *choose(finite, (tikhonov, state.batches + 1, centre, unit), state[1:]),
        )
        change = jnp.where(finite, raised(tikhonov.w, centre) - last.w, 0)
        return last.put(updates, change), after

    return optax.GradientTransformationExtraArgs(init, update)


class _Last:
    """The last layer in a tree of parameters."""

    def __init__(self, params, head, layer):
        path = head.split(".")
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        self.tree = jax.tree.structure(params)
        names = [[str(_name(key)) for key in keys] for keys, _ in leaves]
        self.places = {
            (*name[len(path) :], "w")[0]: place
            for place, name in enumerate(names)
            if name[: len(path)] == path
        }
        if set(self.places) not in ({"w"}, {"kernel"}, {"kernel", "bias"}):
            found = sorted(self.places) or sorted({".".join(name) for name in names})
            raise ValueError(
                "head: expected the path of 'kernel' and 'bias', or of an array, in the "
                f"parameters, got {head!r}, where there are {found}"
            )
        inside = set(self.places.values())
        self.others = jax.tree.unflatten(
            self.tree, [place not in inside for place in range(len(leaves))]
        )
        self.layer = dense("bias" in self.places) if layer is None else layer
        of = {name: leaves[place][1] for name, place in self.places.items()}
        self.w = of["w"] if "w" in of else self.layer.pack(of["kernel"], of.get("bias"))

    def put(self, updates, change):
        """The updates with those of the last layer in their places."""
        kernel, bias = self.layer.unpack(change)
        new = {"w": change, "kernel": kernel, "bias": bias}
        leaves = jax.tree.leaves(updates)
        for name, place in self.places.items():
            leaves[place] = new[name]
        return jax.tree.unflatten(self.tree, leaves)


def _check_fit(last, features, targets):
    """Refuses features and targets that do not fit the last layer."""
    columns, outputs = last.w.shape
    came = jax.eval_shape(last.layer.rows, features).shape[1]
    if came != columns:
        raise ValueError(
            f"features: expected as many as the last layer takes, {columns} design rows' columns, "
            f"got {came} with features of shape {jnp.shape(features)}"
        )
    check_dtype(last.w, features=features, targets=targets)
    shape = jax.eval_shape(last.layer.apply, features, last.w).shape
    if jnp.shape(targets) != shape or shape[0] == 0:
        raise ValueError(
            f"targets: expected shape {shape}, that of the predictions, got {jnp.shape(targets)}"
        )


def _name(key):
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def gnvpro(problem: Problem, data: tuple, **options) -> optax.GradientTransformationExtraArgs:
    """The steps of `varprox.gnvpro`, with its options, as updates of θ.

    `update(gradients, state, params)` takes θ as parameters and looks at no gradient; it wants no
    learning rate. W(θ) is `state.w`. `data` are all of the data; where they should not become
    constants of a compiled update they, or others of the same shapes, may be passed to it as
    `data=…`. Parameters that something else has moved in between cost one more forward pass.
    """
    method = full_batch(problem, **options)

    def update(gradients, state, params=None, *, data=data, **extra):
        if params is None:
            raise ValueError("params: expected theta, got None")
        same = jax.tree.map(lambda new, old: jnp.all(new == old), params, state.theta)
        state = jax.lax.cond(
            jnp.stack(jax.tree.leaves(same)).all(),
            lambda: state,
            lambda: _moved(method.init(params, data), state),
        )
        after, _ = method.step(state, data)
        updates = jax.tree.map(jnp.subtract, after.theta, params)
        return updates, after._replace(theta=optax.apply_updates(params, updates))

    return optax.GradientTransformationExtraArgs(lambda params: method.init(params, data), update)


def _moved(fresh, state):
    """The state at other weights, with what is known of the curvature."""
    kept = ("radius", "shift", "low", "newton")
    return fresh._replace(
        work_units=state.work_units + fresh.work_units,
        norm=quadratic.elsewhere(state.norm),
        **{name: getattr(state, name) for name in kept},
    )
