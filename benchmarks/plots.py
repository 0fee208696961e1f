"""The figures: convergence, the segmented image, a fitted surface, decision regions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

import varprox as vp
from benchmarks.experiment import PROJECTED, Run, best, by_seed, end

plt.switch_backend("agg")

AXES = {"work_units": "work units", "seconds": "seconds"}
MANY_EPOCHS = 10
COLOURS = {
    "GNvpro": "#0072b2",
    "LBFGSvpro": "#d55e00",
    "Broydenvpro": "#8b1a1a",
    "Adam": "#009e73",
    "L-BFGS": "#555555",
    "GN": "#cc79a7",
    "GNvpro dense": "#0072b2",
    "GNvpro krylov": "#56b4e9",
    "GNvpro krylov, whitened": "#7b3294",
    "GNvpro kernel": "#004166",
    "Adam, cosine": "#8fd4a8",
    "L-BFGS (SciPy)": "#222222",
    "L-BFGS (optax)": "#888888",
    "LM (optimistix)": "#cc79a7",
    "Broyden": "#8b1a1a",
    "BFGS": "#7b3294",
    "trf (SciPy)": "#b8860b",
    "slimTrain": "#e69f00",
    "slimTrain, sGCV": "#56b4e9",
    "slimTrain, sGCV, N = 32": "#cc79a7",
    "slimTrain, Λ = 0": "#7b3294",
    "slimTrain, constant ΣΛ": "#d55e00",
    "Adam, PyTorch's start": "#8fd4a8",
    "slimTrain sGCV, r = 0": "#9ecbe8",
    "slimTrain sGCV, r = 5": "#56b4e9",
    "slimTrain constant, r = 0": "#c9a3d4",
    "slimTrain constant, r = 5": "#7b3294",
    "slimTrain proportional, r = 5": "#0072b2",
}
# Sixteen colours that can be told apart, light and dark neighbours taking turns.
CLASSES = (
    *("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6"),
    *("#bcf60c", "#fabebe", "#008080", "#9a6324", "#800000", "#808000", "#000075", "#808080"),
)
POINTS = 240  # along a curve


def convergence(
    path: Path,
    groups: Mapping[str, Sequence[Run]],
    work: float,
    lower: str | None = None,
    *,
    ylabel: str = "objective",
    yscale: str = "log",
) -> None:
    """The objective of each method against work units and seconds; below it, column `lower`.

    At every point a method is shown by the best of its variants there; over several seeds the line
    is the median and the band the range. The seconds end where the slowest method has spent `work`.
    """
    columns = ["objective"] if lower is None else ["objective", lower]
    figure, grid = plt.subplots(
        len(columns),
        2,
        figsize=(10, 3.6 * len(columns) + 0.6),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    longest = max(run.solution.history["seconds"][-1] for runs in groups.values() for run in runs)
    for j, (axis, limit) in enumerate(zip(AXES, (work, longest), strict=True)):
        for method, runs in groups.items():
            x, values = curves(runs, axis, limit, columns)
            for ax, curve in zip(grid[:, j], values, strict=True):
                _draw(ax, method, x, curve)
        grid[-1, j].set(xlabel=AXES[axis], xscale="log")
        _plain_ticks(grid[-1, j].xaxis)
    grid[0, 0].set(ylabel=ylabel, yscale=yscale)
    if yscale == "log":
        _plain_ticks(grid[0, 0].yaxis)
    if lower is not None:
        grid[1, 0].set(ylabel=lower.replace("_", " "))
    for ax in grid.flat:
        ax.grid(alpha=0.3, linewidth=0.6)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    save(figure, path)


def race(
    path: Path, courses: Mapping[str, Mapping[str, Sequence[Run]]], ylabel: str = "objective"
) -> None:
    """A row a course: the objective of each method against work units and seconds, as in
    `convergence`."""
    shape = len(courses), 2
    size = 10, 2.9 * len(courses) + 0.8
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    handles = {}
    for row, (course, groups) in zip(grid, courses.items(), strict=True):
        for ax, axis in zip(row, AXES, strict=True):
            spent = [run.history[axis] for runs in groups.values() for run in runs]
            limit = max(column[-1] for column in spent)
            for method, runs in groups.items():
                x, (curve,) = curves(runs, axis, limit, ["objective"])
                _draw(ax, method, x, curve)
            ax.set(xscale="log", yscale="log", xlabel=AXES[axis])
            ax.grid(alpha=0.3, linewidth=0.6)
            handles |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
        row[0].set(ylabel=ylabel, title=course)
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=min(5, len(handles)),
        frameon=False,
    )  # fmt: skip
    save(figure, path)


def against_seconds(path: Path, panels: Mapping[str, tuple[Mapping, str]]) -> None:
    """Side by side, each with its title and label: for each method points in time, and there the
    values of each seed."""
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4.2), layout="constrained")
    for ax, (title, (lines, ylabel)) in zip(axes, panels.items(), strict=True):
        for method, (x, values) in lines.items():
            _draw(ax, method, x, values, drawstyle="default")
        ax.set(title=title, xscale="log", yscale="log", xlabel="seconds", ylabel=ylabel)
        ax.grid(alpha=0.3, linewidth=0.6)
        ax.legend(frameon=False, fontsize=8)
    save(figure, path)


def minibatches(path: Path, groups: Mapping[str, Sequence[Run]], ylabel: str) -> None:
    """Validation loss against epochs and seconds, and ΣΛ against epochs, on a logarithmic scale
    where these are many; every method by the best of its variants in each place, the line being the
    median and the band the range of the seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for method, runs in groups.items():
        seeds = list(by_seed(runs).values())
        losses = [
            np.nanmin([run.history["validation_loss"] for run in group], axis=0) for group in seeds
        ]
        history = runs[0].history
        epochs = history.get("epoch", np.arange(len(losses[0])))
        seconds = np.median([run.history["seconds"] for run in runs], axis=0)
        shown = slice(0 if "epoch" in history else 1, None)
        for ax, x in zip(axes, (epochs, seconds), strict=False):
            _draw(ax, method, x[shown], np.array(losses)[:, shown], drawstyle="default")
        if "lambda_sum" in history:
            sums = np.array([group[0].history["lambda_sum"] for group in seeds])
            _draw(axes[2], method, epochs[shown], sums[:, shown], drawstyle="default")
    for ax, x in zip(axes, ("epochs", "seconds", "epochs"), strict=True):
        ax.set(xlabel=x, yscale="log")
        ax.grid(alpha=0.3, linewidth=0.6)
        if epochs[-1] > MANY_EPOCHS:
            ax.set(xscale="log")
            _plain_ticks(ax.xaxis)
    for ax in axes[:2]:
        _plain_ticks(ax.yaxis, (1, 2, 3, 4, 6, 8))
    axes[0].set(ylabel=ylabel)
    axes[2].set(ylabel="ΣΛ, mean over the epoch")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False
    )
    save(figure, path)


