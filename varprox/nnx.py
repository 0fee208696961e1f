"""Take a flax `nnx` model apart into features, θ and last layer; put the trained weights back.

Imports flax, model and heads.
"""

from collections.abc import MutableSequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial

from varprox.heads import conv, conv_transpose, dense
from varprox.model import Separable


def split(net: nnx.Module, head: str = "head") -> tuple[Any, Separable]:
    """Takes a network apart into its nonlinear weights and a separable model.

    The last operation of `net(inputs)` must be the layer at the attribute path `head`, such as
    "head", "decoder.out" or "layers.2"; in an `nnx.Sequential` the default is its last layer. It
    may be an `nnx.Linear`, or an `nnx.Conv` or `nnx.ConvTranspose` over images, whose padding is
    the same on both sides.

    Returns `theta`, nested dicts of the `nnx.Param` arrays of everything but the head (the entries
    of an `nnx.List` under integer keys), and `model`, a `Separable` whose `features(theta, inputs)`
    run the network without its head, as after `net.eval()`: batch norm takes the statistics that it
    has, and nothing is dropped out. What is no weight (these statistics, random number keys)
    travels with the model and changes only in training batches, `model.train(theta, inputs)`, which
    run the network as after `net.train()`. The model is a pytree; an equal network split again
    gives the same structure, so nothing recompiles.

    `net` stays as it is. Raises TypeError if it is no module or no such layer stands at `head`, and
    ValueError if there is no such path, if the head's weights are used by the rest of the network,
    or for a convolution that `varprox.conv` and `varprox.conv_transpose` know nothing of.
    """
    body = _clone(net)
    body.eval()
    parent, name, layer = _find(body, head)
    last = _head_of(layer, head)
    if isinstance(parent, MutableSequence):
        parent[int(name)] = _Identity()
    else:
        setattr(parent, name, _Identity())
    if any(node is layer.kernel or node is layer.bias for node in _variables(body)):
        raise ValueError(
            f"head: expected a layer with weights of its own, got {head!r}, "
            "whose weights the rest of the network uses too"
        )
    graphdef, *states = nnx.split(body, nnx.Param, ...)
    theta, state = map(nnx.to_pure_dict, states)
    training = _training if state else None
    return theta, Separable(Partial(_features, graphdef, state), last, training)


def merge(
    net: nnx.Module,
    theta: Any,
    w: jax.Array,
    head: str = "head",
    *,
    model: Separable | None = None,
) -> nnx.Module:
    """A copy of `net` with the weights θ and W, in their dtypes; `net` stays as it is.

    `theta` is structured as `split(net, head)` gives it; `w` is (columns, outputs), its last row
    the bias if the head has one. `model` is that of the trained problem,
    `solution.problem.model`; its statistics are taken over, and without it those of `net`. Raises
    ValueError where either has another structure or shape, and what `split` raises.
    """
    expected, fresh = split(net, head)
    _check_like("theta", theta, expected)
    whole = _clone(net)
    *_, layer = _find(whole, head)
    last = _head_of(layer, head)
    like = jax.eval_shape(last.pack, *_weights(layer))
    if jnp.shape(w) != like.shape:
        raise ValueError(f"w: expected shape {like.shape}, got {jnp.shape(w)}")
    kernel, bias = last.unpack(jnp.asarray(w))
    nnx.update(whole, jax.tree.map(jnp.asarray, theta))
    nnx.update(layer, {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias})
    if model is not None:
        state = _state(model)
        _check_like("model", state, _state(fresh))
        nnx.update(whole, state)
    return whole


def initial_w(net: nnx.Module, head: str = "head") -> jax.Array:
    """The weights of the head as W, (columns, outputs), its last row the bias if the head has one.

    Raises as `split` does.
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

    def __call__(self, z, out_sharding=None):
        return z


def _features(graphdef, state, theta, inputs):
    return nnx.merge(graphdef, theta, state)(inputs)


def _state(model):
    return model.features.args[1]


def _training(features, theta, inputs):
    graphdef, state = features.args
    net = nnx.merge(graphdef, theta, state)
    net.train()
    z = net(inputs)
    state = nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.Param)))
    return z, Partial(_features, graphdef, state)


def _clone(net):
    if not isinstance(net, nnx.Module):
        raise TypeError(f"net: expected a flax nnx.Module, got {type(net).__name__}")
    return nnx.clone(net)


def _find(net, head):
    """The module or list that holds the last layer, its name or index there, and the layer."""
    if not isinstance(head, str):
        raise TypeError(f"head: expected an attribute path, got {head!r}")
    if isinstance(net, nnx.Sequential) and head == "head" and not hasattr(net, head):
        head = f"layers.{len(net.layers) - 1}"
    *path, name = head.split(".")
    try:
        parent = reduce(_child, path, net)
        layer = _child(parent, name)
    except (AttributeError, IndexError, ValueError):
        raise ValueError(
            f"head: expected the path of an attribute of {type(net).__name__}, got {head!r}"
        ) from None
    if not isinstance(layer, nnx.Linear | nnx.Conv | nnx.ConvTranspose):
        raise TypeError(
            f"head: expected an nnx.Linear, nnx.Conv or nnx.ConvTranspose at {head!r}, "
            f"got {type(layer).__name__}"
        )
    return parent, name, layer


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
