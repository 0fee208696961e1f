"""The project as a whole: its floors, what importing it costs, and its public names."""

import inspect
import re
import statistics
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from repository import ROOT, build

import varprox


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


def test_the_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        *("varprox", f"varprox_jax-{varprox.__version__}.dist-info")
    }
    assert "varprox/py.typed" in names


def test_the_source_distribution_is_small(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames()]
    assert {"tests/conftest.py", "benchmarks/race.py", "docs/conf.py", "Makefile"} <= set(names)
    assert not [name for name in names if name.startswith(("benchmarks/results", "docs/_build"))]
    (archive,) = tmp_path.iterdir()
    assert archive.stat().st_size < 1_000_000


def test_the_edges_are_listed_though_they_are_loaded_late():
    assert {"datasets", "networks", "nnx", "transforms"} <= set(dir(varprox))
