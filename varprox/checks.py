"""Checks at the door, and the words that say what came; numbers under trace pass."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

SOME = 6  # arrays of a tree that a message lists
ARRAYS = np.ndarray | np.generic | jax.Array
# How to come by θ and features, by where the class of a network is from.
NETWORKS = {
    "flax.nnx": "theta, model = varprox.nnx.split(net) takes it apart",
    "flax.linen": "leave its last layer out; net.init(key, inputs) is theta and net.apply the "
    "features",
    "equinox": "theta, model = varprox.equinox.split(net) takes it apart",
}
# How to come by numbers, by the kind of a dtype.
NUMBERS = {
    "U": "; numpy.unique(labels, return_inverse=True)[1] makes numbers of labels",
    "O": "; .astype(float) makes numbers of objects that are some",
}
# What to do about exceptions of JAX.
REMEDIES = {
    jax.errors.TracerArrayConversionError: "; take jax.numpy in place of NumPy",
    jax.errors.TracerBoolConversionError: "; take jnp.where in place of `if`",
}


def check_integer(name: str, value: Any, least: int) -> int:
    """`value`, where it is an integer ≥ `least`; else ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name}: expected an integer ≥ {least}, got {value!r:.80}")
    return int(value)


def check_flag(name: str, value: Any) -> Any:
    """`value`, where it is True or False; else TypeError."""
    if isinstance(value, jax.core.Tracer):
        return value
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, got {value!r:.80}")
    return bool(value)


def check_number(name: str, value: Any, below: float = math.inf) -> Any:
    """`value` as a Python number, where it is one ≥ 0 and below `below`; else TypeError or
    ValueError.

    A Python number takes the precision of what it is multiplied with, where a NumPy scalar would
    bring its own.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    expected = "a finite number ≥ 0" if below == math.inf else f"a number ≥ 0 and below {below:g}"
    try:
        # float() takes booleans, text and dates, too.
        if np.shape(value) != () or np.asarray(value).dtype.kind in "bcSUmM":
            raise TypeError
        number = float(value)
        fits = 0 <= number < below
    except OverflowError:
        fits = False
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {expected}, got {value!r:.80}") from None
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value!r:.80}")
    return number


def check_array(name: str, value: Any) -> None:
    """Refuses what is no array that JAX takes with a TypeError."""
    if isinstance(value, jax.Array):
        return
    if not isinstance(value, ARRAYS):
        raise TypeError(
            f"{name}: expected arrays of NumPy or JAX, got {kind(value)}{instead(value)}"
        )
    try:
        jax.typeof(value)
    except (TypeError, ValueError):
        remedy = NUMBERS.get(value.dtype.kind, "")
        raise TypeError(
            f"{name}: expected arrays that JAX takes, got {type(value).__name__} of {value.dtype}"
            f"{remedy}"
        ) from None


def kind(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return shown(value)
    name = "Array" if isinstance(value, jax.Array) else type(value).__name__
    return f"{name} of shape {value.shape}" if isinstance(value, ARRAYS) else name


def shown(value: Any) -> str:
    """What a value is, by its `repr` as far as a line holds it."""
    if library(value):
        return kind(value)
    return repr(value).split("\n")[0][:80]


def named(fn: Callable) -> str:
    """The name of a function, with the arrays and numbers that are bound to it."""
    if not isinstance(fn, Partial):
        return getattr(fn, "__qualname__", shown(fn)).split("<locals>.")[-1]
    leaves = jax.tree.leaves(fn)
    bound = [
        f"{leaf.dtype}{[*leaf.shape]}" if isinstance(leaf, ARRAYS) else repr(leaf)
        for leaf in leaves[:SOME]
    ] + ["…"] * (len(leaves) > SOME)
    return named(fn.func).lstrip("_") + (f"({', '.join(bound)})" if bound else "")


def listed(**trees: Any) -> str:
    """Shapes and dtypes of arrays in trees, up to `SOME` of each, by their names."""
    words = []
    for name, tree in trees.items():
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        words += [
            f"{name}{jax.tree_util.keystr(path)} {jnp.result_type(leaf)}{[*np.shape(leaf)]}"
            for path, leaf in leaves[:SOME]
        ] or [f"{name} {shown(tree)}"]
        words += [f"{len(leaves) - SOME} more in {name}"] * (len(leaves) > SOME)
    return ", ".join(words)


def told(error: Exception) -> str:
    """The type and the first line of an exception."""
    line, *_ = str(error).strip().split("\n")
    return f"{type(error).__name__}: {line:.200}"


def library(value: Any) -> str | None:
    """The library whose network, or class of networks, a value is: a key of `NETWORKS`, or None."""
    bases = (value if isinstance(value, type) else type(value)).__mro__
    names = [f"{base.__module__}." for base in bases if base.__name__ == "Module"]
    return next((key for key in NETWORKS if any(n.startswith(f"{key}.") for n in names)), None)


def apart(value: Any) -> str:
    """How to take a network apart, as the end of a message; nothing if this is none."""
    return f"; {NETWORKS[key]}" if (key := library(value)) else ""


def instead(value: Any) -> str:
    """How to come by an array from a value, as the end of a message; nothing if that is unknown."""
    if hint := apart(value):
        return hint
    if is_result(value):
        return "; its field theta has the weights"
    for method in ("to_numpy", "numpy"):
        if hasattr(value, method):
            return f"; .{method}() makes one of it"
    if isinstance(value, int | float | list | tuple):
        return "; jnp.asarray makes one of numbers and lists"
    return ""


def is_result(value: Any) -> bool:
    """Is this a solution, or the state of a method?"""
    return hasattr(value, "theta") and type(value).__module__.startswith("varprox.")


def called(name: str, fn: Callable, **given: Any) -> Any:
    """`fn` of what is given, in this order; what a function of the user raises there becomes a
    sentence, its own trace before it."""
    try:
        return fn(*given.values())
    except Exception as error:
        remedy = next((hint for of, hint in REMEDIES.items() if isinstance(error, of)), "")
        raise TypeError(
            f"{name}: expected a function of ({', '.join(given)}) that JAX can trace for "
            f"{listed(**given)}, got {told(error)}{remedy}"
        ) from error
