"""Trees of arrays in a folder: written at once or not at all, and read without running anything.

A folder holds ``solution.json``, which has the structure of the tree and names the file with its
arrays, a NumPy archive. A tree is written by putting a new archive beside the old one and then
another ``solution.json`` in place of the old one, which an operating system does in one go. So
whenever a process is killed, the folder has the tree of before or the new one.

What a tree is made of is named, not pickled: dicts, lists, tuples, and the named tuples and
dataclasses of varprox and optax. Whatever has the structure of θ is stored as such, so that θ may
be made of anything else.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FORMAT = 1
NAME, ARRAYS = "solution.json", "arrays-*.npz"
PACKAGES = ("varprox", "optax")  # whose classes are looked up when a folder is read


def write(folder: str | os.PathLike, about: Mapping[str, Any], tree: Any, theta: Any) -> None:
    """Writes a tree, and what JSON can say of it, into a folder of its own.

    Arguments:
        folder: Where to. It is made where it is missing; what `write` has put there is replaced.
        about: What `read` gives back; its ``"problem"`` has to be the same as the one before.
        tree: Arrays in the containers of this module.
        theta: The weights whose structure parts of the tree may have.

    Raises:
        FileExistsError: If there is something else in the folder.
        TypeError: If a part of the tree cannot be stored.
        ValueError: If the folder holds what cannot be read, or the solution of another problem.
    """
    folder = Path(folder)
    if _begun(folder):
        check_same(read_about(folder)["problem"], about["problem"], folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays: list[np.ndarray] = []
    structure = jax.tree.structure(theta)
    code = _encoded(tree, arrays, structure)
    file = folder / ARRAYS.replace("*", uuid.uuid4().hex)
    with open(file, "wb") as stream:
        np.savez(stream, *arrays)
        _flush(stream)
    content = {
        "format": FORMAT,
        "about": about,
        "arrays": file.name,
        "theta": _structure_code(theta),
        "tree": code,
    }
    part = folder / f"{NAME}.part"
    with open(part, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
        _flush(stream)
    os.replace(part, folder / NAME)
    for other in folder.glob(ARRAYS):
        if other != file:
            other.unlink()


def exists(folder: str | os.PathLike) -> bool:
    """Is there something that `write` has finished?"""
    return (Path(folder) / NAME).is_file()


def read_about(folder: str | os.PathLike) -> dict[str, Any]:
    """What `write` was told of the tree."""
    return _content(Path(folder))["about"]


def read(folder: str | os.PathLike, theta: Any = None) -> Any:
    """The tree that `write` has put there; `theta` has the structure of the weights.

    Raises:
        FileNotFoundError: If nothing was written there.
        TypeError: If `theta` is needed and missing, or has another structure.
        ValueError: If what is there cannot be read.
    """
    folder = Path(folder)
    content = _content(folder)
    file = folder / content["arrays"]
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = [archive[f"arr_{index}"] for index in range(len(archive.files))]
    except Exception as error:  # of the archive, of NumPy's format, or of the system
        raise ValueError(
            f"folder: expected a whole file {file}, got one that cannot be read: {error}"
        ) from error
    if theta is None and content["theta"] is None:
        raise TypeError(
            "theta: expected weights of the structure of those that were saved, which is not made "
            "of dicts, lists and tuples alone; got None"
        )
    if theta is None:
        theta = _decoded(content["theta"], [], None)
    return _decoded(content["tree"], arrays, jax.tree.structure(theta))


def check_same(saved: Mapping[str, Any], given: Mapping[str, Any], folder: Any) -> None:
    """Refuses a folder with the solution of another problem with a ValueError."""
    given = json.loads(json.dumps(given))
    for name, expected in saved.items():
        if given.get(name) != expected:
            raise ValueError(
                f"problem: expected the one whose solution is in {folder}, with "
                f"{name} {expected}, got one with {name} {given.get(name)}"
            )


def _begun(folder):
    """Has `write` finished here before? Something else is refused."""
    if not folder.exists():
        return False
    if exists(folder):
        return True
    ours = {*folder.glob(ARRAYS), *folder.glob(f"{NAME}.part")}  # of a process that was killed
    if not folder.is_dir() or set(folder.iterdir()) - ours:
        raise FileExistsError(
            f"folder: expected a new one, or one that a solution was saved in, got {folder}, "
            "which has something else in it"
        )
    return False


def _content(folder):
    if not exists(folder):
        raise FileNotFoundError(f"folder: expected one that a solution was saved in, got {folder}")
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        newer = content["format"] > FORMAT
        if {"about", "arrays", "theta", "tree"} - content.keys():
            raise KeyError("an entry is missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"folder: expected a whole file {folder / NAME}, got one that cannot be read: {error}"
        ) from error
    if newer:
        raise ValueError(
            f"folder: expected format {FORMAT} or older, got {content['format']} in {folder}, "
            "which a newer varprox has written"
        )
    return content


def _flush(stream):
    stream.flush()
    os.fsync(stream.fileno())


def _encoded(node, arrays, theta):
    """What JSON can say of a tree, whose arrays are listed."""
    is_theta = not jax.tree_util.treedef_is_leaf(theta) and jax.tree.structure(node) == theta
    if is_theta and theta.num_leaves:
        return {"theta": [_encoded(leaf, arrays, theta) for leaf in jax.tree.leaves(node)]}
    if node is None:
        return None
    if hasattr(node, "dtype") and jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
        arrays.append(np.asarray(jax.random.key_data(node)))
        return {"key": len(arrays) - 1, "impl": str(jax.random.key_impl(node))}
    if isinstance(node, jax.Array | np.ndarray | np.generic | bool | int | float):
        arrays.append(np.asarray(node))
        index = len(arrays) - 1
        return {"numpy": index} if isinstance(node, np.ndarray) else index
    code = _container(node)
    if code is None:
        kind = type(node)
        raise TypeError(
            "solution: expected arrays in dicts, lists, tuples and what varprox and optax make of "
            f"them, got a {kind.__module__}.{kind.__qualname__}, which cannot be stored"
        )
    name, kind, parts = code
    return {name: kind, "parts": [[key, _encoded(x, arrays, theta)] for key, x in parts]}


def _container(node):
    """How a container is called, of which class it is and what is in it; None for others."""
    kind = type(node)
    name = f"{kind.__module__}:{kind.__qualname__}"
    if kind is dict and all(isinstance(key, str | int) for key in node):
        return "dict", None, list(node.items())
    if kind in (list, tuple):
        return kind.__name__, None, list(enumerate(node))
    if _record(name) is kind:
        return "named", name, [(field, getattr(node, field)) for field in _fields(kind)]
    return None


def _record(name):
    """The named tuple or dataclass of this name; None if there is none in the packages."""
    module, _, qualified = name.partition(":")
    if module.partition(".")[0] not in PACKAGES:
        return None
    try:
        found = getattr(import_module(module), qualified, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and _fields(found) is not None else None


def _fields(kind):
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return getattr(kind, "_fields", None)


def _structure_code(theta):
    """Of a θ whose leaves are nothing; None if it is not made of this module's containers."""
    try:
        return _encoded(jax.tree.map(lambda _: 0, theta), [], jax.tree.structure(0))
    except TypeError:
        return None


