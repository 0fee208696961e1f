"""The README's first picture, from the results of the race and of a surrogate.

`python -m benchmarks.overview` draws it again when these have changed.
"""

import json
from pathlib import Path

import numpy as np

from benchmarks import plots
from benchmarks.experiment import Run, by_method

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "overview.png"
RACERS = (
    *("GNvpro dense", "Broydenvpro", "LBFGSvpro"),
    *("Broyden", "L-BFGS (SciPy)", "Adam, cosine", "trf (SciPy)"),
)
COURSE = "peaks, 2000 points"
SURROGATE = "cdr"
WIDTH = "width 16"


def contents(experiment: str) -> dict:
    """What the experiment's committed `result.json` holds."""
    path = ROOT / "benchmarks" / "results" / experiment / "result.json"
    return json.loads(path.read_text(encoding="utf-8"))


def race() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each method the median seconds to the levels that it reached, and these levels."""
    found = contents("race")
    levels = found["settings"]["courses"][COURSE]["levels"]
    lines = {}
    for method in RACERS:
        seconds = found["results"][COURSE][method]["seconds"]
        reached = [(s, level) for s, level in zip(seconds, levels, strict=True) if s is not None]
        x, values = np.transpose(reached)
        lines[method] = x, values[None]
    return lines


def surrogate() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each method its best variant at any time, seed by seed."""
    runs = [
        Run(run["method"], run["variant"], run["seed"], None, column(run["history"]))
        for run in contents(SURROGATE)["runs"]
        if run["variant"].startswith(WIDTH)
    ]
    longest = max(run.history["seconds"][-1] for run in runs)
    lines = {}
    for method, group in by_method(runs).items():
        x, (values,) = plots.curves(group, "seconds", longest, ["objective"])
        lines[method] = x, values
    return lines


def column(history: dict) -> dict[str, np.ndarray]:
    """Of a history what the picture shows."""
    return {name: np.array(history[name]) for name in ("seconds", "objective")}


def main() -> None:
    """Draws the picture."""
    PICTURE.parent.mkdir(exist_ok=True)
    panels = {
        "Regression: 2000 values of MATLAB's peaks": (race(), "objective"),
        "Surrogate: convection–diffusion–reaction": (surrogate(), "training loss above its floor"),
    }
    plots.against_seconds(PICTURE, panels)


if __name__ == "__main__":
    main()
