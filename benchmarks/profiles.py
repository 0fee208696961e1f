"""Data profiles: the share of problems that a method has solved, against what it has spent.

Source: Moré, Wild, SIAM J. Optim. 20 (2009). They call a problem solved to τ where
f ≤ f_L + τ (f₀ − f_L), f_L being the best value known and f₀ that of the start. A stricter measure
stands beside it here, f ≤ (1 + τ) f_L + floor, the floor being what rounding leaves.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.experiment import PROJECTED, text_table

plt.switch_backend("agg")

TOLERANCES = (1e-3, 1e-6)
LIMITS = {
    "work_units": (10, 30, 100, 200, 400),
    "seconds": (0.01, 0.03, 0.1, 0.3, 1.0),
}
POINTS = 200  # along a curve


class Scale(NamedTuple):
    """What the values of a problem are measured by: that of the start, the best one known, and the
    floor that rounding sets."""

    start: float
    best: float
    floor: float


def by_decrease(scale: Scale, tolerance: float) -> float:
    """The value at which Moré and Wild call the problem solved, up to rounding."""
    return scale.best + tolerance * max(scale.start - scale.best, 0.0) + scale.floor


def by_value(scale: Scale, tolerance: float) -> float:
    """The value at which the best one known is reached to a relative tolerance."""
    return scale.best * (1 + tolerance) + scale.floor


MEASURES = {
    "of the decrease that is known (Moré, Wild)": by_decrease,
    "of the best value that is known": by_value,
}


def spent(values: np.ndarray, axis: np.ndarray, target: float) -> float:
    """What had been spent along `axis` when the values first reached the target; inf where they
    never did."""
    reached = np.flatnonzero(values <= target)
    return float(axis[reached[0]]) if len(reached) else np.inf


def shares(costs: Sequence[float], limits: Sequence[float]) -> np.ndarray:
    """The fraction of the problems whose cost is within each of the limits."""
    return (np.asarray(costs)[:, None] <= np.asarray(limits)).mean(axis=0)


def table(title: str, costs: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Percent solved within limits of work and of seconds; `costs` are by method and axis."""
    columns = [f"{limit:g}" for limit in LIMITS["work_units"]]
    columns += [f"{limit:g} s" for limit in LIMITS["seconds"]]
    rows = []
    for method, of_axes in costs.items():
        share = np.concatenate([shares(of_axes[axis], LIMITS[axis]) for axis in LIMITS])
        rows.append([method, *(f"{100 * s:.1f}" for s in share)])
    return text_table(title, ["", *columns], rows)


def figure(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> None:
    """A row a panel: the profiles of the methods against work units and seconds."""
    axes = {"work_units": (1, 400, "work units"), "seconds": (1e-3, 3, "seconds")}
    size = 11, 3.2 * len(panels) + 0.8
    drawing, grid = plt.subplots(
        len(panels), 2, figsize=size, squeeze=False, sharex="col", sharey=True, layout="constrained"
    )
    for row, (name, costs) in zip(grid, panels.items(), strict=True):
        for ax, (axis, (least, most, _)) in zip(row, axes.items(), strict=True):
            _draw(ax, np.geomspace(least, most, POINTS), costs, axis)
        row[0].set(ylabel="% solved")
        row[0].set_title(name, loc="left", fontsize=10)
    for ax, (*_, label) in zip(grid[-1], axes.values(), strict=True):
        ax.set(xlabel=label)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    drawing.savefig(path, dpi=130)
    plt.close(drawing)


def _draw(ax: Axes, limits, costs, axis):
    colours = plt.get_cmap("tab10").colors
    for k, (method, of_axes) in enumerate(costs.items()):
        style = "-" if method == "default" or method.startswith(PROJECTED) else "--"
        width = 2.6 if k == 0 else 1.5
        share = 100 * shares(of_axes[axis], limits)
        ax.plot(limits, share, style, color=colours[k % 10], linewidth=width, label=method)
    ax.set(xscale="log", ylim=(0, 102))
    ax.grid(alpha=0.3, linewidth=0.6)