def _decoded(code, arrays, theta):
    if code is None:
        return None
    if isinstance(code, int):
        return _array(arrays[code]) if arrays else 0
    if "theta" in code:
        leaves = [_decoded(leaf, arrays, theta) for leaf in code["theta"]]
        if theta.num_leaves != len(leaves):
            raise TypeError(
                f"theta: expected {len(leaves)} arrays, as many as were saved, got "
                f"{theta.num_leaves}"
            )
        return jax.tree.unflatten(theta, leaves)
    if "numpy" in code:
        return arrays[code["numpy"]]
    if "key" in code:
        return jax.random.wrap_key_data(jnp.asarray(arrays[code["key"]]), impl=code["impl"])
    parts = {key: _decoded(part, arrays, theta) for key, part in code["parts"]}
    if "dict" in code:
        return parts
    if "list" in code:
        return list(parts.values())
    if "tuple" in code:
        return tuple(parts.values())
    record = _record(code["named"])
    if record is None or set(_fields(record)) != set(parts):
        raise ValueError(
            f"folder: expected records of the {' and '.join(PACKAGES)} that are installed here, "
            f"got {code['named']} of {', '.join(parts)}"
        )
    return record(**parts)


def _array(array):
    here = jnp.asarray(array)
    if here.dtype != array.dtype:
        raise ValueError(
            f"folder: expected arrays of a precision that JAX uses here, got {array.dtype}; set "
            'jax.config.update("jax_enable_x64", True)'
        )
    return here
