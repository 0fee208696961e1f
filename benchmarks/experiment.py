"""What every experiment does with its runs: read them at budgets, tabulate and write them."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import varprox as vp

PROJECTED = ("GNvpro", "Broydenvpro", "LBFGSvpro", "slimTrain")  # the methods that project W out
KEPT = 40  # entries of a run's history that result.json holds at most


class Task(NamedTuple):
    """A training problem with the start and the data that all methods are given."""

    problem: vp.Problem
    theta: Any
    train: tuple
    validation: tuple
    metrics: Mapping[str, Callable]
    seed: int


class Run(NamedTuple):
    """One run of a method; tables show the best of a method's variants.

    `history` begins as that of the solution, and may go on beyond it.
    """

    method: str
    variant: str
    seed: int
    solution: vp.Solution
    history: Mapping[str, np.ndarray]


def accuracy(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """The fraction of samples whose largest prediction is that of their class."""
    return jnp.mean(predictions.argmax(axis=1) == targets.argmax(axis=1), dtype=predictions.dtype)


_predict = jax.jit(vp.predict)


def evaluate(problem: vp.Problem, theta, w, sets: Mapping[str, tuple], metrics: Mapping) -> dict:
    """`<set>_loss` and `<set>_<metric>` for each named set (inputs, targets)."""
    row = {}
    for name, (inputs, targets) in sets.items():
        predictions = _predict(problem, theta, w, inputs)
        row[f"{name}_loss"] = problem.loss.value(predictions, targets)
        row |= {f"{name}_{metric}": fn(predictions, targets) for metric, fn in metrics.items()}
    return {name: float(value) for name, value in row.items()}


def reading(run: Run, axis: str, limit: float) -> dict | None:
    """The last entry of a run's history that spent no more than `limit` of `axis`; None before."""
    spent = int(np.searchsorted(run.history[axis], limit, side="right"))
    if spent == 0:
        return None
    row = {name: float(column[spent - 1]) for name, column in run.history.items()}
    return {"method": run.method, "variant": run.variant} | row


def best(runs: Iterable[Run], axis: str, limit: float) -> dict | None:
    """Among the readings of several runs that with the lowest objective."""
    readings = [row for run in runs if (row := reading(run, axis, limit)) is not None]
    return min(readings, key=lambda row: row["objective"], default=None)


def by_method(runs: Iterable) -> dict[str, list]:
    """The runs, or competitors, of each method, in the order they come in."""
    groups: dict[str, list] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def by_seed(runs: Iterable[Run]) -> dict[int, list[Run]]:
    """The runs of each seed."""
    groups: dict[int, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.seed, []).append(run)
    return groups


def end(run: Run) -> dict:
    """How a run ended: the last entry of its solution's history, status and time to compile."""
    solution = run.solution
    return {
        "method": run.method,
        "variant": run.variant,
        "status": solution.status.name,
        "compile_seconds": solution.compile_seconds,
    } | {name: float(column[-1]) for name, column in solution.history.items()}


def spend(budgets: Sequence[float], last: float | None) -> tuple[float, ...]:
    """The budgets up to `last`, which becomes the last of them; all of them if it is None."""
    if last is None:
        return tuple(budgets)
    return (*(budget for budget in budgets if budget < last), last)


def at_limits(
    groups: Mapping[str, Sequence[Run]], axis: str, limits: Sequence[float]
) -> dict[str, list[dict | None]]:
    """For each method its best readings at the limits of `axis`."""
    return {
        method: [best(runs, axis, limit) for limit in limits] for method, runs in groups.items()
    }


def limit_table(
    title: str,
    readings: Mapping[str, Sequence[dict | None]],
    limits: Sequence[float],
    cell: Callable[[dict], str],
) -> str:
    """A line a method, a column a limit; a dash where a method had nothing to show yet."""
    columns = ["", *(f"{limit:.4g}" for limit in limits)]
    rows = [
        [method, *("–" if row is None else cell(row) for row in row_of_limits)]
        for method, row_of_limits in readings.items()
    ]
    return text_table(title, columns, rows)


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table under a title; the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in (columns, *rows)
    ]
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:]])


def write(
    output: Path,
    experiment: str,
    tables: Sequence[str],
    settings: Mapping,
    results: Mapping,
    runs: Iterable[Run],
) -> None:
    """Writes `table.txt` and `result.json` into the folder `output`, and prints the tables."""
    output.mkdir(parents=True, exist_ok=True)
    text = "\n\n\n".join(tables)
    (output / "table.txt").write_text(text + "\n", encoding="utf-8")
    contents = {
        "experiment": experiment,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine(),
        "settings": settings,
        "results": results,
        "runs": [_record(run) for run in runs],
    }
    content = json.dumps(_plain(contents), indent=1, allow_nan=False)
    (output / "result.json").write_text(content + "\n", encoding="utf-8")
    print(f"\n{text}\n\nwritten to {output}")


def _record(run):
    length = len(run.history["objective"])
    # Spread as on a logarithmic axis, on which histories are looked at.
    kept = np.unique(np.geomspace(1, length, KEPT).round().astype(int)) - 1
    return {
        "method": run.method,
        "variant": run.variant,
        "seed": run.seed,
        "status": run.solution.status.name,
        "compile_seconds": run.solution.compile_seconds,
        "history": {name: column[kept] for name, column in run.history.items()},
    }


def _plain(value):
    """The same in dictionaries, lists, strings and finite numbers; None for other numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def machine() -> dict:
    """What the times were measured on."""
    device = jax.devices()[0]
    return {
        "processor": _processor(),
        "cores": _cores(),
        "device": device.device_kind,
        "system": platform.system(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "varprox": vp.__version__,
        "dtype": str(jnp.result_type(float)),
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def _cores():
    """How many this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # known on Linux only
        return os.cpu_count()


def _commit():
    """The commit of this code, with "-dirty" where files differ from it; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
