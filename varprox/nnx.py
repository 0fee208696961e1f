"""Take a flax ``nnx`` model apart into features, θ and last layer; put the trained weights back.

``split`` gives θ and the ``Separable`` that a ``Problem`` takes. ``merge`` gives a flax model with
the trained weights. ``initial_w`` reads the last layer of a flax model.
"""

from collections.abc import MutableSequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from varprox.checks import apart, check_array, kind, library, listed, shown, told
from varprox.problem.data import weights
from varprox.problem.heads import ConvHead, Head, conv, conv_transpose, dense
from varprox.problem.model import Separable

SOME = 64  # samples that show what a network does


def split(net: nnx.Module, head: str = "head") -> tuple[Any, Separable]:
    """Takes a network apart into its nonlinear weights and a separable model.

    The last operation of ``net(inputs)`` must be the layer at the path ``head``, and the network
    must call this layer once. Only a call with inputs can show this, so methods and ``solve_w``
    check it and raise ValueError. They also raise it if the layer has another number of outputs
    than the targets, because ``merge`` could not put W back. The layer may be an ``nnx.Linear``, or
    an ``nnx.Conv`` or ``nnx.ConvTranspose`` over images with the same padding on both sides.

    The features run the network without its last layer, as after ``net.eval()``: batch norm uses
    the statistics that it has, and dropout drops nothing. Whatever is not a weight, such as these
    statistics and the keys of random numbers, is part of the model. It changes only in training
    batches, ``model.train(theta, inputs)``, which run the network as after ``net.train()``.

    The model is a pytree. If an equal network is split again, the structure is the same and nothing
    recompiles. ``net`` does not change.

    Arguments:
        net: A flax ``nnx.Module``.
        head: The attribute path of the last layer, such as ``"head"``, ``"decoder.out"`` or
            ``"layers.2"``. In an ``nnx.Sequential`` the default is its last layer.

    Returns:
        The pair (theta, model). ``theta`` holds the ``nnx.Param`` arrays of everything but the last
        layer in nested dicts; the entries of an ``nnx.List`` have integer keys. ``model`` is a
        ``Separable`` whose head computes what the layer does.

    Raises:
        TypeError: If ``net`` is not a module, if ``head`` is not a string, or if another kind of
            layer is there.
        ValueError: If there is no such path, if the rest of the network uses the weights of the
            layer, too, or if ``conv`` and ``conv_transpose`` cannot express the convolution.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> net = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), jnp.tanh, nnx.Linear(3, 1, rngs=rngs))
        >>> theta, model = vp.nnx.split(net)
        >>> jax.tree.map(jnp.shape, theta)
        {'layers': {0: {'bias': (3,), 'kernel': (2, 3)}}}
        >>> model.rows(theta, jnp.zeros((5, 2))).shape  # three features and a one for the bias
        (5, 4)
    """
    body = _clone(net)
    body.eval()
    parent, name, layer = _find(body, head)
    last = _head_of(layer, head)
    _put(parent, name, _Identity(last, layer.kernel.shape[-1]))
    if any(node is layer.kernel or node is layer.bias for node in _variables(body)):
        raise ValueError(
            f"head: expected a layer with weights of its own, got {head!r}, "
            "whose weights the rest of the network uses too"
        )
    graphdef, *states = nnx.split(body, nnx.Param, ...)
    theta, state = map(nnx.to_pure_dict, states)
    training = _training if state else None
    return theta, Separable(Partial(_FEATURES, graphdef, state), last, training)


