"""The project as a whole: its floors, what importing it costs, and its public names."""

import inspect
import json
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import varprox

ROOT = Path(__file__).resolve().parent.parent


def run_python(code):
    """Run code in a fresh interpreter at the project's root and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_modules_import_only_from_the_floors_below():
    run_python(
        "from importlinter.cli import lint_imports_command as main; main(['--no-cache'])",
    )


def test_import_leaves_optional_and_heavy_packages_alone():
    loaded = run_python("import sys, varprox; print(*sys.modules, sep='\\n')").split()
    unwanted = {"matplotlib", "pandas", "tensorly", "pooch", "sklearn", "flax"}
    assert "varprox" in loaded
    assert unwanted.isdisjoint(loaded)


def test_import_costs_little_more_than_jax():
    # Processor times in one process: other processes blur them less than wall-clock times, and
    # their ratio is the same on a slow machine.
    code = (
        "from time import process_time as now; start = now(); import jax; between = now();"
        "import varprox; print((now() - between) / (between - start))"
    )
    assert statistics.median(float(run_python(code)) for _ in range(5)) < 0.5


@pytest.mark.parametrize("name", varprox.__all__)
def test_public_name_exists_and_is_documented(name):
    value = getattr(varprox, name)
    if name == "__version__":
        assert isinstance(value, str)
        return
    doc = inspect.getdoc(value)
    assert doc and doc.strip()
    # A NamedTuple without a docstring of its own is given 'Name(field, ...)'.
    assert not re.match(rf"{re.escape(name)}\([\w, ]*\)$", doc)


def test_public_names_are_listed_once():
    assert len(varprox.__all__) == len(set(varprox.__all__))


def test_oldest_versions_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {
        requirement.name: next(s.version for s in requirement.specifier if s.operator == ">=")
        for requirement in map(Requirement, project["dependencies"])
    }
    pins = [
        line.split("==")
        for line in (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    # NumPy is left to the resolver: which release is oldest depends on the Python in use.
    assert {**bounds, "numpy": None} == {**dict(pins), "numpy": None}


@pytest.mark.parametrize("table", ["at_work", "at_seconds"])
def test_readme_quotes_what_was_measured(table):
    result = ROOT / "benchmarks" / "results" / "indian_pines" / "result.json"
    readings = json.loads(result.read_text(encoding="utf-8"))["results"][table]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for method, rows in readings.items():
        cells = " | ".join(f"{row['objective']:.3f}" for row in rows)
        assert f"| {method} | {cells} |" in readme


def test_readme_quotes_the_medians_on_peaks():
    result = ROOT / "benchmarks" / "results" / "peaks" / "result.json"
    medians = json.loads(result.read_text(encoding="utf-8"))["results"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"as the median of five seeds, {medians['GNvpro']['median'][-1]:.1e}" in readme
    for method in ("LBFGSvpro", "Adam", "L-BFGS", "GN"):
        assert f"{method} {medians[method]['median'][-1]:.1e}" in readme


def test_readme_quotes_the_race():
    result = ROOT / "benchmarks" / "results" / "race" / "result.json"
    course = json.loads(result.read_text(encoding="utf-8"))["results"]["peaks, 2000 points"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for method, row in course.items():
        cells = ["–" if value is None else f"{value:.2g}" for value in row["seconds"]]
        line = " | ".join([method, *cells, f"{row['compile_seconds']:.1f}"])
        assert f"| {line} |" in readme
    units = [course[method]["work_units"][4] for method in ("trf (SciPy)", "GNvpro dense")]
    words = "{:.0f} units to 1e-6 where GNvpro takes {:.0f}".format(*units)
    assert words in " ".join(readme.split())


def test_readme_quotes_the_autoencoder():
    parts, on_gpu, long = (
        json.loads((ROOT / "benchmarks/results" / name / "result.json").read_text("utf-8"))
        for name in ("autoencoder", "autoencoder_h200", "autoencoder_h200_50")
    )
    assert on_gpu["machine"]["device"] == long["machine"]["device"] == "NVIDIA H200"
    parts, on_gpu, long = (contents["results"] for contents in (parts, on_gpu, long))
    columns = parts["full"], parts["128"], parts["512"], on_gpu["2048"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for method, variants in parts["512"].items():
        for variant in variants:
            found = [part.get(method, {}).get(variant) for part in columns]
            cells = ["–" if row is None else f"{row['lowest']:.1f}" for row in found]
            assert f"| {method}, {variant} | {' | '.join(cells)} |" in readme
    ratios = parts["step"]["slimTrain"]["ratio"], parts["step"]["sGCV"]["ratio"]
    words = "A step takes {:.2f} times as long as Adam's, {:.2f} times with sGCV".format(*ratios)
    assert words in " ".join(readme.split())
    seconds = [
        statistics.median(row["seconds"] for row in on_gpu["full"][method].values())
        for method in ("slimTrain", "Adam", "slimTrain, sGCV")
    ]
    words = "slimTrain {:.1f} s, Adam {:.1f} s and, for the sake of eigenvalues, sGCV {:.1f} s"
    assert words.format(*seconds) in " ".join(readme.split())
    slim, adam = (
        [min(row["lowest"] for row in long[part][method].values()) for part in ("full", "16384")]
        for method in ("slimTrain", "Adam")
    )
    assert round(slim[0], 1) == round(adam[0], 1)
    words = "at {:.1f} after 50 epochs of all images, and with 16,384 images at {:.1f} and, Adam, "
    words += "{:.1f}"
    assert words.format(*slim, adam[1]) in " ".join(readme.split())


@pytest.mark.parametrize("experiment", ["cdr", "dcr"])
def test_readme_quotes_the_surrogates(experiment):
    """Medians of the excess at equal work and equal seconds, and test errors, of both widths."""
    result = ROOT / "benchmarks" / "results" / experiment / "result.json"
    contents = json.loads(result.read_text(encoding="utf-8"))["results"]
    widths = [contents[f"{experiment}, width {width}"]["methods"] for width in (8, 16)]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for method in widths[0]:
        cells = []
        for rows in widths:
            excess, errors = rows[method]["excess"], rows[method]["errors"]["test"]
            cells += [
                f"{statistics.median(excess[axis]):.1e}" for axis in ("work_units", "seconds")
            ]
            cells.append(
                f"{100 * statistics.mean(errors):.2g} ± {100 * statistics.pstdev(errors):.1g}"
            )
        assert f"| {method} | {' | '.join(cells)} |" in readme
    words = " ".join(readme.split())
    assert f"ridge regression has {100 * contents['ridge']['test']:.0f} %" in words
    simulator, network = (contents["speed"][who]["one"] for who in ("simulator", "network"))
    assert f"1/{simulator / network:.0f} " in words


def test_readme_quotes_the_surrogates_on_a_gpu():
    """The excess at equal seconds, and how much longer the matrix takes."""
    found, ratios = {}, []
    for experiment in ("cdr", "dcr"):
        result = ROOT / "benchmarks" / "results" / f"{experiment}_h200" / "result.json"
        contents = json.loads(result.read_text(encoding="utf-8"))
        assert contents["machine"]["device"] == "NVIDIA H200"
        found |= contents["results"]
        for width in contents["settings"]["widths"]:
            spent = {
                run["variant"]: run["history"]["seconds"][-1]
                for run in contents["runs"]
                if run["method"] == "GNvpro" and run["variant"].startswith(f"width {width};")
            }
            matrix = next(name for name in spent if name.endswith("dense"))
            ratios.append(spent[matrix] / spent[f"width {width}; krylov"])
    assert max(ratios) < 2
    columns = [found[name] for name in ("cdr, width 8", "cdr, width 16", "dcr, width 16")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for method in columns[0]["methods"]:
        rows = [column["methods"].get(method) for column in columns]
        cells = ["–" if row is None else f"{row['excess']['seconds'][0]:.1e}" for row in rows]
        assert f"| {method} | {' | '.join(cells)} |" in readme
    seconds = [column["seconds"] for column in columns]
    words = "The seconds are {:.2f}, {:.2f} and {:.1f}".format(*seconds)
    assert words in " ".join(readme.split())
