"""A step over many devices: how far it leads from one device's, and what each of them computes."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import varprox as vp


def over(devices: int, tree: Any, axis_type: AxisType = AxisType.Auto) -> Any:
    """The arrays split over so many devices along their first axis."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("batch",), axis_types=(axis_type,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("batch")))


def compiled(method: vp.Method, theta: Any, data: tuple) -> tuple[Any, Callable]:
    """The state at the start and a compiled step."""
    state = method.init(theta, data)
    return state, jax.jit(method.step).lower(state, data).compile()


def sizes(shape: str) -> list[int]:
    """The lengths of an array's axes, as HLO writes them."""
    return [int(size) for size in shape.split(",") if size]


def gathered(text: str, samples: int) -> list[list[int]]:
    """The shapes of what a program gathers from all devices and that is as large as the batch."""
    found = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    shapes = [sizes(shape) for result in found for shape in re.findall(r"\[([\d,]*)\]", result)]
    return [shape for shape in shapes if math.prod(shape) >= samples]


def operations(step: Any) -> float:
    """Those of one device in a compiled step, with the factorisations, which XLA does not count."""
    factorisations = 0
    for shape in re.findall(r"= \(?f64\[([\d,]*)\].* custom-call\(.*lapack", step.as_text()):
        *batch, rows, columns = sizes(shape)
        factorisations += 2 * math.prod(batch) * rows * columns * min(rows, columns)
    return step.cost_analysis()["flops"] + factorisations


def compare(method: vp.Method, theta: Any, data: tuple, steps: int) -> dict:
    """How far all devices lead from one in so many steps, and what a step does of them."""
    one, eight = (over(count, data) for count in (1, jax.device_count()))
    (here, step), (there, parted) = compiled(method, theta, one), compiled(method, theta, eight)
    differences = []
    for _ in range(steps):
        (here, _), (there, _) = step(here, one), parted(there, eight)
        differences.append(abs(float(there.objective) / float(here.objective) - 1))
    return {
        "devices": jax.device_count(),
        "samples": len(data[1]),
        "speed_up": operations(step) / operations(parted),
        "gathered": gathered(parted.as_text(), len(data[1])),
        "difference": max(differences),
    }