def merge(
    net: nnx.Module,
    theta: Any,
    w: jax.Array,
    head: str = "head",
    *,
    model: Separable | None = None,
) -> nnx.Module:
    """A copy of a network with the weights θ and W, in their dtypes; the network does not change.

    Arguments:
        net: The flax ``nnx.Module`` that ``split`` was given.
        theta: The nonlinear weights, with the structure that ``split(net, head)`` gives them.
        w: The last layer, (columns, outputs), its last row the bias if the layer has one.
        head: The attribute path of the last layer, as for ``split``.
        model: The model of the trained problem, ``solution.problem.model``. The copy gets its
            statistics, such as those of batch norm. If None, the copy has the statistics of
            ``net``.

    Returns:
        A new ``nnx.Module`` like ``net``.

    Raises:
        TypeError: If ``theta`` or ``w`` hold what are no arrays, if ``model`` is not one of
            ``split``, and as ``split`` does.
        ValueError: If ``theta``, ``w`` or the statistics of ``model`` have another structure or
            shape, and as ``split`` does.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> net = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), jnp.tanh, nnx.Linear(3, 1, rngs=rngs))
        >>> theta, model = vp.nnx.split(net)
        >>> trained = vp.nnx.merge(net, theta, w=jnp.full((4, 1), 0.5))
        >>> trained(jnp.zeros((5, 2))).shape, trained.layers[2].bias[...].tolist()
        ((5, 1), [0.5])
    """
    expected, fresh = split(net, head)
    for leaf in weights(theta):
        check_array("theta", leaf)
    _check_like("theta", theta, expected)
    whole = _clone(net)
    *_, layer = _find(whole, head)
    last = _head_of(layer, head)
    like = jax.eval_shape(last.pack, *_weights(layer))
    check_array("w", w)
    if jnp.shape(w) != like.shape:
        raise ValueError(f"w: expected shape {like.shape}, got {jnp.shape(w)}")
    kernel, bias = last.unpack(jnp.asarray(w))
    nnx.update(whole, jax.tree.map(jnp.asarray, theta))
    nnx.update(layer, {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias})
    if model is not None:
        features = getattr(model, "features", None)
        if not isinstance(getattr(features, "func", None), _Features):
            raise TypeError(
                "model: expected solution.problem.model, that of a network that was split, got "
                f"{shown(model)}"
            )
        state = _state(model)
        _check_like("model", state, _state(fresh))
        nnx.update(whole, state)
    return whole


def initial_w(net: nnx.Module, head: str = "head") -> jax.Array:
    """The weights of the last layer as W, (columns, outputs), as the network has them.

    Arguments:
        net: A flax ``nnx.Module``.
        head: The attribute path of the last layer, as for ``split``.

    Returns:
        An array (columns, outputs), its last row the bias if the layer has one.

    Raises:
        TypeError: If ``net`` is not a module, if ``head`` is not a string, or if another kind of
            layer is there.
        ValueError: If there is no such path, or if ``conv`` and ``conv_transpose`` cannot express
            the convolution.

    Example:
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> net = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), jnp.tanh, nnx.Linear(3, 1, rngs=rngs))
        >>> vp.nnx.initial_w(net).shape
        (4, 1)
    """
    *_, layer = _find(_clone(net), head)
    return _head_of(layer, head).pack(*_weights(layer))


def _weights(layer):
    """Kernel and bias, None where there is none."""
    return layer.kernel[...], layer.bias[...] if layer.use_bias else None


def _head_of(layer, path):
    """The head that computes what the layer does."""
    if isinstance(layer, nnx.Linear):
        return dense(bias=layer.use_bias)
    transposed = isinstance(layer, nnx.ConvTranspose)
    size, padding = layer.kernel_size, layer.padding
    strides = _pair(1 if layer.strides is None else layer.strides)
    plain = (
        len(size) == 2
        and _pair(layer.kernel_dilation or 1) == (1, 1)
        and layer.mask is None
        and not (layer.transpose_kernel if transposed else layer.feature_group_count > 1)
    )
    if plain and isinstance(padding, str) and padding in ("SAME", "VALID"):
        padding = [_padding(padding, *axis, transposed) for axis in zip(size, strides, strict=True)]
    elif not isinstance(padding, str):
        padding = [(p, p) if isinstance(p, int) else tuple(p) for p in _pair(padding)]
    if not plain or isinstance(padding, str) or any(low != high for low, high in padding):
        raise ValueError(
            f"head: expected a convolution over images without dilation, groups or mask, padded by "
            f"the same on both sides, got {path!r} with kernel size {size} and padding "
            f"{layer.padding!r}"
        )
    pads = [low for low, _ in padding]
    if transposed:  # flax counts the zeros around the inputs, which are spread by the stride
        pads = [k - 1 - p for k, p in zip(size, pads, strict=True)]
    make = conv_transpose if transposed else conv
    return make(size, stride=strides, padding=tuple(pads), bias=layer.use_bias)


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _padding(name, size, stride, transposed):
    """Zeros on both sides that "SAME" or "VALID" mean, for inputs that a stride divides."""
    if transposed:
        whole = size + stride - 2 + (max(size - stride, 0) if name == "VALID" else 0)
        low = size - 1 if name == "VALID" or stride > size - 1 else -(-whole // 2)
        return low, whole - low
    whole = max(size - stride, 0) if name == "SAME" else 0
    return whole // 2, whole - whole // 2


class _Identity(nnx.Module):
    """What stands in the head's place, called as `nnx.Linear` is."""

    def __init__(self, head: Head, outputs: int):
        self.head, self.outputs = head, outputs

    def __call__(self, inputs, out_sharding=None):
        return inputs


class _Seen:
    """What is kept of a call while it is traced: the shape of its output."""

    shape: tuple | None = None


class _Answer(nnx.Module):
    """What answers in the head's place with numbers of its own, and counts how often."""

    def __init__(self, place: _Identity, dtype, seen: _Seen):
        self.head, self.outputs, self.dtype, self.seen = place.head, place.outputs, dtype, seen
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, inputs, out_sharding=None):
        self.calls[...] = self.calls[...] + 1
        self.seen.shape = self._shape(inputs)
        return _numbers(self.seen.shape, self.dtype)

    def _shape(self, inputs):
        """That of the head's output."""
        if not isinstance(self.head, ConvHead):
            return (*inputs.shape[:-1], self.outputs)
        columns = jax.eval_shape(self.head.rows, inputs).shape[1]
        w = jax.ShapeDtypeStruct((columns, self.outputs), inputs.dtype)
        return jax.eval_shape(self.head.apply, inputs, w).shape