def reconstructions(
    path: Path, images: np.ndarray, reconstructed: Mapping[str, np.ndarray]
) -> None:
    """A row of images, and below it a row of what every method makes of them."""
    rows = {"images": images} | dict(reconstructed)
    size = 1.1 * len(images) + 1.6, 1.1 * len(rows)
    figure, grid = plt.subplots(len(rows), len(images), figsize=size, layout="constrained")
    for line, (name, row) in zip(grid, rows.items(), strict=True):
        for ax, image in zip(line, row, strict=True):
            ax.imshow(image[..., 0], cmap="gray_r", vmin=images.min(), vmax=images.max())
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    save(figure, path)


def curves(
    runs: Sequence[Run], axis: str, limit: float, columns: Sequence[str]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Points along `axis`, and there for each column the values of the best run, seed by seed."""
    seeds = by_seed(runs).values()
    first = max(min(run.history[axis][0] for run in group) for group in seeds)
    last = min(max(run.history[axis][-1] for run in group) for group in seeds)
    x = np.geomspace(max(first, limit / 300), min(last, limit), POINTS)
    x = np.maximum(x, first)  # which rounding may have missed
    rows = [[best(group, axis, point) for point in x] for group in seeds]
    return x, [np.array([[r[column] for r in row] for row in rows]) for column in columns]


def _plain_ticks(axis, digits=(1, 2, 5)):
    """Labels 1, 2, 5, 10, …, or other digits, on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _draw(ax, method, x, curve, drawstyle="steps-post"):
    style = {"color": COLOURS[method], "linestyle": "-" if method.startswith(PROJECTED) else "--"}
    style |= {"label": method, "linewidth": 1.8, "drawstyle": drawstyle}
    ax.plot(x, np.median(curve, axis=0), **style)
    if len(curve) > 1:
        band = curve.min(axis=0), curve.max(axis=0)
        step = "post" if drawstyle == "steps-post" else None
        ax.fill_between(x, *band, color=COLOURS[method], alpha=0.12, linewidth=0, step=step)


def segmentation(path: Path, image, problem: vp.Problem, run: Run) -> None:
    """The classes of the labelled pixels, as they are and as the run's solution predicts them."""
    solution = run.solution
    logits = vp.predict(problem, solution.theta, solution.w, image.foreground[0])
    predicted = np.zeros_like(image.labels)
    predicted.flat[image.pixels.foreground] = 1 + np.asarray(logits).argmax(axis=1)
    accuracy = 100 * end(run)["validation_accuracy"]

    figure, axes = plt.subplots(1, 2, figsize=(10, 6.6), layout="constrained")
    colours = ListedColormap(["white", *CLASSES])
    titles = "ground truth", f"{run.method}, validation accuracy {accuracy:.1f} %"
    for ax, labels, title in zip(axes, (image.labels, predicted), titles, strict=True):
        ax.imshow(labels, cmap=colours, vmin=0, vmax=len(CLASSES), interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
    names = zip(CLASSES, image.class_names, strict=True)
    figure.legend(
        handles=[Patch(color=colour, label=name) for colour, name in names],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    save(figure, path)


def surface(path: Path, x: np.ndarray, truth: np.ndarray, fitted: np.ndarray, title: str) -> None:
    """A function on the square grid of coordinates `x`, its fit `title`, and their difference."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
    largest = np.abs(truth).max()
    for ax, values, name in zip(axes, (truth, fitted), ("truth", title), strict=False):
        shown = ax.pcolormesh(x, x, values, cmap="RdBu_r", vmin=-largest, vmax=largest)
        ax.set(title=name)
    figure.colorbar(shown, ax=axes[:2].tolist(), shrink=0.9)
    error = fitted - truth
    largest = np.abs(error).max()
    shown = axes[2].pcolormesh(x, x, error, cmap="PuOr", vmin=-largest, vmax=largest)
    axes[2].set(title="fit − truth")
    figure.colorbar(shown, ax=axes[2], shrink=0.9)
    for ax in axes:
        ax.set(xlabel="x", aspect="equal")
    axes[0].set(ylabel="y")
    save(figure, path)


def series(
    path: Path, times: np.ndarray, names: Sequence[str], truth: np.ndarray, predicted: np.ndarray
) -> None:
    """A row a sample, a column a place: what is observed and predicted over time; (samples, places,
    times)."""
    shape = truth.shape[:2]
    size = 2.2 * shape[1] + 0.6, 1.8 * shape[0] + 0.8
    figure, grid = plt.subplots(
        *shape, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for row, found, expected in zip(grid, predicted, truth, strict=True):
        for ax, line, points in zip(row, found, expected, strict=True):
            ax.plot(times, points, "o", color="k", markersize=3, label="simulated")
            ax.plot(times, line, color=COLOURS["GNvpro"], linewidth=1.8, label="predicted")
            ax.grid(alpha=0.3, linewidth=0.6)
    for ax, name in zip(grid[0], names, strict=True):
        ax.set_title(name, fontsize=10)
    for ax in grid[-1]:
        ax.set(xlabel="time")
    for k, row in enumerate(grid):
        row[0].set(ylabel=f"test sample {k + 1}\nconcentration")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    save(figure, path)


def maps(
    path: Path, x: np.ndarray, names: Sequence[str], truth: np.ndarray, predicted: np.ndarray
) -> None:
    """A row for each of `names`, of fields on the square grid of coordinates `x` in metres: as
    simulated and predicted, (rows, x, y) in mV, and the difference."""
    figure, grid = plt.subplots(
        len(names), 3, figsize=(11, 3.1 * len(names)), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for row, name, field, found in zip(grid, names, truth, predicted, strict=True):
        columns = (field, found, found - field)
        scales = [np.abs(field).max()] * 2 + [np.abs(found - field).max()]
        for ax, values, largest in zip(row, columns, scales, strict=True):
            cmap = "PuOr" if ax is row[2] else "RdBu_r"
            shown = ax.pcolormesh(x, x, values.T, cmap=cmap, vmin=-largest, vmax=largest)
            ax.set_aspect("equal")
            if ax is not row[0]:
                figure.colorbar(shown, ax=ax, label="mV", shrink=0.85)
        row[0].set(ylabel=f"{name}\ny in m")
    for ax, title in zip(grid[0], ("simulated", "predicted", "difference"), strict=True):
        ax.set_title(title)
    for ax in grid[-1]:
        ax.set(xlabel="x in m")
        ax.locator_params(axis="x", nbins=4)
    save(figure, path)


def regions(
    path: Path,
    grid: tuple[np.ndarray, np.ndarray],
    inside: np.ndarray,
    data: tuple[np.ndarray, np.ndarray],
    boundary: np.ndarray,
    title: str,
) -> None:
    """Where `inside`, the predicted probability on the grid, exceeds ½; data and true boundary."""
    figure, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    shown = ax.contourf(*grid, inside, levels=np.linspace(0, 1, 11), cmap="RdBu_r", alpha=0.6)
    figure.colorbar(
        shown, ax=ax, label="predicted probability of inside", ticks=[0, 0.5, 1], shrink=0.75
    )
    points, labels = data
    for k, (name, colour) in enumerate({"inside": "#8b0000", "outside": "#00306b"}.items()):
        chosen = points[labels[:, k] == 1]
        ax.plot(*chosen.T, ".", color=colour, markersize=2.5, label=f"data {name}")
    ax.contour(*grid, inside, levels=[0.5], colors="k", linewidths=3)
    ax.plot([], [], "k-", linewidth=3, label="decision boundary")
    ax.plot(*boundary.T, "--", color="#ffd500", linewidth=1.5, label="ellipse")
    ax.set(title=title, xlabel="x", ylabel="y", aspect="equal")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, markerscale=3)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure and forgets it."""
    figure.savefig(path, dpi=160)
    plt.close(figure)
