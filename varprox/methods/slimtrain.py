"""slimTrain: minibatch training in which slimTik finds W and any optimizer of optax moves θ."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from varprox.checks import shown, told
from varprox.methods.method import Method, Status, check_state
from varprox.methods.minibatches import epoch
from varprox.methods.selection import proportional
from varprox.methods.slimtik import State as Tikhonov
from varprox.methods.slimtik import centre_and_unit, checked, raised, start_tikhonov, tikhonov_step
from varprox.precision import full_products
from varprox.problem.data import check_data, check_pair, zero_w
from varprox.problem.heads import has_bias
from varprox.problem.model import Problem, Separable, check_problem
from varprox.problem.prediction import predict
from varprox.problem.weighted import Weighted, alike, counted, mapped, plain, shifted


class State(NamedTuple):
    """The weights of slimTrain and what its next step starts from, all of it arrays.

    Attributes:
        theta: The nonlinear weights θ.
        verified: The last θ at which a batch was finite.
        tikhonov: The state of ``varprox.slimtik``; its W predicts the targets minus ``centre``.
        centre: The mean of the targets that ``init`` was given, (outputs,); 0 if there is no bias.
        unit: The root mean square of these targets minus ``centre``.
        optimizer: The state of the optimizer for θ.
        learned: What features have learned from batches; see ``with_learned``.
        objective: Φ of the last batch, or the mean over the last epoch; NaN at the start.
        work_units: The work units so far.
        samples: The number of samples in a pass of one work unit.
        key: The random key for the next epoch, as ``jax.random.key_data``.
        status: The number of a ``Status``.
        like: One sample of zeros, with the shapes and dtypes of those of a batch.
    """

    theta: Any
    verified: Any  # the last θ at which a batch was finite
    tikhonov: Tikhonov  # its W predicts targets less `centre`
    centre: jax.Array  # (outputs,)
    unit: jax.Array  # of the targets less `centre`
    optimizer: Any  # the state of the one for θ
    learned: list  # what features hold that learn from batches, as in `learned_by`
    objective: jax.Array  # Φ of the last batch, or the mean of those of the last epoch
    work_units: jax.Array  # so far
    samples: jax.Array  # that a pass of one work unit goes over
    key: jax.Array  # its data, as in `jax.random.key_data`
    status: jax.Array
    like: tuple  # one sample of zeros, shaped as those of a batch are

    @property
    def w(self) -> jax.Array:
        """The weights of the last layer, (columns, outputs)."""
        return raised(self.tikhonov.w, self.centre)

    def with_w(self, w: jax.Array) -> "State":
        """The same state with other weights of the last layer, (columns, outputs)."""
        return self._replace(tikhonov=self.tikhonov._replace(w=raised(w, -self.centre)))


class Info(NamedTuple):
    """What one step of slimTrain did.

    After an epoch every field has a leading axis with one entry per step, and the history of
    ``fit`` holds the means.

    Attributes:
        objective: Φ of the batch at the new W and the old θ, penalties included.
        lambda_: The regularisation parameter Λ.
        lambda_sum: ΣΛ after the step.
        selection: The value of the selection function at Λ.
        finite: Whether the batch was finite. If not, nothing was learned from it.
    """

    objective: jax.Array
    lambda_: jax.Array
    lambda_sum: jax.Array
    selection: jax.Array  # the value of the selection function
    finite: jax.Array  # False where the batch was not, and nothing was learned from it


class _Static(NamedTuple):
    """What a step is compiled for."""

    optimizer: optax.GradientTransformation
    feature_precision: str | None


def slimtrain(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    memory: int = 5,
    selection: Callable | None = None,
    *,
    initial: float = 0.05,
    lower_bound: float = 1e-7,
    feature_precision: str | None = "highest",
) -> Method:
    """Minibatch training under least squares: slimTik finds W, and any optimizer of optax moves θ.

    A step takes one forward pass, updates W by ``varprox.slimtik`` and moves θ by one reverse pass
    at the new W. The update of W uses the features of the batch and the Gram matrices of the
    ``memory`` batches before it. W has no learning rate; its regularisation Λ is chosen at every
    step. This is the method of choice for data in minibatches. The last layer may be dense or a
    convolution.

    Rows and targets enter slimTik divided by √batch. ΣΛ takes the place of the problem's
    ``w_penalty``, which only enters the objective that is reported.

    Apart from the penalty on θ, the units of the targets do not matter. ``init`` takes the mean of
    its targets as the start of the bias, which is regularised towards this mean, and the root mean
    square of the rest as the unit. The optimizer sees the gradient of the objective divided by the
    square of the unit. If the targets have mean zero and unit size, this is the gradient of the
    objective itself. W, the objective and everything else that is reported are in the original
    units.

    Features may learn from the batches they see, as batch norm does. ``state.learned`` keeps what
    they have learned; ``varprox.methods.slimtrain.with_learned(problem, state.learned)`` is the
    problem with it.

    A batch is skipped if its data, its loss, a gradient or the new weights are NaN or infinite.
    Then θ returns to the last value at which a batch was finite, and W to the one found from that
    batch. This also recovers weights that have diverged. An epoch returns θ in the same way if a
    batch was skipped, or if its last θ gives predictions that are not finite. The status after a
    step is NON_FINITE if the batch was skipped. After an epoch it is NON_FINITE if the predictions
    are not finite, if all batches were skipped, or if finite batches were followed more often by a
    skipped batch than by a finite one. There is no other status that ends a run.

    One work unit is a forward or a backward pass over as many samples as ``init`` was given. A step
    takes two passes over its batch.

    Arguments:
        problem: The problem to train, with the loss ``least_squares()``.
        optimizer: A gradient transformation of optax for θ, such as ``optax.adam(1e-3)``. Another
            object recompiles.
        memory: The number of earlier batches whose Gram matrices are kept, an integer ≥ 0. Changing
            it recompiles.
        selection: How Λ is chosen, such as ``sgcv()`` or ``proportional()``; see ``slimtik``. None
            stands for ``proportional()``. The paper has ``sgcv()``, which looks at the batch that W
            is fitted to, and so lets ΣΛ fall to its lower bound. Changing a number in a selection
            does not recompile.
        initial: ΣΛ at the start, a number ≥ 0. Changing it does not recompile.
        lower_bound: The lower bound of ΣΛ, a number ≥ 0. Changing it does not recompile.
        feature_precision: The precision of products inside the features, forward and reverse, that
            name none themselves. It is a name that ``jax.default_matmul_precision`` takes, or None
            for the default of the device, which on accelerators is fast and rounds to about three
            digits. All other products are in full precision. Changing it recompiles.

    Returns:
        A stochastic ``Method`` with three pure functions. ``state = method.init(theta, data, key)``
        takes data of any number of samples. ``state, info = method.step(state, batch)`` takes one
        step.
        ``state, infos = method.epoch(state, data, batch_size=32)`` passes over the data in shuffled
        batches; samples that do not fill a batch are left out of this epoch. The state is a
        ``varprox.methods.slimtrain.State``, the info a ``varprox.methods.slimtrain.Info``.

    Raises:
        TypeError: If ``problem`` is not a ``Problem`` or has another loss, if ``optimizer`` has no
            ``init`` and ``update``, if ``selection`` is not a function, or if ``initial`` or
            ``lower_bound`` is not a number. ``init`` raises it for data, θ or features of the wrong
            type and for an optimizer that asks for more than gradients, such as ``optax.lbfgs``,
            ``step`` and ``epoch`` for the state of another method and for a batch of another
            structure.
        ValueError: If an option is out of its range. ``init`` raises it for data that do not fit
            the problem, ``step`` and ``epoch`` for samples of another shape or dtype than ``init``
            was given, and ``epoch`` for a ``batch_size`` that is larger than the data.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import varprox as vp
        >>> model = vp.Separable(lambda theta, x: jnp.exp(-theta * x), vp.dense(bias=False))
        >>> problem = vp.Problem(model, vp.least_squares())
        >>> inputs = jnp.linspace(0, 1, 20)[:, None]
        >>> data = inputs, 2 * jnp.exp(-3 * inputs)
        >>> method = vp.slimtrain(problem, optax.sgd(1.0), memory=2)
        >>> solution = vp.fit(method, jnp.ones(1), data, epochs=5, batch_size=10)
        >>> objective = solution.history["objective"]  # the mean of each epoch
        >>> objective.shape, bool(objective[5] < objective[1])
        ((6,), True)

    Source:
        Newman, Chung, Chung, Ruthotto, arXiv:2109.14002, algorithm 1.
    """
    check_problem(problem)
    if not problem.loss.quadratic:
        raise TypeError(
            f"problem: expected the loss varprox.least_squares(), got {type(problem.loss).__name__}"
        )
    check_optimizer(optimizer)
    try:
        with jax.default_matmul_precision(feature_precision):
            pass
    except ValueError:
        raise ValueError(
            "feature_precision: expected None or a name that jax.default_matmul_precision takes, "
            f"such as 'highest' or 'default', got {feature_precision!r}"
        ) from None
    selection = proportional() if selection is None else selection
    options = problem, checked(memory, selection, initial, lower_bound)
    static = _Static(optimizer, feature_precision)
    return Method(
        init=partial(_init, static, options),
        step=partial(_step, static, options),
        problem=problem,
        epoch=partial(_epoch, static, options),
        name="slimtrain",
    )


def check_optimizer(optimizer: Any) -> None:
    """Refuses what is no gradient transformation of optax with a TypeError."""
    if not (hasattr(optimizer, "init") and callable(getattr(optimizer, "update", None))):
        raise TypeError(
            f"optimizer: expected one of optax, such as optax.adam(1e-3), got {shown(optimizer)}"
        )


def with_learned(problem: Problem, learned: list) -> Problem:
    """The problem with features that hold what they have learned from batches.

    Arguments:
        problem: The problem that the method was made for.
        learned: The field ``learned`` of a state of ``slimtrain``.

    Returns:
        The problem to pass to ``predict``; ``problem`` itself if its features do not learn from
        batches.
    """
    model = problem.model
    if model.training is None:
        return problem
    leaves, structure = jax.tree.flatten(model.features)
    leaves = [
        jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new
        for new, old in zip(learned, leaves, strict=True)
    ]
    features = jax.tree.unflatten(structure, leaves)
    return problem.with_model(Separable(features, model.head, model.training))


def learned_by(model: Separable) -> list:
    """The arrays of features that learn from batches, random keys as their data; none of others."""
    leaves = [] if model.training is None else jax.tree.leaves(model.features)
    return [jax.random.key_data(x) if _is_key(x) else jnp.asarray(x) for x in leaves]


def _is_key(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _init(static, options, theta, data, key=None):
    problem, tikhonov_options = options
    theta, (inputs, targets) = check_data(problem, theta, data, stochastic=True)
    head = problem.model.head
    w = zero_w(problem, jax.eval_shape(problem.model.features, theta, inputs), targets)
    theta, targets = jax.tree.map(jnp.asarray, (theta, targets))
    centre, unit = centre_and_unit(targets, has_bias(head))
    state = State(
        theta=theta,
        verified=theta,
        tikhonov=start_tikhonov(tikhonov_options, w, shared=alike(targets)),
        centre=centre,
        unit=unit,
        optimizer=_start_optimizer(static.optimizer, theta),
        learned=learned_by(problem.model),
        objective=jnp.full((), jnp.nan, w.dtype),
        work_units=jnp.zeros((), w.dtype),
        samples=jnp.full((), len(targets), w.dtype),
        key=_key_data(jax.random.key(0) if key is None else key),
        status=jnp.int32(Status.RUNNING),
        like=jax.tree.map(lambda x: jnp.zeros_like(x[:1]), (inputs, targets)),
    )
    values = plain(targets)
    split = None if isinstance(values, jax.core.Tracer) else values.sharding
    if not isinstance(split, NamedSharding):
        return state
    # Where steps leave it: elsewhere the second epoch would be compiled once more.
    return jax.jit(lambda state: state, out_shardings=NamedSharding(split.mesh, PartitionSpec()))(
        state
    )


def _start_optimizer(optimizer, theta):
    """Its state, where its update asks for no more than a step has."""
    try:
        state = optimizer.init(theta)
        with jax.numpy_dtype_promotion("standard"):  # the strict one is for a step to meet
            jax.eval_shape(optimizer.update, theta, state, theta)
    except Exception as error:  # which optimizers may raise as they like
        raise TypeError(
            "optimizer: expected one whose update takes a gradient, its state and theta alone, "
            f"such as optax.adam(1e-3), got {told(error)}"
        ) from error
    return state


def _key_data(key):
    try:
        return jax.random.key_data(key)
    except TypeError:
        raise TypeError(
            f"key: expected a random key, such as jax.random.key(0), got {shown(key)}"
        ) from None


def _epoch(static, options, state, data, *, batch_size):
    """`varprox.methods.minibatches.epoch`; where not all of it was finite, or what it ends with is
    not for one more batch, the last θ that a batch has verified comes back."""
    check_state("slimtrain", isinstance(state, State), state)
    data = check_pair(data)
    _check_like(state, data)
    state, infos = epoch(_advance, static, options, state, data, batch_size=batch_size)
    inputs = jax.tree.map(lambda leaf: leaf[:batch_size], data[0])
    return _verified(options, state, inputs, infos.finite.all()), infos


@jax.jit
@full_products
def _verified(options, state, inputs, finite):
    """The state with a θ whose predictions for these inputs are numbers, if all has been so far."""
    problem = with_learned(options[0], state.learned)
    predictions = predict(problem, state.theta, state.w, inputs)
    known = _finite(predictions)
    status = jnp.where(known, state.status, Status.NON_FINITE)
    theta = _choose(finite & known, state.theta, state.verified)
    return state._replace(theta=theta, status=status.astype(jnp.int32))


def _step(static, options, state, batch):
    check_state("slimtrain", isinstance(state, State), state)
    return _advance(static, options, state, check_pair(batch))


@partial(jax.jit, static_argnums=0)
@full_products
def _advance(static, options, state, batch):
    _check_like(state, batch)
    inputs, targets = batch
    problem, tikhonov_options = options
    problem = with_learned(problem, state.learned)
    head, loss, unit = problem.model.head, problem.loss, state.unit

    with jax.default_matmul_precision(static.feature_precision):
        z, pullback, model = jax.vjp(
            lambda theta: problem.model.train(theta, inputs), state.theta, has_aux=True
        )
    _check_features(head, z, state.tikhonov.w, targets)
    centred = shifted(targets, state.centre)
    moments = head.moments(z, state.tikhonov.w, centred).scaled(1 / len(targets))
    count = counted(targets)
    tikhonov, chosen = tikhonov_step(tikhonov_options, state.tikhonov, moments, count)

    # Of the objective divided by unit², every part before it can overflow.
    in_units = mapped(lambda values: values / unit, centred)
    value, slope = jax.value_and_grad(
        lambda z: loss.value(head.apply(z, tikhonov.w / unit), in_units)
    )(z)
    penalty, of_penalty = jax.value_and_grad(problem.penalty)(state.theta)
    with jax.default_matmul_precision(static.feature_precision):
        (gradient,) = pullback(slope)
    gradient = jax.tree.map(lambda a, b: a + b / unit / unit, gradient, of_penalty)
    updates, optimizer = static.optimizer.update(gradient, state.optimizer, state.theta)
    theta, learned = optax.apply_updates(state.theta, updates), learned_by(model)

    known = jax.tree.map(lambda new, old: _finite(new) | ~_finite(old), learned, state.learned)
    parts = [value, penalty, *jax.tree.leaves(theta)]
    finite = chosen.finite & jnp.stack([*map(_finite, parts), *known]).all()
    state_after = state._replace(tikhonov=tikhonov)
    objective = value * unit * unit + penalty + problem.penalty_on_w(state_after.w)
    after = state._replace(
        theta=_choose(finite, theta, state.verified),
        verified=_choose(finite, state.theta, state.verified),
        tikhonov=_choose(finite, tikhonov, state.tikhonov),
        optimizer=_choose(finite, optimizer, state.optimizer),
        learned=_choose(finite, learned, state.learned),
        objective=_choose(finite, objective, state.objective),
        work_units=state.work_units + 2 * len(targets) / state.samples,
        status=jnp.where(finite, Status.RUNNING, Status.NON_FINITE).astype(jnp.int32),
    )
    info = Info(
        objective=objective,
        lambda_=chosen.lambda_,
        lambda_sum=after.tikhonov.lambda_sum,
        selection=chosen.value,
        finite=finite,
    )
    return after, info


def _finite(array):
    return jnp.isfinite(array).all()


def _choose(condition, new, old):
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _check_features(head, z, w, targets):
    """Refuses features that know only one size of the batch."""
    came = jax.eval_shape(head.apply, z, w).shape
    if came != targets.shape:
        raise ValueError(
            f"features: expected those of {len(targets)} samples for a batch of as many, with "
            f"predictions of shape {targets.shape}, got predictions of shape {came}"
        )


def _check_like(state, batch):
    """Refuses a batch whose samples are not like those that `init` has seen."""
    samples = jnp.shape(batch[1])[:1] or (0,)
    if samples == (0,):
        raise ValueError(f"targets: expected at least one sample, got shape {jnp.shape(batch[1])}")
    seen, given = (isinstance(targets, Weighted) for _, targets in (state.like, batch))
    if seen != given:
        with_or_without = {True: "(inputs, targets, weights)", False: "(inputs, targets)"}
        raise TypeError(
            f"data: expected {with_or_without[seen]}, as `init` has seen, got "
            f"{with_or_without[given]}"
        )
    for name, expected, came in zip(("inputs", "targets"), state.like, batch, strict=True):
        structures: list[Any] = [jax.tree.structure(tree) for tree in (expected, came)]
        if structures[0] != structures[1]:
            raise TypeError(
                f"{name}: expected {structures[0]}, as `init` has seen, got {structures[1]}"
            )
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(came), strict=True):
            wanted = f"{one.dtype}{[*samples, *one.shape[1:]]}"
            got = f"{jnp.result_type(other)}{[*jnp.shape(other)]}"
            if got != wanted:
                raise ValueError(f"{name}: expected {wanted}, as `init` has seen, got {got}")
