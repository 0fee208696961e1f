"""Take an equinox model apart into features, θ and last layer; put the trained weights back.

``split`` gives θ and the ``Separable`` that a ``Problem`` takes. ``merge`` gives an equinox model
with the trained weights.
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from varprox.checks import check_array, kind, listed, shown
from varprox.problem.data import weights
from varprox.problem.heads import dense
from varprox.problem.model import Separable

SOME = 8  # samples that show what a network does


def split(net: eqx.Module, head: str | None = None) -> tuple[Any, Separable]:
    """Takes a network apart into its nonlinear weights and a separable model.

    The last operation of ``net(x)``, for one sample x, must be the ``eqx.nn.Linear`` at the path
    ``head``, and the network must call this layer once. Only a call with inputs can show this, so
    methods and ``solve_w`` check it and raise ValueError. They also raise it if the layer has
    another number of outputs than the targets, because ``merge`` could not put W back.

    The features run the network without its last layer on each sample of a batch, as after
    ``eqx.nn.inference_mode(net)``: dropout drops nothing. Arrays of whole numbers are part of the
    model and not trained. Several inputs are a tuple or a dict, which the network takes as its one
    argument.

    Arguments:
        net: An ``eqx.Module``.
        head: The attribute path of the last layer, such as ``"head"`` or ``"layers.2"``. None, the
            default, stands for the last of its ``layers``, as in an ``eqx.nn.MLP`` or
            ``eqx.nn.Sequential``.

    Returns:
        The pair (theta, model). ``theta`` is the network without its last layer and without
        whatever is no array of floating numbers. ``model`` is a ``Separable`` with a dense head.

    Raises:
        TypeError: If ``net`` is not a module, or if another kind of layer is there.
        ValueError: If there is no such path, or if the rest of the network uses the weights of the
            layer, too.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> net = eqx.nn.MLP(2, 1, 8, depth=2, activation=jnp.tanh, key=jax.random.key(0))
        >>> theta, model = vp.equinox.split(net)
        >>> model.rows(theta, jnp.zeros((5, 2))).shape  # eight features and a one for the bias
        (5, 9)
    """
    path, layer = _find(net, head)
    if any(leaf is layer.weight for leaf in jax.tree.leaves(_replaced(net, path, None))):
        raise ValueError(
            f"head: expected a layer with weights of its own, got {'.'.join(path)!r}, whose "
            "weights the rest of the network uses too"
        )
    body = eqx.nn.inference_mode(_replaced(net, path, eqx.nn.Identity()))
    theta, rest = eqx.partition(body, eqx.is_inexact_array)
    arrays, static = eqx.partition(rest, eqx.is_array)
    features = _Features(static, path, layer.out_features)
    return theta, Separable(Partial(features, arrays), dense(bias=layer.use_bias))


def merge(net: eqx.Module, theta: Any, w: jax.Array, head: str | None = None) -> eqx.Module:
    """A network with the weights θ and W; ``net`` does not change.

    Arguments:
        net: The ``eqx.Module`` that ``split`` was given.
        theta: The nonlinear weights, with the structure that ``split(net, head)`` gives them.
        w: The last layer, (columns, outputs), its last row the bias if the layer has one.
        head: The attribute path of the last layer, as for ``split``.

    Returns:
        A new ``eqx.Module`` like ``net``.

    Raises:
        TypeError: If ``theta`` or ``w`` hold what are no arrays, and as ``split`` does.
        ValueError: If ``theta`` or ``w`` have another structure or shape, and as ``split`` does.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import varprox as vp
        >>> net = eqx.nn.MLP(2, 1, 8, depth=2, activation=jnp.tanh, key=jax.random.key(0))
        >>> theta, model = vp.equinox.split(net)
        >>> trained = vp.equinox.merge(net, theta, w=jnp.full((9, 1), 0.5))
        >>> trained(jnp.zeros(2)).shape, trained.layers[2].bias.tolist()
        ((1,), [0.5])
    """
    expected, _ = split(net, head)
    path, layer = _find(net, head)
    for leaf in weights(theta):
        check_array("theta", leaf)
    if _shapes(theta) != _shapes(expected):
        raise ValueError(
            f"theta: expected arrays like {listed(theta=expected)}, got {listed(theta=theta)}"
        )
    check_array("w", w)
    columns = layer.in_features + layer.use_bias
    if jnp.shape(w) != (columns, layer.out_features):
        raise ValueError(f"w: expected shape {(columns, layer.out_features)}, got {jnp.shape(w)}")
    kernel, bias = dense(layer.use_bias).unpack(jnp.asarray(w))
    trained = _replaced(layer, ("weight",), kernel.T)
    if bias is not None:
        trained = _replaced(trained, ("bias",), bias)
    inside = eqx.combine(theta, _replaced(net, path, eqx.nn.Identity()))
    return _replaced(inside, path, trained)


def _find(net, head):
    """The path of the last layer, and the layer."""
    if not isinstance(net, eqx.Module):
        raise TypeError(f"net: expected an equinox.Module, got {kind(net)}")
    if head is None:
        head = f"layers.{len(net.layers) - 1}" if hasattr(net, "layers") else "head"
    if not isinstance(head, str):
        raise TypeError(f"head: expected a path, such as 'layers.2', got {shown(head)}")
    path, layer = tuple(head.split(".")), net
    for name in path:
        try:
            layer = _inside(layer, name)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"head: expected the attribute path of the last layer, got {head!r}, where there "
                f"is none in {type(net).__name__}"
            ) from None
    if not isinstance(layer, eqx.nn.Linear) or layer.out_features == "scalar":
        came = "one with a scalar output" if isinstance(layer, eqx.nn.Linear) else kind(layer)
        raise TypeError(f"head: expected an equinox.nn.Linear at {head!r}, got {came}")
    return path, layer


def _inside(node, name):
    if isinstance(node, dict):
        return node[name]
    return node[int(name)] if isinstance(node, list | tuple) else getattr(node, name)


def _replaced(net, path, new):
    """The network with something else at a path."""

    def at(node):
        for name in path:
            node = _inside(node, name)
        return node

    return eqx.tree_at(at, net, new, is_leaf=lambda node: node is None)


def _shapes(tree):
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


class _Answer(eqx.Module):
    """What answers in the head's place with numbers of its own, and counts how often."""

    numbers: jax.Array
    calls: list = eqx.field(static=True)

    def __call__(self, *_, **__):
        self.calls.append(None)
        return self.numbers


