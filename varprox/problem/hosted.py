"""Inputs that stay in the memory of the host, or on its disk, and are read as they are needed.

A compiled function is given a key in place of such an array, and asks the host for samples of it.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# By their addresses, and for as long as somebody else holds them.
_ARRAYS: Mapping[int, np.ndarray] = weakref.WeakValueDictionary()


@jax.tree_util.register_pytree_node_class
class Hosted:
    """An array of NumPy, by what a compiled function needs to find it."""

    def __init__(self, array: np.ndarray) -> None:
        _ARRAYS[id(array)] = array  # type: ignore[index]
        self.array: np.ndarray | None = array  # which it keeps alive, as long as it is not traced
        self.key: Any = np.array(divmod(id(array), 2**32), np.uint32)  # the address, in halves
        self.shape, self.dtype = array.shape, jax.typeof(array).dtype

    def tree_flatten(self):
        return [self.key], (self.shape, self.dtype)

    @classmethod
    def tree_unflatten(cls, aux, children):
        self = object.__new__(cls)
        self.array = None
        (self.key,), (self.shape, self.dtype) = children, aux
        return self

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, which: Any, number: int, indices: Callable = np.asarray) -> jax.Array:
        """So many samples, at the places that `indices` makes of `which` on the host."""
        shape = number, *self.shape[1:]
        # Callbacks run in threads that know nothing of `jax.enable_x64`: halves tell no precision.
        halves = self.dtype.itemsize == 8
        like = jax.ShapeDtypeStruct((*shape, 2), np.uint32) if halves else None
        like = like or jax.ShapeDtypeStruct(shape, self.dtype)

        def read(key, which):
            part = _found(key)[_slice(indices(which))]
            return np.ascontiguousarray(part, self.dtype).view(like.dtype).reshape(like.shape)

        found = jax.pure_callback(read, like, self.key, which, vmap_method="sequential")
        return jax.lax.bitcast_convert_type(found, self.dtype) if halves else found


def _slice(indices):
    """The same as a slice, which is read faster, where they are in a row."""
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if np.all(np.diff(indices) == 1) else indices


def _found(key):
    high, low = map(int, np.asarray(key))
    array = _ARRAYS.get(high * 2**32 + low)
    if array is None:
        raise RuntimeError("inputs: expected arrays that last as long as the steps that read them")
    return array


def on_host(inputs: Any) -> Any:
    """The inputs, with arrays of NumPy left where they are."""

    def of(x):
        return Hosted(x) if type(x) in (np.ndarray, np.memmap) and x.dtype.kind != "c" else x

    return jax.tree.map(of, inputs)


def at_hand(inputs: Any) -> Any:
    """The inputs with the arrays themselves again, unless they are traced."""

    def of(x):
        return _found(x.key) if _hosted(x) and not isinstance(x.key, jax.core.Tracer) else x

    return jax.tree.map(of, inputs, is_leaf=_hosted)


def leaves_of(inputs: Any) -> list:
    """The arrays of inputs, of which some may be `Hosted`."""
    return jax.tree.leaves(inputs, is_leaf=_hosted)


def taken(inputs: Any, indices: jax.Array | np.ndarray) -> Any:
    """Samples of the inputs, by their places."""

    def of(x):
        return x.take(indices, len(indices)) if _hosted(x) else jnp.asarray(x)[indices]

    return jax.tree.map(of, inputs, is_leaf=_hosted)


def shapes_of(inputs: Any) -> Any:
    """Shapes and dtypes of the inputs."""

    def of(x):
        if not _hosted(x):
            x = jax.typeof(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    return jax.tree.map(of, inputs, is_leaf=_hosted)


def _hosted(x):
    return isinstance(x, Hosted)
