"""Checks of options at the door; numbers under trace pass. Imports nothing of the package."""

import math
from typing import Any

import jax


def check_integer(name: str, value: Any, least: int) -> int:
    """`value`, where it is an integer ≥ `least`; else ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name}: expected an integer ≥ {least}, got {value!r}")
    return int(value)


def check_number(name: str, value: Any, below: float = math.inf) -> Any:
    """`value`, where it is a number ≥ 0 and below `below`; else TypeError or ValueError."""
    if isinstance(value, jax.core.Tracer):
        return value
    expected = "a finite number ≥ 0" if below == math.inf else f"a number ≥ 0 and below {below:g}"
    try:
        if getattr(value, "shape", ()) != ():
            raise TypeError
        fits = bool(value >= 0 and value < below)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return value