def _numbers(shape, dtype):
    """Of either sign and many sizes, so that no range of an activation has them all; the same ones
    for the same shape, to the last bit."""
    drawn = np.cos(np.arange(1, np.prod(shape, dtype=int) + 1))
    drawn = 10 ** (3 * np.sin(1e4 * drawn)) * drawn
    return jnp.asarray(drawn.reshape(shape).astype(dtype))


@dataclass(frozen=True)
class _Features:
    """A network without its head."""

    def __repr__(self):
        return "nnx network"

    def __call__(self, graphdef, state, theta, inputs):
        return nnx.merge(graphdef, theta, state)(inputs)

    def varprox_check(self, graphdef, state, theta, inputs, targets):
        """Refuses a network that does not call its head once, or does anything after it, and a head
        with another number of outputs than the targets.

        `varprox.problem.data.check_data` asks for this. In the head's place stands what answers
        with numbers of its own, shaped like the head's output: these are to come out, in evaluation
        and in training, whatever θ and the inputs are.
        """
        run = partial(_answered, graphdef, state, theta, dtype=targets.dtype)
        path, place = _place(nnx.merge(graphdef, theta, state))
        for training in (False, True) if jax.tree.leaves(state) else (False,):
            try:  # some samples say it; a network that couples samples may want them all
                calls, same = run(_some(inputs), training=training)
            except Exception:
                calls, same = run(inputs, training=training)
            if calls == 1 and same:
                continue
            if calls != 1:
                came = f"one that calls it {calls} times" if calls > 1 else "one that never does"
                raise ValueError(
                    f"head: expected a network that calls its layer {path!r} once, got {came}"
                )
            raise ValueError(_AFTER.format(path=path, came=" in training" if training else ""))
        if targets.shape[-1] != place.outputs:
            raise ValueError(
                f"targets: expected {place.outputs} outputs, as many as the network's layer "
                f"{path!r} has, got {targets.shape[-1]}; give the layer as many as the targets have"
            )


_FEATURES = _Features()
_AFTER = (
    "head: expected a network whose last operation is its layer {path!r}, got one that changes "
    "the output of this layer{came}; leave out of the network what comes after it, or have it done "
    "to the targets"
)