@dataclass(frozen=True)
class _Features:
    """A network without its head, for a batch."""

    static: Any
    path: tuple[str, ...]
    outputs: int

    def __repr__(self):
        return "equinox network"

    def __call__(self, arrays, theta, inputs):
        return jax.vmap(eqx.combine(theta, arrays, self.static))(inputs)

    def varprox_check(self, arrays, theta, inputs, targets):
        """Refuses a network that does not call its head once, or does anything after it, and a head
        with another number of outputs than the targets.

        `varprox.problem.data.check_data` asks for this. What answers in the head's place with
        numbers of its own is to be the answer of the network.
        """
        path, calls = ".".join(self.path), list[None]()
        # Of either sign and many sizes, so that no range of an activation has them all.
        drawn = np.cos(np.arange(1, self.outputs + 1))
        numbers = jnp.asarray((10 ** (3 * np.sin(1e4 * drawn)) * drawn).astype(targets.dtype))
        body = eqx.combine(theta, arrays, self.static)
        answering = _replaced(body, self.path, _Answer(numbers, calls))
        answers = jax.vmap(answering)(jax.tree.map(lambda x: jnp.asarray(x)[:SOME], inputs))
        if len(calls) != 1:
            came = f"one that calls it {len(calls)} times" if calls else "one that never does"
            raise ValueError(
                f"head: expected a network that calls its layer {path!r} once, got {came}"
            )
        if answers.shape[1:] != numbers.shape or not (answers == numbers[None]).all():
            raise ValueError(
                f"head: expected a network whose last operation is its layer {path!r}, got one "
                "that changes the output of this layer; leave out of the network what comes after "
                "it, or have it done to the targets"
            )
        if targets.shape[-1] != self.outputs:
            raise ValueError(
                f"targets: expected {self.outputs} outputs, as many as the network's layer "
                f"{path!r} has, got {targets.shape[-1]}; give the layer as many as the targets have"
            )
