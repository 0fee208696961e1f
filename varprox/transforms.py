"""slimTik and GNvpro as gradient transformations of optax, for a training loop of your own.

``slimtik`` trains the last layer in minibatches, beside any optimizer for the other parameters.
``gnvpro`` trains θ by full-batch steps. Both are called as
``updates, state = tx.update(gradients, state, params, …)``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from varprox.checks import check_array, listed, shown
from varprox.methods.gnvpro import State
from varprox.methods.gnvpro import gnvpro as full_batch
from varprox.methods.method import check_state
from varprox.methods.selection import proportional
from varprox.methods.slimtik import State as Tikhonov
from varprox.methods.slimtik import (
    centre_and_unit,
    check_dtype,
    checked,
    raised,
    start_tikhonov,
    tikhonov_step,
)
from varprox.methods.slimtrain import check_optimizer
from varprox.precision import full_products
from varprox.problem.data import weighted
from varprox.problem.heads import ConvHead, DenseHead, dense, has_bias
from varprox.problem.model import Problem
from varprox.problem.weighted import alike, counted, plain, shifted, weighed


class SlimTikState(NamedTuple):
    """The state of the optimizer for θ and of slimTik, with W as it was last seen.

    Attributes:
        optimizer: The state of the optimizer for θ.
        tikhonov: The state of ``varprox.slimtik``; its W predicts the targets minus ``centre``.
        batches: The number of batches seen so far.
        centre: The mean of the targets of the first batch, (outputs,); 0 if there is no bias.
        unit: The root mean square of all targets so far, minus ``centre``.
    """

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
    """slimTik for the last layer among the parameters, and any optimizer for the others.

    ``tx.update(gradients, state, params, features=z, targets=c)`` needs the features z of the
    batch, which are the input of the last layer, and its targets c, shaped like the predictions;
    ``weights=ω`` (batch,) may be given, too.
    The gradients of the other parameters pass through ``optimizer``. The gradients of the last
    layer may be anything: they are replaced by a step of ``varprox.slimtik``, with rows and targets
    divided by √batch. If a batch, a gradient or an update is not finite, parameters and state do
    not change.

    The first batch only finds W, because gradients at a W that has seen no targets say nothing. If
    the initial W predicts this batch worse than the mean of its targets does (without a bias, worse
    than zero), as a random W will, it is discarded. The units of the targets do not matter if the
    loss is quadratic in them, such as a mean of squares: its gradients are divided by the mean
    square of the targets so far. If the last layer has a bias, this is taken about the mean of the
    first batch.

    Arguments:
        optimizer: A gradient transformation of optax for all parameters but the last layer.
        head: The path of the last layer in the parameters, such as ``"head"`` or ``"decoder.out"``.
            It leads to flax's ``kernel`` and, with a bias, ``bias``, or to an array W (columns,
            outputs).
        memory: The number of earlier batches whose Gram matrices are kept, an integer ≥ 0. It must
            be a static argument under ``optax.inject_hyperparams``.
        selection: How Λ is chosen, such as ``sgcv()``. None stands for ``proportional()``.
        layer: The head that the last layer is, such as ``varprox.conv(…)``. None stands for
            ``varprox.dense()``, with a bias if the parameters have one.
        initial: ΣΛ at the start, a number ≥ 0.
        lower_bound: The lower bound of ΣΛ, a number ≥ 0.

    Returns:
        A gradient transformation with extra arguments. ``state = tx.init(params)`` is a
        ``SlimTikState``. The updates of ``tx.update`` are what ``optax.apply_updates`` takes.

    Raises:
        TypeError: If ``selection`` is not a function, or if ``initial`` or ``lower_bound`` is not a
            number. ``init`` raises it if the last layer is neither in float32 nor in float64,
            ``update`` if features or targets are in another dtype.
        ValueError: If an option is out of its range. ``init`` raises it if there is no such path or
            if the last layer has other entries, ``update`` if features or targets do not fit the
            last layer or if ``params`` are missing.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import varprox as vp
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> targets = 2 * jnp.exp(-3 * inputs)
        >>> params = {"decay": jnp.ones(1), "head": jnp.zeros((1, 1))}
        >>> def loss(params):
        ...     z = jnp.exp(-params["decay"] * inputs)
        ...     return jnp.mean((z @ params["head"] - targets) ** 2), z
        >>> tx = vp.transforms.slimtik(optax.sgd(1.0), head="head")
        >>> @jax.jit
        ... def step(params, state):
        ...     gradients, z = jax.grad(loss, has_aux=True)(params)
        ...     updates, state = tx.update(gradients, state, params, features=z, targets=targets)
        ...     return optax.apply_updates(params, updates), state
        >>> state = tx.init(params)
        >>> for _ in range(5):
        ...     params, state = step(params, state)
        >>> bool(loss(params)[0] < jnp.var(targets)), int(state.batches)
        (True, 5)

    Source:
        Newman, Chung, Chung, Ruthotto, arXiv:2109.14002.
    """
    check_optimizer(optimizer)
    if not isinstance(head, str):
        raise TypeError(f"head: expected a path, such as 'decoder.out', got {shown(head)}")
    if layer is not None and not isinstance(layer, DenseHead | ConvHead):
        raise TypeError(f"layer: expected varprox.dense() or varprox.conv(…), got {shown(layer)}")
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
    def update(gradients, state, params=None, *, features, targets, weights=None, **extra):
        if params is None:
            raise ValueError("params: expected those that the gradients belong to, got None")
        check_state("transforms.slimtik", isinstance(state, SlimTikState), state)
        _check_tree("gradients", gradients, params)
        last = _Last(params, head, layer)
        _check_fit(last, features, targets)
        if weights is not None:
            targets = weighted(targets, weights)
            if not alike(targets):
                raise ValueError(
                    "weights: expected one for each sample, got one for each entry of the targets; "
                    "varprox.slimtrain takes these"
                )
        first, seen = state.batches == 0, state.batches.astype(last.w.dtype)
        centre, _ = centre_and_unit(targets, has_bias(last.layer))
        centre = jnp.where(first, centre, state.centre)
        centred = shifted(targets, centre)
        unit = jnp.where(jnp.any(plain(centred) != 0), centre_and_unit(centred, bias=False)[1], 0)
        unit = jnp.hypot(state.unit * jnp.sqrt(seen), unit) / jnp.sqrt(seen + 1)
        divisor = jnp.where(unit > 0, unit, 1)

        w = raised(last.w, -centre)
        residual = last.layer.apply(features, w) - plain(centred)
        lost = jnp.sum(weighed(centred, residual**2 - plain(centred) ** 2)) > 0
        before = state.tikhonov._replace(w=jnp.where(first & lost, 0, w))
        moments = last.layer.moments(features, before.w, centred).scaled(1 / len(targets))
        tikhonov, chosen = tikhonov_step(options, before, moments, counted(targets))

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
    check_array("features", features)
    check_array("targets", targets)
    if jnp.ndim(features) < 2:
        raise ValueError(
            f"features: expected those of a batch, (batch, …), got shape {jnp.shape(features)}"
        )
    columns, _outputs = last.w.shape
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


def _check_tree(name, tree, expected):
    """Refuses a tree of another structure with a ValueError."""
    structures: list[Any] = [jax.tree.structure(x) for x in (tree, expected)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name}: expected arrays like {listed(**{name: expected})}, got "
            f"{listed(**{name: tree})}"
        )


def _name(key):
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def gnvpro(problem: Problem, data: tuple, **options) -> optax.GradientTransformationExtraArgs:
    """The steps of ``varprox.gnvpro`` as updates of θ, for a full-batch loop of your own.

    ``tx.update(gradients, state, theta)`` ignores the gradients, which may be None, and needs no
    learning rate. W(θ) is ``state.w``, and ``state.status`` says whether the run has ended. If
    anything else changes θ between updates, the next update costs the work units of another start.

    Arguments:
        problem: The problem to train, as for ``varprox.gnvpro``.
        data: A pair (inputs, targets) with all data. They become constants of a compiled update. To
            avoid this, pass them, or others of the same shapes, to ``tx.update`` as ``data=…``.
        **options: The options of ``varprox.gnvpro``.

    Returns:
        A gradient transformation with extra arguments. ``state = tx.init(theta)`` is a
        ``varprox.methods.gnvpro.State``. The updates of ``tx.update`` are what
        ``optax.apply_updates`` takes.

    Raises:
        TypeError: As ``varprox.gnvpro`` does; ``init`` as its ``init`` does.
        ValueError: As ``varprox.gnvpro`` does; ``init`` as its ``init`` does, and ``update`` if
            ``params`` are missing.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> tx = vp.transforms.gnvpro(problem, (inputs, 2 * jnp.exp(-3 * inputs)))
        >>> theta, update = jnp.ones(1), jax.jit(tx.update)
        >>> state = tx.init(theta)
        >>> for _ in range(6):
        ...     updates, state = update(None, state, theta)
        ...     theta = optax.apply_updates(theta, updates)
        >>> print(theta.round(2), state.w.round(2))
        [3.] [[2.]]

    Source:
        Newman, Ruthotto, Hart, van Bloemen Waanders, arXiv:2007.13171, algorithm 3.1.
    """
    method = full_batch(problem, **options)

    def update(gradients, state, params=None, *, data=data, **extra):
        if params is None:
            raise ValueError("params: expected theta, got None")
        check_state("gnvpro", isinstance(state, State), state)
        _check_tree("params", params, state.theta)
        same = jax.tree.map(lambda new, old: jnp.all(new == old), params, state.theta)
        state = jax.lax.cond(
            jnp.stack(jax.tree.leaves(same)).all(),
            lambda: state,
            lambda: method.init(params, data, before=state),
        )
        after, _ = method.step(state, data)
        updates = jax.tree.map(jnp.subtract, after.theta, params)
        return updates, after._replace(theta=optax.apply_updates(params, updates))

    return optax.GradientTransformationExtraArgs(lambda params: method.init(params, data), update)
