"""Checks of options at the door; numbers under trace pass."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


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


def called(name: str, fn: Callable, *args: Any) -> Any:
    """`fn(*args)`; what a function of the user raises there becomes a sentence, its own trace
    before it."""
    try:
        return fn(*args)
    except Exception as error:
        what = str(error).strip().split("\n")[0][:200]
        raise TypeError(
            f"{name}: expected a function that JAX can trace for what it is given here, got "
            f"{type(error).__name__}: {what}"
        ) from error
