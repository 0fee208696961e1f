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

from varprox.heads import dense
from varprox.model import Separable


def split(net: nnx.Module, head: str = "head") -> tuple[Any, Separable]:
    """Takes a network apart into its nonlinear weights and a separable model.

    The last operation of `net(inputs)` must be the `nnx.Linear` at the attribute path `head`, such
    as "head", "decoder.out" or "layers.2"; in an `nnx.Sequential` the default is its last layer.

    Returns `theta`, nested dicts of the `nnx.Param` arrays of everything but the head (the entries
    of an `nnx.List` under integer keys), and `model`, a `Separable` whose `features(theta, inputs)`
    run the network without its head. Other state (batch norm statistics, random number keys)
    travels with the model and does not change. The model is a pytree; an equal network split again
    gives the same structure, so nothing recompiles.

    `net` stays as it is. Raises TypeError if it is no module or no `nnx.Linear` stands at `head`,
    and ValueError if there is no such path or if the head shares weights with the rest of the
    network.
    """
    body = _clone(net)
    parent, name, linear = _find(body, head)
    if isinstance(parent, MutableSequence):
        parent[int(name)] = _Identity()
    else:
        setattr(parent, name, _Identity())
    if any(node is linear.kernel or node is linear.bias for node in _variables(body)):
        raise ValueError(
            f"head: expected a layer with weights of its own, got {head!r}, "
            "whose weights the rest of the network uses too"
        )
    graphdef, *states = nnx.split(body, nnx.Param, ...)
    theta, state = map(nnx.to_pure_dict, states)
    return theta, Separable(Partial(_features, graphdef, state), head=dense(bias=linear.use_bias))


def merge(net: nnx.Module, theta: Any, w: jax.Array, head: str = "head") -> nnx.Module:
    """A copy of `net` with the weights θ and W, in their dtypes; `net` stays as it is.

    `theta` is structured as `split(net, head)` gives it; `w` is (columns, outputs), its last row
    the bias if the head has one. Raises ValueError where either has another structure or shape, and
    what `split` raises.
    """
    expected, _ = split(net, head)
    _check_theta(theta, expected)
    whole = _clone(net)
    *_, linear = _find(whole, head)
    shape = (linear.in_features + linear.use_bias, linear.out_features)
    if jnp.shape(w) != shape:
        raise ValueError(f"w: expected shape {shape}, got {jnp.shape(w)}")
    w = jnp.asarray(w)
    nnx.update(whole, jax.tree.map(jnp.asarray, theta))
    nnx.update(linear, {"kernel": w[: linear.in_features]})
    if linear.use_bias:
        nnx.update(linear, {"bias": w[-1]})
    return whole


def initial_w(net: nnx.Module, head: str = "head") -> jax.Array:
    """The weights of the head as W, (columns, outputs), its last row the bias if the head has one.

    Raises as `split` does.
    """
    *_, linear = _find(_clone(net), head)
    kernel = linear.kernel[...]
    return jnp.vstack([kernel, linear.bias[...]]) if linear.use_bias else kernel


class _Identity(nnx.Module):
    """What stands in the head's place, called as `nnx.Linear` is."""

    def __call__(self, z, out_sharding=None):
        return z


def _features(graphdef, state, theta, inputs):
    return nnx.merge(graphdef, theta, state)(inputs)


def _clone(net):
    if not isinstance(net, nnx.Module):
        raise TypeError(f"net: expected a flax nnx.Module, got {type(net).__name__}")
    return nnx.clone(net)


def _find(net, head):
    """The module or list that holds the head, the head's name or index there, and the head."""
    if not isinstance(head, str):
        raise TypeError(f"head: expected an attribute path, got {head!r}")
    if isinstance(net, nnx.Sequential) and head == "head" and not hasattr(net, head):
        head = f"layers.{len(net.layers) - 1}"
    *path, name = head.split(".")
    try:
        parent = reduce(_child, path, net)
        linear = _child(parent, name)
    except (AttributeError, IndexError, ValueError):
        raise ValueError(
            f"head: expected the path of an attribute of {type(net).__name__}, got {head!r}"
        ) from None
    if not isinstance(linear, nnx.Linear):
        raise TypeError(f"head: expected an nnx.Linear at {head!r}, got {type(linear).__name__}")
    return parent, name, linear


def _child(node, name):
    return node[int(name)] if isinstance(node, MutableSequence) else getattr(node, name)


def _variables(net):
    return [node for _, node in nnx.iter_graph(net) if isinstance(node, nnx.Variable)]


def _check_theta(theta, expected):
    wanted, came = _shapes(expected), _shapes(theta)
    for path in wanted | came:
        if wanted.get(path) != came.get(path):
            raise ValueError(
                f"theta: expected {wanted.get(path, 'nothing')} as the shape of "
                f"theta{jax.tree_util.keystr(path)}, got {came.get(path, 'nothing')}"
            )


def _shapes(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path: jnp.shape(leaf) for path, leaf in leaves}