@partial(jax.jit, static_argnames=("dtype", "training"))
def _answered(graphdef, state, theta, inputs, *, dtype, training):
    """How often the network calls its head, and whether it gives the head's answer as it is."""

    def drawn(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf + jnp.cos(jnp.arange(1, leaf.size + 1, dtype=leaf.dtype)).reshape(leaf.shape)

    # Not as they came, which may be special, such as a scale of one after the head.
    theta, inputs = jax.tree.map(drawn, (theta, inputs))
    net = nnx.merge(graphdef, theta, state)
    if training:
        net.train()
    path, place = _place(net)
    seen = _Seen()
    head = _Answer(place, dtype, seen)
    parent, name = _parent(net, path)
    _put(parent, name, head)
    try:
        out = net(inputs)
    except Exception as error:
        if seen.shape is not None:
            raise ValueError(_AFTER.format(path=path, came="")) from error
        raise ValueError(
            f"inputs: expected what the network takes up to its layer {path!r}, got "
            f"{listed(inputs=inputs)}: {told(error)}"
        ) from error
    if seen.shape is None:
        return head.calls[...], False
    answer = _numbers(seen.shape, dtype)
    like = jax.tree.map(jax.typeof, out) == jax.typeof(answer)
    return head.calls[...], jnp.all(out == answer) if like else False


def _place(net):
    """The path of what stands in the head's place, and this."""
    return next(
        (".".join(map(str, path)), node)
        for path, node in nnx.iter_graph(net)
        if isinstance(node, _Identity)
    )


def _some(inputs):
    """Up to `SOME` samples, spread over all of them."""

    def chosen(leaf):
        return leaf[np.unique(np.linspace(0, len(leaf) - 1, SOME).astype(int))]

    return jax.tree.map(chosen, inputs)


def _state(model):
    return model.features.args[1]


def _training(features, theta, inputs):
    graphdef, state = features.args
    net = nnx.merge(graphdef, theta, state)
    net.train()
    z = net(inputs)
    state = nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.Param)))
    return z, Partial(_FEATURES, graphdef, state)


def _clone(net):
    if not isinstance(net, nnx.Module):
        hint = "" if library(net) == "flax.nnx" else apart(net)  # that of a class is of no use
        raise TypeError(f"net: expected a flax nnx.Module, got {kind(net)}{hint}")
    return nnx.clone(net)


def _find(net, head):
    """The module or list that holds the last layer, its name or index there, and the layer."""
    if not isinstance(head, str):
        raise TypeError(
            f"head: expected an attribute path, such as 'decoder.out', got {shown(head)}"
        )
    if isinstance(net, nnx.Sequential) and head == "head" and not hasattr(net, head):
        head = f"layers.{len(net.layers) - 1}"
    try:
        parent, name = _parent(net, head)
        layer = _child(parent, name)
    except (AttributeError, IndexError, ValueError):
        nodes = [(at, node) for at, node in nnx.iter_graph(net) if at]  # but not the net itself
        layers = [repr(".".join(map(str, at))) for at, node in nodes if isinstance(node, _LAYERS)]
        such = f" such as {' or '.join(layers[-6:])}" if layers else ""
        raise ValueError(
            f"head: expected the path of an attribute of {type(net).__name__}{such}, got {head!r}"
        ) from None
    # A subclass that computes something else is another layer.
    if not any(type(layer).__call__ is kind.__call__ for kind in _LAYERS):
        after = callable(layer) and not isinstance(layer, nnx.Module)
        hint = "; leave out of the network what comes after its last layer" if after else ""
        raise TypeError(
            f"head: expected an nnx.Linear, nnx.Conv or nnx.ConvTranspose at {head!r}, "
            f"got {type(layer).__name__}{hint}"
        )
    return parent, name, layer


_LAYERS = nnx.Linear, nnx.Conv, nnx.ConvTranspose


def _parent(net, path):
    """The module or list that holds what is at a path, and its name or index there."""
    *path, name = path.split(".")
    return reduce(_child, path, net), name


def _put(parent, name, node):
    if isinstance(parent, MutableSequence):
        parent[int(name)] = node
    else:
        setattr(parent, name, node)


def _child(node, name):
    return node[int(name)] if isinstance(node, MutableSequence) else getattr(node, name)


def _variables(net):
    return [node for _, node in nnx.iter_graph(net) if isinstance(node, nnx.Variable)]


def _check_like(name, tree, expected):
    wanted, came = _shapes(expected), _shapes(tree)
    for path in wanted | came:
        if wanted.get(path) != came.get(path):
            raise ValueError(
                f"{name}: expected {wanted.get(path, 'nothing')} as the shape of "
                f"{name}{jax.tree_util.keystr(path)}, got {came.get(path, 'nothing')}"
            )


def _shapes(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path: jnp.shape(leaf) for path, leaf in leaves}
