"""README: snippets that run with the wheel alone, links that lead somewhere, measured figures."""

import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
OURS = "github(?:usercontent)?.com/varprox-jax/varprox/(?:blob/)?main/"
# What is installed here beside the requirements of the wheel, a user may lack.
LACKING = """
import importlib.abc
import sys


class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Lacking())
"""


def test_readme_is_short():
    assert len(README.splitlines()) < 200


def test_snippets_run_from_an_empty_folder_with_the_wheel_alone(wheel, tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 8
    (tmp_path / "snippets.py").write_text("\n".join(snippets), encoding="utf-8")
    installed = closure("varprox-jax") | closure("equinox")  # one snippet is about equinox
    lacking = {
        module
        for module, distributions in packages_distributions().items()
        if installed.isdisjoint(map(canonicalize_name, distributions))
    }
    assert {"pytest", "matplotlib", "chex"} - installed <= lacking
    code = LACKING.format(names=lacking) + (
        f"sys.path.insert(0, {str(wheel)!r})\n"
        "import runpy, varprox\n"
        f"assert varprox.__file__.startswith({str(wheel)!r})\n"
        "runpy.run_path('snippets.py')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Solution: CONVERGED")


def closure(distribution):
    """The distribution with all that it requires, directly or not."""
    found, todo = set(), [distribution]
    while todo:
        name = canonicalize_name(todo.pop())
        if name not in found:
            found.add(name)
            needed = map(Requirement, requires(name) or ())
            todo += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_links_to_this_repository_lead_to_files():
    linked = re.findall(rf"https://[a-z.]*{OURS}([^)\s]*)", README)
    assert {"LICENSE", "CITATION.cff"} <= set(linked)
    for path in linked:
        assert (ROOT / path).is_file(), path
    # A relative link is broken on the package index.
    assert not re.findall(r"\]\((?!https://)", README)


def test_links_to_the_site_lead_to_pages():
    pages = re.findall(r"https://varprox-jax.github.io/varprox/([\w/]+)\.html", README)
    assert {"tour", "choose", "debug"} <= set(pages)
    for page in pages:
        sources = [ROOT / "docs" / f"{page}.md", ROOT / f"{page}.ipynb"]
        assert any(source.is_file() for source in sources), page


def test_the_table_is_the_races():
    result = ROOT / "benchmarks" / "results" / "race" / "result.json"
    course = json.loads(result.read_text(encoding="utf-8"))["results"]["peaks, 2000 points"]
    for method, row in course.items():
        cells = ["–" if value is None else f"{value:.2g}" for value in row["seconds"]]
        line = " | ".join([method, *cells, f"{row['compile_seconds']:.1f}"])
        assert f"| {line} |" in README
