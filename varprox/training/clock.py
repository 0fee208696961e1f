"""Run time apart from compile time, without running anything twice."""

import threading
import time
from collections.abc import Callable
from typing import Any

import jax

COMPILATION = "/jax/core/compile/"  # how the events of tracing, lowering and compiling begin
TRACING = "trace_duration"  # how those of tracing end
TRACING = "trace_duration"


def timed(fn: Callable, *args: Any) -> tuple[Any, float, float]:
    """The result, the seconds that it ran, and the seconds that were spent on compilation.

    JAX tells when it has traced, lowered or compiled something, and how long this took. One of
    these spans may lie within another, as a function is traced while the one that calls it is. What
    lies between tracing and lowering is preparation, and counts.
    """
    spans: list[tuple[float, float]] = []
    caller = threading.get_ident()

    def listen(event, duration_secs, **_):
        if event.startswith(COMPILATION) and threading.get_ident() == caller:
            end = time.perf_counter()
            begin = end - duration_secs
            if spans and not event.endswith(TRACING):
                begin = min(begin, spans[-1][1])
            spans.append((begin, end))

    jax.monitoring.register_event_duration_secs_listener(listen)
    begin = time.perf_counter()
    try:
        result = jax.block_until_ready(fn(*args))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    elapsed = time.perf_counter() - begin
    compiling = min(_covered(spans), elapsed)
    return result, elapsed - compiling, compiling


def _covered(spans):
    """The length of the union of spans that are in the order of their ends."""
    covered, left = 0.0, float("inf")
    for begin, end in reversed(spans):
        end = min(end, left)
        if begin < end:
            covered, left = covered + end - begin, begin
    return covered
