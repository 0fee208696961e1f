"""Which data, weights and features a problem can be solved for: checked before anything runs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from varprox.checks import (
    ARRAYS,
    called,
    check_array,
    is_result,
    kind,
    library,
)
from varprox.problem.heads import ConvHead
from varprox.problem.hosted import at_hand, leaves_of, on_host, shapes_of
from varprox.problem.model import Problem, Separable, check_problem
from varprox.problem.traits import treats_samples_alone
from varprox.problem.weighted import Targets, Weighted, gapless, plain

PIECE = 2**22  # entries of an array on a disk that are looked at together


def check_data(
    problem: Problem, theta, data, *, stochastic: bool = False, full_batch: bool = False
) -> tuple[Any, tuple[Any, Targets]]:
    """θ, and the pair of inputs and targets, `Weighted` where the data have weights; both
    `automatic`. Refuses data that the problem cannot be solved for; passes in silence under trace.

    Convolutional heads, and images as targets, are for `stochastic` methods. For all else inputs of
    NumPy stay on the host where the problem takes them in chunks. A `full_batch` method is refused
    features that learn from the batches they see, to which it shows none. Where the function of the
    features' `Partial` has a `varprox_check(*args, theta, inputs, targets)`, it is called with the
    arguments there. Raises TypeError or ValueError naming the argument, what was expected and what
    came.
    """
    check_problem(problem)
    of_images = isinstance(problem.model.head, ConvHead)
    if of_images and not stochastic:
        raise TypeError(
            "problem: expected a model with a dense head; one with a convolutional head is trained "
            "by varprox.slimtrain"
        )
    theta = automatic(theta)
    inputs, targets = check_pair(data)
    dtype = _check_arrays(problem, theta, inputs, targets)
    _check_targets(problem, targets, of_images)
    check_inputs(inputs, targets)
    leaves = jax.tree.leaves((problem.model, theta, inputs, targets))
    concrete = not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if concrete:
        _check_values(problem.model, theta, inputs, targets, full_batch)
    _check_features(problem, theta, inputs, targets, dtype, of_images)
    if concrete and problem.chunk is not None and not treats_samples_alone(problem, theta, inputs):
        raise ValueError(
            "chunk: expected None for features that depend on the other samples of the batch, got "
            f"{problem.chunk}"
        )
    _check_penalties(problem, theta, dtype)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(targets)):
        _check_weights(problem, targets)
        for _, part in _held(plain(targets)):
            problem.loss.check(part)
    return theta, (inputs if stochastic else where_they_stay(problem, inputs), targets)


def where_they_stay(problem: Problem, inputs: Any) -> Any:
    """The inputs; those of NumPy are left on the host where chunks are taken of them."""
    return on_host(inputs) if problem.chunked(inputs) else inputs


def automatic(tree: Any) -> Any:
    """The tree with arrays over a mesh of explicit axes, JAX's default, labelled as if these were
    automatic, so that it is the compiler that parts the work. Nothing is moved or copied.

    Refuses what JAX gives no other label with a ValueError: split arrays that are traced, or come
    under `jax.set_mesh`.
    """
    return jax.tree.map(_automatic, tree)


def _automatic(leaf):
    if not isinstance(leaf, jax.Array):
        return leaf
    mesh, spec = jax.typeof(leaf).sharding.mesh, jax.typeof(leaf).sharding.spec
    if AxisType.Explicit not in mesh.axis_types:
        return leaf
    set_here = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    if not (set_here or isinstance(leaf, jax.core.Tracer)):
        here: Any = leaf.sharding
        axes = len(mesh.axis_names) * (AxisType.Auto,)
        like = Mesh(here.mesh.devices, mesh.axis_names, axis_types=axes)
        return jax.device_put(leaf, NamedSharding(like, here.spec))
    if any(spec):
        raise ValueError(
            "data: expected over a mesh with automatic axes, inside jit and under jax.set_mesh, as "
            "jax.make_mesh(…, axis_types=(jax.sharding.AxisType.Auto,)) makes one, got over "
            f"{mesh.axis_types}"
        )
    return leaf


def check_pair(data: Any) -> tuple[Any, Targets]:
    """Inputs and targets, `Weighted` where weights are a third of the data, and `automatic`;
    TypeError or ValueError where these are no arrays that go together. Looks at no number."""
    if not (isinstance(data, tuple | list) and len(data) in (2, 3)):
        came = f"{type(data).__name__} of {len(data)}" if isinstance(data, tuple | list) else ""
        raise TypeError(
            "data: expected a pair (inputs, targets), or (inputs, targets, weights), got "
            f"{came or kind(data)}"
        )
    inputs, *rest = data
    inputs, targets, *weights = automatic((at_hand(inputs), *rest))
    for leaf in jax.tree.leaves(inputs):
        check_array("inputs", leaf)
    check_array("targets", plain(targets))
    if not weights or weights[0] is None:
        return inputs, targets
    return inputs, weighted(targets, *weights)


def weighted(targets: jax.Array, weights: jax.Array) -> Weighted:
    """Targets with weights of samples or of entries; TypeError or ValueError where these are no
    arrays that go together. Looks at no number."""
    check_array("weights", weights)
    targets, weights = jnp.asarray(targets), jnp.asarray(weights)
    of_samples = (len(targets),) if targets.ndim else ()
    if weights.shape not in (of_samples, targets.shape):
        raise ValueError(
            f"weights: expected shape {of_samples}, one for each sample, or {targets.shape}, one "
            f"for each entry of the targets, got {weights.shape}"
        )
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise TypeError(f"weights: expected real numbers, got dtype {weights.dtype}")
    weights = weights.astype(targets.dtype)
    return gapless(targets, weights.reshape(*weights.shape, *[1] * (targets.ndim - weights.ndim)))


def _check_weights(problem, targets):
    """Refuses weights that are no numbers ≥ 0, or that leave an output without targets."""
    if not isinstance(targets, Weighted):
        return
    above = np.zeros(targets.weights.shape[-1], bool)
    for _, part in _held(targets.weights):
        if not (np.isfinite(part).all() and (part >= 0).all()):
            raise ValueError(
                f"weights: expected finite numbers ≥ 0, got some from {part.min():g} to "
                f"{part.max():g}"
            )
        above |= np.any(part > 0, axis=tuple(range(part.ndim - 1)))
    empty = np.flatnonzero(~above)
    if len(empty) and targets.weights.is_fully_addressable:
        where = f" for output {empty[0]}" if len(above) > 1 else ""
        raise ValueError(f"weights: expected some above zero{where}, got none")
    if len(above) > 1 and not problem.loss.by_entry:
        raise ValueError(
            f"weights: expected one for each sample under {type(problem.loss).__name__}, whose "
            "terms are not those of single outputs, got one for each entry of the targets"
        )


def weights(theta: Any) -> list:
    """The leaves of θ. A whole network, model or result is a leaf, too, which is no array."""

    def is_leaf(node):
        if library(node) == "equinox":  # what `eqx.partition` takes out is a module, too
            return not all(map(_floating, jax.tree.leaves(node)))
        return library(node) is not None or is_result(node) or isinstance(node, Separable | Problem)

    return jax.tree.leaves(theta, is_leaf=is_leaf)


def _floating(leaf):
    return isinstance(leaf, ARRAYS) and jnp.issubdtype(leaf.dtype, jnp.floating)


def check_w(problem: Problem, theta, w, data) -> None:
    """Refuses what is not W for data that have been checked."""
    check_array("w", w)
    inputs, targets = data
    z = jax.eval_shape(problem.model.features, theta, shapes_of(inputs))
    expected = jax.eval_shape(lambda: zero_w(problem, z, targets))
    if jnp.shape(w) != expected.shape:
        raise ValueError(
            f"w: expected shape {expected.shape}, as the rows and the targets ask for, got "
            f"{jnp.shape(w)}"
        )
    if jnp.result_type(w) != expected.dtype:
        raise TypeError(f"w: expected dtype {expected.dtype}, that of theta, got {w.dtype}")
    _check_finite("w", w)


def _check_arrays(problem, theta, inputs, targets):
    """Refuses what are no numbers. The dtype of theta and the targets."""
    leaves = weights(theta)
    if not leaves:
        raise ValueError("theta: expected a pytree with at least one array, got an empty one")
    for leaf in leaves:
        check_array("theta", leaf)
        if not _floating(leaf):
            raise TypeError(
                f"theta: expected floating numbers, got dtype {leaf.dtype}; what is not trained is "
                "for the features to hold, as jax.tree_util.Partial binds it"
            )
        _check_finite("theta", leaf)
        if jnp.size(leaf) == 0:
            raise ValueError(f"theta: expected arrays with entries, got shape {jnp.shape(leaf)}")
    for leaf in jax.tree.leaves(inputs):
        _check_finite("inputs", leaf)
    if not _floating(plain(targets)):
        labels = targets.shape[1:] in ((), (1,))
        remedy = problem.loss.hint if labels else ""
        remedy = remedy or f"targets.astype({_dtypes(theta)[0]!r}) casts them"
        raise TypeError(f"targets: expected floating numbers, got dtype {targets.dtype}; {remedy}")
    _check_finite("targets", plain(targets))
    return _one_dtype(theta, inputs, targets)


def _one_dtype(theta, inputs, targets):
    """That of theta and targets, where they have one in which there are factorisations."""
    ours, theirs = _dtypes(theta), _dtypes(targets)
    if ours != theirs:
        came = {"theta": ours, "inputs": _dtypes(inputs), "targets": theirs}
        of = ", ".join(
            f"{name} of {' and '.join(dtypes)}" for name, dtypes in came.items() if dtypes
        )
        remedy = f"cast the data to {ours[0]}" if len(ours) == 1 else "cast theta to one of these"
        if theirs == ["float64"]:
            remedy += ", or make the weights as nnx.Linear(…, param_dtype=jnp.float64) does"
        raise TypeError(
            f"theta, targets: expected one floating dtype throughout, got {of}; {remedy}"
        )
    if ours[0] not in ("float32", "float64"):
        raise TypeError(
            f"theta, targets: expected float32 or float64, got {ours[0]}; cast them to float32, "
            "as there are no factorisations in other precisions"
        )
    return jnp.dtype(ours[0])


def _dtypes(tree):
    """The names of the dtypes in a tree, as JAX takes its arrays."""
    return sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)})


def _check_targets(problem, targets, of_images):
    if of_images and len(targets.shape) != 4:
        raise ValueError(
            f"targets: expected shape (batch, height, width, outputs), got {targets.shape}"
        )
    if not of_images and len(targets.shape) != 2:
        raise ValueError(
            f"targets: expected shape (batch, outputs), got {targets.shape}; "
            + (problem.loss.hint or "a single output wants targets[:, None]")
        )
    if len(targets) == 0:
        raise ValueError("targets: expected at least one sample, got none")
    if 0 in targets.shape:
        raise ValueError(f"targets: expected at least one output, got shape {targets.shape}")


def check_inputs(inputs: Any, targets: Any) -> None:
    """Refuses inputs of another number of samples than the targets with a ValueError."""
    batch = len(targets)
    for leaf in leaves_of(inputs):
        if jnp.ndim(leaf) == 0 or len(leaf) != batch:
            listed = isinstance(inputs, list) and len(inputs) == batch
            hint = "; jnp.stack(inputs) makes one array of a list of samples" if listed else ""
            raise ValueError(
                f"inputs: expected {batch} samples along the first axis, as targets of shape "
                f"{targets.shape} have, got shape {jnp.shape(leaf)}{hint}"
            )


def _check_features(problem, theta, inputs, targets, dtype, of_images):
    batch = len(targets)
    traced = partial(jax.eval_shape, problem.model.features)
    z = called("features", traced, theta=theta, inputs=inputs)
    shape: tuple = getattr(z, "shape", ())
    came = getattr(z, "shape", type(z).__name__)
    if len(shape) != (4 if of_images else 2) or shape[0] != batch or shape[-1] == 0:
        expected = "height, width, channels), channels ≥ 1" if of_images else "m), m ≥ 1"
        raise ValueError(f"features: expected an array of shape ({batch}, {expected}, got {came}")
    if z.dtype != dtype:
        theirs = _dtypes(inputs)
        given = f" from inputs of {' and '.join(theirs)}" if theirs else ""
        what = "the inputs" if str(z.dtype) in theirs else "what the features return"
        raise TypeError(
            f"features: expected dtype {dtype}, that of theta and targets, got {z.dtype}{given}; "
            f"cast {what} to {dtype}"
        )
    predicted = jax.eval_shape(_predictions_like, problem, z, targets)
    if predicted.shape != targets.shape:
        raise ValueError(
            f"targets: expected shape {predicted.shape}, that of the predictions, "
            f"got {targets.shape}"
        )


def _check_penalties(problem, theta, dtype):
    """Refuses numbers that the dtype does not hold, and functions that are no penalties."""
    limits, w_penalty = jnp.finfo(dtype), problem.w_penalty
    for name in ("w_penalty", "theta_penalty"):
        for number in jax.tree.leaves(getattr(problem, name)):
            if isinstance(number, float) and number > float(limits.max):
                raise ValueError(f"{name}: expected a number that {dtype} holds, got {number!r}")
    vanishes = isinstance(w_penalty, float) and w_penalty < float(limits.tiny)
    if vanishes and not problem.loss.quadratic:
        raise ValueError(
            f"w_penalty: expected a positive number that {dtype} holds, got {w_penalty!r}"
        )
    for penalty in problem.theta_penalty:
        value = called("theta_penalty", partial(jax.eval_shape, penalty), theta=theta)
        came = getattr(value, "shape", type(value).__name__)
        if came != ():
            raise TypeError(f"theta_penalty: expected a scalar function, got {came}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"theta_penalty: expected a floating number, got dtype {value.dtype}")


def _check_values(model, theta, inputs, targets, full_batch):
    """What needs numbers to be seen, in features that others than the user have made."""
    with jax.ensure_compile_time_eval():
        if hasattr(model.features.func, "varprox_check"):
            model.features.func.varprox_check(*model.features.args, theta, inputs, targets)
        if full_batch and model.training is not None and _learns(model, theta, inputs):
            raise TypeError(
                "problem: expected features that are functions of theta and the inputs alone, got "
                "some that learn from training batches, such as batch norm; a full-batch method "
                "shows them none. Train them with varprox.slimtrain, or keep what they have "
                "learned with varprox.Separable(model.features, model.head)"
            )


@jax.jit
def _learns(model, theta, inputs):
    """Do the features of the same inputs differ after a training batch?"""
    _, after = model.train(theta, inputs)
    return jnp.any(model.features(theta, inputs) != after.features(theta, inputs))


def _predictions_like(problem, z, targets):
    return problem.model.head.apply(z, zero_w(problem, z, targets))


def zero_w(problem: Problem, z: jax.Array, targets: Targets) -> jax.Array:
    """W = 0 for features and targets, of which only shapes and dtypes are used."""
    rows = jax.eval_shape(problem.model.head.rows, z)
    return jnp.zeros((rows.shape[1], targets.shape[-1]), rows.dtype)


def _check_finite(name, leaf):
    dtype = jax.typeof(leaf).dtype
    if isinstance(leaf, jax.core.Tracer) or not jnp.issubdtype(dtype, jnp.inexact):
        return
    count, first = 0, None
    for begins, part in _held(leaf):
        with np.errstate(over="ignore"):  # where JAX makes single precision of double
            finite = np.isfinite(part.astype(dtype))
        if not finite.all():
            places = np.argwhere(~finite)
            count += len(places)
            first = (places[0] + begins).tolist() if first is None else first
    if count:
        raise ValueError(
            f"{name}: expected finite numbers, got {count} NaN or Inf in {dtype}, the first at "
            f"{first}"
        )


def _held(leaf):
    """The parts of an array that this process holds, and where each of them begins. What may lie
    on a disk is not taken as a whole."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        for shard in leaf.addressable_shards:
            yield [along.start or 0 for along in shard.index], np.asarray(shard.data)
    elif isinstance(leaf, np.memmap) and leaf.ndim:
        length = max(1, PIECE * len(leaf) // max(leaf.size, 1))
        for begin in range(0, len(leaf), length):
            part = np.asarray(leaf[begin : begin + length])
            yield [begin, *(leaf.ndim - 1) * [0]], part
    else:
        yield 0, np.asarray(leaf)
